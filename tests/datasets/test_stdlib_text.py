"""The standard library's text: whole files, each in one split; codes and windows."""

import pathlib
import platform
import sysconfig

import numpy as np
import pytest

from jaxlab.datasets import decode_text, encode_text, stdlib_text, windows
from jaxlab.datasets.stdlib_text import _sources, split_of

_ROOT = pathlib.Path(sysconfig.get_path("stdlib"))


@pytest.fixture(scope="module")
def data():
    return stdlib_text()


def test_streams_are_whole_files_each_in_one_split(data):
    paths = list(_sources(_ROOT))
    assert len(set(paths)) == len(paths)
    for split, (inputs, targets) in data.splits.items():
        stream = np.append(inputs.ravel(), targets[-1, -1])
        texts = [
            (_ROOT / p).read_text(encoding="utf-8", errors="replace")
            for p in paths
            if split_of(p) == split
        ]
        whole = encode_text("".join(texts))
        assert 0 <= len(whole) - len(stream) < inputs.shape[1]
        np.testing.assert_array_equal(stream, whole[: len(stream)])


def test_shares_of_the_splits():
    splits = [split_of(f"package/module_{i}.py") for i in range(10_000)]
    assert abs(splits.count("train") / 10_000 - 0.8) < 0.02
    assert abs(splits.count("validation") / 10_000 - 0.1) < 0.02


def test_installed_packages_and_tests_are_left_out():
    paths = list(_sources(_ROOT))
    assert "ast.py" in paths
    assert "json/decoder.py" in paths
    parts = {part for path in paths for part in path.split("/")[:-1]}
    assert not parts & {"site-packages", "test", "tests", "idlelib"}
    assert not any("_sysconfigdata" in path for path in paths)


def test_enough_text_in_few_unknown_symbols(data):
    inputs, targets = data.splits["train"]
    assert inputs.shape[1] == 128
    assert inputs.dtype == targets.dtype == np.uint8
    assert inputs.size > 2_000_000
    assert inputs.max() < len(data.extras["symbols"]) == 98
    assert (inputs == 0).mean() < 0.01


def test_targets_are_one_character_later(data):
    for inputs, targets in data.splits.values():
        np.testing.assert_array_equal(inputs.ravel()[1:], targets.ravel()[:-1])


def test_description_names_the_python_release(data):
    assert f"Python {platform.python_version()}" in data.description
    assert data.digest == stdlib_text().digest


def test_text_survives_the_codes(data):
    text = "def f(x):\n\treturn ~x  # !\"$%&'()*+,-./:;<=>?@[\\]^_`{|}"
    assert decode_text(encode_text(text)) == text
    for code, symbol in enumerate(data.extras["symbols"][1:], start=1):
        assert encode_text(chr(symbol)).tolist() == [code]


@pytest.mark.parametrize(
    "character", ["é", "\x7f", "\x00", "\r", "\xff", "語", "\ud800"]
)
def test_other_characters_are_one_symbol(character):
    assert encode_text(f"a{character}b").tolist() == [68, 0, 69]
    assert decode_text(np.array([68, 0, 69])) == "a?b"


def test_windows_of_every_length():
    for length in range(12):
        tokens = np.arange(length, dtype=np.uint8)
        for context in range(1, 6):
            inputs, targets = windows(tokens, context=context)
            rows = max(0, length - 1) // context
            assert inputs.shape == targets.shape == (rows, context)
            np.testing.assert_array_equal(inputs.ravel(), tokens[: rows * context])
            np.testing.assert_array_equal(targets, inputs + 1)


def test_windows_can_be_cut_anew(data):
    inputs, _ = data.splits["test"]
    again, _ = windows(inputs.reshape(-1), context=512)
    np.testing.assert_array_equal(again.ravel(), inputs.ravel()[: again.size])


def test_empty_text():
    assert encode_text("").shape == (0,)
    assert decode_text(np.zeros(0, np.uint8)) == ""
