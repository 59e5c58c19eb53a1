"""Runs Metal kernels on Linux, with checks that a GPU doesn't make. README.md says which.

    kernel = metal_sim.metal_kernel("double", ["x"], ["y"], "y[i] = 2 * x[i]; ...")
    with metal_sim.options(order="shuffled"), metal_sim.coverage() as covered:
        (y,) = kernel(inputs=[x], grid=(64, 1, 1), threadgroup=(64, 1, 1),
                      output_shapes=[x.shape], output_dtypes=[x.dtype])
    assert not covered.missing(), covered.report()

``installed()`` puts the simulator where ``mx.fast.metal_kernel`` is.
"""

from .errors import KernelFault, Message, SimulatorError, StaticFault, ToolchainMissing
from .kernel import Kernel, installed, metal_kernel
from .line_coverage import Coverage
from .line_coverage import Coverage as coverage  # noqa: N813, read as a verb: with coverage() as ...
from .options import Options, Run, options

__all__ = [
    "Coverage",
    "Kernel",
    "KernelFault",
    "Message",
    "Options",
    "Run",
    "SimulatorError",
    "StaticFault",
    "ToolchainMissing",
    "coverage",
    "installed",
    "metal_kernel",
    "options",
]
