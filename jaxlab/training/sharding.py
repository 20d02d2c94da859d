r"""Meshes, and plans that say by path rules how a training state is cut over them.

A mesh has three axes: rows of the batch are cut along ``data`` and ``fsdp``, every
array of the state along ``fsdp`` (fully sharded: each device holds a part and gathers
the rest when it needs it), and the widths of layers along ``tensor`` (each device
multiplies by its part). A plan is an ordered list of rules ``(pattern, spec)``:

    the first rule whose pattern ``re.search`` finds in the path of a leaf, such as
    "blocks/0/attention/query/kernel", and whose spec cuts the leaf evenly, counts;
    other leaves are cut along ``fsdp`` at their longest axis that it divides.

Parts should stay large: on TPUs, by their compiler, a bfloat16 matrix of which each
device holds fewer than 64 rows is gathered by sums, with twice the bytes. Past that,
more devices belong to ``data``.

The state of an optimizer repeats the paths of the params ("opt_state/0/mu/blocks/0/..."
, "opt_state/0/q/factors/blocks/0/.../w1/left"), so the moments of Adam and the factors
of FishLeg fall under the same rules as the params that they belong to. Nothing here
computes: XLA puts the messages in.

Reference: Xu et al., "GSPMD: General and Scalable Parallelization for ML Computation
Graphs", 2021.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jaxlab._checks import is_whole
from jaxlab._paths import joined
from jaxlab.training.feed import place

AXES = ("data", "fsdp", "tensor")
_WHOLE = PartitionSpec()

Rule = tuple[str, PartitionSpec]

# Of the library's own transformer blocks: widths between two layers are cut along
# "tensor", so that a pair of layers needs one message, and rows besides along "fsdp":
# of a gradient cut by columns, XLA for TPUs sums the whole on every device instead of
# one part on each. A stack of layers has one axis more in front, which stays whole.
_COLUMNS = r"(query|key|value|up)/"
_ROWS = r"(out|down)/"
TRANSFORMER_RULES: tuple[Rule, ...] = (
    (rf"{_COLUMNS}kernel$", PartitionSpec("fsdp", "tensor")),
    (rf"{_ROWS}kernel$", PartitionSpec(("tensor", "fsdp"), None)),
    (rf"{_COLUMNS}bias$", PartitionSpec("tensor")),
    # Monarch: blocks know nothing of each other, up to one transposition between the
    # two factors. Where there are enough of them, they are what is cut.
    (r"/w[12]$", PartitionSpec(("tensor", "fsdp"), None, None)),
    (r"/w[12]$", PartitionSpec("tensor", "fsdp", None)),
    (r"/w[12]/(left|right)$", PartitionSpec(("tensor", "fsdp"), None, None, None)),
    (r"/w[12]/(left|right)$", PartitionSpec("tensor", None, "fsdp", None)),
    (r"embedding/embedding$", PartitionSpec(("tensor", "fsdp"), None)),
)


def make_mesh(
    *,
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """Lays the devices out along the axes "data", "fsdp" and "tensor".

    Neighbours along ``tensor`` are nearest to each other, then those along ``fsdp``.

    Args:
      data: copies of the state; -1 takes the devices that are left.
      fsdp: devices that share one copy.
      tensor: devices that share the widths of layers.
      devices: all of every process if None.

    Returns:
      The mesh; axes may have size 1.

    Raises:
      ValueError: if a size is neither positive nor, one of them, -1, the product is not
        the number of devices, or there are none.

    Examples:
      >>> dict(make_mesh(fsdp=2, devices=jax.devices()[:4]).shape)
      {'data': 2, 'fsdp': 2, 'tensor': 1}
    """
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    whole = all(is_whole(n) and (n == -1 or n >= 1) for n in sizes.values())
    open_axes = [name for name, n in sizes.items() if n == -1]
    if not whole or len(open_axes) > 1:
        raise ValueError(
            "make_mesh: sizes must be integers >= 1, one of them may be -1 (what is "
            f"left of the devices); got {sizes}."
        )
    devices = list(jax.devices() if devices is None else devices)
    if not devices:
        raise ValueError("make_mesh: devices must hold at least one, got none.")
    fixed = math.prod(n for n in sizes.values() if n != -1)
    if open_axes and len(devices) % fixed == 0:
        sizes[open_axes[0]] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(
            f"make_mesh: data * fsdp * tensor must be the number of devices, "
            f"{len(devices)}; got data={data}, fsdp={fsdp}, tensor={tensor}."
        )
    shape = tuple(sizes.values())
    types = (AxisType.Auto,) * len(AXES)
    try:
        return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
    except NotImplementedError:
        # No assignment of these sizes to the links of the machine: in their order.
        return Mesh(np.array(devices).reshape(shape), AXES, axis_types=types)


@dataclasses.dataclass(frozen=True)
class ShardingPlan:
    """Says how every leaf of a tree is cut over a mesh.

    Attributes:
      rules: pairs of a regular expression and a ``PartitionSpec``; the first counts
        whose expression is found in the path and whose spec cuts the array evenly. A
        spec that is shorter than the array holds for its last axes (stacks of layers
        have one more in front).
      rest: the mesh axis that cuts all other leaves, each at its longest axis that
        divides. ``None`` leaves them whole.
      smallest: leaves of fewer entries stay whole: a message costs more than it saves.

    Raises:
      ValueError: if a rule is no such pair, its expression does not compile, or
        ``smallest`` is no integer >= 0.

    Examples:
      >>> plan = ShardingPlan(rules=(("w$", PartitionSpec("fsdp", None)),), smallest=1)
      >>> mesh = make_mesh(fsdp=2, devices=jax.devices()[:4])
      >>> tree = {"w": jax.numpy.ones((4, 6)), "b": jax.numpy.ones(3)}
      >>> {name: tuple(s.spec) for name, s in plan.shardings(tree, mesh).items()}
      {'b': (), 'w': ('fsdp', None)}
    """

    rules: tuple[Rule, ...] = ()
    rest: str | None = "fsdp"
    smallest: int = 2**10

    def __post_init__(self):
        if not (is_whole(self.smallest) and self.smallest >= 0):
            raise ValueError(
                "ShardingPlan: smallest must be an integer >= 0, got "
                f"{self.smallest!r}."
            )
        for rule in self.rules:
            pair = isinstance(rule, tuple) and len(rule) == 2
            if not (pair and isinstance(rule[1], PartitionSpec)):
                raise ValueError(
                    "ShardingPlan: a rule is a pair (regular expression, "
                    f"PartitionSpec), got {rule!r}."
                )
            try:
                re.compile(rule[0])
            except (re.error, TypeError) as error:
                raise ValueError(
                    f"ShardingPlan: {rule[0]!r} is no regular expression: {error}."
                ) from error

    def spec(self, path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
        """Gives the spec of one leaf.

        Args:
          path: its path, parts joined by "/".
          shape: its shape.
          mesh: the mesh, of any axes.

        Returns:
          The spec, of the length of the shape or empty.

        Raises:
          ValueError: if a rule for it, or ``rest``, names an axis that the mesh lacks,
            or the rule is longer than the shape.

        Examples:
          >>> mesh = make_mesh(fsdp=8)
          >>> tuple(fully_sharded().spec("w", (64, 128), mesh))
          (None, 'fsdp')
        """
        found = [spec for pattern, spec in self.rules if re.search(pattern, path)]
        for spec in found:
            _check(spec, path, shape, mesh)
        if math.prod(shape) < self.smallest:
            return _WHOLE
        for spec in found:
            full = (None,) * (len(shape) - len(spec)) + tuple(spec)
            parts = [_size(mesh, axis) for axis in full]
            if all(n % k == 0 for n, k in zip(shape, parts, strict=True)):
                return PartitionSpec(*full)
        return self._longest(shape, mesh)

    def shardings(self, tree: PyTree, mesh: Mesh) -> PyTree:
        """Gives a tree of ``NamedSharding``, one for each leaf.

        Args:
          tree: arrays or ``ShapeDtypeStruct``s; typed keys stay whole.
          mesh: the mesh.

        Returns:
          A tree of the same structure.

        Raises:
          ValueError: as :meth:`spec`, or if a leaf has neither shape nor dtype.

        Examples:
          >>> mesh = make_mesh()
          >>> tuple(fully_sharded().shardings({"w": jax.numpy.ones(9)}, mesh)["w"].spec)
          ()
        """
        _check_mesh("ShardingPlan", mesh)

        def one(path, leaf):
            if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
                raise ValueError(
                    "ShardingPlan: leaves must be arrays or ShapeDtypeStructs, got "
                    f"{type(leaf).__name__} at {joined(path)}; jax.numpy.asarray makes "
                    "a number one."
                )
            if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                return NamedSharding(mesh, _WHOLE)
            return NamedSharding(mesh, self.spec(joined(path), leaf.shape, mesh))

        return jax.tree_util.tree_map_with_path(one, tree)

    def describe(self, tree: PyTree, mesh: Mesh) -> str:
        """Writes how each leaf is cut and what a device holds of it, one line each.

        Args:
          tree: arrays or ``ShapeDtypeStruct``s.
          mesh: the mesh.

        Returns:
          A table: path, shape, spec, shape of a part.

        Raises:
          ValueError: as :meth:`spec`.

        Examples:
          >>> tree = {"w": jax.numpy.ones((64, 128))}
          >>> print(fully_sharded().describe(tree, make_mesh(fsdp=8)))
          w  (64, 128)  P(None, 'fsdp')  (64, 16)
        """
        rows = []
        shardings = jax.tree.leaves(self.shardings(tree, mesh))
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        for (path, leaf), cut in zip(leaves, shardings, strict=True):
            spec = f"P{tuple(cut.spec)}".replace(",)", ")")
            rows.append(
                (joined(path), str(leaf.shape), spec, str(cut.shard_shape(leaf.shape)))
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        line = lambda row: "  ".join(c.ljust(w) for c, w in zip(row, widths))
        return "\n".join(line(row).rstrip() for row in rows)

    def _longest(self, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
        if self.rest is None:
            return _WHOLE
        if self.rest not in mesh.shape:
            raise ValueError(
                f"ShardingPlan: rest={self.rest!r} is no axis of the mesh, which has "
                f"{tuple(mesh.shape)}."
            )
        parts = _size(mesh, self.rest)
        even = [axis for axis, n in enumerate(shape) if n % parts == 0]
        if parts == 1 or not even:
            return _WHOLE
        at = max(even, key=lambda axis: shape[axis])
        return PartitionSpec(
            *(self.rest if axis == at else None for axis in range(len(shape)))
        )


def data_parallel() -> ShardingPlan:
    """Plans copies: every device of the mesh holds all of the state.

    Returns:
      A plan without rules.

    Examples:
      >>> tuple(data_parallel().spec("w", (64, 128), make_mesh()))
      ()
    """
    return ShardingPlan(rest=None)


def fully_sharded() -> ShardingPlan:
    """Plans parts: every larger array is cut along "fsdp" at its longest axis.

    Returns:
      A plan that needs no names.

    Examples:
      >>> tuple(fully_sharded().spec("anything", (4096, 64), make_mesh(fsdp=8)))
      ('fsdp', None)
    """
    return ShardingPlan()


def tensor_parallel(rules: Sequence[Rule] = TRANSFORMER_RULES) -> ShardingPlan:
    """Plans cut layers: widths along "tensor", what remains along "fsdp".

    Args:
      rules: those of :class:`ShardingPlan`; by default those of the transformer blocks
        of ``jaxlab.models``, dense or Monarch: queries, keys, values and the first
        layer by columns, what follows them by rows, Monarch factors by blocks.

    Returns:
      A plan, for the params and for the optimizer's state.

    Raises:
      ValueError: as :class:`ShardingPlan`.

    Examples:
      >>> mesh = make_mesh(fsdp=4, tensor=2)
      >>> tuple(tensor_parallel().spec("blocks/0/up/w1", (16, 64, 64), mesh))
      (('tensor', 'fsdp'), None, None)
    """
    return ShardingPlan(rules=tuple(rules))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Gives the sharding of a batch: its rows along "data" and "fsdp".

    Args:
      mesh: of :func:`make_mesh`.

    Returns:
      What :func:`fit` takes as ``data_sharding``.

    Raises:
      ValueError: if the mesh has neither axis.

    Examples:
      >>> tuple(batch_sharding(make_mesh(fsdp=2)).spec)
      (('data', 'fsdp'),)
    """
    _check_mesh("batch_sharding", mesh)
    axes = tuple(axis for axis in ("data", "fsdp") if axis in mesh.shape)
    if not axes:
        raise ValueError(
            'batch_sharding: the mesh needs an axis "data" or "fsdp", got '
            f"{tuple(mesh.shape)}."
        )
    return NamedSharding(mesh, PartitionSpec(axes))


def shard(tree: PyTree, mesh: Mesh, plan: ShardingPlan) -> PyTree:
    """Lays a tree of arrays out over a mesh, one that spans other processes too.

    For a state too large for one device see :func:`init_sharded`.

    Args:
      tree: arrays, the same in every process.
      mesh: the mesh.
      plan: the plan.

    Returns:
      The tree in its new places.

    Raises:
      ValueError: as :meth:`ShardingPlan.shardings`, or if mesh or plan are none.

    Examples:
      >>> mesh = make_mesh(fsdp=8)
      >>> tree = shard({"w": jax.numpy.ones((64, 128))}, mesh, fully_sharded())
      >>> tree["w"].addressable_shards[0].data.shape
      (64, 16)
    """
    _check_plan("shard", plan)
    return jax.tree.map(place, tree, plan.shardings(tree, mesh))


def init_sharded(
    init: Callable[..., PyTree], *args: Any, mesh: Mesh, plan: ShardingPlan
) -> PyTree:
    """Makes a tree in its places, so that no device ever holds the whole.

    Args:
      init: a function of arrays that makes the tree, such as ``lambda key:
        create_state(key, init_params(key), optimizer)``; it is compiled.
      *args: its arguments.
      mesh: the mesh.
      plan: the plan.

    Returns:
      What ``init`` returns, cut by the plan.

    Raises:
      ValueError: as :func:`shard`, or if ``init`` is no function.

    Examples:
      >>> init = lambda key: {"w": jax.random.normal(key, (64, 128))}
      >>> mesh = make_mesh(fsdp=8)
      >>> key, plan = jax.random.key(0), fully_sharded()
      >>> params = init_sharded(init, key, mesh=mesh, plan=plan)
      >>> params["w"].addressable_shards[0].data.shape
      (64, 16)
    """
    _check_plan("init_sharded", plan)
    if not callable(init):
        raise ValueError(
            "init_sharded: init must be a function that makes the tree, got "
            f"{type(init).__name__}; shard() lays out a tree that is there."
        )
    shapes = jax.eval_shape(init, *args)
    return jax.jit(init, out_shardings=plan.shardings(shapes, mesh))(*args)


def _check_mesh(name: str, mesh: Any) -> None:
    if not isinstance(mesh, Mesh):
        raise ValueError(
            f"{name}: mesh must be a Mesh, as make_mesh gives, got "
            f"{type(mesh).__name__}."
        )


def _check_plan(name: str, plan: Any) -> None:
    if not isinstance(plan, ShardingPlan):
        raise ValueError(
            f"{name}: plan must be a ShardingPlan, such as fully_sharded(), got "
            f"{type(plan).__name__}; call it as {name}(..., mesh=mesh, plan=plan)."
        )


def _size(mesh: Mesh, axis: Any) -> int:
    names = axis if isinstance(axis, tuple) else (axis,)
    return math.prod(mesh.shape[name] for name in names if name is not None)


def _check(spec: PartitionSpec, path: str, shape: tuple[int, ...], mesh: Mesh) -> None:
    named = [n for a in spec for n in (a if isinstance(a, tuple) else (a,)) if n]
    lacking = [name for name in named if name not in mesh.shape]
    if lacking:
        raise ValueError(
            f"ShardingPlan: the rule for {path} names {lacking}, which the mesh lacks; "
            f"it has {tuple(mesh.shape)}."
        )
    if len(spec) > len(shape):
        raise ValueError(
            f"ShardingPlan: the rule for {path} has {len(spec)} axes, {tuple(spec)}, "
            f"but the array has shape {shape}."
        )
