"""Blocks, changes of scale and shifts of operators, against dense matrices."""

import pathlib
import runpy

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxlab.curvature._recurrence import linearized
from jaxlab.curvature.dense import full_matrix
from jaxlab.curvature.gauss_newton import ggn_operator
from jaxlab.curvature.hessian import hessian_operator
from jaxlab.curvature.wrappers import (
    block_operator,
    damped_operator,
    preconditioned_operator,
)
from jaxlab.likelihoods import Categorical

P_ = runpy.run_path(str(pathlib.Path(__file__).parent / "operator_problem.py"))
GOLDEN, golden, flat, unflat = P_["GOLDEN"], P_["golden"], P_["flat"], P_["unflat"]
LOSSES, NAMES, small, loss_small = (
    P_["LOSSES"],
    P_["NAMES"],
    P_["small"],
    P_["loss_small"],
)
cut, close = P_["cut"], P_["close"]


@pytest.mark.parametrize("net", ["ce", "mse"])
def test_blocks_have_the_golden_eigenvalues(x64, net):
    params, batch = golden(net)
    whole = hessian_operator(LOSSES[net], params, batch)
    offsets = GOLDEN[f"{net}/block_offsets"]
    for i, name in enumerate(NAMES):
        matrix = full_matrix(block_operator(whole, name), params[name])
        part = slice(offsets[i], offsets[i + 1])
        want = GOLDEN[f"{net}/hessian"][part, part]
        np.testing.assert_allclose(matrix, want, atol=1e-12)
        values = GOLDEN[f"{net}/block{i}_eigvals"]
        np.testing.assert_allclose(np.linalg.eigvalsh(matrix), values, atol=1e-12)


def test_blocks_of_every_kind_of_operator(x64):
    params, batch, v = small()
    whole = hessian_operator(loss_small, params, batch)
    zeros = jnp.zeros_like(params["a"])
    want = whole({"a": zeros, "b": v["b"]})["b"]
    scale = {"a": jnp.full((3, 2), 4.0), "b": jnp.array([1.0, 9.0])}
    root = jnp.sqrt(scale["b"])
    stream = hessian_operator(loss_small, params, lambda: cut(batch, 6))
    for made, expected in (
        (whole, want),
        (hessian_operator(loss_small, params, batch, microbatch=6), want),
        (stream, want),
        (damped_operator(whole, 0.5), want + 0.5 * v["b"]),
        (damped_operator(stream, 0.5), want + 0.5 * v["b"]),
        (
            preconditioned_operator(whole, scale),
            whole({"a": zeros, "b": v["b"] / root})["b"] / root,
        ),
    ):
        block = block_operator(made, "b")
        np.testing.assert_allclose(block(v["b"]), expected, atol=1e-13)
        if not getattr(block, "host", False):
            ready = linearized(block)
            np.testing.assert_allclose(ready(v["b"]), expected, atol=1e-13)
    assert block_operator(stream, "b").host
    assert block_operator(damped_operator(stream, 0.5), "b").host
    unknown = jax.tree_util.Partial(lambda v: whole(v))
    block = block_operator(unknown, "b", like=params)
    np.testing.assert_allclose(block(v["b"]), want, atol=1e-13)


def test_paths_lead_through_every_kind_of_node():
    params = {
        "layers": [{"w": jnp.ones(2)}, {"w": jnp.full(3, 2.0)}],
        "z": {5: jnp.ones(1)},
    }
    loss = lambda p: sum(jnp.sum(x**3) for x in jax.tree.leaves(p))
    whole = hessian_operator(loss, {"net": params})
    leaf, _ = jax.tree_util.tree_leaves_with_path({"net": params})[1]
    for path in (("net", "layers", 1, "w"), leaf):
        block = block_operator(whole, path)
        np.testing.assert_allclose(block(jnp.ones(3)), [12, 12, 12])
    tree = block_operator(whole, ("net", "layers", 0))({"w": jnp.ones(2)})
    np.testing.assert_allclose(tree["w"], [6, 6])
    np.testing.assert_allclose(block_operator(whole, ("net", "z", 5))(jnp.ones(1)), [6])
    # A block of a block.
    again = block_operator(block_operator(whole, ("net", "layers")), (1, "w"))
    np.testing.assert_allclose(again(jnp.ones(3)), [12, 12, 12])
    wrapped = block_operator(damped_operator(whole, 1.0), ("net", "layers"))
    again = block_operator(wrapped, (1, "w"))
    np.testing.assert_allclose(again(jnp.ones(3)), [13, 13, 13])


def test_paths_lead_into_modules():
    module = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    graph, state = nnx.split(module, nnx.Param)
    loss = lambda p: jnp.sum(nnx.merge(graph, p)(jnp.ones((1, 2))) ** 2)
    block = block_operator(hessian_operator(loss, state), "bias")
    v = jax.tree.map(jnp.ones_like, state["bias"])
    np.testing.assert_allclose(jax.tree.leaves(block(v))[0], [2, 2])
    layer = eqx.nn.Linear(2, 2, key=jax.random.key(0))
    loss = lambda m: jnp.sum(m(jnp.ones(2)) ** 2)
    block = block_operator(hessian_operator(loss, layer), "bias")
    np.testing.assert_allclose(block(jnp.ones(2)), [2, 2])


@pytest.mark.parametrize("net", ["ce", "mse"])
def test_preconditioned_has_the_golden_eigenvalues(x64, net):
    params, batch = golden(net)
    whole = hessian_operator(LOSSES[net], params, batch)
    scale = unflat(net, GOLDEN[f"{net}/precond_diag"])
    operator = preconditioned_operator(whole, scale)
    values = np.linalg.eigvalsh(full_matrix(operator, params))
    want = GOLDEN[f"{net}/precond_hessian_eigvals"]
    np.testing.assert_allclose(values, want, rtol=1e-9, atol=1e-9)


def test_damping_shifts_the_golden_eigenvalues(x64):
    params, batch = golden("ce")
    ggn = ggn_operator(P_["mlp"], Categorical(), params, batch)
    matrix = full_matrix(damped_operator(ggn, GOLDEN["ce/damping"]), params)
    want = GOLDEN["ce/ggn_logdet_damped"]
    np.testing.assert_allclose(np.linalg.slogdet(matrix)[1], want, rtol=1e-9)


def test_forms_holes_and_linearised(x64):
    params, batch, v = small()
    scale = {"a": jnp.full((3, 2), 4.0), "b": jnp.array([1.0, 9.0])}
    holey = {"a": v["a"], "b": optax.MaskedNode()}
    inner = hessian_operator(loss_small, params, batch)
    plain = jax.tree_util.Partial(lambda v: inner(v))
    for of in (inner, plain):
        for operator in (
            preconditioned_operator(of, scale),
            damped_operator(of, jnp.array(0.5)),
            damped_operator(preconditioned_operator(of, scale), 0.5),
        ):
            image = operator(v)
            dots = jax.tree.map(jnp.vdot, image, v)
            form = operator.quadratic_form(v)
            np.testing.assert_allclose(form, sum(dots.values()), rtol=1e-12)
            close(operator.linearize()(v), image, 1e-12)
            zeroed = operator({"a": v["a"], "b": jnp.zeros(2)})
            masked = operator(holey)
            assert jax.tree.structure(masked) == jax.tree.structure(holey)
            np.testing.assert_allclose(masked["a"], zeroed["a"], atol=1e-13)


def test_wrappers_keep_dtypes_and_do_not_compile_again():
    params, batch, v = small(dtype=jnp.float32)
    half = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
    apply = jax.jit(lambda operator, v: operator(v))
    for damping in (0.5, 1.5):
        inner = hessian_operator(loss_small, half(params), half(batch))
        scale = jax.tree.map(lambda x, d=damping: jnp.full_like(x, d), params)
        operator = damped_operator(preconditioned_operator(inner, scale), damping)
        image = apply(operator, half(v))
        assert {x.dtype for x in image.values()} == {jnp.dtype(jnp.bfloat16)}
    assert apply._cache_size() == 1
