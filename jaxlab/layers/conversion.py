"""Turns dense layers into Monarch layers, by projection, and back.

The factors act as a matrix (outputs, inputs) and a Flax kernel is (inputs, outputs), so
every conversion transposes. A kernel whose sides the blocks do not divide is padded
with zero rows and columns first; the matrix of a padded layer is cut again on the way
back. There are two forms: on trees of parameters (plain dicts, Linen dicts,
``nnx.State``) and on whole NNX models.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, PyTree

from jaxlab._checks import are_sizes
from jaxlab.layers.monarch import MonarchLinear
from jaxlab.structured import MonarchFactors, monarch_project, monarch_to_dense

Path = tuple[str | int, ...]


def monarchize_params(
    params: PyTree,
    predicate: Callable[[Path, Any], bool],
    *,
    nblocks: int = 4,
    rank: int | None = None,
) -> PyTree:
    """Replaces dense kernels in a tree of parameters by their Monarch projections.

    Every mapping that holds a two-dimensional ``kernel`` (inputs, outputs), and for
    which the predicate holds, gives up the kernel for ``w1`` and ``w2``, the factors
    of its transpose. Its other entries, the bias among them, and everything else in
    the tree stay as they are.

    Args:
      params: any tree of mappings: plain dicts, ``nnx.State``, Linen dicts.
      predicate: ``predicate(path, kernel)`` says whether to convert; the path leads
        to the mapping, as a tuple of keys: ``("params", "Dense_0")``.
      nblocks: blocks of each factor.
      rank: of each slice. A layer whose slices have fewer rows or columns takes
        min(ceil(n / nblocks), ceil(m / nblocks)) instead, where nothing is lost.
        None takes the largest rank, at least 1, whose middle is no wider than the
        narrower end: where widths divide, the sizes of a fresh ``MonarchLinear``.

    Returns:
      A new tree; converted mappings keep their type.

    Raises:
      ValueError: if ``nblocks`` or ``rank`` is below 1 or a kernel holds integers.

    Examples:
      >>> params = {"dense": {"kernel": jnp.eye(8, 6), "bias": jnp.zeros(6)}}
      >>> new = monarchize_params(params, lambda path, kernel: path == ("dense",),
      ...                         nblocks=2)
      >>> jax.tree.map(jnp.shape, new["dense"])
      {'bias': (6,), 'w1': (2, 2, 4), 'w2': (2, 3, 2)}
    """
    _check_options("monarchize_params", nblocks, rank)

    def convert(path: Path, node: Any) -> Any:
        if not _is_dense(node) or not predicate(path, node["kernel"]):
            return node
        factors = _project(_value(node["kernel"]), nblocks, rank)
        rest = {key: value for key, value in node.items() if key != "kernel"}
        w1, w2 = (_like_leaf(node["kernel"], factor) for factor in factors)
        return type(node)({**rest, "w1": w1, "w2": w2})

    return _map_layers(convert, params, _is_dense)


def densify_params(
    params: PyTree,
    *,
    like: PyTree | None = None,
    predicate: Callable[[Path, Any], bool] | None = None,
) -> PyTree:
    """Replaces Monarch factors in a tree of parameters by dense kernels.

    Every mapping that holds ``w1`` and ``w2`` that fit together gives them up for
    ``kernel`` (inputs, outputs), the transpose of the matrix of the factors.

    Args:
      params: a tree such as `monarchize_params` returns or as a model with
        ``MonarchLinear`` layers has.
      like: a tree of the dense parameters, or of ``jax.ShapeDtypeStruct``, whose
        kernels tell the true widths of padded layers. Without it a kernel has the
        padded number of inputs, and as many outputs as the bias where there is one.
      predicate: ``predicate(path, factors)`` says whether to convert, with
        ``factors.w1`` and ``factors.w2`` and the path to the mapping; None converts
        all. Give one where other layers have three-dimensional ``w1`` and ``w2``.

    Returns:
      A new tree; converted mappings keep their type.

    Raises:
      ValueError: if ``like`` has no kernel where one is needed, or a wider one than
        the factors.

    Examples:
      >>> params = {"dense": {"w1": jnp.ones((2, 2, 4)), "w2": jnp.ones((2, 3, 2))}}
      >>> densify_params(params)["dense"]["kernel"].shape
      (8, 6)
      >>> like = {"dense": {"kernel": jax.ShapeDtypeStruct((7, 5), jnp.float32)}}
      >>> densify_params(params, like=like)["dense"]["kernel"].shape
      (7, 5)
    """
    shapes = {} if like is None else _kernel_shapes(like)

    def convert(path: Path, node: Any) -> Any:
        if not _is_monarch(node):
            return node
        factors = MonarchFactors(_value(node["w1"]), _value(node["w2"]))
        if predicate is not None and not predicate(path, factors):
            return node
        padded = _padded_shape(factors)
        if like is not None:
            shape = _true_shape(path, shapes, padded)
        else:
            bias = node.get("bias")
            shape = padded if bias is None else (padded[0], bias.shape[0])
        kernel = _like_leaf(node["w1"], _dense_kernel(factors, *shape))
        rest = {key: value for key, value in node.items() if key not in ("w1", "w2")}
        return type(node)({**rest, "kernel": kernel})

    return _map_layers(convert, params, _is_monarch)


def monarchize(
    model: Any,
    predicate: Callable[[Path, nnx.Linear], bool] | None = None,
    *,
    nblocks: int = 4,
    rank: int | None = None,
) -> Any:
    """Copies a model with its ``nnx.Linear`` layers projected to Monarch layers.

    Layers are found wherever they stand (attributes, ``nnx.List``, ``nnx.Dict``, the
    model itself); those that are shared, or that share a kernel, stay so. Subclasses
    of ``nnx.Linear`` are left alone, since they may compute something else. Biases
    and the dtypes carry over; a layer's ``precision`` and ``dot_general`` do not.

    Args:
      model: an NNX module or container; it is not changed.
      predicate: ``predicate(path, layer)`` says whether to convert, with the path as
        in ``nnx.iter_modules``: ``("layers", 0)``; None converts all. A shared layer
        is asked for once.
      nblocks: blocks of each factor.
      rank: of each slice, as in `monarchize_params`.

    Returns:
      A new model, with ``MonarchLinear`` in place of the converted layers.

    Raises:
      ValueError: if ``nblocks`` or ``rank`` is below 1.

    Examples:
      >>> from flax import nnx
      >>> model = nnx.Linear(24, 36, rngs=nnx.Rngs(0))
      >>> small = monarchize(model, nblocks=4)
      >>> small.w1.shape, small.w2.shape
      ((4, 4, 6), (4, 9, 4))
    """
    _check_options("monarchize", nblocks, rank)
    copy = nnx.clone(model)  # keeps the old variables alive, so that ids stay unique
    shared: dict[int, tuple[nnx.Param, nnx.Param]] = {}

    def convert(path: Path, node: Any) -> Any:
        if type(node) is not nnx.Linear:
            return node
        if predicate is not None and not predicate(path, node):
            return node
        if id(node.kernel) not in shared:
            factors = _project(node.kernel[...], nblocks, rank)
            shared[id(node.kernel)] = nnx.Param(factors.w1), nnx.Param(factors.w2)
        w1, w2 = shared[id(node.kernel)]
        make = lambda rngs: MonarchLinear(
            node.in_features,
            node.out_features,
            nblocks=nblocks,
            rank=w1.shape[1] // nblocks,
            use_bias=node.use_bias,
            dtype=node.dtype,
            param_dtype=node.param_dtype,
            rngs=rngs,
        )
        layer = nnx.eval_shape(make, nnx.Rngs(0))  # no numbers drawn in vain
        layer.w1, layer.w2, layer.bias = w1, w2, node.bias
        return layer

    return nnx.recursive_map(convert, copy)


def densify(
    model: Any, predicate: Callable[[Path, MonarchLinear], bool] | None = None
) -> Any:
    """Copies a model with its ``MonarchLinear`` layers turned into ``nnx.Linear``.

    The new model computes the same outputs up to round-off. What `monarchize` says
    of shared layers, subclasses and dtypes holds here too.

    Args:
      model: an NNX module or container; it is not changed.
      predicate: ``predicate(path, layer)`` says whether to convert; None converts
        all.

    Returns:
      A new model, with ``nnx.Linear`` in place of the converted layers.

    Examples:
      >>> from flax import nnx
      >>> model = MonarchLinear(10, 7, nblocks=4, rngs=nnx.Rngs(0))
      >>> densify(model).kernel.shape
      (10, 7)
    """
    copy = nnx.clone(model)  # keeps the old variables alive, so that ids stay unique
    shared: dict[tuple[int, ...], nnx.Param] = {}

    def convert(path: Path, node: Any) -> Any:
        if type(node) is not MonarchLinear:
            return node
        if predicate is not None and not predicate(path, node):
            return node
        widths = node.in_features, node.out_features
        key = (id(node.w1), id(node.w2), *widths)
        if key not in shared:
            factors = MonarchFactors(node.w1[...], node.w2[...])
            shared[key] = nnx.Param(_dense_kernel(factors, *widths))
        make = lambda rngs: nnx.Linear(
            *widths,
            use_bias=node.use_bias,
            dtype=node.dtype,
            param_dtype=node.param_dtype,
            rngs=rngs,
        )
        layer = nnx.eval_shape(make, nnx.Rngs(0))
        layer.kernel, layer.bias = shared[key], node.bias
        return layer

    return nnx.recursive_map(convert, copy)


@functools.partial(jax.jit, static_argnames=("nblocks", "rank"))
def _project(kernel: Array, nblocks: int, rank: int | None) -> MonarchFactors:
    """Projects the transpose of a kernel, padded with zeros to whole blocks."""
    inputs, outputs = kernel.shape
    in_block, out_block = -(-inputs // nblocks), -(-outputs // nblocks)
    full = min(in_block, out_block)
    rank = max(1, full // nblocks) if rank is None else min(rank, full)
    missing = nblocks * out_block - outputs, nblocks * in_block - inputs
    matrix = jnp.pad(kernel.T, [(0, rows) for rows in missing])
    return monarch_project(matrix, nblocks_in=nblocks, nblocks_out=nblocks, rank=rank)


@functools.partial(jax.jit, static_argnames=("inputs", "outputs"))
def _dense_kernel(factors: MonarchFactors, inputs: int, outputs: int) -> Array:
    """Builds the kernel (inputs, outputs) of factors that may be padded."""
    return monarch_to_dense(*factors)[:outputs, :inputs].T


def _padded_shape(factors: MonarchFactors) -> tuple[int, int]:
    (k, _, p), (blocks, s, _) = factors.w1.shape, factors.w2.shape
    return k * p, blocks * s


def _true_shape(
    path: Path, shapes: dict[Path, tuple[int, int]], padded: tuple[int, int]
) -> tuple[int, int]:
    """Looks up the shape of the kernel at a path and checks it."""
    if path not in shapes:
        raise ValueError(
            f"densify_params: like must hold a two-dimensional kernel at {path}, where "
            f"params holds w1 and w2; it has kernels at {sorted(map(str, shapes))}. "
            "Leave other layers out with predicate=."
        )
    shape = shapes[path]
    if shape[0] > padded[0] or shape[1] > padded[1]:
        raise ValueError(
            f"densify_params: the kernel of like at {path} must be no larger than "
            f"{padded}, the padded widths of its factors, got {shape}."
        )
    return shape


def _check_options(name: str, nblocks: int, rank: int | None) -> None:
    if not are_sizes((nblocks, 1 if rank is None else rank)):
        raise ValueError(
            f"{name}: nblocks and rank must be at least 1 (rank may be None), got "
            f"nblocks={nblocks!r} and rank={rank!r}."
        )


def _is_dense(node: Any) -> bool:
    return isinstance(node, Mapping) and getattr(node.get("kernel"), "ndim", 0) == 2


def _is_monarch(node: Any) -> bool:
    if not isinstance(node, Mapping):
        return False
    w1, w2 = node.get("w1"), node.get("w2")
    if getattr(w1, "ndim", 0) != 3 or getattr(w2, "ndim", 0) != 3:
        return False
    return w1.shape[0] * w1.shape[1] == w2.shape[0] * w2.shape[2]


def _value(leaf: Any) -> Array:
    return jnp.asarray(leaf[...] if isinstance(leaf, nnx.Variable) else leaf)


def _like_leaf(leaf: Any, value: Array) -> Any:
    """Wraps an array in the kind of variable that it replaces, if it was one."""
    return type(leaf)(value) if isinstance(leaf, nnx.Variable) else value


def _plain(path: tuple[Any, ...]) -> Path:
    """Turns a path of jax's key types into one of names and numbers."""
    names = ("key", "idx", "name")
    return tuple(
        next(getattr(key, name) for name in names if hasattr(key, name)) for key in path
    )


def _map_layers(
    convert: Callable[[Path, Any], Any], tree: PyTree, is_layer: Callable[[Any], bool]
) -> PyTree:
    """Maps the mappings that are layers; other leaves pass through."""
    visit = lambda path, node: convert(_plain(path), node)
    return jax.tree_util.tree_map_with_path(visit, tree, is_leaf=is_layer)


def _kernel_shapes(tree: PyTree) -> dict[Path, tuple[int, int]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_dense)
    return {
        _plain(path): node["kernel"].shape for path, node in leaves if _is_dense(node)
    }
