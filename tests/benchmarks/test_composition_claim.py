"""The claim on composition: its small run, its arithmetic, its rule, its tables."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import members, timing
from benchmarks.claims import composition as claim
from benchmarks.claims.composition import (
    DIGITS,
    FISHLEG,
    JUDGED,
    MONARCH,
    PENALTY,
    PLAIN,
    STACKS,
    STEPS,
    TEXT,
    TIME,
    VARIANTS,
)

# What a part gives alone, and what all pairs and all three give beyond the sum.
ALONE = {MONARCH: 0.2, FISHLEG: 0.4, PENALTY: 0.3}
PAIR, TRIPLE = 0.5, 0.25
START = {DIGITS: 90.0, TEXT: 5.0}


def gain_of(variant):
    parts = VARIANTS[variant]
    pairs = len(parts) * (len(parts) - 1) / 2
    return sum(ALONE[p] for p in parts) + PAIR * pairs + TRIPLE * (len(parts) == 3)


def values_of(problem, variant):
    """The start differs from seed to seed; what is gained does not."""
    gain = JUDGED[problem][1] * gain_of(variant)
    return [START[problem] + 0.01 * seed + gain for seed in range(3)]


def records():
    """Makes records in which the stacks are better than all their parts."""
    options = {
        "grids": {problem: claim.GRIDS[problem] for problem in JUDGED},
        "batch": {DIGITS: 64, TEXT: 4},
        "tuning_seeds": {DIGITS: 3, TEXT: 1},
        "seeds": 3,
    }
    made = []
    for problem, (name, _) in JUDGED.items():
        for budget in (STEPS, TIME):
            for variant in VARIANTS:
                if (budget, variant) == (TIME, PLAIN):
                    continue
                values = values_of(problem, variant)
                fishleg = FISHLEG in VARIANTS[variant]
                phases = claim.PHASES if fishleg else ("",)
                timed = {claim.timed_name(variant, p): [0.1] * 3 for p in phases}
                if variant == PLAIN:
                    timed[PLAIN + timing.AGAIN] = [0.1] * 3
                samples = {name: values, "train loss": [0.5, 0.6, 0.7]}
                case = {"problem": problem, "budget": budget, "variant": variant}
                made.append(
                    {
                        "case": case,
                        "samples": samples | {"step_seconds": timed},
                        "options": options,
                        "steps": 100,
                        "numbers": {"rate": 0.03, "decay": 0.0},
                        "ends": ["rate"] if variant == MONARCH else [],
                    }
                )
    return made


def changed(found, problem, budget, variant, values):
    found = copy.deepcopy(found)
    wanted = {"problem": problem, "budget": budget, "variant": variant}
    (record,) = [r for r in found if r["case"] == wanted]
    record["samples"][JUDGED[problem][0]] = values
    return found


def test_effects_are_those_of_the_table_that_was_made():
    gain = claim.gains(records(), TEXT, TIME)
    assert gain[PLAIN] == [0.0] * 3
    # Averaged over the other two: half of two pairs, a quarter of the triple.
    main = ALONE[FISHLEG] + PAIR + TRIPLE / 4
    np.testing.assert_allclose(claim.effect(gain, [FISHLEG]), main)
    pair = PAIR + TRIPLE / 2
    np.testing.assert_allclose(claim.effect(gain, [MONARCH, PENALTY]), pair)
    np.testing.assert_allclose(claim.effect(gain, claim.PARTS), TRIPLE)


def test_what_a_stack_adds_is_its_gain_less_the_sum_of_its_parts():
    gain = claim.gains(records(), DIGITS, STEPS)
    small, full = STACKS
    beyond = np.subtract(gain[full], claim.summed(gain, full))
    np.testing.assert_allclose(beyond, 3 * PAIR + TRIPLE, atol=1e-9)
    np.testing.assert_allclose(claim.summed(gain, small), 0.5, atol=1e-9)


def test_effects_add_up_to_the_gain_of_everything():
    """By hand: y = sum over subsets of what each adds, so Moebius inversion holds."""
    draw = np.random.default_rng(0)
    gain = {name: draw.normal(size=4) for name in VARIANTS}
    gain[PLAIN] = np.zeros(4)
    pair = 0.5 * (
        gain["Monarch + FishLeg"] - gain[MONARCH] - gain[FISHLEG] + gain[PLAIN]
    ) + 0.5 * (
        gain["Monarch + FishLeg + GNP"]
        - gain["Monarch + GNP"]
        - gain["FishLeg + GNP"]
        + gain[PENALTY]
    )
    np.testing.assert_allclose(claim.effect(gain, [MONARCH, FISHLEG]), pair)


SMALL, FULL = STACKS


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda r: r, "shown"),
        # One stack fails once, the other one holds everywhere.
        (lambda r: changed(r, TEXT, TIME, FULL, [9.0] * 3), "shown"),
        (
            lambda r: changed(
                changed(r, TEXT, TIME, FULL, [9.0] * 3), DIGITS, STEPS, SMALL, [0.0] * 3
            ),
            "not shown",
        ),
        # A part that is better than both stacks, at one budget of one problem.
        (lambda r: changed(r, DIGITS, TIME, PENALTY, [99.0] * 3), "not shown"),
        (lambda r: changed(r, TEXT, STEPS, PLAIN, [0.0] * 3), "not shown"),
        # Level with a part is not better.
        (
            lambda r: changed(r, TEXT, TIME, MONARCH, values_of(TEXT, FULL)),
            "not shown",
        ),
        (lambda r: [x for x in r if x["case"]["problem"] == TEXT], "not shown"),
    ],
    ids=["all", "one stack", "neither", "a part", "the plain net", "level", "half"],
)
def test_verdict(change, word):
    verdict = claim.verdict(change(records()))
    assert verdict.word == word
    assert "rule" in verdict.why


def test_an_interval_above_zero_stands_for_every_seed():
    # One seed of ten is worse by little.
    ours = [1.0 + 0.01 * (seed % 3) for seed in range(9)] + [0.0]
    theirs = [0.0] * 9 + [0.1]
    assert claim.is_better(ours, theirs)
    assert not claim.is_better(theirs, ours)
    assert not claim.is_better([1.0, -1.0, 1.0], [0.0] * 3)


def test_tables_say_what_holds_and_what_lies_at_an_end():
    digits, text, stacks, effects = claim.tables(records())
    assert "rate of Monarch (steps), rate of Monarch (time)" in digits.note
    assert text.rows[2][4] == "100 / 100 / 100"  # of FishLeg
    assert len(digits.rows) == 2 * len(VARIANTS) - 1
    assert stacks.rows[1][2:] == (
        FULL,
        "+2.65 [+2.65, +2.65]",
        "+0.90 [+0.90, +0.90]",
        "+1.75 [+1.75, +1.75]",
        "plain yes, Monarch yes, FishLeg yes, GNP yes",
    )
    assert [row[0] for row in effects.rows][-1] == "Monarch x FishLeg x GNP"
    claim.draw(records())


def test_all_variants_may_choose_from_as_many_numbers():
    for options in claim.PRESETS.values():
        for problem in options.problems:
            grids = [claim.grid_of(options, problem, p) for p in VARIANTS.values()]
            assert len({tuple(map(len, grid.values())) for grid in grids}) == 1
    with_penalty = claim.grid_of(options, TEXT, frozenset({PENALTY, FISHLEG}))
    assert list(with_penalty) == ["damping", "penalty"]


def test_a_penalty_of_nearly_nothing_is_the_part_without_it():
    """All else is equal: the start, the batches, the schedule."""
    bench = claim.Bench(DIGITS, claim.PRESETS["small"])
    found = [
        bench.trained(parts, {"rate": 0.01, **more}, 0, 6)
        for parts, more in (
            (frozenset({PENALTY}), {"penalty": 1e-9}),
            (frozenset(), {"decay": 0.0}),
        )
    ]
    # The perturbed point differs by round-off from the params.
    assert found[0]["train loss"] == pytest.approx(found[1]["train loss"], rel=1e-4)
    assert found[0]["train loss"] < 2.3


def test_text_that_is_judged_is_not_what_tuning_sees():
    rows = claim.rows_of(TEXT, 0, windows=8)
    as_set = lambda part: {bytes(np.asarray(row)) for row in part[0]}
    assert not as_set(rows.tuning) & as_set(rows.judged)
    assert rows.judged[0].shape == rows.tuning[0].shape == (8, 64)
    assert rows.train[0].dtype == jnp.uint8
    with_text = claim.Bench(TEXT, claim.PRESETS["full"])
    numbers = {"rate": 0.01, "decay": 0.0}
    made, _, _, state, _ = with_text.started(frozenset(), numbers, 0, 2)
    loss = jax.eval_shape(made.measure, state.params, rows._replace(train=None))
    assert set(loss) == {"train loss", "tuning", JUDGED[TEXT][0]}


def test_small_preset():
    options = claim.PRESETS["small"]
    found = members.run(
        claim,
        kind="claim",
        name="composition",
        preset="small",
        arguments=["claim", "composition"],
    )
    assert len(found) == 2 * len(VARIANTS) - 1
    for record in found:
        assert len(record["samples"]["test accuracy %"]) == options.seeds
    assert members.verdict(claim, found) is None
    assert claim.verdict(found).word == "not shown"  # one problem alone
    assert len(claim.tables(found)) == 3
    claim.draw(found)
