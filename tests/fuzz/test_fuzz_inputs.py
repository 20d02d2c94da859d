"""Every public function with disturbed arguments: a sane result, or a ValueError.

Shapes, dtypes, wrong trees and options are tried by tracing alone, so that nothing is
compiled; NaN, infinity and the layout of NumPy arrays need the numbers. ``make test``
tries a few of everything, ``make soak`` at least 50 inputs of each call.
"""

import collections
import importlib
import pathlib
import pkgutil
import runpy
import types

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlab

pytestmark = pytest.mark.untyped

HERE = pathlib.Path(__file__).parent
_load = lambda name: runpy.run_path(str(HERE / f"{name}.py"))
HARNESS = _load("harness")
EXEMPT = _load("exempt")["EXEMPT"]
KNOWN = _load("known")["KNOWN"]
SHAPES = _load("shapes")["SHAPES"]
ROOMS = ("floor", "curvature", "sharpness", "optimizers", "train")
CALLS = [c for room in ROOMS for c in _load(f"{room}_calls")["CALLS"]]
Base, Wrong, judge = HARNESS["Base"], HARNESS["Wrong"], HARNESS["judge"]
EAGER = ("layout", "value")  # kinds that need the numbers
FEW = 4  # inputs of each call in the default run
MANY = 60
COUNTS = {}

every_call = pytest.mark.parametrize("made", CALLS, ids=[c.name for c in CALLS])


def _public():
    found = {}
    for _, name, _ in pkgutil.walk_packages(jaxlab.__path__, "jaxlab."):
        last = name.rpartition(".")[2]
        if last.startswith("_") or name.endswith("_dataset_builder"):
            continue
        module = importlib.import_module(name)
        for public in getattr(module, "__all__", ()):
            thing = getattr(module, public)
            if not isinstance(thing, types.ModuleType):
                found[id(thing)] = (public, thing)
    return found.values()


def test_every_public_name_is_called_or_exempt_with_a_reason():
    called = {id(made.public) for made in CALLS}
    public = list(_public())
    missing = [n for n, thing in public if id(thing) not in called and n not in EXEMPT]
    assert not missing, f"neither in a table of calls nor exempt: {missing}"
    both = [n for n, thing in public if id(thing) in called and n in EXEMPT]
    assert not both
    assert set(EXEMPT) <= {name for name, _ in public}, "exempt, but not there"
    assert all(EXEMPT.values())


def test_names_are_unique_and_known_failures_have_a_call():
    names = [made.name for made in CALLS]
    assert len(names) == len(set(names))
    assert set(SHAPES) == set(names)
    assert set(KNOWN) <= set(names)


@every_call
def test_the_undisturbed_call(made):
    """Its shapes are those of the table: traced where that is possible."""
    base = Base(made)
    result = base.values if base.abstract is None else base.abstract
    assert HARNESS["spec"](result)[1] == SHAPES[made.name]


def _tried(made, base, disturbance, counts):
    """Judges one disturbance; what is known to fail is counted apart."""
    known = disturbance.what in KNOWN.get(made.name, {})
    try:
        counts[judge(made, base, disturbance)] += 1
    except Wrong as wrong:
        if not known:
            raise Wrong(f"{made.name}({disturbance}): {wrong}") from wrong
        counts["known"] += 1


def _fuzz(made, examples, kinds):
    base, counts = Base(made), collections.Counter()
    listed = [d for d in HARNESS["disturbances"](made) if d.kind in kinds]
    by_kind = collections.defaultdict(list)
    for disturbance in listed:
        by_kind[disturbance.kind].append(disturbance)
    if not by_kind:
        return counts
    # A kind first, so that leaves with many shapes do not crowd out the others.
    strategy = st.sampled_from(sorted(by_kind)).flatmap(
        lambda kind: st.sampled_from(by_kind[kind])
    )
    seen = set()

    @hypothesis.settings(
        derandomize=True,
        deadline=None,
        database=None,
        max_examples=examples,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    @hypothesis.given(strategy)
    def run(disturbance):
        key = str(disturbance)
        if key not in seen:
            seen.add(key)
            _tried(made, base, disturbance, counts)

    run()
    return counts


@every_call
def test_a_few_disturbed_inputs(made):
    base = Base(made)
    kinds = {d.kind for d in HARNESS["disturbances"](made)} - set(EAGER)
    if base.abstract is None:  # it computes: a compilation for each shape
        kinds -= {"shape", "dtype"}
    _fuzz(made, FEW, kinds)


@pytest.mark.parametrize("made", CALLS[::9], ids=[c.name for c in CALLS[::9]])
def test_layouts_and_numbers_of_some(made):
    _fuzz(made, FEW, EAGER)


@pytest.mark.soak
@every_call
def test_many_disturbed_inputs(made):
    listed = HARNESS["disturbances"](made)
    kinds = {d.kind for d in listed}
    counts = _fuzz(made, MANY, kinds)
    total = sum(counts.values())
    if total < 50:  # hypothesis drew some twice: all that there are, then
        counts, base = collections.Counter(), Base(made)
        for disturbance in listed:
            _tried(made, base, disturbance, counts)
    COUNTS[made.name] = counts


@pytest.mark.soak
def test_report(capsys):
    """Prints the counts of the test above; runs after it, in one process."""
    columns = ("result", "ValueError", "TypeError", "known")
    total = collections.Counter()
    with capsys.disabled():
        print(f"\n{'call':<50}" + "".join(f"{c:>11}" for c in columns))
        for name, counts in COUNTS.items():
            print(f"{name:<50}" + "".join(f"{counts[c]:>11}" for c in columns))
            total += counts
        print(f"{len(COUNTS)} calls".ljust(50), end="")
        print("".join(f"{total[c]:>11}" for c in columns))


# --- The fuzz sees what is broken on purpose


def _broken(public, run):
    x = jnp.arange(12.0).reshape(4, 3)
    arguments = {"x": x, "w": jnp.ones((3, 2)), "order": 2}
    return HARNESS["Call"](public, run, arguments, name="broken")


def _verdicts(made):
    base, wrong = Base(made), {}
    for disturbance in HARNESS["disturbances"](made):
        try:
            judge(made, base, disturbance)
        except Wrong as error:
            wrong[str(disturbance)] = str(error)
    return wrong


def _careful(x, w, order):
    x, w = jnp.asarray(x), jnp.asarray(w)
    if not isinstance(order, int) or isinstance(order, bool) or order < 1:
        raise ValueError("order must be an integer >= 1")
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[0]:
        raise ValueError("x must be (n, d), w (d, k)")
    if not jnp.issubdtype(jnp.result_type(x, w), jnp.floating):
        raise ValueError("floating numbers are needed")
    return x @ w


def test_a_careful_function_passes():
    assert _verdicts(_broken(_careful, _careful)) == {}


def _doubles_numpy(x, w, order):
    return _careful(x, w, order) * (2 if isinstance(x, np.ndarray) else 1)


def _reads_memory_order(x, w, order):
    if isinstance(x, np.ndarray):
        x = x.ravel(order="K").reshape(x.shape)
    return _careful(x, w, order)


def _lets_integers_through(x, w, order):
    return jnp.asarray(x).astype(x.dtype)


@pytest.mark.parametrize(
    ("spoilt", "seen"),
    [
        (_doubles_numpy, "x: layout, numpy"),
        (_reads_memory_order, "x: layout, fortran order"),
        (_lets_integers_through, "x: dtype, int32"),
    ],
)
def test_a_spoilt_one_does_not(spoilt, seen):
    assert seen in _verdicts(_broken(spoilt, spoilt))


def test_a_hang_is_a_failure(monkeypatch):
    def endless(x, w, order):
        while order > 2:
            pass
        return x @ w

    made = _broken(endless, endless)
    monkeypatch.setitem(judge.__globals__, "SECONDS", 0.2)
    wrong = _verdicts(made)
    assert any("no end after" in text for text in wrong.values())


def test_a_dropped_check_of_the_library_is_seen(monkeypatch):
    """Without its check of the rows, weights of another length broadcast."""
    from jaxlab import likelihoods

    made = next(c for c in CALLS if c.name == "Gaussian[nll]")
    before = _verdicts(made)

    def unchecked(rows, weights=None, *, dtype=jnp.float32):
        share = jnp.ones(rows, dtype) if weights is None else jnp.asarray(weights)
        return share / share.sum()

    monkeypatch.setattr(likelihoods, "row_shares", unchecked)
    jax.clear_caches()
    assert set(_verdicts(made)) - set(before)
