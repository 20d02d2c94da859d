"""Settings of every test and doctest; they must stand before jax is imported."""

import os
import pathlib

_CACHE = pathlib.Path(__file__).parent / ".cache"

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
# Eight devices; and programs that run for moments, which take longer to compile well.
for _flag in (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
):
    if _flag.partition("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}".strip()
# Workers and subprocesses share what one of them has compiled.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Data sets are prepared once for all tests, away from the user's own.
os.environ.setdefault("JAXLAB_DATA_DIR", str(_CACHE / "data"))
# Plots are files here; no test needs a window.
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest

# Scripts that tests start in processes of their own.
collect_ignore_glob = ["tests/*/workers/*"]


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace):
    """Gives every doctest the names that readers type first."""
    import jax
    import jax.numpy as jnp

    doctest_namespace.update(jax=jax, jnp=jnp)


@pytest.fixture(scope="module", autouse=True)
def _room_for_programs():
    """Forgets compiled programs when there are many, between two files.

    Each holds about ten memory maps, of which Linux allows a process 65,530; XLA does
    not survive the next one.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_text().count("\n") > 15_000:
        import jax

        jax.clear_caches()


@pytest.fixture
def x64():
    """Float64 inside one test; users run float32, so never for the whole run."""
    import jax

    with jax.enable_x64(True):
        yield
