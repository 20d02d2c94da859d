"""What hessian products and operators refuse, and NumPy inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.curvature.hessian import hessian_operator, hessian_vector_product

pytestmark = pytest.mark.untyped

X, Y, W = np.eye(4, 2, dtype=np.float32), np.ones(4, np.float32), np.ones(2, np.float32)


class Loader:
    """Iterable, but neither a tree nor callable."""

    def __iter__(self):
        yield X, Y


def loss(w, batch):
    return jnp.mean((batch[0] @ w - batch[1]) ** 2)


def made(batches=(X, Y), params=W, **options):
    return hessian_operator(loss, params, batches, **options)


def test_numpy_params_data_and_vectors_are_fine():
    for batches in ((X, Y), [(X, Y)], lambda: [(X, Y)]):
        np.testing.assert_allclose(made(batches)(np.ones(2, np.float32)), [0.5, 0.5])
    product = hessian_vector_product(lambda w: jnp.sum(w**3), W, W)
    np.testing.assert_allclose(product, [6, 6])


@pytest.mark.parametrize("dtype", [np.int32, np.complex64])
def test_params_that_are_not_real(dtype):
    for call in (
        lambda p: made(params=p),
        lambda p: hessian_vector_product(lambda p: 0.0, p, p),
    ):
        with pytest.raises(
            ValueError, match=r"leaves of params must be real .*\['a'\]"
        ):
            call({"a": np.ones(2, dtype)})
    with pytest.raises(ValueError, match="params has no entries"):
        made(params={"a": optax.MaskedNode()})


def test_vectors_unlike_params():
    operator = made()
    params = {"a": jnp.ones(2), "b": {"c": jnp.ones(2)}}
    other = hessian_operator(lambda p: jnp.sum(p["a"] ** 2), params)
    stream = made(lambda: [(X, Y)])
    for wrong in (
        lambda: operator({"w": jnp.ones(2)}),
        lambda: operator.linearize()({"w": jnp.ones(2)}),
        lambda: stream({"w": jnp.ones(2)}),
        lambda: other({"a": optax.MaskedNode(), "d": jnp.ones(2)}),
        lambda: other({"a": jnp.ones(2), "b": jnp.ones(2)}),
    ):
        with pytest.raises(ValueError, match="v must be a tree like params"):
            wrong()
    with pytest.raises(ValueError, match=r"v must have the shapes .* \(3,\) instead"):
        operator(jnp.ones(3))
    with pytest.raises(ValueError, match=r"leaves of v must be real .* int32 at v"):
        operator(jnp.ones(2, jnp.int32))
    with pytest.raises(ValueError, match="vector must have the shapes of params"):
        hessian_vector_product(lambda w: jnp.sum(w), W, jnp.ones(3))


def test_unknown_modes():
    with pytest.raises(ValueError, match="mode must be one of forward_over_reverse"):
        hessian_vector_product(lambda w: jnp.sum(w), W, W, mode="reverse")


def test_losses_that_are_no_scalar():
    v = jnp.ones(2)
    for wrong in (lambda w: w, lambda w: (jnp.sum(w), {"aux": w})):
        with pytest.raises(ValueError, match="loss_fn must return a scalar"):
            hessian_vector_product(wrong, W, v)
    with pytest.raises(ValueError, match="loss_fn must return a scalar"):
        hessian_operator(lambda w, b: b[0] @ w, W, (X, Y))(v)


@pytest.mark.parametrize("microbatch", [0, -1, 2.0, True, "4"])
def test_microbatch_must_be_a_number_of_rows(microbatch):
    with pytest.raises(ValueError, match="microbatch must be an integer >= 1 or None"):
        made(microbatch=microbatch)


def test_microbatch_needs_data():
    with pytest.raises(ValueError, match="there are none"):
        hessian_operator(lambda w: jnp.sum(w), W, microbatch=2)


def test_empty_data():
    empty = (X[:0], Y[:0])
    for batches in (empty, [empty]):
        with pytest.raises(ValueError, match="at least one; got leading axes"):
            made(batches)
    with pytest.raises(ValueError, match="batches must not be empty"):
        made([])
    with pytest.raises(ValueError, match="gave no batch"):
        made(lambda: [])(jnp.ones(2))
    with pytest.raises(ValueError, match="at least one; got leading axes"):
        made(lambda: [empty])(jnp.ones(2))


def test_a_stream_that_is_used_up():
    once = iter([(X, Y)])
    operator = made(lambda: once)
    operator(jnp.ones(2))
    with pytest.raises(ValueError, match="a fresh iterable each time"):
        operator(jnp.ones(2))


def test_batches_of_the_wrong_form():
    with pytest.raises(ValueError, match=r"\(inputs, targets, weights\), got a tuple"):
        made((X,))
    with pytest.raises(ValueError, match="a single batch is a tuple"):
        made([X, Y])
    with pytest.raises(ValueError, match="one row per example"):
        made((X, Y[:3]))
    with pytest.raises(ValueError, match="one row per example"):
        made((X, np.float32(3.0)))
    for wrong in (iter([(X, Y)]), Loader(), "data", ("x", "y")):
        with pytest.raises(ValueError, match="Wrap a data loader: batches=lambda: l"):
            made(wrong)
    with pytest.raises(ValueError, match=r"same number of rows.*got \[2, 4\]"):
        made([(X[:2], Y[:2]), (X, Y)])
    with pytest.raises(ValueError, match="the same shape of a row"):
        made([(X, Y), (X[:, :1], Y)])
    with pytest.raises(ValueError, match="the same shape of a row"):
        made(lambda: [(X, Y), (X, Y, Y)])(jnp.ones(2))


def test_host_operators_refuse_to_run_under_jit():
    operator = made(lambda: [(X, Y)])
    assert operator.host
    for call in (
        jax.jit(lambda v: operator(v)),
        jax.jit(operator.quadratic_form),
        jax.vmap(lambda v: operator(v[0])[None]),
    ):
        with pytest.raises(ValueError, match="streams its data from the host and cann"):
            call(jnp.ones((1, 2)) if call.__name__ == "<lambda>" else jnp.ones(2))
