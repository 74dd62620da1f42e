"""What this machine can verify: versions, devices, and every lane that can't run here with the reason."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from audits.side_by_side import PACKAGES, _version


@dataclass(frozen=True, kw_only=True)
class Lane:
    """One way to run the engine; `reason` says why it can't run here (empty: it can)."""

    name: str
    detail: str
    reason: str

    @property
    def available(self) -> bool:
        return not self.reason


def versions() -> dict[str, str]:
    """Platform, Python and the packages that figures depend on."""
    here = {
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": sys.version.split()[0],
    }
    return here | {name: _version(name) for name in PACKAGES}


def lanes() -> Iterator[Lane]:
    """Every lane, available or not."""
    from engine.device import devices

    for device in devices().values():
        reason = "" if device.available else device.detail
        yield Lane(name=f"mlx on {device.name}", detail="" if reason else device.detail, reason=reason)
    yield Lane(name="reference (float32, float64)", detail="PyTorch on the CPU", reason="")
