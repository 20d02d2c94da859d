"""What checkpoints say where they cannot do what was asked."""

import jax.numpy as jnp
import pytest

from jaxlab.training import Checkpoints

pytestmark = pytest.mark.untyped


def test_keep_at_least_two(tmp_path):
    with pytest.raises(ValueError, match="keep must be an integer >= 2, got 1"):
        Checkpoints(tmp_path, keep=1)


def test_a_step_is_saved_once(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(4, jnp.ones(3))
        with pytest.raises(ValueError, match="checkpoint of step 4 exists"):
            checkpoints.save(4, jnp.ones(3))


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ({"w": jnp.ones((2, 4)), "b": jnp.ones(3)}, r"\['w'\]: float32\[2,3\] in"),
        ({"w": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.ones(3)}, r"bfloat16\[2,3\]"),
        ({"w": jnp.ones((2, 3))}, r"\['b'\]: float32\[3\] in the checkpoint, nothing"),
        (
            {"w": jnp.ones((2, 3)), "b": jnp.ones(3), "c": jnp.ones(1)},
            r"\['c'\]: nothing in the checkpoint",
        ),
    ],
)
def test_another_tree_is_refused(tmp_path, template, said):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(4, {"w": jnp.ones((2, 3)), "b": jnp.ones(3)})
        with pytest.raises(ValueError, match=said):
            checkpoints.restore(template)


def test_missing_checkpoints_can_be_an_error(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(FileNotFoundError, match="no sound checkpoint"):
            checkpoints.restore(jnp.ones(3), must_exist=True)
        checkpoints.save(4, jnp.ones(3))
        checkpoints.wait()
        (tmp_path / "4" / "_METADATA").unlink()
        with pytest.raises(FileNotFoundError, match=r"step 4.*_METADATA is missing"):
            checkpoints.restore(jnp.ones(3), must_exist=True)
