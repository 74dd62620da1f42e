"""Which devices MLX offers here, and choosing one. An absent one has a one-line reason, never a silent substitute."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx

from engine.errors import DeviceError

# In the order that "auto" prefers them.
NAMES = ("metal", "cuda", "cpu")


@dataclass(frozen=True, kw_only=True)
class Device:
    """One of NAMES; `available`, and if not, `detail` says why; else `detail` describes the hardware."""

    name: str
    available: bool
    detail: str

    @property
    def handle(self) -> mx.Device:
        """What MLX calls it: Metal and CUDA are both "gpu", since one build has one of them."""
        return mx.Device(mx.cpu if self.name == "cpu" else mx.gpu)


def devices() -> Mapping[str, Device]:
    """Every device name with whether it can be used here, and why not."""
    return {name: _probe(name) for name in NAMES}


def select(name: str = "auto") -> Device:
    """Make `name` (metal, cuda, cpu, or auto: the first available) MLX's default device.

    Raises DeviceError, with why not and what to ask for instead.
    """
    found = devices()
    usable = [device.name for device in found.values() if device.available]
    if name == "auto":
        name = usable[0]
    if name not in found:
        raise DeviceError(f"device {name!r} is unknown; ask for auto, {', '.join(NAMES)}")
    device = found[name]
    if not device.available:
        raise DeviceError(f"device {name!r} can't be used: {device.detail}; available here: {', '.join(usable)}")
    mx.set_default_device(device.handle)
    return device


def _probe(name: str) -> Device:
    if name == "metal" and not mx.metal.is_available():
        system = f"{platform.system()} {platform.machine()}"
        reason = f"MLX has Metal on macOS with Apple Silicon alone, and this is {system}"
        return Device(name=name, available=False, detail=reason)
    if name == "cuda" and not mx.cuda.is_available():
        reason = "this MLX has no CUDA backend (on Linux, pip install 'mlx[cuda]' brings it) or finds no NVIDIA GPU"
        return Device(name=name, available=False, detail=reason)
    kind = mx.Device(mx.cpu if name == "cpu" else mx.gpu)
    info = mx.device_info(kind)
    described = " ".join(str(info[key]) for key in ("device_name", "architecture") if info.get(key))
    return Device(name=name, available=True, detail=described or name)
