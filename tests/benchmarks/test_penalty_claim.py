"""The claim on the gradient-norm penalty: the rule of its verdict, its tables."""

import copy

import pytest

from benchmarks import penalty_tables as parts
from benchmarks.claims import gradient_norm_penalty as claim


def records():
    """Makes records in which the penalty does all that is claimed."""
    options = {
        "grid": dict.fromkeys(parts.GRID, (0.1,)),
        "steps": {"MLP-S": 8, "CNN": 8},
        "batch_size": 64,
        "seeds": 3,
        "tuning_seeds": 1,
    }
    numbers = {"rate": 0.1}

    def samples(accuracy, top):
        named = ("test accuracy", "calibration error", "wrong labels learnt")
        values = [accuracy - 0.01, accuracy, accuracy + 0.01]
        return dict.fromkeys(named, values) | {"top eigenvalue": [top, top, 1.1 * top]}

    made = []
    for model in ("MLP-S", "CNN"):
        for name, accuracy in (
            (parts.SGD, 0.9),
            (parts.DECAY, 0.96),
            (parts.STOPPING, 0.94),
            (parts.SAM, 0.95),
            (parts.PENALTY, 0.95),
            (parts.BOTH, 0.96),
        ):
            case = {"task": parts.TUNED, "model": model, "method": name}
            made.append({"case": case, "samples": samples(accuracy, 1.0)})
        for alpha, penalty, top in (
            (parts.SGD, 0.0, 5.0),
            ("0.8", parts.REFERENCE, 1.5),
            ("1", parts.REFERENCE, 1.4),
        ):
            case = {"task": parts.STRENGTH, "model": model}
            case |= {"alpha": alpha, "lambda": penalty}
            made.append({"case": case, "samples": samples(0.9, top)})
    for penalty, top in ((0.0, 12.0), (parts.REFERENCE, 5.0)):
        case = {"task": parts.TEXT, "model": "GPT-S", "lambda": penalty}
        text = {"top eigenvalue": [top] * 3} | dict.fromkeys(
            ("train loss", "test", "seconds"), [2.0] * 3
        )
        setting = {"steps": 5, "batch_size": 2, "context": 8, "seeds": 3}
        more = {"setting": setting, "windows": 1, "rate": 0.1}
        made.append({"case": case, "samples": text, **more})
    return [record | {"options": options, "numbers": numbers} for record in made]


def changed(name, where, values):
    found = copy.deepcopy(records())
    for record in found:
        if where.items() <= record["case"].items():
            record["samples"][name] = values
    return found


def test_all_parts_make_it_shown():
    found = claim.verdict(records())
    assert found.word == "shown"
    assert "0.30 (MLP-S), 0.30 (CNN), 0.42 (GPT-S)" in found.why
    assert "+5.0000" in found.why


JUDGED = {"task": parts.STRENGTH, "alpha": "0.8"}
BETTER = {"task": parts.TUNED, "model": "MLP-S", "method": parts.PENALTY}
TEXT = {"task": parts.TEXT, "lambda": parts.REFERENCE}


@pytest.mark.parametrize(
    ("name", "where", "values"),
    [
        ("top eigenvalue", JUDGED | {"model": "MLP-S"}, [2.6] * 3),
        ("top eigenvalue", JUDGED | {"model": "CNN"}, [2.6] * 3),
        ("top eigenvalue", TEXT, [6.0] * 3),
        ("test accuracy", BETTER, [0.89, 0.9, 0.91]),
        # Better in the mean, not in the interval.
        ("test accuracy", BETTER, [0.9, 0.95, 0.99]),
    ],
)
def test_any_part_that_fails_makes_it_not_shown(name, where, values):
    assert claim.verdict(changed(name, where, values)).word == "not shown"


def test_worse_accuracy_reverses_it():
    found = changed("test accuracy", BETTER, [0.80, 0.81, 0.82])
    assert claim.verdict(found).word == "reversed"


def test_what_is_not_judged_does_not_matter():
    where = {"task": parts.TUNED, "method": parts.DECAY}
    assert claim.verdict(changed("test accuracy", where, [0.99] * 3)).word == "shown"


def test_tables_hold_every_record():
    text = "\n".join(map(str, claim.tables(records())))
    for word in (parts.STOPPING, parts.BOTH, "CNN by strength", "GPT-S", "5.17 ± 0.29"):
        assert word in text


def test_alpha_is_compared_at_equal_lambda():
    where = {"task": parts.STRENGTH, "model": "MLP-S", "alpha": "0.8"}
    found = parts.of_alpha(changed("test accuracy", where, [0.90, 0.92, 0.93]))
    assert list(found) == ["0.8"]
    assert found["0.8"].mean == pytest.approx(5 / 3)
