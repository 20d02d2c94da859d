"""What the measures of solutions refuse, and what NumPy may pass to them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.optimizers import (
    average_accuracy,
    class_similarity,
    continual_run,
    dead_fraction,
    effective_rank,
    feature_overlap,
    forgetting,
    hoyer_sparsity,
    interpolation_barrier,
    linear_cka,
    match_units,
    near_zero_fraction,
    participation_ratio,
    powerprop,
    powerprop_init,
    prediction_disagreement,
    scale_by_power,
    stable_rank,
    train_to_loss,
)

pytestmark = pytest.mark.untyped

KEY = jax.random.key(0)
X = jnp.arange(12.0).reshape(4, 3)
RANKS = [effective_rank, stable_rank, participation_ratio, dead_fraction]
PAIRS = [linear_cka, lambda a, b: feature_overlap(a, b, k=1), match_units]
NOT_MATRICES = (jnp.ones(3), jnp.ones((2, 2, 2)), jnp.ones((0, 3)), X.astype(int), 1.0)


@pytest.mark.parametrize("function", RANKS, ids=lambda f: f.__name__)
def test_features_are_floating_matrices(function):
    message = f"{function.__name__}: features must be a floating matrix with one row"
    for wrong in NOT_MATRICES:
        with pytest.raises(ValueError, match=message):
            function(wrong)


@pytest.mark.parametrize("function", PAIRS, ids=["cka", "overlap", "match"])
def test_pairs_of_features(function):
    for wrong in NOT_MATRICES:
        with pytest.raises(ValueError, match="one must be a floating matrix with one"):
            function(wrong, X)
        with pytest.raises(ValueError, match="two must be a floating matrix with one"):
            function(X, wrong)


def test_pairs_of_features_fit_together():
    for function in (linear_cka, match_units):
        message = f"{function.__name__}: one and two must have equally many rows, got 4"
        with pytest.raises(ValueError, match=message):
            function(X, X[:2])
    message = "equally many columns, got 3 and 2"
    with pytest.raises(ValueError, match=f"match_units: one and two .* {message}"):
        match_units(X, X[:, :2])
    with pytest.raises(ValueError, match=f"feature_overlap: one and two .* {message}"):
        feature_overlap(X, X[:, :2], k=1)
    for k in (0, -1, 4, 2.0, True, None, jnp.int32(1)):
        with pytest.raises(ValueError, match="k must be an integer from 1 to 3"):
            feature_overlap(X, X, k=k)


def test_classes_are_integers():
    labels = jnp.array([0, 1, 0, 1])
    for wrong in (labels[:3], labels[:, None], labels.astype(float)):
        with pytest.raises(
            ValueError, match=r"labels must be integers of shape \(4,\)"
        ):
            class_similarity(X, wrong, num_classes=2)
    for number in (0, 1, 2.0, True, None):
        with pytest.raises(ValueError, match="num_classes must be an integer >= 2"):
            class_similarity(X, labels, num_classes=number)
    with pytest.raises(ValueError, match="class_similarity: features must be a"):
        class_similarity(X[0], labels, num_classes=2)


def test_sparsity_needs_floating_entries():
    for function in (hoyer_sparsity, near_zero_fraction):
        name = function.__name__
        with pytest.raises(ValueError, match=rf"{name}: .* got int32 at tree\['n'\]"):
            function({"w": X, "n": jnp.arange(2)})
        with pytest.raises(ValueError, match=f"{name}: tree has no entries"):
            function({})
    with pytest.raises(ValueError, match="must have at least two entries, got one"):
        hoyer_sparsity(jnp.ones(1))
    for tolerance in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="tolerance must be >= 0, got"):
            near_zero_fraction(X, tolerance=tolerance)


def test_predictions_have_one_shape():
    for one, two in ((X, X[:2]), (X, X[0]), (1.0, 1.0), (X[:, :0], X[:, :0])):
        with pytest.raises(
            ValueError, match=r"must have the same shape \(\.\.\., class"
        ):
            prediction_disagreement(one, two)
    with pytest.raises(ValueError, match="one entry per row"):
        prediction_disagreement(X, X, weights=jnp.ones(3))


def test_segments_join_two_of_a_kind():
    loss = lambda p: jnp.sum(p["w"])
    start = {"w": jnp.ones(2)}
    for end in ({"w": jnp.ones(3)}, {"v": jnp.ones(2)}, {"w": start}):
        with pytest.raises(ValueError, match="start and end must be alike, got"):
            interpolation_barrier(loss, start, end)
    with pytest.raises(ValueError, match=r"got int32 at end\['w'\]"):
        interpolation_barrier(loss, start, {"w": jnp.arange(2)})
    with pytest.raises(ValueError, match="interpolation_barrier: start has no entries"):
        interpolation_barrier(loss, {}, {})
    for points in (2, 0, -1, 5.0, True, None):
        with pytest.raises(ValueError, match="points must be an integer >= 3, got"):
            interpolation_barrier(loss, start, start, points=points)
    for wrong in (lambda p: p["w"], lambda p: jnp.sum(p["w"] > 0)):
        with pytest.raises(ValueError, match="loss_fn must give one floating scalar"):
            interpolation_barrier(wrong, start, start)


@pytest.mark.parametrize("alpha", [0.9, 0, -2, float("nan"), float("inf")])
def test_powers_are_at_least_one(alpha):
    for make in (powerprop, powerprop_init):
        message = f"{make.__name__}: alpha must be finite and >= 1, got {alpha}"
        with pytest.raises(ValueError, match=message):
            make(X, alpha=alpha)
    with pytest.raises(ValueError, match="scale_by_power: alpha must be finite and"):
        scale_by_power(alpha)


def test_powers_of_trees():
    for make in (powerprop, powerprop_init):
        with pytest.raises(
            ValueError, match=rf"{make.__name__}: .* int32 at params\['"
        ):
            make({"n": jnp.arange(2)}, alpha=2)
        with pytest.raises(ValueError, match=f"{make.__name__}: params has no entries"):
            make({}, alpha=2)
        with pytest.raises(
            ValueError, match=r"alpha must be a single real number.* float32\[2\]"
        ):
            make(X, alpha=jnp.ones(2))
    tx = scale_by_power(2.0)
    with pytest.raises(ValueError, match=r"scale_by_power needs params: call update\("):
        tx.update(X, tx.init(X))
    with pytest.raises(ValueError, match=r"got int32 at params\['n'\]"):
        tx.init({"n": jnp.arange(2)})


def trained(key=KEY, data=X, **options):
    options = {
        "loss_fn": jnp.abs,
        "target": 0.1,
        "max_steps": 4,
        "batch_size": 2,
    } | options
    return train_to_loss(key, lambda w, b: (0.5 * w, None), 1.0, data, **options)


def tasks_run(key=KEY, tasks=(X, X), **options):
    options = {"steps": 2, "batch_size": 2} | options
    return continual_run(
        key,
        lambda w, b: (0.5 * w, None),
        1.0,
        tasks,
        accuracy_fn=lambda w, x: w * x.mean(),
        **options,
    )


@pytest.mark.parametrize(
    ("run", "word"),
    [
        (trained, "max_steps"),
        (trained, "batch_size"),
        (trained, "check_every"),
        (tasks_run, "steps"),
        (tasks_run, "batch_size"),
    ],
    ids=["max_steps", "batch_size", "check_every", "steps", "batch of tasks"],
)
def test_runs_count(run, word):
    for count in (0, -1, 2.0, True, None):
        with pytest.raises(ValueError, match=f"{word} must be an integer >= 1, got"):
            run(**{word: count})


@pytest.mark.parametrize("run", [trained, tasks_run], ids=["to loss", "tasks"])
def test_runs_have_typed_keys(run):
    for key in (3, jnp.zeros(2, jnp.uint32), jax.random.split(KEY, 2)):
        with pytest.raises(ValueError, match="key must be one typed key such as"):
            run(key=key)


def test_runs_have_rows_and_scalar_losses():
    for data in (X[:0], (X, X[:1]), jnp.ones(())):
        with pytest.raises(ValueError, match="train_to_loss: every array of a batch"):
            trained(data=data)
    for wrong in (lambda w: jnp.ones(2), lambda w: 1):
        with pytest.raises(ValueError, match="loss_fn must give one floating scalar"):
            trained(loss_fn=wrong)


def test_tasks_are_alike():
    for wrong in ([], X, {"a": X}, None):
        with pytest.raises(ValueError, match="tasks must be a list with the data of"):
            tasks_run(tasks=wrong)
    with pytest.raises(ValueError, match="got list without entries"):
        tasks_run(tasks=[])
    with pytest.raises(ValueError, match="all of tasks must have equally many rows"):
        tasks_run(tasks=[X, X[:2]])
    with pytest.raises(ValueError, match="all batches need the same tree"):
        tasks_run(tasks=[X, X[:, :2]])
    with pytest.raises(ValueError, match="continual_run: every array of a batch needs"):
        tasks_run(tasks=[X[:0]])
    with pytest.raises(ValueError, match="one entry for each of the 2 tasks, got 1"):
        tasks_run(test_tasks=[X])
    with pytest.raises(ValueError, match="all of test_tasks must have equally many"):
        tasks_run(test_tasks=[X, X[:1]])


def test_accuracies_are_square():
    for function in (average_accuracy, forgetting):
        name = function.__name__
        for wrong in (jnp.ones(2), jnp.ones((2, 3)), jnp.ones((0, 0)), 1.0):
            with pytest.raises(
                ValueError, match=f"{name}: accuracies must be a square"
            ):
                function(wrong)
    with pytest.raises(ValueError, match="accuracies must be of two tasks at least"):
        forgetting(jnp.ones((1, 1)))


def test_numpy_arrays_and_python_numbers_are_welcome():
    x = np.asarray(X)
    for function in RANKS:
        np.testing.assert_array_equal(function(x), function(X))
    for function in PAIRS:
        np.testing.assert_array_equal(function(x, x), function(X, X))
    labels = np.array([0, 1, 0, 1])
    assert class_similarity(x, labels, num_classes=np.int64(2)) > 0
    assert hoyer_sparsity({"w": x, "b": 1.0}) > 0
    assert prediction_disagreement(x, x) == 0
    assert interpolation_barrier(jnp.sum, x, x, points=np.int64(3)).barrier == 0
    assert float(powerprop(2.0, alpha=np.float32(2))) == 4.0
    tx = scale_by_power(np.float64(2))
    np.testing.assert_array_equal(tx.update(x, tx.init(x), x)[0], 4 * x**2)
    assert trained(data=x, max_steps=np.int64(9)).reached
    assert tasks_run(tasks=(x, x)).accuracies.shape == (2, 2)
    assert forgetting(np.eye(2)) == 1
