"""Messages for wrong sizes and inputs, and what plain NumPy arrays give."""

import functools
import subprocess
import sys
import textwrap

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlab.models import CNN, GPT, MLP, Autoencoder, Mixer, ViT
from jaxlab.models.transformer import SelfAttention

pytestmark = pytest.mark.untyped

SIZES = {
    MLP: {"sizes": (4, 3, 2)},
    Autoencoder: {"sizes": (4, 3, 2)},
    CNN: {"side": 4, "features": (2,), "strides": (1,), "outputs": 3},
    GPT: {"vocabulary": 5, "context": 4, "width": 4, "layers": 1, "heads": 2},
    Mixer: {
        "side": 4,
        "patch": 2,
        "width": 4,
        "blocks": 1,
        "token_hidden": 2,
        "channel_hidden": 8,
        "outputs": 3,
    },
    ViT: {"side": 4, "patch": 2, "width": 4, "blocks": 1, "heads": 2, "outputs": 3},
}


@functools.cache
def small(family):
    return nnx.jit(lambda: family(**SIZES[family], rngs=nnx.Rngs(0)))()


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        (MLP, {"sizes": (4,)}, r"MLP: sizes must be at least two.*got \(4,\)"),
        (MLP, {"sizes": ()}, "MLP: sizes must be at least two"),
        (MLP, {"sizes": (4, 0, 2)}, r"positive widths.*got \(4, 0, 2\)"),
        (Autoencoder, {"sizes": (4,)}, "at least two positive widths"),
        (CNN, {"features": ()}, r"equal length of at least 1.*features=\(\)"),
        (CNN, {"strides": (1, 2)}, r"equal length.*strides=\(1, 2\)"),
        (CNN, {"strides": (0,)}, r"CNN: sizes must be at least 1.*'strides': 0"),
        (CNN, {"channels": 0}, "'channels': 0"),
        (GPT, {"heads": 3}, "heads must divide width, got width=4 and heads=3"),
        (GPT, {"heads": 0}, "heads must divide width.*heads=0"),
        (GPT, {"vocabulary": 0}, "GPT: sizes must be at least 1.*'vocabulary': 0"),
        (GPT, {"layers": 0}, "'layers': 0"),
        (Mixer, {"patch": 3}, r"Mixer: patch must divide.*patch=3.*\[1, 2, 4\]"),
        (Mixer, {"token_hidden": 0}, "Mixer: sizes must be.*'token_hidden': 0"),
        (ViT, {"patch": 3}, r"ViT: patch must divide side.*side=4.*\[1, 2, 4\]"),
        (ViT, {"patch": 0}, "ViT: sizes must be at least 1.*'patch': 0"),
        (ViT, {"heads": 3}, "heads must divide width"),
    ],
)
def test_wrong_sizes(family, change, message):
    with pytest.raises(ValueError, match=message):
        family(**{**SIZES[family], **change}, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("family", "shape", "message"),
    [
        (MLP, (2, 5), r"MLP: inputs must have shape \(\.\.\., 4\), got \(2, 5\)"),
        (MLP, (), r"shape \(\.\.\., 4\), got \(\)"),
        (Autoencoder, (2, 5), r"\(\.\.\., 4\), got \(2, 5\)"),
        (CNN, (2, 15), r"CNN: .*\(\.\.\., 16\) or \(\.\.\., 4, 4, 1\), got \(2, 15\)"),
        (CNN, (2, 4, 4), r"CNN: .*\(\.\.\., 4, 4, 1\), got \(2, 4, 4\)"),
        (CNN, (), r"CNN: inputs .*got \(\)"),
        (Mixer, (2, 1, 4, 4), r"Mixer: .*\(\.\.\., 4, 4, 1\), got \(2, 1, 4, 4\)"),
        (ViT, (2, 64), r"ViT: .*\(\.\.\., 16\) or .*got \(2, 64\)"),
    ],
)
def test_wrong_width(family, shape, message):
    with pytest.raises(ValueError, match=message):
        small(family)(jnp.zeros(shape))


@pytest.mark.parametrize("shape", [(2, 5), ()])
def test_too_long_a_context(shape):
    with pytest.raises(ValueError, match=r"GPT: .*time at most 4.*got \("):
        small(GPT)(jnp.zeros(shape, jnp.int32))


def test_tokens_are_integers():
    with pytest.raises(ValueError, match="tokens must be integers, got float32"):
        small(GPT)(jnp.zeros((2, 3)))


def test_heads_divide_the_width():
    with pytest.raises(ValueError, match="width=6 and heads=4"):
        SelfAttention(6, 4, causal=True, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("family", SIZES)
def test_numpy_inputs(family):
    if family is GPT:
        x = np.array([[0, 3, 4]])
    else:
        width = 4 if family in (MLP, Autoencoder) else 16
        x = np.linspace(0, 1, 2 * width, dtype=np.float32).reshape(2, width)
    model = small(family)
    np.testing.assert_array_equal(model(x), model(jnp.asarray(x)))


@pytest.mark.parametrize("family", [MLP, CNN, ViT])
def test_nan_passes_through_its_own_row(family):
    width = 4 if family is MLP else 16
    x = np.ones((2, width), np.float32)
    x[0, 1] = np.nan
    outputs = small(family)(jnp.asarray(x))
    assert jnp.all(jnp.isnan(outputs[0]))
    assert jnp.all(jnp.isfinite(outputs[1]))


def test_without_flax_the_message_names_the_extra():
    code = """
        import sys
        sys.modules["flax"] = None  # any import of it now fails as if absent
        try:
            import jaxlab.models
        except ImportError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == (
        'jaxlab.models needs flax, which is missing: pip install "jaxlab[train]".'
    )
