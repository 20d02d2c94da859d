"""Parts of the site that are made, not written: results, notebooks, names, links.

``conf.py`` calls these at every build and ``tests/test_docs.py`` without one. Needs the
standard library alone.
"""

import ast
import pathlib
import posixpath
import re
import shutil

DOCS = pathlib.Path(__file__).parent
ROOT = DOCS.parent
RESULTS = ROOT / "benchmarks" / "results"

# Modules with a page in ``reference/``; the rest of a path is the page's name.
MODULES = (
    "structured",
    "curvature",
    "sharpness",
    "optimizers",
    "layers",
    "models",
    "training",
    "datasets",
    "likelihoods",
    "objective",
    "trees",
    "catalog",
)

# Files of the repository that have a page of their own on the site.
PAGES_OF = {
    "benchmarks/results/README.md": "results/index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "adding_a_method.md",
    "README.md": "index.md",
}

LINK = re.compile(r"(?<=\]\()([^)\s]+)(?=\))")
FENCE = re.compile(r"^ *(```+|~~~+)[^\n]*\n.*?^ *\1[ \t]*$", re.M | re.S)


def public_names(module):
    """Reads ``__all__`` of a module of the package, without importing it."""
    folder = ROOT / "jaxlab" / module
    path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == (
            "__all__"
        ):
            return set(ast.literal_eval(node.value))
    raise ValueError(f"{path} assigns no __all__.")


def modules():
    """Lists the public modules that the package names."""
    source = (ROOT / "jaxlab" / "__init__.py").read_text()
    return set(re.findall(r'"(\w+)"', source.split("_FOLDERS = (")[1].split(")")[0]))


def referenced_names(text):
    """Finds the names in the ``autosummary`` lists of a page, in order."""
    names = []
    for block in re.findall(r"\.\. autosummary::\n(.*?)(?:```|\Z)", text, re.S):
        names += re.findall(r"^   (\w+)$", block, re.M)
    return names


def coverage():
    """Compares the reference with the package; an empty list is right."""
    found = modules()
    problems = [f"jaxlab.{m} has no page" for m in sorted(found - set(MODULES))]
    problems += [f"jaxlab.{m} is no module" for m in sorted(set(MODULES) - found)]
    for module in MODULES:
        page = DOCS / "reference" / f"{module}.md"
        names = referenced_names(page.read_text()) if page.exists() else []
        public = public_names(module)
        where = f"reference/{module}.md"
        problems += [f"{where} lacks {n}" for n in sorted(public - set(names))]
        problems += [f"{where} has {n}, not public" for n in set(names) - public]
        problems += [f"{where} has {n} twice" for n in names if names.count(n) > 1]
    return problems


def results_pages():
    """Cuts the report of all results into pages: name -> Markdown.

    A section becomes a page; the first page lists them with what each one says.
    """
    report = (RESULTS / "README.md").read_text()
    sections = re.split(r"^## ", report, flags=re.M)[1:]
    pages, kinds = {}, {}
    for section in sections:
        title, body = section.split("\n", 1)
        kind, subject = title.split()
        body = re.sub(r"^### ", "## ", body, flags=re.M)
        pages[f"{kind}_{subject}"] = f"# {title.replace('_', ' ').capitalize()}\n{body}"
        statement, *_ = body.strip().split("\n\n## ")
        verdicts = re.findall(r"^## (\S+)\n\n(\*[a-z ]+\*)", body, flags=re.M)
        told = "; ".join(f"{verdict} on {device}" for device, verdict in verdicts)
        link = f"[{subject.replace('_', ' ')}]({kind}_{subject}.md)"
        row = f"| {link} | {statement.replace('|', chr(92) + '|')} | {told} |"
        kinds.setdefault(kind, []).append(" ".join(row.split()))
    heads = {
        "claim": "What the paper says, as it is put to the test",
        "speed": "What is asked of the time",
        "estimate": "What is asked of the compiler's estimate",
    }
    titles = {"claim": "Claims", "speed": "Speed", "estimate": "Compilers' estimates"}
    parts = [
        "# Results\n\nCopied from the report that `python -m benchmarks report` makes "
        "from the result files; nothing here is typed by hand. A verdict comes from a "
        "full run and by a rule that was stated before it. *Not shown* means that the "
        "rule was not met, not that the contrary holds; the page says by how much. A "
        "device whose name ends in `-compiled` was not there: its compiler was, and "
        "what it says is an estimate. The tables of the demo are [here](demo.md)."
    ]
    for kind in ("claim", "speed", "estimate"):
        if kind in kinds:
            table = f"| {kind} | {heads[kind]} | verdict |\n|---|---|---|\n"
            table += "\n".join(kinds[kind])
            parts.append(
                f"## {titles[kind]}\n\n:::{{container}} sentences\n\n{table}\n\n:::"
            )
    names = "\n".join(["demo", *pages])
    parts.append(f"```{{toctree}}\n:hidden:\n\n{names}\n```\n")
    pages["index"] = "\n\n".join(parts)
    pages["demo"] = _demo()
    return pages


def _demo():
    readme = (ROOT / "README.md").read_text()
    figures = readme.split("<!-- figures -->")[1].split("<!-- /figures -->")[0]
    figures = figures.split("Verdicts of the full runs")[0].strip()
    return (
        "# Tables of the demo\n\nWhat `make demo` prints, on each machine that it was "
        "run on. Copied from the result files by `python -m benchmarks readme`.\n\n"
        f"{figures}\n"
    )


def make_parts():
    """Writes the pages and copies of pictures and notebooks below ``docs/``."""
    pages = {f"{name}.md": text for name, text in results_pages().items()}
    for name, text in pages.items():
        _write(DOCS / "results" / name, text)
    for picture in RESULTS.glob("*/*.png"):
        _copy(picture, DOCS / "results" / picture.relative_to(RESULTS))
    kept = {DOCS / "results" / name for name in pages}
    for page in set((DOCS / "results").glob("*.md")) - kept:
        page.unlink()
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    for notebook in notebooks:
        _copy(notebook, DOCS / "notebooks" / notebook.name)
    names = "\n".join(notebook.stem for notebook in notebooks)
    _write(
        DOCS / "notebooks" / "index.md",
        "# Notebooks\n\nShown with the outputs that they were stored with; they stand "
        "in `notebooks/`, each as a notebook and as a script. `make notebooks` runs "
        "them all.\n\n"
        f"```{{toctree}}\n:maxdepth: 1\n\n{names}\n```\n",
    )


def page_of(link, page):
    """Gives the page of the site that a relative link of another page means.

    Args:
      link: as written, ``../notebooks/00_first_steps.ipynb`` or with an anchor.
      page: path of the page that has it, relative to ``docs/``.

    Returns:
      The link to the page that shows that file, or the link as it was.
    """
    if "://" in link or link.startswith(("#", "mailto:")):
        return link
    path, _, anchor = link.partition("#")
    base = posixpath.join("docs", posixpath.dirname(page))
    path = posixpath.normpath(posixpath.join(base, path))
    if path.startswith("docs/"):
        return link
    target = PAGES_OF.get(path, path)
    if path.startswith("notebooks/"):
        anchor = ""
    elif path == "benchmarks/results/README.md" and anchor:
        target, anchor = f"results/{anchor.replace('-', '_')}.md", ""
    there = posixpath.relpath(target, posixpath.dirname(page) or ".")
    return there + (f"#{anchor}" if anchor else "")


def rewritten(text, page):
    """Turns links to files of the repository into links to their pages."""
    out, last = [], 0
    for fence in FENCE.finditer(text):
        out.append(LINK.sub(lambda m: page_of(m[1], page), text[last : fence.start()]))
        out.append(fence[0])
        last = fence.end()
    out.append(LINK.sub(lambda m: page_of(m[1], page), text[last:]))
    return "".join(out)


def anchors(text):
    """Gives the anchors of the headings of a page, as GitHub and the site make them."""
    found = {}
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", FENCE.sub("", text), re.M):
        heading = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        count = found.get(slug, 0)
        found[slug] = count + 1
        if count:
            found[f"{slug}-{count}"] = 1
    return set(found)


def _write(path, text):
    """Leaves a file alone that holds the text already, so that builds stay short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def _copy(source, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_bytes() != source.read_bytes():
        shutil.copyfile(source, path)
