"""Abstract devices: ``tpu.compile(f, *arguments)`` compiles, nothing is run.

A fixture is a :class:`benchmarks.devices.Target`; ``tpu.sharding`` is the place of one
device for a jit of one's own. Where the packages are missing its tests are skipped.
"""

import pytest

from benchmarks import devices


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/devices/" in item.path.as_posix():
            item.add_marker(pytest.mark.devices)


@pytest.fixture(scope="session")
def tpu():
    return _present(devices.TPU_V5P)


@pytest.fixture(scope="session")
def gpu():
    return _present(devices.H200)


def _present(target):
    if lacking := target.missing():
        pytest.skip(lacking)
    return target
