"""Changes a model's layers in the middle of a run: Monarch to dense, dense to Monarch.

*Reverse sparsification* trains with structured layers for most of the steps, builds
the dense matrices they stand for, and goes on dense. *Dense to sparse* projects a
trained dense model onto the class and fine-tunes it. Both are one function of the run,
:func:`switch_layers`, between two calls of :func:`jaxlab.training.fit`.

The optimizer's state is a tree of links. A link that holds moments of a weight that is
no more (Adam's ``mu`` of a Monarch factor) starts afresh as a whole, its count for the
bias correction too: fresh moments beside an old count would make the first steps too
long. Links without such moments (schedules, clipping) go on where they were, and so do
the step, the base key and the model's other state.
Reference: Dao et al., "Monarch: Expressive Structured Matrices for Efficient and
Accurate Training", ICML 2022, section 4 (0.9 of the steps sparse for GPT-2, 0.7 for
BERT; there, too, the moments are not converted).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import PyTree

from jaxlab._checks import check_count, check_number
from jaxlab.layers import densify
from jaxlab.likelihoods import Likelihood
from jaxlab.objective import Batch, Objective
from jaxlab.training.adapters import from_nnx
from jaxlab.training.fit import FitResult, fit
from jaxlab.training.state import Optimizer, TrainState, create_state

__all__ = [
    "ReverseSparsified",
    "Switched",
    "reverse_sparsification",
    "switch_layers",
]


class Switched(NamedTuple):
    """Holds a run after its layers were switched.

    Attributes:
      model: the new model, with the trained parameters in it.
      objective: of the new model.
      state: of the new model, at the same step; give it to :func:`fit`.

    Examples:
      >>> Switched._fields
      ('model', 'objective', 'state')
    """

    model: nnx.Module
    objective: Objective
    state: TrainState


class ReverseSparsified(NamedTuple):
    """Holds what :func:`reverse_sparsification` returns.

    Attributes:
      model: the dense model, trained.
      sparse: result of the first part; its state is used up.
      dense: result of the second part.

    Examples:
      >>> ReverseSparsified._fields
      ('model', 'sparse', 'dense')
    """

    model: nnx.Module
    sparse: FitResult
    dense: FitResult


def switch_layers(
    model: nnx.Module,
    state: TrainState,
    convert: Callable[[nnx.Module], nnx.Module],
    *,
    likelihood: Likelihood,
    optimizer: Optimizer,
) -> Switched:
    """Converts a model in training, with the state of its optimizer.

    Args:
      model: the NNX model that is being trained; it is not changed.
      state: its state, from :func:`fit` or a step of your own.
      convert: from the trained model to the new one, such as
        :func:`jaxlab.layers.densify` or ``partial(monarchize, nblocks=4)``.
      likelihood: of the model's outputs.
      optimizer: the run's optimizer.

    Returns:
      New model, objective and state. See the module's text for what starts afresh.

    Examples:
      >>> import optax
      >>> from flax import nnx
      >>> from jaxlab.layers import MonarchLinear, densify
      >>> from jaxlab.likelihoods import Gaussian
      >>> from jaxlab.training import create_state, from_nnx
      >>> model = MonarchLinear(8, 6, nblocks=2, rngs=nnx.Rngs(0))
      >>> optimizer = optax.adam(1e-3)
      >>> params = from_nnx(model, Gaussian()).params
      >>> state = create_state(jax.random.key(0), params, optimizer)
      >>> new = switch_layers(model, state, densify, likelihood=Gaussian(),
      ...                     optimizer=optimizer)
      >>> jax.tree.map(jnp.shape, new.state.params)
      {'bias': (6,), 'kernel': (8, 6)}
    """
    trained = nnx.clone(model)
    nnx.update(trained, state.params)
    if jax.tree.leaves(state.model_state):
        nnx.update(trained, state.model_state)
    new = convert(trained)
    objective, params, model_state = from_nnx(new, likelihood)
    # Layers that both models share are shared arrays; a step gives its state away.
    fresh = create_state(state.key, params, optimizer, model_state=model_state)
    opt_state = jax.tree.map(jnp.copy, _carry_over(state.opt_state, fresh.opt_state))
    switched = fresh._replace(
        step=jnp.copy(state.step),
        opt_state=opt_state,
        loss_scale=jax.tree.map(jnp.copy, state.loss_scale),
    )
    return Switched(new, objective, switched)


def reverse_sparsification(
    model: nnx.Module,
    state: TrainState,
    train: Batch,
    *,
    likelihood: Likelihood,
    optimizer: Optimizer,
    epochs: int,
    batch_size: int,
    dense_fraction: float = 0.1,
    convert: Callable[[nnx.Module], nnx.Module] = densify,
    **options: Any,
) -> ReverseSparsified:
    """Trains a structured model, then the dense one it stands for.

    Args:
      model: an NNX model with structured layers; it is not changed.
      state: from :func:`create_state` with the model's params; its buffers are used.
      train: arrays ``(inputs, targets)`` or ``(inputs, targets, weights)``.
      likelihood: of the model's outputs.
      optimizer: of both parts; its schedules run through.
      epochs: of both parts together.
      batch_size: rows a batch.
      dense_fraction: share of the epochs that is dense, in (0, 1), rounded to whole
        epochs, at least one of each kind.
      convert: from the trained structured model to the dense one.
      **options: further ones of :func:`fit`, for both parts. Checkpoints belong to one
        of the parts: for those call ``fit`` and :func:`switch_layers` yourself.

    Returns:
      The dense model and the results of both parts.

    Raises:
      ValueError: if there are fewer than two epochs, ``dense_fraction`` is not in
        (0, 1), or ``checkpoint_dir`` or ``metrics_path`` is given.

    Examples:
      >>> import optax
      >>> from flax import nnx
      >>> from jaxlab.layers import MonarchLinear
      >>> from jaxlab.likelihoods import Gaussian
      >>> from jaxlab.training import create_state, from_nnx
      >>> model = MonarchLinear(8, 6, nblocks=2, rngs=nnx.Rngs(0))
      >>> optimizer = optax.adam(1e-3)
      >>> params = from_nnx(model, Gaussian()).params
      >>> state = create_state(jax.random.key(0), params, optimizer)
      >>> data = (jnp.ones((4, 8)), jnp.ones((4, 6)))
      >>> result = reverse_sparsification(model, state, data, likelihood=Gaussian(),
      ...     optimizer=optimizer, epochs=10, batch_size=2, progress=False)
      >>> len(result.sparse.epochs), len(result.dense.epochs)
      (9, 1)
    """
    check_count("reverse_sparsification", least=2, epochs=epochs)
    check_number("reverse_sparsification", "in (0, 1)", dense_fraction=dense_fraction)
    if not {"checkpoint_dir", "metrics_path"}.isdisjoint(options):
        raise ValueError(
            "reverse_sparsification: checkpoint_dir and metrics_path belong to one "
            "part; call fit, switch_layers and fit with a folder for each."
        )
    dense_epochs = min(max(1, round(dense_fraction * epochs)), epochs - 1)
    options = {"batch_size": batch_size, **options}
    objective = from_nnx(model, likelihood).objective
    sparse = fit(
        objective, optimizer, state, train, epochs=epochs - dense_epochs, **options
    )
    switched = switch_layers(
        model, sparse.state, convert, likelihood=likelihood, optimizer=optimizer
    )
    dense = fit(
        switched.objective, optimizer, switched.state, train, epochs=epochs, **options
    )
    nnx.update(switched.model, dense.state.params)
    if jax.tree.leaves(dense.state.model_state):
        nnx.update(switched.model, dense.state.model_state)
    return ReverseSparsified(switched.model, sparse, dense)


def _carry_over(old: Any, new: Any) -> Any:
    """Carries the links of an optimizer's state over to that for other parameters.

    A link is a NamedTuple that holds no other; the parameters are nested dicts. A link
    of ``old`` with the structure and shapes of its place in ``new`` goes on.
    """
    if _holds_links(new) and _same_container(old, new):
        pairs = zip(_children(old), _children(new), strict=True)
        children = [_carry_over(before, after) for before, after in pairs]
        if isinstance(new, dict):
            return dict(zip(sorted(new), children, strict=True))
        return type(new)(*children) if _is_link(new) else type(new)(children)
    return old if _described(old) == _described(new) else new


def _is_link(node: Any) -> bool:
    named = isinstance(node, tuple) and hasattr(node, "_fields")
    return named and not isinstance(node, optax.MaskedNode)


def _holds_links(node: Any) -> bool:
    return any(_is_link(child) or _holds_links(child) for child in _children(node))


def _children(node: Any) -> list[Any]:
    if isinstance(node, dict):
        return [node[name] for name in sorted(node)]
    return list(node) if isinstance(node, (tuple, list)) else []


def _same_container(old: Any, new: Any) -> bool:
    if type(old) is not type(new) or len(_children(old)) != len(_children(new)):
        return False
    return not isinstance(new, dict) or sorted(old) == sorted(new)


def _described(tree: PyTree) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]
