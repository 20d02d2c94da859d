"""Messages of the text functions, and streams of other kinds."""

import sysconfig

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlab.datasets import decode_text, encode_text, stdlib_text, windows

pytestmark = pytest.mark.untyped


@given(st.text(max_size=50))
def test_one_symbol_per_character(text):
    tokens = encode_text(text)
    assert tokens.shape == (len(text),)
    assert tokens.dtype == np.uint8
    known = lambda c: c in "\t\n" or " " <= c <= "~"
    want = "".join(c if known(c) else "?" for c in text)
    assert decode_text(tokens) == want


@given(st.lists(st.integers(0, 97), max_size=30), st.integers(1, 40))
def test_windows_take_lists(tokens, context):
    inputs, targets = windows(tokens, context=context)
    assert inputs.shape == targets.shape
    stream = [*inputs.ravel().tolist(), *targets[-1:, -1].tolist()]
    assert stream == tokens[: len(stream)]


def test_windows_need_a_stream():
    with pytest.raises(ValueError, match=r"shape \(2, 3\)"):
        windows(np.zeros((2, 3), np.uint8), context=2)


@pytest.mark.parametrize("context", [0, -1])
def test_windows_need_a_length(context):
    with pytest.raises(ValueError, match="context at least 1"):
        windows(np.zeros(5, np.uint8), context=context)


@pytest.mark.parametrize("tokens", [[98], [3, -1]])
def test_unknown_symbols(tokens):
    with pytest.raises(ValueError, match=r"tokens must be in 0\.\.97"):
        decode_text(tokens)


def test_python_without_sources(monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    (tmp_path / "ast.py").write_text("pass\n")
    with pytest.raises(RuntimeError, match="zipped or stripped"):
        stdlib_text()
