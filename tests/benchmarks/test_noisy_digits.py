"""Digits with wrong labels: rows, batches, measures, and the optimizers run on them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import flat_nets, noisy_digits
from benchmarks.flat_nets import Method, Place

MLP = noisy_digits.net("MLP-S")


def test_a_fifth_of_the_training_labels_is_wrong_and_no_other():
    clean, noisy = (noisy_digits.splits(0, share=share) for share in (0.0, 0.2))
    assert not clean.wrong.any()
    assert int(noisy.wrong.sum()) == round(0.2 * noisy_digits.TRAIN)
    np.testing.assert_array_equal(noisy.wrong, noisy.train[1] != clean.train[1])
    for part in ("validation", "test"):
        assert all(map(np.array_equal, getattr(clean, part), getattr(noisy, part)))
    assert not np.array_equal(noisy.wrong, noisy_digits.splits(1).wrong)
    # Wrong labels fall on all nine others.
    away = (np.asarray(noisy.train[1]) - np.asarray(clean.train[1]))[noisy.wrong] % 10
    assert set(away.tolist()) == set(range(1, 10))


def test_batches_see_each_row_at_most_once_an_epoch():
    index = noisy_digits.batches(jax.random.key(0), rows=13, batch_size=3, steps=9)
    epochs = np.asarray(index)[:8].reshape(2, 12)
    for rows in epochs:
        assert len(set(rows.tolist())) == 12
    assert not np.array_equal(*epochs)


def test_calibration_error_by_hand():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(4), 200).astype(np.float32)
    labels = rng.integers(0, 4, 200)
    expected = 0.0
    top, right = probabilities.max(1), probabilities.argmax(1) == labels
    for low in range(noisy_digits.BINS):
        inside = (top > low / noisy_digits.BINS) & (
            top <= (low + 1) / noisy_digits.BINS
        )
        if inside.any():
            expected += inside.mean() * abs(top[inside].mean() - right[inside].mean())
    found = noisy_digits.calibration_error(jnp.asarray(probabilities), labels)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def trained(make, numbers, steps=5):
    place = Place(MLP, steps, 64)
    return place.trained(Method(make, {}), numbers, seed=0)[0]


def test_training_is_that_of_a_plain_loop():
    data = noisy_digits.splits(0)
    start, order = jax.random.split(jax.random.key(0))
    index = noisy_digits.batches(order, rows=noisy_digits.TRAIN, batch_size=64, steps=5)
    optimizer = optax.sgd(optax.cosine_decay_schedule(0.1, 5), momentum=0.9)
    slope = jax.jit(jax.grad(MLP.loss_fn))
    params = MLP.start(start)
    state = optimizer.init(params)
    for rows in index:
        batch = data.train[0][rows], data.train[1][rows]
        grads = slope(params, batch)
        grads = jax.tree.map(lambda g, p: g + 0.01 * p, grads, params)
        updates, state = optimizer.update(grads, state)
        params = optax.apply_updates(params, updates)
    found = trained(flat_nets.plain, {"rate": 0.1, "decay": 0.01})
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, params
    )


def test_penalties_change_the_run_and_small_ones_agree_with_the_exact():
    apart = lambda a, b: float(optax.tree.norm(optax.tree.sub(a, b)))
    numbers = {"rate": 0.1, "penalty": 0.02}
    plain = trained(flat_nets.plain, {"rate": 0.1, "decay": 0.0})
    exact = trained(flat_nets.exact, numbers)
    short = trained(flat_nets.penalised, numbers | {"decay": 0.0, "alpha": 200.0})
    assert apart(exact, plain) > 1e-3
    assert apart(exact, short) < 0.05 * apart(exact, plain)


def test_early_stopping_keeps_the_best_epoch():
    numbers = {"rate": 0.1, "decay": 0.0}
    data = noisy_digits.splits(0)
    sizes = {"steps": 64, "batch_size": 64}
    found = noisy_digits.train(
        MLP, flat_nets.plain(64), numbers, jax.random.key(0), data, **sizes
    )
    accuracies = [
        noisy_digits.quality(MLP, params, data)["validation accuracy"]
        for params in (found.best, found.params)
    ]
    assert accuracies[0] >= accuracies[1]
    # Four epochs that end at rate zero: the best is one of them, not the start.
    assert accuracies[0] > 0.7


@pytest.mark.parametrize("early", [False, True])
def test_numbers_are_chosen_by_validation(early):
    grid = {"rate": (1e-4, 0.1), "decay": (0.0,)}
    place = Place(MLP, 32, 64)
    numbers, tried = place.tuned(Method(flat_nets.plain, grid, early), seeds=1)
    assert numbers == {"rate": 0.1, "decay": 0.0}
    assert [pair[0]["rate"] for pair in tried] == [1e-4, 0.1]
    assert tried[0][1][0] < 0.5 < tried[1][1][0]
