"""The golden workflow's work: run the engine anew, and judge what is stored against what is computed.

A stored Trace is judged like a live one, by same-input replay on its own recorded inputs: a value that was altered
after the run doesn't follow from its inputs, and is named, whatever its hash says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from audits.cases import TRACES_FOLDER, Case, example
from audits.compare import ProbeResult, compare
from audits.side_by_side import Judged, load_engine, load_reference, model_fingerprint, run, to_verdict
from goldens import store, workflow
from goldens.errors import GoldenError
from goldens.matching import check_model
from goldens.trace import Trace

# The committed goldens: one file a dtype. This one prompt of 46 tokens wraps the sliding window of 32 and keeps the
# three files under 20 MB.
GOLDEN_TASKS = ("copy",)
GOLDEN_DTYPES = ("float32", "float16", "bfloat16")
Advance = Callable[[str], None]


def golden_paths(paths: Sequence[Path]) -> list[Path]:
    """The given goldens, or all committed ones. GoldenError when there is none."""
    found = list(paths) or sorted(p for p in TRACES_FOLDER.glob("*.h5") if not p.name.endswith(".pending.h5"))
    if not found:
        raise GoldenError(f"no golden in {TRACES_FOLDER}; make one with `assay golden regenerate`")
    return found


def pending_goldens(paths: Sequence[Path]) -> list[Path]:
    """The given goldens, or all committed ones, that have a pending file. GoldenError when there is none."""
    found = [p for p in list(paths) or default_golden_paths() if workflow.pending_path(p).exists()]
    if missing := [p for p in paths if p not in found]:
        raise GoldenError(f"{missing[0]} has no pending golden; make one with `assay golden regenerate {missing[0]}`")
    if not found:
        raise GoldenError("no pending golden; make one with `assay golden regenerate`")
    return found


def default_golden_paths() -> list[Path]:
    """Where the committed goldens belong."""
    return [TRACES_FOLDER / f"{dtype}.h5" for dtype in GOLDEN_DTYPES]


def golden_cases(path: Path, device: str = "") -> list[Case]:
    """The cases that `path` holds, or, for a committed golden that isn't there yet, the built-in ones.

    `device` replaces the stored one; so a golden made on the CPU stays one on a machine that has a GPU.
    """
    if path.exists():
        with store.open(path) as golden:
            stored = [_case_of(trace) for trace in golden.cases.values()]
        return [replace(case, device=device or case.device) for case in stored]
    if path.stem not in GOLDEN_DTYPES:
        raise GoldenError(f"{path}: no such golden; give --tokens and --dtype to make a new one")
    return [replace(example(task, 0), dtype=path.stem, device=device or "cpu") for task in GOLDEN_TASKS]


def regenerate(path: Path, cases: Sequence[Case], advance: Advance = lambda _: None) -> Path:
    """Run every case on the MLX engine and stage the Traces as the pending golden of `path`; returns the pending
    file.
    """
    engine = load_engine(cases[0])
    traces = []
    for case in cases:
        advance(case.name)
        traces.append(run(engine, replace(case, device=engine.provenance["device"])))
    path.parent.mkdir(parents=True, exist_ok=True)
    return workflow.stage(path, traces)


def diff(path: Path) -> Iterator[Judged]:
    """The pending golden of `path` (actual) against the accepted one (expected), case by case."""
    with store.open(workflow.pending_path(path)) as pending, store.open(path) as accepted:
        if gone := sorted(accepted.cases.keys() - pending.cases.keys()):
            raise GoldenError(f"{path}: case {gone[0]!r} is not in the pending golden; regenerate it")
        for name, actual in pending.cases.items():
            if name not in accepted.cases:
                raise GoldenError(f"{path}: case {name!r} is new in the pending golden; accept it or regenerate")
            yield _judge(actual, accepted.cases[name], "golden diff")


def verify(path: Path, device: str = "auto", advance: Advance = lambda _: None, *, model: str = "") -> Iterator[Judged]:
    """Re-run every case of a golden on the MLX engine and judge both runs; integrity is checked on opening.

    `model` is where the model is now, if not where the golden says. GoldenError when it isn't the same model.
    """
    with store.open(path) as golden:
        engine: Any = None
        for name, expected in golden.cases.items():
            advance(name)
            stored = _case_of(expected)
            case = replace(stored, device=device, model=model or stored.model)
            check_model(expected, model_fingerprint(case.model))
            engine = engine or load_engine(case)
            actual = run(engine, replace(case, device=engine.provenance["device"]))
            yield _judge(actual, expected, "golden verify", case.model)


def bisect(actual: Path, expected: Path | None) -> Iterator[tuple[str, ProbeResult | None]]:
    """Name and first failing probe (None: none fails) of each case of a stored golden, beside another's if given."""
    with store.open(actual) as now, store.open(expected or actual) as before:
        for name, trace in now.cases.items():
            if name not in before.cases:
                raise GoldenError(f"{expected}: has no case {name!r} to compare with")
            yield name, _judge(trace, before.cases[name], "bisect").comparison.first_failure


def _judge(actual: Trace, expected: Trace, audit: str, model: str = "") -> Judged:
    case = _case_of(actual)
    found = model_fingerprint(model or case.model)
    check_model(actual, found)
    check_model(expected, found)
    models = [load_reference(case.model, weights_dtype(trace.provenance)) for trace in (actual, expected)]
    comparison = compare(actual, expected, *models)
    return Judged(
        case=case, verdict=to_verdict(comparison, case, audit), comparison=comparison, actual=actual, expected=expected
    )


def _case_of(trace: Trace) -> Case:
    try:
        return Case.from_dict({**trace.provenance["case"], "tokens": trace.tokens.tolist()})
    except (KeyError, TypeError, ValueError) as error:
        raise GoldenError(
            f"case {trace.case!r}: its provenance doesn't say how it was run ({error}); regenerate it"
        ) from error


def weights_dtype(provenance: Mapping[str, Any]) -> str:
    return str(provenance.get("weights_dtype", provenance.get("dtype", "float32")))
