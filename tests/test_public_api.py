"""Everything in an ``__all__``: docstring, example, ``key`` first, keywords."""

import importlib
import inspect
import pathlib
import pkgutil
import re
import subprocess
import sys
import types

import pytest

import jaxlab

MODULES = sorted(
    name
    for _, name, _ in pkgutil.walk_packages(jaxlab.__path__, "jaxlab.")
    if not name.endswith("_dataset_builder")
    and not name.rpartition(".")[2].startswith("_")
)


def _public():
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name in getattr(module, "__all__", ()):
            thing = getattr(module, name)
            if not isinstance(thing, types.ModuleType):
                yield pytest.param(thing, id=f"{module_name}.{name}")


PUBLIC = list(_public())
FUNCTIONS = [p for p in PUBLIC if inspect.isfunction(p.values[0])]


@pytest.mark.parametrize("name", MODULES)
def test_modules_have_docstrings_and_sorted_all(name):
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} has no docstring"
    listed = list(getattr(module, "__all__", ()))
    assert listed == sorted(listed), f"{name}.__all__ is not in alphabetical order"


@pytest.mark.parametrize("thing", [p for p in PUBLIC if callable(p.values[0])])
def test_docstrings(thing):
    doc = inspect.getdoc(thing)
    assert doc, "no docstring"
    first = doc.splitlines()[0]
    assert len(first) <= 80, f"first line of {len(first)} characters"
    assert first.endswith("."), "the first line is no sentence"
    assert ">>>" in doc, "no example"


@pytest.mark.parametrize("function", FUNCTIONS)
def test_signatures(function):
    doc = inspect.getdoc(function)
    parameters = list(inspect.signature(function).parameters.values())
    names = [p.name for p in parameters]
    positional = [
        p.name
        for p in parameters
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if "key" in positional:
        assert positional[0] == "key", "key must be the first argument"
    if parameters:
        assert re.search(r"^Args:$", doc, re.MULTILINE), "no Args section"
        for name in names:
            assert re.search(rf"^  \*?\*?{name}\b", doc, re.MULTILINE), f"no {name}"
    if inspect.signature(function).return_annotation is not None:
        assert re.search(r"^(Returns|Yields):$", doc, re.MULTILINE), (
            "no Returns section"
        )
    annotations = [p.annotation for p in parameters]
    assert inspect.Parameter.empty not in annotations, "an argument without a type"


# Signatures that read best as they are: these arguments are data, not options, or the
# leading hyperparameters of a transformation, as in optax.
BY_POSITION = {
    "annealed_gradient_noise": {"eta", "gamma"},
    "asam": {"rho"},
    "densify": {"predicate"},
    "fishleg": {"learning_rate"},
    "gradient_noise_schedule": {"eta", "gamma"},
    "gradient_norm_penalty": {"alpha", "radius"},
    "hessian_operator": {"batches"},
    "hybrid": {"probability"},
    "load": {"data_dir"},
    "look_sam": {"rho"},
    "monarchize": {"predicate"},
    "row_shares": {"weights"},
    "sam": {"rho"},
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_options_are_keywords(function):
    """After the data come keywords: a default value marks an option."""
    _, *rest = inspect.signature(function).parameters.values() or [None]
    for parameter in rest:
        option = parameter.default is not inspect.Parameter.empty
        if option and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            allowed = BY_POSITION.get(function.__name__, set())
            assert parameter.name in allowed, f"{parameter.name} must be keyword-only"


def _python(code, *arguments):
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments, "-c", code],
        check=True,
        capture_output=True,
        text=True,
    ).stdout


def test_import_is_cheap_and_loads_nothing():
    heavy = {"jax", "flax", "optax", "tensorflow_datasets", "matplotlib", "sklearn"}
    code = "import sys, jaxlab; print(*sorted(m.split('.')[0] for m in sys.modules))"
    assert not heavy & set(_python(code).split())


def test_floors_0_and_1_import_no_flax_and_datasets_no_tfds():
    code = (
        "import sys, jaxlab.structured, jaxlab.likelihoods, jaxlab.objective,"
        " jaxlab.trees, jaxlab.datasets, jaxlab.catalog;"
        " print(*sorted({m.split('.')[0] for m in sys.modules}))"
    )
    loaded = set(_python(code).split())
    assert "jax" in loaded
    heavy = {
        "flax",
        "tensorflow",
        "tensorflow_datasets",
        "matplotlib",
        "sklearn",
        "orbax",
    }
    assert not heavy & loaded


def test_lazy_folders():
    assert set(jaxlab.__all__) <= set(dir(jaxlab))
    assert jaxlab.likelihoods is importlib.import_module("jaxlab.likelihoods")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = jaxlab.nothing
    folders = {p.name for p in pathlib.Path(jaxlab.__file__).parent.iterdir()}
    found = {n.removesuffix(".py") for n in folders if not n.startswith(("_", "."))}
    listed = set(jaxlab.__all__) - {"__version__"}
    assert listed == {n for n in found if "." not in n}, "a folder is not in __all__"


@pytest.mark.parametrize("room", ["layers", "models", "training"])
def test_without_flax_the_message_names_the_extra(room):
    code = (
        "import sys; sys.modules['flax'] = None\n"
        "try:\n"
        f"    import jaxlab.{room}\n"
        "except ImportError as error:\n"
        "    print(error)"
    )
    assert 'pip install "jaxlab[train]"' in _python(code)
