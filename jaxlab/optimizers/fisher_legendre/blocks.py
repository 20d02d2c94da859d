"""Blocks of an inverse Fisher: which parameters share one matrix, and its form.

A block is a matrix U of a rows and b columns made of the leaves of one layer. The
inverse Fisher acts on it by C^T C with

    C U = L (S * U) R^T,    L of a x a, R of b x b, S of a x b, elementwise

of which a block has some. Leaves are grouped by shape and by place in the tree, so
plain dicts, NNX states and Linen dicts give the same blocks:

    kernel (in, out), bias (out)         one Kronecker block of in + 1 rows
    kernel (kh, kw, in, out), bias       the same, of kh kw in + 1 rows
    factors (n, in, out)                 n Kronecker blocks (Monarch, stacked layers)
    embedding (vocabulary, width)        L diagonal: one-hot inputs have no correlations
    vectors and scalars left over        S alone

A kernel of the kind "stacked" has matrices along its last two axes alone, whatever axes
stand before: Monarch factors of layers that stand stacked, (layers, n, in, out).
A side longer than ``max_size`` is cut into equal parts that know nothing of each other,
as Shampoo does; the last one is padded.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, cast, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxlab._array_checks import check_arrays
from jaxlab._checks import check_count
from jaxlab._norms import wide
from jaxlab._paths import joined

Kind = Literal["kronecker", "stacked", "scaled", "embedding", "diagonal", "full"]
Rule = Callable[[str, tuple[int, ...]], str | None] | Mapping[str, str] | None

_KINDS = get_args(Kind)


class Side(NamedTuple):
    """A square factor: ``count`` parts of ``size`` rows, or a diagonal."""

    count: int
    size: int
    diagonal: bool = False


class Block(NamedTuple):
    """What is static of a block: its leaves, its shape, its factors."""

    paths: tuple[str, ...]  # of the kernel, then of the bias if there is one
    kind: str
    batch: tuple[int, ...]  # so many matrices of their own
    rows: int  # the bias included
    columns: int
    left: Side | None
    right: Side | None
    scaled: bool

    @property
    def name(self) -> str:
        """Joins the paths of the leaves."""
        return " + ".join(self.paths)


def blocks_of(
    name: str, params: PyTree, rule: Rule, max_size: int
) -> tuple[Block, ...]:
    """Groups the leaves of a tree; holes of masked trees are left out."""
    check_count(name, max_size=max_size)
    check_arrays(name, "params", params)
    leaves = _leaves(params)
    if not leaves:
        raise ValueError(f"{name}: params must hold at least one array, got {params}.")
    kinds = {path: _kind(name, rule, path, leaf) for path, leaf in leaves.items()}
    biases = _biases(leaves, kinds)
    taken = set(biases.values())
    found = []
    for path, leaf in leaves.items():
        if path in taken:
            continue
        paths = (path, biases[path]) if path in biases else (path,)
        found.append(_block(paths, kinds[path], leaf.shape, max_size))
    return tuple(found)


def gather(blocks: tuple[Block, ...], tree: PyTree) -> dict[str, Array]:
    """Puts the leaves of a tree into the matrices of the blocks, float32 at least."""
    leaves = _leaves(tree)
    found = {}
    for block in blocks:
        kernel, *bias = (wide(leaves[path]) for path in block.paths)
        rows = block.rows - len(bias)
        matrix = kernel.reshape(*block.batch, rows, block.columns)
        if bias:
            matrix = jnp.concatenate([bias[0][..., None, :], matrix], axis=-2)
        found[block.name] = matrix
    return found


def scatter(
    blocks: tuple[Block, ...], matrices: Mapping[str, Array], like: PyTree
) -> PyTree:
    """Puts the matrices of the blocks back into a tree, in the dtypes of ``like``."""
    new = {}
    for block in blocks:
        matrix = matrices[block.name]
        if len(block.paths) == 2:
            new[block.paths[1]] = matrix[..., 0, :]
            matrix = matrix[..., 1:, :]
        new[block.paths[0]] = matrix

    def put(path, leaf):
        return new[joined(path)].reshape(leaf.shape).astype(jnp.result_type(leaf))

    return jax.tree_util.tree_map_with_path(put, like)


def check_like(name: str, blocks: tuple[Block, ...], tree: PyTree, what: str) -> None:
    """Refuses a tree whose leaves are not those of the blocks."""
    found = {path: jnp.shape(leaf) for path, leaf in _leaves(tree).items()}
    needed = {path for block in blocks for path in block.paths}
    if set(found) != needed:
        raise ValueError(
            f"{name}: {what} must have the leaves of the params it was made for, "
            f"{sorted(needed)}; got {sorted(found)}."
        )
    for block in blocks:
        size = sum(math.prod(found[path]) for path in block.paths)
        kernel, *bias = (found[path] for path in block.paths)
        fits = size == math.prod(block.batch) * block.rows * block.columns
        if block.kind not in ("diagonal", "full"):
            fits = fits and kernel[-1:] == (block.columns,)
            fits = fits and kernel[: len(block.batch)] == block.batch
            fits = fits and all(
                shape == (*block.batch, block.columns) for shape in bias
            )
        if not fits:
            shapes = [found[path] for path in block.paths]
            raise ValueError(
                f"{name}: {what} at {block.name} must make {block.batch} matrices of "
                f"{block.rows} x {block.columns}, got leaves of shapes {shapes}."
            )


def describe_blocks(params: PyTree, *, rule: Rule = None, max_size: int = 256) -> str:
    """Writes which parameter gets which block, one line each.

    Args:
      params: tree of arrays or of shapes.
      rule: as in :func:`q_init`.
      max_size: as in :func:`q_init`.

    Returns:
      A table: the leaves of the block, its kind, its matrices, the numbers in its
      factors.

    Raises:
      ValueError: as :func:`q_init`.

    Examples:
      >>> params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2), "s": jnp.ones(5)}
      >>> print(describe_blocks(params))
      kernel + bias  kronecker  4 x 2  20 numbers
      s              diagonal   5 x 1   5 numbers
    """
    blocks = blocks_of("describe_blocks", params, rule, max_size)
    rows = []
    for block in blocks:
        count = "".join(f"{n} x " for n in block.batch)
        size = f"{count}{block.rows} x {block.columns}"
        rows.append((block.name, block.kind, size, f"{_numbers(block):,} numbers"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            (
                *(cell.ljust(w) for cell, w in zip(row[:3], widths[:3], strict=True)),
                row[3].rjust(widths[3]),
            )
        )
        for row in rows
    )


def _numbers(block: Block) -> int:
    each = 0
    for side in (block.left, block.right):
        if side is not None:
            each += side.count * side.size * (1 if side.diagonal else side.size)
    if block.scaled:
        each += block.rows * block.columns
    return math.prod(block.batch) * each


def _leaves(tree: PyTree) -> dict[str, Any]:
    return {joined(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _kind(name: str, rule: Rule, path: str, leaf: Any) -> Kind:
    chosen = None
    if isinstance(rule, Mapping):
        fits = [kind for pattern, kind in rule.items() if re.search(pattern, path)]
        chosen = fits[0] if fits else None
    elif rule is not None:
        chosen = rule(path, tuple(leaf.shape))
    if chosen is None:
        return _automatic(path, leaf.shape)
    if chosen not in _KINDS:
        raise ValueError(
            f"{name}: the kind of a block must be one of {list(_KINDS)}, got "
            f"{chosen!r} for {path}."
        )
    if chosen in ("kronecker", "stacked", "scaled", "embedding") and leaf.ndim < 2:
        raise ValueError(
            f"{name}: a {chosen} block needs a leaf of two axes at least, got shape "
            f"{tuple(leaf.shape)} at {path}; choose 'diagonal' or 'full'."
        )
    return cast(Kind, chosen)


def _automatic(path: str, shape: tuple[int, ...]) -> Kind:
    if len(shape) < 2 or 1 in (math.prod(shape[:-1]), shape[-1]):
        return "diagonal"
    last = path.rsplit("/", 1)[-1]
    return "embedding" if last == "embedding" and len(shape) == 2 else "kronecker"


def _layout(shape: tuple[int, ...], kind: str) -> tuple[tuple[int, ...], int, int]:
    """Reads a kernel as matrices: those of three axes are stacks of matrices."""
    batch = shape[:1] if len(shape) == 3 else ()
    if kind == "stacked":
        batch = shape[:-2]
    return batch, math.prod(shape[len(batch) : -1]), shape[-1]


def _biases(leaves: Mapping[str, Any], kinds: Mapping[str, Kind]) -> dict[str, str]:
    """Finds the bias of each kernel: a sibling of the shape of its columns.

    One kernel and one such vector belong together; of several kernels each takes the
    vector named like it ("kernel" and "bias", "w1" and "b1").
    """
    families: dict[str, list[str]] = {}
    for path in leaves:
        families.setdefault(path.rpartition("/")[0], []).append(path)
    found = {}
    for family in families.values():
        kernels = [p for p in family if kinds[p] in ("kronecker", "stacked", "scaled")]
        for kernel in kernels:
            batch, _, columns = _layout(leaves[kernel].shape, kinds[kernel])
            fits = [
                path
                for path in family
                if path != kernel
                and leaves[path].shape == (*batch, columns)
                and _named_like(kernel, path)
            ]
            if len(fits) == 1:
                found[kernel] = fits[0]
    return found


def _named_like(kernel: str, bias: str) -> bool:
    last = lambda path: path.rsplit("/", 1)[-1]
    number = lambda path: re.sub(r"\D", "", last(path))
    return last(bias).lower().startswith("b") and number(kernel) == number(bias)


def _block(
    paths: tuple[str, ...], kind: Kind, shape: tuple[int, ...], max_size: int
) -> Block:
    size = math.prod(shape)
    if kind == "diagonal":
        return Block(paths, kind, (), size, 1, None, None, True)
    if kind == "full":
        return Block(paths, kind, (), size, 1, Side(1, size), None, False)
    batch, rows, columns = _layout(shape, kind)
    rows += len(paths) - 1
    left = Side(1, rows, True) if kind == "embedding" else _cut(rows, max_size)
    right = _cut(columns, max_size)
    return Block(paths, kind, batch, rows, columns, left, right, kind == "scaled")


def _cut(length: int, max_size: int) -> Side:
    count = max(1, -(-length // max_size))
    return Side(count, -(-length // count))
