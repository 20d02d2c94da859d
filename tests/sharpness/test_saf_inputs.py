"""What SAF and MESA refuse, in their own words, and what NumPy may pass to them."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.sharpness.saf import (
    in_window,
    init_teacher,
    init_trajectory_buffer,
    mesa_loss,
    read_trajectory,
    saf_loss,
    trajectory_loss,
    update_teacher,
    write_trajectory,
)

pytestmark = pytest.mark.untyped

Z = jnp.arange(6.0).reshape(2, 3)
TOTALS = [saf_loss, mesa_loss]


def test_numpy_arrays_are_welcome():
    z, y = np.asarray(Z), np.asarray(Z[::-1] ** 2)
    known, weights = np.array([True, False]), np.array([1, 2])
    expected = saf_loss(1.0, Z, jnp.asarray(y), known=jnp.asarray(known))
    assert saf_loss(np.float32(1), z, y, known=known) == expected
    plain = trajectory_loss(Z, jnp.asarray(y), weights=jnp.asarray(weights))
    assert trajectory_loss(z, y, weights=weights, temperature=np.float64(5)) == plain
    assert mesa_loss(1, z, y, active=np.bool_(False)) == 1
    buffer = init_trajectory_buffer(num_examples=4, num_classes=3, lag=1)
    buffer = write_trajectory(buffer, np.array([3, 0]), z, epoch=np.int64(0))
    past, known = read_trajectory(buffer, np.array([0, 1]), epoch=1)
    np.testing.assert_array_equal(past, [z[1], 0 * z[1]])
    assert known.tolist() == [True, False]
    teacher = init_teacher({"w": np.ones(2), "n": np.int32(1)})
    teacher = update_teacher(teacher, {"w": np.zeros(2), "n": np.int32(2)}, decay=0.5)
    assert teacher["w"].tolist() == [0.5, 0.5]
    assert in_window(np.int64(3), start=2, end=4)


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), float("inf")])
def test_temperatures_are_positive(temperature):
    message = f"temperature must be finite and > 0, got {temperature}"
    with pytest.raises(ValueError, match=f"trajectory_loss: {message}"):
        trajectory_loss(Z, Z, temperature=temperature)
    for total in TOTALS:
        with pytest.raises(ValueError, match=f"{total.__name__}: {message}"):
            total(0.0, Z, Z, temperature=temperature)


def test_logits_have_one_shape():
    message = (
        r"same shape \(\.\.\., classes\), got \(2, 3\) now and \(1, 3\) in the past"
    )
    with pytest.raises(ValueError, match=message):
        trajectory_loss(Z, Z[:1])
    for total in TOTALS:
        with pytest.raises(ValueError, match=message):
            total(0.0, Z, Z[:1])
    with pytest.raises(ValueError, match=r"got \(\) now"):
        trajectory_loss(1.0, 2.0)


@pytest.mark.parametrize("total", TOTALS)
def test_totals_take_one_loss_and_one_weight(total):
    with pytest.raises(ValueError, match=r"loss must be a scalar, got shape \(2,\)"):
        total(jnp.ones(2), Z, Z)
    for weight in (-0.1, float("nan"), float("inf")):
        with pytest.raises(
            ValueError, match=f"weight must be finite and >= 0, got {weight}"
        ):
            total(0.0, Z, Z, weight=weight)
    with pytest.raises(ValueError, match=r"weights must have one entry per row"):
        total(0.0, Z, Z, weights=jnp.ones(3))


def test_known_has_an_entry_per_row():
    message = r"saf_loss: known must have one entry per row, shape \(2,\) .* \(3,\)"
    with pytest.raises(ValueError, match=message):
        saf_loss(0.0, Z, Z, known=jnp.ones(3, bool))
    with pytest.raises(ValueError, match=r"got \(2, 3\)"):
        saf_loss(0.0, Z, Z, known=jnp.ones((2, 3), bool))


@pytest.mark.parametrize("name", ["num_examples", "num_classes", "lag"])
@pytest.mark.parametrize("size", [0, -1, 2.0, True])
def test_sizes_are_positive_integers(name, size):
    sizes = {"num_examples": 4, "num_classes": 3, "lag": 2} | {name: size}
    message = f"init_trajectory_buffer: {name} must be an integer >= 1, got {size}"
    with pytest.raises(ValueError, match=message):
        init_trajectory_buffer(**sizes)


def test_buffer_takes_rows_of_its_classes_and_epochs_from_zero():
    buffer = init_trajectory_buffer(num_examples=4, num_classes=3, lag=1)
    message = r"one row of 3 classes per index, shape \(2, 3\), got \(2, 2\)"
    with pytest.raises(ValueError, match=message):
        write_trajectory(buffer, jnp.arange(2), Z[:, :2], epoch=0)
    with pytest.raises(ValueError, match=r"shape \(1, 3\), got \(2, 3\)"):
        write_trajectory(buffer, jnp.arange(1), Z, epoch=0)
    with pytest.raises(
        ValueError, match="write_trajectory: epoch counts from 0, got -1"
    ):
        write_trajectory(buffer, jnp.arange(2), Z, epoch=-1)
    with pytest.raises(
        ValueError, match="read_trajectory: epoch counts from 0, got -2"
    ):
        read_trajectory(buffer, jnp.arange(2), epoch=-2)


def test_windows_are_not_empty():
    with pytest.raises(ValueError, match="needs start < end, got start=5 and end=5"):
        in_window(1, start=5, end=5)


def test_teachers_resemble_their_parameters():
    teacher = init_teacher({"w": jnp.ones(3)})
    for decay in (-0.1, 1.1, float("nan")):
        with pytest.raises(
            ValueError, match=rf"decay must be in \[0, 1\], got {decay}"
        ):
            update_teacher(teacher, {"w": jnp.ones(3)}, decay=decay)
    message = r"like params, .* got .*\[\(3,\)\]; init_teacher\(params\) makes one"
    for params in ({"w": jnp.ones(2)}, {"v": jnp.ones(3)}, jnp.ones(3)):
        with pytest.raises(ValueError, match=message):
            update_teacher(teacher, params)
