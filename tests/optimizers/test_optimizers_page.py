"""The page of the documentation on optimizers does what it shows."""

import pathlib
import runpy

import jax
import jax.numpy as jnp
import optax

from jaxlab.optimizers import FishLegState

ROOT = pathlib.Path(__file__).parents[2]
PAGES = runpy.run_path(str(ROOT / "tests" / "pages.py"))


def test_the_page_runs_and_learns():
    names, _ = PAGES["run"](ROOT / "docs" / "optimizers.md")
    floor = jnp.log(2 * jnp.pi)  # of the loss: two outputs of scale one
    after = names["loss_fn"](names["params"], names["x"], names["y"]) - floor
    assert after < 0.1 * (names["before"] - floor)
    assert "hidden/kernel + hidden/bias  kronecker" in names["table"]
    assert "full" in names["whole"]
    assert 0.3 < names["fit"].eff <= 1
    assert jax.tree.structure(names["natural"]) == jax.tree.structure(names["params"])
    state = names["paper"].init(names["params"])
    (ours,) = [s for s in state if isinstance(s, FishLegState)]
    assert optax.tree.norm(ours.auxiliary[0].mu) == 0
    assert 0 < names["coherence"].m_coherence < 1  # trained: they cancel
    moved = optax.tree.norm(names["robust"])
    assert 0 < moved < jnp.inf
    start, metrics = names["start"], names["metrics"]
    assert jax.tree.structure(names["state"].params) == jax.tree.structure(start)
    assert bool(metrics.tuned)
    assert float(metrics.train_loss) < 0.5
    assert 0 < names["found"]["dropout"] < 0.9
    losses = names["log_loss"]
    assert losses.loss < losses.members.mean()
    assert 0 <= names["off"] < 0.2
    plain_run, sparse_run = names["plain_run"], names["sparse_run"]
    assert bool(plain_run.reached)
    assert bool(sparse_run.reached)
    assert names["sparsity"][1] > names["sparsity"][0] + 0.3
