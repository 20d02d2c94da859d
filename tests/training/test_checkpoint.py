"""Checkpoints: what comes back is what was saved, or the one before, or nothing."""

import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlab.training import Checkpoints, checkpoint, create_state


def _state(seed=0):
    """Gives a state with every kind of leaf and node that optimizers use."""
    model = nnx.Sequential(
        nnx.Linear(4, 8, rngs=nnx.Rngs(seed)), nnx.Linear(8, 2, rngs=nnx.Rngs(seed))
    )
    params = nnx.state(model, nnx.Param)
    matrices = lambda tree: jax.tree.map(lambda leaf: leaf.ndim == 2, tree)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.masked(optax.adamw(1e-3, mu_dtype=jnp.bfloat16), matrices),
        optax.inject_hyperparams(optax.sgd)(optax.cosine_decay_schedule(0.1, 9)),
    )
    return create_state(jax.random.key(seed), params, optimizer, loss_scale=8.0)


def _same(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A folder with the sealed steps 1, 2, 3, whose weights are 1, 2, 3."""
    folder = tmp_path_factory.mktemp("three")
    with Checkpoints(folder, keep=3) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, {"w": jnp.full((5, 3), float(step))})
    return folder


TEMPLATE = {"w": jnp.zeros((5, 3))}


def _restore(folder, **options):
    with Checkpoints(folder, **options) as checkpoints:
        return checkpoints.restore(TEMPLATE)


def test_gives_back_every_kind_of_leaf(tmp_path):
    state = _state()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() is None
        assert checkpoints.restore(state) is None
        checkpoints.save(7, state)
        checkpoints.wait()
        found = checkpoints.restore(_state(seed=1))
        assert (found.step, found.rejected) == (7, ())
        assert checkpoints.latest_step() == 7
    _same(found.state, state)
    with Checkpoints(tmp_path) as checkpoints:
        abstract = jax.eval_shape(_state)
        _same(checkpoints.restore(abstract).state, state)


def test_restores_onto_another_sharding(tmp_path):
    mesh = jax.make_mesh((8,), ("d",))
    values = jnp.arange(48.0).reshape(16, 3)
    cut = jax.device_put(values, NamedSharding(mesh, P("d")))
    across = jax.device_put(jnp.zeros((16, 3)), NamedSharding(mesh, P()))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, cut)
        for template in (values, cut, across):
            found = checkpoints.restore(template).state
            assert found.sharding == template.sharding
            np.testing.assert_array_equal(found, values)


def test_arrays_may_be_donated_while_they_are_saved(tmp_path):
    overwrite = jax.jit(lambda w: w * 0 - 1, donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        for step in range(4):
            w = jnp.full((1000, 300), float(step))
            checkpoints.save(step, w)
            overwrite(w).block_until_ready()
            assert (
                float(checkpoints.restore(jnp.zeros((1000, 300))).state[9, 9]) == step
            )


def test_keeps_the_newest_sealed_steps(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (5, 10, 15, 20):
            checkpoints.save(step, TEMPLATE)
            checkpoints.wait()
            assert len(checkpoints.steps()) == min(2, step // 5)
        assert checkpoints.steps() == [15, 20]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["15", "20"]


def test_deletes_nothing_before_the_new_seal_stands(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, TEMPLATE)
        checkpoints.save(2, TEMPLATE)
        checkpoints.wait()
        before = []

        def killed(folder, step, leaves):
            before.append(sorted(int(p.name) for p in tmp_path.iterdir()))
            raise OSError("disk full")

        monkeypatch.setattr(checkpoint, "_write_seal", killed)
        checkpoints.save(3, TEMPLATE)
        said = r"step 3 could not be saved in .*: OSError: disk full\..* \[1, 2\]"
        with pytest.raises(RuntimeError, match=said) as error:
            checkpoints.wait()
        assert "disk full" in str(error.value.__cause__)
        assert before == [[1, 2, 3]]
        assert checkpoints.steps() == [1, 2]
        monkeypatch.undo()
        found = checkpoints.restore(TEMPLATE)
        assert found.step == 2
        assert "step 3" in found.rejected[0]
        checkpoints.save(3, TEMPLATE)
        checkpoints.wait()
        assert checkpoints.steps() == [2, 3]


def _files(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file())


def test_a_flipped_byte_in_any_file_is_seen(three, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    names = [p.relative_to(three / "3") for p in _files(three / "3")]
    assert len(names) >= 6  # arrays, metadata, shardings, the seal
    for count, name in enumerate(names):
        folder = tmp_path / str(count)
        shutil.copytree(three, folder)
        path = folder / "3" / name
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0x10
        path.write_bytes(data)
        caplog.clear()
        found = _restore(folder)
        assert found.step == 2, name
        np.testing.assert_array_equal(found.state["w"], 2.0)
        assert "step 3" in found.rejected[0]
        assert str(name) in found.rejected[0]
        assert found.rejected[0] in caplog.text
        assert "step 2 instead" in caplog.text
        assert (folder / "3.damaged").is_dir()


def _truncate(folder):
    path = next(p for p in _files(folder) if p.parent.name == "d")
    path.write_bytes(path.read_bytes()[:-1])


def _unseal(folder):
    (folder / "seal.json").unlink()


def _swap(folder):
    shutil.copy(folder.parent / "2" / "seal.json", folder / "seal.json")


def _remove(folder):
    next(p for p in _files(folder) if p.parent.name == "d").unlink()


def _add(folder):
    (folder / "d" / "more").write_bytes(b"x")


def _garble(folder):
    (folder / "seal.json").write_text('{"sha256": "0", "content": {}}')


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_truncate, "bytes instead of"),
        (_unseal, "has no seal.json"),
        (_swap, "belongs to step 2"),
        (_remove, "is missing"),
        (_add, "file d/more was added"),
        (_garble, "seal.json is damaged"),
    ],
)
def test_whatever_else_is_wrong(three, tmp_path, damage, said):
    folder = tmp_path / "copy"
    shutil.copytree(three, folder)
    damage(folder / "3")
    found = _restore(folder)
    assert found.step == 2
    assert said in found.rejected[0]


def test_starts_afresh_where_none_is_left_and_says_so(three, tmp_path, caplog):
    folder = tmp_path / "copy"
    shutil.copytree(three, folder)
    for step in "123":
        _truncate(folder / step)
    assert _restore(folder) is None
    assert caplog.text.count("is not used") == 3
    assert "starting afresh" in caplog.text


def test_a_step_found_damaged_is_saved_anew(three, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(three, folder)
    _truncate(folder / "3")
    with Checkpoints(folder, keep=2) as checkpoints:
        assert checkpoints.restore(TEMPLATE).step == 2
        checkpoints.save(3, {"w": jnp.full((5, 3), 33.0)})
        assert float(checkpoints.restore(TEMPLATE).state["w"][0, 0]) == 33.0


def test_clears_what_a_killed_save_left(three, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(three, folder)
    shutil.copytree(three / "3", folder / "4.orbax-checkpoint-tmp")
    assert _restore(folder).step == 3
    assert not (folder / "4.orbax-checkpoint-tmp").exists()


def test_the_seal_names_the_leaves(three):
    content = json.loads((three / "3" / "seal.json").read_text())["content"]
    assert content["step"] == 3
    assert content["leaves"] == {"['w']": "float32[5,3]"}
