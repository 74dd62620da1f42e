"""As much of PyObjC's Metal as engine.metal.gpu calls, with the host executor in the GPU's place.

It shows that gpu.py asks for the right things in the right order, and nothing about a GPU. Selectors and their answers
(an `error:` argument makes a call answer a pair) are from pyobjc-framework-Metal 12.2.2's metadata.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from engine.metal import library

STATUS_COMMITTED, STATUS_COMPLETED, STATUS_ERROR = 2, 4, 5
ERROR_TIMEOUT = 2


class Failure:
    def __init__(self, words: str, code: int = 0) -> None:
        self.localizedDescription = lambda: words
        self.code = lambda: code


class ConstantValues:
    def __init__(self) -> None:
        self.values: dict[int, tuple[bytes, str]] = {}

    @classmethod
    def alloc(cls) -> type[ConstantValues]:
        return cls

    @classmethod
    def init(cls) -> ConstantValues:
        return cls()

    def setConstantValue_type_atIndex_(self, data: bytes, kind: str, index: int) -> None:
        self.values[index] = (data, kind)


# MTLDataType's constants stand for NumPy's type of an element and their count.
DATA_TYPES = {"MTLDataTypeInt": ("i4", 1), "MTLDataTypeBool": ("?", 1), "MTLDataTypeFloat4": ("f4", 4)}


class Buffer:
    def __init__(self, size: int) -> None:
        self.data = bytearray(size)

    def contents(self) -> SimpleNamespace:
        return SimpleNamespace(as_buffer=lambda size: memoryview(self.data)[:size])


class Encoder:
    def __init__(self, command: Command) -> None:
        self.command, self.buffers, self.memory = command, {}, {}

    def setComputePipelineState_(self, pipeline: Any) -> None:
        self.kernel = pipeline.kernel

    def setBuffer_offset_atIndex_(self, buffer: Buffer, offset: int, index: int) -> None:
        self.buffers[index] = np.frombuffer(buffer.data, np.uint8)[offset:]

    def setThreadgroupMemoryLength_atIndex_(self, size: int, index: int) -> None:
        assert size % 16 == 0
        self.memory[index] = size

    def dispatchThreadgroups_threadsPerThreadgroup_(self, threadgroups: Any, threads: Any) -> None:
        self.dispatch = {"threadgroups": threadgroups, "threads": threads}

    def dispatchThreads_threadsPerThreadgroup_(self, grid: Any, threads: Any) -> None:
        self.dispatch = {"grid": grid, "threads": threads}

    def endEncoding(self) -> None:
        self.command.work = self.run

    def run(self) -> None:
        self.kernel.launch(self.buffers, threadgroup_memory=self.memory, **self.dispatch)


class Command:
    ends: Failure | None = None
    hangs = False

    def computeCommandEncoder(self) -> Encoder:
        return Encoder(self)

    def commit(self) -> None:
        if self.ends is None and not self.hangs:
            self.work()

    def status(self) -> int:
        return STATUS_COMMITTED if self.hangs else STATUS_ERROR if self.ends else STATUS_COMPLETED

    def error(self) -> Failure | None:
        return self.ends

    def GPUStartTime(self) -> float:
        return 1.0

    def GPUEndTime(self) -> float:
        return 1.5


class Made:
    """A compiled library."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.names = library.compile(text).kernels

    def newFunctionWithName_constantValues_error_(self, name: str, values: ConstantValues, _: None) -> Any:
        if name not in self.names:
            return None, Failure(f"no function {name}")
        constants: dict[int | str, object] = {}
        for index, (data, kind) in values.values.items():
            dtype, count = DATA_TYPES[kind]
            found = np.frombuffer(data, dtype)
            assert found.size == count
            constants[index] = found if count > 1 else found[0]
        return library.compile(self.text, constants=constants)[name], None


class Device:
    def name(self) -> str:
        return "a fake"

    def newCommandQueue(self) -> Any:
        return SimpleNamespace(commandBuffer=Command)

    def newBufferWithLength_options_(self, size: int, options: int) -> Buffer:
        assert size > 0
        assert options == 0
        return Buffer(size)

    def newLibraryWithSource_options_error_(self, text: str, options: Any, _: None) -> Any:
        try:
            return Made(text), None
        except ValueError as error:
            return None, Failure(str(error))

    def newComputePipelineStateWithFunction_error_(self, kernel: Any, _: None) -> Any:
        return SimpleNamespace(
            kernel=kernel, maxTotalThreadsPerThreadgroup=lambda: 512, staticThreadgroupMemoryLength=lambda: 0
        ), None


def module() -> Any:
    """What `import Metal` would give."""
    made = SimpleNamespace(
        MTLCreateSystemDefaultDevice=Device,
        MTLCompileOptions=SimpleNamespace(alloc=lambda: SimpleNamespace(init=lambda: None)),
        MTLFunctionConstantValues=ConstantValues,
        MTLResourceStorageModeShared=0,
        MTLCommandBufferStatusCompleted=STATUS_COMPLETED,
        MTLCommandBufferStatusError=STATUS_ERROR,
        MTLCommandBufferErrorTimeout=ERROR_TIMEOUT,
    )
    for name in DATA_TYPES:
        setattr(made, name, name)
    return made
