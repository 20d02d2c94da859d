"""A report against golden spectra, exact sums, and the products that it counts."""

import dataclasses
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlab.curvature.report import Products, SpectrumReport, spectrum_report
from jaxlab.likelihoods import Categorical, Gaussian
from jaxlab.objective import Objective, plain

P_ = runpy.run_path(str(pathlib.Path(__file__).parent / "operator_problem.py"))
GOLDEN, LIKELIHOODS, golden, mlp = (
    P_[name] for name in ("GOLDEN", "LIKELIHOODS", "golden", "mlp")
)
KEY = jax.random.key(0)
SIZES = {"k": 2, "order": 6, "num_probes": 3, "tol": 1e-4}
ROWS = 24


def outputs(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


OBJECTIVE = Objective(plain(outputs), Categorical())


def problem(seed=0):
    draw = np.random.default_rng(seed).normal
    params = {
        "a": jnp.asarray(draw(size=(3, 3)), jnp.float32),
        "b": jnp.asarray(draw(size=(3, 2)), jnp.float32),
    }
    x = jnp.asarray(draw(size=(ROWS, 3)), jnp.float32)
    return params, (x, jnp.arange(ROWS) % 2)


def exact(params, batch):
    """Gives the Hessian and the Gauss-Newton matrix, formed in float64."""
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
        x, y, *w = batch
        x = jnp.asarray(x, jnp.float64)
        vector, back = jax.flatten_util.ravel_pytree(params)
        w = jnp.asarray(w[0] if w else jnp.ones(len(x)), jnp.float64)
        loss = lambda v: Categorical().nll(outputs(back(v), x), y, weights=w)
        jacobian = jax.jacobian(lambda v: outputs(back(v), x))(vector)
        p = jax.nn.softmax(outputs(back(vector), x))
        bend = jax.vmap(lambda p: jnp.diag(p) - jnp.outer(p, p))(p)
        ggn = jnp.einsum("nci,ncd,ndj,n->ij", jacobian, bend, jacobian, w / w.sum())
        gradient = jnp.linalg.norm(jax.grad(loss)(vector))
        hessian = jax.hessian(loss)(vector)
        return map(np.asarray, (loss(vector), gradient, hessian, ggn))


def report(params, data, key=KEY, **options):
    return spectrum_report(key, OBJECTIVE, params, data, **(SIZES | options))


def same(found, wanted, tol=2e-5):
    for name in ("loss", "gradient_norm", "trace", "log_determinant"):
        one, other = getattr(found, name), getattr(wanted, name)
        np.testing.assert_allclose(one, other, rtol=tol, atol=tol, err_msg=name)
    one, other = found.eigenpairs.values, wanted.eigenpairs.values
    np.testing.assert_allclose(one, other, rtol=tol)
    one, other = found.density.nodes, wanted.density.nodes
    np.testing.assert_allclose(one, other, rtol=50 * tol, atol=50 * tol)


@pytest.fixture(scope="module")
def base():
    params, batch = problem()
    return params, batch, report(params, batch)


def test_golden_hessian(x64):
    params, batch = golden("ce")
    objective = Objective(plain(mlp), LIKELIHOODS["ce"])
    found = spectrum_report(KEY, objective, params, batch, k=5, order=51, tol=1e-10)
    of = lambda name: GOLDEN[f"ce/{name}"]
    top = of("hessian_eigvals")[::-1][:5]
    np.testing.assert_allclose(found.eigenpairs.values, top, rtol=1e-9)
    row = lambda i: jax.tree.map(lambda x: x[i], found.eigenpairs.vectors)
    vectors = [P_["flat"](row(i)) for i in range(3)]
    cosines = np.abs(np.sum(np.stack(vectors, 1) * of("hessian_top3_eigvecs"), axis=0))
    np.testing.assert_allclose(cosines, 1, atol=1e-9)
    np.testing.assert_allclose(found.loss, of("loss"), rtol=1e-12)
    np.testing.assert_allclose(found.gradient_norm, np.linalg.norm(of("grad")))
    assert abs(found.trace - of("hessian_trace")) < 5 * found.trace_error
    assert found.trace_error < 0.1 * of("hessian_trace")
    # The Hessian has negative eigenvalues: this is the Gauss-Newton matrix.
    wanted = of("ggn_logdet_damped")
    assert abs(found.log_determinant - wanted) < 5 * found.log_determinant_error
    assert found.log_determinant_error < 0.05 * abs(wanted)
    assert found.products[1:] == (4 * 51, 4 * 51)
    assert found.num_products == found.eigenpairs.num_products + 8 * 51
    assert found.outliers.tolist()[0]
    assert found.dimension == 51


def test_all_eigenpairs_leave_nothing_to_chance(x64):
    params, batch = golden("mse")
    objective = Objective(plain(mlp), LIKELIHOODS["mse"])
    found = spectrum_report(
        KEY, objective, params, batch, matrix="ggn", k=99, order=99, num_probes=2
    )
    of = lambda name: GOLDEN[f"mse/{name}"]
    values = of("ggn_eigvals")[::-1]
    np.testing.assert_allclose(found.eigenpairs.values, values, atol=1e-9)
    np.testing.assert_allclose(found.trace, values.sum(), rtol=1e-9)
    wanted = of("ggn_logdet_damped")
    np.testing.assert_allclose(found.log_determinant, wanted, rtol=1e-9)
    np.testing.assert_allclose(found.trace_error, 0, atol=1e-9)
    np.testing.assert_allclose(found.log_determinant_error, 0, atol=1e-7)
    assert found.products == (found.eigenpairs.num_products, 2 * 32, 0)


@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
def test_estimates_are_unbiased_and_their_errors_true(matrix):
    params, batch = problem()
    _, _, hessian, ggn = exact(params, batch)
    sizes = {"order": 15, "num_probes": 6, "k": 2, "matrix": matrix}

    names = ["trace", "trace_error", "log_determinant", "log_determinant_error"]

    @jax.jit
    def all_of(keys):
        def one(key):
            found = report(params, batch, key, **sizes)
            return {name: getattr(found, name) for name in names}

        return jax.lax.map(one, keys)

    found = jax.device_get(all_of(jax.random.split(KEY, 300)))
    of = hessian if matrix == "hessian" else ggn
    damped = np.linalg.slogdet(ggn + 0.01 * np.eye(15))[1]
    plain = np.sqrt(2 * (np.sum(of**2) - np.sum(np.diag(of) ** 2)) / 6)
    for name, wanted in (("trace", np.trace(of)), ("log_determinant", damped)):
        estimates, errors = found[name].astype(float), found[f"{name}_error"]
        spread = estimates.std(ddof=1)
        # The bias that the docstring tells of is far smaller than this.
        assert abs(estimates.mean() - wanted) < 4 * spread / 300**0.5
        assert 0.8 < np.sqrt(np.mean(errors**2)) / spread < 1.25
        if name == "trace":
            assert spread < 0.7 * plain


def test_density_and_trace_share_their_products(base):
    params, batch, found = base
    nodes, weights = found.density.nodes, found.density.weights
    assert nodes.shape == (3, 6)
    plain = 15 * np.mean(np.sum(np.asarray(nodes * weights), axis=1))
    # The control variate has mean 0 and is no larger than what it removes.
    assert abs(float(found.trace) - plain) < 5 * float(found.trace_error) + plain
    loss, norm, hessian, _ = exact(params, batch)
    np.testing.assert_allclose(found.loss, loss, rtol=1e-5)
    np.testing.assert_allclose(found.gradient_norm, norm, rtol=1e-5)
    top = np.linalg.eigvalsh(hessian)[::-1][:2]
    np.testing.assert_allclose(found.eigenpairs.values, top, rtol=1e-5)
    assert found.products == (found.eigenpairs.num_products, 18, 18)
    assert int(found.num_products) == sum(map(int, found.products))


def test_a_stream_counts_one_pass_a_product(base):
    params, batch, wanted = base
    passes = []

    def stream():
        passes.append(1)
        return iter(P_["cut"](batch, 10))

    found = report(params, stream)
    same(found, wanted)
    assert len(passes) == int(found.num_products) + 1  # and the gradient
    assert found.products[1:] == (18, 18)


def test_a_recurrence_that_ends_early_is_counted_so():
    # Two distinct eigenvalues: two steps a probe, and the host stops there.
    objective = Objective(plain(lambda w, x: x @ w), Gaussian())
    x = 2.0 * jnp.diag(jnp.array([1.0, 1.0, 2.0, 2.0]))
    data, passes = (x, jnp.zeros((4, 1))), []

    def stream():
        passes.append(1)
        yield data

    options = {"k": 1, "order": 4, "num_probes": 3, "matrix": "ggn"}
    found = spectrum_report(KEY, objective, jnp.ones((4, 1)), stream, **options)
    assert int(found.products.quadrature) == 6
    assert len(passes) == int(found.num_products) + 1
    assert abs(float(found.trace) - 10) < 5 * float(found.trace_error)


@pytest.mark.parametrize("form", ["microbatch", "weighted list"])
def test_forms_of_data_agree(base, form):
    params, batch, wanted = base
    if form == "microbatch":
        same(report(params, batch, microbatch=10), wanted)
        return
    x, y = batch
    padded = jnp.concatenate([x, 9 * x[:4]]), jnp.concatenate([y, y[:4]])
    weights = jnp.concatenate([jnp.ones(ROWS), jnp.zeros(4)])
    same(report(params, P_["cut"]((*padded, weights), 10)), wanted)


def test_eight_devices_equal_one(base):
    params, batch, wanted = base
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    put = lambda tree, spec: jax.device_put(tree, NamedSharding(mesh, spec))
    same(report(put(params, P()), put(batch, P("d"))), wanted)


def test_under_jit_and_one_trace_for_new_params(base):
    params, batch, wanted = base
    traces = []

    def counted(params, x):
        traces.append(1)
        return outputs(params, x)

    objective = Objective(plain(counted), Categorical())
    once = lambda params, batch: spectrum_report(KEY, objective, params, batch, **SIZES)
    same(once(params, batch), wanted)
    before = len(traces)
    other = once(*problem(1))
    assert len(traces) == before
    assert abs(float(other.trace - wanted.trace)) > 1e-3
    compiled = jax.jit(once)
    same(compiled(params, batch), wanted)
    before = len(traces)
    same(compiled(*problem(1)), other)
    assert len(traces) == before


def test_the_model_is_evaluated_with_its_state():
    params, batch = problem()

    def apply_fn(params, state, x, *, key, train):
        assert (train, key) == (False, None)
        return outputs(params, x) * state["scale"], {"scale": state["scale"] + 1}

    objective = Objective(apply_fn, Gaussian())
    x = batch[0]
    found = [
        spectrum_report(
            KEY,
            objective,
            params,
            (x, jnp.zeros((ROWS, 2))),
            state={"scale": jnp.float32(scale)},
            damping=None,
            **SIZES,
        )
        for scale in (1.0, 2.0)
    ]
    # Targets of zero: the loss is quadratic in the scale, up to a constant.
    np.testing.assert_allclose(
        found[1].eigenpairs.values, 4 * found[0].eigenpairs.values, rtol=1e-4
    )
    np.testing.assert_allclose(found[1].trace, 4 * found[0].trace, rtol=1e-4)
    assert (found[0].log_determinant, found[0].damping) == (None, None)
    assert int(found[0].products.log_determinant) == 0
    assert "log det" not in str(found[0])


def test_earlier_vectors_save_products(base):
    params, batch, cold = base
    near = jax.tree.map(lambda x: x * 1.001, params)
    options = {"tol": 1e-2, "damping": None}
    afresh = report(near, batch, **options)
    warm = report(near, batch, start=cold.eigenpairs.vectors, **options)
    assert int(warm.products.eigenpairs) < int(afresh.products.eigenpairs)
    one, other = warm.eigenpairs.values, afresh.eigenpairs.values
    np.testing.assert_allclose(one, other, rtol=1e-3)


def test_bfloat16_parameters_run_in_float32(base):
    params, batch, wanted = base
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    x, y = batch
    options = {"check_symmetric": False, "damping": None}
    found = report(half, (x.astype(jnp.bfloat16), y), **options)
    assert {x.dtype for x in jax.tree.leaves(found)} == {
        jnp.dtype(jnp.float32),
        jnp.dtype(jnp.int32),
    }
    np.testing.assert_allclose(found.trace, wanted.trace, rtol=0.1)


def test_summary_is_a_short_table(base):
    _, _, found = base
    lines = str(found).splitlines()
    assert lines[0] == "Hessian, 15 parameters"
    rows = dict(line.split("  ", 1) for line in lines[1:-2])
    assert float(rows["loss"]) == pytest.approx(float(found.loss), rel=1e-5)
    value, error = map(float, rows["trace"].split("+/-"))
    assert abs(value - float(found.trace)) < float(found.trace_error)
    assert error == pytest.approx(float(found.trace_error), rel=0.06)
    assert "log det(G + 0.01 I)" in rows
    assert str(int(found.num_products)) in rows["products"]
    assert lines[-2].split()[0] == "1"
    assert "+/-" in lines[-1]
    assert len(lines) == 10
    assert max(map(len, lines)) <= 88
    assert repr(found) == "SpectrumReport(matrix='hessian', dimension=15)"


def test_numbers_are_cut_where_they_are_not_known(base):
    _, _, found = base
    shown = lambda value, error: str(
        dataclasses.replace(
            found, trace=jnp.float32(value), trace_error=jnp.float32(error)
        )
    )
    assert "5.46 +/- 0.23\n" in shown(5.4567, 0.234)
    assert "-214.1 +/- 2\n" in shown(-214.12, 2.0)
    assert "1.51e+06 +/- 2e+05\n" in shown(1.512e6, 2e5)
    assert "0.5 +/- nan\n" in shown(0.5, jnp.nan)
    assert "0 +/- 0\n" in shown(0.0, 0.0)


def test_is_a_pytree(base):
    _, _, found = base
    leaves, structure = jax.tree.flatten(found)
    again = jax.tree.unflatten(structure, leaves)
    assert isinstance(again, SpectrumReport)
    assert isinstance(again.products, Products)
    assert str(again) == str(found)
