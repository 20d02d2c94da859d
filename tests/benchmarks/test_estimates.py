"""Estimates without their compilers: messages, what is counted, tables, verdicts."""

import re

import chex
import jax
import jax.numpy as jnp
import pytest

from benchmarks import __main__ as cli
from benchmarks import devices, environment, members, report, results
from benchmarks.estimates import monarch
from jaxlab import structured

PINS = (environment.ROOT / "constraints-devices.txt").read_text().split()
SIZES = ((4096, 4), (4096, 64), (8192, 4))
# As a TPU's compiler writes its program: one computation inside, one at the entry.
TPU_PROGRAM = """HloModule jit_f

%inner (p: f32[2]) -> f32[2] {
  ROOT %c = f32[2] copy(%p), backend_config={"estimated_cycles":"1000"}
}

ENTRY %main (x: f32[2]) -> f32[2] {
  %x = f32[2] parameter(0)
  %fusion = f32[2] fusion(%x), calls=%inner, backend_config={"estimated_cycles":"30"}
  ROOT %copy.1 = f32[2] copy(%fusion), backend_config={"estimated_cycles":"4"}
}
"""
GPU_PROGRAM = """HloModule jit_f

%inner (p: f32[2]) -> f32[2] {
  ROOT %c = f32[2] copy(%p)
}

ENTRY %main (x: bf16[4,8]) -> (bf16[4,8], f32[2]) {
  %x = bf16[4,8]{1,0} parameter(0)
  %g = bf16[4,8]{1,0} fusion(%x), kind=kCustom, backend_config={"kind":"__triton_gemm"}
  %d = bf16[4,8]{1,0} custom-call(%g), custom_call_target="__cublas$lt$matmul"
  %b = bf16[8,4]{1,0} bitcast(%d)
  %t = bf16[4,8]{0,1} fusion(%b), kind=kLoop, calls=%inner
  %m = (bf16[4,8]{1,0}, pred[8]{0}) fusion(%t), kind=kInput, calls=%inner
  %r = f32[] reduce(%t, %x), dimensions={0,1}
  ROOT %tuple = (bf16[4,8], f32[]) tuple(%t, %r)
}
"""


@pytest.fixture
def bare(monkeypatch):
    """An environment without any of the compilers, whatever this one holds."""
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: None)


def records(*, preset="full", platform="tpu", slower=1.0):
    """Makes records whose every Monarch form is `slower` times what is aimed at."""
    target = devices.TPU_V5P if platform == "tpu" else devices.H200
    head = environment.describe(target.head(), target.packages)
    head["versions"] |= dict.fromkeys(target.packages, "0.0.42")
    found = []
    for n, nblocks in SIZES:
        for mode in (monarch.FORWARD, monarch.BOTH):
            compiler = {}
            for name, baseline in monarch.BASELINES.items():
                aim = monarch.AIMS[n, nblocks].get((name, mode), 1.25)
                seconds = 1e-3 if name == baseline else slower * 1e-3 / aim
                figures = {"temporary_bytes": 10**6, "total_bytes": 10**8}
                figures |= {"flops": 1e9}
                if platform == "tpu":
                    figures |= {"optimal_seconds": seconds, "bytes": 1e6, "cycles": 9}
                else:
                    figures |= {"gemms": 2, "passes": 3, "passes_bytes": 4 * 10**6}
                compiler[name] = figures
            own = {
                "case": {"n": n, "nblocks": nblocks, "mode": mode},
                "data": {"name": "shapes alone", "digest": "0" * 64},
                "dtype": "bfloat16",
                "shapes": {name: [[8192, n]] for name in compiler},
                "seed": None,
                "samples": {},
                "layers": {name: monarch._layers(name) for name in compiler},
                "compiler": compiler,
            }
            found.append(
                results.complete(
                    own,
                    kind="estimate",
                    name="monarch",
                    preset=preset,
                    command="python -m benchmarks estimate monarch",
                    environment=head,
                )
            )
    return found


def test_a_missing_compiler_is_named_with_what_to_do(bare, capsys):
    for arguments, named in (
        ([], ("libtpu", "jax-cuda13-plugin", "jax-cuda13-pjrt")),
        (["--device", "tpu-v5p"], ("libtpu",)),
        (["--device", "h200"], ("jax-cuda13-plugin", "jax-cuda13-pjrt")),
    ):
        assert cli.main(["estimate", "monarch", *arguments]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        assert "make devices" in message
        assert all(package in message for package in named)
    with pytest.raises(ModuleNotFoundError, match=r"libtpu.*make devices"):
        devices.TPU_V5P.compile(lambda x: x, jax.ShapeDtypeStruct((1,), jnp.float32))


def test_one_missing_compiler_leaves_the_other(monkeypatch, capsys):
    there = lambda name: name == "libtpu" or None
    monkeypatch.setattr(devices.importlib.util, "find_spec", there)
    assert cli._targets(None) == [devices.TPU_V5P]
    assert "left out: compiling for h200" in capsys.readouterr().err
    assert cli._targets("tpu-v5p") == [devices.TPU_V5P]
    assert capsys.readouterr().err == ""
    with pytest.raises(ValueError, match="jax-cuda13-plugin"):
        cli._targets("h200")


def test_preparing_leaves_what_the_user_set(monkeypatch):
    monkeypatch.setenv("TPU_WORKER_ID", "7")
    for name in set(devices.ENVIRONMENT) - {"TPU_WORKER_ID"}:
        monkeypatch.delenv(name, raising=False)
    devices.prepare()
    found = {name: devices.os.environ[name] for name in devices.ENVIRONMENT}
    assert found == devices.ENVIRONMENT | {"TPU_WORKER_ID": "7"}


def test_the_devices_of_the_command_line_are_those_of_the_targets():
    assert set(cli.Device.__args__) == set(devices.TARGETS)


def test_pins_are_exact_and_of_the_jax_that_is_pinned():
    pins = dict(line.split("==") for line in PINS)
    everything = (environment.ROOT / "constraints.txt").read_text()
    (version,) = re.findall(r"^jax==(.+)$", everything, flags=re.MULTILINE)
    assert set(pins) == {p for t in devices.TARGETS.values() for p in t.packages}
    assert pins["jax-cuda13-plugin"] == pins["jax-cuda13-pjrt"] == version


def test_only_the_entry_computation_is_counted():
    assert devices.scheduled_cycles(TPU_PROGRAM) == 34
    kernels = devices.count_kernels(GPU_PROGRAM)
    # The transpose writes 4*8*2 bytes, the pair 4*8*2 + 8, the sum 4.
    assert kernels == {"gemms": 2, "passes": 3, "passes_bytes": 64 + 72 + 4}


def test_every_form_multiplies_by_the_same_matrix_as_far_as_shapes_tell():
    options = monarch.PRESETS["small"]
    ((n, nblocks),) = options.sizes
    for platform in ("tpu", "gpu"):
        forms = monarch.forms(n, nblocks, options, platform)
        assert list(forms) == list(monarch.BASELINES)
        for name, form in forms.items():
            y = jax.eval_shape(form.apply, form.x, *form.weights)
            assert (y.shape, y.dtype) == (form.x.shape, jnp.bfloat16), name
            entries = sum(w.size for w in jax.tree.leaves(form.weights))
            dense = n * n * monarch._layers(name)
            expected = dense if "dense" in name else dense * 2 // nblocks
            assert entries == expected, name
        for name in (monarch.TOKENS_MIXED, monarch.TOKENS, monarch.CHAIN):
            assert forms[name].apply.keywords["platform"] == platform


def test_the_forms_of_one_layer_multiply_by_the_same_matrix():
    options = monarch.Options(((16, 4),), tokens=3, dtype="float32")
    forms = monarch.forms(16, 4, options, "tpu")
    keys = jax.random.split(jax.random.key(0), 3)
    x, w1, w2 = (
        jax.random.normal(key, shape)
        for key, shape in zip(keys, ((3, 16), (4, 4, 4), (4, 4, 4)), strict=True)
    )
    y = forms[monarch.DENSE].apply(x, structured.monarch_to_dense(w1, w2).T)
    block_major = y.reshape(3, 4, 4).swapaxes(1, 2).reshape(3, 16)
    for name, expected in (
        (monarch.EINSUM, y),
        (monarch.TOKENS_MIXED, y),
        (monarch.TOKENS, block_major),
        (monarch.FEATURES_MIXED, y.T),
        (monarch.FEATURES, block_major.T),
    ):
        rows = x if forms[name].x.shape == x.shape else x.T
        chex.assert_trees_all_close(
            forms[name].apply(rows, w1, w2), expected, atol=1e-5
        )


def test_the_verdict_is_shown_where_every_aim_is_reached():
    word, why = monarch.verdict(records())
    assert word == "shown"
    assert "9 of 9 aims" in why
    assert "not by a measurement" in why
    for n, nblocks in SIZES:
        assert f"{n}, {nblocks} blocks" in why


def test_one_aim_missed_or_all_slower_is_not_shown():
    one = records()
    one[2]["compiler"][monarch.CHAIN]["optimal_seconds"] *= 1.02
    word, why = monarch.verdict(one)
    assert word == "not shown"
    assert "8 of 9 aims" in why
    assert "5.88 of 6.0" in why
    assert monarch.verdict(records(slower=100)).word == "reversed"
    assert monarch.verdict(records(slower=1.5)).word == "not shown"
    assert monarch.verdict(records(platform="gpu")).word == "not shown"


def test_tables_say_what_they_are_and_divide_chains_by_their_layers():
    found = records()
    ratios, times = monarch.tables(found)
    assert "not a measurement" in ratios.note
    assert "not a measurement" in times.note
    row = {name: values for name, *values in ratios.rows}
    assert row[monarch.CHAIN] == ["1.85", "1.75", "6.00", "5.80", "1.75", "1.75"]
    assert row["FLOP bound"] == ["2", "2", "32", "32", "2", "2"]
    microseconds = {
        cells[1]: cells[2] for cells in times.rows[: len(monarch.BASELINES)]
    }
    assert microseconds[monarch.DENSE] == "1000"
    assert microseconds[monarch.DENSE_CHAIN] == "250"
    (kernels,) = monarch.tables(records(platform="gpu"))
    assert "not a measurement" in kernels.note
    assert kernels.rows[0][2:5] == (2, 3, "4")


def test_the_report_names_devices_that_were_only_compiled_for(tmp_path):
    for platform in ("tpu", "gpu"):
        results.save_results(tmp_path, records(platform=platform))
    assert results.devices_with_results(tmp_path) == [
        "h200-compiled",
        "tpu-v5p-compiled",
    ]
    text = report.write(tmp_path).read_text()
    assert "compiled for one tpu-v5p, not run; python" in text
    assert "compiled for one h200, not run; python" in text
    assert "libtpu 0.0.42" in text
    (path,) = tmp_path.glob("tpu*/estimate_monarch.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    table = str(report.summary(tmp_path))
    (row,) = [row for row in table.splitlines() if "estimate monarch" in row]
    assert [cell.strip() for cell in row.strip("|").split("|")][1:] == [
        "*not shown*",
        "*shown*",
    ]


def test_small_records_get_no_verdict():
    assert members.verdict(monarch, records(preset="small")) is None
