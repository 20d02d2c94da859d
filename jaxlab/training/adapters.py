"""From a Flax NNX model to the pure functions that everything here works on.

The params come out as a plain nested dict: it crosses the boundary of a jitted call
two to three times faster than ``nnx.State``, and ``nnx.update(model, params)`` takes
it back. Whatever the model keeps besides (BatchNorm statistics) travels as the model
state; the streams of dropout are reseeded from the key of the step.
"""

from typing import NamedTuple

import jax
from flax import nnx
from jaxtyping import PyTree

from jaxlab.likelihoods import Likelihood
from jaxlab.objective import Objective


class NnxParts(NamedTuple):
    """Holds what :func:`from_nnx` makes of a model.

    Attributes:
      objective: of the model and its likelihood.
      params: nested dict of the ``nnx.Param`` arrays.
      model_state: nested dict of the other variables but the random streams.

    Examples:
      >>> NnxParts._fields
      ('objective', 'params', 'model_state')
    """

    objective: Objective
    params: PyTree
    model_state: PyTree


def from_nnx(model: nnx.Module, likelihood: Likelihood) -> NnxParts:
    """Splits an NNX model into an objective, params and model state.

    Args:
      model: called as ``model(inputs)``; its ``train()`` and ``eval()`` switch
        dropout and BatchNorm. It is read, not kept or changed.
      likelihood: of its outputs.

    Returns:
      The three parts. ``nnx.update(model, params)`` and
      ``nnx.update(model, model_state)`` put trained ones back.

    Raises:
      ValueError: if ``model`` is no NNX module; when the objective is called for
        training without a ``key`` and the model has random streams, or with another
        state than the model's.

    Examples:
      >>> from flax import nnx
      >>> from jaxlab.likelihoods import Categorical
      >>> model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
      >>> objective, params, model_state = from_nnx(model, Categorical())
      >>> sorted(params), model_state
      (['bias', 'kernel'], {})
    """
    if not isinstance(model, nnx.Module):
        raise ValueError(
            f"from_nnx: model must be an nnx.Module, got {type(model).__name__}; for "
            "a function of the parameters use Objective(plain(apply_fn), likelihood)."
        )
    graph, params, streams, rest = nnx.split(model, nnx.Param, nnx.RngState, ...)
    others = nnx.All(nnx.Not(nnx.Param), nnx.Not(nnx.RngState))
    tags = _stream_names(model)
    kept = nnx.to_pure_dict(rest)
    keeps = bool(jax.tree.leaves(kept))

    def apply_fn(params, state, inputs, *, key, train):
        if keeps and jax.tree.structure(state) != jax.tree.structure(kept):
            raise ValueError(
                "The model keeps state besides its params: give the model_state of "
                "from_nnx to create_state(..., model_state=model_state)."
            )
        if train and tags and key is None:
            raise ValueError(
                f"The model has random streams {sorted(tags)}: pass key= to train it, "
                "or train=False."
            )
        # A copy, so that what a call changes never leaks out of a trace.
        parts = (params, streams, state if keeps else kept)
        now = nnx.merge(graph, *parts, copy=True)
        if train and tags:
            keys = jax.random.split(key, len(tags))
            nnx.reseed(now, **dict(zip(sorted(tags), keys)))
        now.train() if train else now.eval()
        outputs = now(inputs)
        return outputs, nnx.to_pure_dict(nnx.state(now, others)) if keeps else state

    return NnxParts(Objective(apply_fn, likelihood), nnx.to_pure_dict(params), kept)


def _stream_names(model) -> set[str]:
    return {
        node.tag for _, node in nnx.iter_graph(model) if isinstance(node, nnx.RngStream)
    }
