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
# # First steps: one dense network, made Monarch
#
# You will see a dense network trained on real digits, each of its layers replaced by
# the nearest Monarch matrix, how far away that is as the rank grows, and what a few
# epochs of fine-tuning give back. Under a minute on two CPU cores; nothing is
# downloaded (the digits come with scikit-learn).

# %%
import os

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

from jaxlab import datasets
from jaxlab.layers import monarchize
from jaxlab.likelihoods import Categorical
from jaxlab.models import mlp_m
from jaxlab.structured import monarch_project_error
from jaxlab.training import create_state, evaluate, fit, from_nnx

SMALL = bool(os.environ.get("JAXLAB_SMALL"))  # a test runs this page with few epochs
EPOCHS, TUNING_EPOCHS = (4, 1) if SMALL else (30, 5)
digits = datasets.load("digits")
print(digits.description)

# %% [markdown]
# ## Train it dense
#
# `from_nnx` splits a model into pure functions and plain arrays; `fit` keeps the data
# on the device and runs many steps in one compiled call.


# %%
def train(model, epochs, learning_rate):
    """Trains a copy of the parameters, puts them back, returns the loss per step."""
    objective, params, model_state = from_nnx(model, Categorical())
    optimizer = optax.adam(learning_rate)
    key = jax.random.key(0)
    state = create_state(key, params, optimizer, model_state=model_state)
    result = fit(
        objective,
        optimizer,
        state,
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


def size(model):
    """Counts the parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


model = mlp_m(rngs=nnx.Rngs(0))
losses = train(model, EPOCHS, 2e-3)
dense_accuracy = test_accuracy(model)
print(f"dense: {size(model):,} parameters, test accuracy {dense_accuracy:.3f}")
assert losses[-1] < 0.3 * losses[0]
assert dense_accuracy > (0.7 if SMALL else 0.95)

# %% [markdown]
# ## How far is a trained layer from Monarch?
#
# The distance to the nearest Monarch matrix has a closed form: cut the matrix into
# slices and add up the squared singular values that are left out. A matrix of
# independent normal entries of the same size is the yardstick: what training wrote
# into a layer shows as the gap between the two.

# %%
weights = [
    layer.kernel[...].T
    for _, layer in nnx.iter_modules(model)
    if isinstance(layer, nnx.Linear) and layer.out_features == 256
]
noise = jax.random.normal(jax.random.key(1), weights[-1].shape)
ranks = [1, 2, 4, 8, 16, 32, 64]


def relative_errors(matrix):
    """Gives the share of the squared norm outside the class, for each rank."""
    total = float((matrix**2).sum())
    error = jax.jit(monarch_project_error, static_argnames=("rank", *SIDES))
    return [float(error(matrix, rank=c, **SIDES)) / total for c in ranks]


SIDES = {"nblocks_in": 4, "nblocks_out": 4}
trained, random = relative_errors(weights[-1]), relative_errors(noise)
assert all(np.diff(trained) <= 0), "more rank is never worse"
assert trained[-1] < 1e-10, "slices of 64 x 64 have rank 64 at most"
assert trained[0] < random[0], "training left structure that the class can use"

figure, axis = plt.subplots(figsize=(6, 3.5), layout="constrained")
axis.plot(ranks, trained, "o-", color="#0072b2")
axis.plot(ranks, random, "o-", color="#666666")
axis.text(1.55, 0.58, "trained layer", color="#0072b2")
axis.text(8.6, random[3] + 0.04, "random matrix", color="#666666")
axis.set(xscale="log", ylim=(0, 1), xlabel="rank of each slice (4 x 4 slices)")
axis.set_xticks(ranks, [str(c) for c in ranks])
axis.minorticks_off()
axis.set_title("Squared distance to Monarch, share of the norm", loc="left", size=11)
axis.spines[["top", "right"]].set_visible(False)

# %% [markdown]
# ## Swap the layers, and tune
#
# `monarchize` returns a new model of the same function class with every linear layer
# projected. Straight after the projection it has lost much; judge it after tuning.

# %%
rows = []
for rank in (2, 8, 16):
    small = monarchize(model, nblocks=4, rank=rank)
    before = test_accuracy(small)
    train(small, TUNING_EPOCHS, 2e-3)
    rows.append((rank, size(small), before, test_accuracy(small)))
print("rank  parameters  projected  fine-tuned")
for rank, parameters, before, after in rows:
    print(f"{rank:4d}  {parameters:10,d}  {before:9.3f}  {after:10.3f}")
assert all(after > before for _, _, before, after in rows[:2])
assert size(model) > rows[-1][1] > rows[0][1]
assert rows[-1][3] > (0.7 if SMALL else 0.93)

# %% [markdown]
# With a rank of 16 the network has about half the parameters of the dense one. To use
# such layers from the start, give a model `linear=partial(MonarchLinear, nblocks=4)`.
