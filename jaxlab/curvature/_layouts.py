"""Convolutions in the one layout that XLA runs fast in branches and loops on CPUs.

XLA:CPU has fast code for ``NHWC, HWIO -> NHWC`` and brings other convolutions to that
form, but only those of the entry computation. In a branch or the body of a loop the
convolutions of a gradient, whose batch and channels have changed places, stay several
times slower. Here the transposes are written out, so that nothing is left to bring.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from jaxlab.curvature._convolutions import as_jax_does, evaluated

# What is a program inside a program and no more than that.
_WALKED = {
    *("jit", "pjit", "closed_call", "remat2", "checkpoint", "cond", "scan", "while"),
    *("custom_jvp_call", "custom_vjp_call"),
}


def for_branches(function: Callable[..., Any]) -> Callable[..., Any]:
    """Gives what to call in a branch: on a CPU with canonical convolutions."""
    # Without jit there are no branches, and whoever debugs wants values to look at.
    if jax.default_backend() != "cpu" or jax.config.jax_disable_jit:
        return function
    return canonical_convolutions(function)


def canonical_convolutions(function: Callable[..., Any]) -> Callable[..., Any]:
    """Rewrites the convolutions of a function as ``NHWC, HWIO -> NHWC``.

    Those in loops, branches, nested ``jit`` and ``checkpoint`` and functions with
    derivatives of their own change too; grouped ones stay. A derivative brings
    convolutions of its own: wrap ``jax.grad(f)``, not ``f``.

    Args:
      function: of any arguments. Its arrays may be traced; other leaves reach it as
        they are.

    Returns:
      A function of the same arguments with the same results up to round-off.
    """

    def canonical(*args: Any, **kwargs: Any) -> Any:
        leaves, structure = jax.tree.flatten((args, kwargs))
        arrays = {
            place: jnp.asarray(leaf)
            for place, leaf in enumerate(leaves)
            if isinstance(leaf, (jax.Array, np.ndarray))
        }

        def of_arrays(arrays):
            given = [arrays.get(place, leaf) for place, leaf in enumerate(leaves)]
            args, kwargs = jax.tree.unflatten(structure, given)
            return function(*args, **kwargs)

        program, shape = jax.make_jaxpr(of_arrays, return_shape=True)(arrays)
        values = evaluated(program, jax.tree.leaves(arrays), _results)
        return jax.tree.unflatten(jax.tree.structure(shape), values)

    return canonical


def _results(alone: core.Jaxpr, inputs: list[Any]) -> list[Any]:
    """Evaluates the one equation of a program."""
    (equation,) = alone.eqns
    name = equation.primitive.name
    if name == "conv_general_dilated" and _is_plain(equation.params):
        return [_canonical(*inputs, equation.params)]
    if name in _WALKED and _convolves(alone):
        params = {key: _rewritten(value) for key, value in equation.params.items()}
        alone = alone.replace(eqns=[equation.replace(params=params)])
    return as_jax_does(alone, inputs)


def _rewritten(value: Any) -> Any:
    """Rewrites what in a parameter of an equation is a program."""
    if isinstance(value, tuple):  # the branches of a cond
        new = [_rewritten(one) for one in value]
        same = all(one is two for one, two in zip(new, value, strict=True))
        return value if same else tuple(new)
    if isinstance(value, core.Jaxpr):
        closed = core.ClosedJaxpr(value, ())
        return value if value.constvars else _rewritten(closed).jaxpr
    if not isinstance(value, core.ClosedJaxpr) or not _convolves(value.jaxpr):
        return value
    evaluate = lambda *inputs: evaluated(value, list(inputs), _results)
    return jax.make_jaxpr(evaluate)(*value.in_avals)


def _convolves(jaxpr: core.Jaxpr) -> bool:
    return any(
        equation.primitive.name == "conv_general_dilated"
        or any(map(_convolves, core.jaxprs_in_params(equation.params)))
        for equation in jaxpr.eqns
    )


def _is_plain(options: dict[str, Any]) -> bool:
    return (
        options["feature_group_count"] == options["batch_group_count"] == 1
        # The user's wish is in the order of the axes that we change.
        and options.get("out_sharding") is None
    )


def _canonical(inputs: jax.Array, kernel: jax.Array, options: dict) -> jax.Array:
    """Convolves between transposes; strides, padding and dilation keep their order."""
    numbers = options["dimension_numbers"]
    batch, feature, *space = numbers.out_spec
    axes = [batch, *space, feature]
    batch, feature, *space = numbers.lhs_spec
    inputs = lax.transpose(inputs, (batch, *space, feature))
    last, first, *space = numbers.rhs_spec
    kernel = lax.transpose(kernel, (*space, first, last))
    rank = len(space)
    last_spec = (0, rank + 1, *range(1, rank + 1))
    kernel_spec = (rank + 1, rank, *range(rank))
    numbers = lax.ConvDimensionNumbers(last_spec, kernel_spec, last_spec)
    options = options | {"dimension_numbers": numbers}
    found = lax.conv_general_dilated_p.bind(inputs, kernel, **options)
    return lax.transpose(found, [axes.index(axis) for axis in range(len(axes))])
