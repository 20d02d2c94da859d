"""Deep-learning methods as pure JAX functions that compose.

``jaxlab`` (not ``jaxlib``, XLA's binary package) loads its folders on first use, so
``import jaxlab`` is cheap and imports neither jax nor flax. The folders are in
``__all__``; the table of methods is :mod:`jaxlab.catalog`.
"""

import importlib
from types import ModuleType

__version__ = "0.1.0"

_FOLDERS = (
    "catalog",
    "curvature",
    "datasets",
    "layers",
    "likelihoods",
    "models",
    "objective",
    "optimizers",
    "sharpness",
    "structured",
    "training",
    "trees",
)

__all__ = ["__version__", *_FOLDERS]

# Folders that need more than the core, and the extra that brings it.
_NEEDS_FLAX = ("layers", "models", "training")


def __getattr__(name: str) -> ModuleType:
    if name not in _FOLDERS:
        raise AttributeError(f"module 'jaxlab' has no attribute {name!r}")
    return importlib.import_module(f"jaxlab.{name}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
