"""Planted structure: linear regression whose teacher is a known structured matrix.

With x ~ N(0, I) in R^64 and noise e ~ N(0, I),

    y = M x + noise_scale e,

(y rounded to multiples of 2^-20). The best possible mean squared error per output is
noise_scale^2, and a structured layer can reach it with few parameters if its class
holds M. Three teachers:

- ``monarch``: M[(s, l), (k, p)] = sum_a w2[l, s, k c + a] w1[k, a 8 + l, p], rows
  (s, l) and columns (k, p) with the last letter fastest, 8 blocks on either side and
  c = 1: every slice M[:, l, k, :] has rank 1. The factors are N(0, 1 / 8).
- ``convolution``: the circulant M[i, j] = h[(i - j) mod 64], h ~ N(0, I / 64).
- ``dft``: the unitary discrete Fourier transform of a real signal that comes in the
  order perm[8 k + p] = 8 p + k. The coefficient of frequency f = 8 s + l gives two
  outputs, rows (s, part, l) with the real part first, so M is (128, 64) and a real
  Monarch matrix with 8 blocks whose slices have rank 2.

Reference: Dao et al., "Monarch: Expressive Structured Matrices for Efficient and
Accurate Training", ICML 2022, for the class and for the Fourier transform in it.
"""

import numpy as np

from jaxlab._checks import check_count, check_number
from jaxlab.datasets.dataset import Dataset, make_dataset, round_for_digest

__all__ = ["planted_structure"]

_BLOCKS = 8
_WIDTH = _BLOCKS**2


def planted_structure(
    structure: str = "monarch",
    *,
    train: int = 4_096,
    validation: int = 1_024,
    test: int = 1_024,
    noise_scale: float = 0.01,
    seed: int = 0,
) -> Dataset:
    """Draws a regression task whose teacher is a structured matrix plus noise.

    Args:
      structure: ``"monarch"``, ``"convolution"`` or ``"dft"``.
      train: rows of the training split; likewise ``validation`` and ``test``.
      validation: rows of the validation split.
      test: rows of the test split.
      noise_scale: standard deviation of the noise on every output, at least 0.
      seed: of the teacher and the rows.

    Returns:
      Splits with inputs (rows, 64) and targets (rows, 64), or (rows, 128) for
      ``"dft"``, all float32; ``extras["teacher"]`` is M, (outputs, 64), float32.

    Raises:
      ValueError: if ``structure`` is none of the three.

    Examples:
      >>> data = planted_structure(train=5, validation=1, test=1, noise_scale=0.0)
      >>> x, y = data.splits["train"]
      >>> bool(np.allclose(y, x @ data.extras["teacher"].T, atol=1e-4))
      True
    """
    if structure not in list(_TEACHERS):
        raise ValueError(
            f"structure must be one of {', '.join(_TEACHERS)}; got {structure!r}."
        )
    rows = {"train": train, "validation": validation, "test": test}
    check_count("planted_structure", least=0, seed=seed, **rows)
    check_number("planted_structure", "finite and >= 0", noise_scale=noise_scale)
    noise_scale = float(noise_scale)
    rng = np.random.default_rng(seed)
    teacher = _TEACHERS[structure](rng).astype(np.float32)
    splits = {}
    for split, rows in (("train", train), ("validation", validation), ("test", test)):
        x = rng.standard_normal((rows, _WIDTH)).astype(np.float32)
        noise = noise_scale * rng.standard_normal((rows, len(teacher)))
        y = x.astype(np.float64) @ teacher.T.astype(np.float64) + noise
        splits[split] = (x, round_for_digest(y))
    name = "planted_structure" if structure == "monarch" else f"planted_{structure}"
    description = (
        f"Planted {structure} teacher: y = M x + {noise_scale} e with x and e standard "
        f"normal, M = extras['teacher'] of shape {teacher.shape}; train {train:,} / "
        f"validation {validation:,} / test {test:,} rows, float32, seed {seed}. The "
        f"best mean squared error per output is {noise_scale**2:g}."
    )
    return make_dataset(name, description, splits, extras={"teacher": teacher})


def _monarch(rng: np.random.Generator) -> np.ndarray:
    w1, w2 = rng.standard_normal((2, _BLOCKS, _BLOCKS, _BLOCKS)) / np.sqrt(_BLOCKS)
    # With c = 1: M[(s, l), (k, p)] = w2[l, s, k] w1[k, l, p].
    return np.einsum("lsk,klp->slkp", w2, w1).reshape(_WIDTH, _WIDTH)


def _convolution(rng: np.random.Generator) -> np.ndarray:
    kernel = rng.standard_normal(_WIDTH) / np.sqrt(_WIDTH)
    index = np.arange(_WIDTH)
    return kernel[(index[:, None] - index[None, :]) % _WIDTH]


def _dft(rng: np.random.Generator) -> np.ndarray:
    del rng  # the transform is what it is
    order = np.arange(_WIDTH).reshape(_BLOCKS, _BLOCKS).T.reshape(-1)
    turns = np.outer(np.arange(_WIDTH), order) % _WIDTH / _WIDTH
    parts = np.stack([np.cos(2 * np.pi * turns), -np.sin(2 * np.pi * turns)])
    parts = parts.reshape(2, _BLOCKS, _BLOCKS, _WIDTH) / np.sqrt(_WIDTH)
    return parts.transpose(1, 0, 2, 3).reshape(2 * _WIDTH, _WIDTH)


_TEACHERS = {"monarch": _monarch, "convolution": _convolution, "dft": _dft}
