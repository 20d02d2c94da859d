"""The claim on sloppy spectra: its data, its nets, and the rule of its verdict."""

import copy

import jax
import numpy as np
import pytest

from benchmarks import digits_nets
from benchmarks.claims import sloppy_spectra as claim

OPTIONS = {"input_range": (0, 20), "matrix_range": (0, 20)}


def line(decades):
    return (10.0 ** -np.linspace(0, decades, 20)).tolist()


def spectra(decades, error):
    samples = {
        "inputs": [line(decades)] * 3,
        "hessian": [line(decades), line(1.1 * decades), line(decades)],
        "fisher": [line(decades)] * 3,
        "test error": error,
        "displacement": [0.6, 0.7, 0.8],
    }
    return {"options": OPTIONS, "samples": samples}


def bound(values):
    return {"samples": {"bound": values, "error and gap": [v + 0.1 for v in values]}}


def records():
    cases = {
        ("inputs", claim.DIGITS): spectra(3.0, [0.02, 0.03, 0.02]),
        ("inputs", claim.WHITENED): spectra(1.0, [0.10, 0.12, 0.11]),
        ("posterior", claim.ANALYTIC): bound([0.5, 0.52, 0.51]),
        ("posterior", claim.ISOTROPIC): bound([0.95, 0.97, 0.96]),
    }
    return {name: {"case": {k: name}, **rest} for (k, name), rest in cases.items()}


def word(found):
    return claim.verdict(list(found.values())).word


def test_all_parts_make_it_shown():
    assert word(records()) == "shown"


CROOKED = [1.0] * 10 + [1e-3] * 10
BROKEN = {
    "a spectrum that is no line": (claim.DIGITS, "fisher", [CROOKED] * 3),
    "one seed's spectrum is no line": (
        claim.DIGITS,
        "inputs",
        [line(3), line(3), CROOKED],
    ),
    "an eigenvalue below zero": (
        claim.DIGITS,
        "hessian",
        [line(3), [*line(3)[:-1], -1e-9], line(3)],
    ),
    "one whitened spectrum as long": (
        claim.WHITENED,
        "hessian",
        [line(1), line(3.5), line(1)],
    ),
    "whitened spectra not finite": (claim.WHITENED, "fisher", [[0.0] * 20] * 3),
    "whitened as good": (claim.WHITENED, "test error", [0.02, 0.03, 0.02]),
    "whitened worse in the mean only": (
        claim.WHITENED,
        "test error",
        [0.02, 0.03, 0.3],
    ),
    "a bound as bad as chance": (claim.ANALYTIC, "bound", [0.91, 0.92, 0.92]),
    "a vacuous sum": (claim.ANALYTIC, "error and gap", [0.9, 0.9, 1.01]),
    "isotropic as good": (claim.ISOTROPIC, "bound", [0.5, 0.52, 0.51]),
    "a displacement outside": (claim.DIGITS, "displacement", [0.6, 0.7, 0.5]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_any_part_that_fails_makes_it_not_shown(name):
    found = copy.deepcopy(records())
    which, column, values = BROKEN[name]
    found[which]["samples"][column] = values
    assert word(found) == "not shown"
    why = claim.verdict(list(found.values())).why
    assert why.count("no: ") == 1 + ("below zero" in name)  # R^2 and decades
    assert why.count("no: ") + why.count("yes: ") == 6


def test_both_comparisons_the_other_way_reverse_it():
    found = records()
    found[claim.WHITENED]["samples"]["test error"] = [0.01, 0.02, 0.01]
    found[claim.ISOTROPIC]["samples"]["bound"] = [0.4, 0.41, 0.4]
    assert word(found) == "reversed"


def test_whitened_digits_have_a_flat_spectrum_of_the_same_trace():
    plain, digest = digits_nets.splits(1_297, whitened=False)
    white, same = digits_nets.splits(1_297, whitened=True)
    assert digest == same
    np.testing.assert_array_equal(plain.train[1], white.train[1])
    for x, flat in ((plain, False), (white, True)):
        values = np.linalg.svd(np.asarray(x.train[0], float), compute_uv=False) ** 2
        kept = values[values > 1e-6 * values[0]]
        assert (kept[0] / kept[-1] < 1.001) == flat
    norm = lambda s: np.mean(np.sum(np.asarray(s.train[0], float) ** 2, axis=1))
    np.testing.assert_allclose(norm(plain), norm(white), rtol=1e-4)
    # The map is that of the training split, applied to all.
    change = digits_nets.whitening(np.asarray(plain.train[0], float))
    np.testing.assert_allclose(plain.test[0] @ change, white.test[0], atol=1e-4)


def test_nets_learn_and_a_pull_brings_them_back():
    data, _ = digits_nets.splits(300, whitened=False)
    sizes = {"steps": 200, "batch_size": 64}
    (run,) = digits_nets.trained(1, data.train, 1e-2, hidden=16, **sizes)
    errors = [float(digits_nets.error_fn(p, data.test)) for p in run]
    assert errors[0] > 0.7
    assert errors[1] < 0.2
    away = lambda p: sum(
        float(np.sum((np.asarray(p[k]) - np.asarray(run.start[k])) ** 2)) for k in p
    )
    pulled = [
        digits_nets.train(
            jax.random.key(1), run.end, run.start, data.train, 1e-2, pull, **sizes
        )
        for pull in (0.0, 1e-2, 1e-1)
    ]
    distances = [away(p) for p in pulled]
    assert distances[0] > 1.5 * distances[1] > 2 * distances[2]


def test_hessian_pairs_are_those_of_the_hessian(x64):
    data, _ = digits_nets.splits(30, whitened=False)
    params = digits_nets.init(jax.random.key(0), 1)
    values, vectors = digits_nets.hessian_pairs(params, data.train, k=5)
    flat, back = jax.flatten_util.ravel_pytree(params)
    dense = jax.hessian(lambda t: digits_nets.loss_fn(back(t), data.train))(flat)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(dense)[::-1][:5], atol=1e-7)
    np.testing.assert_allclose(dense @ vectors.T, vectors.T * values[None], atol=1e-5)
