"""The group step: its gradients by brute force, its fixed point, its convergence."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from jaxlab.optimizers import fishleg_group_step, q_apply, q_dense, q_init

EIGHT = np.random.default_rng(0)


def spd(n, seed=0, least=0.1):
    root = np.random.default_rng(seed).normal(size=(n, n))
    return jnp.asarray(root @ root.T / n + least * np.eye(n))


def operator_of(matrix, like):
    _, unravel = ravel_pytree(like)
    return lambda v: unravel(matrix @ ravel_pytree(v)[0])


def spread(q, seed=0, size=0.3):
    noise = optax.tree.random_like(jax.random.key(seed), q, jax.random.normal)
    return jax.tree.map(lambda f, n: f + size * n, q, noise)


def test_moves_are_along_the_derivative_of_the_auxiliary_loss(x64):
    """The derivative of (1) along C -> (I + E) C, by automatic differentiation."""
    like = {"kernel": jnp.zeros((4, 3))}
    matrix, gradient = spd(12), jnp.asarray(EIGHT.normal(size=12))
    q = spread(q_init(like, scale=1.0))
    left, right, _ = q.factors["kernel"]
    c = jnp.kron(left[0], right[0])
    u = gradient * jnp.sqrt(12) / jnp.linalg.norm(c @ gradient)

    def loss(e_left, e_right):
        e = jnp.kron(e_left, jnp.eye(3)) + jnp.kron(jnp.eye(4), e_right)
        moved = (jnp.eye(12) + e) @ c
        z = moved.T @ moved @ u
        return 0.5 * z @ (matrix + 0.2 * jnp.eye(12)) @ z - u @ z

    slopes = jax.grad(loss, (0, 1))(jnp.zeros((4, 4)), jnp.zeros((3, 3)))
    new, error = fishleg_group_step(
        None,
        q,
        [{"kernel": gradient.reshape(4, 3)}],
        operator_of(matrix, like),
        damping=0.2,
        step=0.1,
        white_directions=0,
    )
    # The new factors are (I - 0.1 D) times the old ones up to a scalar each, which
    # cancels in the product.
    moved = new.factors["kernel"]
    products = jnp.kron(moved.left[0], moved.right[0]) @ jnp.linalg.inv(c)
    found = products.reshape(4, 3, 4, 3)
    parts = jnp.einsum("acbc->ab", found) / 3, jnp.einsum("abac->bc", found) / 4
    for part, slope in zip(parts, slopes, strict=True):
        # Of the other side's move this sees a multiple of the identity.
        free = lambda m: m - jnp.trace(m) / len(m) * jnp.eye(len(m))
        move = free(part / (jnp.trace(part) / len(part)))
        cosine = jnp.vdot(move, free(slope))
        cosine /= jnp.linalg.norm(move) * jnp.linalg.norm(free(slope))
        np.testing.assert_allclose(cosine, -1, atol=1e-10)
    rho = c @ (matrix + 0.2 * jnp.eye(12)) @ c.T @ (c @ u) - c @ u
    np.testing.assert_allclose(error, jnp.sum(rho**2) / 12, rtol=1e-6)


def test_at_the_inverse_nothing_moves(x64):
    like = {"kernel": jnp.zeros((4, 3))}
    q = spread(q_init(like, scale=1.0))
    matrix = jnp.linalg.inv(q_dense(q, like)) - 0.1 * jnp.eye(12)
    new, error = fishleg_group_step(
        jax.random.key(0),
        q,
        [{"kernel": jnp.asarray(EIGHT.normal(size=(4, 3)))}],
        operator_of(matrix, like),
        damping=0.1,
    )
    np.testing.assert_allclose(q_dense(new, like), q_dense(q, like), atol=1e-9)
    assert error < 1e-12


@pytest.mark.parametrize("white", [True, False])
def test_a_full_block_reaches_the_inverse(x64, white):
    n = 10
    basis = np.linalg.qr(np.random.default_rng(1).normal(size=(n, n)))[0]
    matrix = jnp.asarray(basis @ np.diag(1 / np.arange(1.0, n + 1) ** 2) @ basis.T)
    damped = matrix + 1e-3 * jnp.eye(n)
    root = jnp.linalg.cholesky(damped)
    like = jnp.zeros(n)
    q = q_init(like, scale=10.0, rule={"": "full"})
    assert q.blocks[0].kind == "full"

    def body(q, key):
        # u ~ N(0, F) where the direction is not white.
        gradients = [] if white else [root @ jax.random.normal(key, (n,))]
        new, error = fishleg_group_step(
            key,
            q,
            gradients,
            lambda v: matrix @ v,
            damping=1e-3,
            step=0.3,
            white_directions=int(white),
            like=like,
        )
        return new, error

    q, errors = jax.jit(
        lambda q: jax.lax.scan(body, q, jax.random.split(jax.random.key(0), 600))
    )(q)
    gap = jnp.linalg.norm(q_dense(q, like) @ damped - jnp.eye(n)) / jnp.sqrt(n)
    assert gap < 1e-6
    assert errors[-1] < 1e-12 < errors[0]


def test_a_diagonal_block_reaches_the_inverse_of_a_diagonal():
    like = {"gain": jnp.zeros(6)}
    curve = jnp.array([0.0, 0.1, 0.3, 1.0, 3.0, 10.0])
    q = q_init(like, scale=5.0)

    def body(q, key):
        operator = lambda v: {"gain": curve * v["gain"]}
        return fishleg_group_step(key, q, [], operator, damping=0.2, like=like)

    q, _ = jax.lax.scan(body, q, jax.random.split(jax.random.key(0), 400))
    found = q_apply(q, {"gain": jnp.ones(6)})["gain"]
    np.testing.assert_allclose(found, 1 / (curve + 0.2), rtol=1e-3)


def test_stacks_and_cuts_move_as_blocks_of_their_own(x64):
    """Three 4 x 2 matrices at once, against three trees of one each."""
    like = {"kernel": jnp.zeros((3, 4, 2))}
    blocks = [spd(8, seed) for seed in range(3)]
    gradient = jnp.asarray(EIGHT.normal(size=(3, 4, 2)))

    def operator(v):
        rows = v["kernel"].reshape(3, 8)
        new = jnp.stack([m @ row for m, row in zip(blocks, rows, strict=True)])
        return {"kernel": new.reshape(3, 4, 2)}

    options = {"damping": 0.1, "white_directions": 0}
    stack, _ = fishleg_group_step(
        None, q_init(like), [{"kernel": gradient}], operator, **options
    )
    for index, matrix in enumerate(blocks):
        one = {"kernel": gradient[index]}
        new, _ = fishleg_group_step(
            None, q_init(one), [one], operator_of(matrix, one), **options
        )
        for ours, theirs in zip(
            stack.factors["kernel"][:2], new.factors["kernel"][:2], strict=True
        ):
            np.testing.assert_allclose(ours[index], theirs, rtol=1e-9)


def test_a_zero_gradient_moves_nothing():
    like = {"kernel": jnp.zeros((3, 2)), "gain": jnp.zeros(2)}
    q = q_init(like)
    new, error = fishleg_group_step(
        None, q, [like], lambda v: v, damping=0.1, white_directions=0
    )
    assert error == 0
    same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6)
    jax.tree.map(same, new.factors, q.factors)


def test_it_stays_positive_definite_under_a_hostile_operator(x64):
    """An operator that is neither symmetric nor positive nor twice the same."""
    like = {"kernel": jnp.zeros((4, 3)), "gain": jnp.zeros(3)}
    q = q_init(like)

    def body(q, key):
        noise = lambda v: jax.tree.map(
            lambda x: 1e3 * jax.random.normal(key, x.shape) + 10 * x, v
        )
        return fishleg_group_step(key, q, [], noise, damping=0.1, like=like)

    q, _ = jax.lax.scan(body, q, jax.random.split(jax.random.key(0), 50))
    assert np.linalg.eigvalsh(q_dense(q, like))[0] > 0


@pytest.mark.parametrize(
    ("gradients", "white", "combine", "products"),
    [(1, 1, True, 1), (1, 1, False, 2), (2, 1, True, 2), (1, 3, True, 3)],
)
def test_a_product_for_each_direction(gradients, white, combine, products):
    like, calls = {"kernel": jnp.ones((2, 3))}, []

    def operator(v):
        calls.append(1)
        return v

    fishleg_group_step(
        jax.random.key(0),
        q_init(like),
        [like] * gradients,
        operator,
        damping=0.1,
        white_directions=white,
        combine=combine,
    )
    assert len(calls) == products


def test_white_directions_are_signs_and_half_of_them_joins_the_gradient(x64):
    """With Q = I what is asked of F are the directions themselves, up to scale."""
    like, asked = {"kernel": jnp.zeros((7, 9)), "v": jnp.zeros(5)}, []

    def operator(v):
        asked.append(v)
        return v

    gradient = optax.tree.random_like(jax.random.key(1), like, jax.random.normal)
    q = q_init(like, scale=1.0)

    def step(number, **options):
        asked.clear()
        key = jax.random.key(number)
        fishleg_group_step(key, q, [gradient], operator, damping=0.1, **options)
        return asked

    joined = step(3)[0]
    apart = step(3, combine=False)
    scaled, signs = apart
    for leaf in jax.tree.leaves(scaled):
        np.testing.assert_allclose(jnp.mean(leaf**2), 1, rtol=1e-6)
    for leaf in jax.tree.leaves(signs):
        np.testing.assert_allclose(jnp.abs(leaf), 1, rtol=1e-6)
    chex.assert_trees_all_close(
        joined, jax.tree.map(lambda g, s: g + s / 2, scaled, signs), rtol=1e-6
    )
    other = step(4, combine=False)[1]
    agreement = jnp.mean(signs["kernel"] * other["kernel"])
    assert abs(agreement) < 0.4  # 63 signs: 3 deviations
    assert abs(jnp.mean(signs["kernel"])) < 0.4
