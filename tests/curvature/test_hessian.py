"""Hessian products and operators, against autodiff in float64 and golden arrays."""

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
from jaxlab.curvature.hessian import hessian_operator, hessian_vector_product
from jaxlab.curvature.lanczos import lanczos
from jaxlab.likelihoods import Categorical
from jaxlab.objective import Objective, plain

P_ = runpy.run_path(str(pathlib.Path(__file__).parent / "operator_problem.py"))
GOLDEN, golden, flat, unflat = P_["GOLDEN"], P_["golden"], P_["flat"], P_["unflat"]
LOSSES, NAMES, mlp, loss_ce = P_["LOSSES"], P_["NAMES"], P_["mlp"], P_["loss_ce"]
small, loss_small, cut, close = P_["small"], P_["loss_small"], P_["cut"], P_["close"]
MODES = ("forward_over_reverse", "reverse_over_reverse", "reverse_over_forward")
NETS = ("ce", "mse")


def in_golden_order(net, matrix):
    order = P_["order"](net)
    return np.asarray(matrix)[np.ix_(order, order)]


@pytest.mark.parametrize("net", NETS)
def test_the_matrix_is_the_golden_hessian(x64, net):
    params, batch = golden(net)
    operator = hessian_operator(LOSSES[net], params, batch)
    found = in_golden_order(net, full_matrix(operator, params))
    np.testing.assert_allclose(found, GOLDEN[f"{net}/hessian"], atol=1e-12)
    values = GOLDEN[f"{net}/hessian_eigvals"]
    np.testing.assert_allclose(np.linalg.eigvalsh(found), values, atol=1e-12)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("mode", MODES)
def test_products_are_the_golden_ones_in_each_mode(x64, net, mode):
    params, batch = golden(net)
    product = jax.jit(
        lambda v: hessian_vector_product(
            lambda p: LOSSES[net](p, batch), params, v, mode=mode
        )
    )
    operator = hessian_operator(LOSSES[net], params, batch)
    for v, want in zip(
        GOLDEN[f"{net}/probes_normal"], GOLDEN[f"{net}/hvp_probes_normal"]
    ):
        v = unflat(net, v)
        np.testing.assert_allclose(flat(product(v)), want, rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(flat(operator(v)), want, rtol=1e-9, atol=1e-11)
        form = operator.quadratic_form(v)
        np.testing.assert_allclose(form, flat(v) @ want, rtol=1e-9)


@pytest.mark.parametrize("net", NETS)
def test_single_precision(net):
    params, batch = golden(net, jnp.float32)
    operator = hessian_operator(LOSSES[net], params, batch)
    for v, want in zip(
        GOLDEN[f"{net}/probes_normal"], GOLDEN[f"{net}/hvp_probes_normal"]
    ):
        image = operator(unflat(net, v, jnp.float32))
        assert image["w1"].dtype == jnp.float32
        scale = np.abs(want).max()
        np.testing.assert_allclose(flat(image), want, atol=1e-5 * scale)


def test_symmetric_linear_and_scaled_with_the_loss(x64):
    params, batch = golden("ce")
    operator = hessian_operator(loss_ce, params, batch)
    u, v = (unflat("ce", x) for x in GOLDEN["ce/probes_normal"][:2])
    np.testing.assert_allclose(
        flat(u) @ flat(operator(v)), flat(v) @ flat(operator(u)), rtol=1e-12
    )
    mixed = operator(jax.tree.map(lambda x, y: 2 * x - 3 * y, u, v))
    close(
        mixed, jax.tree.map(lambda x, y: 2 * x - 3 * y, operator(u), operator(v)), 1e-12
    )
    five = hessian_operator(lambda p, b: 5 * loss_ce(p, b), params, batch)
    close(five(u), jax.tree.map(lambda x: 5 * x, operator(u)), 1e-12)


def test_an_l2_term_shifts_every_eigenvalue(x64):
    params, batch = golden("mse")

    def loss(p, b):
        squares = sum(jnp.sum(x**2) for x in jax.tree.leaves(p))
        return LOSSES["mse"](p, b) + 0.05 * squares

    values = np.linalg.eigvalsh(
        full_matrix(hessian_operator(loss, params, batch), params)
    )
    want = GOLDEN["mse/hessian_eigvals"] + 0.1
    np.testing.assert_allclose(values, want, rtol=1e-12)


def test_logit_shifts_are_null_directions(x64):
    params, batch = golden("ce")
    operator = hessian_operator(loss_ce, params, batch)
    zeros = jax.tree.map(jnp.zeros_like, params)
    for shift in (
        {**zeros, "b2": jnp.ones(3)},
        {**zeros, "w2": jnp.zeros((6, 3)).at[2].set(1)},
    ):
        assert np.abs(flat(operator(shift))).max() < 1e-14


def test_permuting_hidden_units_leaves_the_spectrum(x64):
    params, batch = golden("ce")
    turn = np.array([3, 0, 5, 1, 4, 2])
    moved = {
        "w1": params["w1"][:, turn],
        "b1": params["b1"][turn],
        "w2": params["w2"][turn],
        "b2": params["b2"],
    }
    matrix = full_matrix(hessian_operator(loss_ce, moved, batch), moved)
    values = np.linalg.eigvalsh(matrix)
    np.testing.assert_allclose(values, GOLDEN["ce/hessian_eigvals"], atol=1e-12)


@pytest.mark.parametrize(
    ("size", "weighted"), [(1, False), (6, False), (6, True), (10, True), (20, False)]
)
def test_microbatches_lists_and_streams_are_one_batch(x64, size, weighted):
    params, batch, v = small()
    batch = (*batch, jnp.linspace(0.0, 2.0, 20)) if weighted else batch
    whole = hessian_operator(loss_small, params, batch)
    want, form = whole(v), whole.quadratic_form(v)
    parts = cut(batch, size)
    host = [tuple(np.asarray(x) for x in part) for part in parts]
    operators = (
        hessian_operator(loss_small, params, batch, microbatch=size),
        hessian_operator(loss_small, params, parts),
        hessian_operator(loss_small, params, parts, microbatch=4),
        hessian_operator(loss_small, params, lambda: iter(host)),
        hessian_operator(loss_small, params, lambda: host, microbatch=4),
    )
    for operator in operators:
        close(operator(v), want, 1e-12)
    for operator in operators[::3]:
        np.testing.assert_allclose(operator.quadratic_form(v), form, rtol=1e-12)


def test_weights_are_those_of_repeated_rows(x64):
    params, (x, y), v = small(rows=12)
    counts = np.array([1, 0, 3] * 4)
    twice = tuple(jnp.repeat(a, counts, axis=0) for a in (x, y))
    want = hessian_operator(loss_small, params, twice)(v)
    batch = (x, y, jnp.asarray(counts, float))
    for microbatch in (None, 5):
        operator = hessian_operator(loss_small, params, batch, microbatch=microbatch)
        close(operator(v), want, 1e-12)


def test_a_part_without_weight_counts_nothing(x64):
    params, (x, y), v = small(rows=12)
    weights = jnp.ones(12).at[:4].set(0)
    rest = hessian_operator(loss_small, params, (x[4:], y[4:]))(v)
    parts = cut((x, y, weights), 4)  # the loss of the first is 0/0
    close(hessian_operator(loss_small, params, parts)(v), rest, 1e-12)
    close(hessian_operator(loss_small, params, lambda: parts)(v), rest, 1e-12)


def test_batches_of_any_tree():
    loss = lambda p, batch: jnp.mean((batch["x"] @ p - batch["y"]) ** 2)
    batch = {"x": jnp.eye(3), "y": jnp.ones(3)}
    for options in ({}, {"microbatch": 2}):
        operator = hessian_operator(loss, jnp.ones(3), batch, **options)
        np.testing.assert_allclose(operator(jnp.ones(3)), [2 / 3] * 3, rtol=1e-6)


def test_without_data():
    operator = hessian_operator(lambda w: jnp.sum(w**3), jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(operator(jnp.ones(2)), [6, 12])
    np.testing.assert_allclose(operator.linearize()(jnp.ones(2)), [6, 12])


@pytest.mark.parametrize("hole", ["a", "b"])
def test_holes_are_zero_and_come_back(x64, hole):
    params, batch, full = small()
    kept = {"a": "b", "b": "a"}[hole]
    v = {**full, hole: optax.MaskedNode()}
    whole = hessian_operator(loss_small, params, batch)
    want = whole({**full, hole: jnp.zeros_like(full[hole])})[kept]
    for operator in (
        whole,
        whole.linearize(),
        hessian_operator(loss_small, params, batch, microbatch=7),
        hessian_operator(loss_small, params, lambda: cut(batch, 6)),
        lambda v: hessian_vector_product(lambda p: loss_small(p, batch), params, v),
    ):
        image = operator(v)
        assert jax.tree.structure(image) == jax.tree.structure(v)
        np.testing.assert_allclose(image[kept], want, atol=1e-13)
    # The vector may hold the parameters themselves.
    own = {**params, hole: optax.MaskedNode()}
    want = whole({**params, hole: jnp.zeros_like(params[hole])})[kept]
    for operator in (whole, whole.linearize()):
        image = jax.jit(lambda operator=operator: operator(own))()
        np.testing.assert_allclose(image[kept], want, atol=1e-13)


def test_whole_subtrees_may_be_masked_and_optax_masked_calls_it():
    params = {"a": {"w": jnp.ones(2), "b": jnp.ones(1)}, "c": jnp.ones(2)}
    loss = lambda p: jnp.sum(p["a"]["w"] ** 2) * p["a"]["b"][0] + jnp.sum(p["c"] ** 4)
    operator = hessian_operator(loss, params)
    image = operator({"a": optax.MaskedNode(), "c": jnp.ones(2)})
    np.testing.assert_allclose(image["c"], [12, 12])

    def update(updates, state, params=None):
        return operator(updates), state

    link = optax.GradientTransformation(lambda params: (), update)
    masked = optax.masked(link, {"a": False, "c": True})
    out, _ = masked.update(params, masked.init(params), params)
    np.testing.assert_allclose(out["c"], [12, 12])
    np.testing.assert_array_equal(out["a"]["w"], [1, 1])


def test_a_program_is_traced_once_when_params_and_data_change():
    traces = []

    def loss(params, batch):
        traces.append(None)
        return loss_small(params, batch)

    params, batch, v = small(dtype=jnp.float32)
    run = jax.jit(lambda operator, v: full_matrix(operator, v))
    counts = []
    for scale in (1.0, 0.5, 2.0):
        moved = jax.tree.map(lambda x, s=scale: s * x, params)
        data = (scale * batch[0], batch[1])
        for options in ({}, {"microbatch": 6}):
            operator = hessian_operator(loss, moved, data, **options)
            run(operator, v)
            operator(v)
            operator.quadratic_form(v)
        lanczos(operator, v, order=3, driver="host")
        hessian_operator(loss, moved, lambda d=data: cut(d, 6))(v)
        counts.append(len(traces))
    assert counts[0] == counts[1] == counts[2]
    assert run._cache_size() == 2


def test_vmap_over_vectors_and_gradients_through_products(x64):
    params, batch, v = small()
    operator = hessian_operator(loss_small, params, batch, microbatch=6)
    two = jax.tree.map(lambda x: jnp.stack([x, -2 * x]), v)
    image = jax.vmap(operator)(two)
    close(jax.tree.map(lambda x: x[0], image), operator(v), 1e-13)

    def sharpness(params):
        return hessian_operator(loss_small, params, batch).quadratic_form(v)

    slope = jax.grad(sharpness)(params)
    along = sum(jnp.vdot(slope[name], v[name]) for name in v)
    at = lambda t: sharpness(jax.tree.map(lambda p, d: p + t * d, params, v))
    np.testing.assert_allclose(along, (at(1e-6) - at(-1e-6)) / 2e-6, rtol=1e-6)


def test_lanczos_drives_a_stream(x64):
    params, batch, v = small()
    results = [
        lanczos(hessian_operator(loss_small, params, batches), v, order=5)
        for batches in (batch, lambda: cut(batch, 6))
    ]
    np.testing.assert_allclose(results[1].alpha, results[0].alpha, atol=1e-12)
    np.testing.assert_allclose(results[1].beta, results[0].beta, atol=1e-12)


def test_a_linearised_operator_crosses_jit():
    params, batch, v = small(dtype=jnp.float32)
    apply = jax.jit(lambda operator, v: operator(v))
    for scale in (1.0, 0.5):
        moved = jax.tree.map(lambda x, s=scale: s * x, params)
        operator = hessian_operator(loss_small, moved, batch)
        close(apply(linearized(operator), v), operator(v), 1e-5)
    assert apply._cache_size() == 1


def test_equal_objectives_share_a_trace(x64):
    params, batch = golden("ce")
    v = unflat("ce", GOLDEN["ce/probes_normal"][0])
    apply = jax.jit(lambda operator, v: operator(v))
    for _ in range(2):
        loss, _ = functions_of(Objective(plain(mlp), Categorical()))
        found = apply(hessian_operator(loss, params, batch), v)
    assert apply._cache_size() == 1
    np.testing.assert_allclose(flat(found), GOLDEN["ce/hvp_probes_normal"][0], 1e-9)


def test_half_precision_params_sum_in_single():
    params, batch, v = small(dtype=jnp.float32)
    want = hessian_operator(loss_small, params, batch)(v)
    half = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
    many = [half(batch)] * 100
    single = {}
    for name, batches in {"one": many[0], "list": many, "host": lambda: many}.items():
        operator = hessian_operator(loss_small, half(params), batches)
        image = operator(half(v))
        assert {x.dtype for x in image.values()} == {jnp.dtype(jnp.bfloat16)}
        scale = max(np.abs(x).max() for x in want.values())
        close(jax.tree.map(np.float32, image), want, 0.05 * scale)
        single[name] = operator(v)
        assert single[name]["a"].dtype == jnp.float32
    # A hundred equal parts: sums in bfloat16 would stall.
    close(single["list"], single["one"], 0.02 * scale)
    close(single["host"], single["list"], 1e-4 * scale)


def test_sharded_params_and_data_give_the_same():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    draw = np.random.default_rng(0).normal
    array = lambda *shape: jnp.asarray(draw(size=shape), jnp.float32)
    params, v = ({"a": array(8, 16), "b": array(16)} for _ in range(2))
    batch = array(48, 8), array(48)
    want = hessian_operator(loss_small, params, batch)(v)
    rows = NamedSharding(mesh, P("d"))
    params, v, batch = jax.device_put((params, v, batch), rows)
    micro = hessian_operator(loss_small, params, batch, microbatch=16)
    assert micro.data.stack[0].sharding.spec[1] == "d"  # each part on every device
    for operator in (
        hessian_operator(loss_small, params, batch),
        micro,
        hessian_operator(loss_small, params, batch, microbatch=40),
        hessian_operator(loss_small, params, cut(batch, 24)),
        hessian_operator(loss_small, params, lambda: cut(batch, 24)),
    ):
        found = operator(v)
        for name, leaf in want.items():
            scale = np.abs(leaf).max()
            np.testing.assert_allclose(found[name], leaf, atol=1e-5 * scale)


def test_a_stream_is_read_two_batches_ahead_at_most(monkeypatch):
    """A batch is asked for once the sums before the last one are there."""
    finished = []

    class Token:
        def __init__(self, number):
            self.number = number

        def block_until_ready(self):
            finished.append(self.number)

    numbers = iter(range(6))
    add = _partwise._added

    def watched(*args, **options):
        sums, total, _ = add(*args, **options)
        return sums, total, Token(next(numbers))

    monkeypatch.setattr(_partwise, "_added", watched)
    asked = []

    def stream():
        for i in range(6):
            asked.append((i, len(finished)))
            yield jnp.ones((4, 2)), jnp.ones(4)

    loss = lambda w, b: jnp.mean((b[0] @ w - b[1]) ** 2)
    operator = hessian_operator(loss, jnp.ones(2), stream)
    np.testing.assert_allclose(operator(jnp.ones(2)), [4, 4])
    assert asked == [(0, 0), (1, 0), (2, 1), (3, 2), (4, 3), (5, 4)]


class _Linen(linen.Module):
    @linen.compact
    def __call__(self, x):
        hidden = jnp.tanh(linen.Dense(4)(x))
        return linen.Dense(2)(hidden)


class _Nnx(nnx.Module):
    def __init__(self):
        self.one = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
        self.two = nnx.Linear(4, 2, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.two(jnp.tanh(self.one(x)))


class _Equinox(eqx.Module):
    one: eqx.nn.Linear
    two: eqx.nn.Linear

    def __call__(self, x):
        return self.two(jnp.tanh(self.one(x)))


def models(params):
    """Gives apply_fn and params of one network in four forms."""
    w1, b1, w2, b2 = (params[name] for name in NAMES)
    layer = lambda w, b: {"kernel": w, "bias": b}
    linen_params = {"params": {"Dense_0": layer(w1, b1), "Dense_1": layer(w2, b2)}}
    module = _Nnx()
    module.one.kernel[...], module.one.bias[...] = w1, b1
    module.two.kernel[...], module.two.bias[...] = w2, b2
    graph, state = nnx.split(module, nnx.Param)
    keys = jax.random.split(jax.random.key(0))
    net = _Equinox(eqx.nn.Linear(3, 4, key=keys[0]), eqx.nn.Linear(4, 2, key=keys[1]))
    where = lambda m: (m.one.weight, m.one.bias, m.two.weight, m.two.bias)
    net = eqx.tree_at(where, net, (w1.T, b1, w2.T, b2))
    arrays, static = eqx.partition(net, eqx.is_inexact_array)
    return {
        "dict": (mlp, params),
        "linen": (_Linen().apply, linen_params),
        "nnx": (lambda p, x: nnx.merge(graph, p)(x), state),
        "equinox": (lambda p, x: jax.vmap(eqx.combine(p, static))(x), arrays),
    }


@pytest.mark.parametrize("form", ["linen", "nnx", "equinox"])
def test_any_library_of_modules_gives_the_same(form):
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "w1": jax.random.normal(keys[0], (3, 4)),
        "b1": jnp.ones(4),
        "w2": jax.random.normal(keys[1], (4, 2)),
        "b2": jnp.ones(2),
    }
    x, y = jax.random.normal(keys[2], (7, 3)), jnp.array([0, 1, 0, 1, 1, 0, 1])
    forms = models(params)
    found = {}
    for name in ("dict", form):
        apply_fn, theta = forms[name]
        loss = lambda p, b, f=apply_fn: Categorical().nll(f(p, b[0]), b[1])
        operator = hessian_operator(loss, theta, (x, y))
        image = operator(theta)
        assert jax.tree.structure(image) == jax.tree.structure(theta)
        matrix = np.asarray(full_matrix(operator, theta))
        found[name] = np.linalg.eigvalsh(matrix), operator.quadratic_form(theta)
    np.testing.assert_allclose(found[form][0], found["dict"][0], atol=1e-5)
    np.testing.assert_allclose(found[form][1], found["dict"][1], rtol=1e-4)
