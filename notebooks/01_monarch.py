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
# # From a dense matrix to Monarch
#
# You will see what a Monarch matrix is, how far other matrices are from the class, the
# FFT as a Monarch product, dense layers swapped inside a trained network, and how fast
# the product is. Under two minutes on two CPU cores; an accelerator is not needed, and
# nothing is downloaded (the digits come with scikit-learn).
#
# Reference: Dao et al., "Monarch: Expressive Structured Matrices for Efficient and
# Accurate Training", ICML 2022.

# %%
import os
import time
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import scipy.linalg
from flax import nnx

from jaxlab import datasets
from jaxlab.layers import MonarchLinear, monarchize
from jaxlab.likelihoods import Categorical
from jaxlab.models import mlp_m
from jaxlab.structured import (
    circulant_factors,
    dft_factors,
    hadamard_factors,
    init_monarch,
    mmstar_matmul,
    monarch_matmul,
    monarch_project_error,
    monarch_to_dense,
)
from jaxlab.training import create_state, evaluate, fit, from_nnx

SMALL = bool(os.environ.get("JAXLAB_SMALL"))  # a test runs this page with few epochs
EPOCHS, TUNING_EPOCHS = (4, 1) if SMALL else (30, 5)
ROUNDS = 40  # of timing
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
# ## The structure: slices of low rank
#
# Two factors hold the parameters: `w1` with k blocks next to the input, `w2` with l
# blocks next to the output. The product is a batched product, a shuffle, and another
# batched product. Seen as a matrix of m rows and n columns: cut the columns into k runs
# of neighbours, and deal the rows like cards, every l-th into the same hand. Each of
# the k x l slices, m/l by n/k, has rank c at most. Nothing else is asked.
#
# Here m = n = 32, k = l = 4 and c = 2. The slices have rank 2, yet the matrix has full
# rank; the product of two thin matrices with as many parameters has rank 8.


# %%
def slices_of(matrix, k, l):
    """Cuts a matrix (m, n) into its slices, (l, k, m/l, n/k)."""
    m, n = matrix.shape
    return matrix.reshape(m // l, l, k, n // k).transpose(1, 2, 0, 3)


n, k, c = 32, 4, 2
w1, w2 = init_monarch(jax.random.key(3), n, n, nblocks=k, rank=c)
matrix = np.asarray(monarch_to_dense(w1, w2))
slices = slices_of(matrix, k, k)
x = jax.random.normal(jax.random.key(1), (5, n))
np.testing.assert_allclose(monarch_matmul(x, w1, w2), x @ matrix.T, atol=1e-5)
assert (np.linalg.matrix_rank(slices) == c).all()
assert np.linalg.matrix_rank(matrix) == n
thin_rank = (w1.size + w2.size) // (2 * n)
assert thin_rank == 8
print(f"w1 {w1.shape}, w2 {w2.shape}: {w1.size + w2.size} parameters, dense {n * n}")

of_matrix, of_slices = (np.linalg.svd(a, compute_uv=False) for a in (matrix, slices))
grouped = slices.transpose(0, 2, 1, 3).reshape(n, n)
figure, axes = plt.subplots(1, 3, figsize=(10, 3.4), layout="constrained")
for axis, values, title in zip(
    axes, (matrix, grouped), ("The matrix", "Its rows dealt into 4 hands"), strict=False
):
    limit = np.abs(values).max()
    axis.imshow(values, cmap="RdBu", vmin=-limit, vmax=limit)
    axis.set(title=title, xlabel="column", ylabel="row")
axes[1].set_ylabel("hand")
axes[1].set_yticks(np.arange(k) * (n // k) + 3.5, [f"{hand}" for hand in range(k)])
axes[1].tick_params(axis="y", length=0)
for edge in np.arange(1, k) * (n // k) - 0.5:
    axes[1].axhline(edge, color="black", lw=0.8)
    axes[1].axvline(edge, color="black", lw=0.8)
floor = 1e-8  # far below the rounding of float32
axes[2].set(title="Singular values", xlabel="index", ylim=(floor, 10))
axes[2].text(13, 2.0, "the matrix: rank 32", color=GREY)
axes[2].text(9, 1e-7, "its 16 slices: rank 2", color=BLUE)
axes[2].semilogy(range(1, n + 1), of_matrix, ".-", color=GREY)
for sigma in of_slices.reshape(k * k, -1):
    axes[2].semilogy(range(1, 9), np.maximum(sigma, floor), ".-", color=BLUE, lw=0.7)

# %% [markdown]
# ## The nearest Monarch matrix
#
# The nearest Monarch matrix has a closed form: the truncated SVD of every slice. Its
# squared distance is the sum of the squared singular values left out. More blocks mean
# smaller slices; at c = n / b**2, with b = k = l blocks, the middle is as wide as the
# ends, and 2 / b of the dense parameters remain. The yardstick is the truncated SVD of
# the whole matrix at the same number of parameters: rank b c.
#
# First a network whose weights have learned something.

# %%
digits = datasets.load("digits")
rows_of_test = len(digits.splits["test"][1])


def train(model, epochs, learning_rate=2e-3):
    """Trains a model in place and returns the loss of each step."""
    objective, params, model_state = from_nnx(model, Categorical())
    optimizer = optax.adam(learning_rate)
    key = jax.random.key(0)
    result = fit(
        objective,
        optimizer,
        create_state(key, params, optimizer, model_state=model_state),
        digits.splits["train"],
        epochs=epochs,
        batch_size=128,
        progress=False,
    )
    nnx.update(model, result.state.params)
    return result.history["loss"]


def test_accuracy(model):
    """Gives the share of test digits that the model names rightly."""
    objective, params, model_state = from_nnx(model, Categorical())
    return evaluate(objective, params, model_state, digits.splits["test"])["accuracy"]


dense = mlp_m(rngs=nnx.Rngs(0))
losses = train(dense, EPOCHS)
dense_accuracy = test_accuracy(dense)
print(f"{rows_of_test} test digits, dense accuracy {dense_accuracy:.3f}")
assert losses[-1] < 0.3 * losses[0]
assert dense_accuracy > (0.7 if SMALL else 0.95)


# %%
def monarch_curve(matrix, b):
    """Gives shares of the parameters and of the squared norm left out, by rank."""
    n = len(matrix)
    total = float(jnp.sum(matrix**2))
    ranks = [2**i for i in range(10) if 2 * b * 2**i <= n]
    distance = partial(monarch_project_error, nblocks_in=b, nblocks_out=b)
    left = [float(distance(matrix, rank=c)) / total for c in ranks]
    return np.array(ranks) * 2 * b / n, np.array(left)


def low_rank_curve(matrix):
    """Gives the same for the truncated SVD."""
    n = len(matrix)
    energy = np.linalg.svd(matrix, compute_uv=False) ** 2
    ranks = np.array([2**i for i in range(10) if 2 * 2**i <= n])
    return ranks * 2 / n, np.array([energy[r:].sum() for r in ranks]) / energy.sum()


n = 256
member = monarch_to_dense(*init_monarch(jax.random.key(2), n, n, nblocks=8, rank=2))
matrices = {
    "random": jax.random.normal(jax.random.key(3), (n, n)),
    "trained (second layer)": dense.layers[1].kernel[...].T,
    "in the class of 8 blocks, rank 2": member,
}
curves = {
    name: {b: monarch_curve(matrix, b) for b in (4, 8, 16)}
    for name, matrix in matrices.items()
}
svds = {name: low_rank_curve(np.asarray(a)) for name, a in matrices.items()}

figure, axes = plt.subplots(1, 3, figsize=(10, 3.6), sharey=True, layout="constrained")
for axis, name in zip(axes, matrices, strict=True):
    axis.plot(*svds[name], "s--", color=GREY, ms=4, label="low rank (SVD)")
    for (b, curve), colour in zip(
        curves[name].items(), (BLUE, ORANGE, GREEN), strict=True
    ):
        axis.plot(*curve, "o-", color=colour, ms=4, label=f"Monarch, {b} blocks")
    axis.set_xscale("log", base=2)
    axis.set_xticks([1 / 64, 1 / 16, 1 / 4, 1], ["1/64", "1/16", "1/4", "1"])
    axis.set(title=name[0].upper() + name[1:], xlabel="parameters / dense", ylim=(0, 1))
axes[0].set_ylabel("squared distance / squared norm")
axes[0].legend(frameon=False, loc="lower left")

for name in matrices:
    for _, left in [*curves[name].values(), svds[name]]:
        assert (np.diff(left) <= 1e-6).all(), "more rank is never worse"
quarter = {
    name: [left[shares == 1 / 4][0] for shares, left in (*found.values(), svds[name])]
    for name, found in curves.items()
}
print("left out at 1/4 of the parameters:  4, 8, 16 blocks, low rank")
for name, left in quarter.items():
    print(f"{name:34}", "  ".join(f"{share:.3f}" for share in left))
random, trained, in_class = quarter.values()
assert np.ptp(random) < 0.02
assert trained[3] < trained[0] < trained[1] < trained[2] < min(random)
assert max(in_class[:3]) < 1e-8
assert in_class[3] > 0.3
shares, left = curves[name][8]  # the last matrix, in the class of 8 blocks
assert left[shares == 1 / 8] < 1e-8
shares, left = svds[name]
assert left[shares == 1 / 2] > 0.1
assert left[shares == 1] < 1e-8

# %% [markdown]
# A random matrix has no structure to find: all classes leave out the same. Training
# moved the layer towards every class, most towards low rank, so among the projections
# low rank is the nearest (what that means for accuracy is seen below). A matrix of the
# class is found exactly, at 1/8 of the parameters with its own blocks and at 1/4 with
# half or twice as many; low rank needs as many parameters as the dense matrix.

# %% [markdown]
# ## The FFT is a Monarch product
#
# The Fourier matrix F itself is far from the class: its 8 x 8 slices are Fourier
# matrices with phases, whose singular values are all equal, so 7/8 of the squared norm
# is left out. With its columns permuted it is a member, with slices of rank 1: that is
# one step of Cooley and Tukey's algorithm. Hadamard matrices are members as they are.

# %%
n, k = 64, 8
permutation, w1, w2 = dft_factors(n, nblocks=k)
fourier = np.fft.fft(np.eye(n), norm="ortho").astype(np.complex64)
signal = jax.random.normal(jax.random.key(4), (3, n))
spectrum = monarch_matmul(signal[:, permutation], w1, w2)
np.testing.assert_allclose(spectrum, jnp.fft.fft(signal, norm="ortho"), atol=1e-5)

distance = partial(monarch_project_error, nblocks_in=k, nblocks_out=k)
as_it_is = float(distance(fourier)) / n
permuted = float(distance(fourier[:, permutation])) / n
print(f"left out of F: {as_it_is:.4f}, with its columns permuted: {permuted:.1e}")
assert abs(as_it_is - 7 / 8) < 1e-4
assert permuted < 1e-8
assert (np.linalg.matrix_rank(slices_of(fourier, k, k)) == k).all()
assert (np.linalg.matrix_rank(slices_of(fourier[:, permutation], k, k)) == 1).all()

hadamard = monarch_to_dense(*hadamard_factors(n, nblocks=k))
np.testing.assert_allclose(hadamard, scipy.linalg.hadamard(n) / 8, atol=1e-6)

lengths = [4**i for i in range(2, 7)]
monarch_cost = [
    sum(factor.size for factor in dft_factors(n, nblocks=2**i)[1:])
    for i, n in zip(range(2, 7), lengths, strict=True)
]
assert monarch_cost == [2 * round(n**1.5) for n in lengths]

figure, axes = plt.subplots(1, 3, figsize=(10, 3.4), layout="constrained")
for axis, values, title in zip(
    axes,
    (fourier, fourier[:, permutation]),
    ("F, rows by hand (real part)", "Its columns permuted"),
    strict=False,
):
    grouped = slices_of(values.real, k, k).transpose(0, 2, 1, 3).reshape(n, n)
    axis.imshow(grouped, cmap="RdBu")
    axis.set(title=title, xlabel="column", ylabel="hand")
    axis.set_yticks(np.arange(k) * (n // k) + 3.5, [f"{hand}" for hand in range(k)])
    axis.tick_params(axis="y", length=0)
    for edge in np.arange(1, k) * (n // k) - 0.5:
        axis.axhline(edge, color="black", lw=0.6)
        axis.axvline(edge, color="black", lw=0.6)
for label, costs, colour in (
    ("dense", [n**2 for n in lengths], GREY),
    ("Monarch", monarch_cost, BLUE),
    ("n log2(n)", [n * np.log2(n) for n in lengths], ORANGE),
):
    axes[2].loglog(lengths, costs, "o-", color=colour)
    axes[2].text(1.4 * lengths[-1], costs[-1], label, color=colour, va="center")
axes[2].set(title="Multiplications a row", xlabel="n", xlim=(10, 60 * lengths[-1]))
axes[2].set_xticks(lengths[::2], [str(n) for n in lengths[::2]])
axes[2].minorticks_off()

# %% [markdown]
# A circulant matrix, that is a circular convolution, is no Monarch matrix, but one
# Monarch matrix times an adjoint one (the class MM*): transform, scale, transform back.


# %%
n = 64
column = jax.random.normal(jax.random.key(5), (n,))
circulant = scipy.linalg.circulant(column)
factors = circulant_factors(column)
convolved = mmstar_matmul(signal, factors)
np.testing.assert_allclose(convolved.real, signal @ circulant.T, atol=1e-4)
np.testing.assert_allclose(convolved.imag, 0, atol=1e-4)
alone = float(distance(circulant)) / (circulant**2).sum()
numbers = sum(factor.size for factor in factors[:3])
print(f"left out by one Monarch matrix: {alone:.2f}; by MM*, {numbers} numbers: 0")
assert alone > 0.3
assert numbers < n * n

# %% [markdown]
# ## Layers swapped inside a network
#
# The two hidden layers of the trained network, 64 x 256 and 256 x 256, are replaced by
# their nearest Monarch matrices with 4 blocks and rank 2, or by their truncated SVDs of
# rank 8, which have exactly as many parameters. Both are then tuned, and so is one more
# network, with such Monarch layers and no training before.


# %%
class LowRank(nnx.Module):
    """A linear layer's truncated SVD."""

    def __init__(self, layer, rank):
        u, s, vt = jnp.linalg.svd(layer.kernel[...], full_matrices=False)
        root = jnp.sqrt(s[:rank])
        self.first = nnx.Param(u[:, :rank] * root[None])
        self.second = nnx.Param(root[:, None] * vt[:rank])
        self.bias = nnx.Param(layer.bias[...])

    def __call__(self, x):
        return x @ self.first[...] @ self.second[...] + self.bias[...][None]


def hidden_monarch(n, m, *, rngs):
    """Makes a Monarch layer where the network's width is 256, a dense one elsewhere."""
    if m == 256:
        return MonarchLinear(n, m, nblocks=4, rank=2, rngs=rngs)
    return nnx.Linear(n, m, rngs=rngs)


def size(model):
    """Counts the parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


hidden = lambda path, layer: layer.out_features == 256
low_rank = nnx.clone(dense)
for index in (0, 1):
    low_rank.layers[index] = LowRank(dense.layers[index], rank=8)
networks = {
    "Monarch, projected": monarchize(dense, hidden, nblocks=4, rank=2),
    "low rank, projected": low_rank,
    "Monarch, random": mlp_m(linear=hidden_monarch, rngs=nnx.Rngs(1)),
}
accuracies = {}
for name, network in networks.items():
    before = test_accuracy(network)
    train(network, TUNING_EPOCHS)
    accuracies[name] = before, test_accuracy(network)

print(f"{'':20} parameters  accuracy  epochs of tuning: {TUNING_EPOCHS}")
print(f"{'dense':20} {size(dense):10,}  {dense_accuracy:8.3f}")
for name, (before, after) in accuracies.items():
    print(f"{name:20} {size(networks[name]):10,}  {before:8.3f}  {after:.3f}")
assert len({size(network) for network in networks.values()}) == 1
assert size(networks["Monarch, projected"]) < size(dense) / 8
before, after = zip(*accuracies.values(), strict=True)
assert before[1] > before[0] > before[2], "the nearer projection starts higher"
assert all(np.array(after) > np.array(before))
assert min(after) > dense_accuracy - (0.5 if SMALL else 0.1)

# %%
figure, axis = plt.subplots(figsize=(7, 2.4), layout="constrained")
for height, (before, after) in enumerate(accuracies.values()):
    axis.annotate(
        "",
        (after, height),
        (before, height),
        arrowprops={"arrowstyle": "->", "color": BLUE, "shrinkA": 5, "shrinkB": 5},
    )
    axis.plot(before, height, "o", color=BLUE, mfc="white")
    axis.plot(after, height, "o", color=BLUE)
axis.axvline(dense_accuracy, color=GREY, ls="--", lw=1)
axis.text(dense_accuracy - 0.01, 2.55, "dense", color=GREY, ha="right")
axis.set(xlim=(0, 1), ylim=(2.8, -0.5), xlabel="test accuracy (open: before tuning)")
axis.set_yticks(range(3), list(accuracies))
axis.tick_params(axis="y", length=0)

# %% [markdown]
# Low rank, the nearer projection, starts higher; tuning brings all three close to the
# dense network at a ninth of its parameters. Judge a projection after tuning. Digits do
# not rank the structures: with 250 test digits the standard error is above 1 %, and
# such an image is easy for any of them. To have Monarch layers from the start, give a
# model a `linear=` factory as above.

# %% [markdown]
# ## Speed
#
# A square Monarch product with b blocks in each factor has 2 / b of the dense product's
# operations, which the compiler confirms. Time follows less closely, because the
# batched products are small and the shuffle costs memory traffic. Calls are compiled
# first, wait for their results, and alternate, so that whatever else the machine does
# meets all of them alike. The dense product runs twice: the gap between the two is
# noise, and a difference of that size is no result. One run on one machine; the
# repository's benchmarks measure on a core of their own.


# %%
def alternate(calls, rounds):
    """Times calls in turn, backwards every other round; milliseconds by name."""
    samples = {name: [] for name in calls}
    for call in calls.values():
        jax.block_until_ready(call())
    for index in range(rounds):
        for name in list(calls)[:: 1 if index % 2 else -1]:
            start = time.perf_counter()
            jax.block_until_ready(calls[name]())
            samples[name].append(1e3 * (time.perf_counter() - start))
    return samples


n, tokens = 1024, 256
x = jax.random.normal(jax.random.key(6), (tokens, n))
of = {b: init_monarch(jax.random.key(b), n, n, nblocks=b) for b in (4, 32)}
written_out = {b: monarch_to_dense(*factors).T for b, factors in of.items()}
compiled = {"dense": jax.jit(jnp.matmul).lower(x, written_out[4]).compile()}
for b, factors in of.items():
    product = jax.jit(monarch_matmul).lower(x, *factors).compile()
    compiled[f"{b} blocks"] = product
    np.testing.assert_allclose(product(x, *factors), x @ written_out[b], atol=1e-4)
calls = {
    "dense": partial(compiled["dense"], x, written_out[4]),
    "dense again": partial(compiled["dense"], x, written_out[4]),
    "4 blocks": partial(compiled["4 blocks"], x, *of[4]),
    "32 blocks": partial(compiled["32 blocks"], x, *of[32]),
}
operations = {name: f.cost_analysis()["flops"] for name, f in compiled.items()}
samples = alternate(calls, ROUNDS)

print(f"{'':12} MFLOP  least ms  median ms  dense / this, round by round")
for name, times in samples.items():
    ratios = np.divide(samples["dense"], times)
    lower, middle, upper = np.quantile(ratios, [0.25, 0.5, 0.75])
    mega = operations[name.removesuffix(" again")] / 1e6
    print(
        f"{name:12} {mega:5.0f}  {min(times):8.2f}  {np.median(times):9.2f}  "
        f"{middle:.2f} [{lower:.2f}, {upper:.2f}]"
    )
for b in of:
    share = operations[f"{b} blocks"] / operations["dense"]
    assert abs(share - 2 / b) < 0.01 * 2 / b
    # Wide enough for a busy machine, and for one where small products gain nothing.
    assert min(samples[f"{b} blocks"]) < 3 * min(samples["dense"])

figure, axis = plt.subplots(figsize=(7, 2.6), layout="constrained")
for height, (name, times) in enumerate(samples.items()):
    colour = GREY if name.startswith("dense") else BLUE
    axis.plot(times, [height] * len(times), "|", color=colour, ms=12, alpha=0.5)
    axis.plot(min(times), height, "o", color=colour)
axis.set(xscale="log", ylim=(3.6, -0.6), xlabel="milliseconds (dot: the least)")
axis.set_title(f"{tokens} x {n} times {n} x {n}, {ROUNDS} calls each")
axis.set_yticks(range(4), list(samples))
axis.tick_params(axis="y", length=0)
ticks = [
    x
    for e in range(-3, 4)
    for x in (10.0**e, 2 * 10.0**e, 5 * 10.0**e)
    if min(map(min, samples.values())) / 2 < x < 2 * max(map(max, samples.values()))
]
axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
axis.minorticks_off()
