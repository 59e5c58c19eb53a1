"""Fixtures that every folder of tests shares."""

import pytest

from mlxpage import blas

# Before anything imports MLX: without it float32 on a Linux CPU is 50 times slower.
blas.load()


@pytest.fixture(scope="session")
def smollm2_folder():
    from mlxpage import model_store

    return model_store.resolve("smollm2-135m")


@pytest.fixture(scope="session")
def gemma3_folder():
    from mlxpage import model_store

    return model_store.resolve("gemma3-270m")
