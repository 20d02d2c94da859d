"""What lanczos and ritz_vectors refuse, in their own words."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.curvature.lanczos import lanczos, ritz, ritz_vectors

pytestmark = pytest.mark.untyped

A = np.diag(np.arange(1.0, 6.0)).astype(np.float32)
operator = jax.tree_util.Partial(jnp.matmul, jnp.asarray(A))


@dataclasses.dataclass(frozen=True)
class Streamed:
    host: bool = True

    def __call__(self, v):
        return v


def test_numpy_starts_are_fine():
    result = lanczos(operator, np.ones(5, np.float32), order=5)
    np.testing.assert_allclose(ritz(result)[0], np.arange(1, 6), rtol=1e-5)


@pytest.mark.parametrize("order", [0, -1, 2.0, True, None])
def test_order_must_be_a_positive_integer(order):
    with pytest.raises(ValueError, match="order must be an integer >= 1"):
        lanczos(operator, jnp.ones(5), order=order)


def test_order_above_the_dimension():
    with pytest.raises(ValueError, match="at most the dimension, 5, got 6"):
        lanczos(operator, jnp.ones(5), order=6)


def test_unknown_options():
    with pytest.raises(ValueError, match='"full", "selective" or "none", got \'both\''):
        lanczos(operator, jnp.ones(5), order=2, reorthogonalize="both")
    with pytest.raises(ValueError, match='"auto", "compiled" or "host", got \'gpu\''):
        lanczos(operator, jnp.ones(5), order=2, driver="gpu")


def test_starts_without_a_direction():
    with pytest.raises(ValueError, match="start must not be zero"):
        lanczos(operator, jnp.zeros(5), order=2)
    for bad in (jnp.nan, jnp.inf):
        with pytest.raises(ValueError, match="start must be finite"):
            lanczos(operator, jnp.ones(5).at[2].set(bad), order=2)
    with pytest.raises(ValueError, match="no entries"):
        lanczos(operator, {"a": optax.MaskedNode()}, order=1)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64])
def test_starts_that_are_not_real(dtype):
    with pytest.raises(
        ValueError, match=r"leaves of start must be real .* start\['a'\]"
    ):
        lanczos(operator, {"a": jnp.ones(5, dtype)}, order=2)


@pytest.mark.parametrize("driver", ["compiled", "host"])
def test_operators_that_give_another_tree(driver):
    for wrong in (lambda v: v[:3], lambda v: {"v": v}, lambda v: v[None]):
        with pytest.raises(ValueError, match="must give a tree like the one"):
            lanczos(wrong, jnp.ones(5), order=2, driver=driver)


@pytest.mark.parametrize("driver", ["compiled", "host"])
def test_operators_that_are_not_symmetric(driver):
    lopsided = jnp.asarray(A).at[0, 1].add(1e-2)
    apply = lambda v: lopsided @ v
    with pytest.raises(ValueError, match="must be symmetric"):
        lanczos(apply, jnp.ones(5), order=3, driver=driver)
    lanczos(apply, jnp.ones(5), order=3, driver=driver, check_symmetric=False)


def test_round_off_is_not_taken_for_asymmetry():
    rng = np.random.default_rng(0)
    for seed in range(5):
        q, _ = np.linalg.qr(rng.standard_normal((300, 300)))
        matrix = (q * np.geomspace(1e-6, 1e3, 300)) @ q.T
        for a in (jnp.asarray(matrix, jnp.float32), jnp.asarray(matrix, jnp.bfloat16)):
            v = jax.random.normal(jax.random.key(seed), 300, a.dtype)
            lanczos(jax.tree_util.Partial(jnp.matmul, a), v, order=60)


def test_a_basis_above_the_limit_names_bytes_and_alternatives():
    with pytest.raises(ValueError) as caught:
        lanczos(operator, jnp.ones(5), order=4, memory_limit=79)
    message = str(caught.value)
    for part in ("80 bytes", "4 x 5 x 4", "memory_limit=79", '"selective" (20 bytes)'):
        assert part in message
    assert '"none"' in message
    assert "ritz_vectors" in message
    lanczos(operator, jnp.ones(5), order=4, memory_limit=80)
    smaller = {"order": 4, "reorthogonalize": "selective"}
    lanczos(operator, jnp.ones(5), memory_limit=20, **smaller)
    with pytest.raises(ValueError, match="20 bytes") as caught:
        lanczos(operator, jnp.ones(5), memory_limit=19, **smaller)
    assert "selective" not in str(caught.value)
    lanczos(operator, jnp.ones(5), order=4, reorthogonalize="none", memory_limit=0)


def test_the_limit_is_a_gibibyte_unless_said_otherwise():
    like = jnp.ones(2**22)  # 16 MiB a vector; nothing is run
    with pytest.raises(ValueError, match="1,090,519,040 bytes"):
        lanczos(lambda v: v, like, order=65)


def test_host_operators_and_host_loops_refuse_to_be_traced():
    run = lambda **options: jax.jit(
        lambda v: lanczos(options.pop("operator"), v, order=2, **options).alpha
    )(jnp.ones(5))
    with pytest.raises(ValueError, match="streams its data from the host"):
        run(operator=Streamed())
    with pytest.raises(ValueError, match="loops in Python"):
        run(operator=operator, driver="host")
    with pytest.raises(ValueError, match="cannot stand in a compiled loop"):
        lanczos(Streamed(), jnp.ones(5), order=2, driver="compiled")
    # The start is no tracer here; the surrounding jit still is.
    with pytest.raises(ValueError, match="streams its data from the host"):
        jax.jit(lambda: lanczos(Streamed(), np.ones(5, np.float32), order=2).alpha)()


def test_ritz_vectors_that_are_not_there():
    result = lanczos(operator, jnp.ones(5), order=3)
    for indices in ((), (3,), (-4,), (0, 7)):
        with pytest.raises(ValueError, match="places among 3 Ritz values"):
            ritz_vectors(operator, jnp.ones(5), result, indices=indices)
    stopped = lanczos(lambda v: v, jnp.ones(5), order=3)
    with pytest.raises(ValueError, match="places among 1 Ritz values"):
        ritz_vectors(lambda v: v, jnp.ones(5), stopped, indices=(1,))
    again = lambda start: ritz_vectors(operator, start, result, indices=(0,))
    for call in (again, jax.jit(again)):
        with pytest.raises(
            ValueError, match="that of the first pass, with 5 entries, got 4"
        ):
            call(jnp.ones(4))


def test_a_matrix_is_no_operator():
    with pytest.raises(ValueError, match=r"callable v -> A v on .*Partial\(jnp.matmul"):
        lanczos(jnp.asarray(A), jnp.ones(5), order=2)
