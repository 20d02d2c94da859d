"""Flat vectors that lie over a mesh as the leaves of their tree do.

A flat vector in the order of the leaves cannot be cut as they are: each device would
need entries that others hold. Here its entries stand device by device instead: first
what the first device holds of every leaf, then what the second holds, and so on, each
filled up with zeros to the same length. Cut evenly, the vector then moves between flat
and tree without a message, and a basis of such rows is cut as the parameters are.

Only the mesh axes that cut some leaf count; along the others there are copies, as
there are of the parameters. A leaf that lies whole along one of them is cut there too.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Cuts:
    """Says how the leaves are cut; hashable, so it may be static."""

    mesh: Mesh
    axes: tuple[str, ...]  # those that cut some leaf, in the order of the mesh
    specs: tuple[tuple[tuple[str, ...], ...], ...]  # of each leaf, of each of its axes

    @property
    def parts(self) -> int:
        """Says in how many parts a vector is cut."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes)

    @property
    def sharding(self) -> NamedSharding:
        """The places of a flat vector."""
        return NamedSharding(self.mesh, PartitionSpec(self.axes))

    def length(self, shapes: Sequence[Shape]) -> int:
        """Says how long flat vectors are, zeros included."""
        own = [self._own(*leaf)[1] for leaf in zip(shapes, self.specs, strict=True)]
        return self.parts * sum(own)

    def flattened(self, leaves: Sequence[Array]) -> Float[Array, " p"]:
        """Strings the leaves together, device by device."""
        parts = [self._parts(*leaf) for leaf in zip(leaves, self.specs, strict=True)]
        vector = jnp.concatenate(parts, axis=-1).reshape(-1)
        return lax.with_sharding_constraint(vector, self.sharding)

    def leaves(self, vector: Float[Array, " p"], shapes: Sequence[Shape]) -> list:
        """Cuts a vector into leaves, each in the places of its spec."""
        vector = lax.with_sharding_constraint(vector, self.sharding)
        by_device = vector.reshape(*map(self.mesh.shape.get, self.axes), -1)
        found, start = [], 0
        for shape, spec in zip(shapes, self.specs, strict=True):
            stop = start + self._own(shape, spec)[1]
            found.append(self._leaf(by_device[..., start:stop], shape, spec))
            start = stop
        return found

    def _own(self, shape: Shape, spec) -> tuple[int, int]:
        """Says how many entries a part has by the spec, and cut along all axes."""
        held = math.prod(shape) // self._count(sum(spec, ()))
        lacking = self._count(self._lacking(spec))
        return held, -(-held // lacking)

    def _count(self, axes: Sequence[str]) -> int:
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def _lacking(self, spec) -> tuple[str, ...]:
        return tuple(axis for axis in self.axes if axis not in sum(spec, ()))

    def _split(self, shape: Shape, spec):
        """Gives the shape with mesh axes apart, and the order that brings them first.

        They come in the order of ``axes``, then what a device holds.
        """
        sizes: list[int] = []
        names: list[str | None] = []
        for size, cut in zip(shape, spec, strict=True):
            sizes += [*map(self.mesh.shape.get, cut), size // self._count(cut)]
            names += [*cut, None]
        present = [axis for axis in self.axes if axis in names]
        order = [names.index(axis) for axis in present]
        order += [place for place, name in enumerate(names) if name is None]
        return sizes, order, present

    def _parts(self, leaf: Array, spec) -> Array:
        sizes, order, present = self._split(leaf.shape, spec)
        lacking = self._lacking(spec)
        held, own = self._own(leaf.shape, spec)
        parts = leaf.reshape(sizes).transpose(order)
        parts = parts.reshape(*map(self.mesh.shape.get, present), held)
        fill = own * self._count(lacking) - held
        parts = jnp.pad(parts, [(0, 0)] * len(present) + [(0, fill)])
        parts = parts.reshape(*map(self.mesh.shape.get, (*present, *lacking)), own)
        now = (*present, *lacking)
        parts = parts.transpose(*(now.index(axis) for axis in self.axes), len(now))
        places = NamedSharding(self.mesh, PartitionSpec(*self.axes, None))
        return lax.with_sharding_constraint(parts, places)

    def _leaf(self, parts: Array, shape: Shape, spec) -> Array:
        sizes, order, present = self._split(shape, spec)
        lacking = self._lacking(spec)
        held, _ = self._own(shape, spec)
        now = (*present, *lacking)
        parts = parts.transpose(*(self.axes.index(axis) for axis in now), len(now))
        parts = parts.reshape(*map(self.mesh.shape.get, present), -1)[..., :held]
        parts = parts.reshape([sizes[place] for place in order])
        back = [order.index(place) for place in range(len(order))]
        leaf = parts.transpose(back).reshape(shape)
        places = NamedSharding(self.mesh, PartitionSpec(*(cut or None for cut in spec)))
        return lax.with_sharding_constraint(leaf, places)


def cuts_of(tree: PyTree) -> Cuts | None:
    """Reads how the leaves of a tree are cut.

    Returns:
      ``None`` where nothing is cut, where the leaves lie on different meshes or on one
      whose axes are not all XLA's to handle, and for tracers, which have no places yet.
    """
    leaves = jax.tree.leaves(tree)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return None
    places = [getattr(leaf, "sharding", None) for leaf in leaves]
    meshes = {place.mesh for place in places if isinstance(place, NamedSharding)}
    if len(meshes) != 1:
        return None
    (mesh,) = meshes
    if not isinstance(mesh, Mesh) or set(mesh.axis_types) != {AxisType.Auto}:
        return None
    specs = tuple(_spec(leaf, place) for leaf, place in zip(leaves, places))
    named = {axis for spec in specs for cut in spec for axis in cut}
    axes = tuple(axis for axis in mesh.axis_names if axis in named)
    return Cuts(mesh, axes, specs) if axes else None


def _spec(leaf: Any, place: Any) -> tuple[tuple[str, ...], ...]:
    """Gives the mesh axes of more than one device along each axis of a leaf."""
    rank = jnp.ndim(leaf)
    if not isinstance(place, NamedSharding):
        return ((),) * rank
    spec = tuple(place.spec) + (None,) * (rank - len(place.spec))
    names = [cut if isinstance(cut, tuple) else (cut,) for cut in spec]
    size = place.mesh.shape.get
    return tuple(tuple(n for n in cut if n and size(n) > 1) for cut in names)
