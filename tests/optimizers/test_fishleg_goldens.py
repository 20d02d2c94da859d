"""FishLeg against arrays that the authors' code made (tests/goldens/fishleg.md)."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.curvature import hessian_operator
from jaxlab.likelihoods import Bernoulli, Gaussian
from jaxlab.optimizers import (
    Factors,
    InverseFisher,
    fishleg_auxiliary_gradient,
    q_apply,
    q_diag,
    q_init,
    scale_by_fishleg,
)

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "goldens" / "fishleg.npz")

pytestmark = pytest.mark.usefixtures("x64")


def golden(name):
    return jnp.asarray(GOLDEN[name])


def close(found, expected, tol=1e-10):
    np.testing.assert_allclose(found, expected, rtol=tol, atol=tol)


# The authors' dense layer is A o (R^T R (A o U) L L^T), U (out, in + 1) with the bias
# last; ours has U transposed and the bias first. With P that moves the last row to the
# front our factors are (P L)^T, R and P A^T.


def front(rows, bias):
    return jnp.roll(rows, 1, axis=0) if bias else rows


def back(rows, bias):
    return jnp.roll(rows, -1, axis=0) if bias else rows


def ours(left, right, scale, *, bias=True):
    return Factors(front(left, bias).T[None], right[None], front(scale.T, bias))


def theirs(factors, *, bias=True):
    left = back(factors.left[0].T, bias)
    return left, factors.right[0], back(factors.scale, bias).T


def with_factors(params, rule, **factors):
    q = q_init(params, rule=rule)
    assert {block.name for block in q.blocks} == set(factors)
    return InverseFisher(factors, q.blocks)


def test_our_reading_of_their_factors_and_back():
    given = [golden(f"lin_b_{x}") for x in "LRA"]
    for found, expected in zip(theirs(ours(*given)), given, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_dense_layer_with_bias():
    u = {"kernel": golden("lin_b_vw").T, "bias": golden("lin_b_vb")}
    factors = ours(*(golden(f"lin_b_{x}") for x in "LRA"))
    q = with_factors(u, {"kernel": "scaled"}, **{"kernel + bias": factors})
    found, diagonal = q_apply(q, u), q_diag(q, u)
    close(found["kernel"].T, golden("lin_b_qw"))
    close(found["bias"], golden("lin_b_qb"))
    close(diagonal["kernel"].T, golden("lin_b_diagw"))
    close(diagonal["bias"], golden("lin_b_diagb"))


def test_dense_layer_without_bias():
    u = {"kernel": golden("lin_vw").T}
    factors = ours(*(golden(f"lin_{x}") for x in "LRA"), bias=False)
    q = with_factors(u, {"": "scaled"}, kernel=factors)
    close(q_apply(q, u)["kernel"].T, golden("lin_qw"))
    close(q_diag(q, u)["kernel"].T, golden("lin_diagw"))


def test_convolution():
    u = {"kernel": jnp.moveaxis(golden("conv_vw"), 0, -1), "bias": golden("conv_vb")}
    left, right, scale = (golden(f"conv_{x}") for x in "LRA")
    factors = ours(left.T, right, scale)  # L^T L here, L L^T in dense layers
    q = with_factors(u, {"kernel": "scaled"}, **{"kernel + bias": factors})
    found = q_apply(q, u)
    close(jnp.moveaxis(found["kernel"], -1, 0), golden("conv_qw"))
    close(found["bias"], golden("conv_qb"))


def test_embedding():
    u = {"embedding": golden("emb_v")}
    blocks = q_init(u).blocks
    assert blocks[0].kind == "embedding"
    factors = Factors(golden("emb_R"), golden("emb_L").T[None], golden("emb_A"))
    q = InverseFisher({"embedding": factors}, blocks)
    close(q_apply(q, u)["embedding"], golden("emb_q"))
    close(q_diag(q, u)["embedding"], golden("emb_diag"))


def test_norm_layer():
    u = {"scale": golden("ln_v0"), "bias": golden("ln_v1")}
    column = lambda name: Factors(None, None, golden(name)[:, None])
    q = with_factors(u, None, scale=column("ln_L_w"), bias=column("ln_L_b"))
    close(q_apply(q, u)["scale"], golden("ln_q0"))
    close(q_apply(q, u)["bias"], golden("ln_q1"))


# The small net 3-4-2 with tanh.


def net(prefix):
    return [
        {"W": golden(f"{prefix}W{i}").T, "b": golden(f"{prefix}b{i}")} for i in (0, 1)
    ]


def net_q(prefix, params):
    factors = {
        f"{i}/W + {i}/b": ours(*(golden(f"{prefix}{x}{i}") for x in "LRA"))
        for i in (0, 1)
    }
    return with_factors(params, {"W": "scaled"}, **factors)


def apply_fn(params, x):
    hidden = jnp.tanh(x @ params[0]["W"] + params[0]["b"][None])
    return hidden @ params[1]["W"] + params[1]["b"][None]


class OneHot:
    """Cross-entropy with one-hot targets."""

    def nll(self, outputs, targets):
        return -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(outputs), axis=-1))


LIKELIHOODS = {"gaussian": Gaussian(0.7), "bernoulli": Bernoulli(), "softmax": OneHot()}


def loss_of(likelihood):
    return lambda params, batch: likelihood.nll(apply_fn(params, batch[0]), batch[1])


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_losses_and_gradients_of_the_net(name):
    params, loss_fn = net(f"{name}_"), loss_of(LIKELIHOODS[name])
    batch = golden("X"), golden(f"{name}_Y")
    value, grads = jax.value_and_grad(loss_fn)(params, batch)
    for i in (0, 1):
        close(grads[i]["W"].T, golden(f"{name}_gW{i}"))
        close(grads[i]["b"], golden(f"{name}_gb{i}"))
    assert jnp.isfinite(value)


@pytest.mark.parametrize("precondition", [False, True])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_auxiliary_gradient_of_the_pytorch_code(name, precondition):
    params, loss_fn = net(f"{name}_"), loss_of(LIKELIHOODS[name])
    q = net_q(f"{name}_", params)
    x = golden("X")
    u = jax.grad(loss_fn)(params, (x, golden(f"{name}_Y")))
    operator = hessian_operator(loss_fn, params, (x, golden(f"{name}_S")))
    _, slope = jax.jit(
        functools.partial(
            fishleg_auxiliary_gradient,
            damping=0.3,
            normalize="product",
            precondition=precondition,
        )
    )(q, u, operator)
    prefix = f"{name}_antithetic_{'pre' if precondition else 'nopre'}_d"
    for i in (0, 1):
        found = theirs(slope.factors[f"{i}/W + {i}/b"])
        for part, letter in zip(found, "LRA", strict=True):
            # Their Fisher product is a finite difference.
            close(part, golden(f"{prefix}{letter}{i}"), tol=1e-6)


@pytest.mark.parametrize("precondition", [False, True])
def test_twenty_steps_of_the_pytorch_code(precondition):
    likelihood = LIKELIHOODS["gaussian"]
    loss_fn = loss_of(likelihood)
    x, y, noise = golden("X"), golden("gaussian_Y"), golden("gaussian_S")
    params = net("gaussian_")
    fish = scale_by_fishleg(
        aux_mode="adam",
        step="fixed",
        damping=0.3,
        aux_step=1e-2,
        white_directions=0,
        pre_aux_steps=0,
        dense_until=0,
        update_aux_every=3,
        rule={"W": "scaled"},
        normalize="product",
        precondition=precondition,
    )
    optimizer = optax.chain(
        fish,
        optax.ema(0.9, debias=False),
        optax.add_decayed_weights(1e-3),
        optax.scale(-0.05),
    )
    state = optimizer.init(params)
    start = state[0]._replace(q=net_q("gaussian_", params))
    state = (start, *state[1:])

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss_fn)(params, (x, y))
        targets = apply_fn(params, x) + 0.7 * noise
        operator = hessian_operator(loss_fn, params, (x, targets))
        updates, state = optimizer.update(grads, state, params, fisher_vp=operator)
        return optax.apply_updates(params, updates), state, value

    losses = []
    for _ in range(20):
        params, state, value = step(params, state)
        losses.append(value)
    prefix = f"traj_{'pre' if precondition else 'nopre'}_"
    offset = losses[0] - golden(f"{prefix}loss")[0]  # a constant of the likelihood
    close(jnp.stack(losses) - offset, golden(f"{prefix}loss"), tol=1e-6)
    for i in (0, 1):
        close(params[i]["W"].T, golden(f"{prefix}W{i}"), tol=1e-6)
        close(params[i]["b"], golden(f"{prefix}b{i}"), tol=1e-6)
        found = theirs(state[0].q.factors[f"{i}/W + {i}/b"])
        for part, letter in zip(found, "LRA", strict=True):
            close(part, golden(f"{prefix}{letter}{i}"), tol=1e-6)


# The paper's code: L and R alone, the bias as the first row, L2 1e-5 in the loss.


def rows(prefix, letter):
    made = []
    for i in (0, 1):
        matrix = golden(f"{prefix}{letter}{i}")
        made.append({"W": matrix[1:], "b": matrix[0]})
    return made


@pytest.mark.parametrize("name", ["bern", "gauss"])
def test_auxiliary_gradient_of_the_paper(name):
    prefix = f"paperjax_{name}_"
    params, u = rows(prefix, "theta"), rows(prefix, "gt")
    factors = {
        f"{i}/W + {i}/b": Factors(
            golden(f"{prefix}L{i}")[None], golden(f"{prefix}R{i}")[None], None
        )
        for i in (0, 1)
    }
    q = with_factors(params, None, **factors)
    z = q_apply(q, u)
    likelihood = Bernoulli() if name == "bern" else Gaussian(0.8)
    loss_fn = loss_of(likelihood)
    data = golden(f"{prefix}X"), golden(f"{prefix}S")
    hessian = hessian_operator(loss_fn, params, data)
    operator = lambda v: jax.tree.map(lambda h, x: h + 1e-5 * x, hessian(v), v)
    loss, slope = fishleg_auxiliary_gradient(
        q, u, operator, damping=0.01, normalize=None
    )
    product = jax.tree.map(lambda h, x: h + 0.01 * x, operator(z), z)
    total = 0.0
    for i in (0, 1):
        flat = lambda tree: jnp.concatenate([tree["b"][None], tree["W"]])
        close(flat(z[i]), golden(f"{prefix}z{i}"))
        close(flat(product[i]), golden(f"{prefix}Hz{i}"))
        found = slope.factors[f"{i}/W + {i}/b"]
        close(found.left[0], golden(f"{prefix}dL{i}"))
        close(found.right[0], golden(f"{prefix}dR{i}"))
        total += jnp.sum(flat(z[i]) * (0.5 * flat(product[i]) - flat(u[i])))
    close(loss, total)
