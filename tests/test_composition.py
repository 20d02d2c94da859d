"""Stacks of transformations: what runs, what is refused, and what it is equal to."""

import functools
import zlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from benchmarks import stacks
from benchmarks.stacks import (
    FAILS,
    OTHER,
    OURS,
    REFUSED,
    RIGHT,
    RULES,
    RUNS,
    WRAPPERS,
    Problem,
    meaning,
    outcome,
    pair,
    wrapped_meaning,
    wrappers_of,
)
from jaxlab import optimizers, sharpness
from jaxlab.layers import MonarchLinear
from jaxlab.likelihoods import Categorical
from jaxlab.models import MLP
from jaxlab.objective import GaussNewton
from jaxlab.training import create_state, from_nnx, make_train_step, with_extra_args

STEPS = stacks.STEPS
LINEAR = {"dense": nnx.Linear, "Monarch": functools.partial(MonarchLinear, nblocks=2)}


@functools.cache
def tiny(name: str) -> Problem:
    model = MLP((6, 8, 4), activation=nnx.tanh, linear=LINEAR[name], rngs=nnx.Rngs(0))
    objective, params, rest = from_nnx(model, Categorical())
    draw = np.random.default_rng(0)
    batches = [
        (
            jnp.asarray(draw.normal(size=(16, 6)), jnp.float32),
            jnp.asarray(draw.integers(0, 4, 16), jnp.int32),
        )
        for _ in range(STEPS + 1)
    ]
    # Weights of 0 never move behind scale_by_power: biases start elsewhere.
    off = lambda leaf: leaf + 0.1 if leaf.ndim == 1 else leaf
    return Problem(objective, jax.tree.map(off, params), rest, batches)


SUITE_PAIRS = [
    (one, two)
    for one in RULES.values()
    for two in RULES.values()
    if one.ours or two.ours
]

# Every rule in every wrapper on both nets.
WRAPPED = [
    (rule, wrapper, net)
    for rule in OURS
    for wrapper in wrappers_of(rule)
    for net in LINEAR
]


def quick(place, rule, wrapper, net):
    """Chooses what runs outside the soak: each rule in three wrappers, on one net.

    The contract holds the others for every rule; FishLeg compiles for seconds.
    """
    if rule.fishleg:
        return (wrapper, net) == (
            stacks.MASKED if rule.steps else stacks.OUTSIDE,
            "dense",
        )
    few = (stacks.INSIDE, stacks.MASKED, stacks.SCHEDULED)
    whole = rule.name in ("gradient_norm_penalty", "scale_by_power")
    return (wrapper in few or whole) and net == list(LINEAR)[place // 2 % 2]


def expect(found, meant, why=""):
    if meant == REFUSED:
        assert found.word == REFUSED, (found, why)
        return
    assert found.word == RUNS, (found, why)
    assert found.slope < 0, f"climbs: {found.slope}"


@pytest.mark.parametrize(
    ("rule", "wrapper", "net"),
    [
        pytest.param(
            rule,
            wrapper,
            net,
            id=f"{rule.name}, {wrapper}, {net}",
            marks=() if quick(place, rule, wrapper, net) else pytest.mark.soak,
        )
        for place, (rule, wrapper, net) in enumerate(WRAPPED)
    ],
)
def test_rules_in_wrappers(rule, wrapper, net):
    found = outcome(lambda: WRAPPERS[wrapper](rule), tiny(net))
    expect(found, *wrapped_meaning(rule, wrapper))


# The second must be refused behind anything that changes the gradient, in these words.
PHRASE = "updates are not the leaves of grad, so something changed the gradient first"
MUST_BE_REFUSED = {
    "gradient_norm_penalty": f"gradient_norm_penalty: {PHRASE}",
    "sam": f"sam: {PHRASE}",
    "asam": f"asam: {PHRASE}",
    "look_sam": f"look_sam: {PHRASE}",
    "periodic": f"sam: {PHRASE}",  # what stands inside speaks
    "hybrid": f"sam: {PHRASE}",
}
WAYS_OUT = ("first link of its chain", "outside optax.MultiSteps", "accumulate=k")


@pytest.mark.parametrize("second", MUST_BE_REFUSED)
def test_refused_behind_everything(second):
    for first in RULES.values():
        if first.kind == stacks.SAMPLES:  # speaks first
            continue
        found = outcome(lambda: pair(first, RULES[second]), tiny("dense"))  # noqa: B023
        assert found.word == REFUSED, (first.name, found)
        assert found.detail.startswith(MUST_BE_REFUSED[second]), (first.name, found)
        assert all(way in found.detail for way in WAYS_OUT)
        assert meaning(first, RULES[second]).word == REFUSED


def test_orders_are_refused_before_the_first_step():
    params = {"w": jnp.full((4, 4), 0.5), "b": jnp.full(4, 0.5)}
    for one, two in SUITE_PAIRS:
        make = lambda: create_state(jax.random.key(0), params, pair(one, two))  # noqa: B023
        if meaning(one, two).word != REFUSED:
            make()
        elif two.name not in MUST_BE_REFUSED or one.kind == stacks.SAMPLES:
            with pytest.raises(
                ValueError, match=r"^[a-z_]+ (must|needs|makes|stands) "
            ):
                make()


def _labels(params):
    return {"w": "one", "b": "two"}


LANGEVIN = optimizers.sgld(0.1, num_data=3)
ADAM, NOISE = optax.scale_by_adam(), optimizers.annealed_gradient_noise
KEY_OF_ITS_OWN = NOISE(key=jax.random.key(1))


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.partition({"one": LANGEVIN, "two": optax.adamw(0.1)}, _labels),
        optax.chain(
            optax.masked(LANGEVIN, {"w": True, "b": False}),
            optax.masked(optax.adamw(0.1), {"w": False, "b": True}),
        ),
        optax.chain(optimizers.scale_by_fishleg(), optax.trace(0.9), optax.scale(-1.0)),
        optax.chain(NOISE(), KEY_OF_ITS_OWN, optax.sgd(0.1)),
        optimizers.fishleg(momentum=0.9),
        optax.chain(sharpness.sam(0.05), optax.MultiSteps(LANGEVIN, 2)),
        # Sorted by their names, these would stand in another order.
        optax.named_chain(("noise", NOISE()), ("late", LANGEVIN)),
    ],
    ids=["partition", "masked", "momentum", "keys", "fishleg", "multi", "named"],
)
def test_orders_that_stay_allowed(optimizer):
    params = {"w": jnp.ones((4, 4)), "b": jnp.ones(4)}
    create_state(jax.random.key(0), params, optimizer)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: optax.chain(LANGEVIN, optax.scale(2.0)), "sgld must stand last"),
        (
            lambda: optax.chain(LANGEVIN, ADAM),
            "ScaleByAdamState behind it would change the law",
        ),
        (
            lambda: optax.named_chain(("both", optax.chain(ADAM, LANGEVIN))),
            "sgld needs the gradient",
        ),
        (
            lambda: optax.MultiSteps(optax.chain(ADAM, LANGEVIN), 2),
            "ScaleByAdamState in front of it",
        ),
        (
            lambda: optax.masked(optax.chain(ADAM, LANGEVIN), {"w": True, "b": False}),
            "sgld needs the gradient",
        ),
        (
            lambda: optax.inject_hyperparams(
                lambda rate: optax.chain(optax.sgd(rate, 0.9), LANGEVIN)
            )(0.1),
            "TraceState in front of it",
        ),
        (
            lambda: optax.chain(
                optax.partition({"one": LANGEVIN, "two": ADAM}, _labels), optax.scale(1)
            ),
            "sgld must stand last",
        ),
        (
            lambda: optax.chain(optimizers.fishleg(), ADAM),
            "fishleg makes the step itself",
        ),
        (lambda: optax.chain(NOISE(), NOISE()), "Give one of them a key of its own"),
        (
            lambda: sharpness.periodic(optax.adamw(0.1), 2),
            "periodic: transformation must turn gradients into gradients",
        ),
        (lambda: sharpness.hybrid(LANGEVIN), "and sgld makes steps of them"),
    ],
)
def test_orders_in_wrappers_are_refused(make, words):
    params = {"w": jnp.ones((4, 4)), "b": jnp.ones(4)}
    with pytest.raises(ValueError, match=words):
        create_state(jax.random.key(0), params, make())


def test_step_refuses_a_state_made_elsewhere():
    on = tiny("dense")
    optimizer = optax.chain(ADAM, LANGEVIN)
    good = create_state(jax.random.key(0), on.params, LANGEVIN)
    state = good._replace(opt_state=optimizer.init(on.params))
    step = make_train_step(on.objective, optimizer)
    with pytest.raises(ValueError, match="sgld needs the gradient"):
        step(state, on.batches[0])


CHOSEN = [
    ("dense", "gradient_norm_penalty", "optax.adamw"),
    ("Monarch", "sam", "optax.contrib.muon"),
    ("dense", "asam", "annealed_gradient_noise"),
    ("Monarch", "look_sam", "running_median"),
    ("dense", "periodic", "optax.sgd"),
    ("Monarch", "hybrid", "sgld"),
    ("dense", "sam", "psgld"),
    ("Monarch", "annealed_gradient_noise", "optax.adamw"),
    ("dense", "running_median", "scale_by_power"),
    ("Monarch", "scale_by_power", "optax.contrib.muon"),
    ("dense", "gradient_norm_penalty", "optax.clip_by_global_norm"),
    ("Monarch", "optax.scale_by_schedule", "running_median"),
    ("dense", "optax.clip_by_global_norm", "annealed_gradient_noise"),
    ("dense", "optax.adamw", "optax.scale_by_schedule"),
    ("dense", "sam", "fishleg"),
]


@pytest.mark.parametrize(("net", "first", "second"), CHOSEN)
def test_chosen_pairs_run(net, first, second):
    first, second = RULES[first], RULES[second]
    meant = meaning(first, second)
    assert meant.word in (RIGHT, OTHER)
    expect(outcome(lambda: pair(first, second), tiny(net)), *meant)


@pytest.mark.soak
@pytest.mark.parametrize("net", LINEAR)
@pytest.mark.parametrize("first", RULES)
def test_all_pairs(first, net):
    for one, two in SUITE_PAIRS:
        if one.name == first:
            found = outcome(lambda: pair(one, two), tiny(net))  # noqa: B023
            expect(found, meaning(one, two).word, f"{one.name}, {two.name}")


@pytest.mark.soak
@pytest.mark.parametrize("name", stacks.PROBLEMS)
def test_on_the_six_problems(name):
    on = stacks.problem(name)
    for rule in OURS:
        if rule.fishleg and stacks.TEXT in name:
            continue
        found = outcome(lambda: WRAPPERS[stacks.ALONE](rule), on)  # noqa: B023
        expect(found, RIGHT, rule.name)


def _weakens():
    """Gives back a state of another (weak) type than it began with."""
    update = lambda u, s, p=None: (jax.tree.map(lambda x: -x, u), 1.0)
    return optax.GradientTransformation(lambda params: jnp.zeros(()), update)


@pytest.mark.parametrize(
    ("make", "detail"),
    [
        (_weakens, "traced 2 times"),
        (lambda: optax.scale(float("nan")), "not finite"),
        (lambda: optax.scale(0.0), "no parameter moved"),
        (lambda: optax.chain(1), "has no attribute"),
        (lambda: optax.scale(jnp.ones((3, 3))), "ValueError"),
    ],
)
def test_what_fails_is_seen(make, detail):
    found = outcome(make, tiny("dense"))
    assert found.word == FAILS
    assert detail in found.detail


# Stacks written by hand, of numbers and jax.grad alone.

T = jax.tree.map
KEY = 7


def size(tree):
    return jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)))


def ahead(grad, p, g, radius):
    """Gives the gradient at the end of a step of length ``radius`` along g."""
    return grad(T(lambda x, d: x + radius * d / size(g), p, g))


def penalised(grad, p, alpha=0.8, radius=0.1):
    g = grad(p)
    return T(lambda a, b: (1 - alpha) * a + alpha * b, g, ahead(grad, p, g, radius))


def step_key(t):
    return jax.random.split(jax.random.fold_in(jax.random.key(KEY), t))[1]


def normal(link, t, tree):
    """Draws the standard normal numbers of a link at a step."""
    crc = lambda text: np.uint32(zlib.crc32(text.encode()))
    key = jax.random.fold_in(jax.random.fold_in(step_key(t), crc(link)), t)
    draw = lambda path, leaf: jax.random.normal(
        jax.random.fold_in(key, crc(jax.tree_util.keystr(path))), leaf.shape
    )
    return jax.tree_util.tree_map_with_path(draw, tree)


def adam(memory, g, t, rate=0.01, b1=0.9, b2=0.999, eps=1e-8):
    m, v = memory or (T(jnp.zeros_like, g), T(jnp.zeros_like, g))
    m = T(lambda m, g: b1 * m + (1 - b1) * g, m, g)
    v = T(lambda v, g: b2 * v + (1 - b2) * g**2, v, g)
    mean, square = 1 - b1 ** (t + 1), 1 - b2 ** (t + 1)
    move = T(lambda m, v: rate * (m / mean) / (jnp.sqrt(v / square) + eps), m, v)
    return move, (m, v)


def gnp_adamw(grad, p, memory, t, on):
    move, memory = adam(memory, penalised(grad, p), t)
    return T(lambda x, d: x - d - 0.01 * 0.1 * x, p, move), memory


def sam_momentum(grad, p, m, t, on, momentum=0.9):
    g = ahead(grad, p, grad(p), 0.1)
    m = g if m is None else T(lambda g, m: g + momentum * m, g, m)
    return T(lambda x, m: x - 0.1 * m, p, m), m


def gnp_clip(grad, p, memory, t, on):
    g = penalised(grad, p)
    return T(lambda x, d: x - 0.1 * d * jnp.minimum(1, 0.2 / size(g)), p, g), None


def noise_sgd(grad, p, memory, t, on):
    spread = jnp.sqrt(0.3 / (1.0 + t) ** 0.55)
    noise = normal("annealed_gradient_noise", t, p)
    return T(lambda x, g, n: x - 0.1 * (g + spread * n), p, grad(p), noise), None


def power_adam(grad, p, memory, t, on):
    g = T(lambda g, x: 1.2**2 * jnp.abs(x) ** (0.4 / 1.2) * g, grad(p), p)
    move, memory = adam(memory, g, t)
    return T(lambda x, d: x - d, p, move), memory


def gnp_multi_steps(grad, p, held, t, on):
    g = penalised(grad, p)
    if t % 2 == 0:
        return p, g
    return T(lambda x, a, b: x - 0.1 * (a + b) / 2, p, held, g), None


def matrices(tree):
    return T(lambda leaf: leaf.ndim > 1, tree)


def masked_gnp(grad, p, memory, t, on):
    g, mask = grad(p), matrices(p)
    seen = T(lambda d, m: d if m else jnp.zeros_like(d), g, mask)
    there = ahead(grad, p, seen, 0.1)
    mixed = T(lambda a, b, m: 0.2 * a + 0.8 * b if m else a, g, there, mask)
    return T(lambda x, d: x - 0.1 * d, p, mixed), None


def scheduled_gnp(grad, p, memory, t, on):
    g = penalised(grad, p, alpha=0.8 - 0.1 * t, radius=0.05 + 0.01 * t)
    return T(lambda x, d: x - (0.1 - 0.01 * t) * d, p, g), None


def sam_sgld(grad, p, memory, t, on, h=0.001, heat=0.5, prior=2.0):
    g, noise = ahead(grad, p, grad(p), 0.1), normal("sgld", t, p)
    slope = T(lambda g, x: 50 * g + prior * x, g, p)
    spread = jnp.sqrt(h * heat)
    return T(lambda x, s, n: x - h / 2 * s + spread * n, p, slope, noise), None


def gnp_median(grad, p, memory, t, on):
    seen, m = memory or ([], None)
    seen = [penalised(grad, p), *seen][:3]
    g = T(lambda *leaves: jnp.median(jnp.stack(leaves), axis=0), *seen)
    m = g if m is None else T(lambda g, m: g + 0.9 * m, g, m)
    return T(lambda x, m: x - 0.1 * m, p, m), (seen, m)


group_step = jax.jit(
    functools.partial(optimizers.fishleg_group_step, step=0.25, white_directions=1)
)


def gnp_fishleg(grad, p, q, t, on, damping=0.3):
    """FishLeg by its pure functions; the step is as long as the model says."""
    q = optimizers.q_init(p, scale=10.0) if q is None else q
    g, fisher = penalised(grad, p), GaussNewton(on.objective, p, (), on.batches[t])
    key = jax.random.fold_in(step_key(t), 0)
    q, _ = group_step(key, q, [g], fisher, damping=damping)
    d = optimizers.q_apply(q, g)
    dot = lambda a, b: sum(jnp.vdot(*x) for x in zip(*map(jax.tree.leaves, (a, b))))
    length = dot(g, d) / (dot(d, fisher(d)) + damping * dot(d, d))
    return T(lambda x, d: x - 0.5 * length * d, p, d), q


fall = lambda start, end: optax.linear_schedule(start, end, 10)
gnp = functools.partial(sharpness.gradient_norm_penalty, 0.8, 0.1)
momentum_sgd = functools.partial(optax.sgd, 0.1, momentum=0.9)


def injected_sam():
    sam = sharpness.sam
    link = optax.inject_hyperparams(sam, static_args=sharpness.static_args(sam))
    tail = optax.inject_hyperparams(optax.sgd)
    return optax.chain(link(rho=0.1), tail(learning_rate=0.1, momentum=0.9))


HAND_WRITTEN = {
    "gnp, AdamW": (
        gnp_adamw,
        lambda: optax.chain(gnp(), optax.adamw(0.01, weight_decay=0.1)),
    ),
    "SAM, momentum": (
        sam_momentum,
        lambda: optax.chain(sharpness.sam(0.1), momentum_sgd()),
    ),
    "gnp, clipping": (
        gnp_clip,
        lambda: optax.chain(gnp(), optax.clip_by_global_norm(0.2), optax.sgd(0.1)),
    ),
    "noise, SGD": (
        noise_sgd,
        lambda: optax.chain(
            optimizers.annealed_gradient_noise(0.3, 0.55), optax.sgd(0.1)
        ),
    ),
    "power, Adam": (
        power_adam,
        lambda: optax.chain(optimizers.scale_by_power(1.2), optax.adam(0.01)),
    ),
    "gnp, MultiSteps": (
        gnp_multi_steps,
        lambda: optax.chain(
            gnp(), with_extra_args(optax.MultiSteps(optax.sgd(0.1), 2))
        ),
    ),
    "masked gnp": (
        masked_gnp,
        lambda: optax.chain(optax.masked(gnp(), matrices), optax.sgd(0.1)),
    ),
    "scheduled gnp": (
        scheduled_gnp,
        lambda: optax.chain(
            sharpness.gradient_norm_penalty(fall(0.8, -0.2), fall(0.05, 0.15)),
            optax.sgd(fall(0.1, 0.0)),
        ),
    ),
    "injected SAM": (sam_momentum, injected_sam),
    "SAM, SGLD": (
        sam_sgld,
        lambda: optax.chain(
            sharpness.sam(0.1),
            optimizers.sgld(0.001, num_data=50, temperature=0.5, prior_precision=2.0),
        ),
    ),
    "gnp, median, momentum": (
        gnp_median,
        lambda: optax.chain(gnp(), optimizers.running_median(3), momentum_sgd()),
    ),
    "gnp, FishLeg": (
        gnp_fishleg,
        lambda: optax.chain(
            gnp(), optimizers.fishleg(0.5, damping=0.3, pre_aux_steps=1)
        ),
    ),
}


def by_hand(step, on):
    gradient = jax.jit(jax.grad(lambda p, batch: on.objective.loss(p, (), batch)[0]))
    p, memory = on.params, None
    for t in range(STEPS):
        grad = functools.partial(lambda batch, at: gradient(at, batch), on.batches[t])
        p, memory = step(grad, p, memory, t, on)
    return p


@functools.cache
def by_the_library(name, net):
    optimizer, on = HAND_WRITTEN[name][1](), tiny(net)
    step = make_train_step(on.objective, optimizer)
    state = create_state(jax.random.key(KEY), on.params, optimizer)
    for batch in on.batches[:STEPS]:
        state, _ = step(state, batch)
    return state.params


def compare(name, step, net):
    ours, theirs = by_the_library(name, net), by_hand(step, tiny(net))
    # Five steps of differences of about an eps of float32 each, in weights of about 1.
    chex.assert_trees_all_close(ours, theirs, rtol=1e-5, atol=2e-6)


NET = {name: list(LINEAR)[place % 2] for place, name in enumerate(HAND_WRITTEN)}


@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_equal_to_the_stack_written_by_hand(name):
    compare(name, HAND_WRITTEN[name][0], NET[name])


@pytest.mark.parametrize(
    "name",
    ["SAM, momentum", "injected SAM", "gnp, AdamW", "SAM, SGLD", "gnp, FishLeg"],
)
def test_a_stack_written_wrongly_is_seen(name):
    wrong = {
        "SAM, momentum": functools.partial(sam_momentum, momentum=0.0),
        "injected SAM": functools.partial(sam_momentum, momentum=0.89),
        "gnp, AdamW": sam_momentum,
        "SAM, SGLD": functools.partial(sam_sgld, heat=0.49),
        "gnp, FishLeg": functools.partial(gnp_fishleg, damping=0.31),
    }
    with pytest.raises(AssertionError, match=r"not almost equal|Not equal"):
        compare(name, wrong[name], NET[name])
