"""Counts the operations of products and convolutions in a program as it is written."""

import math
from typing import Any


def product_flops(jaxpr: Any, *, open_loops: int = 1) -> int:
    """Counts two operations for each multiplication and addition of a product.

    Loops count as often as they run, which XLA's cost analysis does not know; of the
    branches of a conditional the dearest counts. Elementwise work is left out.

    Args:
      jaxpr: from ``jax.make_jaxpr(f)(...)``, or its ``jaxpr``.
      open_loops: trip count of loops whose number only the run knows.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> body = lambda x, _: (x @ x, None)
      >>> f = lambda x: jax.lax.scan(body, x, None, length=3)[0]
      >>> product_flops(jax.make_jaxpr(f)(jnp.ones((4, 4))))
      384
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    count = lambda inner: product_flops(inner, open_loops=open_loops)
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            inner = math.prod(left[axis] for axis in contracted)
            total += 2 * inner * math.prod(equation.outvars[0].aval.shape)
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            out = params["dimension_numbers"].rhs_spec[0]
            inner = math.prod(kernel) // kernel[out]
            total += 2 * inner * math.prod(equation.outvars[0].aval.shape)
        elif name == "scan":
            total += params["length"] * count(params["jaxpr"])
        elif name == "while":
            total += open_loops * count(params["body_jaxpr"])
        elif name == "cond":
            total += max(map(count, params["branches"]))
        else:
            for value in params.values():
                if hasattr(getattr(value, "jaxpr", value), "eqns"):
                    total += count(value)
    return total
