"""The main job: an engine beside the reference (or beside a golden) on the same tokens, judged probe by probe.

`run` makes a Trace of one run of any engine; `audit_case` puts it beside the reference and judges.
"""

from __future__ import annotations

import datetime
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from audits.cases import Case, model_folder
from audits.compare import Comparison, compare
from audits.verdict import Verdict
from audits.weights import check_weights
from goldens.fingerprint import Fingerprint, fingerprint
from goldens.trace import Recorder, Trace
from reference.model import Reference

PACKAGES = ("assay", "mlx", "numpy", "torch", "h5py")


class EngineLike(Protocol):
    """What `run` needs of an engine: run tokens through a tap, and say what it is and in which arithmetic it
    computes.
    """

    @property
    def provenance(self) -> Mapping[str, Any]: ...

    def run(self, tokens: Sequence[int], *, tap: Any, chunk: int | None, decode: int) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One case's verdict with what it was drawn from."""

    case: Case
    verdict: Verdict
    comparison: Comparison
    actual: Trace
    expected: Trace


@lru_cache(maxsize=8)
def load_reference(model: str, dtype: str) -> Reference:
    """The reference for a model whose weights are rounded to `dtype`; kept, since every case asks for it again."""
    return Reference(model_folder(model), dtype=dtype)


@lru_cache(maxsize=8)
def model_fingerprint(model: str) -> Fingerprint:
    """The Fingerprint of a model's folder, computed once."""
    return fingerprint(model_folder(model))


def run(engine: str | EngineLike, case: Case | Mapping[str, Any]) -> Trace:
    """The Trace of one run of `case` on `engine`: "mlx", "reference", or an object with `run` and `provenance`.

    `case` is a Case or its dict: {"tokens": […], "model": folder, "options": {"dtype", "device", "chunk", "decode"}}.
    """
    case = case if isinstance(case, Case) else Case.from_dict(case)
    recorder = Recorder()
    if engine == "reference":
        reference = load_reference(case.model, case.dtype)
        reference.run(case.tokens, recorder)
        told: Mapping[str, Any] = reference.provenance
    else:
        loaded = load_engine(case) if isinstance(engine, str) else engine
        if isinstance(engine, str) and engine != "mlx":
            raise ValueError(
                f"no engine {engine!r}; there are mlx and reference, or pass an object with run and provenance"
            )
        loaded.run(case.tokens, tap=recorder, chunk=case.chunk or None, decode=case.decode)
        reference = load_reference(case.model, loaded.provenance.get("dtype", case.dtype))
        weights = check_weights(loaded, reference, model_fingerprint(case.model))
        told = {**loaded.provenance, "weights": weights}
    return recorder.trace(case=case.name, tokens=case.tokens, provenance={**provenance(case), **told})


def load_engine(case: Case) -> Any:
    """The MLX engine for a case."""
    import engine

    return engine.load(model_folder(case.model), dtype=case.dtype, device=case.device)


def provenance(case: Case) -> dict[str, Any]:
    """Where a Trace comes from, except what the engine says of itself."""
    model = model_fingerprint(case.model)
    return {
        "source": "engine",
        "case": {key: value for key, value in case.as_dict().items() if key != "tokens"},
        "model": case.model,
        "model_hash": model.model_hash,
        "tensor_hashes": dict(model.tensor_hashes),
        "config": dict(model.config),
        "seed": case.seed,
        "command": " ".join(["assay", *sys.argv[1:]]) if Path(sys.argv[0]).name == "assay" else "assay.run",
        "versions": versions(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def versions() -> dict[str, str]:
    """Platform, Python and the packages that figures depend on."""
    here = {"platform": f"{platform.system()} {platform.machine()}", "python": platform.python_version()}
    return here | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def audit_case(engine: EngineLike, case: Case) -> Judged:
    """Run one case on the engine and on the reference, and judge."""
    actual, expected = run(engine, case), run("reference", case)
    comparison = compare(actual, expected, load_reference(case.model, case.dtype))
    return Judged(
        case=case, verdict=to_verdict(comparison, case), comparison=comparison, actual=actual, expected=expected
    )


def to_verdict(comparison: Comparison, case: Case, audit: str = "run") -> Verdict:
    """The Verdict of a Comparison, with what is needed to repeat it."""
    first = comparison.first_failure
    evidence: dict[str, Any] = {"first_failure": first.probe if first else None, "replay": case.replay_command()}
    return Verdict(
        outcome=comparison.outcome, audit=audit, case=case.as_dict(), message=comparison.message, evidence=evidence
    )


def audit_model(cases: Sequence[Case], advance: Callable[[str], None] = lambda _: None) -> Iterator[Judged]:
    """Judge every case on the MLX engine; the cases share a model, a dtype and a device."""
    engine = load_engine(cases[0])
    for case in cases:
        advance(case.name)
        yield audit_case(engine, replace(case, device=engine.provenance["device"]))
