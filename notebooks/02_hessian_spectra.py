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
# # The Hessian of a small network
#
# You will see the eigenvalues of a loss before, during and after training, what the
# order and the width of an estimated density do to it, where the few large eigenvalues
# come from, the layers one by one, and the leading vectors followed through training.
# The network is so small that its Hessian can be written out, so every estimate is
# compared with the truth. Under two minutes on two CPU cores; an accelerator is not
# needed, and nothing is downloaded (the digits come with scikit-learn).
#
# References: Sagun et al., "Empirical Analysis of the Hessian of Over-Parametrized
# Neural Networks", 2017; Papyan, "Traces of Class/Cross-Class Structure Pervade Deep
# Learning Spectra", JMLR 2020.

# %%
import itertools
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from jaxlab import datasets
from jaxlab.curvature import (
    block_operator,
    density_from_eigenvalues,
    full_matrix,
    ggn_operator,
    hessian_operator,
    lanczos,
    plot_density,
    ritz,
    spectral_density,
    spectrum_report,
    split_outliers,
    subspace_overlap,
    top_eigenpairs,
    trace,
)
from jaxlab.likelihoods import Categorical
from jaxlab.objective import Objective, plain

SMALL = bool(os.environ.get("JAXLAB_SMALL"))  # a test runs this page with less of all
HIDDEN, ROWS, EVERY = (16, 300, 40) if SMALL else (32, 1297, 10)
STEPS, DURING = 200, 20
CLASSES = 10
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#666666"
plt.rcParams.update(
    {
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlelocation": "left",
        "axes.titlesize": 11,
    }
)

# %% [markdown]
# ## A network, and operators on it
#
# 64 inputs, one tanh layer, 10 classes, trained by Adam on all training digits at once.
# The parameters of every step are kept.

# %%
digits = datasets.load("digits")
rows_of = lambda name: tuple(jnp.asarray(x[:ROWS]) for x in digits.splits[name])
train_rows, test_rows = rows_of("train"), rows_of("test")
inputs, targets = train_rows
likelihood = Categorical()


def apply_fn(params, x):
    """Computes the logits."""
    first, second = params["first"], params["second"]
    return jnp.tanh(x @ first["w"] + first["b"]) @ second["w"] + second["b"]


def loss_fn(params, batch):
    """Computes the mean cross-entropy."""
    return likelihood.nll(apply_fn(params, batch[0]), batch[1])


@jax.jit
def train(params):
    """Gives the parameters before the first step and after each, stacked."""
    optimizer = optax.adam(1e-2)

    def step(carry, _):
        params, state = carry
        grads = jax.grad(loss_fn)(params, train_rows)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), params

    start = params, optimizer.init(params)
    (last, _), path = jax.lax.scan(step, start, length=STEPS)
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), path, last)


def layer(key, inputs, outputs):
    """Draws weights of variance 1 / inputs; the biases are zero."""
    w = jax.random.normal(key, (inputs, outputs)) / inputs**0.5
    return {"w": w, "b": jnp.zeros((1, outputs))}


first, second, key = jax.random.split(jax.random.key(0), 3)
path = train(
    {"first": layer(first, 64, HIDDEN), "second": layer(second, HIDDEN, CLASSES)}
)
at = lambda step: jax.tree.map(lambda leaf: leaf[step], path)
moments = {"before": at(0), "during": at(DURING), "after": at(STEPS)}
p = sum(leaf.size for leaf in jax.tree.leaves(at(0)))

hessians = {
    when: hessian_operator(loss_fn, params, train_rows)
    for when, params in moments.items()
}
ggns = {
    when: ggn_operator(apply_fn, likelihood, params, train_rows)
    for when, params in moments.items()
}


def eigenvalues(operator, like):
    """Writes the matrix out and finds all eigenvalues, descending: the truth."""
    return np.linalg.eigvalsh(np.asarray(full_matrix(operator, like), float))[::-1]


exact = {when: eigenvalues(h, moments[when]) for when, h in hessians.items()}

print(f"{p} parameters, {len(targets)} training rows")
print("        loss    test accuracy  smallest  largest    trace")
losses, accuracies = {}, {}
for when, params in moments.items():
    losses[when] = float(loss_fn(params, train_rows))
    right = apply_fn(params, test_rows[0]).argmax(-1) == test_rows[1]
    accuracies[when] = float(right.mean())
    values = exact[when]
    print(
        f"{when:6} {losses[when]:6.3f}  {accuracies[when]:13.3f}  {values[-1]:8.3f}  "
        f"{values[0]:7.2f}  {values.sum():7.2f}"
    )
assert losses["before"] > losses["during"] > losses["after"]
assert accuracies["after"] > (0.8 if SMALL else 0.93)

# %% [markdown]
# ## Before, during and after
#
# `spectral_density` needs products with the Hessian only, here 4 x 128 of them.
# `top_eigenpairs` finds the leading eigenvalues and says how near each is to one of the
# matrix; ask for a few more than you need, since the last one may be out of order.

# %%
WANTED = 15
pairs, densities, marked = {}, {}, {}
for when, params in moments.items():
    operator = hessians[when]
    pairs[when] = top_eigenpairs(key, operator, params, k=WANTED, tol=1e-4)
    densities[when] = spectral_density(key, operator, params, order=128)
    marked[when] = split_outliers(
        pairs[when].values, pairs[when].residuals, densities[when]
    )
    found = np.asarray(pairs[when].values)
    error = np.abs(found[:, None] - exact[when][None]).min(axis=1)
    assert (error <= pairs[when].residuals + 1e-5 * exact[when][0]).all()
    np.testing.assert_allclose(found[:CLASSES], exact[when][:CLASSES], rtol=1e-4)


def distance(density, values, low=-np.inf, high=np.inf):
    """Gives the mean distance from the truth in decades, where either is above 1e-3.

    Only what lies from low to high counts.
    """
    truth = density_from_eigenvalues(values, density.grid, sigma=density.sigma)
    kept = lambda height: jnp.log10(jnp.maximum(height, 1e-3))
    away = jnp.abs(kept(density.density) - kept(truth))
    inside = (density.grid > low) & (density.grid < high)
    inside &= jnp.maximum(density.density, truth) > 1e-3
    return float(jnp.sum(away * inside) / jnp.sum(inside))


figure, axes = plt.subplots(1, 3, figsize=(10, 3.4), sharey=True, layout="constrained")
for axis, (when, density) in zip(axes, densities.items(), strict=True):
    truth = density_from_eigenvalues(exact[when], density.grid, sigma=density.sigma)
    leading = pairs[when].values[: CLASSES - 1]
    plot_density(density, ax=axis, color=BLUE, outliers=leading, decades=4.0)
    axis.plot(density.grid, np.maximum(truth, 1e-9), "--", color=ORANGE, lw=1)
    axis.set_ylim(1e-3, 200)
    axis.set(title=f"{when[0].upper()}{when[1:]}: loss {losses[when]:.3f}")
axes[1].set_ylabel("")
axes[2].set_ylabel("")
axes[2].text(0.12, 20, "estimate, and its error", color=BLUE)
axes[2].text(0.12, 7, "truth (dashed)", color=ORANGE)
axes[2].text(0.12, 2.4, "triangles: the first 9", color=BLUE)

print("        decades  negative  within 1 % of the largest from 0")
for when, density in densities.items():
    small = np.mean(np.abs(exact[when]) < 0.01 * exact[when][0])
    negative = np.mean(exact[when] < -1e-3 * exact[when][0])
    far = distance(density, exact[when])
    print(f"{when:6}  {far:7.2f}  {negative:8.2f}  {small:6.2f}")
    assert far < 0.5
    assert small > 0.3
assert exact["before"][-1] < -0.1 * exact["before"][0]
assert exact["after"][-1] > -0.01 * exact["after"][0]

# %% [markdown]
# Most eigenvalues lie near zero: that is the bulk. Before training some are clearly
# negative; training takes those away, and with the loss the whole spectrum shrinks. A
# few values stand apart on the right.

# %% [markdown]
# ## The order and the width
#
# From one vector v, m products give m nodes and weights: a quadrature rule that is
# exact for the polynomials of degree 2 m - 1 in the matrix. That is all an estimate
# knows; smoothing by a Gaussian of width sigma turns nodes into a density.

# %%
when = "during"
operator, like, values = hessians[when], moments[when], exact[when]
v = jax.tree.map(lambda leaf: jax.random.normal(key, leaf.shape), like)
nodes, weights, _ = ritz(lanczos(operator, v, order=3))
dot = lambda a, b: sum(jnp.vdot(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b))))
power = v
for degree in range(6):
    moment = float(dot(v, power) / dot(v, v))
    np.testing.assert_allclose(weights @ nodes**degree, moment, rtol=1e-4)
    power = operator(power)

span = float(values[0] - values[-1])
grid = jnp.linspace(values[-1] - span / 8, values[0] + span / 8, 2000)


def estimate(order, sigma, num_probes=4):
    """Estimates the density of the Hessian during training."""
    options = {"order": order, "num_probes": num_probes, "sigma": sigma}
    return spectral_density(key, operator, like, grid=grid, **options)


orders, parts = (8, 16, 32, 64, 128), (16, 64, 256)  # sigma is range / part
estimates = {
    (order, part): estimate(order, span / part, 8) for order in orders for part in parts
}
far = {
    part: [distance(estimates[order, part], values) for order in orders]
    for part in parts
}
colours = ORANGE, GREEN, BLUE


def draw(axis, chosen, labels, truth_at):
    """Draws estimates over the truth."""
    truth = density_from_eigenvalues(values, grid, sigma=span / truth_at)
    axis.semilogy(grid, np.maximum(truth, 1e-9), color=GREY, lw=2.5, alpha=0.5)
    for density, colour in zip(chosen, colours, strict=False):
        axis.semilogy(grid, np.maximum(density.density, 1e-9), color=colour, lw=1)
    for place, label in enumerate([*labels, f"truth at range / {truth_at}"]):
        colour = GREY if place == len(labels) else colours[place]
        style = {"color": colour, "ha": "right", "transform": axis.transAxes}
        axis.text(1, 0.95 - 0.09 * place, label, **style)
    axis.set(ylim=(1e-3, 300), xlabel="eigenvalue")


figure, axes = plt.subplots(1, 3, figsize=(10, 3.4), layout="constrained")
of_order = [estimates[order, 64] for order in (8, 32, 128)]
draw(axes[0], of_order, ("order 8", "order 32", "order 128"), 64)
axes[0].set(title="Order, at sigma = range / 64", ylabel="density")
of_width = [estimates[16, part] for part in (16, 256)]
draw(axes[1], of_width, ("range / 16", "range / 256"), 256)
axes[1].set(title="Sigma, at order 16", xlim=(-0.2, 0.3 * values[0]))
for (part, errors), colour in zip(far.items(), colours, strict=True):
    axes[2].loglog(orders, errors, "o-", color=colour, ms=4)
    height = errors[-1] * {16: 1, 64: 0.9, 256: 1.15}[part]
    axes[2].text(145, height, f"range / {part}", color=colour, va="center")
axes[2].set(title="Decades from the truth", xlabel="order", xlim=(7, 700))
axes[2].set_xticks(orders, [str(order) for order in orders])
axes[2].set_yticks([0.05, 0.1, 0.2, 0.5], ["0.05", "0.1", "0.2", "0.5"])
axes[2].minorticks_off()

print("decades from the truth; order", "  ".join(f"{order:5}" for order in orders))
for part, errors in far.items():
    print(f"sigma = range / {part:3}", " " * 10, "  ".join(f"{e:5.3f}" for e in errors))
assert far[256][0] > 2 * far[256][3]
assert far[16][1] < 1.2 * far[16][4]
assert far[16][2] < far[64][2] < far[256][2]
edge = {"low": 0.03 * values[0], "high": 0.25 * values[0]}
of_edge = [distance(estimates[order, 256], values, **edge) for order in (16, 128)]
print("sigma = range / 256, edge of the bulk, orders 16 and 128:", np.round(of_edge, 2))
assert of_edge[0] > 2 * of_edge[1]

# %% [markdown]
# A narrow sigma at a low order adds no detail: below range / order the curve shows the
# nodes of the quadrature, as peaks and holes that the spectrum does not have. Detail
# must be paid for by a higher order, and once the order is above range / sigma only
# more probes help.
#
# Sizes that span decades want a logarithmic scale, on which signs are lost.

# %%
figure, axis = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
floor = 1e-5  # above the round-off; smaller sizes count as this one
sizes = jnp.linspace(-5.5, 1, 600)
zeros, near, beyond = {}, {}, {}
for (when, params), colour in zip(moments.items(), (GREY, BLUE, ORANGE), strict=True):
    options = {"order": 128, "scale": "log", "sigma": 0.1, "floor": floor}
    density = spectral_density(key, hessians[when], params, grid=sizes, **options)
    plot_density(
        density, ax=axis, color=colour, label=when, outliers=np.empty(0), decades=4.0
    )
    logs = np.log10(np.maximum(np.abs(exact[when]), floor))
    truth = density_from_eigenvalues(logs, sizes, sigma=density.sigma)
    axis.plot(sizes, np.maximum(truth, 1e-9), "--", color=colour, lw=1)
    edge = np.log10(0.02 * exact[when][0])
    near[when] = distance(density, logs, low=edge)
    beyond[when] = distance(density, logs, high=edge)
    zeros[when] = int((logs < np.log10(2 * floor)).sum())
axis.set_title("Estimate (full) and truth (dashed)")
blank = int((np.ptp(inputs, axis=0) == 0).sum())
known = HIDDEN + 1 + blank * HIDDEN
print("decades from the truth, above and below 2 % of the largest")
for when in moments:
    print(f"{when:6}  {near[when]:.2f}  {beyond[when]:.2f}")
    assert near[when] < 0.25
    assert SMALL or beyond[when] > near[when]
print(f"{blank} pixels are always blank; {known} eigenvalues are 0 for reasons known;")
print(f"below 2e-5 there are: {zeros}")
assert min(zeros.values()) >= known

# %% [markdown]
# Lanczos resolves the ends of a spectrum and not its middle: below some hundredth of
# the largest value the estimate only says how much is there, not how it is spread. That
# much is exactly zero is known: the same shift of all logits changes nothing, which
# takes one parameter direction for each hidden unit and one for the bias, and a pixel
# that is always blank leaves its weights without effect.

# %% [markdown]
# ## Where the outliers come from
#
# The Hessian is the Gauss-Newton matrix G, which knows the outputs' first derivatives
# only, plus a rest R that has the second ones. With 10 classes one expects 9 or 10
# outliers. The table counts them in three ways: the rule of `split_outliers`
# (converged, and above twice the edge of the bulk), and the place of the widest gap
# between neighbours, as a ratio and after the third value, in the Hessian and in G.


# %%
def minus(a, b, v):
    """Multiplies v by the difference of two operators."""
    return jax.tree.map(jnp.subtract, a(v), b(v))


def widest(values):
    """Gives the number of values above the widest gap, among 4 to 14."""
    return 4 + int(np.argmax(values[3:14] / values[4:15]))


def matrix(vectors, count=CLASSES - 1):
    """Writes the first vectors of a stacked tree as the rows of a matrix."""
    leaves = [leaf[:count] for leaf in jax.tree.leaves(vectors)]
    return jnp.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1)


pairs_ggn, rest, gaps = {}, {}, {}
print("        rule  gap in H, G  9th / 10th in H, G  R from, to      overlap of H, G")
for when, params in moments.items():
    pairs_ggn[when] = top_eigenpairs(key, ggns[when], params, k=WANTED, tol=1e-4)
    difference = jax.tree_util.Partial(minus, hessians[when], ggns[when])
    rest[when] = top_eigenpairs(key, difference, params, k=2, which="both").values
    overlap = subspace_overlap(
        matrix(pairs[when].vectors), matrix(pairs_ggn[when].vectors)
    )
    h, g = (np.asarray(found[when].values) for found in (pairs, pairs_ggn))
    gaps[when] = widest(h), widest(g)
    print(
        f"{when:6}  {int(marked[when].sum()):4}  {gaps[when][0]:8} {gaps[when][1]:2}  "
        f"{h[8] / h[9]:13.2f} {g[8] / g[9]:4.2f}  "
        f"{rest[when][1]:6.3f} {rest[when][0]:6.3f}  {overlap:15.3f}"
    )
    assert overlap > 0.7
ggn_values = eigenvalues(ggns["during"], moments["during"])
np.testing.assert_allclose(pairs_ggn["during"].values, ggn_values[:WANTED], rtol=1e-3)
assert ggn_values[-1] > -1e-6 * ggn_values[0], "no negative value"
assert gaps["before"][1] == gaps["during"][1] == CLASSES - 1
assert SMALL or gaps["during"][0] == CLASSES - 1
assert rest["after"][0] < 0.3 * rest["before"][0]

# %% [markdown]
# In G the gap is wide and after the 9th value until the loss is small: one less than
# classes. Before training R has eigenvalues nearly as large as the smaller outliers, of
# both signs, and hides the gap in the Hessian; during training it is there. At the end
# the values fall off evenly, and no number is the right one: where somebody reports an
# outlier count, ask for the loss.
#
# Why 9? With the probabilities p_ic of row i, and J_i the derivative of its logits,
#
#     G = (1/n) sum_i sum_c  p_ic d_ic d_ic',    d_ic = J_i' (e_c - p_i).
#
# Replace the vectors d_ic of a class by their mean, with the weights p_ic, and G
# becomes a matrix B of rank 10 at most, below G. Since sum_c p_ic d_ic = 0 the means
# are dependent, which leaves 9. Later, rows of different labels have different
# derivatives; then the means are taken for each label and class, 100 in all.


# %%
@jax.jit
def means(params, groups):
    """Gives the weighted means of d for each group of rows and class, as a matrix.

    It has a row for each mean, times the root of its weight; B is its transpose times
    itself. Groups without rows give zeros.
    """
    logits, pull = jax.vjp(lambda q: apply_fn(q, inputs), params)
    shares = jax.nn.softmax(logits)
    towards = shares.T[:, :, None] * (jnp.eye(CLASSES)[:, None] - shares[None])
    members = jax.nn.one_hot(groups, CLASSES).T / len(groups)
    weights = (members @ shares).ravel()
    cotangents = (members[:, None, :, None] * towards[None]).reshape(-1, *logits.shape)
    sums = matrix(jax.lax.map(lambda u: pull(u)[0], cotangents), count=None)
    return sums / jnp.sqrt(jnp.where(weights > 0, weights, 1))[:, None]


groupings = {
    "class": jnp.zeros_like(targets),
    "class and label": targets,
    "class, shuffled label": jax.random.permutation(key, targets),
}
b_values, share, overlap = {}, {}, {}
print("share of the sum of G's 9 largest / overlap with their vectors")
print("means by              ", "  ".join(f"{when:>13}" for when in moments))
for name, groups in groupings.items():
    for when, params in moments.items():
        rows = np.asarray(means(params, groups))
        _, s, vectors = np.linalg.svd(rows, full_matrices=False)
        g = np.asarray(pairs_ggn[when].values)[:9]
        assert (s[:9] ** 2 <= 1.0001 * g).all(), "B is below G"
        case = name, when
        b_values[case] = s**2
        share[case] = (s[:9] ** 2).sum() / g.sum()
        overlap[case] = subspace_overlap(vectors[:9], matrix(pairs_ggn[when].vectors))
    cells = [f"{share[name, w]:5.2f} / {overlap[name, w]:5.3f}" for w in moments]
    print(f"{name:22}", "  ".join(cells))

figure, axes = plt.subplots(1, 3, figsize=(10, 3.4), layout="constrained")
for axis, when in zip(axes, moments, strict=True):
    for values, colour, label in (
        (pairs[when].values, GREY, "Hessian"),
        (pairs_ggn[when].values, BLUE, "G"),
        (b_values["class and label", when][:15], ORANGE, "B by class and label"),
        (b_values["class", when][:9], GREEN, "B by class"),
    ):
        places = range(1, len(values) + 1)
        axis.semilogy(places, values, ".-", color=colour, lw=0.8, label=label)
    axis.axvline(9.5, color="black", lw=0.6, ls=":")
    axis.set(title=f"{when[0].upper()}{when[1:]}", xlabel="index")
    axis.set_xticks([1, 5, 9, 13])
axes[0].set_ylabel("eigenvalue")
axes[2].set_ylim(None, 20)
axes[2].legend(frameon=False, fontsize=8, loc="upper right")

for when in moments:
    by_class = b_values["class", when]
    assert by_class[9] < 1e-5 * by_class[0], "rank 9"
    assert share["class and label", when] > 0.8
    assert min(overlap[name, when] for name in ("class", "class and label")) > 0.85
assert share["class", "before"] > 0.95
assert share["class", "after"] < 0.2
assert share["class, shuffled label", "after"] < 0.2

# %% [markdown]
# Before training the means by class are the outliers, in size and direction. After it
# they still point there but are small, and the means by class and label take over;
# shuffled labels do not do it. So the outliers are the differences between classes, and
# their number is one less than there are classes because probabilities add up to one.

# %% [markdown]
# ## Layer by layer
#
# `block_operator` keeps the other layers fixed. The traces of the blocks add up to the
# trace of the whole; their largest eigenvalues are at most the whole's.

# %%
params, operator, whole = moments["during"], hessians["during"], exact["during"]
figure, axis = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
plot_density(densities["during"], ax=axis, color=GREY, label="both", decades=4.0)
print("layer   parameters  largest           trace")
tops, traces, errors = [], [], []
for name, colour in (("first", BLUE), ("second", ORANGE)):
    block, like = block_operator(operator, name), params[name]
    size = sum(leaf.size for leaf in jax.tree.leaves(like))
    top = top_eigenpairs(key, block, like, k=1).values[0]
    estimated, error = trace(key, block, like, num_matvecs=90, method="xtrace")
    density = spectral_density(key, block, like, order=64)
    plot_density(density, ax=axis, color=colour, label=name, decades=4.0)
    print(f"{name:6}  {size:10}  {top:7.3f}  {estimated:6.2f} ± {error:.2f}")
    for column, value in zip(
        (tops, traces, errors), (top, estimated, error), strict=True
    ):
        column.append(float(value))
axis.set_title("During training (triangles: groups apart from the bulk)")
truth = f"{sum(traces):6.2f} (sum), {whole.sum():.2f} (truth)"
print(f"both    {p:10}  {whole[0]:7.3f}  {truth}")
assert max(tops) < 1.001 * whole[0]
assert abs(sum(traces) - whole.sum()) < 6 * np.hypot(*errors) + 1e-3 * whole.sum()

# %% [markdown]
# ## Followed through training
#
# Eigenvectors change little in a few steps, so those of the last look may start the
# next one. Ten pairs are followed, one more than is of interest, since what overtakes
# the last one is seen late; and the largest alone, the sharpness.

# %%
steps = np.arange(0, STEPS + 1, EVERY)
looks = [hessian_operator(loss_fn, at(step), train_rows) for step in steps]


def follow(k, warm):
    """Finds k pairs at every look, with the vectors of the last one or without."""
    found = []
    for step, operator in zip(steps, looks, strict=True):
        start = found[-1].vectors if warm and found else None
        found.append(top_eigenpairs(key, operator, at(step), k=k, start=start))
    return found


followed = {(k, warm): follow(k, warm) for k in (1, 10) for warm in (False, True)}
products = {
    case: np.array([int(pairs.num_products) for pairs in found])
    for case, found in followed.items()
}
history = np.array([pairs.values for pairs in followed[10, True]])
bases = [matrix(pairs.vectors) for pairs in followed[10, True]]
to_next = [subspace_overlap(a, b) for a, b in itertools.pairwise(bases)]
to_last = [subspace_overlap(basis, bases[-1]) for basis in bases]

figure, axes = plt.subplots(1, 3, figsize=(10, 3.4), layout="constrained")
axes[0].semilogy(steps, history[:, :9], color=BLUE, lw=1)
axes[0].semilogy(steps, history[:, 9], color=GREY, lw=1)
axes[0].set(title="First 9 eigenvalues, and the 10th", xlabel="step")
for (k, warm), counts in products.items():
    colour = BLUE if warm else GREY
    axes[1].plot(steps[1:], counts[1:], color=colour, ls="-" if k > 1 else "--")
axes[1].text(200, 50, "without start", color=GREY, ha="right")
axes[1].text(200, 45, "from the last vectors", color=BLUE, ha="right")
axes[1].set(title="Products: 10 pairs, 1 (dashed)", xlabel="step", ylim=(0, 55))
axes[2].plot(steps[1:], to_next, color=BLUE)
axes[2].plot(steps, to_last, color=ORANGE)
axes[2].set(title="Overlap of the 9 vectors", xlabel="step", ylim=(0, 1.05))
axes[2].text(60, 0.5, "with 10 steps before", color=BLUE)
axes[2].text(60, 0.4, "with the last step", color=ORANGE)

print("products             without start  from the last vectors")
late = steps > STEPS // 2
for k in (1, 10):
    for label, chosen in (("all steps", steps > 0), ("second half", late)):
        cold, warm = (products[k, start][chosen].sum() for start in (False, True))
        print(f"{k:2} pairs, {label:11}  {cold:11}  {warm:21}")
        assert warm < 0.8 * cold if k == 1 else warm > 0.8 * cold
unaided = np.array([pairs.values for pairs in followed[10, False]])
np.testing.assert_allclose(history[:, :9], unaided[:, :9], rtol=1e-2)
assert min(to_next[len(to_next) // 2 :]) > 0.9

# %% [markdown]
# In the first steps the nine directions turn, then they hardly move. Starting from the
# last vectors nearly halves the cost of the sharpness. For ten pairs, ten steps apart,
# it does not pay: a search without a start finds all ten almost as one.

# %% [markdown]
# ## In five lines
#
# `spectrum_report` does the usual things at once, for any model with a likelihood, and
# says what it spent. It is held against the truth once more.

# %%
objective = Objective(plain(apply_fn), likelihood)
report = spectrum_report(key, objective, moments["during"], train_rows, k=CLASSES)
print(report)

damped = np.log(np.maximum(ggn_values, 0) + report.damping).sum()
print(f"truth: trace {whole.sum():.2f}, log-determinant {damped:.1f}")
assert abs(report.trace - whole.sum()) < 6 * report.trace_error
assert abs(report.log_determinant - damped) < 6 * report.log_determinant_error
np.testing.assert_allclose(report.eigenpairs.values, whole[:CLASSES], rtol=1e-2)
