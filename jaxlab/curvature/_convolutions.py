"""Convolutions as matrix products, for loops that XLA compiles for CPUs.

A convolution is a matrix product of patches, cut out of the padded input by one strided
slice for each entry of the kernel. In a loop compiled for a CPU convolutions are slow
by a factor of five and more, matrix products are not, and patches of what does not
change are laid out once for the whole loop. They take the memory of the input times the
entries of the kernel.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from jaxlab.curvature._options import Driver, chosen_driver
from jaxlab.curvature._partwise import Partwise
from jaxlab.curvature._vectors import Operator, Space, is_host

_LARGEST = 25  # entries of a kernel that is taken apart


def driven(
    name: str, operator: Operator, space: Space, driver: Driver, *, traced: bool
) -> tuple[Operator, Literal["compiled", "host"]]:
    """Decides who loops, and takes the convolutions out where that helps.

    Raises:
      ValueError: for a driver that the operator or the caller's jit rules out.
    """
    chosen = chosen_driver(name, operator, space, driver, traced=traced)
    if driver != "auto" or chosen != "host" or is_host(operator):
        return operator, chosen
    operator = by_matmuls(operator)
    return operator, chosen_driver(name, operator, space, driver, traced=traced)


def by_matmuls(operator: Operator) -> Operator:
    """Gives an operator whose function has its convolutions as matrix products.

    Operators that hold no function stay as they are.
    """
    if isinstance(operator, Partwise):
        return operator.on(ByMatmuls(operator.function), operator.params)
    inner = getattr(operator, "operator", None)
    if inner is None or not dataclasses.is_dataclass(operator):
        return operator
    return dataclasses.replace(operator, operator=by_matmuls(inner))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ByMatmuls:
    """A function with its convolutions as matrix products.

    Those inside loops, branches and functions with derivatives of their own stay what
    they are, and so do grouped and dilated ones and those with large kernels.
    """

    function: Any

    def __call__(self, *arguments: Any) -> Any:
        """Computes what the function does, up to round-off."""
        program, shape = jax.make_jaxpr(self.function, return_shape=True)(*arguments)
        values = evaluated(program, jax.tree.leaves(arguments), _results)
        return jax.tree.unflatten(jax.tree.structure(shape), values)


def evaluated(
    program: core.ClosedJaxpr,
    arguments: list[Any],
    results: Callable[[core.Jaxpr, list[Any]], list[Any]],
) -> list[Any]:
    """Evaluates a program equation by equation.

    Args:
      program: what to evaluate.
      arguments: a value for each of its variables.
      results: of a program of one equation and its inputs, the literals among them
        included; :func:`as_jax_does` where nothing is to change.
    """
    jaxpr = program.jaxpr
    known = dict(zip(jaxpr.constvars, program.consts, strict=True))
    known.update(zip(jaxpr.invars, arguments, strict=True))
    read = lambda atom: atom.val if isinstance(atom, core.Literal) else known[atom]
    for equation in jaxpr.eqns:
        alone = jaxpr.replace(eqns=[equation], constvars=[])
        values = results(alone, [read(atom) for atom in equation.invars])
        known.update(zip(equation.outvars, values, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _results(jaxpr: core.Jaxpr, inputs: list[Any]) -> list[Any]:
    """Evaluates the one equation of a program."""
    (equation,) = jaxpr.eqns
    name = equation.primitive.name
    if name == "conv_general_dilated" and _is_plain(equation):
        return [_by_slices(*inputs, equation)]
    if name in ("jit", "pjit"):
        return evaluated(equation.params["jaxpr"], inputs, _results)
    return as_jax_does(jaxpr, inputs)


def as_jax_does(jaxpr: core.Jaxpr, inputs: list[Any]) -> list[Any]:
    """Evaluates the one equation of a program unchanged."""
    (equation,) = jaxpr.eqns
    pairs = zip(equation.invars, inputs, strict=True)
    given = {a: x for a, x in pairs if not isinstance(a, core.Literal)}
    alone = jaxpr.replace(invars=list(given), outvars=equation.outvars)
    return core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))(*given.values())


def _is_plain(equation: Any) -> bool:
    options = equation.params
    kernel, numbers = equation.invars[1].aval, options["dimension_numbers"]
    return (
        options["feature_group_count"] == options["batch_group_count"] == 1
        and set(options["lhs_dilation"]) <= {1}
        and math.prod(kernel.shape[axis] for axis in numbers.rhs_spec[2:]) <= _LARGEST
    )


def _by_slices(inputs: jax.Array, kernel: jax.Array, equation: Any) -> jax.Array:
    options, numbers = equation.params, equation.params["dimension_numbers"]
    batch, feature, *space = numbers.lhs_spec
    inputs = lax.transpose(inputs, (batch, *space, feature))
    last, first, *space = numbers.rhs_spec
    kernel = lax.transpose(kernel, (*space, first, last))
    batch, feature, *space = numbers.out_spec
    sizes = [equation.outvars[0].aval.shape[axis] for axis in space]
    edges = [(0, 0), *options["padding"], (0, 0)]
    zero = jnp.zeros((), inputs.dtype)
    inputs = lax.pad(inputs, zero, [(low, high, 0) for low, high in edges])
    strides = options["window_strides"]
    slices = []
    for place in itertools.product(*map(range, kernel.shape[:-2])):
        start = [i * d for i, d in zip(place, options["rhs_dilation"], strict=True)]
        stop = [i + (n - 1) * s + 1 for i, n, s in zip(start, sizes, strides)]
        start, stop = (0, *start, 0), (len(inputs), *stop, inputs.shape[-1])
        slices.append(lax.slice(inputs, start, stop, (1, *strides, 1)))
    patches = lax.concatenate(slices, len(sizes) + 1)
    found = jnp.matmul(
        patches.reshape(-1, patches.shape[-1]),
        kernel.reshape(-1, kernel.shape[-1]),
        precision=options["precision"],
        preferred_element_type=options["preferred_element_type"],
    )
    found = found.reshape(*patches.shape[:-1], found.shape[-1])
    axes = [batch, *space, feature]
    return lax.transpose(found, [axes.index(axis) for axis in range(len(axes))])
