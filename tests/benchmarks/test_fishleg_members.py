"""FishLeg on CURVES, on other layers, and its speed: rules of the verdicts, tables."""

import copy

import pytest

from benchmarks import fishleg_tables, timing
from benchmarks.autoencoder_races import (
    ADAM,
    APART,
    BATCH,
    CURVES,
    DIGITS,
    FISHLEG,
    HELD_OUT,
    MUON,
    RIVALS,
    SGD,
    TRAIN,
    phase_name,
)
from benchmarks.claims import fishleg_curves, fishleg_layers
from benchmarks.speed import fishleg as speed

JUDGED, GOALS = (50, 100), (100.0, 80.0)


def curves_records():
    options = {
        "judged": JUDGED,
        "goals": GOALS,
        "rivals": RIVALS,
        "rates": [0.01],
        "seeds": 2,
        "tuning_seeds": 1,
        "timed": [],
        "marks": JUDGED,
    }
    found = {}
    for place, method in enumerate((FISHLEG, *RIVALS)):
        losses = [[90.0 + 5 * place, 70.0 + 5 * place], [92.0 + place, 71.0 + place]]
        found[method] = {
            "case": {"task": fishleg_tables.RACE, "method": method, "batch": 200},
            "data": {"name": "digits"},
            "marks": list(JUDGED),
            "options": options,
            "samples": {TRAIN: losses, HELD_OUT: losses},
        }
    return found


def change(method, losses):
    return lambda found: found[method]["samples"].update({TRAIN: losses})


LOW = [[10.0, 10.0], [10.0, 10.0]]


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        (lambda found: None, "shown"),
        (change(FISHLEG, [[90.0, 70.0], [100.0, 71.0]]), "not shown"),  # a goal, once
        (change(MUON, [[95.0, 75.0], [93.0, 71.0]]), "not shown"),  # level, once
        (change(ADAM, LOW), "reversed"),
        (change(ADAM, [[10.0, 90.0], [10.0, 90.0]]), "not shown"),  # at one step alone
    ],
    ids=["all", "goal", "level", "ahead", "ahead once"],
)
def test_curves_verdict(changed, word):
    found = curves_records()
    changed(found)
    verdict = fishleg_curves.verdict(list(found.values()))
    assert verdict.word == word
    assert "step 100, largest of a seed" in verdict.why


def test_curves_tables_do_without_time_and_batch_sizes():
    records = list(curves_records().values())
    train, held_out = fishleg_tables.tables(records)
    assert train.rows[0][2:] == ("91.00 ± 1.41", "70.50 ± 0.71")
    assert "rows held out" in held_out.note
    fishleg_tables.draw(records)


def layers_records():
    options = {"judged": JUDGED, "seeds": 2, "tuning_seeds": 1, "rates": [0.01, 0.1]}
    return [
        {
            "case": {"net": net, "method": method, "batch": 8},
            "options": options,
            "numbers": [0.01, 0.01],
            "tuning": {"0.01": [1.0, 1.0], "0.1": [2.0, 2.0]},
            "samples": {
                "loss": [[1.0 + place, 0.5 + place]] * 2,
                "seconds": [0.1 * (4 - place)],
            },
        }
        for net in (fishleg_layers.CNN, fishleg_layers.TEXT)
        for place, method in enumerate((FISHLEG, ADAM, MUON))
    ]


def test_layers_verdict_and_table():
    records = layers_records()
    assert fishleg_layers.verdict(records).word == "shown"
    swapped = copy.deepcopy(records)
    swapped[3]["samples"]["loss"][1][0] = 2.0  # FishLeg on the GPT, level once
    assert fishleg_layers.verdict(swapped).word == "not shown"
    for record in swapped:
        if record["case"]["method"] == FISHLEG:
            record["samples"]["loss"] = [[9.0, 9.0]] * 2
    assert fishleg_layers.verdict(swapped).word == "reversed"
    (table,) = fishleg_layers.tables(records)
    assert table.rows[0][-2:] == ("400", "1.3")
    assert "FishLeg on CNN" in table.note  # 0.01 is an end of the grid
    fishleg_layers.draw(records)


def speed_records():
    records = []
    for net in (DIGITS, CURVES):
        times = {
            ADAM: 1.0,
            MUON: 4.0,
            **{phase_name(p): t for p, t in (("first", 9), ("dense", 6), ("late", 2))},
            **{
                phase_name(p, APART): t
                for p, t in (("first", 40), ("dense", 20), ("late", 5))
            },
        }
        samples = {name: [float(t)] * 3 for name, t in times.items()}
        samples[ADAM + timing.AGAIN] = samples[ADAM]
        parts = {speed.FISHER: 1.6, speed.PRODUCT: 0.7, speed.STEP: 4.0}
        costs = {"compile": 9.0, "state": 300, "parameters": 100, "temporary": 500}
        records.append(
            {
                "case": {"net": net},
                "samples": samples,
                "operations": {FISHLEG: dict(parts), APART: dict(parts)},
                "costs": {n: dict(costs) for n in (SGD, ADAM, MUON, FISHLEG, APART)},
                "factors": {FISHLEG: 200, APART: 250},
                "options": {"rounds": 3},
            }
        )
    return records


def spoil(*path, value):
    def spoilt(record):
        *where, last = path
        for key in where:
            record = record[key]
        record[last] = value

    return spoilt


LATE = phase_name("late")


@pytest.mark.parametrize(
    ("net", "spoilt"),
    [
        (0, spoil("operations", FISHLEG, speed.STEP, value=4.6)),
        (1, spoil("operations", FISHLEG, speed.STEP, value=7.1)),
        (0, spoil("samples", LATE, value=[3.6] * 3)),
        (0, spoil("samples", MUON, value=[1.9] * 3)),
        (1, spoil("samples", LATE, value=[2.6] * 3)),
        (1, spoil("samples", phase_name("dense"), value=[11.0] * 3)),
        (1, spoil("costs", FISHLEG, "state", value=401)),
        (0, spoil("costs", FISHLEG, "compile", value=21.0)),
    ],
    ids=["digits", "curves", "Adam", "Muon", "late", "dense", "memory", "compile"],
)
def test_speed_verdict(net, spoilt):
    records = speed_records()
    assert speed.verdict(records).word == "shown"
    assert speed.verdict(records[:1]).word == "not shown"  # not on both nets
    spoilt(records[net])
    verdict = speed.verdict(records)
    assert verdict.word == "not shown"
    assert verdict.why.count("no: ") == 1


def test_speed_tables():
    times, operations, costs = speed.tables(speed_records())
    assert times.rows[4][:3] == ("digits", LATE, "2e+03")
    assert operations.rows[0] == ("digits", FISHLEG, "1.60", "0.70", "4.00", "4.5")
    assert costs.rows[3] == ("digits", FISHLEG, "2.00", "3.00", "0.00", "9.0")
    assert BATCH == {DIGITS: 100, CURVES: 200}
    speed.draw(speed_records())
