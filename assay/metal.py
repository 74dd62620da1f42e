"""`assay.metal.compile`: Metal kernels on the host CPU, checked or fast."""

from __future__ import annotations

from engine.metal.errors import CompileError, MetalError
from engine.metal.faults import Fault
from engine.metal.library import Kernel, Library, Run, Stats, compile
from engine.metal.source import Parameter

__all__ = ["CompileError", "Fault", "Kernel", "Library", "MetalError", "Parameter", "Run", "Stats", "compile"]
