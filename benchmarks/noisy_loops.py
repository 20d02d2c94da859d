"""Training loops on noisy digits for methods that an optimizer alone cannot express.

SAF needs the logits of earlier epochs, MESA an averaged model, PoF a second batch and a
network in two parts. SGD, weight decay and SAM run in the same loops, from the same
starts and on the same batches.
"""

import dataclasses
import functools
import itertools
import math
import multiprocessing
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks import noisy_digits
from benchmarks.noisy_digits import LIKELIHOOD, Net, Params, Rows
from benchmarks.paired import difference
from jaxlab.curvature.eigenpairs import top_eigenpairs
from jaxlab.curvature.hessian import hessian_operator
from jaxlab.curvature.wrappers import block_operator
from jaxlab.sharpness import (
    in_window,
    init_teacher,
    init_trajectory_buffer,
    join_head,
    mesa_loss,
    pof_value_and_grad,
    read_trajectory,
    saf_loss,
    sam,
    split_head,
    update_teacher,
    write_trajectory,
)

SGD, DECAY, SAF, MESA, SAM = "SGD", "weight decay", "SAF", "MESA", "SAM"
ALL, FROZEN, POF = "all weights", "head frozen", "PoF"
FIRST_TUNING_SEED = 1_000
CLASSES = 10
HEAD = ("layers", 2)  # the last layer of MLP-S

Numbers = Mapping[str, Any]


def repeated(
    function: Callable[..., Any], *arguments: Any, processes: int
) -> Iterator[Any]:
    """Calls a function once in each of some new processes; with 0 once in this one.

    What one process measures in turns holds for that process: how its memory lies, and
    what it did before, move all its rounds alike.

    Args:
      function: of a module; it and its arguments travel to the process.
      *arguments: of the function.
      processes: one after the other.
    """
    if not processes:
        yield function(*arguments)
    for _ in range(processes):
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
            yield pool.submit(function, *arguments).result()


def log_axis(axes: Any) -> None:
    """Makes the y axis logarithmic, with plain numbers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 6, 8)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


class Ratio(NamedTuple):
    """Geometric mean of paired ratios with its 95 % interval by Student's t."""

    lower: float
    mean: float
    upper: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.lower:.3f}, {self.upper:.3f}]"


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Compares positive numbers of two methods seed by seed: ours over theirs.

    Examples:
      >>> print(ratio([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]))
      0.500 [0.500, 0.500]
    """
    logs = ([math.log(value) for value in values] for values in (ours, theirs))
    return Ratio(*map(math.exp, difference(*logs)))


def chosen(tried: Sequence[Sequence[Any]], **fixed: float) -> dict[str, float]:
    """Gives the numbers of the best mean accuracy; of equals the first.

    Args:
      tried: pairs of numbers and accuracies.
      **fixed: numbers that have to be these.

    Examples:
      >>> tried = [[{"rate": 1.0}, [0.5, 0.7]], [{"rate": 2.0}, [0.6, 0.7]]]
      >>> chosen(tried), chosen(tried, rate=1.0)
      ({'rate': 2.0}, {'rate': 1.0})
    """
    fits = [pair for pair in tried if fixed.items() <= pair[0].items()]
    return max(fits, key=lambda pair: statistics.mean(pair[1]))[0]


def points(grid: Mapping[str, Sequence[float]]) -> list[dict[str, float]]:
    """Lists every point of a grid.

    Examples:
      >>> points({"rate": (0.1, 0.2), "range": (1.0,)})
      [{'rate': 0.1, 'range': 1.0}, {'rate': 0.2, 'range': 1.0}]
    """
    every = itertools.product(*grid.values())
    return [dict(zip(grid, values, strict=True)) for values in every]


def at_ends(
    numbers: Mapping[str, float], grid: Mapping[str, Sequence[float]]
) -> list[str]:
    """Names the numbers that stand at an end of their grid.

    Examples:
      >>> at_ends({"rate": 0.1, "range": 1.0}, {"rate": (0.1, 0.2), "range": (0, 1, 2)})
      ['rate']
    """
    return [n for n in grid if numbers[n] in (min(grid[n]), max(grid[n]))]


def named(numbers: Mapping[str, float]) -> str:
    """Writes numbers with their names.

    Examples:
      >>> named({"rate": 0.1, "weight": 2.0})
      'rate 0.1, weight 2'
    """
    return ", ".join(f"{name} {value:.3g}" for name, value in numbers.items())


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A method, and the sizes of its training."""

    net: Net
    method: str
    epochs: int
    batch_size: int
    start: int = 0  # the last epoch without the term
    lag: int = 3
    temperature: float = 5.0
    probe_size: int = 256
    max_step: float = 1e4  # of PoF's search
    rows: int = noisy_digits.TRAIN

    @property
    def each(self) -> int:
        """Steps of an epoch; the rows that fill no batch are left out of it."""
        return self.rows // self.batch_size

    @property
    def steps(self) -> int:
        return self.epochs * self.each

    def order(self, key: jax.Array) -> jax.Array:
        """Draws the rows of every step: ``(epochs, steps of an epoch, batch)``."""
        sizes = {"rows": self.rows, "batch_size": self.batch_size, "steps": self.steps}
        index = noisy_digits.batches(key, **sizes)
        return index.reshape(self.epochs, self.each, self.batch_size)


class Run(NamedTuple):
    params: Params
    state: Any  # of the optimizer
    memory: Any  # the buffer of SAF, the averaged model of MESA


def _optimizer(recipe: Recipe, numbers: Numbers):
    links = [noisy_digits.momentum_sgd(numbers["rate"], recipe.steps)]
    if recipe.method == DECAY:
        links.insert(0, optax.add_decayed_weights(numbers["decay"]))
    if recipe.method == SAM:
        links.insert(0, sam(numbers["radius"]))
    return optax.with_extra_args_support(optax.chain(*links))


def begin(recipe: Recipe, numbers: Numbers, key: jax.Array) -> Run:
    """Makes the start of a run of SGD, weight decay, SAF, MESA or SAM."""
    params, memory = recipe.net.start(key), None
    if recipe.method == SAF:
        sizes = {"num_examples": recipe.rows, "num_classes": CLASSES}
        memory = init_trajectory_buffer(**sizes, lag=recipe.lag)
    if recipe.method == MESA:
        memory = init_teacher(params)
    return Run(params, _optimizer(recipe, numbers).init(params), memory)


@functools.partial(jax.jit, static_argnames="recipe")
def step(
    recipe: Recipe,
    numbers: Numbers,
    run: Run,
    train: Rows,
    rows: jax.Array,
    epoch: jax.Array,
) -> Run:
    """Takes one step.

    SAF records the logits of each batch before its update. A row that was left out of
    the epoch ``lag`` epochs ago has nothing recorded there: it adds nothing to the term
    and counts in its mean.
    """
    net, method = recipe.net, recipe.method
    inputs, labels = train[0][rows], train[1][rows]
    active = in_window(epoch, start=recipe.start, end=float("inf"))
    term = {"temperature": recipe.temperature, "active": active}

    def loss_fn(params):
        logits, memory = net.apply_fn(params, inputs), run.memory
        loss = LIKELIHOOD.nll(logits, labels)
        if method == SAF:
            # Were it read first, the compiler would copy the buffer in every step.
            memory = write_trajectory(memory, rows, logits, epoch=epoch)
            past, known = read_trajectory(memory, rows, epoch=epoch)
            own = {"weight": numbers["weight"], "known": known}
            loss = saf_loss(loss, logits, past, **own, **term)
        if method == MESA:
            past = net.apply_fn(memory, inputs)
            loss = mesa_loss(loss, logits, past, weight=numbers["weight"], **term)
        return loss, memory

    grad_fn = jax.grad(loss_fn, has_aux=True)
    grads, memory = grad_fn(run.params)
    update = _optimizer(recipe, numbers).update
    extra = {"grad_fn": lambda at: grad_fn(at)[0], "grad": grads}
    updates, state = update(grads, run.state, run.params, **extra)
    params = optax.apply_updates(run.params, updates)
    if method == MESA:
        memory = update_teacher(memory, params, decay=numbers["average"])
    return Run(params, state, memory)


@functools.partial(jax.jit, static_argnames="recipe")
def _compiled_epoch(recipe, numbers, run, train, index, epoch):
    one = lambda run, rows: (step(recipe, numbers, run, train, rows, epoch), None)
    return jax.lax.scan(one, run, index)[0]


def run_epoch(
    recipe: Recipe,
    numbers: Numbers,
    run: Run,
    train: Rows,
    index: jax.Array,
    epoch: jax.Array,
) -> Run:
    """Takes the steps of one epoch, compiled as one unless the net convolves."""
    if not recipe.net.convolutional:
        return _compiled_epoch(recipe, numbers, run, train, index, epoch)
    for rows in index:
        run = step(recipe, numbers, run, train, rows, epoch)
    return run


def as_arrays(numbers: Numbers) -> dict[str, jax.Array]:
    """Makes arrays of numbers, so that one program serves them all."""
    return {name: jnp.float32(value) for name, value in numbers.items()}


def train(recipe: Recipe, numbers: Numbers, key: jax.Array, rows: Rows) -> Params:
    """Trains by SGD, weight decay, SAF, MESA or SAM.

    Args:
      recipe: method and sizes.
      numbers: ``rate``, and ``decay``, ``radius``, ``weight`` or ``weight`` and
        ``average`` where the method has them.
      key: of start and order, as in :func:`benchmarks.noisy_digits.train`.
      rows: to train on.
    """
    numbers = as_arrays(numbers)
    start, order = jax.random.split(key)
    run = begin(recipe, numbers, start)
    for epoch, index in enumerate(recipe.order(order)):
        run = run_epoch(recipe, numbers, run, rows, index, jnp.int32(epoch))
    return run.params


class PostTrained(NamedTuple):
    params: Params
    capped: jax.Array  # share of the searches that ended at the largest step
    idle: jax.Array  # share of those that found no step


def is_head(path: str) -> bool:
    """Tells the leaves of the last layer of MLP-S."""
    return path.startswith("/".join(map(str, HEAD)) + "/")


@functools.partial(jax.jit, static_argnames="recipe")
def post_train(
    recipe: Recipe, numbers: Numbers, key: jax.Array, params: Params, rows: Rows
) -> PostTrained:
    """Trains MLP-S on: all of it, its features under a frozen head, or by PoF.

    Args:
      recipe: method and sizes.
      numbers: ``rate`` of momentum SGD at the first step, from which a cosine leads to
        zero, and ``range``, the sampling range of PoF.
      key: of the orders, the same for every method, and of the moves of PoF.
      params: the weights to begin with.
      rows: to train on.
    """
    loss_fn, method = recipe.net.loss_fn, recipe.method
    of_batch, of_probe, of_moves = jax.random.split(key, 3)
    index = recipe.order(of_batch).reshape(recipe.steps, -1)
    sizes = {"batch_size": min(recipe.probe_size, recipe.rows), "steps": recipe.steps}
    probes = noisy_digits.batches(of_probe, rows=recipe.rows, **sizes)
    keys = jax.random.split(of_moves, recipe.steps)
    optimizer = noisy_digits.momentum_sgd(numbers["rate"], recipe.steps)
    trained, head = (params, None) if method == ALL else split_head(params, is_head)
    joined: Callable[..., Any] = lambda features, head, batch: loss_fn(
        join_head(features, head), batch
    )
    pof = pof_value_and_grad(
        joined,
        sampling_range=numbers["range"] if method == POF else 0.0,
        max_step=recipe.max_step,
        with_info=True,
    )

    def one(carry, item):
        trained, state = carry
        key, *places = item
        batch, probe = ((rows[0][i], rows[1][i]) for i in places)
        none = jnp.zeros((), bool)
        capped = idle = none
        if method == POF:
            _, grads, info = pof(key, trained, head, batch, probe)
            capped, idle = info.search.capped, info.search.step == 0
        elif method == FROZEN:
            grads = jax.grad(joined)(trained, head, batch)
        else:
            grads = jax.grad(loss_fn)(trained, batch)
        updates, state = optimizer.update(grads, state, trained)
        return (optax.apply_updates(trained, updates), state), (capped, idle)

    carry = trained, optimizer.init(trained)
    (trained, _), (capped, idle) = jax.lax.scan(one, carry, (keys, index, probes))
    params = trained if method == ALL else join_head(trained, head)
    return PostTrained(params, jnp.mean(capped), jnp.mean(idle))


def top_head_eigenvalue(net: Net, params: Params, rows: Rows) -> float:
    """Finds the largest eigenvalue of the head's block of the Hessian (MLP-S)."""
    operator = block_operator(hessian_operator(net.loss_fn, params, rows), HEAD)
    like = operator.params
    return float(top_eigenpairs(jax.random.key(0), operator, like, k=1).values[0])
