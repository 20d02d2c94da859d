"""Measurements of curvature that need a process of their own: ``python -m`` this.

``memory`` runs Lanczos on a GPT in a limited address space and reports how far the
resident memory grew; ``wall`` times steps by the clock on the wall, on every core.
The last line on standard output is the result as JSON.
"""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

from benchmarks.environment import ROOT

MODULE = "benchmarks.curvature_worker"


def call(task: str, **options: Any) -> dict[str, Any]:
    """Runs a task in a new process and gives its result.

    Raises:
      RuntimeError: with the end of what it said, if it fails.
    """
    done = subprocess.run(
        [sys.executable, "-m", MODULE, task, json.dumps(options)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{task} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _resident(field: str) -> int:
    """Reads ``VmRSS`` or its peak ``VmHWM`` in bytes."""
    text = pathlib.Path("/proc/self/status").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith(field)]
    return int(line.split()[1]) * 1024


def memory(*, limit: int, order: int, sizes: dict[str, int]) -> dict[str, Any]:
    """Measures the growth of the second of two equal runs; the first one compiles."""
    import resource
    import time

    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    import jax

    from benchmarks import curvature_sides as sides
    from jaxlab.curvature.lanczos import lanczos, ritz

    net = sides.text_net(**sizes, seed=0)
    operator, start = net.hessian, net.start(1)
    product = jax.jit(lambda operator, v: operator.linearize()(v))
    needs = product.lower(operator, start).compile().memory_analysis()

    def run():
        return jax.block_until_ready(
            lanczos(operator, start, order=order, memory_limit=limit)
        )

    def free(result):
        for leaf in jax.tree.leaves(result):
            leaf.delete()

    free(run())
    before = _resident("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    begin = time.process_time()
    result = run()
    seconds = time.process_time() - begin
    grown = _resident("VmHWM") - before
    vector = 4 * net.size
    return {
        "parameters": net.size,
        "grown": grown,
        "seconds": seconds,
        "documented": (order + 7) * vector,
        "product": needs.temp_size_in_bytes,
        "orthogonality": sides.orthogonality(result.basis),
        "largest": float(ritz(result)[0][int(result.num_steps) - 1]),
        "data": net.data,
    }


def wall(*, model: str, rounds: int, **options: Any) -> dict[str, Any]:
    """Times gradients and Lanczos steps on every core that the machine gives."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
    import time

    from benchmarks.speed import curvature

    setting = curvature.Options((model,), rounds=rounds, few=True, **options)
    net = curvature.net_of(model, setting)
    found = curvature.step_samples(net, setting, time.perf_counter)
    return {"samples": found.samples, "cores": len(os.sched_getaffinity(0))}


if __name__ == "__main__":
    task, text = sys.argv[1:]
    print(json.dumps({"memory": memory, "wall": wall}[task](**json.loads(text))))
