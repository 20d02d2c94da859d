"""Does the gradient-norm penalty find flatter minima, and better ones?

Three questions, with the penalty lambda = alpha * radius:

- ``strength``: nets trained with each lambda and alpha, all else equal. How flat is the
  end (top Hessian eigenvalue of the training loss, without the penalty), and does alpha
  matter where lambda is equal? alpha = 1 is SAM; "exact" differentiates the norm.
- ``tuned``: every method with its own rate and strength chosen on validation rows. Is
  the penalty better than SGD under label noise, and than weight decay and early
  stopping, which cost one gradient and not two?
- ``text``: GPT-S on characters by Adam, with and without. How flat is it, at what loss?

Reference: Zhao, Zhang and Hu, "Penalizing Gradient Norm for Efficiently Improving
Generalization in Deep Learning", ICML 2022.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import optax

from benchmarks import language, noisy_digits
from benchmarks.flat_nets import Method, Place, exact, penalised, plain
from benchmarks.penalty_tables import (
    ALPHA,
    BOTH,
    DECAY,
    EXACT,
    PENALTY,
    REFERENCE,
    SAM,
    SGD,
    STOPPING,
    STRENGTH,
    TEXT,
    TUNED,
    draw,
    gain,
    of_alpha,
    ratios,
    tables,
)
from benchmarks.results import Record
from benchmarks.tables import Verdict
from jaxlab.curvature import hessian_operator, top_eigenpairs
from jaxlab.sharpness import gradient_norm_penalty

__all__ = ["CLAIM", "PRESETS", "draw", "run", "tables", "verdict"]

CLAIM = (
    "Training with the gradient-norm penalty ends where the top Hessian eigenvalue is "
    "less than half of plain training's (MLP-S, CNN, GPT-S), and under label noise at "
    "a better test accuracy than tuned SGD (MLP-S)."
)

HALF = 0.5  # the rule: eigenvalues at ``REFERENCE`` below this share


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    steps: dict[str, int]
    rates: dict[str, float]  # of the question of strength
    alphas: tuple[float, ...]
    penalties: tuple[float, ...]
    grid: dict[str, tuple[float, ...]]  # of rate, decay and penalty when tuning
    seeds: int
    tuning_seeds: int
    text: language.Setting
    text_penalties: tuple[float, ...]
    windows: int  # of training text, on which the Hessian is taken
    batch_size: int = 64


PRESETS = {
    "small": Options(
        steps={"MLP-S": 32},
        rates={"MLP-S": 0.1},
        alphas=(ALPHA, 1.0),
        penalties=(REFERENCE,),
        grid={"rate": (0.1,), "decay": (0.01,), "penalty": (REFERENCE,)},
        seeds=2,
        tuning_seeds=1,
        text=language.Setting(steps=3, **language.TINY),
        text_penalties=(REFERENCE,),
        windows=1,
    ),
    "full": Options(
        steps={"MLP-S": 800, "CNN": 500},
        rates={"MLP-S": 0.1, "CNN": 0.05},
        alphas=(0.2, 0.5, ALPHA, 1.0, 2.0),
        penalties=(0.04, 0.08, REFERENCE, 0.32, 0.64),
        grid={
            "rate": (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4),
            "decay": (0.001, 0.003, 0.01, 0.03, 0.1),
            "penalty": (0.04, 0.08, REFERENCE, 0.32, 0.64),
        },
        seeds=10,
        tuning_seeds=3,
        text=language.Setting(
            steps=600, learning_rates=(2e-3,), seeds=5, tuning_seeds=1
        ),
        text_penalties=(0.04, REFERENCE),
        windows=4,
    ),
}


def methods(options: Options) -> dict[str, Method]:
    """Lists the methods of the tuned comparison with what each may choose from."""
    rate, decay, penalty = (options.grid[name] for name in ("rate", "decay", "penalty"))
    none = {"decay": (0.0,)}
    penalties = {"rate": rate, **none, "penalty": penalty}
    return {
        SGD: Method(plain, {"rate": rate, **none}),
        DECAY: Method(plain, {"rate": rate, "decay": decay}),
        STOPPING: Method(plain, {"rate": rate, **none}, early_stopping=True),
        SAM: Method(penalised, penalties | {"alpha": (1.0,)}),
        PENALTY: Method(penalised, penalties | {"alpha": (ALPHA,)}),
    }


def strengths(options: Options, model: str) -> dict[tuple[str, float], Method]:
    """Lists the methods of the question of strength by alpha and lambda."""
    rate = {"rate": (options.rates[model],)}
    none = rate | {"decay": (0.0,)}
    listed = {(SGD, 0.0): Method(plain, none)}
    # Convolutions are slow: of them only the mixture that is judged, and SAM.
    alphas = options.alphas if model == "MLP-S" else (ALPHA, 1.0)
    for penalty in options.penalties:
        listed |= {
            (f"{alpha:g}", penalty): Method(
                penalised, none | {"alpha": (alpha,), "penalty": (penalty,)}
            )
            for alpha in alphas
        }
        if model == "MLP-S":
            listed[EXACT, penalty] = Method(exact, rate | {"penalty": (penalty,)})
    return listed


def _digits(options: Options, tick: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    for model, steps in options.steps.items():
        place = Place(noisy_digits.net(model), steps, options.batch_size)
        common = {"data": noisy_digits.head(), "steps": steps, "shapes": {}}
        for (alpha, penalty), method in strengths(options, model).items():
            (numbers,) = method.choices()
            case = {"task": STRENGTH, "model": model, "alpha": alpha, "lambda": penalty}
            samples = place.judged(method, numbers, options.seeds)
            tick(f"{model}, alpha {alpha}, lambda {penalty:g}")
            yield common | {"case": case, "numbers": numbers, "samples": samples}
        chosen = {}
        every = methods(options)
        for name in (*every, BOTH):
            if name == BOTH:
                # Rate and penalty as chosen without decay; only the decay is new.
                kept = {key: (value,) for key, value in chosen[PENALTY].items()}
                decays = {"decay": (0.0, *options.grid["decay"])}
                every[BOTH] = Method(penalised, kept | decays)
            numbers, tried = place.tuned(every[name], options.tuning_seeds)
            chosen[name] = numbers
            samples = place.judged(every[name], numbers, options.seeds)
            tick(f"{model}, {name}: {numbers}")
            yield common | {
                "case": {"task": TUNED, "model": model, "method": name},
                "numbers": numbers,
                "samples": samples | {"tuning": tried},
            }


def _made(penalty: float) -> Callable[[float, int], optax.GradientTransformation]:
    """Gives the maker of the text's optimizer behind the penalty, if there is one."""
    if not penalty:
        return language.optimizer

    def make(rate, steps):
        link = gradient_norm_penalty(ALPHA, penalty / ALPHA)
        return optax.chain(link, language.optimizer(rate, steps))

    return make


def _text(options: Options, tick: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    setting = options.text
    text = language.Text(setting)
    build = language.builders(setting)[language.DENSE]
    stride = len(text.train[0]) // options.windows
    rows = tuple(part[::stride][: options.windows] for part in text.train)
    (rate,) = setting.learning_rates[:1]
    for penalty in (0.0, *options.text_penalties):
        trainer = language.Trainer(build, text, _made(penalty))
        objective = trainer.objective
        loss_fn = lambda params, rows: objective.loss(params, (), rows, train=False)[0]  # noqa: B023
        samples: dict[str, list[float]] = {}
        for seed in setting.judged:
            state = trainer.start(trainer.fresh(seed), rate, setting.steps)
            found = trainer.outcome(state, (seed,), setting.steps)
            top = top_eigenpairs(
                jax.random.key(0),
                hessian_operator(loss_fn, found.params, rows),
                found.params,
                k=1,
                tol=1e-2,
            )
            measured = {
                "train loss": float(loss_fn(found.params, rows)),
                "test": found.test,
                "seconds": found.seconds,
                "top eigenvalue": float(top.values[0]),
            }
            for name, value in measured.items():
                samples.setdefault(name, []).append(value)
            tick(f"text, lambda {penalty:g}, seed {seed}")
        case = {"task": TEXT, "model": "GPT-S", "lambda": penalty}
        yield language.record(case, samples, text, windows=options.windows, rate=rate)


def run(options: Options, progress: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    """Trains on digits by strength and tuned, then on text."""
    common = {
        "dtype": "float32",
        "seed": list(range(options.seeds)),
        "options": dataclasses.asdict(options),
    }
    count = sum(len(strengths(options, model)) + 6 for model in options.steps)
    count += (1 + len(options.text_penalties)) * options.text.seeds
    with progress(count, "claim gradient_norm_penalty") as tick:
        for found in _digits(options, tick):
            yield common | found
        for found in _text(options, tick):
            yield common | found


def verdict(records: list[Record]) -> Verdict:
    """Rules *shown* if all models are flatter and the MLP is better than tuned SGD.

    Flatter: the mean top eigenvalue at ``REFERENCE`` is below half of that without
    penalty. Better: the 95 % interval of the paired differences lies above 0.
    *Reversed*: all models are sharper, or the MLP is worse in the same sense. What the
    penalty does against weight decay, early stopping and SAM is said, not judged.
    """
    found = ratios(records)
    better = gain(records, PENALTY, SGD)
    listed = ", ".join(f"{ratio:.2f} ({model})" for model, ratio in found.items())
    alphas = "; ".join(f"{a}: {d}" for a, d in of_alpha(records).items())
    why = (
        f"at lambda {REFERENCE:g} the top eigenvalue is {listed} times that without "
        f"(rule: below {HALF:g}); test accuracy on MLP-S, tuned, less that of SGD "
        f"{better} points (rule: above 0). Not judged: less weight decay "
        f"{gain(records, PENALTY, DECAY)}, less early stopping "
        f"{gain(records, PENALTY, STOPPING)}; both penalty and decay less decay alone "
        f"{gain(records, BOTH, DECAY)}; less SAM at equal lambda, by alpha: {alphas}."
    )
    if all(ratio < HALF for ratio in found.values()) and better.lower > 0:
        return Verdict("shown", why)
    sharper = all(ratio > 1 for ratio in found.values())
    return Verdict("reversed" if sharper or better.upper < 0 else "not shown", why)
