"""Bases of cut parameters are cut with them, and hold what whole ones hold."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import hlo
from jaxlab.curvature import (
    hessian_operator,
    lanczos,
    ritz,
    ritz_vectors,
    spectral_density,
    top_eigenpairs,
)
from jaxlab.curvature._basis import rotated
from jaxlab.curvature._options import as_pytree, check_order
from jaxlab.curvature._vectors import laid_out, random_vector, space_of
from jaxlab.curvature.lanczos import _compiled
from jaxlab.training import ShardingPlan, make_mesh, shard, tensor_parallel

PLAN = ShardingPlan(rules=tensor_parallel().rules, smallest=8)
# Cut along both axes, along one, by both on one axis, not at all.
SHAPES = {
    "up": {"kernel": (32, 48)},
    "down": {"kernel": (48, 32)},
    "scale": (32, 5),
    "shift": (3,),
}
ORDER = 12


def tree_of(seed, dtype=None):
    rng = np.random.default_rng(seed)
    make = lambda shape: jnp.asarray(rng.standard_normal(shape), dtype)
    return jax.tree.map(make, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def loss(params, batch):
    inputs, targets = batch
    hidden = jnp.tanh(inputs @ params["up"]["kernel"] / 6)
    outputs = hidden @ params["down"]["kernel"] / 7
    error = jnp.mean((outputs - targets) ** 2)
    error += jnp.mean(jnp.tanh(outputs @ params["scale"]) ** 2)
    return error + jnp.mean(jnp.sin(params["shift"]) ** 2)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(data=2, fsdp=2, tensor=2)  # copies along the first


def problem(mesh=None):
    """Gives the operator at some parameters and a start, both cut over a mesh."""
    params, start = tree_of(0), tree_of(1)
    if mesh is not None:
        params, start = (shard(tree, mesh, PLAN) for tree in (params, start))
    rng = np.random.default_rng(2)
    batch = tuple(jnp.asarray(rng.standard_normal((16, 32))) for _ in range(2))
    return hessian_operator(loss, params, batch), start


def places(tree):
    return [leaf.sharding for leaf in jax.tree.leaves(tree)]


def test_vectors_and_trees_are_one_another_without_messages(x64, mesh):
    tree = shard(tree_of(0), mesh, PLAN)
    space = laid_out(space_of("test", tree), tree)
    parts = mesh.size // mesh.shape["data"]
    assert space.parts == parts
    assert space.size <= space.length < space.size + parts * len(jax.tree.leaves(tree))
    vector = jax.jit(space.flatten)(tree)
    assert vector.addressable_shards[0].data.size == space.length // parts
    back = jax.jit(space.unflatten)(vector)
    jax.tree.map(np.testing.assert_array_equal, back, tree)
    assert jnp.vdot(vector, vector) == pytest.approx(optax.tree.norm(tree) ** 2)
    # What all mesh axes cut moves nowhere; what is whole along some is put together.
    both = {name: tree[name] for name in ("up", "down")}
    if mesh.shape["tensor"] > 1:
        space = laid_out(space_of("test", both), both)
        turn = jax.jit(lambda t: space.unflatten(2 * space.flatten(t)))
        assert not hlo.Program(turn.lower(both).compile().as_text()).messages()
        assert places(turn(both)) == places(both)


# Among them stacks and swapped axes, where the order back is not the order there.
SPECS = [
    P("tensor"),
    P(None, None, "fsdp"),
    P(None, "tensor", "fsdp"),
    P("tensor", None, "fsdp"),
    P(None, None, ("tensor", "fsdp")),
    P(None, ("fsdp", "tensor"), None),
    P("fsdp", "tensor", None),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_stack_comes_back_as_it_was(mesh, spec):
    whole = jnp.arange(4.0 * 8 * 12).reshape(4, 8, 12)
    put = lambda spec: jax.device_put(whole, NamedSharding(mesh, spec))
    # Beside a leaf that is cut along all three axes it is cut along the third, too.
    for tree in (
        {"w": put(spec)},
        {"w": put(spec), "z": put(P("data", *mesh.axis_names[1:]))},
    ):
        space = laid_out(space_of("test", tree), tree)
        back = jax.jit(lambda t: space.unflatten(space.flatten(t)))(tree)  # noqa: B023
        np.testing.assert_array_equal(back["w"], whole)
    # A device holds of the vector what it holds of the leaf.
    tree = {"w": put(spec)}
    space = laid_out(space_of("test", tree), tree)
    vector = jax.jit(space.flatten)(tree)
    held = {part.device: np.asarray(part.data) for part in vector.addressable_shards}
    for part in tree["w"].addressable_shards:
        assert set(held[part.device]) <= set(np.ravel(part.data))


def test_the_same_tree_is_drawn_wherever_it_lies(mesh):
    tree = tree_of(0, jnp.bfloat16)
    cut, key = shard(tree, mesh, PLAN), jax.random.key(3)
    spaces = space_of("test", tree), laid_out(space_of("test", cut), cut)
    drawn = [
        space.wide.unflatten(random_vector(key, space, "normal")) for space in spaces
    ]
    jax.tree.map(np.testing.assert_array_equal, *drawn)


@pytest.mark.parametrize("driver", ["compiled", "host"])
def test_no_device_holds_the_whole_basis(x64, mesh, driver):
    operator, start = problem()
    expected = lanczos(operator, start, order=ORDER, driver=driver)
    operator, start = problem(mesh)
    found = lanczos(operator, start, order=ORDER, driver=driver)
    parts = mesh.size // mesh.shape["data"]
    (held,) = {part.data.shape for part in found.basis.addressable_shards}
    assert held == (ORDER, found.basis.shape[1] // parts)
    for mine, theirs in zip(ritz(found), ritz(expected), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-11)
    kept = np.asarray(found.basis)
    np.testing.assert_allclose(kept @ kept.T, np.eye(ORDER), atol=1e-12)


def test_nor_does_it_while_it_is_made(x64, mesh):
    operator, start = problem(mesh)
    space = laid_out(space_of("test", start), start)
    step = check_order("test", ORDER, "full", space, clip=False)
    lowered = _compiled.lower(as_pytree(operator), start, step=step, space=space)
    memory = lowered.compile().memory_analysis()
    row = 8 * space.size
    # Beside its part of the basis a device holds a few vectors, of the operator too.
    assert memory.output_size_in_bytes < 1.5 * ORDER * row / space.parts
    assert memory.temp_size_in_bytes < 0.5 * ORDER * row
    large = [
        message
        for message in hlo.Program(lowered.compile().as_text()).messages()
        if message.size >= row
    ]
    assert not large


@pytest.mark.parametrize("mode", ["full", "selective", "none"])
def test_ritz_vectors_lie_as_the_parameters(x64, mesh, mode):
    vectors = []
    for where in (None, mesh):
        operator, start = problem(where)
        result = lanczos(operator, start, order=ORDER, reorthogonalize=mode)
        vectors.append(ritz_vectors(operator, start, result, indices=(0, -1)))
    (values, whole, _), (found, cut, residuals) = vectors
    np.testing.assert_allclose(found, values, rtol=1e-9)
    assert residuals.max() < 0.05 * abs(values).max()
    for one, two in zip(jax.tree.leaves(whole), jax.tree.leaves(cut), strict=True):
        np.testing.assert_allclose(np.abs(one), np.abs(two), atol=1e-7)
    for leaf, like in zip(jax.tree.leaves(cut), jax.tree.leaves(start), strict=True):
        spec = P(None, *like.sharding.spec)
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), leaf.ndim)


def test_a_start_that_lies_otherwise_is_refused(mesh):
    operator, start = problem(mesh)
    result = lanczos(operator, start, order=3)
    with pytest.raises(ValueError, match="must be that of the first pass"):
        ritz_vectors(operator, tree_of(1), result, indices=(-1,))


def test_eigenpairs_and_densities_equal_those_of_one_device(x64, mesh):
    key, found = jax.random.key(4), []
    for where in (None, mesh):
        operator, like = problem(where)
        pairs = top_eigenpairs(key, operator, like, k=3, tol=1e-9)
        again = top_eigenpairs(key, operator, like, k=3, tol=1e-9, start=pairs.vectors)
        density = spectral_density(key, operator, like, order=ORDER, num_probes=2)
        assert again.num_products < pairs.num_products
        found.append((pairs.values, again.values, density.nodes))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8), *found)
    for leaf, place in zip(jax.tree.leaves(pairs.vectors), places(like), strict=True):
        spec = NamedSharding(mesh, P(None, *place.spec))
        assert leaf.sharding.is_equivalent_to(spec, leaf.ndim)


def test_a_turn_takes_some_columns_of_each_part(x64):
    rng = np.random.default_rng(5)
    rows, turn = (jnp.asarray(rng.standard_normal(s)) for s in ((4, 24), (4, 4)))
    for wanted in (True, False):
        found = rotated(rows, turn, jnp.array(wanted), 8)
        np.testing.assert_allclose(found, turn @ rows if wanted else rows, rtol=1e-12)
