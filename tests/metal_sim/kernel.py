"""`metal_kernel`, which takes the place of `mx.fast.metal_kernel` where there is no Metal."""

from __future__ import annotations

import contextlib
import re
import struct
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import mlx.core as mx

from . import options as options_module
from .buffers import (
    Array,
    Output,
    as_array,
    contiguous,
    description,
    dtype_of,
    input_buffer,
    is_contiguous,
)
from .build import Program, build
from .errors import Message, SimulatorError, StaticFault
from .launch import Buffer, launch
from .options import Options, Run
from .text import KernelText, header_name

_mlx_metal_kernel = mx.fast.metal_kernel


class Kernel:
    """What `metal_kernel` returns; called like MLX's, but it runs at once."""

    def __init__(self, **arguments: object):
        self.name: str = arguments["name"]
        self.input_names: list[str] = list(arguments["input_names"])
        self.output_names: list[str] = list(arguments["output_names"])
        self.source: str = arguments["source"]
        self.header: str = arguments["header"]
        self.ensure_row_contiguous: bool = arguments["ensure_row_contiguous"]
        self.mlx_kernel = _mlx_metal_kernel(**arguments)
        self._check_ascii()
        self._programs: dict[str, tuple[str, Program]] = {}

    def __call__(
        self,
        *,
        inputs: Sequence[object],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: Sequence[tuple[str, object]] | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: object = None,
    ) -> list[mx.array]:
        options = options_module.current()
        arrays = [as_array(value) for value in inputs]
        text, program = self._program(
            [(tuple(array.shape), dtype_of(array)) for array in arrays],
            {
                "output_shapes": [tuple(shape) for shape in output_shapes],
                "output_dtypes": list(output_dtypes),
                "template": list(template or ()),
            },
            options.checked,
        )
        if verbose:
            print(text)
        outputs = [
            Output(
                *(name, shape, dtype),
                init_value=init_value,
                may_stay_unwritten=name in options.allow_unwritten,
            )
            for name, shape, dtype in zip(
                self.output_names, output_shapes, output_dtypes, strict=True
            )
        ]
        buffers = self._buffers(program, arrays, outputs, options)
        statistics = launch(program, buffers, tuple(grid), tuple(threadgroup), options)
        options.runs.append(Run(self.name, text, *statistics))
        return [output.array() for output in outputs]

    def _check_ascii(self) -> None:
        """MLX hands the text to Metal as ASCII, and with anything else there is no text at all."""
        faults = []
        for file, part in (
            (header_name(f"{self.name}.metal"), self.header),
            (f"{self.name}.metal", self.source),
        ):
            for number, line in enumerate(part.split("\n"), 1):
                if not line.isascii():
                    faults.append(Message(file, number, "not ASCII, which MLX can't hand to Metal"))
        if faults:
            raise StaticFault(faults)

    def _program(self, inputs: list, call: dict, checked: bool) -> tuple[str, Program]:
        """The text that MLX makes for a call like this, and the program made of it."""
        key = repr((inputs, call, checked))
        if key not in self._programs:
            entry, text = self._text_from_mlx(inputs, call)
            instance = re.search(rf"decltype\({entry}(<.*?>)\)", text)
            # The instantiation is Metal's way of asking for a kernel; the launcher has its own.
            text = text.split("\ntemplate [[host_name")[0]
            kernel = KernelText(text, f"{self.name}.metal", header=self.header, body=self.source)
            arguments = instance[1] if instance else ""
            program = build(kernel, entry, template=arguments, checked=checked)
            self._programs[key] = text, program
        return self._programs[key]

    def _text_from_mlx(self, inputs: list, call: dict) -> tuple[str, str]:
        """When it exports a function, MLX records a call with its text, and needs no Metal."""

        def traced(*arrays: mx.array) -> list[mx.array]:
            # The sizes of the grid aren't in the text.
            one = (1, 1, 1)
            return self.mlx_kernel(inputs=list(arrays), grid=one, threadgroup=one, **call)

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernel.mlxfn"
            mx.export_function(str(path), traced, *[mx.zeros(*each) for each in inputs])
            data = path.read_bytes()
        start = data.index(f"custom_kernel_{self.name}".encode(), data.index(b"CustomKernel"))
        name, end = _string(data, start - 8)
        return name, _string(data, end)[0]

    def _buffers(
        self,
        program: Program,
        arrays: list[Array],
        outputs: list[Output],
        options: Options,
    ) -> dict[int, Buffer]:
        """What each buffer parameter is given: inputs, what describes them, and outputs."""
        by_name = dict(zip(self.input_names, arrays, strict=True))
        made = {name: self._input(name, array, options) for name, array in by_name.items()}
        made |= {output.buffer.name: output.buffer for output in outputs}
        buffers = {}
        for parameter in program.parameters:
            name = parameter.name
            if parameter.attribute != "buffer":
                continue
            if name not in made:
                of, _, what = name.rpartition("_")
                made[name] = description(name, by_name[of], what)
            buffers[parameter.index] = made[name]
        return buffers

    def _input(self, name: str, array: Array, options: Options) -> Buffer:
        writable = name in options.writable
        if not is_contiguous(array):
            self._refuse_to_copy(name, writable)
            array = contiguous(array)
        return input_buffer(name, array, writable=writable)

    def _refuse_to_copy(self, name: str, writable: bool) -> None:
        if writable:
            raise SimulatorError(
                f"{self.name}: the writable input '{name}' isn't row-contiguous, so MLX would hand "
                "the kernel a copy, and what it writes would be lost."
            )
        if not self.ensure_row_contiguous:
            raise SimulatorError(
                f"{self.name}: the input '{name}' isn't row-contiguous, and kernels with "
                "ensure_row_contiguous=False are simulated only with inputs that are."
            )


def metal_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    atomic_outputs: bool = False,
    **more: object,
) -> Kernel:
    """A kernel that runs in the simulator; the arguments are those of ``mx.fast.metal_kernel``."""
    return Kernel(
        name=name,
        input_names=input_names,
        output_names=output_names,
        source=source,
        header=header,
        ensure_row_contiguous=ensure_row_contiguous,
        atomic_outputs=atomic_outputs,
        **more,
    )


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """``mx.fast.metal_kernel`` is the simulator's within the ``with``."""
    before = mx.fast.metal_kernel
    mx.fast.metal_kernel = metal_kernel
    try:
        yield
    finally:
        mx.fast.metal_kernel = before


def _string(data: bytes, at: int) -> tuple[str, int]:
    """A string that its length precedes, and where it ends."""
    (length,) = struct.unpack_from("<Q", data, at)
    return data[at + 8 : at + 8 + length].decode(), at + 8 + length
