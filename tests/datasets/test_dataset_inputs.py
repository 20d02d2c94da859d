"""What make_dataset says to arrays that do not fit together."""

import numpy as np
import pytest

from jaxlab.datasets import make_dataset

pytestmark = pytest.mark.untyped


def test_rows_must_agree():
    x, y = np.zeros((3, 2), np.float32), np.zeros(2, np.int32)
    with pytest.raises(ValueError, match=r"d/train: .*same number of rows.*\(3, 2\)"):
        make_dataset("d", "D.", {"train": (x, y)})


def test_scalars_have_no_rows():
    x = np.zeros((), np.float32)
    with pytest.raises(ValueError, match="same number of rows"):
        make_dataset("d", "D.", {"train": (x, x)})


def test_at_least_one_split():
    with pytest.raises(ValueError, match="at least one split"):
        make_dataset("d", "D.", {})
