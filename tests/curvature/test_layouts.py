"""Convolutions in one layout: the same numbers, and no other layout in a branch."""

import functools
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxlab.curvature._layouts import canonical_convolutions, for_branches
from jaxlab.sharpness import gradient_norm_penalty, hybrid, look_sam, periodic, sam

# Strides and the like by axis; layouts of input, kernel and result; groups.
CASES = {
    "channels first": {"window_strides": (2, 1), "padding": "SAME"},
    "channels last": {
        "window_strides": (1, 2),
        "padding": "VALID",
        "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
    },
    "turned": {
        "window_strides": (1, 2),
        "padding": "SAME",
        "dimension_numbers": ("CWHN", "IOHW", "HNCW"),
    },
    "uneven padding": {"window_strides": (1, 1), "padding": ((0, 2), (3, -1))},
    "dilated kernel": {
        "window_strides": (2, 1),
        "padding": ((2, 1), (0, 3)),
        "rhs_dilation": (1, 2),
    },
    "dilated input": {
        "window_strides": (1, 2),
        "padding": ((1, 1), (0, 1)),
        "lhs_dilation": (2, 3),
    },
    "all at once": {
        "window_strides": (3, 2),
        "padding": ((1, 2), (4, 0)),
        "lhs_dilation": (2, 1),
        "rhs_dilation": (2, 3),
        "dimension_numbers": ("HCNW", "WOIH", "WCHN"),
    },
    "one axis": {
        "window_strides": (2,),
        "padding": ((1, 2),),
        "dimension_numbers": ("NWC", "WIO", "NCW"),
    },
    "three axes": {
        "window_strides": (1, 2, 1),
        "padding": "SAME",
        "dimension_numbers": ("NCHWD", "OIHWD", "NDHWC"),
    },
}
GROUPED = {
    "features": {"feature_group_count": 2},
    "batch": {"batch_group_count": 2},
}
FLAT = {"window_strides": (1, 1), "padding": "SAME"}


def arrays(options, dtype=np.float32):
    """Gives 4 examples of 4 channels and a kernel of 6, no two sizes of a kind."""
    layouts = options.get("dimension_numbers", ("NCHW", "OIHW", "NCHW"))
    x = {"N": 4, "C": 4, "H": 7, "W": 9, "D": 5}
    into = 4 // options.get("feature_group_count", 1)
    kernel = {"O": 6, "I": into, "H": 3, "W": 2, "D": 4}
    draws = np.random.default_rng(0)
    draw = lambda sizes, axes: draws.normal(size=[sizes[axis] for axis in axes])
    pair = draw(x, layouts[0]), draw(kernel, layouts[1])
    return tuple(jnp.asarray(one, dtype) for one in pair)


def convolution(options):
    return functools.partial(jax.lax.conv_general_dilated, **options)


def slopes_of(function):
    """Makes gradients of a scalar that bends; they have convolutions of their own."""
    return jax.grad(lambda *inputs: jnp.sum(jnp.sin(function(*inputs))), (0, 1))


def convolutions(function, *inputs):
    """Collects the axes of all convolutions, nested ones too."""

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "conv_general_dilated":
                yield equation.params["dimension_numbers"]
            for inner in core.jaxprs_in_params(equation.params):
                yield from walk(inner)

    return list(walk(jax.make_jaxpr(function)(*inputs).jaxpr))


def canonical(numbers):
    rank = len(numbers.lhs_spec) - 2
    last = (0, rank + 1, *range(1, rank + 1))
    return numbers == (last, (rank + 1, rank, *range(rank)), last)


def close(found, expected, tolerance):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        assert one.dtype == two.dtype
        assert one.weak_type == two.weak_type
        scale = float(np.max(np.abs(two)))
        np.testing.assert_allclose(one, two, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("name", CASES)
def test_in_float64_the_numbers_are_the_same(name, x64):
    inputs = arrays(CASES[name], np.float64)
    plain = convolution(CASES[name])
    both = lambda *inputs: (plain(*inputs), slopes_of(plain)(*inputs))
    again = jax.jit(canonical_convolutions(both))
    close(again(*inputs), jax.jit(both)(*inputs), 1e-12)
    axes = convolutions(again, *inputs)
    assert len(axes) == 4
    assert all(map(canonical, axes))
    assert not all(map(canonical, convolutions(both, *inputs)))


@pytest.mark.parametrize("name", CASES)
def test_in_float32_too(name):
    inputs = arrays(CASES[name])
    function = convolution(CASES[name])
    close(canonical_convolutions(function)(*inputs), function(*inputs), 1e-5)


@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0)])
def test_under_vmap_and_grad(axes):
    options = CASES["all at once"]
    function = convolution(options)
    wide = [jnp.stack([one, 2 * one]) for one in arrays(options)]
    given = [w if axis == 0 else w[0] for w, axis in zip(wide, axes)]
    each = lambda f: jax.jit(jax.vmap(slopes_of(f), axes))
    expected = each(function)(*given)
    close(each(canonical_convolutions(function))(*given), expected, 1e-5)
    inside = jax.vmap(canonical_convolutions(slopes_of(function)), axes)
    close(jax.jit(inside)(*given), expected, 1e-5)


@pytest.mark.parametrize("name", GROUPED)
def test_grouped_convolutions_stay(name):
    options = FLAT | GROUPED[name]
    inputs = arrays(options)
    function = convolution(options)
    again = canonical_convolutions(function)
    assert convolutions(again, *inputs) == convolutions(function, *inputs)
    np.testing.assert_array_equal(again(*inputs), function(*inputs))
    slopes = canonical_convolutions(slopes_of(function))
    close(slopes(*inputs), slopes_of(function)(*inputs), 1e-5)


def test_types_and_precision_are_kept():
    x, kernel = (jnp.asarray(one, jnp.bfloat16) for one in arrays(FLAT))
    options = {"precision": "highest", "preferred_element_type": jnp.float32}
    function = convolution(FLAT | options)
    again = canonical_convolutions(function)
    equations = jax.make_jaxpr(again)(x, kernel).jaxpr.eqns
    (found,) = [e for e in equations if e.primitive.name == "conv_general_dilated"]
    (expected,) = jax.make_jaxpr(function)(x, kernel).jaxpr.eqns
    for name in options:
        assert found.params[name] == expected.params[name]
    assert again(x, kernel).dtype == jnp.float32
    close(again(x, kernel), function(x, kernel), 1e-5)
    whole = [jnp.asarray(9 * one, jnp.int32) for one in arrays(FLAT)]
    np.testing.assert_array_equal(
        canonical_convolutions(convolution(FLAT))(*whole), convolution(FLAT)(*whole)
    )


def test_a_function_without_convolutions_keeps_its_program():
    def function(tree, scale, *, power):
        loop = jax.lax.fori_loop(0, power, lambda i, v: v * scale, tree["a"])
        return {"loop": jax.nn.relu(loop), "none": None, "weak": jnp.sin(scale)}

    arguments = {"a": jnp.arange(3.0)}, jnp.asarray(2.0)
    again = canonical_convolutions(function)
    expected = jax.jit(function, static_argnames="power")(*arguments, power=3)
    close(again(*arguments, power=3), expected, 1e-6)  # 3 stays a number
    programs = [
        jax.make_jaxpr(functools.partial(f, power=3))(*arguments)
        for f in (again, function)
    ]
    assert str(programs[0]) == str(programs[1])
    weak = again({"a": jnp.arange(3.0)}, 2.0, power=3)["weak"]
    assert weak.weak_type


@jax.custom_vjp
def own_slope(x, kernel):
    return jax.lax.conv(x, kernel, (1, 1), "SAME")


def _forward(x, kernel):
    return own_slope(x, kernel), (x, kernel)


def _backward(kept, slope):
    x, kernel = kept
    return 2 * x + jnp.sum(slope), 3 * kernel


own_slope.defvjp(_forward, _backward)


@jax.custom_jvp
def own_tangent(x, kernel):
    return jax.lax.conv(x, kernel, (1, 1), "SAME")


@own_tangent.defjvp
def _tangent(primals, tangents):
    slope = own_tangent(tangents[0], primals[1])
    return own_tangent(*primals), 5 * slope + jnp.sum(tangents[1])


def nested(x, kernel):
    """Convolves in everything that holds a program, and closes over constants."""
    table, square = jnp.arange(3.0), kernel[:4]
    step = lambda v: jnp.tanh(jax.lax.conv(v, square, (1, 1), "SAME"))
    x = jax.nn.relu(jax.jit(step)(x))
    x = jax.checkpoint(step)(x)
    x = jax.lax.fori_loop(0, 2, lambda i, v: step(v) * table[i + 1], x)
    x = jax.lax.cond(jnp.sum(x) > 0, jax.jit(step), jnp.cos, x)
    x, rows = jax.lax.scan(lambda v, t: (step(v), jnp.sum(v) * t), x, table)
    small = lambda pair: pair[0] < 2
    count, x = jax.lax.while_loop(small, lambda p: (p[0] + 1, step(p[1])), (0, x))
    return {"a": own_slope(x, kernel), "b": (rows, count), "c": own_tangent(x, kernel)}


def test_programs_inside_the_program_change_too():
    inputs = [one / 3 for one in arrays(FLAT)]
    again = canonical_convolutions(nested)
    axes = convolutions(again, *inputs)
    assert len(axes) == len(convolutions(nested, *inputs)) == 8
    assert all(map(canonical, axes))
    close(jax.jit(again)(*inputs), jax.jit(nested)(*inputs), 1e-5)


def test_own_derivatives_are_kept():
    inputs = arrays(FLAT)

    def function(x, kernel):
        return own_slope(jax.nn.relu(x), kernel) + own_tangent(x, kernel)

    expected = slopes_of(function)(*inputs)
    close(slopes_of(canonical_convolutions(function))(*inputs), expected, 1e-5)
    close(canonical_convolutions(slopes_of(function))(*inputs), expected, 1e-5)


def test_in_shard_map_and_with_closed_over_tracers():
    x, kernel = arrays(FLAT)
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))

    def slopes(wrap):
        def local(x, kernel):
            loss = lambda k: jnp.sum(jnp.sin(jax.lax.conv(x, k, (1, 1), "SAME")))
            looped = lambda k: jax.lax.fori_loop(
                0, 2, lambda i, k: k - 0.1 * jax.grad(loss)(k), k
            )
            return jax.lax.pmean(wrap(looped)(kernel), "d")

        sharded = jax.shard_map(local, mesh=mesh, in_specs=(P("d"), P()), out_specs=P())
        return jax.jit(sharded)

    plain = slopes(lambda f: f)(x, kernel)
    close(slopes(canonical_convolutions)(x, kernel), plain, 1e-5)


LINKS = {
    "periodic": periodic(gradient_norm_penalty(0.8, 0.05), 3),
    "hybrid": hybrid(sam(0.05), 0.5),
    "look_sam": look_sam(0.05, every=3),
}


def loss_fn(params, x):
    for kernel, strides in ((params["one"], (1, 1)), (params["two"], (2, 2))):
        x = jax.nn.relu(
            jax.lax.conv_general_dilated(
                x, kernel, strides, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        )
    return jnp.mean(x**2)


def step(link, params, x, wrap=lambda f: f):
    grad_fn = wrap(jax.grad(lambda params: loss_fn(params, x)))
    grads, key = jax.grad(loss_fn)(params, x), jax.random.key(0)
    extra = {"grad_fn": grad_fn, "grad": grads, "key": key}
    return link.update(grads, link.init(params), params, **extra)[0]


@pytest.fixture(scope="module")
def small():
    one, two, three = jax.random.split(jax.random.key(0), 3)
    params = {
        "one": jax.random.normal(one, (3, 3, 1, 4)) / 3,
        "two": jax.random.normal(two, (3, 3, 4, 6)) / 6,
    }
    return params, jax.random.normal(three, (16, 8, 8, 1))


@pytest.mark.parametrize("name", LINKS)
def test_no_other_layout_is_left_in_a_compiled_branch(name, small):
    """Reads it off the compiled program, where the entry is always in order."""
    run = jax.jit(functools.partial(step, LINKS[name]))
    text = run.lower(*small).compile().as_text()
    found = re.findall(r"convolution\(.*dim_labels=(\S+->\w+)", text)
    assert len(found) == 10  # two forward and three backward, in entry and branch
    assert set(found) == {"b01f_01io->b01f"}


@pytest.mark.parametrize("name", LINKS)
def test_links_compute_what_they_did(name, small, monkeypatch):
    found = jax.jit(functools.partial(step, LINKS[name]))(*small)
    for module in ("sometimes", "look_sam"):
        monkeypatch.setattr(
            sys.modules[f"jaxlab.sharpness.{module}"], "for_branches", lambda f: f
        )
    expected = jax.jit(functools.partial(step, LINKS[name]))(*small)
    close(found, expected, 1e-5)


def test_only_branches_on_cpus_change(monkeypatch):
    function = lambda x: x
    assert for_branches(function) is not function
    with jax.disable_jit():
        assert for_branches(function) is function
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert for_branches(function) is function
