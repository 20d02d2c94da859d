# ---
# jupyter:
#   jupytext:
#     formats: py:percent,ipynb
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # FishLeg: from Legendre duality to an optimizer
#
# You will see in ten cells how the natural gradient comes out of a convex conjugate,
# how an inverse Fisher matrix is learnt without inverting anything, and what that is
# worth in training an auto-encoder on digits, against Adam tuned on the same run. About
# a minute on two CPU cores; an accelerator is not needed, and nothing is downloaded
# (the digits come with scikit-learn).
#
# Reference: Garcia, Freddi, Fotiadis, Li, Vakili, Bernacchia and Hennequin,
# "Fisher-Legendre (FishLeg) Optimization of Deep Neural Networks", ICLR 2023. Two parts
# of the defaults here are not the paper's, and are said to be so where they come.

# %%
import os
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

from jaxlab import datasets
from jaxlab.curvature import full_matrix, ggn_operator
from jaxlab.likelihoods import Bernoulli
from jaxlab.models import autoencoder_digits
from jaxlab.optimizers import (
    InverseFisher,
    describe_blocks,
    fishleg,
    fishleg_auxiliary_gradient,
    fishleg_auxiliary_loss,
    fishleg_group_step,
    q_apply,
    q_dense,
    q_init,
    scale_by_fishleg,
)
from jaxlab.training import create_state, epoch_order, from_nnx, make_train_step

SMALL = bool(os.environ.get("JAXLAB_SMALL"))  # a test runs this page with less of all
STEPS, SEEDS = (100, 1) if SMALL else (500, 3)
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#666666"
PINK = "#cc79a7"
plt.rcParams.update(
    {
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlelocation": "left",
        "axes.titlesize": 11,
    }
)

# %% [markdown]
# ## 1. A conjugate whose curvature is the inverse Fisher
#
# Let the model itself, at parameters theta, make the targets, and ask what other
# parameters would lose on them:
#
#     H(d) = E_{y ~ p(. | theta)} loss(theta + d, y).
#
# H is least at d = 0, and its Hessian there is the Fisher matrix F. The
# Legendre-Fenchel conjugate H*(u) = sup_d (u.d - H(d)) has the gradient
#
#     d(u) = argmin_d (H(d) - u.d),
#
# and, as conjugates do, the inverse Hessian: F^-1. So d(eps u) / eps goes to F^-1 u:
# a natural gradient is the answer to a small optimization problem. Here is that for a
# logistic regression, with Newton's method for the argmin.

# %%
draw = np.random.default_rng(0)
inputs, theta, u = (
    jnp.float32(draw.normal(size=size)) for size in ((200, 3), (3,), (3,))
)
likelihood = Bernoulli()
logits = lambda theta, x: (x @ theta)[:, None]
# The loss is linear in the targets: their mean will do for the expectation.
means = jax.nn.sigmoid(logits(theta, inputs))
cross = lambda d: likelihood.nll(logits(theta + d, inputs), means)


@jax.jit
def conjugate_gradient(u):
    """Finds ``argmin_d H(d) - u.d`` by Newton's method."""

    def newton(_, d):
        return d - jnp.linalg.solve(jax.hessian(cross)(d), jax.grad(cross)(d) - u)

    return jax.lax.fori_loop(0, 20, newton, jnp.zeros(3))


operator = ggn_operator(logits, likelihood, theta, (inputs, None))
fisher = full_matrix(operator, theta)
natural = jnp.linalg.solve(fisher, u)
gaps = []
for eps in (0.1, 0.03, 0.01, 0.003):
    found = conjugate_gradient(eps * u) / eps
    gaps.append(float(jnp.linalg.norm(found - natural) / jnp.linalg.norm(natural)))
    print(f"eps {eps:5}: d(eps u) / eps is {gaps[-1]:.4f} away from F^-1 u")
assert np.allclose(jax.hessian(cross)(jnp.zeros(3)), fisher, atol=1e-5)
assert (np.diff(gaps) < 0).all()
assert gaps[-1] < 0.05

# %% [markdown]
# ## 2. The auxiliary loss
#
# Nobody wants to solve that at every step. Instead put d = eps Q u, with a matrix Q to
# be learnt, into what the argmin minimises, divide by eps^2 and let eps go to 0. With
# some damping gamma on F,
#
#     A(Q; u) = 1/2 (Q u)^T (F + gamma) (Q u) - u^T Q u.
#
# It is least where Q u = (F + gamma)^-1 u, asks only for products with F, and is what
# `fishleg_auxiliary_loss` computes. With Q = C^T C no step on C can make Q indefinite.

# %%
GAMMA = 0.01
full = q_init(theta, rule={"": "full"})


def with_root(root):
    """Makes the inverse Fisher ``root^T root``."""
    return InverseFisher({"": full.factors[""]._replace(left=root[None])}, full.blocks)


options = {"damping": GAMMA, "normalize": False}
loss_of = lambda q: fishleg_auxiliary_loss(q, u, operator, **options)
exact = jnp.linalg.inv(fisher + GAMMA * jnp.eye(3))
best = with_root(jnp.linalg.cholesky(exact).T)
least = -0.5 * u @ exact @ u
others = [
    float(loss_of(with_root(best.factors[""].left[0] * scale)))
    for scale in (0.5, 0.9, 1.1, 1.5)
]
slope = fishleg_auxiliary_gradient(best, u, operator, damping=GAMMA, normalize=None)[1]
print(f"A at the inverse {loss_of(best):.4f}, -1/2 u.(F + gamma)^-1 u {least:.4f}")
print("A at 1/4, 0.81, 1.21 and 9/4 of the inverse:", np.round(others, 4).tolist())
assert np.isclose(loss_of(best), least, rtol=1e-4)
assert min(others) > loss_of(best)
assert jnp.abs(slope.factors[""].left).max() < 1e-3 * jnp.linalg.norm(u)

# %% [markdown]
# ## 3. Learning the inverse
#
# A toy of 20 parameters whose Fisher has the eigenvalues 1, 1/2, ..., 1/20. Two ways of
# learning Q from one random direction a step:
#
# - by Adam on the auxiliary loss, as the paper does;
# - by `fishleg_group_step`, the default here and not the paper's: the same loss, but C
#   moves to (I + E) C, and the step is taken in E. That does not see the condition
#   number of F.

# %%
SIZE, LENGTH = 20, 1000 if SMALL else 6000
basis = np.linalg.qr(draw.normal(size=(SIZE, SIZE)))[0]
eigenvalues = 1 / np.arange(1.0, SIZE + 1)
toy = jnp.float32(basis @ np.diag(eigenvalues) @ basis.T)
toy_vp = lambda v: toy @ v
like = jnp.zeros(SIZE)
adam = optax.adam(optax.cosine_decay_schedule(1e-2, LENGTH))


def by_adam(carry, key):
    """Takes the paper's step of the factors."""
    q, state = carry
    u = jax.random.normal(key, (SIZE,))
    _, slope = fishleg_auxiliary_gradient(q, u, toy_vp, damping=GAMMA)
    moves, state = adam.update(slope, state)
    q = optax.apply_updates(q, moves)
    return (q, state), q_dense(q, like)


def by_group(carry, key):
    """Takes the group step of the factors."""
    q, state = carry
    q, _ = fishleg_group_step(key, q, [], toy_vp, damping=GAMMA, like=like)
    return (q, state), q_dense(q, like)


@partial(jax.jit, static_argnums=0)
def learn(step):
    """Fits Q from 10 I on, and gives it after every step."""
    q = q_init(like, scale=10.0, rule={"": "full"})
    keys = jax.random.split(jax.random.key(0), LENGTH)
    found = jax.lax.scan(step, (q, adam.init(q)), keys)[1]
    return jnp.concatenate([q_dense(q, like)[None], found])


damped = toy + GAMMA * np.eye(SIZE)
fits = {"group step": learn(by_group), "Adam, as in the paper": learn(by_adam)}
away = {
    name: np.linalg.norm(np.asarray(qs @ damped) - np.eye(SIZE), axis=(1, 2))
    for name, qs in fits.items()
}
away = {name: gap / SIZE**0.5 for name, gap in away.items()}
for name, gap in away.items():
    steps = [100, 300, 1000] + [6000] * (not SMALL)
    print(f"{name:21}", *(f"{gap[s]:.1e} after {s}" for s in steps), sep="   ")
assert away["group step"][1000] < 1e-3
assert SMALL or away["Adam, as in the paper"][-1] < 1e-3

# %% [markdown]
# Left, the distance ||Q (F + gamma) - I|| / sqrt(20) on the way; right, Q along the
# eigenvectors of F, on its way from 10 I to 1 / (eigenvalue + gamma).

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
for (name, gap), colour in zip(away.items(), (BLUE, ORANGE), strict=True):
    axes[0].loglog(np.arange(1, LENGTH + 1), gap[1:], color=colour, label=name)
axes[0].set(title="Distance from the inverse", xlabel="step: one product with F")
axes[0].legend(frameon=False, loc="lower left")
target = 1 / (eigenvalues + GAMMA)
for step, shade in zip((0, 30, 60, 300), (0.3, 0.5, 0.75, 1.0), strict=True):
    along = np.einsum("ia,ij,ja->a", basis, fits["group step"][step], basis)
    label = f"after {step}" if step else "start"
    axes[1].loglog(eigenvalues, along, color=BLUE, alpha=shade, label=label)
label = "1 / (eigenvalue + gamma)"
axes[1].plot(eigenvalues, target, "o", ms=4, color="black", mfc="none", label=label)
axes[1].set(title="Q by the group step", xlabel="eigenvalue of F")
axes[1].legend(frameon=False, loc="lower left")
axes[1].set_xticks([0.05, 0.1, 0.2, 0.5, 1], ["0.05", "0.1", "0.2", "0.5", "1"])
axes[1].set_yticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
axes[1].minorticks_off()
assert np.allclose(along, target, rtol=1e-2)

# %% [markdown]
# ## 4. A network: blocks of Kronecker factors
#
# A network's Q is a block for every layer. A kernel with its bias is one matrix U, and
#
#     C U = L U R^T,   Q U = L^T L U R^T R,
#
# so that learning Q is learning L and R: of the first layer below 65^2 + 48^2 numbers
# in place of the (65 x 48)^2 of the whole matrix. `describe_blocks` tells which
# parameter went where, of convolutions, embeddings and norms too.

# %%
objective, start, rest = from_nnx(autoencoder_digits(rngs=nnx.Rngs(0)), likelihood)
print(describe_blocks(start))
layer = {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}
noise = jax.tree.map(lambda x: jnp.float32(draw.normal(size=x.shape)), q_init(layer))
(factors,) = noise.factors.values()
left, right = factors.left[0], factors.right[0]
kernel, bias = layer["kernel"].at[0, 1].set(1.0), layer["bias"].at[2].set(1.0)
found = q_apply(noise, {"kernel": kernel, "bias": bias})
product = left.T @ left @ jnp.vstack([bias, kernel]) @ right.T @ right
assert np.allclose(found["bias"], product[0], atol=1e-5)
assert np.allclose(found["kernel"], product[1:], atol=1e-5)

# %% [markdown]
# ## 5. One step, by hand
#
# An optimizer's step is now: take an auxiliary step or a few, with the gradient g as
# the direction, multiply d = Q g, and go along d as far as the quadratic model says,
#
#     alpha = g.d / (d.F d + gamma d.d).
#
# This is the second of the parts that are not the paper's, which has a fixed rate. The
# cell takes `scale_by_fishleg` apart, on the logistic regression of part 1.

# %%
optimizer = scale_by_fishleg(
    damping=GAMMA, white_directions=0, pre_aux_steps=3, rule={"": "full"}
)
targets = jnp.float32(draw.uniform(size=(200, 1)) < 0.3)
loss_at = lambda theta: likelihood.nll(logits(theta, inputs), targets)
g = jax.grad(loss_at)(theta)
direction, _ = optimizer.update(g, optimizer.init(theta), theta, fisher_vp=operator)

q = q_init(theta, scale=10.0, rule={"": "full"})
for _ in range(3):
    q, _ = fishleg_group_step(None, q, [g], operator, damping=GAMMA, white_directions=0)
d = q_apply(q, g)
alpha = g @ d / (d @ operator(d) + GAMMA * d @ d)
print(f"alpha {alpha:.3f}, alpha d {alpha * d}, update {direction}")
print(f"loss before {loss_at(theta):.3f}, after {loss_at(theta - direction):.3f}")
assert np.allclose(alpha * d, direction, rtol=1e-4)
assert loss_at(theta - direction) < loss_at(theta)

# %% [markdown]
# ## 6. The race
#
# The auto-encoder 64-48-24-12-24-48-64 on digits, batches of 100, the likelihood summed
# over pixels. `make_train_step` hands the transformation what it asks for: the product
# with the Fisher of this batch and a key. Every method has the same starts and batches.
#
# - FishLeg with its defaults, nothing tuned;
# - Adam, with several rates: judged at each step by the best for that step;
# - the paper's form, the factors learnt by Adam and a fixed rate, the best of a few;
# - Q = 10 I held, with the quadratic model's step length: what this does alone.

# %%
DECAY, DAMPING, BATCH = 1e-5, 0.3, 100
rows = jnp.asarray(datasets.load("digits").splits["train"][0])


def fishleg_of(pre, dense, every):
    """Makes FishLeg; the numbers say when it learns."""
    return fishleg(
        damping=DAMPING,
        weight_decay=DECAY,
        pre_aux_steps=pre,
        dense_until=dense,
        update_aux_every=every,
    )


def papers_form(rate):
    """Makes the paper's form, which starts as SGD at a rate that is safe."""
    return fishleg(
        rate,
        weight_decay=DECAY,
        momentum=0.9,
        aux_mode="adam",
        step="fixed",
        aux_step=1e-2,
        init_scale=0.01 / rate,
        white_directions=0,
        pre_aux_steps=1,
        update_aux_every=1,
    )


def adam_of(rate):
    """Makes Adam with the same decay."""
    return optax.chain(optax.add_decayed_weights(DECAY), optax.adam(rate))


@partial(jax.jit, static_argnums=0)
def race(make, *numbers):
    """Trains from every seed; gives the loss of all rows after each step."""
    optimizer = make(*numbers)
    step = make_train_step(objective, optimizer, jit=False)
    each = len(rows) // BATCH

    def run(key):
        first, order, noise = jax.random.split(key, 3)
        net = from_nnx(autoencoder_digits(rngs=nnx.Rngs(first)), likelihood)
        state = create_state(noise, net.params, optimizer, model_state=net.model_state)
        epochs = jnp.arange(-(-STEPS // each))
        orders = jax.vmap(lambda epoch: epoch_order(order, epoch, size=len(rows)))(
            epochs
        )
        index = orders[:, : each * BATCH].reshape(-1, BATCH)[:STEPS]

        def one(state, index):
            state, _ = step(state, (rows[index], rows[index]))
            return state, objective.loss(state.params, rest, (rows, rows))[0]

        return jax.lax.scan(one, state, index)[1]

    return jax.lax.map(run, jax.random.split(jax.random.key(0), SEEDS))


# %%
FISHLEG, ADAM, PAPER, HELD = "FishLeg", "Adam", "paper's form", "Q = 10 I"
rates = (0.01, 0.02) if SMALL else (0.005, 0.01, 0.02, 0.04)
papers_rates = () if SMALL else (0.05, 0.1, 0.2)
curves = {
    FISHLEG: race(fishleg_of, 20, 100, 10)[None],
    HELD: race(fishleg_of, 0, 0, 10**6)[None],
    ADAM: jnp.stack([race(adam_of, rate) for rate in rates]),
}
if papers_rates:
    curves[PAPER] = jnp.stack([race(papers_form, rate) for rate in papers_rates])
# The least mean over the seeds, for each step anew.
chosen = {name: np.nanmin(np.mean(c, 1), axis=0) for name, c in curves.items()}
marks = [m for m in (10, 20, 50, 100, 200, 500) if m <= STEPS]
print("steps        ", "".join(f"{mark:8}" for mark in marks))
for name, best in chosen.items():
    print(f"{name:13}", "".join(f"{best[mark - 1]:8.2f}" for mark in marks))
late = np.array([mark for mark in marks if mark >= 50]) - 1
for name in list(curves)[1:]:
    assert (chosen[FISHLEG][late] < chosen[name][late]).all()
# Against the best Adam of each seed as well.
assert (curves[FISHLEG][0][:, late] < jnp.min(curves[ADAM], axis=0)[:, late]).all()
assert SMALL or chosen[FISHLEG][499] < 15.8

# %% [markdown]
# ## 7. The race as a picture
#
# Left, means and ranges over the seeds; right, FishLeg and every rate of Adam.

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
colours = {FISHLEG: BLUE, ADAM: ORANGE, PAPER: GREEN, HELD: GREY}
count = np.arange(1, STEPS + 1)
for name in curves:
    tuned = ", best rate for each step" if name in (ADAM, PAPER) else ""
    style = {"color": colours[name]}
    axes[0].semilogx(count, chosen[name], label=f"{name}{tuned}", **style)
    each = np.nanmin(curves[name], axis=0)
    axes[0].fill_between(count, each.min(0), each.max(0), alpha=0.15, lw=0, **style)
axes[0].set(title="Training loss, nats an image", xlabel="step", ylim=(15, 40))
axes[0].legend(frameon=False, loc="upper right", fontsize=9)
axes[1].plot(count, chosen[FISHLEG], color=BLUE, label=FISHLEG)
for rate, curve, shade in zip(rates, curves[ADAM], (0.3, 0.5, 0.75, 1.0), strict=False):
    style = {"color": ORANGE, "alpha": shade, "label": f"Adam, rate {rate:g}"}
    axes[1].plot(count, np.mean(curve, 0), lw=1, **style)
axes[1].set(title="Every rate of Adam", xlabel="step", ylim=(15, 28))
axes[1].legend(frameon=False, loc="upper right", fontsize=9)

goal = chosen[ADAM][-1]
there = int(np.argmax(chosen[FISHLEG] <= goal)) + 1
print(f"Adam's loss after {STEPS} steps, {goal:.2f}: FishLeg has it after {there}")
assert there < STEPS / 2

# %% [markdown]
# This is a race by steps, that is by gradients. A step of FishLeg costs several of
# Adam's: an auxiliary step takes a product with the Fisher (at every step up to the
# hundredth, at every tenth later) and the quadratic model another pass. No gain by the
# clock over Adam is claimed for networks as small as this; `python -m benchmarks claim
# fishleg` measures seconds too, with more rivals. The step length alone does little:
# with Q held at 10 I the loss stays far above Adam's. And learning Q alone, by Adam and
# with a fixed rate, pays late.
