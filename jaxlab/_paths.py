"""Names of the leaves of a tree."""

from typing import Any

import jax


def joined(path: Any) -> str:
    """Joins the parts of a leaf's path by "/"."""
    # An nnx.State wraps each array in a variable, which is no part of the name.
    if len(path) > 1 and str(path[-1]) == ".value":
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")
