"""Accelerators that are not here: their own compilers run on any machine.

libtpu compiles for a named TPU topology, and XLA's CUDA plugin for a GPU that a text
describes; neither needs the device, a driver or a CUDA toolkit, and nothing is
executed. JAX is imported inside the functions, so that :func:`prepare` can come first.
"""

import dataclasses
import functools
import importlib.util
import os
import re
from collections.abc import Callable
from typing import Any, Literal

from benchmarks import hlo

# Keeps JAX from looking for the devices, libtpu from asking a server for them and from
# locking the machine's TPU, which would let one process compile at a time.
ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_PLATFORMS": "cpu",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}
KiB, MiB, GB = 2**10, 2**20, 10**9

# Public figures of the data sheet of the SXM module and of the Hopper architecture.
H200_SXM = {
    "threads_per_warp": 32,
    "threads_per_block_limit": 1024,
    "threads_per_core_limit": 2048,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 2**16 - 1,
    "block_dim_limit_z": 2**16 - 1,
    "registers_per_block_limit": 64 * KiB,
    "registers_per_core_limit": 64 * KiB,
    "shared_memory_per_block": 48 * KiB,  # without asking for more
    "shared_memory_per_block_optin": 227 * KiB,
    "shared_memory_per_core": 228 * KiB,
    "core_count": 132,  # streaming multiprocessors
    "fpus_per_core": 128,
    "clock_rate_ghz": 1.98,
    "l2_cache_size": 50 * MiB,
    "memory_bandwidth": 4800 * GB,  # a second
    "device_memory_size": 141 * GB,
}


def gpu_description(
    name: str, capability: tuple[int, int], info: dict[str, float]
) -> str:
    """Writes what XLA has to know about a GPU, a GpuTargetConfigProto in text.

    Examples:
      >>> print(gpu_description("toy", (9, 0), {"core_count": 2}))
      gpu_device_info {
        core_count: 2
        cuda_compute_capability { major: 9 minor: 0 }
      }
      platform_name: "CUDA"
      dnn_version_info { major: 9 minor: 8 patch: 0 }
      device_description_str: "toy"
    """
    major, minor = capability
    fields = [f"  {key}: {value}" for key, value in info.items()]
    chip = f"  cuda_compute_capability {{ major: {major} minor: {minor} }}"
    return "\n".join(
        [
            "gpu_device_info {",
            *fields,
            chip,
            "}",
            'platform_name: "CUDA"',
            "dnn_version_info { major: 9 minor: 8 patch: 0 }",
            f'device_description_str: "{name}"',
        ]
    )


@dataclasses.dataclass(frozen=True)
class Target:
    """One accelerator to compile for; ``description`` is what its compiler gets."""

    name: str
    platform: Literal["tpu", "gpu"]
    description: str
    modules: tuple[str, ...]  # what has to be there beside JAX
    packages: tuple[str, ...]  # and the distributions that bring it

    def head(self) -> dict[str, Any]:
        """Returns the device entry of a record, in which nothing has run."""
        return {
            "name": f"{self.name}-compiled",
            "platform": self.platform,
            "kind": f"compiled for one {self.name}, not run",
            "description": self.description,
            "count": 1,
            "cores": [],
            "pinned": False,
        }

    def missing(self) -> str | None:
        """Says in one line what to install; ``None`` if nothing is missing."""
        try:
            if all(importlib.util.find_spec(module) for module in self.modules):
                return None
        except ModuleNotFoundError:  # the package that would hold the module
            pass
        return (
            f"compiling for {self.name} needs {' and '.join(self.packages)} beside "
            "JAX: `make devices` installs them, into .venv-devices."
        )

    @functools.cached_property
    def sharding(self) -> Any:
        """One abstract device, as a ``SingleDeviceSharding``.

        Raises:
          ModuleNotFoundError: if a package is missing.
        """
        if lacking := self.missing():
            raise ModuleNotFoundError(lacking)
        prepare()
        from jax.experimental import topologies
        from jax.sharding import SingleDeviceSharding

        if self.platform == "tpu":
            topology = topologies.get_topology_desc(
                platform="tpu", topology_name=self.description
            )
        else:
            topology = topologies.get_topology_desc(
                platform="cuda",
                topology_name="",
                target_config=self.description,
                topology="1x1x1",
            )
        return SingleDeviceSharding(topology.devices[0])

    def compile(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Compiles a function of arrays or ``ShapeDtypeStruct``s; nothing runs.

        Args:
          function: what ``jax.jit`` takes.
          *arguments: pytrees, of which shapes and dtypes are read.

        Returns:
          The compiled program (``cost_analysis``, ``memory_analysis``, ``as_text``).

        Raises:
          ModuleNotFoundError: if a package is missing.
        """
        place = self.sharding
        import jax

        jitted = jax.jit(function, in_shardings=place, out_shardings=place)
        platform = "tpu" if self.platform == "tpu" else "cuda"
        lowered = jitted.trace(*arguments).lower(lowering_platforms=(platform,))
        return compiled(lowered)

    def mesh(self) -> Any:
        """All abstract TPU chips of the topology in a row, with one axis "d".

        Raises:
          ModuleNotFoundError: if a package is missing.
        """
        assert self.platform == "tpu"
        _ = self.sharding  # sets up what the topology needs
        import numpy as np
        from jax.experimental import topologies
        from jax.sharding import AxisType, Mesh

        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=self.description
        )
        return Mesh(np.array(topology.devices), ("d",), axis_types=(AxisType.Auto,))


TPU_V5P = Target(
    name="tpu-v5p",
    platform="tpu",
    description="v5p:2x2x1",  # the first of its four chips, both cores as one
    modules=("libtpu",),
    packages=("libtpu",),
)
H200 = Target(
    name="h200",
    platform="gpu",
    description=gpu_description("NVIDIA H200", (9, 0), H200_SXM),
    modules=("jax_cuda13_plugin", "jax_plugins.xla_cuda13"),
    packages=("jax-cuda13-plugin", "jax-cuda13-pjrt"),
)
TARGETS = {target.name: target for target in (TPU_V5P, H200)}


def prepare() -> None:
    """Sets what JAX and libtpu read from the environment, where it is not set."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def compiled(lowered: Any) -> Any:
    """Compiles for devices that are not here, past the persistent cache.

    JAX would write such a program to it but cannot read it back.

    Args:
      lowered: from ``jax.jit(...).trace(...).lower(lowering_platforms=...)``.
    """
    import jax

    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, float("inf"))
    try:
        return lowered.compile()
    finally:
        jax.config.update(name, before)


def collectives(text: str) -> list[tuple[str, int]]:
    """Lists what the chips of a compiled program send each other.

    Args:
      text: ``compiled.as_text()``.

    Returns:
      Kind and bytes of the result, of each.

    Examples:
      >>> collectives("%a = f32[2,3]{1,0} all-reduce(%b), to_apply=%add")
      [('all-reduce', 24)]
    """
    return [
        (kind, hlo.size_of(shapes)) for shapes, kind, _ in hlo.MESSAGE.findall(text)
    ]


def figures(
    target: Target, function: Callable[..., Any], *arguments: Any
) -> dict[str, float]:
    """Compiles a function and collects what its compiler says about it.

    Args:
      target: the device.
      function: what ``jax.jit`` takes.
      *arguments: pytrees of ``ShapeDtypeStruct``s.

    Returns:
      ``temporary_bytes``, ``total_bytes`` with arguments and results, ``flops``. For a
      TPU also ``optimal_seconds`` and ``bytes``, a roofline of the program, and
      ``cycles``, the sum of what the scheduler expects of each operation. For a GPU,
      of which the compiler gives no time, ``gemms``, the kernels with a product in
      them, and ``passes`` and ``passes_bytes``, all other kernels and what they write.
      The FLOPs are of the compiled program for a TPU, of the one as written for a GPU.
    """
    import jax

    compiled = target.compile(function, *arguments)
    memory = compiled.memory_analysis()
    found = {
        "temporary_bytes": memory.temp_size_in_bytes,
        "total_bytes": memory.temp_size_in_bytes
        + memory.argument_size_in_bytes
        + memory.output_size_in_bytes,
    }
    if target.platform == "tpu":
        analysis = compiled.cost_analysis()
        return found | {
            "flops": analysis["flops"],
            "optimal_seconds": analysis["optimal_seconds"],
            "bytes": analysis["bytes accessed"],
            "cycles": scheduled_cycles(compiled.as_text()),
        }
    written = jax.jit(function).lower(*arguments).cost_analysis()
    return found | {"flops": written["flops"], **count_kernels(compiled.as_text())}


def entry(text: str) -> list[str]:
    """Returns the lines of the entry computation of a program in HLO text."""
    return re.split(r"^ENTRY ", text, flags=re.MULTILINE)[1].splitlines()


def scheduled_cycles(text: str) -> int:
    r"""Adds up the cycles that a TPU's scheduler expects of the program's operations.

    Examples:
      >>> lines = ["ENTRY m {", '  a = f32[2] copy(x), {"estimated_cycles":"7"}']
      >>> scheduled_cycles("\n".join(lines))
      7
    """
    numbers = re.findall(r'"estimated_cycles":"(\d+)"', "\n".join(entry(text)))
    return sum(map(int, numbers))


def count_kernels(text: str) -> dict[str, int]:
    r"""Counts the kernels of a GPU's program and what those without product write.

    Examples:
      >>> count_kernels("ENTRY m {\n  ROOT %t.1 = f32[2,3]{0,1} transpose(%x)\n}")
      {'gemms': 0, 'passes': 1, 'passes_bytes': 24}
    """
    gemms, passes, written = 0, 0, 0
    kernel = r"= (\(.*?\)|\S+) (fusion|custom-call|copy|transpose|reduce|convert)\("
    for line in entry(text):
        if not (found := re.search(kernel, line)):
            continue
        if re.search(r'"kind":"\w*gemm\w*"|custom_call_target="__cublas', line):
            gemms += 1
        else:
            passes += 1
            written += hlo.size_of(found[1])
    return {"gemms": gemms, "passes": passes, "passes_bytes": written}
