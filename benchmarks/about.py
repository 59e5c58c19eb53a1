"""What every benchmark's record says of where it was measured."""

import os
import platform
import shlex
import sys

import mlxpage
from mlxpage.metal.backend import BLAS, device, mx


def about(script: str) -> dict:
    import mlx_lm

    return {
        "command": shlex.join(["python", f"benchmarks/{script}", *sys.argv[1:]]),
        "device": device().name,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
        "blas": os.path.basename(str(BLAS)),
        "python": platform.python_version(),
        "mlxpage": mlxpage.__version__,
        "mlx": mx.__version__,
        "mlx_lm": mlx_lm.__version__,
    }
