"""What a disturbed call is, and what may come out of it.

A :class:`Call` holds a function of the library and arguments with which it works. A
disturbance replaces one argument, or one leaf of one, by something a user may pass by
mistake. Allowed is a result whose shapes and dtypes make sense, or a ValueError; a
TypeError only in JAX's own words about a leaf that is no number, see ``LEAF_TYPES``.
"""

import contextlib
import dataclasses
import functools
import inspect
import re
import signal
import traceback
import types
import typing
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

SECONDS = 20  # a call that takes longer hangs


@dataclasses.dataclass(frozen=True)
class Call:
    """A call that works.

    Attributes:
      public: what is tested, an object of an ``__all__``.
      run: called with ``arguments`` as keywords; ``public`` itself, or a function that
        makes something with it and uses that.
      arguments: values by name. Callables are never disturbed.
      like: argument whose structure, shapes and dtypes the result follows.
      same: arguments that must have one structure and the same shapes.
      fixed: arguments that are not disturbed.
      skip: kinds of disturbance that mean nothing here.
      name: of the call in the tables of shapes and of known failures.
    """

    public: Any
    run: Callable[..., Any]
    arguments: dict[str, Any]
    like: str | None = None
    same: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    name: str = ""


def call(public, /, *positional, use=None, like=None, same=(), fixed=(), skip=(), **kw):
    """Makes a :class:`Call`: ``public(*positional, **kw)``, or ``use`` of the same."""
    run = use or public
    signature = inspect.signature(run)
    bound = signature.bind(*positional, **kw)
    arguments = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= value
        else:
            arguments[name] = value
    name = public.__name__ + ("" if use is None else f"[{use.__name__.strip('_')}]")
    return Call(public, run, arguments, like, tuple(same), fixed, skip, name)


def transform(make, params, *, extra=(), same=("params", "updates"), **hyperparameters):
    """One step of a gradient transformation; what comes out is like the updates."""

    def update(params, updates, **hyperparameters):
        functions = {name: value for name, value in extra}
        link = make(**hyperparameters)
        return link.update(updates, link.init(params), params, **functions)[0]

    arguments = {"params": params, "updates": params, **hyperparameters}
    return Call(make, update, arguments, "updates", same, name=make.__name__)


def ramp(*shape, scale=1.0):
    """Numbers of both signs, none of them equal."""
    size = int(np.prod(shape))
    return jnp.asarray(
        scale * np.sin(1.0 + np.arange(size)).reshape(shape), jnp.float32
    )


# --- Disturbances: kind -> function of (value, salt) -> list of labelled values


def _is_array(value):
    return isinstance(value, jax.Array | np.ndarray) and not _is_key(value)


def _is_key(value):
    return isinstance(value, jax.Array) and jnp.issubdtype(
        value.dtype, jax.dtypes.prng_key
    )


def _strided(host):
    """The same numbers, every second of a larger array along each axis."""
    if host.ndim == 0:
        return np.stack([host, host])[1:].reshape(())
    wide = np.zeros([2 * n for n in host.shape], host.dtype)
    view = wide[tuple(slice(None, None, 2) for _ in host.shape)]
    view[...] = host
    return view


def _reversed(host):
    """The same numbers with negative strides."""
    turn = tuple(slice(None, None, -1) for _ in host.shape)
    return host[turn].copy()[turn]


def _poisoned(host, number):
    if not jnp.issubdtype(host.dtype, jnp.inexact):
        return None
    host = np.array(host)
    host.reshape(-1)[: 1 + host.size // 3] = number
    return host


def _resized(host, axis, size):
    if host.ndim == 0:
        return None
    axis %= host.ndim
    index = np.arange(size) % max(host.shape[axis], 1)
    return np.take(host, index, axis=axis) if host.shape[axis] else None


def _sizes(host):
    for axis in range(host.ndim):
        for size in {0, 1, host.shape[axis] - 1, host.shape[axis] + 1}:
            if size >= 0 and size != host.shape[axis]:
                yield f"axis {axis} of {size}", _resized(host, axis, size)


def _layouts(host):
    yield "numpy", np.array(host)
    yield "strided view", _strided(host)
    yield "reversed view", _reversed(host)
    yield "fortran order", np.array(host, order="F")
    if host.dtype == np.float32:
        yield "float64", host.astype(np.float64)
    read_only = np.array(host)
    read_only.flags.writeable = False
    yield "read only", read_only


def _dtypes(host):
    for dtype in (
        np.int32,
        np.bool_,
        np.float16,
        ml_dtypes.bfloat16,
        np.complex64,
        np.uint8,
        np.float32,
    ):
        if host.dtype != dtype:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield np.dtype(dtype).name, jnp.asarray(host.astype(dtype))


def _values(host):
    for number in (np.nan, np.inf, -np.inf, 0.0, 1e38):
        bad = _poisoned(host, number)
        if bad is not None:
            yield str(number), jnp.asarray(bad)


def _shapes(host):
    yield "extra axis in front", jnp.asarray(host[None])
    yield "extra axis behind", jnp.asarray(host[..., None])
    if host.ndim:
        yield "first axis missing", jnp.asarray(host[0]) if len(host) else None
        yield "flat", jnp.asarray(host.reshape(-1)) if host.ndim > 1 else None
        yield "scalar", jnp.asarray(host.reshape(-1)[0]) if host.size else None
    if host.ndim > 1:
        yield "transposed", jnp.asarray(host.T) if host.T.shape != host.shape else None
    for label, value in _sizes(host):
        yield label, None if value is None else jnp.asarray(value)


def _leaves(host):
    yield "a string", "text"
    yield "None", None
    yield "an object", object()
    yield "an object array", np.array([None, "a"], dtype=object)
    yield "a string array", np.array(["a", "b"])


def _trees(tree):
    yield "None", None
    yield "empty dict", {}
    yield "a string", "text"
    yield "empty tuple", ()
    yield "list of leaves", jax.tree.leaves(tree)
    if isinstance(tree, dict):
        first = next(iter(tree))
        yield "key missing", {k: v for k, v in tree.items() if k != first}
        yield "key more", tree | {"one more": next(iter(jax.tree.leaves(tree)))}
        yield "key renamed", {f"new {k}": v for k, v in tree.items()}
        yield "leaf a string", tree | {first: "text"}
        yield "leaf None", tree | {first: None}


def _counts(count):
    for value in (0, -1, float(count) + 0.5, float(count), True, None, "3", np.nan):
        yield repr(value), value
    yield "numpy integer", np.int64(count)
    yield "array", jnp.asarray([count, count])


def _scalars(number):
    for value in (0.0, -1.0, np.nan, np.inf, None, "text", True, 10**6):
        yield repr(value), value
    yield "array of two", jnp.asarray([number, number], jnp.float32)
    yield "array of one", jnp.asarray([number], jnp.float32)
    yield "same array", jnp.asarray(number, jnp.float32)
    yield "numpy scalar", np.float64(number)
    yield "complex", 1j


def _names(name):
    for value in ("another", "", None, 3, name.upper(), ["x"]):
        yield repr(value), value


def _sequences(items):
    for value in ((), (0,), (-1,), (2.5,), (10**6,), None, 3, "text", (None,)):
        yield repr(value), value
    yield "array", np.asarray(items)
    yield "list", list(items)


def _flags(flag):
    for value in (None, "yes", 2, np.bool_(flag), jnp.asarray(flag)):
        yield repr(value), value


def _keys(key):
    yield "uint32 key", jax.random.key_data(key)
    yield "two keys", jax.random.split(key)
    yield "None", None
    yield "an integer", 0
    yield "a float array", jnp.ones(2)


ARRAYS = {
    "layout": _layouts,
    "dtype": _dtypes,
    "value": _values,
    "shape": _shapes,
    "leaf": _leaves,
}


@dataclasses.dataclass(frozen=True)
class Disturbance:
    argument: str
    kind: str
    label: str
    value: Any
    place: str = ""

    @property
    def what(self):
        """Argument, kind and label, whatever the leaf; names a known failure."""
        return f"{self.argument}: {self.kind}, {self.label}"

    def __str__(self):
        return f"{self.argument}{self.place}: {self.kind}, {self.label}"


def _of_array(argument, host, place="", put=lambda value: value):
    for kind, make in ARRAYS.items():
        for label, value in make(host):
            if value is not None or label == "None":
                yield Disturbance(argument, kind, label, put(value), place)


def _of_argument(argument, value):
    one = lambda kind, make: (
        Disturbance(argument, kind, label, new) for label, new in make(value)
    )
    if _is_key(value):
        yield from one("key", _keys)
    elif _is_array(value):
        yield from _of_array(argument, np.asarray(value))
    elif isinstance(value, bool):
        yield from one("flag", _flags)
    elif isinstance(value, int):
        yield from one("count", _counts)
    elif isinstance(value, float):
        yield from one("scalar", _scalars)
    elif isinstance(value, str):
        yield from one("name", _names)
    elif isinstance(value, tuple | list) and all(isinstance(i, int) for i in value):
        yield from one("sequence", _sequences)
    elif value is not None and not _opaque(value):
        yield from one("tree", _trees)
        leaves, treedef = jax.tree_util.tree_flatten_with_path(value)
        for index, (path, leaf) in enumerate(leaves):
            if not _is_array(leaf):
                continue

            def put(new, index=index):
                flat = [leaf for _, leaf in leaves]
                flat[index] = new
                return jax.tree.unflatten(treedef, flat)

            place = jax.tree_util.keystr(path)
            yield from _of_array(argument, np.asarray(leaf), place, put)


def _opaque(value):
    leaves = jax.tree.leaves(value)
    return callable(value) or not any(map(_is_array, leaves))


def disturbances(made: Call) -> list[Disturbance]:
    """Lists what may be done to a call, in a fixed order."""
    optional = _optional(made)
    return [
        d
        for name, value in made.arguments.items()
        if name not in made.fixed
        for d in _of_argument(name, value)
        if d.kind not in made.skip and f"{name}:{d.kind}" not in made.skip
        if d.value is not None or name not in optional
    ]


def _optional(made):
    """Names the arguments that may be None."""
    parameters = inspect.signature(made.public).parameters.values()
    return {
        p.name for p in parameters if p.default is None or "None" in str(p.annotation)
    }


# --- Judging


class Hang(BaseException):
    """Raised by the alarm."""


@contextlib.contextmanager
def alarm(seconds):
    """Raises :class:`Hang` after that many seconds."""

    def ring(number, frame):
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Wrong(AssertionError):
    """Says what must not come out."""


# TypeErrors of JAX and NumPy about a leaf that is no number of the right sort.
LEAF_TYPES = re.compile(
    "not a valid JAX (array )?type"
    "|requires (real|complex|floating|ndarray|array|np\\.)"
    "|Cannot interpret value of type"
    "|cannot be interpreted as a JAX array"
    "|Only arrays of numeric types"
    "|does not accept dtype"
    "|requires dtype"
    "|must be of (floating|inexact|integer|real)"
    "|must have (a )?(numeric|integer|bool)"
    "|Error interpreting argument to"
    "|Cannot determine dtype of|data type .* not understood"
    "|primal and tangent arguments to jax.jvp do not match; dtypes"
    "|unexpected PRNG key type|invalid PRNG key data"
    "|Casting from complex to real dtypes"
)


def spec(tree):
    """Structure and leaf shapes."""
    return jax.tree.structure(tree), [np.shape(leaf) for leaf in jax.tree.leaves(tree)]


def result_of(made, arguments):
    """Runs the call as a user's program would: ranks are promoted."""
    with alarm(SECONDS), jax.numpy_rank_promotion("allow"):
        result = made.run(**arguments)
        result = jax.tree.map(lambda x: x, result)
        jax.block_until_ready(jax.tree.leaves(result))
        return result


_NOT_TRACED = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerBoolConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)


def _is_number(leaf):
    return isinstance(leaf, jax.Array) or (
        isinstance(leaf, np.ndarray) and leaf.dtype.kind not in "OUS"
    )


def abstract_result_of(made, arguments):
    """Gives shapes and dtypes of the result without compiling or computing."""
    leaves, treedef = jax.tree.flatten(arguments)
    where = [i for i, leaf in enumerate(leaves) if _is_number(leaf)]

    def run(numbers):
        new = list(leaves)
        for i, number in zip(where, numbers, strict=True):
            new[i] = number
        return made.run(**jax.tree.unflatten(treedef, new))

    with alarm(SECONDS), jax.numpy_rank_promotion("allow"):
        return jax.eval_shape(run, [leaves[i] for i in where])


@dataclasses.dataclass
class Base:
    """The undisturbed result, computed or traced when first asked for."""

    made: Call

    @functools.cached_property
    def values(self):
        return result_of(self.made, self.made.arguments)

    @functools.cached_property
    def abstract(self):
        """Shapes and dtypes, or None where the function needs the values."""
        try:
            return abstract_result_of(self.made, self.made.arguments)
        except Exception:
            return None

    def run(self, arguments, kind):
        """Gives the disturbed result and the undisturbed one, of the same sort."""
        if kind not in ("layout", "value") and self.abstract is not None:
            with contextlib.suppress(*_NOT_TRACED):
                return abstract_result_of(self.made, arguments), self.abstract
        return result_of(self.made, arguments), self.values


def _by_the_caller(error):
    """Says whether the error comes out of a function that the table passes in."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f.filename for f in frames if "/site-packages/" not in f.filename]
    where = ours[-1] if ours else ""
    return "/tests/fuzz/" in where and "harness" not in where


def judge(made, base, disturbance):
    """Runs one disturbed call.

    Returns:
      "result", "ValueError" or "TypeError"; raises :class:`Wrong` on what is not
      allowed.
    """
    arguments = made.arguments | {disturbance.argument: disturbance.value}
    try:
        result, base = base.run(arguments, disturbance.kind)
    except Hang:
        raise Wrong(f"no end after {SECONDS} s") from None
    except ValueError as error:
        if disturbance.kind == "layout":
            raise Wrong(f"refused: {error}") from error
        return "ValueError"
    except Exception as error:
        if isinstance(error, FloatingPointError) and "The loss is" in str(error):
            return "ValueError"  # what fit promises
        if _by_the_caller(error):
            return "TypeError"
        if isinstance(error, TypeError | DeprecationWarning) and LEAF_TYPES.search(
            str(error)
        ):
            return "TypeError"
        raise Wrong(f"{type(error).__name__}: {str(error)[:300]}") from error
    _check_result(made, base, disturbance, arguments, result)
    return "result"


def _check_result(made, base, disturbance, arguments, result):
    kind = disturbance.kind
    if kind == "layout":
        _check_equal(base, result)
    if kind in ("dtype", "value", "layout", "key", "flag"):
        if spec(result) != spec(base):
            raise Wrong(f"shapes {spec(base)[1]} became {spec(result)[1]}")
        _check_dtypes(made, arguments, base, result)
    if kind == "scalar" and spec(result)[1] != spec(base)[1]:
        raise Wrong(f"shapes {spec(base)[1]} became {spec(result)[1]}")
    if kind in ("shape", "tree", "leaf") and disturbance.argument in made.same:
        first, *rest = (spec(arguments[name]) for name in made.same)
        if any(first != other for other in rest):
            raise Wrong(f"{made.same} differ, and yet there is a result")
    follows = made.like is not None and kind in ("shape", "tree")
    if follows and spec(result) != spec(arguments[made.like]):
        raise Wrong(f"the result {spec(result)[1]} is not like {made.like}")
    if kind in ("shape", "count", "sequence"):
        _check_annotations(made, arguments, result)


def _check_equal(base, result):
    if jax.tree.structure(base) != jax.tree.structure(result):
        raise Wrong("another tree than from the contiguous JAX array")
    for one, two in zip(jax.tree.leaves(base), jax.tree.leaves(result), strict=True):
        if _is_key(one):
            one, two = jax.random.key_data(one), jax.random.key_data(two)
        one, two = np.asarray(one), np.asarray(two)
        if one.dtype == np.float32 and two.dtype == np.float64:
            two = two.astype(np.float32)  # a NumPy leaf that was handed through
        if one.dtype != two.dtype:
            raise Wrong(f"{one.dtype} became {two.dtype}")
        same = one.shape == two.shape and one.tobytes() == two.tobytes()
        if not same:
            raise Wrong(f"{one!r} became {two!r}"[:300])


def _check_dtypes(made, arguments, base, result):
    for one, two in zip(jax.tree.leaves(base), jax.tree.leaves(result), strict=True):
        if not (hasattr(one, "dtype") and hasattr(two, "dtype")):
            continue
        inexact = lambda x: jnp.issubdtype(x.dtype, jnp.inexact)
        if inexact(one) and not inexact(two):
            raise Wrong(f"{one.dtype} became {two.dtype}")
    if made.like is not None and not made.same:
        pairs = zip(
            jax.tree.leaves(arguments[made.like]), jax.tree.leaves(result), strict=True
        )
        for given, got in pairs:
            given = jax.dtypes.canonicalize_dtype(np.asarray(given).dtype)
            found = jax.dtypes.canonicalize_dtype(got.dtype)  # NumPy handed through
            if jnp.issubdtype(given, jnp.floating) and given != found:
                raise Wrong(f"{made.like} of {given}, result of {got.dtype}")


# --- The annotations' letters, shapes only


class _Letters:
    """Binds the letters of annotations to sizes, as jaxtyping does, by shape alone."""

    def __init__(self):
        self.sizes, self.many, self.arguments = {}, {}, {}

    def wrong(self, hint, shape):
        """Says what does not fit, or nothing."""
        dims = str(hint.dim_str).split()
        if "..." in dims:
            at = dims.index("...")
            before, after = dims[:at], dims[at + 1 :]
            if len(shape) < len(before) + len(after):
                return f"{shape} against {hint.dim_str!r}"
            tail = shape[len(shape) - len(after) :]
            return self._all(before, shape[:at]) or self._all(after, tail)
        starred = [i for i, d in enumerate(dims) if d.startswith("*")]
        if starred:
            at = starred[0]
            before, after = dims[:at], dims[at + 1 :]
            if len(shape) < len(before) + len(after):
                return f"{shape} against {hint.dim_str!r}"
            middle = shape[at : len(shape) - len(after)]
            tail = shape[len(shape) - len(after) :]
            wrong = self._all(before, shape[:at]) or self._all(after, tail)
            known = self.many.setdefault(dims[at], middle)
            if known != middle and not wrong:
                wrong = f"{dims[at]} is {known} and {middle}"
            return wrong
        if len(dims) != len(shape):
            return f"{tuple(shape)} against {hint.dim_str!r}"
        return self._all(dims, shape)

    def _all(self, dims, shape):
        for dim, size in zip(dims, shape, strict=True):
            if dim == "_":
                continue
            expected = self._size(dim)
            if expected is None and dim.isidentifier():
                self.sizes[dim] = size
            elif expected is not None and expected != size:
                return f"{dim} is {expected} and {size}"
        return ""

    def _size(self, dim):
        if dim in self.sizes:
            return self.sizes[dim]
        if "{" in dim or not dim.isidentifier():
            with contextlib.suppress(Exception):
                named = dim.format(**self.arguments)
                return int(eval(named, {}, self.sizes))
        return None


def _array_hints(hint):
    """Lists the array annotations of a union, or nothing if others may stand there."""
    if hasattr(hint, "dim_str"):
        return [hint]
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return [h for part in typing.get_args(hint) for h in _array_hints(part)]
    return []


def _misfit(letters, hint, value):
    """Walks annotation and value together; gives the first misfit."""
    if value is None:
        return ""
    hints = _array_hints(hint)
    if hints and hasattr(value, "shape"):
        return letters.wrong(hints[0], value.shape)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple and isinstance(value, tuple) and Ellipsis not in args:
        for part, item in zip(args, value, strict=False):
            wrong = _misfit(letters, part, item)
            if wrong:
                return wrong
        return ""
    if isinstance(hint, type) and hasattr(hint, "_fields"):
        inner = _Letters()
        hints = typing.get_type_hints(hint, include_extras=True)
        for name, part in hints.items():
            wrong = _misfit(inner, part, getattr(value, name))
            if wrong:
                return f"{hint.__name__}.{name}: {wrong}"
    return ""


def _check_annotations(made, arguments, result):
    if made.run is not made.public:
        return
    try:
        hints = typing.get_type_hints(made.public, include_extras=True)
    except Exception:
        return
    letters = _Letters()
    letters.arguments = {
        k: v for k, v in arguments.items() if isinstance(v, int | float)
    }
    for name, value in arguments.items():
        if name in hints and not _is_key(value):
            wrong = _misfit(letters, hints[name], value)
            if wrong:
                raise Wrong(f"accepted outside its annotation: {name}: {wrong}")
    wrong = _misfit(letters, hints.get("return"), result)
    if wrong:
        raise Wrong(f"a result outside its annotation: {wrong}")


__all__ = ["Call", "call", "disturbances", "judge", "result_of"]
