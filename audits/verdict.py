"""What an audit says: a Verdict a case, a Report for all of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from shlex import quote
from typing import Any, Literal

Outcome = Literal["pass", "fail", "could-not-judge", "skipped"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One judgement. `case` is JSON-able and says how to repeat it; `evidence` holds the figures; `message` is one
    line.
    """

    outcome: Outcome
    audit: str
    case: Mapping[str, Any]
    message: str
    evidence: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Report:
    """All verdicts of one call. `ok` only when something was judged and nothing failed or resisted judgement."""

    verdicts: Sequence[Verdict]

    @property
    def ok(self) -> bool:
        outcomes = {verdict.outcome for verdict in self.verdicts}
        return "pass" in outcomes and not outcomes & {"fail", "could-not-judge"}

    @property
    def exit_code(self) -> int:
        """0 pass, 1 something failed, 2 nothing (or not everything) could be judged."""
        if any(verdict.outcome == "fail" for verdict in self.verdicts):
            return 1
        return 0 if self.ok else 2


def case_text(case: Mapping[str, Any]) -> str:
    """A case as one line of JSON, as `assay audit --replay` takes it."""
    return json.dumps(dict(case), sort_keys=True, default=str)


def replay_command(case: Mapping[str, Any]) -> str:
    """What to type to run a case again."""
    return f"assay audit --replay {quote(case_text(case))}"
