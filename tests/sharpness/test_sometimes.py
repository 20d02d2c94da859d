"""Links that act on some steps: which ones, at what cost, with which state."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab.sharpness.gradient_norm_penalty import gradient_norm_penalty, sam
from jaxlab.sharpness.sometimes import hybrid, periodic

W = jnp.array([0.4, -1.1, 0.8])
grad_fn = jax.grad(lambda w: jnp.sum(jnp.sin(w)) + jnp.prod(w))


def _updates(tx, steps, keys=None):
    @jax.jit
    def step(state, key):
        grads = grad_fn(W)
        return tx.update(grads, state, W, grad_fn=grad_fn, grad=grads, key=key)

    state, seen = tx.init(W), []
    for index in range(steps):
        key = jax.random.fold_in(jax.random.key(7), index)
        updates, state = step(state, key)
        seen.append(np.asarray(updates))
    assert step._cache_size() == 1
    return np.stack(seen), state


def test_periodic_acts_on_every_kth_step():
    plain = np.asarray(grad_fn(W))
    once, _ = _updates(sam(0.3), 1)
    got, state = _updates(periodic(sam(0.3), 3), 7)
    for index, row in enumerate(got):
        want = once[0] if index % 3 == 0 else plain
        np.testing.assert_allclose(row, want, rtol=1e-6)
    assert int(state.count) == 7
    assert int(state.inner.count) == 3


def test_schedules_inside_count_the_steps_that_acted():
    radius = optax.linear_schedule(0.0, 0.3, 2)
    inside, _ = _updates(sam(radius), 3)
    got, _ = _updates(periodic(sam(radius), 2), 6)
    np.testing.assert_allclose(got[::2], inside, rtol=1e-6)


def test_hybrid_acts_with_its_probability():
    plain = np.asarray(grad_fn(W))
    got, state = _updates(hybrid(sam(0.3), 0.3), 400)
    acted = np.abs(got - plain).max(axis=1) > 1e-4
    # Three standard deviations of a binomial count.
    assert abs(acted.mean() - 0.3) < 3 * np.sqrt(0.3 * 0.7 / 400)
    assert int(state.inner.count) == acted.sum()
    for probability, share in ((0.0, 0.0), (1.0, 1.0)):
        rows, _ = _updates(hybrid(sam(0.3), probability), 3)
        assert (np.abs(rows - plain).max(axis=1) > 1e-4).mean() == share


def test_zero_probability_then_a_schedule():
    chance = lambda count: jnp.where(count < 2, 0.0, 1.0)
    got, state = _updates(hybrid(sam(0.3), chance), 4)
    assert int(state.inner.count) == 2
    np.testing.assert_allclose(got[0], grad_fn(W), rtol=1e-6)


def test_amortised_operations_of_the_two_branches():
    size = 128
    x = jax.random.normal(jax.random.key(0), (256, size))
    w = [jax.random.normal(jax.random.key(i), (size, size)) / 12 for i in range(3)]

    def loss_fn(at, x):
        for layer in at:
            x = jnp.tanh(x @ layer)
        return jnp.mean(x**2)

    def flops(link):
        def step(at, x):
            grad_fn = jax.grad(lambda p: loss_fn(p, x))
            grads = grad_fn(at)
            if link is None:
                return grads
            state = link.init(at)
            return link.update(grads, state, at, grad_fn=grad_fn, grad=grads)[0]

        return jax.jit(step).lower(w, x).compile().cost_analysis()["flops"]

    plain, full = flops(None), flops(gradient_norm_penalty(0.8, 0.1))
    for every in (2, 5):
        amortised = (full + (every - 1) * plain) / every
        assert amortised / plain <= 1 + 1.02 / every


def test_works_in_a_chain_under_scan():
    tx = optax.chain(periodic(sam(0.3), 2), optax.adam(0.1))

    def body(carry, _):
        w, state = carry
        grads = grad_fn(w)
        updates, state = tx.update(grads, state, w, grad_fn=grad_fn, grad=grads)
        return (optax.apply_updates(w, updates), state), None

    (scanned, _), _ = jax.lax.scan(body, (W, tx.init(W)), None, length=4)
    w, state = W, tx.init(W)
    for _ in range(4):
        (w, state), _ = body((w, state), None)
    chex.assert_trees_all_close(scanned, w, rtol=1e-5)
