"""The scheme "mup": spreads, and features that move alike at every width."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.structured import (
    MonarchFactors,
    init_monarch,
    monarch_matmul,
    monarch_mup_multipliers,
)

WIDTHS = (64, 256, 1024)
PLANS = ("four blocks", "root blocks", "rank 1", "wider", "narrower")


def sizes(plan, width):
    out = {"wider": 4 * width, "narrower": width // 4}.get(plan, width)
    nblocks = math.isqrt(width) if plan == "root blocks" else 4
    return (width, out), {"nblocks": nblocks, "rank": 1 if plan == "rank 1" else None}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.complex64])
@pytest.mark.parametrize("plan", PLANS)
def test_spread_of_each_factor(plan, dtype):
    widths, options = sizes(plan, 1024)
    factors = init_monarch(
        jax.random.key(0), *widths, scheme="mup", dtype=dtype, **options
    )
    for w in factors:
        _, d_out, d_in = w.shape
        std = math.sqrt(float((jnp.abs(w) ** 2).mean()))
        assert math.isclose(std, math.sqrt(min(d_in, d_out)) / d_in, rel_tol=0.05)


# Each factor keeps the variance but for min(1, d_out / d_in): a dense layer in the
# same parametrization does so too.
@pytest.mark.parametrize("plan", PLANS)
def test_output_variance(plan):
    widths, options = sizes(plan, 256)
    expected, variances = 1.0, []
    for seed in range(4):
        key, key_x = jax.random.split(jax.random.key(seed))
        w = init_monarch(key, *widths, scheme="mup", **options)
        x = jax.random.normal(key_x, (256, widths[0]))
        variances.append(float(monarch_matmul(x, *w).var()))
    for factor in w:
        expected *= min(1, factor.shape[1] / factor.shape[2])
    assert math.isclose(np.mean(variances), expected, rel_tol=0.15)


def feature_change(plan, width, *, scaled, seed=0):
    """How far one step of Adam moves the outputs for an input, root mean square."""
    widths, options = sizes(plan, width)
    keys = jax.random.split(jax.random.key(seed), 3)
    params = init_monarch(keys[0], *widths, scheme="mup", **options)
    x = jax.random.normal(keys[1], (widths[0],))
    ahead = jax.random.normal(keys[2], (widths[1],))
    loss = lambda params: jnp.vdot(monarch_matmul(x, *params), ahead)
    scales = monarch_mup_multipliers(*widths, **options) if scaled else (1.0, 1.0)
    optimizer = optax.chain(
        optax.adam(0.1 / width, eps=1e-30),  # the usual rate of a dense layer
        optax.partition(
            {"w1": optax.scale(scales[0]), "w2": optax.scale(scales[1])},
            MonarchFactors("w1", "w2"),
        ),
    )
    updates, _ = optimizer.update(jax.grad(loss)(params), optimizer.init(params))
    moved = optax.apply_updates(params, updates)
    change = monarch_matmul(x, *moved) - monarch_matmul(x, *params)
    return float(jnp.sqrt((change**2).mean()))


def changes(plan, **options):
    return [
        np.mean([feature_change(plan, width, seed=s, **options) for s in range(3)])
        for width in WIDTHS
    ]


@pytest.mark.parametrize("plan", PLANS)
def test_one_step_moves_features_alike_at_every_width(plan):
    # From 64 to 1024 units, 16 times the width. With a fixed rank the part of the
    # change that comes from w2 dies out, as its inputs do: 1.45 between 64 and 1024,
    # 1.07 between 256 and 1024.
    got = changes(plan, scaled=True)
    assert max(got) / min(got) < (1.6 if plan == "rank 1" else 1.3), got
    assert max(got[1:]) / min(got[1:]) < 1.2, got


def test_without_the_multipliers_wide_features_stand_still():
    got = changes("root blocks", scaled=False)
    assert got[0] > 2.5 * got[-1], got


@pytest.mark.parametrize(
    ("widths", "options", "expected"),
    [
        ((64, 64), {"nblocks": 4}, (2.0, 2.0)),
        ((64, 64), {"nblocks": 1}, (0.5, 0.5)),
        ((64, 256), {"nblocks": 4}, (2.0, 2.0)),
        ((256, 64), {"nblocks": 4}, (2.0, 8.0)),
        ((10, 7), {"nblocks": 4}, (10 / 6, 10 / 4)),
        ((64, 64), {"nblocks": 4, "rank": 2}, (2.0, 4.0)),
    ],
)
def test_multipliers(widths, options, expected):
    assert monarch_mup_multipliers(*widths, **options) == expected
