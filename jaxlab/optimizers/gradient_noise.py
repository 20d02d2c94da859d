"""Gaussian noise on gradients whose variance falls with the steps.

With t = 0, 1, 2, ... the step, every entry of the gradient gets noise of its own,

    g <- g + n,   n ~ N(0, s^2),   s^2 = eta / (1 + t)^gamma,

where s^2 is the variance: the deviation falls as (1 + t)^(-gamma / 2). The sum goes to
the optimizer, after clipping and before any preconditioning (the order relative to
clipping is recalled, not verified). eta is absolute: a loss that is a sum over rows
needs another one than a mean. Behind Adam, entries with gradients below s move by about
the learning rate a step, at random, until s has fallen.

The values eta in {0.01, 0.3, 1} and gamma = 0.55 are those quoted for the paper; they
were not checked in its text. ``optax.add_noise`` has the same variances. Here the noise
of bfloat16 leaves is drawn in float32 and the sum rounded once, eta and gamma may be
schedules, an integer gamma does not overflow, and the noise of a leaf depends on the
key, the step and the place of the leaf alone, whatever else is in the tree.
Reference: Neelakantan, Vilnis, Le, Sutskever, Kaiser, Kurach, Martens, "Adding Gradient
Noise Improves Learning for Very Deep Networks", 2015.
"""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key, PyTree

from jaxlab import trees
from jaxlab._chains import Place
from jaxlab._checks import check_number
from jaxlab._norms import wide
from jaxlab.curvature._vectors import space_of
from jaxlab.optimizers._links import DROPPED

ScalarOrSchedule = ArrayLike | Callable[..., Any]


def gradient_noise_schedule(
    eta: ScalarOrSchedule = 0.3, gamma: ScalarOrSchedule = 0.55
) -> Callable[[Int[ArrayLike, ""]], Float[Array, ""]]:
    """Makes the schedule of the variance, ``eta / (1 + t)^gamma``.

    Args:
      eta: variance at step 0, >= 0, in the units of the squared gradient; or a schedule
        of the step.
      gamma: rate of the decay, >= 0; or a schedule.

    Returns:
      A function ``step -> variance``, float32 at least.

    Raises:
      ValueError: if a number is out of range.

    Examples:
      >>> gradient_noise_schedule(1.0, 2.0)(1)
      Array(0.25, dtype=float32)
    """
    _check_numbers("gradient_noise_schedule", eta=eta, gamma=gamma)

    def variance(step):
        # In floating point: 1 + t overflows where the counter of steps is full.
        base = 1 + jnp.asarray(step).astype(jnp.result_type(float))
        return _at(eta, step) / base ** _at(gamma, step)

    return variance


def add_gradient_noise(
    key: Key[Array, ""], grads: PyTree, *, variance: ArrayLike
) -> PyTree:
    """Adds Gaussian noise of one variance to every entry of a tree.

    Args:
      key: of the noise. Each leaf folds it with its path, so that removing or masking
        other leaves changes nothing.
      grads: floating leaves of any shape.
      variance: s^2, >= 0; at 0 the result is ``grads`` bit for bit.

    Returns:
      A tree like ``grads``. Noise and sum are float32 at least, then cast.

    Raises:
      ValueError: if ``grads`` is empty or has leaves that are not floating, the key is
        not a typed one, or the variance is a number out of range.

    Examples:
      >>> grads = {"w": jnp.ones(2)}
      >>> add_gradient_noise(jax.random.key(0), grads, variance=0.0)
      {'w': Array([1., 1.], dtype=float32)}
    """
    name = "add_gradient_noise"
    _check_numbers(name, variance=variance)
    _check_key(name, key)
    _check_tree(name, grads)

    def noisy(path, leaf):
        leaf = jnp.asarray(leaf)
        mine = _fold(key, jax.tree_util.keystr(path))
        dtype = jnp.promote_types(leaf.dtype, jnp.float32)
        noise = jax.random.normal(mine, leaf.shape, dtype)
        total = leaf.astype(dtype) + deviation.astype(dtype) * noise
        return jnp.where(deviation == 0, leaf, total.astype(leaf.dtype))

    with jax.named_scope(name):
        deviation = jnp.sqrt(wide(variance))
        return jax.tree_util.tree_map_with_path(noisy, grads)


class GradientNoiseState(NamedTuple):
    """State of :func:`annealed_gradient_noise`.

    Attributes:
      count: steps.
      key: made from the ``key`` that the link was given, the same at all steps; ``()``
        where ``update`` is given one.

    Examples:
      >>> int(annealed_gradient_noise().init(jnp.ones(2)).count)
      0
    """

    count: Int[Array, ""]
    key: Any

    @property
    def place(self) -> Place | None:
        """Says where it may stand, if the step's key is what it draws from."""
        ours = not isinstance(self.key, tuple)
        return None if ours else Place("annealed_gradient_noise", "noise")


def annealed_gradient_noise(
    eta: ScalarOrSchedule = 0.3,
    gamma: ScalarOrSchedule = 0.55,
    *,
    key: Key[Array, ""] | None = None,
    mask: PyTree | Callable[..., Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adds noise of variance ``eta / (1 + t)^gamma`` to the gradients of step t.

    The noise of a step is a function of the key, of t and of the leaf's path. The key
    is folded with a number of this link, so that other links with the same key draw
    other numbers; two of THESE links at one gradient need a key each. Where replicas
    average gradients, the same key on all of them keeps their noise equal.

    Args:
      eta: variance at step 0, >= 0; or a schedule. 0 is the identity.
      gamma: rate of the decay, >= 0; or a schedule.
      key: of all steps, a typed key, kept in the state; for loops that pass no key to
        ``update``. It goes before one that they pass.
      mask: which leaves get noise, as in ``optax.masked``, which then wraps the link.

    Returns:
      A transformation whose ``update`` needs ``key=``, a fresh typed key for each step,
      unless the link was given one.

    Raises:
      ValueError: if a number is out of range or ``key`` is not a typed key; from
        ``update``, if the key is missing or the tree is empty or not floating.

    Examples:
      >>> import optax
      >>> tx = optax.chain(annealed_gradient_noise(eta=0.01), optax.sgd(1.0))
      >>> w = jnp.ones(3)
      >>> updates, state = tx.update(w, tx.init(w), key=jax.random.key(0))
      >>> int(state[0].count), bool(jnp.all(updates != -w))
      (1, True)
    """
    name = "annealed_gradient_noise"
    _check_numbers(name, eta=eta, gamma=gamma)
    if key is not None:
        _check_key(name, key)
    variance, kept = gradient_noise_schedule(eta, gamma), key

    def init(params):
        _check_tree(name, params, "params")
        # Folded here: a new buffer, so that a donated state does not take ours along.
        base = () if kept is None else _fold(kept, name)
        return GradientNoiseState(jnp.zeros((), jnp.int32), base)

    def update(updates, state, params=None, *, key=None, **extra_args):
        _check_tree(name, updates, "updates")
        base = state.key
        if kept is None:
            if key is None:
                raise ValueError(
                    f"{name} needs key=: call update(..., key=key) with a fresh "
                    "jax.random.key for each step (make_train_step passes one), or "
                    f"give the link one for all: {name}(key=jax.random.key(0)). "
                    f"{DROPPED}"
                )
            _check_key(name, key)
            base = _fold(key, name)
        now = jax.random.fold_in(base, state.count)
        updates = add_gradient_noise(now, updates, variance=variance(state.count))
        return updates, state._replace(count=optax.safe_increment(state.count))

    link = optax.GradientTransformationExtraArgs(init, update)
    return link if mask is None else optax.masked(link, mask)


def _at(value, step):
    return wide(value(step) if callable(value) else value)


def _fold(key, text):
    return jax.random.fold_in(key, np.uint32(zlib.crc32(text.encode())))


def _check_numbers(name, **numbers) -> None:
    check_number(name, "finite and >= 0", schedule=True, **numbers)


def _check_key(name, key) -> None:
    kind = getattr(key, "dtype", None)
    typed = kind is not None and jnp.issubdtype(kind, jax.dtypes.prng_key)
    if not typed or jnp.shape(key):
        got = f"{kind}{list(jnp.shape(key))}" if kind else type(key).__name__
        raise ValueError(
            f"{name}: key must be one typed key such as jax.random.key(0), got {got}."
        )


def _check_tree(name, tree, argument="grads") -> None:
    if jax.tree.leaves(tree) or not trees.has_holes(tree):
        space_of(name, tree, argument)
