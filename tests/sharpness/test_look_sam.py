"""LookSAM against a plain loop, and what it saves."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab.sharpness.gradient_norm_penalty import sam
from jaxlab.sharpness.look_sam import look_sam

loss_fn = lambda w: jnp.sum(jnp.sin(w)) + jnp.prod(w)
grad_fn = jax.grad(loss_fn)


def _walk(link, steps):
    w = jnp.array([0.4, -1.1, 0.8])
    state, seen = link.init(w), []
    for _ in range(steps):
        grads = grad_fn(w)
        updates, state = link.update(grads, state, w, grad_fn=grad_fn, grad=grads)
        w = w - 0.1 * updates
        seen.append(np.asarray(w))
    return np.stack(seen), state


def test_every_step_is_sam(x64):
    np.testing.assert_allclose(
        _walk(look_sam(0.2, every=1), 4)[0], _walk(sam(0.2), 4)[0], rtol=1e-12
    )


def test_equals_a_plain_loop(x64):
    w, seen, kept = np.array([0.4, -1.1, 0.8]), [], None
    for step in range(7):
        g = np.asarray(grad_fn(jnp.asarray(w)))
        length = np.linalg.norm(g)
        if step % 3 == 0:
            new = np.asarray(grad_fn(jnp.asarray(w + 0.2 * g / length)))
            kept = new - (new @ g) * g / length**2
            assert abs(kept @ g) < 1e-12
        else:
            new = g + 0.7 * length / np.linalg.norm(kept) * kept
        w = w - 0.1 * new
        seen.append(w)
    got, _ = _walk(look_sam(0.2, every=3, strength=0.7), 7)
    np.testing.assert_allclose(got, np.stack(seen), rtol=0, atol=1e-12)


def test_a_zero_gradient_stays_zero():
    link, w = look_sam(0.1, every=2), jnp.zeros(2)
    flat = jax.grad(lambda v: jnp.sum(v**2))
    state = link.init(w)
    for _ in range(3):  # both branches
        grads = flat(w)
        updates, state = link.update(grads, state, w, grad_fn=flat, grad=grads)
        chex.assert_trees_all_equal(updates, w)


def test_the_second_gradient_stands_in_one_branch_only():
    link = optax.chain(look_sam(0.1, every=5), optax.sgd(0.1))
    w = jnp.ones(3)
    calls = []

    def counted(at):
        jax.debug.callback(lambda: calls.append(1))
        return grad_fn(at)

    @jax.jit
    def step(w, state):
        grads = grad_fn(w)
        return link.update(grads, state, w, grad_fn=counted, grad=grads)[1]

    state = link.init(w)
    for _ in range(11):
        state = step(w, state)
    jax.effects_barrier()
    assert len(calls) == 3  # steps 0, 5 and 10
    assert step._cache_size() == 1
