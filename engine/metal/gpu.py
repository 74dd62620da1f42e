"""Metal kernels on an Apple GPU: what `assay.metal.compile(…, device="gpu")` returns, through PyObjC's Metal.

Thin on purpose: sources are preprocessed and scanned as for the host, so that one text gives both devices the same
kernels and parameters, and Metal's own compiler does the rest with its own defaults (fast-math is on). A GPU can say
little about a kernel that goes wrong: faults are a command buffer's errors and time-outs; accesses out of bounds, races
and divergence are the host's to find. Untested on hardware.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from engine.metal import library, parameters, source
from engine.metal.arguments import Argument, argument, place
from engine.metal.errors import CompileError, MetalError
from engine.metal.faults import Fault
from engine.metal.launch import (
    Compiled,
    Options,
    Run,
    Shape,
    Size,
    Stats,
    check_bound,
    check_options,
    check_outputs,
    shape,
)  # fmt: skip

# NumPy's types of function constants by Metal's.
_TYPES = {
    "bool": "?", "char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4", "long": "i8",
    "ulong": "u8", "half": "f2", "float": "f4",
}  # fmt: skip
_FIXED_WIDTH = {"int8_t": "char", "int16_t": "short", "int32_t": "int", "int64_t": "long"}
_FIXED_WIDTH |= {f"u{name}": f"u{short}" for name, short in _FIXED_WIDTH.items()}
_POLL_SECONDS = 0.0001
# Metal wants threadgroup memory lengths in multiples of this (MTLComputeCommandEncoder, setThreadgroupMemoryLength).
_THREADGROUP_ALIGNMENT = 16


def unavailable() -> str:
    """Why no Apple GPU can be used here, with the way out; empty when one can."""
    if platform.system() != "Darwin":
        return f"an Apple GPU needs macOS, and this is {platform.system()} {platform.machine()}: use device='host'"
    if find_spec("Metal") is None:
        return "PyObjC's Metal is not installed: pip install 'assay[gpu]', or use device='host'"
    if import_module("Metal").MTLCreateSystemDefaultDevice() is None:
        return "Metal finds no GPU in this session (a virtual machine?): use device='host'"
    return ""


def require(*, checked: bool) -> None:
    """Raises MetalError when no GPU can be used here, or for checked mode, which is the host's."""
    if checked:
        raise MetalError("a GPU can't watch its loads and stores: use device='host' with checked=True")
    if reason := unavailable():
        raise MetalError(f"device 'gpu' can't be used: {reason}")


def compile(text: str, constants: Mapping[int | str, object]) -> Library:
    """A Library of the kernels in preprocessed Metal text, compiled by Metal. Raises CompileError."""
    return Library(source.read(text), text, constants)


def _checked(answer: tuple[Any, Any], error_class: type[MetalError]) -> Any:
    """The result of a call that answers (result, NSError)."""
    result, error = answer
    if result is None:
        raise error_class(str(error.localizedDescription()) if error is not None else "Metal gave no reason")
    return result


class Library(library.Library):
    """Kernels compiled by Metal for the default GPU."""

    def __init__(self, scanned: source.Source, text: str, constants: Mapping[int | str, object]) -> None:
        super().__init__(scanned, constants, checked=False)
        self._metal = import_module("Metal")
        self._device = self._metal.MTLCreateSystemDefaultDevice()
        self._queue = self._device.newCommandQueue()
        # Preprocessing has dropped Metal's own headers; this one includes the others that kernels use.
        options = self._metal.MTLCompileOptions.alloc().init()
        made = self._device.newLibraryWithSource_options_error_("#include <metal_stdlib>\n" + text, options, None)
        self._made = _checked(made, CompileError)
        self._constants = self._constant_values(constants)

    def _constant_values(self, given: Mapping[int | str, object]) -> Any:
        # PyObjC has no metadata for this method's pointer: it points to as many bytes as the type has.
        pointer = {"type": b"^v", "type_modifier": b"n", "c_array_of_variable_length": True}
        import_module("objc").registerMetaDataForSelector(
            b"MTLFunctionConstantValues", b"setConstantValue:type:atIndex:", {"arguments": {2: pointer}}
        )
        values = self._metal.MTLFunctionConstantValues.alloc().init()
        by_index = {constant.index: constant for constant in self._source.constants.values()}
        for key, value in given.items():
            constant = self._source.constants[key] if isinstance(key, str) else by_index[int(key)]
            text = _FIXED_WIDTH.get(constant.type_text, constant.type_text)
            element = text.rstrip("234")
            if element not in _TYPES:
                raise MetalError(f"function constant {constant.name!r}: {text} has no MTLDataType here")
            name = "U" + element[1:].capitalize() if element.startswith("u") else element.capitalize()
            kind = getattr(self._metal, f"MTLDataType{name}{text.removeprefix(element)}")
            values.setConstantValue_type_atIndex_(np.array(value, _TYPES[element]).tobytes(), kind, constant.index)
        return values

    def _compile(self, declarations: Sequence[source.KernelDeclaration]) -> None:
        for declared in declarations:
            name = declared.host_name
            function = _checked(
                self._made.newFunctionWithName_constantValues_error_(name, self._constants, None), MetalError
            )
            made = self._device.newComputePipelineStateWithFunction_error_(function, None)
            pipeline = _checked(made, CompileError)
            found = parameters.parameters(self._source, declared)
            compiled = Compiled(
                name=name, parameters=found, module=Path(), variables={},
                optional=parameters.optional(self._source, declared, found, self._values),
                most_threads=int(pipeline.maxTotalThreadsPerThreadgroup()), checked=False,
            )  # fmt: skip
            self._ready[name] = Kernel(self, compiled, pipeline)


class Kernel(library.Kernel):
    """One kernel's pipeline."""

    def __init__(self, owner: Library, compiled: Compiled, pipeline: Any) -> None:
        super().__init__(owner, compiled)
        self._owner, self._pipeline = owner, pipeline

    def launch(
        self,
        buffers: Mapping[int, object],
        *,
        threads: Size,
        threadgroups: Size | None = None,
        grid: Size | None = None,
        threadgroup_memory: Mapping[int, int] | None = None,
        outputs: Sequence[int] = (),
        schedule_seed: int | None = None,
        timeout: float = 10.0,
        poison: bool = True,
    ) -> Run:
        """As on the host, but that a GPU poisons no threadgroup memory and has no schedule_seed (MetalError)."""
        began = time.perf_counter()
        if schedule_seed is not None:
            raise MetalError("schedule_seed orders the host's threads; a GPU has its own order: leave it out")
        memory = dict(threadgroup_memory or {})
        options = Options(memory=memory, outputs=tuple(outputs), seed=None, timeout=timeout, poison=poison)
        check_options(self._compiled, options)
        dispatch = shape(threads, threadgroups, grid, self._compiled.most_threads)
        bound = self._bind(buffers, outputs)
        made, offsets = self._buffers(bound, outputs)
        command = self._owner._queue.commandBuffer()
        self._encode(command, dispatch, made, offsets, memory, whole=grid is None)
        command.commit()
        faults = self._wait(command, timeout)
        if not faults:
            for index, given in bound.items():
                if given.target is not None:
                    at, end = offsets[index], offsets[index] + given.data.size
                    given.target[:] = np.frombuffer(made[index].contents().as_buffer(end), np.uint8)[at:]
        stats = Stats(
            threadgroups=int(np.prod(dispatch.threadgroups, dtype=np.int64)), barriers=0, loads={}, stores={},
            simdgroup_matrix_operations=0,
            threadgroup_memory_bytes=sum(memory.values()) + int(self._pipeline.staticThreadgroupMemoryLength()),
            seconds=command.GPUEndTime() - command.GPUStartTime(), wall_seconds=time.perf_counter() - began,
        )  # fmt: skip
        return Run(
            kernel=self.name, device=f"gpu ({self._owner._device.name()})", faults=faults, stats=stats,
            completed=not faults,
        )  # fmt: skip

    def _bind(self, buffers: Mapping[int, object], outputs: Sequence[int]) -> dict[int, Argument]:
        known = self._compiled.buffers
        check_bound(self._compiled, buffers)
        written = {i: p.address_space == "device" and "const" not in p.type_text.split() for i, p in known.items()}
        given = {i: value for i, value in buffers.items() if value is not None}
        bound = {i: argument(i, known[i].name, value, written=written[i]) for i, value in given.items()}
        for index in outputs:
            if index not in bound or bound[index].target is None:
                raise MetalError(f"outputs names buffer({index}), which is no array that {self.name} writes")
        return bound

    def _buffers(self, bound: Mapping[int, Argument], outputs: Sequence[int]) -> tuple[dict[int, Any], dict[int, int]]:
        """An MTLBuffer an index and the offset in it: arrays that share memory share one."""
        slots, pieces, _ = place(bound)
        check_outputs(slots, outputs)
        shared = self._owner._metal.MTLResourceStorageModeShared
        owned: dict[int, Any] = {}
        for index, piece in pieces.items():
            owned[index] = self._owner._device.newBufferWithLength_options_(max(piece.size, 1), shared)
            if owned[index] is None:
                raise MetalError(f"buffer({index}): the GPU has no room for {piece.size} bytes")
        offsets = {index: slot.offset - pieces[slot.owner].offset for index, slot in slots.items()}
        for index, slot in slots.items():
            contents = owned[slot.owner].contents().as_buffer(max(pieces[slot.owner].size, 1))
            data = b"\xff" * slot.size if index in outputs else bound[index].data.tobytes()
            contents[offsets[index] : offsets[index] + slot.size] = data
        return {index: owned[slot.owner] for index, slot in slots.items()}, offsets

    def _encode(
        self, command: Any, dispatch: Shape, made: Mapping[int, Any], offsets: Mapping[int, int],
        memory: Mapping[int, int], *, whole: bool,
    ) -> None:  # fmt: skip
        encoder = command.computeCommandEncoder()
        encoder.setComputePipelineState_(self._pipeline)
        for index, buffer in made.items():
            encoder.setBuffer_offset_atIndex_(buffer, offsets[index], index)
        for index, size in memory.items():
            padded = -(-size // _THREADGROUP_ALIGNMENT) * _THREADGROUP_ALIGNMENT
            encoder.setThreadgroupMemoryLength_atIndex_(padded, index)
        if whole:
            encoder.dispatchThreadgroups_threadsPerThreadgroup_(dispatch.threadgroups, dispatch.threads)
        else:
            encoder.dispatchThreads_threadsPerThreadgroup_(dispatch.grid, dispatch.threads)
        encoder.endEncoding()

    def _wait(self, command: Any, timeout: float) -> tuple[Fault, ...]:
        metal = self._owner._metal
        deadline = time.perf_counter() + timeout
        while command.status() not in (metal.MTLCommandBufferStatusCompleted, metal.MTLCommandBufferStatusError):
            if time.perf_counter() > deadline:
                return (self._fault("timeout", f"not done after {timeout:g} s: only the GPU's own watchdog ends it"),)
            time.sleep(_POLL_SECONDS)
        if command.status() == metal.MTLCommandBufferStatusCompleted:
            return ()
        error = command.error()
        late = error is not None and error.code() == metal.MTLCommandBufferErrorTimeout
        words = str(error.localizedDescription()) if error is not None else "the command buffer failed without a reason"
        return (self._fault("timeout" if late else "crash", words),)

    def _fault(self, kind: str, words: str) -> Fault:
        unknown = ("address_space", "buffer", "offset", "size", "thread", "other_thread", "threadgroup", "line")
        return Fault(kind=kind, message=f"{self.name}: {words}", kernel=self.name, **dict.fromkeys(unknown))
