"""Digits with wrong labels: the setting in which the claims on flat minima are tested.

Of 1,797 digits 1,078 are trained on; a fifth of these get a label drawn uniformly from
the nine wrong ones. 219 are for tuning and 500 for the judgement, both with clean
labels. Every method sees the same start and the same batches at the same seed.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxlab.curvature.eigenpairs import top_eigenpairs
from jaxlab.curvature.hessian import hessian_operator
from jaxlab.datasets import load
from jaxlab.likelihoods import Categorical
from jaxlab.models import cnn, mlp_s

LIKELIHOOD = Categorical()
TRAIN, VALIDATION = 1_078, 219
FLIPPED = 0.2
BINS = 15  # of the expected calibration error
MODELS: dict[str, Callable[..., nnx.Module]] = {"MLP-S": mlp_s, "CNN": cnn}

Params = Any
Rows = tuple[jax.Array, jax.Array]
# Makes an optimizer from numbers, which are traced: one compiled loop serves them all.
Make = Callable[..., optax.GradientTransformation]


class Splits(NamedTuple):
    train: Rows  # with wrong labels
    validation: Rows
    test: Rows
    wrong: jax.Array  # which of the training rows


def flipped(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Replaces a share of the labels 0..9 by wrong ones.

    Examples:
      >>> labels = np.zeros(10, np.int32)
      >>> int((flipped(labels, 0.2, seed=0) != labels).sum())
      2
    """
    rng = np.random.default_rng(seed)
    rows = rng.choice(len(labels), round(share * len(labels)), replace=False)
    new = labels.copy()
    new[rows] = (labels[rows] + rng.integers(1, 10, len(rows))) % 10
    return new


def head() -> dict[str, str]:
    """Names the data of a record."""
    data = load("digits")
    return {"name": data.name, "digest": data.digest}


def splits(seed: int, *, share: float = FLIPPED) -> Splits:
    """Cuts digits into three and puts wrong labels into the first."""
    parts = load("digits").splits.values()
    x, y = (np.concatenate(part) for part in zip(*parts, strict=True))
    noisy = flipped(y[:TRAIN], share, seed)
    ends = TRAIN, TRAIN + VALIDATION
    rows = [
        (jnp.asarray(inputs), jnp.asarray(labels))
        for inputs, labels in zip(np.split(x, ends), np.split(y, ends), strict=True)
    ]
    train = rows[0][0], jnp.asarray(noisy)
    return Splits(train, *rows[1:], jnp.asarray(noisy != y[:TRAIN]))


class Net(NamedTuple):
    """A model as functions of a tree of parameters."""

    start: Callable[[jax.Array], Params]
    apply_fn: Callable[[Params, jax.Array], jax.Array]
    loss_fn: Callable[[Params, Rows], jax.Array]
    convolutional: bool  # slow in compiled loops on CPUs


@functools.cache
def net(name: str) -> Net:
    """Makes a model of ``MODELS``."""
    build = MODELS[name]
    graph, _ = nnx.split(nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0))))

    def start(key):
        state = nnx.split(build(rngs=nnx.Rngs(key)), nnx.Param)[1]
        return nnx.to_pure_dict(state)

    def apply_fn(params, inputs):
        return nnx.merge(graph, params)(inputs)

    def loss_fn(params, rows):
        return LIKELIHOOD.nll(apply_fn(params, rows[0]), rows[1])

    return Net(jax.jit(start), apply_fn, loss_fn, name == "CNN")


def batches(key: jax.Array, *, rows: int, batch_size: int, steps: int) -> jax.Array:
    """Draws the rows of every step: whole epochs, each in an order of its own.

    Rows that do not fill a batch wait for another epoch.

    Examples:
      >>> batches(jax.random.key(0), rows=5, batch_size=2, steps=3).shape
      (3, 2)
    """
    each = rows // batch_size
    keys = jax.random.split(key, -(-steps // each))
    order = jax.vmap(lambda key: jax.random.permutation(key, rows))(keys)
    return order[:, : each * batch_size].reshape(-1, batch_size)[:steps]


def momentum_sgd(rate: Any, steps: int) -> optax.GradientTransformation:
    """Makes SGD with momentum 0.9 on a cosine from ``rate`` to zero."""
    return optax.sgd(optax.cosine_decay_schedule(rate, steps), momentum=0.9)


class Trained(NamedTuple):
    params: Params  # after the last step
    best: Params  # of the epoch with the best accuracy on the validation rows


def train(
    net: Net,
    make: Make,
    numbers: Mapping[str, Any],
    key: jax.Array,
    data: Splits,
    *,
    steps: int,
    batch_size: int,
) -> Trained:
    """Trains from the start of a key by the optimizer ``make(**numbers)``.

    Args:
      net: the model.
      make: gives an optimizer whose ``update`` may take ``value_fn``, ``grad_fn`` and
        ``grad``; the same function for the same program.
      numbers: its arguments; other numbers need no other program.
      key: of start and order.
      data: the rows.
      steps: of training.
      batch_size: rows of a step.
    """
    start, order = jax.random.split(key)
    index = batches(order, rows=TRAIN, batch_size=batch_size, steps=steps)
    each = TRAIN // batch_size
    numbers = {name: jnp.float32(value) for name, value in numbers.items()}
    params = net.start(start)
    if not net.convolutional:
        return _whole(net, make, numbers, params, data, index, each=each)
    # Convolutions run several times slower in a compiled loop on CPUs.
    run = _begin(net, make, numbers, params)
    for number, rows in enumerate(index):
        run = _step(net, make, numbers, run, data, rows)
        if (number + 1) % each == 0:
            run = _judge(net, run, data)
    return Trained(run.params, run.best)


class _Run(NamedTuple):
    params: Params
    state: Any
    best: Params
    accuracy: jax.Array


def _begin(net, make, numbers, params):
    state = optax.with_extra_args_support(make(**numbers)).init(params)
    return _Run(params, state, params, jnp.float32(-1))


@functools.partial(jax.jit, static_argnames=("net", "make"))
def _step(net, make, numbers, run, data, rows):
    batch = data.train[0][rows], data.train[1][rows]
    value_fn = lambda at: net.loss_fn(at, batch)
    grad_fn = jax.grad(value_fn)
    grads = grad_fn(run.params)
    update = optax.with_extra_args_support(make(**numbers)).update
    extra = {"value_fn": value_fn, "grad_fn": grad_fn, "grad": grads}
    updates, state = update(grads, run.state, run.params, **extra)
    return run._replace(params=optax.apply_updates(run.params, updates), state=state)


@functools.partial(jax.jit, static_argnames="net")
def _judge(net, run, data):
    now = accuracy(net.apply_fn(run.params, data.validation[0]), data.validation[1])
    better = now > run.accuracy
    keep = lambda new, old: jnp.where(better, new, old)
    best = jax.tree.map(keep, run.params, run.best)
    return run._replace(best=best, accuracy=keep(now, run.accuracy))


@functools.partial(jax.jit, static_argnames=("net", "make", "each"))
def _whole(net, make, numbers, params, data, index, *, each):
    def step(run, number_and_rows):
        number, rows = number_and_rows
        run = _step(net, make, numbers, run, data, rows)
        judge = functools.partial(_judge, net, data=data)
        return jax.lax.cond((number + 1) % each == 0, judge, lambda r: r, run), None

    begin = _begin(net, make, numbers, params)
    run, _ = jax.lax.scan(step, begin, (jnp.arange(len(index)), index))
    return Trained(run.params, run.best)


def accuracy(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    """Computes the share of right answers."""
    return jnp.mean(outputs.argmax(-1) == labels)


def calibration_error(probabilities: jax.Array, labels: jax.Array) -> jax.Array:
    """Computes the expected calibration error over ``BINS`` bins of equal width.

    The mean over rows of how far confidence and accuracy of the row's bin are apart.

    Examples:
      >>> sure = jnp.array([[1.0, 0.0], [1.0, 0.0]])
      >>> float(calibration_error(sure, jnp.array([0, 1])))
      0.5
    """
    confidence, right = probabilities.max(-1), probabilities.argmax(-1) == labels
    place = jnp.clip(jnp.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    total = jnp.zeros(BINS).at[place].add(confidence - right)
    return jnp.abs(total).sum() / len(labels)


@functools.partial(jax.jit, static_argnames="net")
def _quality(net, params, data):
    learnt, outputs = (
        net.apply_fn(params, part[0]) for part in (data.train, data.test)
    )
    probabilities = jax.nn.softmax(outputs)
    fitted = learnt.argmax(-1) == data.train[1]
    return {
        "train loss": LIKELIHOOD.nll(learnt, data.train[1]),
        "wrong labels learnt": jnp.sum(fitted & data.wrong) / jnp.sum(data.wrong),
        "validation accuracy": accuracy(
            net.apply_fn(params, data.validation[0]), data.validation[1]
        ),
        "test accuracy": accuracy(outputs, data.test[1]),
        "test loss": LIKELIHOOD.nll(outputs, data.test[1]),
        "calibration error": calibration_error(probabilities, data.test[1]),
    }


def quality(net: Net, params: Params, data: Splits) -> dict[str, float]:
    """Measures losses, accuracies and calibration."""
    return {name: float(x) for name, x in _quality(net, params, data).items()}


def top_eigenvalue(net: Net, params: Params, rows: Rows) -> float:
    """Finds the largest eigenvalue of the Hessian of the mean loss over the rows."""
    operator = hessian_operator(net.loss_fn, params, rows)
    found = top_eigenpairs(jax.random.key(0), operator, params, k=1)
    return float(found.values[0])
