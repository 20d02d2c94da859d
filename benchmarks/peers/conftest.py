"""Keeps doctest from importing what is not installed."""

import importlib.util

_NEEDS = {
    "matfree_lanczos.py": ("matfree", "traceax"),
    "pyhessian_lanczos.py": ("torch", "pyhessian"),
    "torch_monarch.py": ("torch",),
}

collect_ignore = [
    file
    for file, packages in _NEEDS.items()
    if not all(map(importlib.util.find_spec, packages))
]
