"""Kernels run for real on a Mac, and in the simulator on Linux: the tests are the same."""

from __future__ import annotations

from unittest.mock import patch

import metal_sim
import mlx.core as mx
import pytest

from mlxpage.metal.kernels import pool

ON_A_GPU = mx.metal.is_available() or mx.cuda.is_available()
# A GPU has no use for the simulator's own tests, and broken kernels write where they like.
collect_ignore = ["test_simulator.py", "test_fidelity.py", "test_mutants.py"] if ON_A_GPU else []


@pytest.fixture
def metal():
    """Kernels work: where there is no GPU, ``mx.fast.metal_kernel`` is a checked simulation."""
    if ON_A_GPU:
        yield
    else:
        # The simulator knows an input's end, and a real pool goes on behind its first block.
        with metal_sim.installed(), patch.object(pool, "as_input", lambda pool: pool):
            yield


@pytest.fixture(params=["forward", "reverse", "shuffled"])
def thread_order(request):
    """Threads run in three orders, which may make no difference. A Mac has its own order."""
    with metal_sim.options(order=request.param):
        yield request.param
