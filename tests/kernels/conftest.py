"""Kernels run for real on a Mac, and in the simulator on Linux: the tests are the same."""

from __future__ import annotations

import sys

import metal_sim
import mlx.core as mx
import pytest

# These are about the simulator itself, which a Mac has no use for.
collect_ignore = [] if sys.platform == "linux" else ["test_simulator.py", "test_fidelity.py"]
if mx.metal.is_available() or mx.cuda.is_available():
    # Broken kernels write where they like: never on a GPU.
    collect_ignore.append("test_mutants.py")


@pytest.fixture
def metal():
    """Kernels work: where there is no GPU, ``mx.fast.metal_kernel`` is a checked simulation."""
    if mx.metal.is_available() or mx.cuda.is_available():
        yield
    else:
        with metal_sim.installed():
            yield


@pytest.fixture(params=["forward", "reverse", "shuffled"])
def thread_order(request):
    """Threads run in three orders, which may make no difference. A Mac has its own order."""
    with metal_sim.options(order=request.param):
        yield request.param
