"""Which transformations may be chained with which, and which raise?

Every transformation of the suite stands behind and in front of every other and of
AdamW, Muon, SGD with momentum, clipping and a schedule, two at a time and in both
orders, and goes into ``optax.MultiSteps``, ``inject_hyperparams``, schedules and
``masked``. Each stack takes five steps by ``make_train_step``; what counts as running,
and what each order means, is said in ``benchmarks.stacks``.

A stack that runs may still be meaningless: two optimizers, one behind the other, turn
the sign of the gradient twice. Such orders are judged by what the rules do, not by the
run; those that raise no error speak against the claim. So does a stack judged to be
sound that does not descend, measured by the mean cosine between its moves and the
gradients.

All pairs run on the smallest problem, all wrappers on the two MLPs. CNNs and GPTs have
three wrappers, a few links in front of the three optimizers, and FishLeg by itself,
since a program with it takes up to a minute to compile there.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from benchmarks import plots, stacks
from benchmarks.results import Record
from benchmarks.stacks import (
    FAILS,
    OTHER,
    OURS,
    PROBLEMS,
    REFUSED,
    RULES,
    Meaning,
)
from benchmarks.tables import Table, Verdict

CLAIM = (
    "Every stack of the suite's transformations, with each other and with optax's, "
    "either runs as it should or is refused with a message that says why."
)

PAIRS, WRAPPERS = "pairs", "wrappers"
OPTIMIZERS = ("optax.adamw", "optax.contrib.muon", "optax.sgd")

# What a cell of the tables says, by what is expected and what came.
LEGEND = {
    "r": "runs and is right",
    "o": "runs and computes something other than the names suggest",
    "x": "refused, with a message",
    "W": "runs and should not: no use of it is right",
    "N": "refused though there is a use for it",
    "C": "runs and climbs",
    "F": "fails otherwise",
    "-": "not run",
}
GOOD, BAD = "rox", "WNCF"


class Block(NamedTuple):
    """What is run on one problem: stacks of two, and rules in wrappers."""

    problem: str
    pairs: tuple[tuple[str, str], ...]
    wrapped: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    all_pairs_on: str
    rules: tuple[str, ...]  # of which all pairs run
    problems: tuple[str, ...]
    links: tuple[str, ...]  # that stand in front of optimizers on the other problems
    wrapped: tuple[str, ...]
    light: tuple[str, ...]  # problems with few wrappers, and FishLeg alone


_SMALLEST = PROBLEMS[0]
PRESETS = {
    "small": Options(
        all_pairs_on=_SMALLEST,
        rules=("gradient_norm_penalty", "running_median", "optax.sgd"),
        problems=(PROBLEMS[1],),
        links=(),
        wrapped=("gradient_norm_penalty",),
        light=(),
    ),
    "full": Options(
        all_pairs_on=_SMALLEST,
        rules=tuple(RULES),
        problems=PROBLEMS,
        links=("gradient_norm_penalty", "running_median", "scale_by_power"),
        wrapped=tuple(rule.name for rule in OURS),
        light=tuple(name for name in PROBLEMS if stacks.MLP not in name),
    ),
}


def blocks(options: Options) -> list[Block]:
    """Lists what is run, problem by problem."""
    found = []
    for name in dict.fromkeys((options.all_pairs_on, *options.problems)):
        pairs = [(first, second) for first in options.links for second in OPTIMIZERS]
        if name == options.all_pairs_on:
            pairs = [
                (first, second)
                for first in options.rules
                for second in options.rules
                if RULES[first].ours or RULES[second].ours
            ]
        wrapped = [
            (rule, wrapper)
            for rule in options.wrapped
            for wrapper in stacks.wrappers_of(RULES[rule])
            if name in options.problems
            and (name not in options.light or _light(rule, wrapper))
        ]
        found.append(Block(name, tuple(pairs), tuple(wrapped)))
    return found


def _light(rule: str, wrapper: str) -> bool:
    """Tells whether a stack is among the few of the larger problems."""
    if RULES[rule].fishleg:
        return (rule, wrapper) == ("fishleg", stacks.ALONE)
    few = stacks.INSIDE, stacks.MASKED, stacks.SCHEDULED
    return wrapper in few


def run(options: Options, progress: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    """Runs all stacks; one record for each problem and kind of stack."""
    todo = blocks(options)
    total = sum(len(block.pairs) + len(block.wrapped) for block in todo)
    with progress(total, "claim composition_matrix") as tick:
        for block in todo:
            on = stacks.problem(block.problem)

            def record(part, cells, block=block, on=on):
                return {
                    "case": {"problem": block.problem, "part": part},
                    "data": stacks.data_of(block.problem),
                    "dtype": "float32",
                    "shapes": {"inputs": list(on.batches[0][0].shape)},
                    "seed": 0,
                    # One repetition of each: the mean cosine of moves and gradients.
                    "samples": {f"{c['one']}, {c['two']}": [c["slope"]] for c in cells},
                    "steps": stacks.STEPS,
                    "options": dataclasses.asdict(options),
                    "cells": cells,
                }

            for part, named in ((PAIRS, block.pairs), (WRAPPERS, block.wrapped)):
                cells = []
                for one, two in named:
                    found = stacks.outcome(_maker(part, one, two), on)
                    cells.append({"one": one, "two": two, **found._asdict()})
                    tick(f"{block.problem}: {one}, {two}: {found.word}")
                if cells:
                    yield record(part, cells)


def _maker(part: str, one: str, two: str) -> Callable[[], Any]:
    if part == PAIRS:
        return lambda: stacks.pair(RULES[one], RULES[two])
    return lambda: stacks.WRAPPERS[two](RULES[one])


def expected(part: str, one: str, two: str) -> Meaning:
    """Gives what is expected of a stack."""
    if part == PAIRS:
        return stacks.meaning(RULES[one], RULES[two])
    return stacks.wrapped_meaning(RULES[one], two)


def letter(part: str, cell: dict[str, Any]) -> str:
    """Compares what came with what is expected: a key of ``LEGEND``."""
    meant = expected(part, cell["one"], cell["two"]).word
    if cell["word"] == FAILS:
        return "F"
    if cell["word"] == REFUSED:
        return "x" if meant == REFUSED else "N"
    if meant == REFUSED:
        return "W"
    if cell["slope"] >= 0:
        return "C"
    return "o" if meant == OTHER else "r"


def _cells(records: list[Record]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for record in records:
        case = record["case"]
        for cell in record["cells"]:
            yield case["problem"], case["part"], cell


def _stack(part: str, cell: dict[str, Any]) -> str:
    sign = " > " if part == PAIRS else ", "
    return f"{cell['one']}{sign}{cell['two']}"


def _names(records: list[Record]) -> list[str]:
    """Lists the rules of the matrix, ours first."""
    seen = {cell[side] for cell in _matrix(records) for side in ("one", "two")}
    return [name for name in RULES if name in seen]


def _matrix(records: list[Record]) -> list[dict[str, Any]]:
    on = records[0]["options"]["all_pairs_on"]
    return [
        cell for where, part, cell in _cells(records) if (where, part) == (on, PAIRS)
    ]


def tables(records: list[Record]) -> list[Table]:
    """Writes the matrix, the other problems, the refusals and what is wrong."""
    options = records[0]["options"]
    names = _names(records)
    found = {(c["one"], c["two"]): letter(PAIRS, c) for c in _matrix(records)}
    matrix = Table(
        f"All pairs on {options['all_pairs_on']}",
        ("first, then", *(str(i + 1) for i in range(len(names)))),
        [
            (f"{i + 1} {one}", *(found.get((one, two), "-") for two in names))
            for i, one in enumerate(names)
        ],
        "The rule of the row stands in front of that of the column. "
        + "; ".join(f"{key}: {text}" for key, text in LEGEND.items())
        + ". Behind two that make no steps stands `optax.sgd`.",
    )
    return [
        matrix,
        *_elsewhere(records),
        _refusals(records),
        _judged(records, "W", "Runs and should not"),
        _judged(records, "o", "Runs and is something else"),
        _broken(records),
    ]


def _elsewhere(records: list[Record]) -> list[Table]:
    """Tabulates wrappers and optimizers, a letter for each problem."""
    options = records[0]["options"]
    problems = list(dict.fromkeys(p for p, _, _ in _cells(records)))
    made = []
    for part, title in ((WRAPPERS, "In wrappers"), (PAIRS, "In front of optimizers")):
        found: dict[tuple[str, str], dict[str, str]] = {}
        for where, which, cell in _cells(records):
            if which == part:
                key = cell["one"], cell["two"]
                found.setdefault(key, {})[where] = letter(part, cell)
        if part == PAIRS:
            wanted = options["links"], OPTIMIZERS
        else:
            wanted = [list(dict.fromkeys(k[i] for k in found)) for i in (0, 1)]
        ones, twos = wanted
        if not ones or not found:
            continue

        def text(one, two, found=found):
            cell = found.get((one, two), {})
            return "".join(cell.get(name, "-") for name in problems)

        made.append(
            Table(
                title,
                ("rule", *twos),
                [(one, *(text(one, two) for two in twos)) for one in ones],
                f"A letter for each problem: {', '.join(problems)}.",
            )
        )
    return made


def _refusals(records: list[Record]) -> Table:
    """Lists the messages of refusals and how many stacks each refused."""
    count = Counter(
        cell["detail"] for _, _, cell in _cells(records) if cell["word"] == REFUSED
    )
    rows = [
        (message.replace("|", "\\|"), str(many))
        for message, many in count.most_common()
    ]
    return Table("Refusals", ("message", "stacks"), rows)


def _judged(records: list[Record], key: str, title: str) -> Table:
    """Lists why stacks are judged as they are, with the stacks and their cosines."""
    groups: dict[tuple[str, str], dict[str, list[float]]] = {}
    for _, part, cell in _cells(records):
        if letter(part, cell) == key:
            why = expected(part, cell["one"], cell["two"]).why
            held = groups.setdefault((cell["one"], why), {})
            held.setdefault(cell["two"], []).append(cell["slope"])
    rows = [
        (
            one,
            ", ".join(
                f"{two} ({sum(slopes) / len(slopes):+.2f})"
                for two, slopes in held.items()
            ),
            why,
        )
        for (one, why), held in groups.items()
    ]
    header = ("first, or rule", "then, or wrapper", "why")
    note = (
        "In parentheses the mean cosine between moves and gradients: above 0 the stack "
        "climbs."
    )
    return Table(title, header, rows or [("none", "", "")], note)


def _broken(records: list[Record]) -> Table:
    """Lists stacks that fail, climb or are refused without need."""
    rows = [
        (
            where,
            _stack(part, cell),
            key,
            (cell["detail"] or f"cosine {cell['slope']:+.2f}").replace("|", "\\|"),
        )
        for where, part, cell in _cells(records)
        if (key := letter(part, cell)) in "NCF"
    ]
    header = ("problem", "stack", "letter", "what came")
    return Table("Failures", header, rows or [("none", "", "", "")])


def verdict(records: list[Record]) -> Verdict:
    """Rules *shown* if every cell reads r, o or x.

    *Reversed*: more than half of the stacks are neither.
    """
    count = Counter(letter(part, cell) for _, part, cell in _cells(records))
    bad = sum(count[key] for key in BAD)
    total = sum(count.values())
    parts = ", ".join(f"{count[key]} {key}" for key in GOOD + BAD)
    why = (
        f"of {total} stacks {parts} ({'; '.join(f'{k}: {LEGEND[k]}' for k in BAD)}). "
        f"Rule: none of {', '.join(BAD)}."
    )
    if not bad:
        return Verdict("shown", why)
    return Verdict("reversed" if 2 * bad > total else "not shown", why)


_COLOURS = {
    "r": "#009E73",
    "o": "#56B4E9",
    "x": "#cfcfcf",
    "W": "#D55E00",
    "N": "#E69F00",
    "C": "#CC79A7",
    "F": "#000000",
}


def draw(records: list[Record]) -> Figure:
    """Draws the matrix of all pairs."""
    names = _names(records)
    found = {(c["one"], c["two"]): letter(PAIRS, c) for c in _matrix(records)}
    size = 2.6 + 0.36 * len(names)
    with rc_context(plots.STYLE):
        figure = Figure(figsize=(size + 2.4, size), layout="constrained")
        axes = figure.subplots()
        for row, one in enumerate(names):
            for column, two in enumerate(names):
                key = found.get((one, two))
                if key is None:
                    continue
                square = (column - 0.5, row - 0.5), 1, 1
                axes.add_patch(_square(*square, _COLOURS[key]))
                ink = "black" if key in "rxoN" else "white"
                axes.text(
                    column, row, key, ha="center", va="center", color=ink, fontsize=8
                )
        places = range(len(names))
        axes.set_xticks(places, names, rotation=90)
        axes.set_yticks(places, names)
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_aspect("equal")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("second")
        axes.set_ylabel("first")
        axes.set_title(f"All pairs on {records[0]['options']['all_pairs_on']}")
        keys = [key for key in _COLOURS if key in found.values()]
        marks = [
            Patch(color=_COLOURS[key], label=f"{key} {LEGEND[key]}") for key in keys
        ]
        figure.legend(handles=marks, loc="outside lower left", frameon=False)
    return figure


def _square(corner: tuple[float, float], width: float, height: float, colour: str):

    return Rectangle(corner, width, height, facecolor=colour, edgecolor="white", lw=1)
