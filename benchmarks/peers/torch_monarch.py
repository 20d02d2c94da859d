"""The authors' Monarch product in torch: two batched products and a shuffle.

The function ``blockdiag_butterfly_multiply`` of their repository (HazyResearch/fly)
multiplies by the blocks with the tokens as rows, lets the batched products write
token-major buffers, lays the middle and its cotangent out anew once each, and keeps the
shuffled middle for a backward pass of its own. That is restated here, for real numbers:
with autograd's backward pass instead it was slower, threefold at 64 blocks of 64.

Sizes as in :func:`jaxlab.structured.monarch_matmul`, t tokens; tensors on the CPU.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch  # pyrefly: ignore[missing-import]

VERSION = str(torch.__version__)


class MonarchProduct(torch.autograd.Function):
    """Multiplies rows x (t, k*p) by the factors w1 (k, q, p) and w2 (l, s, r)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor):
        (k, _, p), (l, s, r), t = w1.shape, w2.shape, x.shape[0]
        middle = _product(x.view(t, k, p).transpose(0, 1), w1.mT)
        middle = middle.view(t, r, l).mT.contiguous().transpose(0, 1)
        ctx.save_for_backward(x, w1, w2, middle)
        return _product(middle, w2.mT).mT.reshape(t, s * l)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor):
        x, w1, w2, middle = ctx.saved_tensors
        (k, q, p), (l, s, _), t = w1.shape, w2.shape, x.shape[0]
        dy = dy.reshape(t, s, l).mT.contiguous().transpose(0, 1)
        dmiddle = _product(dy, w2).mT.reshape(t, k, q).transpose(0, 1)
        dx = _product(dmiddle, w1).view(t, k * p)
        dw1 = torch.bmm(dmiddle.mT, x.view(t, k, p).transpose(0, 1))
        return dx, dw1, torch.bmm(dy.mT, middle)


def _product(rows: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Multiplies (g, t, a) by (g, a, b) into a buffer that lies as (t, g, b)."""
    shape = rows.shape[1], rows.shape[0], blocks.shape[2]
    out = rows.new_empty(shape)
    torch.bmm(rows, blocks, out=out.transpose(0, 1))
    return out


def forward_only(
    x: jax.Array, dy: jax.Array, w1: jax.Array, w2: jax.Array
) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Copies the arrays to torch, which keeps to one thread; gives ``() -> (y,)``."""
    torch.set_num_threads(1)
    arguments = [_tensor(array) for array in (x, w1, w2)]

    def call():
        with torch.inference_mode():
            return (MonarchProduct.apply(*arguments),)

    return call


def with_gradients(
    x: jax.Array, dy: jax.Array, w1: jax.Array, w2: jax.Array
) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Does so for ``() -> (y, dx, dw1, dw2)``, gradients of <y, dy>."""
    torch.set_num_threads(1)
    arguments = [_tensor(array).requires_grad_() for array in (x, w1, w2)]
    cotangent = _tensor(dy)

    def call():
        y = MonarchProduct.apply(*arguments)
        return y.detach(), *torch.autograd.grad(y, arguments, cotangent)

    return call


def as_jax(results: tuple[torch.Tensor, ...]) -> tuple[jax.Array, ...]:
    """Copies results back, to be compared."""
    return tuple(jnp.array(value.numpy()) for value in results)


def _tensor(array: jax.Array) -> torch.Tensor:
    return torch.tensor(np.asarray(array))
