"""`assay.metal.compile`: Metal kernels on the host CPU, checked or fast."""

from __future__ import annotations

from engine.metal.errors import CompileError, MetalError
from engine.metal.faults import Fault
from engine.metal.launch import Run, Stats
from engine.metal.library import Kernel, Library, compile
from engine.metal.parameters import Parameter

__all__ = ["CompileError", "Fault", "Kernel", "Library", "MetalError", "Parameter", "Run", "Stats", "compile"]
