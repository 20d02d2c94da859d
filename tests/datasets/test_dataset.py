"""The digest against one computed by hand, what changes it, and what does not."""

import dataclasses
import hashlib

import numpy as np
import pytest

from jaxlab.datasets import content_digest, make_dataset


def _arrays():
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    return x, np.array([2, 0, 1], np.int32)


def test_digest_is_the_documented_one():
    x, y = _arrays()
    extra = np.array([[1.5]], np.float64)
    data = make_dataset(
        "d", "D.", {"train": (x, y), "test": (x[:1], y[:1])}, extras={"m": extra}
    )
    text = b"".join(
        [
            b"test|inputs|float32|1,2\n" + x[:1].tobytes(),
            b"test|targets|int32|1\n" + y[:1].tobytes(),
            b"train|inputs|float32|3,2\n" + x.tobytes(),
            b"train|targets|int32|3\n" + y.tobytes(),
            b"extras|m|float64|1,1\n" + extra.tobytes(),
        ]
    )
    assert data.digest == hashlib.sha256(text).hexdigest()


def test_digest_does_not_depend_on_the_layout_in_memory():
    x, y = _arrays()
    want = content_digest({"train": (x, y)})
    assert content_digest({"train": (np.asfortranarray(x), y)}) == want
    assert content_digest({"train": (x.astype(">f4"), y.astype(">i4"))}) == want
    assert content_digest({"train": (np.repeat(x, 2, axis=0)[::2], y)}) == want


def test_digest_sees_every_part():
    x, y = _arrays()
    z = x.copy()
    z[2, 1] = np.nextafter(z[2, 1], 9, dtype=np.float32)
    digests = {
        content_digest({"train": (x, y)}),
        content_digest({"train": (z, y)}),
        content_digest({"train": (x.reshape(3, 1, 2), y)}),
        content_digest({"train": (x, y.astype(np.uint32))}),
        content_digest({"test": (x, y)}),
        content_digest({"train": (x, y[::-1])}),
        content_digest({"train": (x, y)}, extras={"y": y}),
    }
    assert len(digests) == 7


def test_name_and_description_do_not_enter_the_digest():
    x, y = _arrays()
    one, two = (make_dataset(n, n, {"train": (x, y)}) for n in ("a", "b"))
    assert one.digest == two.digest


def test_arrays_and_fields_are_read_only():
    x, y = _arrays()
    data = make_dataset("d", "D.", {"train": (x, y)}, extras={"x": x})
    for array in (*data.splits["train"], data.extras["x"]):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        data.digest = ""
    x[0, 0] = 7.0  # what came in stays the caller's


def test_targets_that_are_the_inputs_stay_so():
    x, _ = _arrays()
    inputs, targets = make_dataset("d", "D.", {"train": (x, x)}).splits["train"]
    assert targets is inputs


def test_no_rows():
    x, y = _arrays()
    data = make_dataset("d", "D.", {"train": (x[:0], y[:0])})
    assert data.splits["train"][0].shape == (0, 2)
