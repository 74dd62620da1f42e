"""How a golden changes: a new one is staged beside it, its difference is looked at, and it is accepted or discarded.

The accepted golden is never written to; accepting renames the pending file over it. So a writer may be killed at any
moment: what carries the golden's name is the old one whole or the new one whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from goldens import files, store
from goldens.errors import GoldenError
from goldens.files import lock, pending_path
from goldens.trace import Trace

__all__ = ["accept", "discard", "lock", "pending_path", "stage"]


def stage(path: str | Path, traces: Sequence[Trace]) -> Path:
    """Write `traces` to the pending file of golden `path`, all or nothing, and return its path; raises GoldenError."""
    pending = pending_path(path)
    with lock(path):
        data, _ = store.encode(pending, traces)
        files.replace(pending, data)
    return pending


def accept(path: str | Path) -> None:
    """Put the pending golden, checked whole, in the place of `path`; raises GoldenError and then changes nothing."""
    path, pending = Path(path), pending_path(path)
    with lock(path):
        if not pending.exists():
            raise GoldenError(f"{path}: nothing is pending; run `assay golden regenerate` first")
        store.open(pending)
        try:
            files.rename(pending, path)
        except OSError as error:
            raise GoldenError(
                f"{path}: can't be replaced ({error.strerror or error}); {pending} is still there"
            ) from error


def discard(path: str | Path) -> None:
    """Remove the pending golden of `path`, if there is one."""
    with lock(path):
        try:
            pending_path(path).unlink(missing_ok=True)
        except OSError as error:
            raise GoldenError(f"{pending_path(path)}: can't be removed ({error.strerror})") from error
