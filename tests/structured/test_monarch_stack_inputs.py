"""What folded chains of Monarch layers say to wrong input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.structured import (
    FoldedLayer,
    fold_monarch_stack,
    monarch_stack_matmul,
    unfold_monarch_stack,
)

pytestmark = pytest.mark.untyped

PAIR = (np.ones((2, 4, 4), np.float32), np.ones((2, 4, 4), np.float32))


def test_numpy_arrays_and_lists():
    layers = fold_monarch_stack([list(PAIR), PAIR], biases=[np.ones(8), None])
    found = monarch_stack_matmul(np.ones((8, 3), np.float32), list(layers))
    assert isinstance(found, jax.Array)
    assert found.shape == (8, 3)


@pytest.mark.parametrize(
    ("factors", "options", "message"),
    [
        ([], {}, "at least one pair"),
        ([PAIR[0]], {}, r"factors\[0\] must be a pair"),
        ([(*PAIR, PAIR[0])], {}, r"factors\[0\] must be a pair"),
        ([(PAIR[0], np.ones((3, 4, 4)))], {}, r"k \* q == l \* r"),
        (
            [PAIR],
            {"order": "x"},
            "order must be",
        ),
        (
            [(np.ones((3, 4, 4)), np.ones((2, 4, 6))), PAIR],
            {"biases": [None]},
            "2 pairs",
        ),
        ([(np.ones((2, 3, 4)), np.ones((2, 4, 3)))], {}, "l must divide q"),
        ([PAIR, (np.ones((3, 4, 4)), np.ones((2, 4, 6)))], {}, "layer 1 takes"),
        ([PAIR, (np.ones((8, 2, 1)), np.ones((2, 4, 8)))], {}, "block_major"),
        ([PAIR], {"biases": [np.ones(7)]}, r"biases\[0\] must have shape \(8,\)"),
        ([(np.ones((2, 4, 4), int), PAIR[1])], {}, "floating-point"),
    ],
)
def test_what_cannot_be_folded(factors, options, message):
    with pytest.raises(ValueError, match=message):
        fold_monarch_stack(factors, **options)


def test_block_major_takes_blocks_of_any_number():
    pairs = [PAIR, (np.ones((8, 2, 1)), np.ones((2, 4, 8)))]
    assert len(fold_monarch_stack(pairs, order="block_major")) == 2


def layer(**changes):
    (good,) = fold_monarch_stack([PAIR], biases=[np.ones(8)])
    return good._replace(**changes)


@pytest.mark.parametrize(
    ("x", "layers", "options", "message"),
    [
        (np.ones((8, 1)), [], {}, "at least one FoldedLayer"),
        (np.ones((8, 1)), [PAIR], {}, "fold_monarch_stack"),
        (np.ones((8, 1)), [layer(w1=jnp.ones((2, 4, 4)))], {}, "must have w1"),
        (np.ones((8, 1)), [layer(w2=jnp.ones((2, 4, 2, 1)))], {}, "must have w1"),
        (np.ones((8, 1)), [layer(bias=jnp.ones(8))], {}, "must have w1"),
        (np.ones((1, 8)), [layer()], {}, "tokens stand last"),
        (np.float32(1), [layer()], {}, "tokens stand last"),
        (np.ones((8, 1), int), [layer()], {}, "floating-point"),
        (np.ones((8, 1)), [layer()], {"order": "rows"}, "order must be"),
        (np.ones((8, 1)), [layer()], {"output_layout": 1}, "output_layout must be"),
        (np.ones((8, 1)), [layer()], {"platform": "xpu"}, "platform must be"),
        (
            np.ones((8, 1)),
            [layer(), layer()],
            {"activation": [jnp.tanh, jnp.tanh]},
            "a sequence of 1 functions",
        ),
        (np.ones((8, 1)), [layer(), layer()], {"activation": ["relu"]}, "functions"),
    ],
)
def test_what_cannot_be_applied(x, layers, options, message):
    with pytest.raises(ValueError, match=message):
        monarch_stack_matmul(x, layers, **options)


def test_unfold_refuses_plain_factors():
    with pytest.raises(ValueError, match="FoldedLayer"):
        unfold_monarch_stack([PAIR])
    wrong = FoldedLayer(jnp.ones((2, 2, 2, 4)), jnp.ones((2, 4, 2, 1)))
    with pytest.raises(ValueError, match="must have w1"):
        unfold_monarch_stack([wrong])
