"""Gauss-Newton and Fisher operators, against golden arrays and one another."""

import dataclasses
import pathlib
import runpy

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlab.curvature import _partwise
from jaxlab.curvature._functions import functions_of
from jaxlab.curvature._recurrence import linearized
from jaxlab.curvature.dense import full_matrix
from jaxlab.curvature.gauss_newton import fisher_operator, ggn_operator
from jaxlab.curvature.gram_fisher import gram_fisher
from jaxlab.curvature.hessian import hessian_operator
from jaxlab.likelihoods import Bernoulli, Categorical, Gaussian
from jaxlab.objective import Objective

P_ = runpy.run_path(str(pathlib.Path(__file__).parent / "operator_problem.py"))
GOLDEN, golden, flat, unflat = P_["GOLDEN"], P_["golden"], P_["flat"], P_["unflat"]
LIKELIHOODS, mlp, outputs = P_["LIKELIHOODS"], P_["mlp"], P_["outputs_small"]
small, cut, close = P_["small"], P_["cut"], P_["close"]
NETS = ("ce", "mse")
KINDS = ("true", "sampled", "empirical")


def in_golden_order(net, matrix):
    order = P_["order"](net)
    return np.asarray(matrix)[np.ix_(order, order)]


def labelled(rows=20, dtype=jnp.float64):
    """A problem with classes, of two outputs a row."""
    params, (x, y), v = small(rows, dtype)
    return params, (x, (y > 0).astype(jnp.int32)), v


def options(kind):
    key = {"key": jax.random.key(3)} if kind == "sampled" else {}
    return {"kind": kind, **key}


@pytest.mark.parametrize("net", NETS)
def test_the_matrices_are_the_golden_ones(x64, net):
    params, batch = golden(net)
    problem = (mlp, LIKELIHOODS[net], params, batch)
    for operator, want in (
        (ggn_operator(*problem), GOLDEN[f"{net}/ggn"]),
        (fisher_operator(*problem), GOLDEN[f"{net}/ggn"]),
        (
            fisher_operator(*problem, kind="empirical"),
            GOLDEN[f"{net}/empirical_fisher"],
        ),
    ):
        found = in_golden_order(net, full_matrix(operator, params))
        np.testing.assert_allclose(found, want, atol=1e-12)


def test_the_golden_sampled_fisher_is_the_empirical_one_of_its_labels(x64):
    params, (x, _) = golden("ce")
    labels = jnp.asarray(GOLDEN["ce/sampled_labels"])
    operator = fisher_operator(
        mlp, Categorical(), params, (x, labels), kind="empirical"
    )
    found = in_golden_order("ce", full_matrix(operator, params))
    np.testing.assert_allclose(found, GOLDEN["ce/sampled_fisher"], atol=1e-12)


@pytest.mark.parametrize("net", NETS)
def test_products_are_the_golden_ones(x64, net):
    params, batch = golden(net)
    problem = (mlp, LIKELIHOODS[net], params, batch)
    for key, operator in (
        ("ggnvp", ggn_operator(*problem)),
        ("efvp", fisher_operator(*problem, kind="empirical")),
    ):
        for v, want in zip(
            GOLDEN[f"{net}/probes_normal"], GOLDEN[f"{net}/{key}_probes_normal"]
        ):
            v = unflat(net, v)
            np.testing.assert_allclose(flat(operator(v)), want, rtol=1e-9, atol=1e-11)
            form = operator.quadratic_form(v)
            np.testing.assert_allclose(form, flat(v) @ want, rtol=1e-9)


def test_single_precision():
    params, batch = golden("ce", jnp.float32)
    operator = ggn_operator(mlp, Categorical(), params, batch)
    for v, want in zip(GOLDEN["ce/probes_normal"], GOLDEN["ce/ggnvp_probes_normal"]):
        found = flat(operator(unflat("ce", v, jnp.float32)))
        np.testing.assert_allclose(found, want, atol=1e-5 * np.abs(want).max())


def test_it_is_the_hessian_where_the_model_is_linear(x64):
    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.normal(size=(9, 4))), jnp.asarray(rng.integers(0, 3, 9))
    w, weights = jnp.asarray(rng.normal(size=(4, 3))), jnp.arange(9.0)
    linear = lambda w, x: x @ w
    likelihood = Categorical()
    loss = lambda w, b: likelihood.nll(linear(w, b[0]), b[1], weights=b[2])
    batch = (x, y, weights)
    hessian = full_matrix(hessian_operator(loss, w, batch), w)
    ggn = full_matrix(ggn_operator(linear, likelihood, w, batch), w)
    np.testing.assert_allclose(ggn, hessian, atol=1e-14)


@pytest.mark.parametrize(
    "likelihood", [Categorical(), Bernoulli(), Gaussian(scale=0.7)], ids=repr
)
def test_every_row_of_a_sequence_counts(x64, likelihood):
    """Outputs (batch, time, event) are batch x time rows; brute force over them."""
    params, _, v = small()
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(4, 3, 3)))
    model = lambda p, x: jnp.tanh(x @ p["a"]) * p["b"].reshape(1, 1, 2)
    weights = jnp.array([1.0, 2.0, 0.0, 0.5])
    targets = likelihood.sample(jax.random.key(0), model(params, x))
    f = lambda p: model(p, x).reshape(12, 2)
    jacobian = np.concatenate(
        [np.asarray(j).reshape(12, 2, -1) for j in jax.jacobian(f)(params).values()], 2
    )
    shares = np.repeat(weights / weights.sum() / 3, 3)
    row = lambda o, y: likelihood.row_nll(o[None], y[None])[0]
    labels = targets.reshape(12, *targets.shape[2:])
    bends = np.asarray(jax.vmap(jax.hessian(row))(f(params), labels))
    g = np.asarray(jax.vmap(jax.grad(row))(f(params), labels))
    outer = g[:, :, None] * g[:, None, :]
    flat_v = np.concatenate([np.ravel(leaf) for leaf in v.values()])
    for kind, inner, size in (("true", bends, None), ("empirical", outer, 3)):
        want = np.einsum("n,nci,ncd,ndj->ij", shares, jacobian, inner, jacobian)
        problem = (model, likelihood, params, (x, targets, weights))
        operator = fisher_operator(*problem, kind=kind, microbatch=size)
        found = full_matrix(operator, params)
        np.testing.assert_allclose(found, want, atol=1e-13)
        form = operator.quadratic_form(v)
        np.testing.assert_allclose(form, flat_v @ want @ flat_v, rtol=1e-11)


def test_the_sampled_kind_has_the_true_one_as_its_mean(x64):
    params, batch, _ = labelled(6)

    @jax.jit
    @jax.vmap
    def draw(key):
        operator = fisher_operator(
            outputs, Categorical(), params, batch, kind="sampled", key=key
        )
        return full_matrix(operator, params)

    draws = np.asarray(draw(jax.random.split(jax.random.key(0), 2000)))
    true = full_matrix(fisher_operator(outputs, Categorical(), params, batch), params)
    error = draws.std(0) / len(draws) ** 0.5
    assert (np.abs(draws.mean(0) - true) < 4.5 * error + 1e-12).all()
    assert (error > 1e-6).any()


@pytest.mark.parametrize("kind", KINDS)
def test_however_the_data_come_it_is_one_matrix(x64, kind):
    params, batch, v = labelled()
    if kind != "empirical":
        batch = (*batch, jnp.linspace(0.0, 2.0, 20))
    made = lambda batches, **more: fisher_operator(
        outputs, Categorical(), params, batches, **options(kind), **more
    )
    whole, parts = made(batch), cut(batch, 6)
    want, form = whole(v), whole.quadratic_form(v)
    host = [tuple(np.asarray(x) for x in part) for part in parts]
    stream = made(lambda: iter(host))
    operators = (whole.linearize(), made(parts), stream)
    if kind == "sampled":
        # Cut by every third row: the labels stay with their rows.
        operators += (
            made(parts).linearize(),
            made(batch, microbatch=6),
            made(lambda: host, microbatch=4),
        )
    for operator in operators:
        close(operator(v), want, 1e-12)
    for operator in (stream, whole.linearize()):
        np.testing.assert_allclose(operator.quadratic_form(v), form, rtol=1e-12)


def test_sampled_labels_are_drawn_once_for_a_loop_over_parts(x64):
    params, batch, _ = labelled()
    operator = fisher_operator(
        outputs, Categorical(), params, batch, microbatch=6, **options("sampled")
    )
    ready = operator.linearize()
    assert ready.kind == "empirical"
    assert ready.data.stack.targets.shape == (3, 6)
    assert ready.data.rest.targets.shape == (2,)
    plain = ggn_operator(outputs, Categorical(), params, batch, microbatch=6)
    assert plain.linearize() is plain


def test_another_key_draws_another_matrix():
    params, batch, v = labelled(dtype=jnp.float32)
    images = [
        fisher_operator(
            outputs, Categorical(), params, batch, kind="sampled", key=jax.random.key(i)
        )(v)["b"]
        for i in (0, 1, 0)
    ]
    np.testing.assert_array_equal(images[0], images[2])
    assert not np.allclose(images[0], images[1])


def test_rows_of_weight_zero_may_have_any_target():
    params, (x, y), v = labelled(dtype=jnp.float32)
    weights = jnp.ones(20).at[3].set(0)
    for kind in KINDS:
        images = [
            fisher_operator(
                outputs, Categorical(), params, (x, y, weights), **options(kind)
            )(v)
            for y in (y, y.at[3].set(99))
        ]
        close(images[1], images[0], 1e-6)


def test_a_ragged_stream_compiles_one_program():
    params, batch, v = labelled(dtype=jnp.float32)
    operator = ggn_operator(outputs, Categorical(), params, lambda: cut(batch, 6))
    before = _partwise._added._cache_size()
    first = operator(v)
    assert _partwise._added._cache_size() == before + 1
    close(operator(v), first, 0)
    moved = dataclasses.replace(
        operator,
        operator=dataclasses.replace(
            operator.operator, params=jax.tree.map(lambda x: 2 * x, params)
        ),
    )
    assert not np.allclose(moved(v)["a"], first["a"])
    assert _partwise._added._cache_size() == before + 1


def test_it_agrees_with_the_gram_trick():
    params, batch, _ = labelled(dtype=jnp.float32)
    for kind in ("true", "empirical"):
        want = gram_fisher(outputs, Categorical(), params, batch, k=4, kind=kind)[0]
        operator = fisher_operator(outputs, Categorical(), params, batch, kind=kind)
        values = np.linalg.eigvalsh(full_matrix(operator, params))[::-1][:4]
        np.testing.assert_allclose(values, want, rtol=1e-4, atol=1e-6)


def test_holes_are_zero_and_come_back(x64):
    params, batch, full = labelled()
    v = {"a": full["a"], "b": optax.MaskedNode()}
    whole = ggn_operator(outputs, Categorical(), params, batch)
    filled = {"a": full["a"], "b": jnp.zeros(2)}
    want, form = whole(filled)["a"], whole.quadratic_form(filled)
    stream = ggn_operator(outputs, Categorical(), params, lambda: cut(batch, 6))
    for operator in (whole, whole.linearize(), stream):
        image = operator(v)
        assert jax.tree.structure(image) == jax.tree.structure(v)
        np.testing.assert_allclose(image["a"], want, atol=1e-14)
        np.testing.assert_allclose(operator.quadratic_form(v), form, rtol=1e-12)


def test_a_program_is_traced_once_when_params_data_and_key_change():
    traces = []

    def counted(params, x):
        traces.append(None)
        return outputs(params, x)

    params, batch, v = labelled(dtype=jnp.float32)
    run = jax.jit(lambda operator, v: full_matrix(operator, v))
    apply = jax.jit(lambda operator, v: operator(v))
    counts = []
    for seed in range(3):
        moved = jax.tree.map(lambda x, s=seed: (1 + s) * x, params)
        data = ((1 + seed) * batch[0], batch[1])
        key = jax.random.key(seed)
        sampled = {"kind": "sampled", "key": key, "microbatch": 6}
        for likelihood, more in ((Gaussian(), {}), (Categorical(), sampled)):
            operator = fisher_operator(counted, likelihood, moved, data, **more)
            run(operator, v)
            found = apply(linearized(operator), v)
            close(found, operator(v), 1e-4 * (1 + np.abs(found["b"]).max()))
        counts.append(len(traces))
    assert counts[0] == counts[1] == counts[2]
    assert run._cache_size() == apply._cache_size() == 2


def test_objectives_and_their_state_are_leaves(x64):
    def apply_fn(params, state, inputs, *, key, train):
        assert not train
        return outputs(params, inputs * state["scale"]), state

    params, batch, v = labelled()
    apply = jax.jit(lambda operator, v: operator(v))
    for scale in (1.0, 3.0):
        objective = Objective(apply_fn, Gaussian(scale=jnp.array(0.5)))
        _, model = functions_of(objective, state={"scale": jnp.array(scale)})
        operator = ggn_operator(model, objective.likelihood, params, batch)
        moved = (scale * batch[0], batch[1])
        want = ggn_operator(outputs, Gaussian(scale=0.5), params, moved)(v)
        close(apply(operator, v), want, 1e-12)
    assert apply._cache_size() == 1


class Halves:
    """A likelihood of a user's own, not registered as a pytree."""

    def row_nll(self, outputs, targets):
        return 0.5 * jnp.sum((outputs - targets) ** 2, axis=-1)

    def nll(self, outputs, targets, *, weights=None):
        return jnp.mean(self.row_nll(outputs, targets))

    def sample(self, key, outputs):
        return outputs + jax.random.normal(key, outputs.shape)

    def hessian_product(self, outputs, v, *, weights=None):
        return Gaussian().hessian_product(outputs, v, weights=weights)


def test_any_class_with_the_methods_of_a_likelihood_fits(x64):
    params, batch, v = small()
    for kind in ("true", "sampled"):
        images = [
            fisher_operator(outputs, likelihood, params, batch, **options(kind))(v)
            for likelihood in (Halves(), Gaussian())
        ]
        close(images[0], images[1], 1e-12)


def test_half_precision_params_sum_in_single():
    params, batch, v = labelled(dtype=jnp.float32)
    want = ggn_operator(outputs, Categorical(), params, batch)(v)
    half = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
    data = (half(batch[0]), batch[1])
    for batches in (data, [data] * 100):
        operator = ggn_operator(outputs, Categorical(), half(params), batches)
        image = operator(half(v))
        assert {x.dtype for x in image.values()} == {jnp.dtype(jnp.bfloat16)}
        scale = max(np.abs(x).max() for x in want.values())
        close(jax.tree.map(np.float32, image), want, 0.05 * scale)
        assert operator.quadratic_form(half(v)).dtype == jnp.float32


def test_sharded_params_and_data_give_the_same():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    draw = np.random.default_rng(0).normal
    array = lambda *shape: jnp.asarray(draw(size=shape), jnp.float32)
    params, v = ({"a": array(8, 16), "b": array(16)} for _ in range(2))
    model = lambda p, x: jnp.tanh(x @ p["a"]) * p["b"].reshape(1, 16)
    batch = array(48, 8), jnp.arange(48) % 16
    rows = NamedSharding(mesh, P("d"))
    for kind in KINDS:
        made = lambda p, b, kind=kind, **more: fisher_operator(
            model, Categorical(), p, b, **options(kind), **more
        )
        want = made(params, batch)(v)
        theta, u, data = jax.device_put((params, v, batch), rows)
        size = None if kind == "true" else 16
        for operator in (made(theta, data, microbatch=size),):
            found = operator(u)
            for name, leaf in want.items():
                scale = np.abs(leaf).max()
                np.testing.assert_allclose(found[name], leaf, atol=1e-5 * scale)


class _Linen(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(2, use_bias=False)(x)


@pytest.mark.parametrize("form", ["linen", "nnx", "equinox"])
def test_any_library_of_modules_gives_the_same(form):
    w = jnp.arange(6.0).reshape(3, 2) / 6
    x = jax.random.normal(jax.random.key(0), (7, 3))
    want = full_matrix(ggn_operator(lambda w, x: x @ w, Categorical(), w, (x, None)), w)
    if form == "linen":
        apply_fn, params = _Linen().apply, {"params": {"Dense_0": {"kernel": w}}}
    elif form == "nnx":
        module = nnx.Linear(3, 2, use_bias=False, rngs=nnx.Rngs(0))
        module.kernel[...] = w
        graph, params = nnx.split(module, nnx.Param)
        apply_fn = lambda p, x: nnx.merge(graph, p)(x)
    else:
        layer = eqx.nn.Linear(3, 2, use_bias=False, key=jax.random.key(0))
        layer = eqx.tree_at(lambda m: m.weight, layer, w.T)
        params, static = eqx.partition(layer, eqx.is_inexact_array)
        apply_fn = lambda p, x: jax.vmap(eqx.combine(p, static))(x)
    operator = ggn_operator(apply_fn, Categorical(), params, (x, None))
    found = np.asarray(full_matrix(operator, params))
    if form == "equinox":  # its weight is the transpose
        turn = np.arange(6).reshape(2, 3).T.ravel()
        found = found[np.ix_(turn, turn)]
    np.testing.assert_allclose(found, want, atol=1e-6)
