"""Eigenpairs of Fisher matrices by the Gram trick."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.curvature import fisher_operator, full_matrix
from jaxlab.curvature.gram_fisher import gram_fisher
from jaxlab.likelihoods import Bernoulli, Categorical, Gaussian

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "goldens" / "hessian.npz")
SIZES = {"ce": (4, 6, 3), "mse": (3, 5, 2)}
LIKELIHOODS = {"ce": Categorical(), "mse": Gaussian()}


def mlp(params, x):
    hidden = jnp.tanh(x @ params["w1"] + params["b1"].reshape(1, -1))
    return hidden @ params["w2"] + params["b2"].reshape(1, -1)


def golden(net, dtype=jnp.float64):
    """Parameters in the order of the flat vectors: keys sort as b1 b2 w1 w2."""
    d, h, c = SIZES[net]
    parts = np.split(GOLDEN[f"{net}/theta"], np.cumsum([d * h, h, h * c]))
    shapes = ((d, h), (h,), (h, c), (c,))
    names = ("w1", "b1", "w2", "b2")
    params = {
        name: jnp.asarray(part.reshape(shape), dtype)
        for name, part, shape in zip(names, parts, shapes, strict=True)
    }
    return params, (jnp.asarray(GOLDEN[f"{net}/X"], dtype), GOLDEN[f"{net}/y"])


def flat(vectors):
    """Rows in the golden order w1 b1 w2 b2."""
    return np.concatenate(
        [
            np.asarray(vectors[n]).reshape(len(vectors[n]), -1)
            for n in ("w1", "b1", "w2", "b2")
        ],
        axis=1,
    )


def check_pairs(matrix, values, vectors, *, tol):
    u = flat(vectors)
    k, scale = len(values), np.linalg.norm(matrix, 2)
    want = np.linalg.eigvalsh(matrix)[::-1][:k]
    np.testing.assert_allclose(values, want, atol=tol * scale, rtol=0)
    np.testing.assert_allclose(u @ u.T, np.eye(k), atol=tol)
    np.testing.assert_allclose(matrix @ u.T, u.T * np.asarray(values), atol=tol * scale)


@pytest.mark.parametrize("limit", [2**30, 31_000])
@pytest.mark.parametrize("net", ["ce", "mse"])
def test_true_fisher_is_the_golden_ggn(x64, net, limit):
    params, batch = golden(net)
    pairs = gram_fisher(
        mlp, LIKELIHOODS[net], params, batch, k=8, memory_limit=limit, kind="true"
    )
    check_pairs(GOLDEN[f"{net}/ggn"], *pairs, tol=1e-12)


# 20 examples: all at once, parts of 7 (the last is ragged), parts of 4.
@pytest.mark.parametrize("k", [4, 20])
@pytest.mark.parametrize("limit", [2**30, 15 * 51 * 8, 8 * 51 * 8])
def test_empirical_fisher_is_the_golden_one(x64, limit, k):
    params, batch = golden("ce")
    pairs = gram_fisher(
        mlp, Categorical(), params, batch, k=k, kind="empirical", memory_limit=limit
    )
    check_pairs(GOLDEN["ce/empirical_fisher"], *pairs, tol=1e-12)
    gradients = GOLDEN["ce/per_example_grads"]
    np.testing.assert_allclose(
        pairs[0], np.linalg.svd(gradients, compute_uv=False)[:k] ** 2 / 20, rtol=1e-9
    )


def test_memory_does_not_grow_with_the_examples():
    x = jnp.ones((64, 50))
    params = {"w": jnp.ones((50, 40))}
    peak = lambda limit: (
        jax.jit(
            lambda p, x: gram_fisher(
                lambda p, x: x @ p["w"],
                Gaussian(),
                p,
                (x, jnp.zeros((64, 40))),
                k=2,
                kind="empirical",
                memory_limit=limit,
            )
        )
        .lower(params, x)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
    )
    everything = 64 * 2_000 * 4
    assert peak(everything) > everything
    assert peak(everything // 8) < everything // 2


def test_sampled_fisher_averages_to_the_true_one(x64):
    params, batch = golden("ce")

    def matrix(key):
        values, vectors = gram_fisher(
            mlp, Categorical(), params, batch, k=20, kind="sampled", key=key
        )
        u = jnp.concatenate(
            [vectors[n].reshape(20, -1) for n in ("w1", "b1", "w2", "b2")], axis=1
        )
        return jnp.einsum("kp,k,kq->pq", u, values, u)

    draws = jax.jit(jax.vmap(matrix))(jax.random.split(jax.random.key(0), 400))
    error = draws.std(0) / np.sqrt(400)
    gap = np.abs(draws.mean(0) - GOLDEN["ce/ggn"])
    assert (gap < 5 * error + 1e-12).all()
    assert np.abs(draws[0] - draws[1]).max() > 1e-3
    assert np.abs(draws.mean(0) - GOLDEN["ce/empirical_fisher"]).max() > 10 * gap.max()


@pytest.mark.parametrize("net", ["ce", "mse"])
def test_a_key_draws_the_targets_of_the_operator(x64, net):
    params, batch = golden(net)
    model = (mlp, LIKELIHOODS[net], params, batch)
    options = {"kind": "sampled", "key": jax.random.key(3)}
    matrix = full_matrix(fisher_operator(*model, **options), params)
    values, _ = gram_fisher(*model, k=10, **options)
    expected = np.linalg.eigvalsh(matrix)[::-1][:10]
    np.testing.assert_allclose(values, expected, atol=1e-10 * expected[0])


def test_sampling_does_not_depend_on_the_parts():
    params, batch = golden("ce", jnp.float32)
    run = functools.partial(
        gram_fisher,
        mlp,
        Categorical(),
        params,
        batch,
        k=3,
        kind="sampled",
        key=jax.random.key(3),
    )
    np.testing.assert_allclose(run()[0], run(memory_limit=2_000)[0], rtol=1e-4)


def dense_fisher(apply_fn, likelihood, params, batch, kind):
    """Rows as the definition has them, from full Jacobians and Hessians."""
    inputs, targets, weights = batch
    theta, back = jax.flatten_util.ravel_pytree(params)
    outputs = lambda t: apply_fn(back(t), inputs)
    f = outputs(theta)
    jacobian = jax.jacobian(outputs)(theta)
    jacobian = np.asarray(jacobian).reshape(-1, f.shape[-1], len(theta))
    rows = jacobian.shape[0]
    shares = np.broadcast_to(
        np.asarray(weights).reshape(-1, *[1] * (f.ndim - 2)), f.shape[:-1]
    )
    shares = shares.ravel() / shares.sum()
    events = f.reshape(rows, -1)
    if kind == "true":
        loss = lambda e, t: likelihood.row_nll(e[None], t[None])[0]
        any_target = likelihood.sample(jax.random.key(0), events)
        middle = jax.vmap(jax.hessian(loss))(events, any_target)
    else:
        loss = lambda e, t: likelihood.row_nll(e[None], t[None])[0]
        slopes = jax.vmap(jax.grad(loss))(
            events, targets.reshape(rows, *targets.shape[f.ndim - 1 :])
        )
        middle = slopes[:, :, None] * slopes[:, None, :]
    return np.einsum("r,rcp,rcd,rdq->pq", shares, jacobian, middle, jacobian)


@pytest.mark.parametrize("kind", ["true", "empirical"])
@pytest.mark.parametrize(
    "likelihood", [Categorical(), Bernoulli(), Gaussian(scale=0.7)], ids=repr
)
def test_sequences_and_weights(x64, likelihood, kind):
    rng = np.random.default_rng(0)
    inputs = {"x": jnp.asarray(rng.standard_normal((5, 3, 4)))}
    params = {"w": jnp.asarray(rng.standard_normal((4, 3)))}
    apply_fn = lambda p, x: jnp.cumsum(jnp.tanh(x["x"] @ p["w"]), axis=1)
    if isinstance(likelihood, Categorical):
        targets = jnp.asarray(rng.integers(0, 3, (5, 3)))
    else:
        targets = jnp.asarray(rng.integers(0, 2, (5, 3, 3)), float)
    weights = jnp.array([1.0, 2.0, 0.0, 1.0, 0.5])
    want = dense_fisher(apply_fn, likelihood, params, (inputs, targets, weights), kind)
    for limit in (2**30, 17_000):
        values, vectors = gram_fisher(
            apply_fn,
            likelihood,
            params,
            (inputs, targets, weights),
            k=12,
            kind=kind,
            memory_limit=limit,
        )
        u = np.asarray(vectors["w"]).reshape(12, 12)
        np.testing.assert_allclose((u.T * np.asarray(values)) @ u, want, atol=1e-12)


def test_a_row_of_weight_zero_may_hold_anything():
    params, (x, y) = golden("ce", jnp.float32)
    weights = jnp.ones(20).at[3].set(0)
    batch = (x.at[3].set(jnp.nan), jnp.asarray(y).at[3].set(99), weights)
    rest = [np.delete(np.asarray(a), 3, axis=0) for a in (x, y)]
    for kind in ("true", "empirical"):
        run = functools.partial(gram_fisher, mlp, Categorical(), params, k=3, kind=kind)
        np.testing.assert_allclose(run(batch)[0], run(tuple(rest))[0], rtol=1e-4)


def test_beyond_the_rank_values_vanish_and_vectors_stay_orthonormal():
    x = jnp.eye(4)[:2]
    values, vectors = gram_fisher(
        lambda w, x: x @ w, Gaussian(), jnp.ones((4, 3)), (x, None), k=6
    )
    np.testing.assert_allclose(values, [0.5] * 6, rtol=1e-5)
    twice = jnp.concatenate([x, x])
    values, vectors = gram_fisher(
        lambda w, x: x @ w, Gaussian(), jnp.ones((4, 3)), (twice, None), k=8
    )
    np.testing.assert_allclose(values, [0.5] * 6 + [0, 0], atol=1e-6)
    u = vectors.reshape(8, 12)
    np.testing.assert_allclose(u @ u.T, np.eye(8), atol=1e-5)


def test_sloppy_pairs_in_single_precision():
    """Vectors stay orthonormal, values right, where S^T v / sqrt(lambda) would not."""
    rng = np.random.default_rng(0)
    left, _ = np.linalg.qr(rng.standard_normal((60, 24)))
    right, _ = np.linalg.qr(rng.standard_normal((40, 24)))
    want = 10.0 ** (-0.25 * np.arange(24))  # 5.75 decades
    x = np.sqrt(60 * want) * left @ right.T
    values, vectors = gram_fisher(
        lambda w, x: x @ w,
        Gaussian(),
        jnp.ones((40, 1)),
        (jnp.asarray(x, jnp.float32), None),
        k=24,
    )
    u = vectors.reshape(24, 40)
    np.testing.assert_allclose(u @ u.T, np.eye(24), atol=1e-5)
    np.testing.assert_allclose(values, want, rtol=1e-2)
    alignment = np.abs(np.sum(np.asarray(u) * right.T, axis=1))
    np.testing.assert_allclose(alignment, 1, atol=1e-4)
    gram = (x @ x.T / 60).astype(np.float32)
    naive = (x / np.sqrt(60)).T @ np.linalg.eigh(gram)[1][:, ::-1][:, :24]
    naive = naive / np.linalg.norm(naive, axis=0)
    assert np.abs(naive.T @ naive - np.eye(24)).max() > 1e-4


def test_half_precision_parameters_give_float32_pairs():
    params, batch = golden("ce", jnp.float32)
    exact = gram_fisher(mlp, Categorical(), params, batch, k=3)[0]
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (params, batch[0]))
    values, vectors = gram_fisher(mlp, Categorical(), half[0], (half[1], batch[1]), k=3)
    assert values.dtype == vectors["w1"].dtype == jnp.float32
    np.testing.assert_allclose(values, exact, rtol=0.1)
    u = flat(vectors)
    np.testing.assert_allclose(u @ u.T, np.eye(3), atol=1e-5)


def test_nothing_is_compiled_again_when_params_and_data_change():
    params, batch = golden("ce", jnp.float32)
    traces = []

    def counted(params, x):
        traces.append(x.shape)
        return mlp(params, x)

    first = gram_fisher(counted, Categorical(), params, batch, k=2)[0]
    so_far = traces.count((1, 4))
    assert so_far > 0
    for scale in (0.5, 2.0):
        moved, data = jax.tree.map(lambda x, s=scale: s * x, (params, batch[0]))
        got = gram_fisher(counted, Categorical(), moved, (data, batch[1]), k=2)[0]
        assert not np.allclose(got, first)
        inside = jax.jit(lambda p, b: gram_fisher(mlp, Categorical(), p, b, k=2)[0])
        np.testing.assert_allclose(got, inside(moved, (data, batch[1])), rtol=1e-4)
    assert traces.count((1, 4)) == so_far
