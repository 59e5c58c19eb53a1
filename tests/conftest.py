"""Fixtures that every folder of tests shares."""

import os
import signal

import pytest

from mlxpage import blas

# Settings and aliases of whoever runs the tests don't count.
os.environ["MLXPAGE_CONFIG"] = os.path.join(os.path.dirname(__file__), "no such folder")

# Workers share the cores: with BLAS threads for all of them in each, they wait for one another.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    threads = max(1, (os.cpu_count() or 1) // int(workers))
    os.environ.setdefault("OPENBLAS_NUM_THREADS", str(threads))

# Before anything imports MLX: without it float32 on a Linux CPU is 50 times slower.
blas.load()


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_is_heard():
    """A shell starts background jobs with SIGINT ignored, and Python then leaves it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def smollm2_folder():
    from mlxpage import model_store

    return model_store.resolve("smollm2-135m")


@pytest.fixture(scope="session")
def smollm2_4bit_folder():
    from mlxpage import model_store

    return model_store.resolve("smollm2-135m-4bit")


@pytest.fixture(scope="session")
def gemma3_folder():
    from mlxpage import model_store

    return model_store.resolve("gemma3-270m")
