"""Coherence and alignment of single examples' gradients against dense oracles."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlab.likelihoods import Categorical
from jaxlab.objective import Objective, plain
from jaxlab.optimizers.coherence import (
    coherence_from_moments,
    gradient_alignment,
    gradient_coherence,
    gradient_moments,
    per_example_gradients,
)

M = 11
TIGHT = {"rtol": 1e-12, "atol": 1e-14}
MICROBATCHES = [None, 3]


def apply_fn(params, x):
    hidden = jnp.tanh(x @ params["w"] + params["b"][None])
    return hidden @ params["out"]["w"]


def loss_fn(params, batch):
    x, y = batch
    return Categorical().nll(apply_fn(params, x), y)


def make(seed=0, rows=M, dtype=None):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    params = {"w": draw(3, 4), "b": draw(4), "out": {"w": draw(4, 2)}}
    return params, (draw(rows, 3), jnp.asarray(rng.integers(2, size=rows)))


def matrix(params, batch):
    """Gives one flat gradient a row, by a loop over the rows."""
    rows = []
    for i in range(len(batch[0])):
        one = jax.tree.map(lambda a, i=i: a[i : i + 1], batch)
        found = jax.tree.leaves(slope(params, one))
        rows.append(np.concatenate([np.ravel(g) for g in found]))
    return np.stack(rows)


@functools.cache
def compiled(function):
    return jax.jit(function, static_argnums=0, static_argnames="microbatch")


def jitted(function, loss, *args, **options):
    return compiled(function)(loss, *args, **options)


slope = jax.jit(jax.grad(loss_fn))
coherence_of = jax.jit(coherence_from_moments, static_argnames="unbiased")
stacked_coherence = jax.jit(gradient_coherence, static_argnames="unbiased")
OBJECTIVE = Objective(plain(apply_fn), Categorical())
weighted = lambda params, batch: OBJECTIVE.loss(params, (), batch)[0]


def gram_alphas(g):
    """Gives alpha over all pairs, and over pairs of different examples."""
    gram = g @ g.T
    same = np.diag(gram).mean()
    other = gram[~np.eye(len(g), dtype=bool)].mean()
    return gram.mean() / same, other / same


# The gradients


@pytest.mark.parametrize("microbatch", [*MICROBATCHES, 20])
def test_gradients_are_those_of_a_loop(microbatch, x64):
    params, batch = make()
    got = jitted(per_example_gradients, loss_fn, params, batch, microbatch=microbatch)
    chex.assert_tree_shape_prefix(got, (M,))
    flat = np.concatenate([np.reshape(g, (M, -1)) for g in jax.tree.leaves(got)], 1)
    np.testing.assert_allclose(flat, matrix(params, batch), **TIGHT)


# Limits


def test_orthogonal_equal_and_cancelling_gradients(x64):
    for stack, alpha, unbiased in (
        (3 * np.eye(5), 1 / 5, 0.0),
        (np.ones((5, 7)), 1.0, 1.0),
        (np.kron(np.eye(2)[0], np.array([[1.0], [-1.0]])), 0.0, -1.0),
    ):
        got = stacked_coherence(jnp.asarray(stack))
        np.testing.assert_allclose(got.alpha, alpha, **TIGHT)
        np.testing.assert_allclose(got.m_coherence, len(stack) * alpha, **TIGHT)
        np.testing.assert_allclose(got.by_leaf, alpha, **TIGHT)
        got = stacked_coherence(jnp.asarray(stack), unbiased=True)
        np.testing.assert_allclose(got.alpha, unbiased, **TIGHT)


@pytest.mark.parametrize("unbiased", [False, True])
def test_zero_gradients_and_single_examples_give_no_nan(unbiased):
    stack = {"a": jnp.zeros((4, 3)), "b": jnp.ones((4, 2))}
    got = stacked_coherence(stack, unbiased=unbiased)
    assert (float(got.alpha), float(got.by_leaf["a"])) == (1.0, 0.0)
    none = stacked_coherence({"a": stack["a"]}, unbiased=unbiased)
    assert (float(none.alpha), float(none.m_coherence)) == (0.0, 0.0)
    single = stacked_coherence(jnp.ones((1, 3)), unbiased=unbiased)
    assert float(single.alpha) == (0.0 if unbiased else 1.0)
    slope = jax.grad(lambda g: stacked_coherence(g).alpha)(jnp.zeros((2, 3)))
    chex.assert_tree_all_finite(slope)


# The oracle


@pytest.mark.parametrize("microbatch", MICROBATCHES)
def test_alpha_is_the_mean_over_pairs(microbatch, x64):
    params, batch = make()
    g = matrix(params, batch)
    every, other = gram_alphas(g)
    moments = jitted(gradient_moments, loss_fn, params, batch, microbatch=microbatch)
    got = coherence_of(moments)
    unbiased = coherence_of(moments, unbiased=True)
    np.testing.assert_allclose(got.alpha, every, **TIGHT)
    np.testing.assert_allclose(unbiased.alpha, other, **TIGHT)
    np.testing.assert_allclose(got.m_coherence, M * every, **TIGHT)
    np.testing.assert_allclose(unbiased.m_coherence, M * other, **TIGHT)
    np.testing.assert_allclose(got.alpha, unbiased.alpha * (M - 1) / M + 1 / M, **TIGHT)
    stacked = jitted(per_example_gradients, loss_fn, params, batch)
    chex.assert_trees_all_close(stacked_coherence(stacked), got, **TIGHT)
    for path, leaf in jax.tree_util.tree_leaves_with_path(stacked):
        want = gram_alphas(np.reshape(leaf, (M, -1)))
        for found, alpha in zip((got, unbiased), want, strict=True):
            (by_leaf,) = [
                a
                for p, a in jax.tree_util.tree_leaves_with_path(found.by_leaf)
                if p == path
            ]
            np.testing.assert_allclose(by_leaf, alpha, **TIGHT)


def test_alpha_of_the_whole_is_the_mean_by_shares(x64):
    moments = jitted(gradient_moments, loss_fn, *make())
    got = coherence_of(moments)
    squares = np.asarray(jax.tree.leaves(moments.square))
    parts = np.asarray(jax.tree.leaves(got.by_leaf))
    np.testing.assert_allclose(got.alpha, (parts * squares).sum() / squares.sum())
    # A part of the network: the same part of the sums.
    trees = {
        name: getattr(moments, name)["out"] for name in ("gradient", "square", "own")
    }
    part = coherence_of(moments._replace(**trees))
    np.testing.assert_allclose(part.alpha, got.by_leaf["out"]["w"], **TIGHT)


def test_alpha_is_what_a_step_along_one_does_to_all(x64):
    params, batch = make()
    stacked = jitted(per_example_gradients, loss_fn, params, batch)
    rows = [jax.tree.map(lambda a, i=i: a[i : i + 1], batch) for i in range(M)]
    # change[j, i]: of example i's loss along the gradient of j, by central differences.
    change, h = np.zeros((M, M)), 1e-5
    for j in range(M):
        along = lambda s, j=j: jax.tree.map(lambda p, g: p - s * g[j], params, stacked)
        change[j] = [loss_fn(along(h), r) - loss_fn(along(-h), r) for r in rows]
    want = change.mean() / np.diag(change).mean()
    np.testing.assert_allclose(stacked_coherence(stacked).alpha, want, rtol=1e-6)


# Invariances


def test_scale_rotation_and_duplication(x64):
    g = matrix(*make())
    alpha = stacked_coherence(jnp.asarray(g)).alpha
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(g.shape[1],) * 2))
    for same in (1e-6 * g, -3 * g, g @ turn, g[::-1]):
        got = stacked_coherence(jnp.asarray(same)).alpha
        np.testing.assert_allclose(got, alpha, rtol=1e-12)
    twice = stacked_coherence(jnp.asarray(np.concatenate([g, g])))
    np.testing.assert_allclose(twice.alpha, alpha, rtol=1e-12)
    np.testing.assert_allclose(twice.m_coherence, 2 * M * alpha, rtol=1e-12)


def test_moments_of_batches_add(x64):
    params, batch = make()
    whole = jitted(gradient_moments, loss_fn, params, batch)
    parts = [jax.tree.map(lambda a, s=s: a[s], batch) for s in (slice(4), slice(4, M))]
    parts = [
        jitted(gradient_moments, loss_fn, params, part, microbatch=3) for part in parts
    ]
    chex.assert_trees_all_close(jax.tree.map(jnp.add, *parts), whole, **TIGHT)
    mean = jax.tree.map(lambda s: s / whole.weight, whole.gradient)
    chex.assert_trees_all_close(mean, slope(params, batch), **TIGHT)


@pytest.mark.parametrize(("microbatch", "kind"), [(None, float), (4, bool)])
def test_padding_counts_for_nothing(microbatch, kind, x64):
    params, (x, y) = make()
    padded = jnp.concatenate([x, jnp.full((3, 3), jnp.nan)])
    labels = jnp.concatenate([y, jnp.zeros(3, y.dtype)])
    batch = (padded, labels, (jnp.arange(M + 3) < M).astype(kind))
    got = jitted(gradient_moments, weighted, params, batch, microbatch=microbatch)
    want = jitted(gradient_moments, loss_fn, params, (x, y))
    chex.assert_trees_all_close(got, want, **TIGHT)
    found = jitted(gradient_alignment, weighted, params, batch, microbatch=microbatch)
    want = jitted(gradient_alignment, loss_fn, params, (x, y))
    for ours, theirs in zip(found, want, strict=True):
        np.testing.assert_allclose(ours[:M], theirs, **TIGHT)
        assert not ours[M:].any()


def test_weights_weigh(x64):
    params, (x, y) = make()
    weights = jnp.asarray(np.random.default_rng(3).uniform(1, 2, size=M))
    moments = jitted(gradient_moments, weighted, params, (x, y, weights), microbatch=4)
    mean = jax.tree.map(lambda s: s / moments.weight, moments.gradient)
    whole = jax.grad(weighted)(params, (x, y, weights))
    chex.assert_trees_all_close(mean, whole, **TIGHT)
    g, w = matrix(params, (x, y)), np.asarray(weights)
    gram, pairs = g @ g.T, np.outer(w, w)
    same = (w * np.diag(gram)).sum() / w.sum()
    got = coherence_of(moments)
    np.testing.assert_allclose(got.alpha, (gram * pairs).sum() / pairs.sum() / same)
    count = w.sum() ** 2 / (w**2).sum()
    np.testing.assert_allclose(got.m_coherence, count * got.alpha)
    pairs[np.diag_indices(M)] = 0
    got = coherence_of(moments, unbiased=True)
    np.testing.assert_allclose(got.alpha, (gram * pairs).sum() / pairs.sum() / same)


# Alignment


@pytest.mark.parametrize("microbatch", MICROBATCHES)
def test_alignment_with_the_mean_and_with_another(microbatch, x64):
    params, batch = make()
    g = matrix(params, batch)
    got = jitted(gradient_alignment, loss_fn, params, batch, microbatch=microbatch)
    norms, mean = np.linalg.norm(g, axis=1), g.mean(0)
    np.testing.assert_allclose(got.inner, g @ mean, **TIGHT)
    np.testing.assert_allclose(got.norm, norms, **TIGHT)
    cosine = g @ mean / norms / np.linalg.norm(mean)
    np.testing.assert_allclose(got.cosine, cosine, **TIGHT)
    alpha = stacked_coherence(jnp.asarray(g)).alpha
    np.testing.assert_allclose(got.inner.mean() / (got.norm**2).mean(), alpha, **TIGHT)
    held_out = slope(params, make(5)[1])
    got = jitted(
        gradient_alignment,
        loss_fn,
        params,
        batch,
        reference=held_out,
        microbatch=microbatch,
    )
    flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(held_out)])
    np.testing.assert_allclose(got.inner, g @ flat, **TIGHT)


def test_no_direction_has_cosine_zero():
    linear = lambda w, x: jnp.mean(x @ w)
    x = jnp.array([[1.0, 0.0], [0.0, 0.0], [-1.0, 0.0]])
    got = gradient_alignment(linear, jnp.ones(2), x)
    assert got.cosine.tolist() == [0.0, 0.0, 0.0]
    got = gradient_alignment(linear, jnp.ones(2), x, reference=jnp.array([2.0, 0.0]))
    assert got.cosine.tolist() == [1.0, 0.0, -1.0]


# Dtypes, memory, programs


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_gradients_are_summed_in_float32(dtype):
    big = jnp.full((8, 64), 200.0, dtype)  # squares of float16 overflow at 65,504
    got = stacked_coherence(big)
    assert (float(got.alpha), got.alpha.dtype) == (1.0, jnp.float32)
    params, batch = make(dtype=dtype)
    moments = jitted(gradient_moments, loss_fn, params, batch, microbatch=4)
    assert {leaf.dtype for leaf in jax.tree.leaves(moments)} == {jnp.dtype("float32")}
    stacked = jitted(per_example_gradients, loss_fn, params, batch)
    assert {leaf.dtype for leaf in jax.tree.leaves(stacked)} == {jnp.dtype(dtype)}


def temporaries(function, *args):
    compiled = jax.jit(function).lower(*args).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_is_that_of_a_micro_batch():
    rows, width = 64, 256
    x, w = jnp.ones((rows, width)), jnp.ones((width, width))
    loss = lambda w, x: jnp.mean(jnp.tanh(x @ w).sum(axis=1) ** 2)
    for measure in (gradient_moments, gradient_alignment):
        cost = lambda microbatch, f=measure: temporaries(
            lambda w, x: f(loss, w, x, microbatch=microbatch), w, x
        )
        # A gradient has 4 width^2 bytes; all of them would be 64.
        assert cost(2) < 8 * 4 * width**2
        assert cost(2) < cost(32)


def test_one_trace_and_no_more_for_new_params():
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def measure(params, batch):
        moments = gradient_moments(loss_fn, params, batch, microbatch=4)
        return coherence_from_moments(moments), gradient_alignment(
            loss_fn, params, batch, microbatch=4
        )

    for seed in range(2):
        params, batch = make(seed)
        got, _ = measure(params, batch)
        want = stacked_coherence(jitted(per_example_gradients, loss_fn, params, batch))
        chex.assert_trees_all_close(got, want, rtol=1e-5)


def test_rows_on_eight_devices_give_the_same():
    params, batch = make(rows=16)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    spread = jax.device_put(batch, NamedSharding(mesh, P("d")))
    for microbatch in (None, 8):
        measure = jax.jit(
            lambda p, b, k=microbatch: gradient_moments(loss_fn, p, b, microbatch=k)
        )
        chex.assert_trees_all_close(
            measure(params, spread), measure(params, batch), rtol=2e-6, atol=1e-6
        )


# What it is for


def test_real_labels_are_more_coherent_than_random_ones():
    rng = np.random.default_rng(0)
    labels = rng.integers(4, size=200)
    centres = 2 * np.eye(4, 8)
    x = jnp.asarray(centres[labels] + rng.normal(size=(200, 8)), jnp.float32)
    params = {"w": jnp.asarray(rng.normal(size=(8, 4)) / 10, jnp.float32)}
    loss = lambda p, b: Categorical().nll(b[0] @ p["w"], b[1])
    found = []
    for y in (labels, rng.integers(4, size=200)):
        moments = gradient_moments(loss, params, (x, jnp.asarray(y)), microbatch=64)
        found.append(float(coherence_of(moments).m_coherence))
    assert found[0] > 5 * found[1]
