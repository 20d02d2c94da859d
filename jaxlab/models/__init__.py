"""Reference networks: small modules whose dense layers come from one factory.

Every class and preset takes ``linear``, a callable
``linear(in_features, out_features, *, use_bias=True, rngs) -> module`` whose module
maps the last axis. ``flax.nnx.Linear`` is the default; another map is swapped in by
that one argument, and so is mixed precision::

    mlp_m(linear=functools.partial(MonarchLinear, nblocks=4), rngs=rngs)
    gpt_s(linear=functools.partial(nnx.Linear, dtype=jnp.bfloat16), rngs=rngs)

A factory of one's own may look at the two widths and treat layers differently, say
keep the ten outputs dense.
"""

try:
    from flax import nnx as _nnx  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "flax":
        raise
    raise ImportError(
        'jaxlab.models needs flax, which is missing: pip install "jaxlab[train]".'
    ) from error

from jaxlab.models.autoencoder import (
    Autoencoder,
    autoencoder_curves,
    autoencoder_digits,
)
from jaxlab.models.cnn import CNN, cnn
from jaxlab.models.gpt import GPT, gpt_m, gpt_s
from jaxlab.models.mixer import Mixer, mixer
from jaxlab.models.mlp import MLP, mlp_m, mlp_s
from jaxlab.models.vit import ViT, vit

__all__ = [
    "Autoencoder",
    "CNN",
    "GPT",
    "MLP",
    "Mixer",
    "ViT",
    "autoencoder_curves",
    "autoencoder_digits",
    "cnn",
    "gpt_m",
    "gpt_s",
    "mixer",
    "mlp_m",
    "mlp_s",
    "vit",
]
