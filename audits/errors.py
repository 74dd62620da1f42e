"""What stops an audit from judging."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGES = ("assay", "audits", "engine", "goldens", "reference")
REPORT = "please report it"


class CannotJudge(Exception):
    """No judgement is possible; the message says why. The verdict is "could-not-judge", never a pass."""

    evidence: Mapping[str, Any] = {}


class InternalError(CannotJudge):
    """What judges has raised: neither the candidate's fault nor bad input. `evidence` has the traceback."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(f"{told(error)}; {REPORT}, with the traceback in the verdict's evidence")
        self.evidence = {"check": "internal error", "traceback": "".join(traceback.format_exception(error))}


class DeviceLost(Exception):
    """The device that the candidate computes on answers nothing any more, as after an illegal access on a GPU."""


def told(error: BaseException) -> str:
    """An error of ours in one line: what, and at which line of our code."""
    where = ""
    for frame in traceback.extract_tb(error.__traceback__):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in PACKAGES:
            where = f" at {path.relative_to(ROOT)}:{frame.lineno}"
    said = " ".join(str(error).split())
    return f"an error in assay itself{where}: {type(error).__name__}{': ' + said if said else ''}"
