"""What every benchmark's record says of where it was measured."""

import shlex
import sys

from mlxpage.bench.machine import machine
from mlxpage.probes import versions


def command(script: str) -> str:
    return shlex.join(["python", f"benchmarks/{script}", *sys.argv[1:]])


def about(script: str) -> dict:
    return {"command": command(script)} | machine() | versions()
