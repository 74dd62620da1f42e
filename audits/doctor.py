"""What this machine can verify: every lane of the engine, and why one can't run here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


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

    for device in devices().values():
        reason = "" if device.available else device.detail
        yield Lane(name=f"mlx on {device.name}", detail="" if reason else device.detail, reason=reason)
    yield Lane(name="reference (float32, float64)", detail="PyTorch on the CPU", reason="")
