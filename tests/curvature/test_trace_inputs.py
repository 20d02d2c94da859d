"""What the estimators of traces and norms refuse, in their own words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.curvature.trace import frobenius_norm, trace

pytestmark = pytest.mark.untyped

KEY = jax.random.key(0)
operator = jax.tree_util.Partial(jnp.matmul, jnp.diag(jnp.arange(1.0, 10.0)))
like = jnp.ones(9)


def test_methods_have_names():
    with pytest.raises(ValueError, match=r'"xtrace" or "xnystrace", got \'xdiag\''):
        trace(KEY, operator, like, num_matvecs=4, method="xdiag")


@pytest.mark.parametrize("function", [trace, frobenius_norm])
@pytest.mark.parametrize("count", [0, -1, 2.0, True])
def test_counts_are_positive_integers(function, count):
    message = f"{function.__name__}: num_matvecs must be an integer >= 1, got {count}"
    with pytest.raises(ValueError, match=message):
        function(KEY, operator, like, num_matvecs=count)
    with pytest.raises(ValueError, match="probes_at_once must be an integer >= 1"):
        function(KEY, operator, like, num_matvecs=2, probes_at_once=0)


@pytest.mark.parametrize(("method", "least"), [("hutch++", 3), ("xtrace", 2)])
def test_sketches_need_a_vector(method, least):
    message = (
        rf"at least {least} for .*{'hutch' if least == 3 else 'xtrace'}.* or 9 for"
    )
    with pytest.raises(ValueError, match=message):
        trace(KEY, operator, like, num_matvecs=least - 1, method=method)


def test_vectors_above_the_limit():
    message = (
        r"trace: the vectors take 540 bytes \(5 bases of 3 x 9 x 4 bytes\), more than "
        r'memory_limit=100\. .* method="hutchinson"'
    )
    options = {"num_matvecs": 6, "memory_limit": 100}
    with pytest.raises(ValueError, match=message):
        trace(KEY, operator, like, method="xtrace", **options)
    trace(KEY, operator, like, method="hutchinson", **options)
    big = jax.ShapeDtypeStruct((10**7,), jnp.float32)
    with pytest.raises(ValueError, match="take 5,000,000,000 bytes"):
        trace(KEY, lambda v: v, big, num_matvecs=50, method="xtrace")


def test_xnystrace_takes_no_indefinite_and_no_lopsided_operator():
    options = {"num_matvecs": 6, "method": "xnystrace"}
    minus = jax.tree_util.Partial(jnp.multiply, -1.0)
    with pytest.raises(
        ValueError, match=r"positive semi-definite .* method=\"xtrace\""
    ):
        trace(KEY, minus, like, **options)
    with pytest.raises(ValueError, match=r"must be symmetric for method=\"xnystrace\""):
        trace(KEY, jnp.cumsum, like, **options)
    trace(KEY, minus, like, check_symmetric=False, **options)
    found, _ = trace(KEY, jnp.cumsum, like, num_matvecs=9, method="xtrace")
    assert float(found) == 9


def test_operators_keep_the_tree():
    for method in ("hutchinson", "hutch++", "xtrace", "xnystrace"):
        with pytest.raises(ValueError, match="operator must give a tree like the one"):
            trace(KEY, lambda v: v[:-1], like, num_matvecs=6, method=method)
    with pytest.raises(ValueError, match="frobenius_norm: the operator must give"):
        frobenius_norm(KEY, lambda v: v[None], like, num_matvecs=6)


class Square:
    def __call__(self, v):
        return v

    def quadratic_form(self, v):
        return v**2


def test_forms_are_scalars():
    jax.tree_util.register_static(Square)
    with pytest.raises(
        ValueError, match=r"quadratic_form must give a scalar, .*\(9,\)"
    ):
        trace(KEY, Square(), like, num_matvecs=2)


def test_leaves_are_real_and_there_are_some():
    for bad in (jnp.arange(3), jnp.ones(3, jnp.complex64), {}):
        with pytest.raises(ValueError, match=r"trace: .*like"):
            trace(KEY, operator, bad, num_matvecs=2)


def test_host_operators_do_not_run_under_jit():
    class Streamed:
        host = True

        def __call__(self, v):
            return v

    with pytest.raises(ValueError, match="streams its data from the host"):
        jax.jit(lambda key: trace(key, Streamed(), like, num_matvecs=2))(KEY)
    options = {"num_matvecs": 2, "driver": "host"}
    with pytest.raises(ValueError, match='driver="host" loops in Python'):
        jax.jit(lambda key: trace(key, operator, like, **options))(KEY)


def test_numpy_inputs():
    matrix = np.diag(np.arange(1.0, 10.0, dtype=np.float32))
    numpy = jax.tree_util.Partial(jnp.matmul, matrix)
    found, _ = trace(KEY, numpy, np.ones(9, np.float32), num_matvecs=3)
    assert float(found) == 45
