"""What the penalty and its links refuse, in their own words."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.sharpness import static_args
from jaxlab.sharpness.gradient_norm_penalty import (
    asam,
    gnp_gradient,
    gnp_gradient_exact,
    gnp_value_and_grad,
    gradient_norm_penalty,
    sam,
)
from jaxlab.sharpness.look_sam import look_sam
from jaxlab.sharpness.perturbation import perturb
from jaxlab.sharpness.sometimes import hybrid, periodic
from jaxlab.training import with_extra_args

pytestmark = pytest.mark.untyped

W = jnp.arange(1.0, 4.0)
loss_fn = lambda w: jnp.sum(w**3)
grad_fn = jax.grad(loss_fn)
LINKS = {
    "gradient_norm_penalty": gradient_norm_penalty(),
    "sam": sam(),
    "asam": asam(),
    "look_sam": look_sam(),
    "periodic": periodic(sam(), 2),
    "hybrid": hybrid(sam(), 1.0),
}
links = pytest.mark.parametrize("link", LINKS.values(), ids=LINKS)
KEY = {"key": jax.random.key(0)}


def test_numbers_out_of_range():
    with pytest.raises(ValueError, match=r"radius must be finite and >= 0, got -0\.1"):
        perturb(W, W, radius=-0.1)
    with pytest.raises(ValueError, match="radius must be finite"):
        gnp_gradient(grad_fn, W, alpha=0.8, radius=float("inf"))
    with pytest.raises(ValueError, match="eps must be finite and > 0"):
        perturb(W, W, radius=0.1, eps=0.0)
    nan = float("nan")
    for call in (
        lambda: gnp_gradient(grad_fn, W, alpha=nan, radius=0.1),
        lambda: gnp_value_and_grad(loss_fn, alpha=nan, radius=0.1),
        lambda: gradient_norm_penalty(nan),
        lambda: gnp_gradient_exact(loss_fn, W, penalty=nan),
    ):
        with pytest.raises(ValueError, match="alpha must be finite, got nan"):
            call()
    with pytest.raises(ValueError, match=r"^sam: rho must be finite .* got -1"):
        sam(-1.0)
    with pytest.raises(ValueError, match=r"probability must be in \[0, 1\], got 1.5"):
        hybrid(sam(), 1.5)
    for every in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="every must be an integer >= 1"):
            periodic(sam(), every)
        with pytest.raises(ValueError, match="every must be an integer >= 1"):
            look_sam(every=every)


def test_trees_that_do_not_fit():
    with pytest.raises(ValueError, match="at least one array"):
        gnp_gradient(lambda p: p, {}, alpha=0.8, radius=0.1)
    with pytest.raises(
        ValueError, match=r"floating leaves, got int32 at params\['n'\]"
    ):
        perturb({"n": jnp.arange(3), "w": W}, {"n": W, "w": W}, radius=0.1)
    with pytest.raises(
        ValueError, match="perturb: direction must be a tree like params"
    ):
        perturb({"w": W}, [W], radius=0.1)
    with pytest.raises(ValueError, match=r"like params, .*\(3,\).*, got .*\(2,\)"):
        perturb(W, W[:2], radius=0.1)
    with pytest.raises(ValueError, match="mask must be a tree like params"):
        perturb({"w": W}, {"w": W}, radius=0.1, mask={"v": True})
    with pytest.raises(ValueError, match="boolean or a boolean array"):
        perturb(W, W, radius=0.1, mask=jnp.ones(3))
    with pytest.raises(ValueError, match="returns \\(value, grads\\)"):
        gnp_gradient(jax.value_and_grad(loss_fn), W, alpha=0.8, radius=0.1)
    with pytest.raises(ValueError, match="floating leaves"):
        gnp_value_and_grad(loss_fn, alpha=0.8, radius=0.1)(jnp.arange(3))
    with pytest.raises(ValueError, match=r"unknown options \['rho'\]"):
        gnp_value_and_grad(loss_fn, alpha=0.8, radius=0.1, rho=0.1)


@pytest.mark.parametrize("init", [sam(), look_sam()])
def test_init_refuses_what_update_could_not_serve(init):
    with pytest.raises(ValueError, match="floating leaves"):
        init.init({"n": jnp.arange(3)})


@links
def test_links_name_what_is_missing(link):
    state, grads = link.init(W), grad_fn(W)
    with pytest.raises(ValueError, match="needs grad_fn= and grad=: call update"):
        link.update(grads, state, W, **KEY)
    with pytest.raises(ValueError, match="needs grad=: call update"):
        link.update(grads, state, W, grad_fn=grad_fn, **KEY)
    with pytest.raises(ValueError, match="with params"):
        link.update(grads, state, grad_fn=grad_fn, grad=grads, **KEY)
    with pytest.raises(ValueError, match="grad must be a tree like updates"):
        link.update(grads, state, W, grad_fn=grad_fn, grad={"w": grads}, **KEY)
    if link is LINKS["hybrid"]:
        with pytest.raises(ValueError, match="hybrid needs key="):
            link.update(grads, state, W, grad_fn=grad_fn, grad=grads)


@links
def test_links_refuse_a_gradient_that_was_changed(link):
    grads = grad_fn(W)
    extra = {"grad_fn": grad_fn, "grad": grads, **KEY}
    for tx in (
        optax.chain(optax.clip_by_global_norm(1.0), link),
        with_extra_args(optax.MultiSteps(optax.chain(link, optax.sgd(0.1)), 2)),
    ):
        with pytest.raises(ValueError, match=r"first link .* optax.MultiSteps"):
            jax.jit(lambda g, s, tx=tx: tx.update(g, s, W, **(extra | {"grad": g})))(
                grads, tx.init(W)
            )


def test_arguments_that_are_not_there():
    f = gnp_value_and_grad(loss_fn, alpha=0.8, radius=0.1, argnums=(0, 2))
    with pytest.raises(ValueError, match=r"argnums=\(0, 2\) must name .* got 1 of"):
        f(W)
    last = gnp_value_and_grad(
        lambda x, w: loss_fn(w), alpha=0.8, radius=0.1, argnums=-1
    )
    np.testing.assert_allclose(
        last(0, W)[1], gnp_gradient(grad_fn, W, alpha=0.8, radius=0.1)
    )


def test_static_args_wants_the_function():
    assert static_args(periodic) == ("transformation", "every")
    with pytest.raises(ValueError, match=r"as in static_args\(sam\), got Gradient"):
        static_args(sam())
    injected = optax.inject_hyperparams(periodic)(sam(), 2)
    with pytest.raises(ValueError, match="it is static, so name it in static_args="):
        injected.init(W)


def test_what_is_no_transformation():
    with pytest.raises(ValueError, match="must be an optax transformation, got float"):
        periodic(0.1, 2)


def test_numpy_and_numbers_of_numpy_are_welcome():
    w = np.arange(1.0, 4.0, dtype=np.float32)
    got = gnp_gradient(grad_fn, w, alpha=np.float32(0.8), radius=np.float64(0.1))
    want = gnp_gradient(grad_fn, W, alpha=0.8, radius=0.1)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_nan_gradients_stay_visible():
    broken = lambda w: jnp.full_like(w, jnp.nan)
    assert np.isnan(gnp_gradient(broken, W, alpha=0.8, radius=0.1)).all()
    assert np.isnan(perturb(W, W * jnp.nan, radius=0.1)).all()
