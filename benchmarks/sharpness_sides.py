"""What the speed of sharpness is measured on: nets, steps, and their counts.

Every step is SGD with momentum behind some gradient, jitted, its carry of parameters
and optimizer state donated. All steps of a net see the same batch, which lies on the
device.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks import language, noisy_digits
from benchmarks.results import digest
from jaxlab.likelihoods import Categorical
from jaxlab.sharpness import (
    gnp_gradient_exact,
    gradient_norm_penalty,
    in_window,
    init_teacher,
    init_trajectory_buffer,
    mesa_loss,
    periodic,
    read_trajectory,
    saf_loss,
    sam,
    update_teacher,
    write_trajectory,
)
from jaxlab.training import with_extra_args

SGD, PENALTY, SAM, EXACT = "SGD", "penalty", "sam", "exact form"
OPAQUE, TRANSPARENT = "optax sam, opaque", "optax sam, transparent"
EVERY = 5
PERIODIC = f"penalty every {EVERY}th"
GRADIENT = "gradient"
SAF, MESA, AVERAGE = "SAF", "MESA", "MESA's average"
WIDE = "wide"
RATE, MOMENTUM = 0.01, 0.9
ALPHA, RADIUS = 0.8, 0.05
LAG = 3  # epochs, of SAF
TOLERANCE = 1e-4  # of how far the parameters moved; float32 in two programs
CHECKED = 5  # steps before they are compared

Carry = tuple[Any, Any]  # parameters, optimizer state


class Net(NamedTuple):
    """A net with a batch; ``apply_fn`` where SAF and MESA apply."""

    name: str
    params: Any
    batch: tuple[jax.Array, jax.Array]
    loss_fn: Callable[..., jax.Array]
    data: dict[str, str]
    apply_fn: Callable[..., jax.Array] | None = None

    @property
    def size(self) -> int:
        """Counts the parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))

    @property
    def bytes(self) -> int:
        """Counts the bytes of the parameters."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.params))


def digits_net(name: str, *, batch_size: int, seed: int) -> Net:
    """Makes MLP-S or the CNN with rows of digits."""
    net = noisy_digits.net(name)
    rows = tuple(part[:batch_size] for part in noisy_digits.splits(seed).train)
    params = net.start(jax.random.key(seed))
    return Net(name, params, rows, net.loss_fn, noisy_digits.head(), net.apply_fn)


def text_net(*, seed: int, **sizes: int) -> Net:
    """Makes GPT-S with two windows of text; ``sizes`` make it smaller."""
    made: dict[str, Any] = {"steps": 0, "learning_rates": (), "seeds": 0, **sizes}
    setting = language.Setting(tuning_seeds=0, **made)
    text = language.Text(setting)
    x, y = map(jnp.asarray, text.batch([seed], 0))
    build = lambda: language.gpt(
        setting, linear=nnx.Linear, width=setting.width, rngs=nnx.Rngs(seed)
    )
    graph, _ = nnx.split(nnx.eval_shape(build))
    # It runs once: compiling it well takes longer than it ever runs.
    start = jax.jit(
        lambda: nnx.to_pure_dict(nnx.split(build(), nnx.Param)[1]),
        compiler_options={"xla_backend_optimization_level": 0},
    )

    def loss_fn(params, rows):
        return Categorical().nll(nnx.merge(graph, params)(rows[0]), rows[1])

    return Net("GPT-S", start(), (x, y), loss_fn, text.head)


def wide_net(*, layers: int, width: int, batch_size: int, seed: int) -> Net:
    """Makes a tanh net of square matrices, much larger than what it computes."""
    *keys, key = jax.random.split(jax.random.key(seed), layers + 1)
    draw = lambda key, rows: jax.random.normal(key, (rows, width))
    params = [draw(key, width) / width**0.5 for key in keys]
    x = draw(key, batch_size)

    def loss_fn(params, rows):
        x, y = rows
        for matrix in params:
            x = jnp.tanh(x @ matrix)
        return jnp.mean((x - y) ** 2)

    data = {"name": f"normal numbers, {batch_size} x {width}", "digest": digest(x)}
    return Net(WIDE, params, (x, x), loss_fn, data)


class Side(NamedTuple):
    """A step ``(carry, batch) -> carry`` and how it is counted."""

    start: Callable[[Any], Any]  # of the optimizer's state
    step: Callable[[Carry, Any], Carry]
    calls: int = 1  # in what is timed
    steps: int = 1  # of training that these calls make


def sides(net: Net) -> dict[str, Side]:
    """Makes the steps of all methods, SGD's first."""
    sgd = optax.sgd(RATE, momentum=MOMENTUM)
    climb = optax.chain(optax.contrib.normalize(), optax.sgd(RADIUS))
    penalty = gradient_norm_penalty(ALPHA, RADIUS)
    theirs = optax.contrib.sam

    def exact(params, batch):
        loss_fn = lambda at: net.loss_fn(at, batch)
        return gnp_gradient_exact(loss_fn, params, penalty=ALPHA * RADIUS)

    made = lambda optimizer, **counted: _side(net, optimizer, **counted)
    return {
        SGD: made(sgd),
        PENALTY: made(optax.chain(penalty, sgd)),
        SAM: made(optax.chain(sam(RADIUS), sgd)),
        EXACT: made(sgd, gradient=exact),
        PERIODIC: made(
            optax.chain(periodic(penalty, EVERY), sgd), calls=EVERY, steps=EVERY
        ),
        OPAQUE: made(theirs(sgd, climb, opaque_mode=True)),
        TRANSPARENT: made(theirs(sgd, climb, sync_period=2), calls=2),
    }


def _side(net: Net, optimizer: Any, gradient: Any = None, **counted: int) -> Side:
    """Makes a step that hands on what the optimizer takes."""
    optimizer = with_extra_args(optimizer)

    def step(carry, batch):
        params, state = carry
        # optax.contrib.sam gives the number of its inner step too.
        grad_fn = lambda at, *_: jax.grad(net.loss_fn)(at, batch)
        grads = gradient(params, batch) if gradient else grad_fn(params)
        extra = {"grad_fn": grad_fn, "grad": grads}
        updates, state = optimizer.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    return Side(optimizer.init, step, **counted)


class Loop:
    """What is timed of a side: its calls, each from where the last one ended.

    Attributes:
      cost: the compiler's count for one call: ``flops``, and ``temporary`` bytes beside
        the arguments and results; ``None`` where it does not tell.
    """

    def __init__(self, net: Net, side: Side):
        self.side, self.batch = side, net.batch
        # Copies: what is donated must be nobody else's, and no buffer stands twice.
        self.carry = jax.tree.map(jnp.copy, (net.params, side.start(net.params)))
        self.step = jax.jit(side.step, donate_argnums=0)
        compiled = self.step.lower(self.carry, self.batch).compile()
        counted, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
        self.cost = {
            "flops": counted.get("flops"),
            "temporary": getattr(memory, "temp_size_in_bytes", None),
        }

    def __call__(self) -> Carry:
        for _ in range(self.side.calls):
            self.carry = self.step(self.carry, self.batch)
        return self.carry


def loops(net: Net, names: Iterable[str] | None = None) -> dict[str, Loop]:
    """Compiles the sides of a net, or some of them."""
    made = sides(net)
    return {name: Loop(net, made[name]) for name in names or made}


def disagreement(net: Net, running: Mapping[str, Loop]) -> dict[str, float]:
    """Trains by SAM, ours and optax's, and by SGD; says how far they end from ours.

    Gaps are the largest over the parameters, in units of how far ours moved at most.

    Args:
      net: where all start.
      running: loops that have made no step yet; each makes ``CHECKED``.

    Raises:
      ValueError: if optax's SAM differs by more than float32 explains.
    """
    ends = {}
    for name in (SAM, OPAQUE, TRANSPARENT, SGD):
        for _ in range(CHECKED - 1):
            running[name]()
        # A copy: the next step takes these buffers.
        ends[name] = jax.tree.map(jnp.copy, running[name]()[0])
    moved = _furthest(net.params, ends[SAM])
    gaps = {name: _furthest(ends[name], ends[SAM]) / moved for name in ends}
    gaps.pop(SAM)
    wrong = {n: gaps[n] for n in (OPAQUE, TRANSPARENT) if not gaps[n] <= TOLERANCE}
    if wrong:
        raise ValueError(
            f"{net.name}: optax's SAM ends elsewhere than ours, by {wrong} of the way, "
            f"more than {TOLERANCE:.0e}: there is nothing to compare."
        )
    return gaps


def _furthest(one: Any, two: Any) -> float:
    gaps = jax.tree.map(lambda a, b: np.max(np.abs(np.subtract(a, b))), one, two)
    # NaN if one of them is, unlike max().
    return float(np.max(jax.tree.leaves(gaps)))


def free_flops(net: Net, *, examples: int = noisy_digits.TRAIN) -> dict[str, Any]:
    """Counts the gradients of SAF's and MESA's losses, and of the plain one.

    SAF's count holds reading and writing its buffer, MESA's the teacher's outputs; the
    teacher's own update is counted apart.

    Args:
      net: one with ``apply_fn``.
      examples: rows of the buffer.
    """
    x, labels = net.batch
    loss = lambda outputs, labels: Categorical().nll(outputs, labels)
    buffer = init_trajectory_buffer(
        num_examples=examples,
        num_classes=net.apply_fn(net.params, x).shape[-1],
        lag=LAG,
    )
    indices, epoch = jnp.arange(len(x)), jnp.int32(LAG + 2)

    def saf(params, x, labels, buffer, indices, epoch):
        past, known = read_trajectory(buffer, indices, epoch=epoch)
        active = in_window(epoch, start=LAG, end=float("inf"))

        def total(params):
            now = net.apply_fn(params, x)
            found = saf_loss(loss(now, labels), now, past, known=known, active=active)
            return found, now

        grads, now = jax.grad(total, has_aux=True)(params)
        return grads, write_trajectory(buffer, indices, now, epoch=epoch)

    def mesa(params, x, labels, teacher):
        def total(params):
            now = net.apply_fn(params, x)
            return mesa_loss(loss(now, labels), now, net.apply_fn(teacher, x))

        return jax.grad(total)(params)

    def flops(f, *arguments):
        compiled = jax.jit(f).lower(*arguments).compile()
        return (compiled.cost_analysis() or {}).get("flops")

    params, teacher = net.params, init_teacher(net.params)
    return {
        GRADIENT: flops(jax.grad(net.loss_fn), params, net.batch),
        SAF: flops(saf, params, x, labels, buffer, indices, epoch),
        MESA: flops(mesa, params, x, labels, teacher),
        AVERAGE: flops(update_teacher, teacher, params),
    }
