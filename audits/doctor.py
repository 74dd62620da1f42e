"""What this machine can verify: every lane of the engine, and why one can't run here."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from engine.metal import compiler
from engine.metal.errors import MetalError


@dataclass(frozen=True, kw_only=True)
class Lane:
    """One way to run the engine; `reason` says why it can't run here (empty: it can)."""

    name: str
    detail: str
    reason: str

    @property
    def available(self) -> bool:
        return not self.reason


def lanes() -> Iterator[Lane]:
    """Every lane, available or not."""
    from engine.device import devices
    from engine.metal import gpu

    for device in devices().values():
        reason = "" if device.available else device.detail
        yield Lane(name=f"mlx on {device.name}", detail="" if reason else device.detail, reason=reason)
    yield Lane(name="reference (float32, float64)", detail="PyTorch on the CPU", reason="")
    yield _host_kernels()
    reason = gpu.unavailable()
    yield Lane(name="Metal kernels on an Apple GPU", detail="" if reason else "through PyObjC's Metal", reason=reason)


def _host_kernels() -> Lane:
    """Whether there is a compiler to ask; it isn't asked anything."""
    name = "Metal kernels on the host CPU"
    try:
        command = compiler.command()
    except MetalError as error:
        return Lane(name=name, detail="", reason=str(error))
    if shutil.which(command[0]) is None:
        return Lane(name=name, detail="", reason=f"ASSAY_CXX names {command[0]}, which is not there")
    own = os.environ.get("ASSAY_CXX")
    return Lane(name=name, detail=f"compiler {own or 'ziglang ' + metadata.version('ziglang')}", reason="")
