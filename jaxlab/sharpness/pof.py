"""PoF: trains a feature extractor for a loss that is flat in the classifier.

The network is head(phi) o features(theta), trained beforehand; phi is its last layer
and stays what it is. Every step, with the loss L' of a probe batch and L of the batch:

    d    = grad_phi L'(theta, phi)
    t_b  = the first of 1, 2, 4, ... with L'(theta, phi - t_b d) > L'(theta, phi)
    t*   = the best of t_b k / 16, k = 1 ... 16, for L'(theta, phi - t* d)
    c    ~ s U[0, 1),                 phi' = phi - c t* d
    grad = grad_theta L(theta, phi')

With s = 2, phi' reaches the opposite bank of a quadratic valley, as high as phi itself.
To second order the mean of L over c adds 1/2 E[(c t*)^2] d^T H_phi d: the curvature of
the head along its own gradients.
Reference: Sato, Yamada, Tanaka, Inoue, Kawakami, "PoF: Post-Training of Feature
Extractor for Improving Generalization", ICML 2022.

Departures from the authors' released code: its loop never steps the optimiser of the
features, here they are what is trained; its probe pass updates BatchNorm statistics,
here it changes nothing; its last doubling may pass the largest step, here it is clipped
there; and a step that would raise the probe loss is 0 here.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Key, PyTree

from jaxlab._array_checks import check_floating
from jaxlab._checks import check_count, check_number
from jaxlab._norms import all_finite
from jaxlab.sharpness._checks import check_alike
from jaxlab.trees import fill_holes

Scalar = Float[Array, ""]
HeadLoss = Callable[[PyTree], Any]


class HeadSearch(NamedTuple):
    """Holds what :func:`head_line_search` found.

    Attributes:
      step: t*, in units of the direction; 0 where nothing is gained.
      loss: at that step.
      start_loss: at step 0.
      bracket: t_b, the end of the grid.
      capped: whether the loss had not risen at ``max_step``.

    Examples:
      >>> found = head_line_search(lambda w: -w, jnp.array(1.0), jnp.array(-1.0))
      >>> bool(found.capped)
      True
    """

    step: Scalar
    loss: Scalar
    start_loss: Scalar
    bracket: Scalar
    capped: Bool[Array, ""]


class PofInfo(NamedTuple):
    """Holds what :func:`pof_perturb` did: ``head - scale * search.step * gradient``.

    Attributes:
      search: the line search.
      scale: c, in ``[0, sampling_range)``.

    Examples:
      >>> key, loss = jax.random.key(0), lambda w: jnp.sum(w**2)
      >>> _, info = pof_perturb(key, loss, jnp.array([1.0]), sampling_range=0.0)
      >>> float(info.scale)
      0.0
    """

    search: HeadSearch
    scale: Scalar


def head_line_search(
    loss_of_head: HeadLoss,
    head: PyTree,
    direction: PyTree,
    *,
    initial_step: float | int = 1.0,
    growth: float | int = 2.0,
    max_step: float | int = 100.0,
    num_grid: int = 16,
) -> HeadSearch:
    """Searches for the step against a direction that lowers a loss the most.

    The step grows while the loss is at most that of the start; then ``num_grid`` even
    divisions of the last step are compared. It costs a loss for the start, one for each
    step tried, at most 8 with the defaults, and ``num_grid`` under one ``vmap`` over
    the head: work that does not depend on the head is done once there, and the memory
    is that of ``num_grid`` copies of the head and its outputs. No gradient goes through
    ``head`` and ``direction``; arrays that ``loss_of_head`` closes over need their own
    ``jax.lax.stop_gradient`` where a gradient is taken around the search.

    Args:
      loss_of_head: scalar loss of a tree like ``head``.
      head: parameters of the classifier, floating-point leaves.
      direction: tree like ``head``; the search moves along MINUS it.
      initial_step: first step tried, > 0.
      growth: factor between the steps tried, > 1.
      max_step: largest step, at least ``initial_step``.
      num_grid: divisions of the last step, >= 1.

    Returns:
      A :class:`HeadSearch`. The step is 0 where no division has a finite loss that is
      at most the start's, where the start's is not finite, and for a direction that is
      zero or not finite. A best step below ``initial_step / num_grid`` comes out as 0
      or as that: take a smaller ``initial_step``.

    Raises:
      ValueError: if an option is out of range, the trees differ, a leaf is not
        floating-point or the loss is not a scalar.

    Examples:
      >>> found = head_line_search(lambda w: w**2, jnp.array(1.0), jnp.array(2.0))
      >>> float(found.step), float(found.bracket), bool(found.capped)
      (0.5, 2.0, False)
    """
    name = "head_line_search"
    count = _check_search(name, initial_step, growth, max_step, num_grid)
    check_floating(name, "head", head)
    check_floating(name, "direction", direction)
    check_alike(name, "head", head, direction=direction)
    head, direction = jax.lax.stop_gradient((head, direction))
    dtype = _wide(head)
    # With a bound on the count the loop ends whatever the rounding of the steps.
    clip = lambda i, t: jnp.where(i >= count, max_step, t).astype(dtype)

    def loss_at(step):
        return _scalar(name, loss_of_head(_move(head, direction, step)))

    with jax.named_scope(name):
        start = _scalar(name, loss_of_head(head))
        good = lambda loss: jnp.isfinite(loss) & (loss <= start)
        moves = good(start) & _is_usable(direction)

        def grows(state):
            i, _, loss = state
            return moves & good(loss) & (i < count)

        def grow(state):
            i, step, _ = state
            step = clip(i + 1, step * growth)
            return i + 1, step, loss_at(step)

        first = jnp.asarray(initial_step, dtype)
        state = (jnp.zeros((), jnp.int32), first, loss_at(first))
        i, bracket, last = jax.lax.while_loop(grows, grow, state)
        grid = bracket * jnp.arange(1, num_grid + 1, dtype=dtype) / num_grid
        losses = jax.vmap(loss_at)(grid)
        losses = jnp.where(jnp.isfinite(losses), losses, jnp.inf)
        best = jnp.argmin(losses)
        taken = moves & good(losses[best])
        return HeadSearch(
            step=jnp.where(taken, grid[best], 0),
            loss=jnp.where(taken, losses[best], start),
            start_loss=start,
            bracket=bracket,
            capped=moves & good(last) & (i >= count),
        )


def pof_perturb(
    key: Key[Array, ""],
    loss_of_head: HeadLoss,
    head: PyTree,
    *,
    sampling_range: ArrayLike = 2.0,
    initial_step: float | int = 1.0,
    growth: float | int = 2.0,
    max_step: float | int = 100.0,
    num_grid: int = 16,
) -> tuple[PyTree, PofInfo]:
    """Moves a head by a random multiple of its best gradient step.

    Costs a gradient in the head and a :func:`head_line_search`.

    Args:
      key: of the multiple, uniform in ``[0, sampling_range)``.
      loss_of_head: scalar loss of a tree like ``head``, on the probe batch.
      head: parameters of the classifier, floating-point leaves.
      sampling_range: s, >= 0 and finite; may be traced. 0 gives ``head`` bit for bit,
        2 the whole valley where the loss is quadratic.
      initial_step: as in :func:`head_line_search`.
      growth: as in :func:`head_line_search`.
      max_step: as in :func:`head_line_search`.
      num_grid: as in :func:`head_line_search`.

    Returns:
      The moved head, in the dtypes that came, and a :class:`PofInfo`.

    Raises:
      ValueError: if ``sampling_range`` is negative or not finite, ``key`` is not a
        typed key, or as :func:`head_line_search` does.

    Examples:
      >>> key, loss = jax.random.key(0), lambda w: jnp.sum(w**2)
      >>> head, info = pof_perturb(key, loss, jnp.array([1.0]))
      >>> bool(abs(head[0]) <= 1), float(info.search.step)
      (True, 0.5)
    """
    name = "pof_perturb"
    check_number(
        name,
        "finite and >= 0",
        hint="; 0 leaves the head as it is",
        sampling_range=sampling_range,
    )
    if not jnp.issubdtype(jnp.asarray(key).dtype, jax.dtypes.prng_key):
        raise ValueError(
            f"{name}: key must be a typed key such as jax.random.key(0), got "
            f"{jnp.asarray(key).dtype}."
        )
    check_floating(name, "head", head)
    head = jax.lax.stop_gradient(head)
    with jax.named_scope(name):
        gradient = jax.grad(lambda h: _scalar(name, loss_of_head(h)))(head)
        search = head_line_search(
            loss_of_head,
            head,
            gradient,
            initial_step=initial_step,
            growth=growth,
            max_step=max_step,
            num_grid=num_grid,
        )
        dtype = search.step.dtype
        scale = jax.random.uniform(key, (), dtype) * jnp.asarray(sampling_range, dtype)
        return _move(head, gradient, scale * search.step), PofInfo(search, scale)


def pof_value_and_grad(
    loss_fn: Callable[[PyTree, PyTree, PyTree], Any],
    *,
    sampling_range: ArrayLike = 2.0,
    probe_fn: Callable[[PyTree, PyTree], HeadLoss] | None = None,
    has_aux: bool = False,
    with_info: bool = False,
    initial_step: float | int = 1.0,
    growth: float | int = 2.0,
    max_step: float | int = 100.0,
    num_grid: int = 16,
) -> Callable[..., tuple]:
    """Builds the loss and the gradient of the features under a moved head.

    Give the gradient to an optimiser of the features alone and keep the head; with
    ``sampling_range=0`` that is plain training under a frozen head, bit for bit.

    Args:
      loss_fn: ``loss_fn(features, head, batch)`` gives a scalar, or with ``has_aux``
        a pair of a scalar and anything.
      sampling_range: s, as in :func:`pof_perturb`.
      probe_fn: ``probe_fn(features, probe_batch)`` gives ``loss_of_head``, a scalar
        loss of the head. What it computes outside ``loss_of_head`` is computed once a
        step, where the default, ``loss_fn`` on the probe batch, computes the features
        again for every step tried. No gradient goes through its features.
      has_aux: whether ``loss_fn`` gives a pair.
      with_info: whether to add the :class:`PofInfo`, to count how often
        ``info.search.capped`` or a step of 0 occurs.
      initial_step: as in :func:`head_line_search`.
      growth: as in :func:`head_line_search`.
      max_step: as in :func:`head_line_search`.
      num_grid: as in :func:`head_line_search`.

    Returns:
      A function of ``(key, features, head, batch, probe_batch)``. It gives ``(value,
      grads)``, or ``((value, aux), grads)`` with ``has_aux``, and the info as a third
      with ``with_info``. The value is the loss of ``batch`` under the moved head, not
      under ``head``; ``grads`` is a tree like ``features``. The two batches should be
      drawn apart; the authors take 64 and 256 examples.

    Raises:
      ValueError: if an option is out of range; from the function as
        :func:`pof_perturb` does.

    Examples:
      >>> def loss_fn(features, head, batch):
      ...     inputs, targets = batch
      ...     return jnp.mean((jnp.tanh(inputs @ features) @ head - targets) ** 2)
      >>> def probe_fn(features, batch):
      ...     hidden = jnp.tanh(batch[0] @ features)  # once a step
      ...     return lambda head: jnp.mean((hidden @ head - batch[1]) ** 2)
      >>> value_and_grad = pof_value_and_grad(loss_fn, probe_fn=probe_fn)
      >>> batch = jnp.ones((4, 3)), jnp.zeros(4)
      >>> features, head = jnp.ones((3, 2)), jnp.ones(2)
      >>> key = jax.random.key(0)
      >>> value, grads = value_and_grad(key, features, head, batch, batch)
      >>> grads.shape
      (3, 2)
    """
    name = "pof_value_and_grad"
    check_number(
        name,
        "finite and >= 0",
        hint="; 0 leaves the head as it is",
        sampling_range=sampling_range,
    )
    _check_search(name, initial_step, growth, max_step, num_grid)

    def loss_and_aux(features, head, batch):
        out = loss_fn(features, head, batch)
        if not has_aux:
            return _scalar(name, out, keep=True), None
        if not isinstance(out, (tuple, list)) or len(out) != 2:
            raise ValueError(
                f"{name}: with has_aux=True the loss_fn must give (value, aux), got "
                f"{type(out).__name__}."
            )
        return _scalar(name, out[0], keep=True), out[1]

    def default_probe(features, batch):
        return lambda head: loss_and_aux(features, head, batch)[0]

    probe = default_probe if probe_fn is None else probe_fn

    def value_and_grad(
        key: Key[Array, ""],
        features: PyTree,
        head: PyTree,
        batch: PyTree,
        probe_batch: PyTree,
    ) -> tuple:
        with jax.named_scope(name):
            frozen = jax.lax.stop_gradient(features)
            moved, info = pof_perturb(
                key,
                probe(frozen, probe_batch),
                head,
                sampling_range=sampling_range,
                initial_step=initial_step,
                growth=growth,
                max_step=max_step,
                num_grid=num_grid,
            )
            both = jax.value_and_grad(loss_and_aux, has_aux=True)
            (value, aux), grads = both(features, moved, batch)
            found = ((value, aux) if has_aux else value), grads
            return (*found, info) if with_info else found

    return value_and_grad


def split_head(params: PyTree, is_head: Callable[[str], bool]) -> tuple[PyTree, PyTree]:
    """Splits parameters into features and head by the paths of their leaves.

    Args:
      params: any pytree.
      is_head: predicate of a path such as ``"layers/2/kernel"``.

    Returns:
      Features and head: two trees like ``params``, each with ``optax.MaskedNode``
      where the other has the leaf. Gradients and optimisers pass over those.

    Raises:
      ValueError: if ``is_head`` picks no leaf or every leaf.

    Examples:
      >>> params = {"body": 1, "top": {"bias": 2}}
      >>> split_head(params, lambda path: path.startswith("top"))
      ({'body': 1, 'top': {'bias': MaskedNode()}}, {'body': MaskedNode(), 'top': ...
    """
    paths = [_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    picked = [bool(is_head(path)) for path in paths]
    if all(picked) or not any(picked):
        which = "every leaf" if any(picked) else "no leaf"
        raise ValueError(
            f"split_head: is_head must pick some of the leaves and leave others, it "
            f"picked {which} of {paths}. It gets one such path at a time: pass for "
            f'example is_head=lambda path: path.startswith("head").'
        )
    leaves, structure = jax.tree.flatten(params)
    hole = optax.MaskedNode()
    keep = lambda of_head: [
        leaf if mine == of_head else hole for leaf, mine in zip(leaves, picked)
    ]
    return structure.unflatten(keep(False)), structure.unflatten(keep(True))


def join_head(features: PyTree, head: PyTree) -> PyTree:
    """Joins what :func:`split_head` split, for use inside a loss.

    Args:
      features: the features, with holes where the head is.
      head: the head, with holes where the features are.

    Returns:
      The whole tree.

    Raises:
      ValueError: if the trees differ in more than the holes, or both have a leaf in
        the same place.

    Examples:
      >>> join_head(*split_head({"a": 1, "b": 2}, lambda path: path == "b"))
      {'a': 1, 'b': 2}
    """
    count = lambda tree: len(jax.tree.leaves(tree))
    try:
        whole = fill_holes(features, head)
    except ValueError as error:
        raise ValueError(
            "join_head: features and head must be the two trees that split_head gave, "
            f"alike but for their holes: {error}"
        ) from error
    if count(whole) != count(features) + count(head):
        raise ValueError(
            "join_head: features and head must have no leaf in common, got "
            f"{count(features)} and {count(head)} leaves for {count(whole)} places. "
            "Pass the two trees that split_head gave."
        )
    return whole


def _path(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _wide(tree: PyTree):
    return jnp.result_type(jnp.float32, *map(jnp.result_type, jax.tree.leaves(tree)))


def _move(head: PyTree, direction: PyTree, step: Scalar) -> PyTree:
    # Nothing is added at step 0, so that 0 * inf cannot reach the head.
    def move(leaf, slope):
        leaf = jnp.asarray(leaf)
        moved = leaf.astype(step.dtype) - step * jnp.asarray(slope, step.dtype)
        return jnp.where(step == 0, leaf, moved.astype(leaf.dtype))

    return jax.tree.map(move, head, direction)


def _is_usable(direction: PyTree) -> Bool[Array, ""]:
    leaves = list(map(jnp.asarray, jax.tree.leaves(direction)))
    moving = jnp.array([jnp.any(leaf != 0) for leaf in leaves], bool)
    return all_finite(direction) & jnp.any(moving)


def _scalar(name: str, loss, *, keep: bool = False) -> Scalar:
    if not jnp.isscalar(loss) and getattr(loss, "shape", None) != ():
        what = f"shape {loss.shape}" if hasattr(loss, "shape") else type(loss).__name__
        raise ValueError(
            f"{name}: the loss must be a scalar, got {what}. A pair (value, aux) needs "
            "pof_value_and_grad(..., has_aux=True)."
        )
    loss = jnp.asarray(loss)
    return loss if keep else loss.astype(jnp.promote_types(jnp.float32, loss.dtype))


def _check_search(name: str, initial_step, growth, max_step, num_grid) -> int:
    """Checks the options; gives the number of times that the step can grow."""
    steps = {"initial_step": initial_step, "max_step": max_step}
    check_number(name, "a number", **steps, growth=growth)
    if not 0 < initial_step <= max_step < math.inf:
        raise ValueError(
            f"{name}: needs 0 < initial_step <= max_step < inf, got "
            f"initial_step={initial_step} and max_step={max_step}."
        )
    if not 1 < growth < math.inf:
        raise ValueError(f"{name}: growth must be > 1 and finite, got {growth}.")
    check_count(name, num_grid=num_grid)
    ratio = math.log(max_step / initial_step) / math.log(growth)
    return math.ceil(round(ratio, 9))
