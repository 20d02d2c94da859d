"""The member that chains everything with everything: cells, tables, verdict."""

import copy
import dataclasses

import pytest

from benchmarks import members
from benchmarks.claims import composition_matrix as member
from benchmarks.stacks import (
    FAILS,
    OURS,
    PROBLEMS,
    REFUSED,
    RULES,
    RUNS,
    meaning,
    wrappers_of,
)

GNP, MEDIAN, NOISE = (
    "gradient_norm_penalty",
    "running_median",
    "annealed_gradient_noise",
)
ADAMW, SGLD = "optax.adamw", "sgld"


def cell(one, two, word=RUNS, detail="", slope=-0.5):
    return {"one": one, "two": two, "word": word, "detail": detail, "slope": slope}


def records():
    """Holds sound cells alone."""
    options = dataclasses.asdict(member.PRESETS["small"])
    options["links"] = [GNP]
    head = {"data": {"name": "digits"}, "options": options, "preset": "full"}
    pairs = [
        cell(GNP, ADAMW),
        cell(MEDIAN, GNP, REFUSED, "gradient_norm_penalty: updates | grad"),
        cell(GNP, SGLD),
    ]
    return [
        {
            **head,
            "case": {"problem": PROBLEMS[0], "part": member.PAIRS},
            "cells": pairs,
        },
        {
            **head,
            "case": {"problem": PROBLEMS[1], "part": member.WRAPPERS},
            "cells": [
                cell(GNP, "masked"),
                cell(GNP, "inside MultiSteps", REFUSED, "gradient_norm_penalty: out"),
            ],
        },
    ]


@pytest.mark.parametrize(
    ("made", "key"),
    [
        (cell(GNP, ADAMW), "r"),
        (cell(GNP, SGLD), "o"),
        (cell(MEDIAN, GNP, REFUSED), "x"),
        (cell(MEDIAN, GNP), "W"),
        (cell(SGLD, ADAMW), "W"),
        (cell(SGLD, ADAMW, REFUSED), "x"),
        (cell(GNP, SGLD, REFUSED), "N"),
        (cell(GNP, ADAMW, REFUSED), "N"),
        (cell(GNP, ADAMW, slope=0.1), "C"),
        (cell(GNP, ADAMW, FAILS, "not finite"), "F"),
        (cell(MEDIAN, GNP, FAILS), "F"),
    ],
)
def test_letters(made, key):
    assert member.letter(member.PAIRS, made) == key


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ([], "shown"),
        ([cell(GNP, ADAMW, FAILS, "not finite")], "not shown"),
        ([cell(ADAMW, SGLD, slope=0.3)], "not shown"),
        ([cell(GNP, ADAMW, slope=0.3)], "not shown"),
        ([cell(GNP, ADAMW, REFUSED, "gradient_norm_penalty: no")], "not shown"),
        ([cell(SGLD, ADAMW), cell(SGLD, SGLD), cell(NOISE, NOISE)], "reversed"),
    ],
    ids=["sound", "fails", "wrong", "climbs", "needless", "most"],
)
def test_verdict(changed, word):
    found = copy.deepcopy(records())
    for number, made in enumerate(changed):
        found[0]["cells"][number] = made
    verdict = member.verdict(found)
    assert verdict.word == word
    assert verdict.why.startswith("of 5 stacks")


def test_tables():
    found = records()
    matrix, wrapped, fronts, refusals, wrong, other, broken = member.tables(found)
    names = [row[0] for row in matrix.rows]
    assert names == [
        f"1 {GNP}",
        f"2 {MEDIAN}",
        f"3 {SGLD}",
        f"4 {ADAMW}",
    ]
    assert matrix.rows[0][1:] == ("-", "-", "o", "r")
    assert matrix.rows[1][1:] == ("x", "-", "-", "-")
    assert all(f"{key}: " in matrix.note for key in member.LEGEND)
    assert wrapped.rows == [(GNP, "-r", "-x")]
    assert fronts.rows == [(GNP, "r-", "--", "--")]
    assert ("gradient_norm_penalty: updates \\| grad", "1") in refusals.rows
    assert wrong.rows == [("none", "", "")]
    assert other.rows[0][:2] == (GNP, f"{SGLD} (-0.50)")
    assert broken.rows == [("none", "", "", "")]
    found[0]["cells"] += [
        cell(SGLD, ADAMW, slope=0.25),
        cell(MEDIAN, MEDIAN, FAILS, "not finite"),
    ]
    *_, wrong, _, broken = member.tables(found)
    assert wrong.rows[0][:2] == (SGLD, "optax.adamw (+0.25)")
    assert broken.rows == [
        (PROBLEMS[0], f"{MEDIAN} > {MEDIAN}", "F", "not finite"),
    ]
    member.draw(found)


def test_full_runs_every_pair_and_every_wrapper():
    options = member.PRESETS["full"]
    blocks = member.blocks(options)
    assert [block.problem for block in blocks] == list(PROBLEMS)
    ours = {rule.name for rule in OURS}
    pairs = {(a, b) for a in RULES for b in RULES if a in ours or b in ours}
    assert set(blocks[0].pairs) == pairs
    assert all(block.pairs for block in blocks)
    everything = {(rule.name, w) for rule in OURS for w in wrappers_of(rule)}
    for block in blocks:
        light = block.problem in options.light
        assert light or set(block.wrapped) == everything
        # Every rule stands on every problem, FishLeg in one of its two forms.
        left_out = ours - {rule for rule, _ in block.wrapped}
        assert left_out == ({"scale_by_fishleg"} if light else set())


def test_every_order_has_a_reason():
    for one in RULES.values():
        for two in RULES.values():
            word, why = meaning(one, two)
            assert word in ("right", "other", "refused", "wrong")
            assert why


def test_small_run():
    found = members.run(
        member, kind="claim", name="composition_matrix", preset="small", arguments=[]
    )
    assert [r["case"]["part"] for r in found] == [member.PAIRS, member.WRAPPERS]
    letters = {
        member.letter(record["case"]["part"], made)
        for record in found
        for made in record["cells"]
    }
    assert letters <= set("rox")
    assert "x" in letters
    members.show(member, found)
    member.draw(found)
