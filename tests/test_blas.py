"""OpenBLAS or MKL takes over from MLX's own BLAS, when it is loaded before MLX is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mlxpage import blas

ROOT = Path(__file__).parent.parent


def run(code: str, **environment: str) -> str:
    """Run ``code`` in a fresh interpreter with only ``environment``."""
    command = [sys.executable, "-c", code]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


# Asked in a fresh interpreter: in this one MLX may be there already.
LOAD = "from mlxpage import blas; print(blas.load() or '')"
LIBRARY = run(LOAD)
needs_library = pytest.mark.skipif(not LIBRARY, reason="no OpenBLAS or MKL for MLX here")


def test_loading_leaves_mlx_alone_and_answers_the_same_again():
    out = run("""
import sys
from mlxpage import blas
print(blas.load() == blas.load(), "mlx.core" in sys.modules)
""")
    assert out == "True False"


@needs_library
def test_products_after_loading_are_right():
    run("""
from mlxpage import blas
assert blas.load()
import mlx.core as mx, numpy as np
mx.set_default_device(mx.cpu)
a = np.random.default_rng(0).standard_normal((64, 576), dtype=np.float32)
b = np.random.default_rng(1).standard_normal((576, 1536), dtype=np.float32)
np.testing.assert_allclose(np.array(mx.array(a) @ mx.array(b)), a @ b, rtol=0, atol=1e-3)
s = a[:, :64] @ a[:, :64].T + 64 * np.eye(64, dtype=np.float32)
i = mx.linalg.inv(mx.array(s))  # LAPACK comes from the same library
np.testing.assert_allclose(np.array(i) @ s, np.eye(64), atol=1e-3)
""")


@needs_library
def test_what_is_reported_is_mapped():
    out = run(f"""
from pathlib import Path
{LOAD}
print(Path("/proc/self/maps").read_text())
""")
    path, *mapped = out.split("\n")
    assert path == LIBRARY
    assert any(line.endswith(str(Path(path).resolve())) for line in mapped)


@needs_library
def test_loading_after_mlx_changes_nothing_and_says_so():
    # MLX has bound its symbols: a library loaded now would cost memory and threads for nothing.
    assert run(f"import mlx.core; {LOAD}") == ""


@needs_library
def test_a_library_that_the_host_app_preloads_is_reported():
    assert run(f"import mlx.core; {LOAD}", LD_PRELOAD=LIBRARY) == LIBRARY


def test_mlxpage_blas_off_loads_nothing():
    assert run(LOAD, MLXPAGE_BLAS="off") == ""


def test_mlx_for_cuda_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / "mlx").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mlx", raising=False)
    (tmp_path / "mlx" / "__init__.py").touch()
    assert blas._mlx_runs_on_the_cpu()
    (tmp_path / "mlx_cuda_13-0.32.4.dist-info").mkdir()
    assert not blas._mlx_runs_on_the_cpu()
