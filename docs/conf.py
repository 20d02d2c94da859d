"""Settings of the documentation site; ``make docs`` builds it, warnings are errors."""

import os
import pathlib
import re
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).parent))

import site_parts
from sphinx.errors import ExtensionError
from sphinx.util.nodes import make_refnode

import jaxlab

project = "jaxlab"
author = "The jaxlab authors"
release = jaxlab.__version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "_templates", "_static"]
templates_path = ["_templates"]

html_theme = "furo"
html_title = f"jaxlab {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
# Light and dark; both pass the contrast of WCAG AA on furo's backgrounds.
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
nb_execution_mode = "off"
nb_merge_streams = True

autodoc_default_options = {"members": True}
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_attr_annotations = False
napoleon_use_ivar = True
autosummary_generate = True
autosummary_imported_members = True

# Every reference of ours must resolve. Those to other projects cannot be looked up
# without a network, so they stay plain text: built-in exceptions under "Raises", names
# that begin with another project's, and types of fields that are not public.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(\w+Error|StopIteration|KeyboardInterrupt|DeprecationWarning)"),
    ("py:.*", r"(collections|jax|jaxlib|jaxtyping|optax|flax|numpy|np|nnx)(\..*)?"),
    ("py:class", r"jaxlab\.(.+\.)?_\w+"),
    ("py:class", r"jaxlab\.optimizers\.fisher_legendre\.blocks\.Block"),
    ("py:func", r"jaxlab\.training\.feed\.resident"),
]
# `sphinx -b linkcheck docs out/linkcheck` asks the hosts of external links.
linkcheck_timeout = 20
linkcheck_retries = 2
linkcheck_anchors = False

# A page for each public name, in files that differ where case does not count.
_lowered = {}
for _module in site_parts.MODULES:
    for _name in sorted(site_parts.public_names(_module), reverse=True):
        _full = f"jaxlab.{_module}.{_name}"
        _lowered.setdefault(_full.lower(), []).append(_full)
autosummary_filename_map = {
    full: f"{full}-class"
    for same in _lowered.values()
    if len(same) > 1
    for full in same
    if full.rsplit(".", 1)[1][0].isupper()
}


def _make_parts(app):
    problems = site_parts.coverage()
    if problems:
        raise ExtensionError("The reference is not complete: " + "; ".join(problems))
    site_parts.make_parts()


def _rewrite(app, docname, source):
    path = app.env.doc2path(docname, base=False)
    if str(path).endswith(".md"):
        source[0] = site_parts.rewritten(source[0], str(path))


def _returns_have_no_types(app, what, name, obj, options, lines):
    """Keeps napoleon from taking words before a colon for a type; ours has none."""
    if what in ("attribute", "data", "property") and lines:
        lines[0] = f": {lines[0]}"
    for i, line in enumerate(lines[:-1]):
        if line.strip() in ("Returns:", "Yields:"):
            text = lines[i + 1].lstrip()
            lines[i + 1] = lines[i + 1].replace(text, f": {text}", 1)


def _by_last_name(app, env, node, contnode):
    """Resolves ``:func:`plain``` in another module's text, where it is one name."""
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"].lstrip(".")
    domain = env.domains["py"]
    found = {
        name
        for module in site_parts.MODULES
        if (name := f"jaxlab.{module}.{target}") in domain.objects
    }
    if len(found) != 1:
        return None
    (name,) = found
    entry = domain.objects[name]
    return make_refnode(
        app.builder, node["refdoc"], entry.docname, entry.node_id, contnode, name
    )


def _mended(app, what, name, obj, options, lines):
    """Mends what docutils cannot read: lone stars of formulas, "``Struct``s"."""
    # Literals may go on over the end of a line, so the lines are cut as one text.
    cut = re.split(r"(``.*?``)", "\n".join(lines), flags=re.DOTALL)
    for i in range(0, len(cut), 2):
        cut[i] = re.sub(r"(?<![\\*])\*(?=[\w(])", r"\\*", cut[i])
        if i and cut[i][:1].isalpha():
            cut[i] = f"\\ {cut[i]}"
    lines[:] = "".join(cut).split("\n")


def _skip_fields(app, what, name, obj, skip, options):
    """Leaves out the fields of named tuples, which "Attributes" has described."""
    if type(obj).__name__ == "_tuplegetter":
        return True
    return None


def setup(app):
    """Connects what is above."""
    app.connect("config-inited", lambda app, config: _make_parts(app))
    app.connect("source-read", _rewrite)
    app.connect("autodoc-process-docstring", _returns_have_no_types, priority=100)
    app.connect("autodoc-process-docstring", _mended, priority=900)
    app.connect("missing-reference", _by_last_name)
    app.connect("autodoc-skip-member", _skip_fields)
