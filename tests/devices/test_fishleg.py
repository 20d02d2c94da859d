"""FishLeg's step compiles for a TPU and a GPU that are not here, at its cost.

Operations of an auxiliary step in gradients, the precision of Fisher products, and on
four TPU chips that share a batch what they send each other.
"""

import itertools
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import devices
from jaxlab.curvature import ggn_operator
from jaxlab.likelihoods import Bernoulli
from jaxlab.optimizers import fishleg, fishleg_group_step, q_init

CHIPS, BATCH, SIZES = 4, 128, (256, 192, 64, 192, 256)
LIKELIHOOD = Bernoulli()


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


PARAMS = [
    {"kernel": array(a, b), "bias": array(b)} for a, b in itertools.pairwise(SIZES)
]
ROWS = array(BATCH, SIZES[0])
KEY = jax.eval_shape(lambda: jax.random.key(0))
BYTES = sum(leaf.size * 4 for leaf in jax.tree.leaves(PARAMS))


def apply_fn(params, x):
    for layer in params:
        y = x @ layer["kernel"]
        x = jax.nn.relu(y + jnp.broadcast_to(layer["bias"], y.shape))
    return y


def loss_fn(params, x):
    return LIKELIHOOD.nll(apply_fn(params, x), x)


def gradient(params, x):
    return jax.grad(loss_fn)(params, x)


def auxiliary(key, q, grads, params, x):
    operator = ggn_operator(apply_fn, LIKELIHOOD, params, (x, None))
    return fishleg_group_step(key, q, [grads], operator, damping=0.3)


OPTIMIZER = fishleg()


def step(params, state, key, x):
    operator = ggn_operator(apply_fn, LIKELIHOOD, params, (x, None))
    updates, state = OPTIMIZER.update(
        gradient(params, x), state, params, fisher_vp=operator, key=key
    )
    return optax.apply_updates(params, updates), state


@pytest.mark.parametrize("place", ["tpu", "gpu"])
def test_an_auxiliary_step_takes_few_gradients(place, request):
    target = request.getfixturevalue(place)
    q = jax.eval_shape(q_init, PARAMS)
    ours = devices.figures(target, auxiliary, KEY, q, PARAMS, PARAMS, ROWS)
    one = devices.figures(target, gradient, PARAMS, ROWS)
    # A product with the Fisher 1.6; five products with factors, of a side in the size
    # of the batch and more each.
    assert 2 < ours["flops"] / one["flops"] <= 9


def test_products_with_the_fisher_are_in_full_precision(tpu):
    state = jax.eval_shape(OPTIMIZER.init, PARAMS)
    text = tpu.compile(step, PARAMS, state, KEY, ROWS).as_text()
    products = [
        line
        for line in text.splitlines()
        if re.search(r" (convolution|dot)\(", line) and "ggn_operator" in line
    ]
    assert len(products) >= 3 * len(PARAMS)
    for line in products:
        assert "operand_precision={highest,highest}" in line, line


def test_chips_that_share_a_batch_send_a_gradient_and_a_product(tpu):
    mesh = tpu.mesh()
    assert mesh.size == CHIPS
    whole, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("d"))
    state = jax.eval_shape(OPTIMIZER.init, PARAMS)
    jitted = jax.jit(
        step, in_shardings=(whole, whole, whole, rows), out_shardings=whole
    )
    lowered = jitted.trace(PARAMS, state, KEY, ROWS).lower(lowering_platforms=("tpu",))
    sent = devices.collectives(devices.compiled(lowered).as_text())
    # The gradient, the product inside the loop, and numbers: no factor is sent.
    assert {kind for kind, _ in sent} == {"all-reduce"}
    assert 0.99 <= sum(size for _, size in sent) / (2 * BYTES) <= 1.01
