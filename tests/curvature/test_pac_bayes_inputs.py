"""PAC-Bayes on what people pass: messages, NumPy arrays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxlab.curvature.pac_bayes import (
    gaussian_kl_low_rank,
    gibbs_error,
    inverse_kl,
    pac_bayes_analytic,
    pac_bayes_grid,
    pac_bayes_optimize,
    sample_gaussian_low_rank,
)

pytestmark = pytest.mark.untyped

AXES, THETA, H = np.eye(5)[:2], np.ones(5), np.array([2.0, 1.0])
KEY = jax.random.key(0)


def fails(needed, function, *args, **options):
    with pytest.raises(ValueError, match=needed) as caught:
        function(*args, **options)
    name = getattr(function, "func", function).__name__
    assert str(caught.value).startswith(f"{name}: ")
    assert "got" in str(caught.value)


def test_numbers_out_of_range():
    for error in (-0.1, 1.1, float("nan")):
        fails("error must be in", inverse_kl, error, 0.1)
    for bound in (-1, float("nan")):
        fails("bound must be at least 0", inverse_kl, 0.1, bound)


def test_shapes_that_do_not_broadcast():
    with pytest.raises(ValueError, match="shape"):
        inverse_kl(np.zeros(3), np.zeros(4))
    assert inverse_kl(np.zeros((3, 1)), np.zeros(4)).shape == (3, 4)
    assert inverse_kl([0, 1], 1).tolist() == [pytest.approx(1 - np.exp(-1)), 1]


# XLA takes subnormal numbers for zero.
@settings(max_examples=50, deadline=None)
@given(
    error=st.floats(0, 1, width=32, allow_subnormal=False),
    bound=st.floats(0, 1e3, width=32, allow_subnormal=False),
)
@example(error=float(np.finfo(np.float32).tiny), bound=0.0)
def test_any_numbers(error, bound):
    found = float(inverse_kl(np.float32(error), np.float32(bound)))
    assert error <= found <= 1
    assert found <= error + np.sqrt(bound / 2) * (1 + 1e-5) + 1e-6
    slopes = jax.grad(inverse_kl, argnums=(0, 1))(error, bound)
    assert np.isfinite(slopes).all()


divergence = functools.partial(
    gaussian_kl_low_rank,
    precisions=np.ones(2),
    precision_outside=1.0,
    prior_precisions=np.ones(2),
    prior_precision_outside=1.0,
)


def test_gaussians_that_do_not_fit():
    fails("prior|params0", divergence, THETA, np.ones(4), AXES)
    fails("vectors must be", divergence, THETA, THETA, np.eye(4))
    fails("at most 5", divergence, THETA, THETA, np.ones((6, 5)))
    for name in ("precisions", "prior_precisions"):
        fails(name, divergence, THETA, THETA, AXES, **{name: np.ones(3)})
        fails(name, divergence, THETA, THETA, AXES, **{name: 1.0})
    for name in ("precision_outside", "prior_precision_outside"):
        fails(name, divergence, THETA, THETA, AXES, **{name: np.ones(2)})
        for bad in (0, -1.0, float("inf"), float("nan")):
            fails("finite and > 0", divergence, THETA, THETA, AXES, **{name: bad})
    assert divergence(THETA, THETA, AXES) == 0
    draw = functools.partial(
        sample_gaussian_low_rank, KEY, precisions=np.ones(2), precision_outside=1.0
    )
    fails("vectors must be", draw, THETA, np.eye(3))
    assert draw(THETA, AXES).shape == (5,)


analytic = functools.partial(pac_bayes_analytic, num_examples=100, prior_precision=1.0)
grid = functools.partial(
    pac_bayes_grid, KEY, lambda p: jnp.array(0.1), num_examples=100, num_priors=2
)
optimize = functools.partial(
    pac_bayes_optimize, KEY, lambda p: jnp.sum(p**2), num_examples=100, num_steps=2
)


def test_shapes_of_eigenpairs_and_parameters():
    for function in (analytic, optimize):
        fails("one entry for each of the 2", function, H[:1], AXES, THETA, THETA)
        fails("one entry for each of the 2", function, 1.0, AXES, THETA, THETA)
        fails("vectors must be", function, H, np.eye(4)[:2], THETA, THETA)
        fails("vectors must be", function, H, {"a": AXES}, {"b": THETA}, {"b": THETA})
        fails("at most 5", function, np.ones(6), np.ones((6, 5)), THETA, THETA)
    for function in (analytic, grid, optimize):
        with pytest.raises(ValueError, match="params0 must be a tree like"):
            function(H, AXES, THETA, np.ones(4))
        with pytest.raises(ValueError, match="floating-point arrays, got int"):
            function(H, AXES, np.ones(5, int), THETA)


def test_numbers_of_the_bounds():
    run = lambda function, **more: functools.partial(
        function, H, AXES, THETA, THETA, **more
    )
    for function in (analytic, grid, optimize):
        for bad in ({"num_examples": 7}, {"num_examples": 0}):
            with pytest.raises(ValueError, match="finite and >= 8, got"):
                run(function, **bad)()
        for delta in (0, 1, -0.1, 2.0):
            with pytest.raises(ValueError, match=r"delta must be in \(0, 1\)"):
                run(function, delta=delta)()
        with pytest.raises(ValueError, match='units must be "nats" or "bits", got'):
            run(function, units="digits")()
    for bad in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="prior_precision must be finite and > 0"):
            run(analytic, prior_precision=bad)()
        with pytest.raises(ValueError, match="slack must be finite and > 0"):
            run(analytic, slack=bad)()
        for name in ("largest_variance", "spacing"):
            for function in (grid, optimize):
                with pytest.raises(ValueError, match=f"{name} must be finite and > 0"):
                    run(function, **{name: bad})()
    for index in (0, -3):
        with pytest.raises(ValueError, match="prior_index must be at least 1"):
            run(analytic, prior_index=index)()
    for name in ("num_priors", "num_samples", "num_final_samples"):
        with pytest.raises(ValueError, match=r"num_\w+ must be an integer >= 1"):
            run(grid, **{name: 0})()
    with pytest.raises(ValueError, match="delta must be in"):
        run(grid, sample_delta=0)()
    with pytest.raises(ValueError, match="num_steps must be an integer >= 1"):
        run(optimize, num_steps=0)()


def test_batches_need_one_leading_axis():
    loss = lambda p, b: jnp.sum(p**2)
    run = functools.partial(
        pac_bayes_optimize, KEY, loss, H, AXES, THETA, THETA, num_examples=9
    )
    for bad in ((np.ones(3), np.ones(2)), np.float32(1), np.ones((0, 3)), ()):
        fails("one leading axis", run, batches=bad)


def test_gibbs_errors():
    found = analytic(H, AXES, THETA, 0 * THETA)
    run = functools.partial(gibbs_error, KEY, lambda p: np.float32(0.5), found, AXES)
    fails("num_samples must be an integer >= 1", run, num_samples=0)
    fails("delta must be in", run, delta=1.5)
    assert run(num_samples=3).mean == 0.5
    percent = gibbs_error(KEY, lambda p: 50.0, found, AXES, num_samples=3)
    assert np.isnan(percent.upper)  # not an error in [0, 1]


def test_numpy_arrays_are_welcome():
    found = analytic(H, AXES, THETA, np.zeros(5), prior_precision=np.float32(2))
    assert found.bound(0.1) < 1
    assert grid(H, AXES, THETA, np.zeros(5)).bound < 1
    assert optimize(H, AXES, THETA, np.zeros(5))[1].shape == (2,)
