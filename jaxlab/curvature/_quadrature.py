"""Gauss rules of random vectors: what densities and spectral sums are made of."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key, PyTree

from jaxlab._checks import check_count
from jaxlab.curvature._convolutions import driven
from jaxlab.curvature._options import (
    Driver,
    as_pytree,
    check_asymmetry,
    check_memory,
    check_order,
    exact_products,
    under_trace,
)
from jaxlab.curvature._recurrence import (
    Forward,
    Reorthogonalize,
    State,
    linearized,
    run_compiled,
    run_host,
)
from jaxlab.curvature._ritz import gauss_rule
from jaxlab.curvature._vectors import (
    Operator,
    Space,
    is_host,
    laid_out,
    on_vectors,
    prepared,
    random_vector,
    space_of,
)

Nodes = Float[Array, "num_probes order"]


class Rules(NamedTuple):
    """One Gauss rule a probe, and what the probes were."""

    nodes: Nodes
    weights: Nodes
    residuals: Nodes
    dimension: int  # also the squared norm of every probe: they are Rademacher


def gauss_rules(
    name: str,
    key: Key[Array, ""],
    operator: Operator,
    like: PyTree,
    *,
    order: int,
    num_probes: int,
    reorthogonalize: Reorthogonalize,
    memory_limit: float | None,
    probes_at_once: int,
    check_symmetric: bool,
    driver: Driver,
) -> Rules:
    """Runs Lanczos from Rademacher probes; :func:`spectral_density` says the rest."""
    space = space_of(name, like)
    step = check_order(name, order, reorthogonalize, space, clip=True)
    check_count(name, num_probes=num_probes, probes_at_once=probes_at_once)
    probes_at_once = min(probes_at_once, num_probes)
    check_memory(name, step, space, memory_limit, copies=probes_at_once)
    operator = as_pytree(operator)
    traced = under_trace(key, operator, like)
    operator, chosen = driven(name, operator, space, driver, traced=traced)
    space = laid_out(space, like)
    with jax.named_scope(name), exact_products():
        keys = jax.random.split(key, num_probes)
        if chosen == "compiled":
            sizes = {"step": step, "space": space, "at_once": probes_at_once}
            rules, asymmetry, scale = _compiled(name, keys, operator, **sizes)
        else:
            operator = operator if is_host(operator) else linearized(operator)
            found = []
            for probe in (_probe(k, space=space) for k in keys):
                state = run_host(name, operator, probe, step=step, space=space)
                found.append(_rule(state))
            stack = lambda *leaves: jnp.stack(leaves)
            rules, asymmetry, scale = jax.tree.map(stack, *found)
    if check_symmetric and not traced:
        check_asymmetry(name, asymmetry, scale, space)
    return Rules(*rules, space.size)


def mean_and_error(
    values: Float[Array, "num_probes *shape"],
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """Gives the mean over the probes and its standard error, NaN for a single one."""
    count = len(values)
    mean = jnp.mean(values, axis=0)
    if count == 1:
        return mean, jnp.full_like(mean, jnp.nan)
    return mean, jnp.std(values, axis=0, ddof=1) / count**0.5


def _rule_of(state: State):
    rule = gauss_rule(state.alpha, state.beta, state.num_steps)
    return rule, state.asymmetry, state.scale


_rule = jax.jit(_rule_of)
_probe = jax.jit(
    lambda key, *, space: random_vector(key, space, "rademacher"),
    static_argnames="space",
)


@functools.partial(jax.jit, static_argnames=("name", "step", "space", "at_once"))
def _compiled(
    name: str,
    keys: Key[Array, " num_probes"],
    operator: Operator,
    *,
    step: Forward,
    space: Space,
    at_once: int,
):
    product = on_vectors(name, prepared(operator), space)

    def one(key):
        return _rule_of(
            run_compiled(product, random_vector(key, space, "rademacher"), step)
        )

    return lax.map(one, keys, batch_size=at_once if at_once > 1 else None)
