"""What a measurement ran on: pinning, device, versions, flags.

JAX is imported inside the functions, because on a CPU :func:`pin_to_one_core` must
come first: XLA sizes its thread pools from the cores that it may use.
"""

import os
import pathlib
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "jaxlab")


def backend() -> str:
    """Names the platform JAX will use, without importing JAX into this process."""
    named = os.environ.get("JAX_PLATFORMS", "").split(",")[0]
    if named:
        return named
    answer = subprocess.run(
        [sys.executable, "-c", "import jax; print(jax.default_backend())"],
        capture_output=True,
        text=True,
        check=True,
    )
    return answer.stdout.split()[-1]


def pin_to_one_core(core: int | None = None) -> bool:
    """Confines this process to one CPU core and makes dispatch synchronous.

    On several cores a product's time depends on who else runs, and under asynchronous
    dispatch short calls read far too small. Accelerators are left alone, and so are
    systems without ``sched_setaffinity``.

    Args:
      core: the core to use; the last one allowed if ``None``.

    Returns:
      Whether the process is now pinned.

    Raises:
      RuntimeError: if JAX has been imported already.
      ValueError: if this process may not use ``core``.
    """
    if "jax" in sys.modules:
        raise RuntimeError("pin before JAX is imported: its threads exist by now.")
    if not hasattr(os, "sched_setaffinity") or backend() != "cpu":
        return False
    allowed = os.sched_getaffinity(0)
    core = max(allowed) if core is None else core
    if core not in allowed:
        raise ValueError(f"core must be one of {sorted(allowed)}, got {core}.")
    os.sched_setaffinity(0, {core})
    import jax

    # A flag without an environment variable, read when the backend starts.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    return True


def cpu_model() -> str:
    """Names the processor as the system does."""
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"model name\s*:\s*(.+)", info.read_text())
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def slug(text: str) -> str:
    """Turns a device's name into a folder name.

    Examples:
      >>> slug("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz")
      'intel-xeon-platinum-8481c'
      >>> slug("NVIDIA H200")
      'h200'
    """
    text = re.sub(r"\((r|tm|c)\)|\bcpu\b|\bnvidia\b|@.*", " ", text.lower())
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-")


def device_name() -> str:
    """Names the folder of this device's results: ``cpu-<model>``, ``h200``."""
    import jax

    device = jax.devices()[0]
    if device.platform == "cpu":
        return f"cpu-{slug(cpu_model())}"
    return slug(device.device_kind)


def _git(*arguments: str) -> str | None:
    try:
        answer = subprocess.run(
            ["git", "-C", str(ROOT), *arguments],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _device() -> dict[str, Any]:
    import jax

    device = jax.devices()[0]
    affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    cores = sorted(affinity(0))
    return {
        "name": device_name(),
        "platform": device.platform,
        "kind": cpu_model() if device.platform == "cpu" else device.device_kind,
        "count": jax.device_count(),
        "cores": cores,
        "pinned": device.platform == "cpu" and len(cores) == 1,
    }


def describe(
    device: Mapping[str, Any] | None = None, packages: Sequence[str] = ()
) -> dict[str, Any]:
    """Collects device, cores, versions and flags, the head of every record.

    Args:
      device: the entry of a device that is only compiled for; the one that JAX runs
        on if ``None``.
      packages: what else, besides ``PACKAGES``, the figures depend on.

    Returns:
      A dict of JSON values. ``commit`` is ``None`` outside a git checkout; ``dirty``
      says whether the checkout differs from it, result files aside.
    """
    import jax

    changes = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return {
        "device": dict(device or _device()),
        "versions": {
            "python": platform.python_version(),
            **{package: _version(package) for package in (*PACKAGES, *packages)},
            "commit": _git("rev-parse", "HEAD") if changes is not None else None,
            "dirty": bool(changes) if changes is not None else None,
        },
        "flags": {
            "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
            "matmul_precision": jax.config.jax_default_matmul_precision,
            "x64": bool(jax.config.jax_enable_x64),
            "async_dispatch": bool(jax.config.read("jax_cpu_enable_async_dispatch")),
        },
    }
