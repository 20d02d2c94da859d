"""What a report refuses, in its own words, and NumPy inputs that it takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.curvature.report import spectrum_report
from jaxlab.likelihoods import Gaussian
from jaxlab.objective import Objective, plain

pytestmark = pytest.mark.untyped

KEY = jax.random.key(0)
OBJECTIVE = Objective(plain(lambda w, x: x @ w), Gaussian())
DATA = (np.eye(3, dtype=np.float32), np.ones((3, 1), np.float32))
W = np.ones((3, 1), np.float32)


def report(params=W, data=DATA, objective=OBJECTIVE, **options):
    return spectrum_report(KEY, objective, params, data, **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"objective": lambda w, x: x @ w},
            r"Objective\(plain\(apply_fn\), Categorical\(\)\) .* got a function",
        ),
        ({"matrix": "fisher"}, 'matrix must be "hessian" or "ggn", got \'fisher\''),
        ({"damping": 0}, "damping must be finite and > 0, got 0; None leaves"),
        ({"damping": float("nan")}, "damping must be finite and > 0"),
        ({"reorthogonalize": "selective"}, 'must be "full" or "none", got \'sel'),
        ({"microbatch": 0}, "spectrum_report: microbatch must be an integer >= 1"),
        ({"k": 0}, "k must be an integer >= 1, got 0"),
        ({"k": 2.0}, "k must be an integer >= 1, got 2.0"),
        ({"order": 0}, "order must be an integer >= 1, got 0"),
        ({"num_probes": 0}, "num_probes must be an integer >= 1, got 0"),
        ({"which": "top"}, 'which must be "largest", "smallest" or "both"'),
        ({"scale": "ln"}, 'scale must be "linear" or "log", got \'ln\''),
        ({"params": {"w": np.arange(3)}}, r"real .* int\d+ at params\['w'\]"),
        (
            {"params": W.astype(complex)},
            "spectrum_report: the leaves of params .* real",
        ),
        ({"params": {}}, "spectrum_report: params has no entries"),
        ({"data": (DATA[0][:0], DATA[1][:0])}, "one row per example, at least one"),
        ({"data": []}, "spectrum_report: batches must not be empty"),
        ({"data": lambda: iter(())}, r"batches\(\) gave no batch"),
        ({"data": DATA[0]}, r"must be \(inputs, targets\)"),
    ],
)
def test_messages(options, said):
    with pytest.raises(ValueError, match=said):
        report(**options)


def test_numpy_arrays_are_taken_and_sizes_cut():
    found = report(k=10, order=64, num_probes=2)
    np.testing.assert_allclose(found.eigenpairs.values, 1 / 3, rtol=1e-5)
    assert found.density.nodes.shape == (2, 3)
    np.testing.assert_allclose(found.trace, 1, rtol=1e-5)


def test_no_table_inside_jit():
    said = []

    @jax.jit
    def look(w):
        found = report(w, k=1, order=2, num_probes=1, damping=None)
        with pytest.raises(ValueError, match="return the report and print it outside"):
            found.summary()
        said.append(repr(found))
        return found

    found = look(jnp.asarray(W))
    assert said == ["SpectrumReport(matrix='hessian', dimension=3)"]
    assert "+/- nan" in str(found)  # one probe knows no error


def test_no_stream_inside_jit():
    def stream():
        yield DATA

    with pytest.raises(ValueError, match="cannot run under jit"):
        jax.jit(lambda w: report(w, stream))(jnp.asarray(W))
