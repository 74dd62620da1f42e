"""assay: does a Metal LLM engine still compute what its reference computes?

The names below are the public API; everything heavy is imported when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from assay import golden, metal
    from assay.api import audit, bisect, compare, contracts, replay, run
    from audits.compare import Comparison, ProbeResult
    from audits.verdict import Report, Verdict
    from goldens.trace import Trace

__version__ = "0.1.0"
__all__ = [
    "Comparison",
    "ProbeResult",
    "Report",
    "Trace",
    "Verdict",
    "audit",
    "bisect",
    "compare",
    "contracts",
    "golden",
    "metal",
    "replay",
    "run",
]

_HOME = {
    "audit": "assay.api",
    "run": "assay.api",
    "compare": "assay.api",
    "contracts": "assay.api",
    "replay": "assay.api",
    "bisect": "assay.api",
    "Comparison": "audits.compare",
    "ProbeResult": "audits.compare",
    "Report": "audits.verdict",
    "Verdict": "audits.verdict",
    "Trace": "goldens.trace",
}


def __getattr__(name: str) -> Any:
    if name in ("golden", "metal"):
        return import_module(f"assay.{name}")
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'assay' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
