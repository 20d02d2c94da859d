"""What the theory of FishLeg says: duality, Fisher, invariance, rate of convergence."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from jaxlab.curvature import ggn_operator
from jaxlab.likelihoods import Gaussian
from jaxlab.objective import Objective, plain
from jaxlab.optimizers import (
    InverseFisher,
    LevenbergMarquardt,
    fishleg,
    fishleg_auxiliary_gradient,
    fishleg_auxiliary_loss,
    fishleg_group_step,
    fishleg_warm_start,
    inverse_fisher,
    q_apply,
    q_dense,
    q_init,
    scale_by_fishleg,
)
from jaxlab.sharpness import gnp_value_and_grad, gradient_norm_penalty

# These programs run for moments: to compile them well takes longer.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def problem():
    """Draws Q, u, the operator of a Fisher matrix and that matrix, damped by 0.2."""
    draw = np.random.default_rng(0)
    like = {"kernel": np.zeros((3, 2)), "gain": np.zeros(2)}
    flat, unravel = ravel_pytree(like)
    q = q_init(like, scale=1.0)
    q = jax.tree.map(lambda f: f + 0.3 * draw.normal(size=f.shape), q)
    root = draw.normal(size=(len(flat), len(flat)))
    matrix = root @ root.T / len(flat)
    u = unravel(draw.normal(size=len(flat)))
    operator = lambda v: unravel(matrix @ ravel_pytree(v)[0])
    return q, u, operator, matrix + 0.2 * np.eye(len(flat))


# The auxiliary loss.


def test_the_auxiliary_loss_is_least_at_the_inverse(x64):
    """By its value there, and by random positive definite Q around it."""
    u, damped = np.array([1.0, -2.0, 0.5]), np.diag([0.3, 1.0, 4.0])
    operator = lambda v: damped @ v - 0.1 * v
    q = q_init(u, rule={"": "full"})

    def loss(root, normalize):
        factors = {"": q.factors[""]._replace(left=root[None])}
        here = InverseFisher(factors, q.blocks)
        return fishleg_auxiliary_loss(
            here, u, operator, damping=0.1, normalize=normalize
        )

    exact = jnp.asarray(np.diag(np.diag(damped) ** -0.5))
    noise = np.random.default_rng(0).normal(size=(20, 3, 3)) / 2
    around = jax.vmap(lambda n: loss(exact + n, False))
    run = jit(lambda: (loss(exact, False), loss(exact, True), around(noise)))
    raw, there, around = run()
    least = -0.5 * u @ np.linalg.solve(damped, u)
    np.testing.assert_allclose(raw, least, rtol=1e-12)
    np.testing.assert_allclose(there, least / (u @ u), rtol=1e-12)
    assert (around > least).all()


def test_its_gradient_is_that_of_automatic_differentiation(x64):
    """Through the matrix, not by (2): the residual is a constant only there."""
    q, u, operator, damped = problem()

    def loss(q, normalize):
        flat = ravel_pytree(u)[0]
        flat = flat / jnp.linalg.norm(flat) if normalize else flat
        z = q_dense(q, u) @ flat
        return 0.5 * z @ damped @ z - flat @ z

    ours = lambda q, normalize: fishleg_auxiliary_gradient(
        q, u, operator, damping=0.2, normalize=normalize
    )
    both = lambda q, n: (ours(q, n), jax.value_and_grad(loss)(q, n))
    run = jit(lambda q: ([both(q, n) for n in ("gradient", None)], ours(q, "product")))
    pairs, (value, _) = run(q)
    for found, expected in pairs:
        chex.assert_trees_all_close(found, expected, rtol=1e-9, atol=1e-12)
    # However the gradient is scaled, the loss is that of u / ||u||.
    np.testing.assert_allclose(value, pairs[0][0][0], rtol=1e-9)


@pytest.mark.parametrize("drawn", ["white", "fisher"])
@pytest.mark.parametrize("precondition", [False, True])
def test_adam_reaches_the_inverse_of_the_toy(x64, precondition, drawn):
    """From u ~ N(0, I), and from gradients: u ~ N(0, F)."""
    n = 20 if drawn == "white" else 10
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(n, n)))[0]
    matrix = basis @ np.diag(1 / np.arange(1.0, n + 1)) @ basis.T
    damped = matrix + 0.01 * np.eye(n)
    root = np.eye(n) if drawn == "white" else np.linalg.cholesky(damped)
    like = np.zeros(n)
    adam = optax.adam(optax.cosine_decay_schedule(1e-2, 4_000))

    def body(carry, key):
        q, state = carry
        _, slope = fishleg_auxiliary_gradient(
            q,
            root @ jax.random.normal(key, (n,)),
            lambda v: matrix @ v,
            damping=0.01,
            precondition=precondition,
        )
        moves, state = adam.update(slope, state)
        return (optax.apply_updates(q, moves), state), None

    @jit
    def fitted():
        q = q_init(like, scale=1.0, rule={"": "full"})
        keys = jax.random.split(jax.random.key(0), 4_000)
        (q, _), _ = jax.lax.scan(body, (q, adam.init(q)), keys)
        return q_dense(q, like)

    gap = np.asarray(fitted()) @ damped - np.eye(n)
    assert np.linalg.norm(gap) / n**0.5 < 1e-4


def test_the_group_step_shares_the_scale_between_the_factors(x64):
    """Equal root mean square rows, so that a scale that cancels cannot drift."""
    q, u, operator, _ = problem()
    step = functools.partial(
        fishleg_group_step, None, fisher_vp=operator, damping=0.2, white_directions=0
    )
    factors = q.factors["kernel"]
    uneven = factors._replace(left=8 * factors.left, right=factors.right / 8)
    other = InverseFisher(q.factors | {"kernel": uneven}, q.blocks)
    found, expected = jit(lambda: [step(q, [u])[0] for q in (other, q)])()
    chex.assert_trees_all_close(found, expected, rtol=1e-9)
    size = lambda f: np.sum(np.square(f)) / f.shape[-1]
    left, right, _ = found.factors["kernel"]
    np.testing.assert_allclose(size(left), size(right), rtol=1e-9)


def test_directions_are_of_one_size_and_independent(x64):
    """Every matrix of a stack; where Q is the identity the operator sees eps itself."""
    draw = np.random.default_rng(0).normal(size=(2, 40, 30))
    gradient = draw * np.array([40.0, 1e-3])[:, None, None]

    @jit
    def run():
        seen = []
        operator = lambda v: seen.append(v.reshape(2, -1)) or v
        q, like = q_init(gradient, scale=1.0), {"damping": 0.1, "like": gradient}
        for given, white in (([gradient], 0), ([], 2)):
            options = like | {"white_directions": white}
            fishleg_group_step(jax.random.key(0), q, given, operator, **options)
        return jnp.stack(seen, 1)

    seen = run()
    moments = seen @ np.swapaxes(seen, -1, -2) / seen.shape[-1]
    np.testing.assert_allclose(moments, np.stack([np.eye(3)] * 2), atol=0.1)


@pytest.mark.parametrize("pair", [("diagonal", "full"), ("embedding", "kronecker")])
def test_a_diagonal_moves_as_the_matrix_that_it_is_the_diagonal_of(x64, pair):
    """Directions along the axes keep the matrix diagonal."""
    axes = jnp.eye(2)[:, :, None]
    gradients = [axes[0], axes[0], axes[1]]
    options = {"damping": 0.2, "white_directions": 0}
    operator = lambda v: jnp.array([[0.9], [1.3]]) * v  # near 1: no clip

    def moved(kind):
        q = q_init(axes[0], scale=1.0, rule={"": kind})
        q, _ = fishleg_group_step(None, q, gradients, operator, **options)
        return q_dense(q, axes[0])

    found, expected = jit(lambda: [moved(kind) for kind in pair])()
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert (abs(np.diag(found) - 1) > 0.05).all()


def test_a_frozen_inverse_falls_behind_the_one_that_learns():
    """The auxiliary loss, as the parameters move away from where Q was frozen."""
    params, batch = chain_of(0, depth=5, width=6, near=0.6)
    optimizer = fishleg(0.1, update_aux_every=1, white_directions=0)
    step = chain_step(optimizer, Gaussian(0.3), batch)
    loss = functools.partial(fishleg_auxiliary_loss, damping=0.3)

    def body(carry, number):
        params, state, kept = carry
        updates, state, _, (grads, operator) = step(params, state, number)
        q = state[0].q
        kept = jax.tree.map(lambda k, new: jnp.where(number <= 5, new, k), kept, q)
        losses = loss(kept, grads, operator), loss(q, grads, operator)
        return (optax.apply_updates(params, updates), state, kept), losses

    @jit
    def run():
        state = optimizer.init(params)
        return jax.lax.scan(body, (params, state, state[0].q), jnp.arange(60))[1]

    found = run()
    frozen, online = (np.asarray(losses)[[6, 10, 20, 40, 59]] for losses in found)
    assert max(online) < 0.01 < frozen[-1]
    assert frozen[-1] - online[-1] > 10 * (frozen[0] - online[0]) > 0
    assert (np.diff(frozen) > 0).all()


# The Fisher.


def around(ws, i):
    """Gives what stands before and behind the matrix i: B_i, A_i."""
    eye = np.eye(ws[0].shape[0])
    product = functools.partial(functools.reduce, lambda a, b: a @ b)
    return product([eye, *ws[:i]]), product([*ws[i + 1 :], eye])


def through(ws, x):
    return functools.reduce(jnp.matmul, [x, *ws])


def chain_of(seed, *, depth, width, rows=40, near=0.3):
    """Draws a deep linear net around the identity, inputs, and a teacher's targets."""
    draw = np.random.default_rng(seed).normal
    matrices = lambda: (
        np.eye(width) + near / width**0.5 * draw(size=(depth, width, width))
    )
    ws, teacher = matrices(), np.linalg.multi_dot(matrices())
    x = draw(size=(rows, width))
    y = x @ teacher + 0.1 * draw(size=(rows, width))
    return jax.tree.map(jnp.asarray, (ws, (x, y)))


def test_deep_linear_fisher(x64):
    """(F v)_i = sum_j B_i^T S_x B_j v_j A_j A_i^T / sigma^2."""
    ws, (x, y) = chain_of(0, depth=5, width=4)
    v = np.random.default_rng(9).normal(size=(5, 4, 4))
    found = jit(lambda: ggn_operator(through, Gaussian(0.3), ws, (x, y))(v))()
    second = np.asarray(x.T @ x) / len(x)
    pairs = [around(np.asarray(ws), i) for i in range(5)]
    for image, (b_i, a_i) in zip(found, pairs, strict=True):
        terms = [
            b_i.T @ second @ b_j @ v_j @ a_j @ a_i.T
            for v_j, (b_j, a_j) in zip(v, pairs, strict=True)
        ]
        np.testing.assert_allclose(image, sum(terms) / 0.3**2, rtol=1e-9, atol=1e-10)


# Invariance.


def tanh_net(theta, x):
    return jnp.tanh(x @ theta[:6].reshape(3, 2)) @ theta[6:].reshape(2, 1)


def net_step(change, phi, batch):
    """Takes a natural-gradient step in phi, where theta = change phi; Q is fitted."""
    apply_fn = lambda phi, x: tanh_net(change @ phi, x)
    operator = ggn_operator(apply_fn, Gaussian(), phi, batch)
    loss = lambda phi: Gaussian().nll(apply_fn(phi, batch[0]), batch[1])
    step = lambda q, key: fishleg_group_step(
        key, q, [], operator, damping=0.0, like=phi
    )
    keys = jax.random.split(jax.random.key(0), 3_000)
    q, _ = jax.lax.scan(step, q_init(phi, rule={"": "full"}), keys)
    return change @ (phi - q_apply(q, jax.grad(loss)(phi)))


def test_steps_do_not_depend_on_linear_coordinates(x64):
    draw = np.random.default_rng(3)
    theta, x = draw.normal(size=8), draw.normal(size=(30, 3))
    batch = x, np.sin(x[:, :1])
    change = np.eye(8) + 0.2 * draw.normal(size=(8, 8))
    phi = jnp.asarray(np.linalg.solve(change, theta))
    here, there = jit(
        lambda: (
            net_step(jnp.eye(8), jnp.asarray(theta), batch),
            net_step(jnp.asarray(change), phi, batch),
        )
    )()
    np.testing.assert_allclose(there, here, rtol=1e-6, atol=1e-8)
    assert np.linalg.norm(here - theta) > 0.1


# Convergence. With l of curvature beta at most, 1/2 |grad l|^2 >= mu (l - l*) and
# m <= Q <= M, a step m / (beta M^2) along Q g leaves
#     l - l* <= (1 - mu m^2 / (beta M^2)) of what there was,
# and so does the quadratic step with damping gamma in a quadratic model that is exact,
# with beta + gamma in place of beta.


def chain_step(optimizer, likelihood, batch):
    """Makes a step of a deep linear net; gives the loss before, gradient, Fisher."""

    def step(params, state, number):
        loss = lambda ws: likelihood.nll(through(ws, batch[0]), batch[1])
        value, grads = jax.value_and_grad(loss)(params)
        operator = ggn_operator(through, likelihood, params, batch)
        key = jax.random.fold_in(jax.random.key(0), number)
        updates, state = optimizer.update(
            grads, state, params, fisher_vp=operator, key=key
        )
        return updates, state, value, (grads, operator)

    return step


def sizes_of(q, like):
    values = jnp.linalg.eigvalsh(q_dense(q, like))
    return values[0], values[-1]


def least_nll(x, y, scale=1.0):
    """Gives the Gaussian loss of least squares, computed anew."""
    squares = np.sum((y - x @ np.linalg.lstsq(x, y)[0]) ** 2) / len(x)
    return squares / (2 * scale**2) + y.shape[1] * np.log(2 * np.pi * scale**2) / 2


@pytest.mark.parametrize("mode", ["group", "adam", "quadratic"])
def test_the_bound_holds_on_least_squares(x64, mode):
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(40, 4)), draw.normal(size=(40, 3))
    curve = np.linalg.eigvalsh(x.T @ x / 40)
    mu, beta = curve[0], curve[-1]
    best = least_nll(x, y)
    options = {"damping": 0.1, "init_scale": 1.0, "white_directions": 0}
    if mode != "quadratic":
        options |= {"step": "fixed", "aux_mode": mode}
    optimizer = scale_by_fishleg(**options)
    step = chain_step(optimizer, Gaussian(), (x, y))

    def body(carry, number):
        ws, state = carry
        direction, state, value, _ = step(ws, state, number)
        least, most = sizes_of(state.q, ws)
        size = 1.0 if mode == "quadratic" else least / (beta * most**2)
        total = beta + (0.1 if mode == "quadratic" else 0.0)
        shrink = 1 - mu * least**2 / (total * most**2)
        return (ws - size * direction, state), (value - best, shrink)

    @jit
    def run():
        start = jnp.zeros((1, 4, 3))
        return jax.lax.scan(body, (start, optimizer.init(start)), jnp.arange(40))[1]

    gaps, shrinks = jax.tree.map(np.asarray, run())
    assert ((shrinks > 0) & (shrinks < 1)).all()
    assert (gaps[1:] <= shrinks[:-1] * gaps[:-1] + 1e-13).all()
    assert gaps[-1] < 0.3 * gaps[0]


def test_the_bound_holds_on_a_deep_linear_net(x64):
    """With the constant of Polyak and Lojasiewicz that the weights have just now.

    It is lambda_min(S_x) / sigma^2 sum_i s_min(B_i)^2 s_min(A_i)^2, since the gradient
    is B_i^T G A_i^T with G that of the product.
    """
    start, (x, y) = chain_of(1, depth=5, width=3, near=0.2)
    second = np.linalg.eigvalsh(x.T @ x / len(x))[0]
    least_of = lambda ws: jnp.linalg.svd(jnp.stack(ws), compute_uv=False)[:, -1] ** 2
    likelihood = Gaussian(0.5)
    loss = lambda flat: likelihood.nll(through(flat.reshape(start.shape), x), y)
    bend = lambda ws: jnp.abs(jnp.linalg.eigvalsh(jax.hessian(loss)(ws.ravel()))).max()
    best = least_nll(np.asarray(x), np.asarray(y), 0.5)
    optimizer = scale_by_fishleg(
        step="fixed", damping=10.0, init_scale=0.1, white_directions=0
    )
    step = chain_step(optimizer, likelihood, (x, y))

    def body(carry, number):
        ws, state, beta = carry
        direction, state, value, (grads, _) = step(ws, state, number)
        least, most = sizes_of(state.q, ws)
        new = ws - least / (beta * most**2) * direction
        before, behind = zip(*(around(ws, i) for i in range(5)), strict=True)
        mu = second / 0.5**2 * jnp.sum(least_of(before) * least_of(behind))
        shrink = 1 - mu * least**2 / (beta * most**2)
        # The curvature that the step assumed has to hold on its way.
        ahead = bend(new)
        found = value - best, jnp.sum(grads**2), mu, shrink, beta, ahead
        return (new, state, 1.2 * ahead), found

    @jit
    def run():
        carry = start, optimizer.init(start), jnp.asarray(100.0)
        return jax.lax.scan(body, carry, jnp.arange(60))[1]

    gaps, squares, mus, shrinks, betas, bends = jax.tree.map(np.asarray, run())
    assert (bends <= betas).all()
    assert (0.5 * squares >= mus * gaps).all()
    assert (gaps[1:] <= shrinks[:-1] * gaps[:-1]).all()
    assert ((shrinks > 0) & (shrinks < 1)).all()
    assert gaps[-1] < 0.5 * gaps[0]


def test_it_reaches_the_global_minimum_of_the_papers_deep_linear_net(x64):
    """19 matrices of 20 x 20, 40 rows, the noise of the teacher learnt from 0.1 on.

    Every stationary point of the product is a saddle or global, and the least loss is
    known: that of least squares, at the scale of its residuals.
    """
    chain = lambda key: jax.random.normal(key, (19, 20, 20)) / 20**0.5
    apply_fn = lambda ws, x: jax.lax.scan(lambda x, w: (x @ w, None), x, ws)[0]
    scale_of = lambda s: 1e-4 + (1 - 1e-4) * jax.nn.sigmoid(s)
    damping = LevenbergMarquardt(initial=1e3, factor=0.9, floor=0.03)
    optimizer = fishleg(damping=damping, white_directions=0)

    @jit
    def run(keys):
        x = jax.random.normal(keys[1], (40, 20))
        y = apply_fn(chain(keys[2]), x) + 1e-3 * jax.random.normal(keys[3], (40, 20))
        residual = jnp.mean((y - x @ jnp.linalg.lstsq(x, y)[0]) ** 2)
        best = 10 * (jnp.log(2 * jnp.pi * residual) + 1)
        loss = lambda p: Gaussian(scale_of(p["s"])).nll(apply_fn(p["w"], x), y)

        def body(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params)
            likelihood = Gaussian(scale_of(params["s"]))
            ggn = ggn_operator(apply_fn, likelihood, params["w"], (x, y))
            # The Fisher of ln sigma is 2 for every output.
            slope = jax.grad(lambda s: jnp.log(scale_of(s)))(params["s"])
            operator = lambda v: {"w": ggn(v["w"]), "s": 40 * slope**2 * v["s"]}
            extra = {"fisher_vp": operator, "value": value, "value_fn": loss}
            updates, state = optimizer.update(grads, state, params, **extra)
            return (optax.apply_updates(params, updates), state), value - best

        start = {"w": chain(keys[0]), "s": jnp.log((0.1 - 1e-4) / (1 - 0.1))}
        carry = start, optimizer.init(start)
        (params, _), gaps = jax.lax.scan(body, carry, length=300)
        return gaps, scale_of(params["s"]) / residual**0.5

    for seed in (0, 1):
        gaps, scale = run(jax.random.split(jax.random.key(seed), 4))
        assert gaps[0] > 1_000
        assert 0 < gaps[-1] < 0.3
        np.testing.assert_allclose(scale, 1, rtol=0.02)


# In an optimizer.


def test_an_update_is_what_the_formulas_say(x64):
    """Written out: two gradients, two white directions, schedules, decay, momentum."""
    params, *gradients = jnp.asarray(np.random.default_rng(1).normal(size=(4, 3)))
    operator = lambda v: jnp.array([0.1, 1.0, 4.0]) * v
    gamma, mu = (lambda t: 0.3 / (1 + t)), (lambda t: 0.1 + 0.1 * t)
    options = {"momentum": 0.9, "weight_decay": 0.2, "init_scale": 2.0}
    options |= {"gradient_directions": 2, "white_directions": 2, "pre_aux_steps": 1}
    optimizer = fishleg(0.5, damping=gamma, aux_step=mu, **options)

    def body(carry, now):
        state, q, before, mean = carry
        t, g = now
        key = jax.random.fold_in(jax.random.key(0), t)
        found, state = optimizer.update(g, state, params, fisher_vp=operator, key=key)
        g, damping = g + 0.2 * params, gamma(t) + 0.2
        key, numbers = jax.random.fold_in(key, 0), {"damping": damping, "step": mu(t)}
        q, _ = fishleg_group_step(
            key, q, [g, before], operator, white_directions=2, **numbers
        )
        d = q_apply(q, g)
        mean = 0.9 * mean + 0.1 * (g @ d) / (d @ operator(d) + damping * d @ d) * d
        return (state, q, g, mean), (found, -0.5 * mean)

    @jit
    def run():
        carry = (
            optimizer.init(params),
            q_init(params, scale=2.0),
            0 * params,
            0 * params,
        )
        return jax.lax.scan(body, carry, (jnp.arange(3), jnp.stack(gradients)))[1]

    np.testing.assert_allclose(*run(), rtol=1e-9)


def test_damping_stays_where_the_model_was_half_right():
    """By the share that the loss fell of what the model said: 25/3 from here."""
    rule = LevenbergMarquardt(initial=0.5, factor=0.5)
    optimizer = scale_by_fishleg(damping=rule, white_directions=0, pre_aux_steps=0)
    g = jnp.array([3.0, 4.0])

    def after(share):
        extra = {"value": 0.0, "value_fn": lambda at: -share * 25 / 3}
        state, extra["fisher_vp"] = optimizer.init(g), lambda v: v
        return optimizer.update(g, state, g, **extra)[1].damping

    found = jit(jax.vmap(after))(jnp.array([-1, 0.2, 0.3, 0.7, 0.8, 2.0]))
    np.testing.assert_allclose(found, [1.0, 1.0, 0.5, 0.5, 0.25, 0.25])


def test_no_step_where_the_quadratic_model_has_no_minimum():
    optimizer = scale_by_fishleg(white_directions=0, pre_aux_steps=0)
    run = jit(
        lambda g, size: optimizer.update(
            g, optimizer.init(g), g, fisher_vp=lambda v: size * v
        )
    )
    for length, size in ((0.0, 1.0), (1.0, -9.0)):
        np.testing.assert_array_equal(run(length * jnp.ones(3), size)[0], 0)


def test_adam_takes_the_mean_over_directions():
    """The same gradient twice is one gradient, to a rule that minds its length."""
    g, runs = jnp.array([1.0, 2.0]), []
    make = functools.partial(
        scale_by_fishleg, aux_mode="adam", white_directions=0, pre_aux_steps=0
    )
    for count in (1, 2):
        optimizer = make(aux_optimizer=optax.sgd(0.1), gradient_directions=count)
        state = optimizer.init(g)
        update = jit(lambda s, tx=optimizer: tx.update(g, s, g, fisher_vp=lambda v: v))
        _, state = update(update(state)[1])
        runs.append((state.q, state.fit))
    chex.assert_trees_all_close(*runs, rtol=1e-6)


def test_adam_is_not_spoilt_by_a_product_that_is_not_finite():
    optimizer = scale_by_fishleg(aux_mode="adam", white_directions=0, pre_aux_steps=1)
    params = jnp.ones((2, 2))
    state = optimizer.init(params)
    run = jit(
        lambda state, size: optimizer.update(
            params, state, params, fisher_vp=lambda v: v * size
        )
    )
    _, new = run(state, jnp.inf)
    assert int(new.skipped) == 1
    chex.assert_trees_all_equal((new.q, new.auxiliary), (state.q, state.auxiliary))
    updates, after = run(new, 1.0)
    chex.assert_tree_all_finite((updates, after.q, after.auxiliary))
    assert not np.array_equal(q_dense(after.q, params), q_dense(state.q, params))


def test_a_warm_start_has_one_gradient_and_the_fisher_of_each_batch():
    """That of the first batch; what is not finite is left out."""
    inputs = np.random.default_rng(0).normal(size=(3, 9, 2))
    inputs[1] = np.inf
    batches = [(jnp.float32(x), jnp.ones((9, 1))) for x in inputs]
    w, key = jnp.array([[1.0], [-1.0]]), jax.random.key(0)
    objective = Objective(plain(lambda w, x: x @ w), Gaussian())
    state = scale_by_fishleg().init(w)
    found = fishleg_warm_start(key, state, w, batches, objective=objective).q
    expected, (_, g) = state.q, objective.value_and_grad(w, (), batches[0])
    step = lambda k, q, f: fishleg_group_step(k, q, [g], lambda v: f @ v, damping=0.3)
    for n in (0, 2):
        white = jax.random.fold_in(jax.random.fold_in(key, n), 1)
        expected, _ = jit(step)(white, expected, batches[n][0].T @ batches[n][0] / 9)
    chex.assert_trees_all_close(found, expected, rtol=1e-4)


def test_a_fit_starts_at_one_over_the_damping_and_reports_its_first_error():
    start = {"damping": 2.0, "max_steps": 1, "tol": 0.0}
    fit = inverse_fisher(jax.random.key(0), lambda v: v, jnp.zeros(5), **start)
    np.testing.assert_allclose(fit.error, ((1 + 2) / 2 - 1) ** 2, rtol=1e-5)


def test_links_before_and_behind_it_do_what_they_say():
    draw = np.random.default_rng(0)
    x = draw.normal(size=(30, 3))
    data = draw.normal(size=8) / 2, (x, np.sin(x[:, :1]))
    params, batch = optax.tree.cast(data, jnp.float32)
    loss = lambda theta, batch: Gaussian().nll(tanh_net(theta, batch[0]), batch[1])
    grad_fn = lambda theta: jax.grad(loss)(theta, batch)
    fish = scale_by_fishleg(white_directions=0, pre_aux_steps=2)
    decay = optax.add_decayed_weights(0.1), optax.scale(-1)
    clipped = optax.chain(optax.clip_by_global_norm(0.01), fish, *decay)
    penalty = optax.chain(gradient_norm_penalty(0.8, 0.05), fish)

    @jit
    def run():
        grads = grad_fn(params)
        extra = {"grad_fn": grad_fn, "grad": grads}
        extra["fisher_vp"] = ggn_operator(tanh_net, Gaussian(), params, batch)
        first = lambda tx, g: tx.update(g, tx.init(params), params, **extra)[0]
        penalised = gnp_value_and_grad(loss, alpha=0.8, radius=0.05)(params, batch)[1]
        found = [first(tx, grads) for tx in (fish, clipped, penalty)]
        return grads, first(fish, penalised), found

    grads, of_penalised, (alone, clipped, penalty) = run()
    close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-6)
    # A clipped gradient has the same direction and, Q being fitted to directions, the
    # same Q: the whole step shrinks. Decay behind it is decoupled.
    close(clipped, -0.01 / optax.tree.norm(grads) * alone - 0.1 * params)
    # Behind the penalty it is FishLeg on the penalised gradient.
    close(penalty, of_penalised)
    assert np.linalg.norm(penalty - alone) > 0.01
