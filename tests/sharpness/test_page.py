"""The page of the documentation on flat minima does what it shows."""

import pathlib
import runpy

import chex
import jax
import numpy as np

ROOT = pathlib.Path(__file__).parents[2]
PAGES = runpy.run_path(str(ROOT / "tests" / "pages.py"))


def test_the_page_on_flat_minima_runs_and_keeps_the_first_pass():
    names, _ = PAGES["run"](ROOT / "docs" / "sharpness.md")
    after = names["loss_fn"](names["params"], names["x"], names["y"])
    assert after < 0.5 * names["before"]
    whole = names["value_and_grad"](names["params"], names["x"], names["y"])
    chex.assert_trees_all_close(
        (names["value"], names["grads_of_parts"]), whole, rtol=1e-4, atol=1e-6
    )
    # BatchNorm and dropout: value and statistics of one pass at the parameters, and a
    # second pass with the same key.
    rest = names["stats"], jax.random.key(1), names["x"], names["y"]
    value, stats = names["net_loss"](names["net_params"], *rest)
    np.testing.assert_allclose(names["net_value"], value, rtol=1e-5)
    chex.assert_trees_all_close(names["new_stats"], stats, rtol=1e-4, atol=1e-6)
    grad_fn = jax.grad(lambda at: names["net_loss"](at, *rest)[0])
    mixed = names["sharpness"].gnp_gradient(
        grad_fn, names["net_params"], alpha=0.8, radius=0.2
    )
    chex.assert_trees_all_close(names["net_grads"], mixed, rtol=1e-3, atol=1e-5)
    (_, other), _ = names["net_value_and_grad"](
        names["net_params"], names["stats"], jax.random.key(2), names["x"], names["y"]
    )
    chex.assert_trees_all_close(other, stats, rtol=1e-4, atol=1e-6)
