"""Convolutions as matrix products: the same numbers, and who then drives the loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from jaxlab.curvature._convolutions import ByMatmuls, by_matmuls, driven
from jaxlab.curvature._vectors import space_of
from jaxlab.curvature.gauss_newton import ggn_operator
from jaxlab.curvature.hessian import hessian_operator
from jaxlab.curvature.lanczos import lanczos, ritz_vectors
from jaxlab.curvature.wrappers import damped_operator
from jaxlab.likelihoods import Categorical

CASES = {
    "strided": {"window_strides": (2, 1), "padding": "SAME"},
    "valid": {"window_strides": (1, 3), "padding": "VALID"},
    "uneven padding": {"window_strides": (1, 1), "padding": ((0, 2), (3, -1))},
    "dilated kernel": {
        "window_strides": (2, 1),
        "padding": "SAME",
        "rhs_dilation": (1, 2),
    },
    "channels last": {
        "window_strides": (2, 2),
        "padding": "SAME",
        "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
    },
    "turned": {
        "window_strides": (1, 2),
        "padding": "SAME",
        "dimension_numbers": ("CWHN", "IOHW", "HNCW"),
    },
}
LEFT = {
    "grouped": {"padding": "SAME", "feature_group_count": 2},
    "dilated input": {"padding": ((1, 1), (0, 1)), "lhs_dilation": (2, 1)},
    "large kernel": {"padding": "SAME"},
}


def shapes(options, groups=1, kernel=(3, 2)):
    """Gives arrays of three examples, 4 channels, 7 x 6 cells, and a kernel."""
    lhs, rhs, _ = options.get("dimension_numbers", ("NCHW", "OIHW", "NCHW"))
    x = {"N": 3, "C": 4, "H": 7, "W": 6}
    k = {"O": 2, "I": 4 // groups, "H": kernel[0], "W": kernel[1]}
    keys = jax.random.split(jax.random.key(0))
    return (
        jax.random.normal(keys[0], [x[axis] for axis in lhs]),
        jax.random.normal(keys[1], [k[axis] for axis in rhs]),
    )


def mentions(function, *arguments):
    return "conv_general_dilated" in str(jax.make_jaxpr(function)(*arguments))


@pytest.mark.parametrize("name", CASES)
def test_products_of_patches_are_the_convolution(name):
    x, kernel = shapes(CASES[name])
    convolve = functools.partial(jax.lax.conv_general_dilated, **CASES[name])
    again = ByMatmuls(Partial(convolve))
    assert mentions(convolve, x, kernel)
    assert not mentions(again, x, kernel)
    expected = convolve(x, kernel)
    np.testing.assert_allclose(again(x, kernel), expected, rtol=1e-5, atol=1e-5)
    weights = jax.random.normal(jax.random.key(1), expected.shape)
    total = lambda f: lambda *arrays: jnp.sum(weights * f(*arrays))
    slopes = lambda f: jax.jit(jax.grad(total(f), (0, 1)))(x, kernel)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, slopes(again), slopes(convolve))


@pytest.mark.parametrize("name", LEFT)
def test_what_cannot_be_taken_apart_is_left(name):
    options = {"window_strides": (1, 1), **LEFT[name]}
    kernel = (6, 5) if name == "large kernel" else (3, 2)
    x, kernel = shapes(options, options.get("feature_group_count", 1), kernel)
    convolve = functools.partial(jax.lax.conv_general_dilated, **options)
    again = ByMatmuls(Partial(convolve))
    assert mentions(again, x, kernel)
    np.testing.assert_array_equal(again(x, kernel), convolve(x, kernel))


def test_the_rest_of_a_program_keeps_its_meaning():
    """Custom derivatives, loops, branches, nested jit, constants, several results."""
    x, kernel = shapes({})
    table = jnp.arange(3.0)

    def function(params, data):
        first = jax.jit(lambda k: jax.lax.conv(data, k, (1, 1), "SAME"))(params["k"])
        first = jax.nn.relu(first)  # a derivative of its own
        loop = jax.lax.fori_loop(0, 2, lambda i, v: v * table[i + 1], first)
        chosen = jax.lax.cond(jnp.sum(loop) > 0, jnp.sin, jnp.cos, loop)
        return {"a": chosen, "b": (jnp.sum(first), 3.0)}

    again = ByMatmuls(Partial(function))
    params = {"k": kernel}
    assert not mentions(again, params, x)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, again(params, x), function(params, x))
    slope = lambda f: jax.jit(jax.grad(lambda p: jnp.sum(f(p, x)["a"] ** 2)))(params)
    jax.tree.map(
        functools.partial(close, rtol=1e-4, atol=1e-4), slope(again), slope(function)
    )


def model(params, x):
    x = jax.lax.conv(x, params["k"], (2, 2), "SAME")
    return jnp.tanh(x).reshape(len(x), -1) @ params["w"]


def loss_fn(params, batch):
    return Categorical().nll(model(params, batch[0]), batch[1])


@pytest.fixture(scope="module")
def net():
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "k": jax.random.normal(keys[0], (2, 1, 3, 3)),
        "w": jax.random.normal(keys[1], (2 * 9, 3)),
    }
    x = jax.random.normal(keys[2], (8, 1, 6, 6))
    return params, (x, jnp.arange(8) % 3), jax.random.normal(keys[3], (72,))


def operators(net):
    params, batch, _ = net
    hessian = hessian_operator(loss_fn, params, batch)
    return {
        "hessian": hessian,
        "ggn": ggn_operator(model, Categorical(), params, batch, microbatch=3),
        "damped": damped_operator(hessian, 0.5),
    }


@pytest.mark.parametrize("name", ["hessian", "ggn", "damped"])
def test_lanczos_of_a_convolutional_net_runs_in_a_compiled_loop(net, name):
    operator, params = operators(net)[name], net[0]
    space = space_of("test", params)
    start = space.unflatten(net[2])
    found, chosen = driven("test", operator, space, "auto", traced=False)
    assert chosen == "compiled"
    assert jax.tree.structure(found) != jax.tree.structure(operator)
    for driver in ("host", "compiled"):  # what the user asks for is not touched
        assert driven("test", operator, space, driver, traced=False)[0] is operator
    assert driven("test", operator, space, "auto", traced=True)[0] is operator
    result = lanczos(operator, start, order=6)
    expected = lanczos(operator, start, order=6, driver="host")
    np.testing.assert_allclose(result.alpha, expected.alpha, rtol=1e-3, atol=1e-4)
    _, _, residuals = ritz_vectors(operator, start, expected, indices=(-1,))
    bound = abs(expected.beta[-1])
    assert residuals[0] <= bound + 1e-4


def test_other_operators_stay_what_they_are(net):
    kernel = net[0]["k"]
    convolve = Partial(lambda k, v: jax.lax.conv(v, k, (1, 1), "SAME"), kernel)
    assert by_matmuls(convolve) is convolve
    v = jnp.ones((1, 1, 4, 4))
    _, chosen = driven("test", convolve, space_of("test", v), "auto", traced=False)
    assert chosen == "host"


def test_equal_operators_share_a_trace(net):
    params, batch, _ = net
    count = 0

    def counted(params, batch):
        nonlocal count
        count += 1
        return loss_fn(params, batch)

    start = space_of("test", params).unflatten(net[2])
    made = hessian_operator(counted, params, batch)
    lanczos(made, start, order=3)
    before = count
    other = jax.tree.map(lambda p: 2 * p, params)
    lanczos(hessian_operator(counted, other, batch), start, order=3)
    assert count == before
