"""The training run from the command line: resume, refusals, text, comparison."""

import dataclasses
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from flax import nnx

from benchmarks import __main__ as cli
from benchmarks import train, training_comparison, training_runs
from benchmarks.train import Config
from benchmarks.training_runs import SECONDS, TOKENS
from jaxlab.likelihoods import Categorical
from jaxlab.training import create_state, from_nnx, make_train_step

tfds.disable_progress_bar()

TINY = {"width": 16, "layers": 1, "heads": 2, "context": 16}
SHORT = (
    *("--config", "gpt-xs-dense-adamw", "--steps", "6", "--evaluate-every", "2"),
    *("--checkpoint-every", "2", "--sharpness-every", "4", "--sharpness-rows", "2"),
    *("--held-out", "4", "--batch-size", "4"),
)


@pytest.fixture(scope="module", autouse=True)
def _tiny():
    """A model that compiles in moments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train.SIZES, "gpt-xs", TINY)
        yield


def command(folder, *more):
    return cli.main(["train", *SHORT, "--directory", str(folder), *more])


def config(folder, **more):
    named = train.parse([*SHORT, "--directory", str(folder)])
    return dataclasses.replace(named, **more)


def lines(folder):
    """Reads the metrics but for what the clock says."""
    clock = {SECONDS, "tokens_per_second", "compile_seconds", "time"}
    return [
        {key: x for key, x in line.items() if key not in clock}
        for line in training_runs.lines_of(folder)
    ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "undisturbed"
    ended = training_runs.run(training_runs.prepare(config(folder)), command="here")
    return folder, jax.device_get(ended.result.state.params)


def test_a_run_writes_metrics_and_its_end(undisturbed):
    folder, _ = undisturbed
    found = training_runs.lines_of(folder)
    assert [line["step"] for line in found] == [2, 4, 6]
    assert [line[TOKENS] for line in found] == [128, 256, 384]
    assert ["sharpness" in line for line in found] == [False, True, False]
    assert found[1]["sharpness"] > 0
    assert 0 < found[0][SECONDS] < found[1][SECONDS] < found[2][SECONDS]
    assert found[0]["compile_seconds"] > found[1]["compile_seconds"] == 0
    end = json.loads((folder / training_runs.END).read_text())
    assert end["end"] == found[-1]
    assert end["config"]["steps"] == 6
    assert len(end["data"]["digest"]) == 64
    assert end["command"] == "here"


def test_interrupted_and_resumed_is_as_undisturbed(undisturbed, tmp_path, monkeypatch):
    report = training_runs.Reporter.__call__

    def interrupted(self, info):
        report(self, info)
        if info.step == 4:  # its line is written, its checkpoint is not
            raise KeyboardInterrupt

    job = training_runs.prepare(config(tmp_path / "again"))
    monkeypatch.setattr(training_runs.Reporter, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        training_runs.run(job, command="")
    monkeypatch.undo()
    assert len(lines(tmp_path / "again")) == 2
    assert not (tmp_path / "again" / training_runs.END).exists()
    again = training_runs.run(training_runs.prepare(job.config), command="")
    assert again.result.history["step"].tolist() == [3, 4, 5, 6]
    folder, params = undisturbed
    assert lines(tmp_path / "again") == lines(folder)
    same = lambda a, b: np.testing.assert_array_equal(a, b)
    jax.tree.map(same, params, jax.device_get(again.result.state.params))


def test_a_finished_run_is_found_finished(undisturbed, capsys):
    folder, _ = undisturbed
    before = {p: p.read_bytes() for p in folder.glob("*.json*")}
    assert command(folder) == 0
    out, err = capsys.readouterr()
    assert "dense adamw" in out
    assert "384 tokens" in out
    assert "step " not in err
    assert {p: p.read_bytes() for p in folder.glob("*.json*")} == before


def test_another_config_or_text_in_the_same_directory_is_refused(
    undisturbed, capsys, monkeypatch
):
    folder, _ = undisturbed
    assert command(folder, "--learning-rate", "0.5", "--seed", "3") == 2
    message = capsys.readouterr().err
    assert "learning_rate (0.004 there, 0.5 here), seed (0 there, 3 here)" in message
    assert "--directory" in message
    found = training_runs.text("stdlib_text")
    other = dataclasses.replace(found, digest="0" * 64)
    monkeypatch.setattr(training_runs, "text", lambda *a, **b: other)
    assert command(folder) == 2
    assert "contents of the data" in capsys.readouterr().err


def test_two_devices_train_as_one_does(undisturbed, tmp_path):
    two = config(tmp_path / "two", devices=2, sharpness_every=0)
    ended = training_runs.run(training_runs.prepare(two), command="")
    losses = [
        [line["validation_loss"] for line in lines(folder)]
        for folder in (tmp_path / "two", undisturbed[0])
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    leaf = jax.tree.leaves(ended.result.state.params)[0]
    assert len(leaf.sharding.device_set) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--depth", "3"], "--depth: no such field; there are --config, --model"),
        (["--config", "gpt-xl"], "one of gpt-xs-dense-adamw"),
        (["--data", "digits"], "data=digits is no text"),
        (["--devices", "4000", "--batch-size", "4000"], "devices must be at most"),
        (["--batch-size", "9000000"], "windows of the text"),
    ],
)
def test_what_is_wrong_is_said(words, said, tmp_path, capsys):
    assert cli.main(["train", *words, "--directory", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"model": "gpt-xl"},
            "model must be one of gpt-xs, gpt-s, gpt-m, got 'gpt-xl'",
        ),
        ({"optimizer": "sgd"}, "one of adamw, muon, fishleg, gnp-adamw"),
        ({"steps": 1.5}, "steps must be a whole number"),
        ({"steps": 150}, "multiple of evaluate_every=100"),
        ({"learning_rate": "fast"}, "learning_rate must be a number"),
        ({"damping": 0.0}, "damping must be > 0"),
        ({"floor": 2.0}, r"floor must be in \[0, 1\], got 2.0"),
        ({"devices": 3}, "batch_size must be a multiple of devices=3"),
        ({"tokens": 0}, "tokens must be > 0"),
        ({"width": 3}, "width: no such field; there are model, linear"),
        ([], "one JSON object"),
    ],
    ids=str,
)
def test_a_file_with_a_wrong_field_is_refused(fields, said, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=said):
        train.parse(["--config", str(path)])


def test_a_wrong_value_on_the_command_line_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--model", "gpt-xl"])
    assert stop.value.code == 2
    assert "'gpt-m'" in capsys.readouterr().err


def test_a_file_is_read_and_the_command_line_wins(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"steps": 300, "optimizer": "muon", "seed": 2}))
    found = train.parse(["--config", str(path), "--seed=5"])
    assert (found.steps, found.optimizer, found.seed) == (300, "muon", 5)
    assert found.directory == train.FOLDER / "mine"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"mine\.json is not JSON"):
        train.parse(["--config", str(path)])


def test_presets_cover_all_combinations():
    assert len(train.PRESETS) == 3 * 2 * 4
    assert len({preset.directory for preset in train.PRESETS.values()}) == 24
    muon = train.PRESETS["gpt-m-monarch-muon"]
    assert (muon.model, muon.linear, muon.optimizer) == ("gpt-m", "monarch", "muon")


def test_tokens_stand_for_steps():
    assert Config(tokens=1).length == 100
    assert Config(tokens=100 * 16 * 128).length == 100
    assert Config(tokens=100 * 16 * 128 + 1).length == 200


def test_schedule_rises_and_falls():
    rates = training_runs.schedule(Config(steps=100, learning_rate=2.0, floor=0.25))
    found = [float(rates(step)) for step in range(101)]
    assert 0 < found[0] < found[9] < found[10] == 2.0
    assert found[100] == pytest.approx(0.5)
    flat = training_runs.schedule(Config(warm_up=0.0, floor=1.0))
    assert float(flat(0)) == float(flat(999)) == pytest.approx(2e-3)


@pytest.mark.parametrize("linear", ["dense", "monarch"])
@pytest.mark.parametrize("rule", ["adamw", "muon", "fishleg", "gnp-adamw"])
def test_every_combination_makes_a_step(linear, rule):
    """Traced, not compiled: what an optimizer needs reaches it."""
    run = Config(model="gpt-xs", linear=linear, optimizer=rule, dtype="bfloat16")
    objective, params, _ = from_nnx(
        training_runs.model(run, nnx.Rngs(0)), Categorical()
    )
    objective = training_runs.computing_in(objective, run.dtype)
    tx = training_runs.optimizer(run)
    state = create_state(jax.random.key(0), params, tx)
    batch = (jnp.zeros((2, TINY["context"]), jnp.int32),) * 2
    step = make_train_step(objective, tx, jit=False)
    after, found = jax.eval_shape(step, state, batch)
    same = lambda a, b: a.dtype == b.dtype and a.shape == b.shape
    assert jax.tree.all(jax.tree.map(same, after.params, state.params))
    assert found["loss"].dtype == jnp.float32


def test_the_model_computes_in_bfloat16():
    run = Config(model="gpt-xs")
    plain, params, _ = from_nnx(training_runs.model(run, nnx.Rngs(0)), Categorical())
    rounded = training_runs.computing_in(plain, "bfloat16")
    tokens = jnp.arange(TINY["context"])[None]
    outputs = [
        f.apply_fn(params, (), tokens, key=None, train=False)[0]
        for f in (plain, rounded)
    ]
    assert outputs[1].dtype == jnp.float32
    gap = float(abs(outputs[0] - outputs[1]).max())
    assert 0 < gap < 0.05 * float(abs(outputs[0]).max())


def test_muon_takes_matrices_and_stacks_of_blocks_alone():
    run = Config(model="gpt-xs", linear="monarch")
    params = from_nnx(training_runs.model(run, nnx.Rngs(0)), Categorical()).params
    axes = training_runs._muon_axes(params)
    assert axes["embedding"]["embedding"] is axes["positions"] is None
    layer = axes["blocks"][0]["attention"]["query"]
    assert layer["bias"] is None
    # w1 is (blocks, outputs, inputs).
    assert (layer["w1"].reduction_axis, layer["w1"].output_axis) == (2, 1)


def test_every_window_comes_once_in_a_pass():
    run = Config(model="gpt-xs", batch_size=2, steps=10, evaluate_every=5)
    rows = np.arange(6)[:, None] * np.ones((1, 16), int)
    feed = training_runs.Batches((rows, rows), run)
    seen = [int(x) for step in range(6) for x in feed(*divmod(step, 5))[0][:, 0]]
    assert sorted(seen[:6]) == sorted(seen[6:]) == list(range(6))
    assert seen[:6] != seen[6:]
    again = training_runs.Batches((rows, rows), run)(1, 0)[0]
    assert again[:, 0].tolist() == seen[10:]


class TinyTalk(tfds.core.GeneratorBasedBuilder):
    """A data set with a text feature; registered under the name tiny_talk."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"talk": tfds.features.Text(), "label": np.int64}
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features)
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(200):
            yield i, {"talk": f"line {i} says hello to line {i + 1}", "label": i}


class TinyNumbers(TinyTalk):
    """One without."""

    def _info(self):
        features = {"label": np.int64}
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features)
        )


def test_a_tensorflow_data_set_with_text_is_read(tmp_path):
    found = training_runs.text("tiny_talk", data_dir=tmp_path)
    x, y = found.splits["train"]
    assert x.shape[1] == 128
    assert x.max() < training_runs.VOCABULARY
    train_length, held_out = x.size, found.splits["validation"][0].size
    assert 0.8 < train_length / (train_length + held_out) < 0.95
    np.testing.assert_array_equal(x[0, 1:], y[0, :-1])
    assert training_runs.text("tiny_talk", data_dir=tmp_path).digest == found.digest


def test_data_that_cannot_be_had_says_what_to_do(tmp_path, caplog):
    caplog.set_level(logging.CRITICAL)
    with pytest.raises(
        RuntimeError, match=r"no_such_text.*stdlib_text, which needs none"
    ):
        training_runs.text("no_such_text", data_dir=tmp_path)
    with pytest.raises(ValueError, match="no text feature, only label"):
        training_runs.text("tiny_numbers", data_dir=tmp_path)


def made_run(folder, *, speed, losses, digest="a" * 64):
    """Writes a run of 100 tokens an interval; its speed is in tokens a second."""
    folder.mkdir()
    head = {"config": {}, "data": {"name": "t", "digest": digest}}
    (folder / train.FILE).write_text(json.dumps(head | {"device": "cpu"}))
    made = [
        {
            "step": i,
            TOKENS: 100 * i,
            SECONDS: 100 * i / speed,
            "validation_loss": loss,
            "compile_seconds": 2.0 * (i == 1),
            "sharpness": 7.0,
        }
        for i, loss in enumerate(losses, 1)
    ]
    path = folder / training_runs.METRICS
    path.write_text("".join(json.dumps(line) + "\n" for line in made))
    return folder


@pytest.fixture
def two_runs(tmp_path):
    slow = made_run(tmp_path / "slow", speed=50, losses=[3.0, 2.0, 1.0, 0.5])
    fast = made_run(tmp_path / "fast", speed=100, losses=[4.0, 3.0])
    return slow, fast


def test_comparison_at_equal_tokens_and_seconds(two_runs):
    (tokens, seconds), _ = training_comparison.comparison(two_runs)
    # To 200 tokens, which the shorter run has; a quarter lies before an evaluation.
    assert tokens.header[1:4] == ("at 50", "at 100", "at 200")
    assert [row[:4] for row in tokens.rows] == [
        ("slow", "", "3.0000", "2.0000"),
        ("fast", "", "4.0000", "3.0000"),
    ]
    # The faster run ended after 2 s, where the slower one had seen 100 tokens.
    assert seconds.header[1:4] == ("at 0.5 s", "at 1 s", "at 2 s")
    assert sorted(row[:4] for row in seconds.rows) == [
        ("fast", "", "4.0000", "3.0000"),
        ("slow", "", "", "3.0000"),
    ]
    assert tokens.rows[0][4:] == ("400", "50", "2.0", "7", "cpu")
    # Between two evaluations the loss is interpolated.
    assert training_comparison.past(two_runs[0]).at(TOKENS, 150) == 2.5


def test_comparison_is_printed_and_drawn(two_runs, tmp_path, capsys):
    picture = tmp_path / "found.png"
    words = ["train-compare", *map(str, two_runs), "--picture", str(picture)]
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    assert "Equal tokens" in shown
    assert "Equal seconds" in shown
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_comparison_refuses_other_data_and_what_is_no_run(two_runs, tmp_path, capsys):
    other = made_run(tmp_path / "other", speed=1, losses=[1.0], digest="b" * 64)
    for folders, said in (
        ((*two_runs, other), "different data cannot be compared (slow: aaaaaaaaaaaa"),
        (two_runs[:1], "at least two runs"),
        ((two_runs[0], tmp_path / "none"), "holds no run"),
    ):
        assert cli.main(["train-compare", *map(str, folders)]) == 2
        assert said in capsys.readouterr().err


def test_help_names_the_fields_and_the_configs(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "--sharpness-every" in shown
    assert "gpt-s-monarch-fishleg" in "".join(shown.split())
