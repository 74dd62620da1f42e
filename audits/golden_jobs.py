"""The golden workflow's work: run the engine anew, and judge what is stored against what is computed.

A stored Trace is judged like a live one, by same-input replay on its own recorded inputs: a value that was altered
after the run doesn't follow from its inputs, and is named, whatever its hash says.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from audits.cases import TRACES_FOLDER, Case, example, model_folder
from audits.compare import ProbeResult, compare
from audits.runs import load_engine, load_reference, model_fingerprint, run, weights_dtype
from audits.side_by_side import Judged, to_verdict
from goldens import store, workflow
from goldens.errors import GoldenError
from goldens.matching import check_model
from goldens.trace import Trace
from reference.replay import check_claims

# The committed goldens, and what each is of. copy's prompt of 46 tokens wraps the sliding window of 32; a short prompt
# goes through the engine's own kernels. Together they stay under 20 MB.
GOLDENS: Mapping[str, Mapping[str, str]] = {
    **{dtype: {"task": "copy", "dtype": dtype} for dtype in ("float32", "float16", "bfloat16")},
    "q4_k-host": {"task": "count", "dtype": "float32", "experts": "q4_k", "kernels": "host"},
}
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
    return [TRACES_FOLDER / f"{name}.h5" for name in GOLDENS]


def golden_cases(path: Path, device: str = "") -> list[Case]:
    """The cases that `path` holds, or, for a committed golden that isn't there yet, the built-in ones.

    `device` replaces the stored one; so a golden made on the CPU stays one on a machine that has a GPU.
    """
    if path.exists():
        with store.open(path) as golden:
            stored = [_case_of(trace) for trace in golden.cases.values()]
        return [replace(case, device=device or case.device) for case in stored]
    if path.stem not in GOLDENS:
        raise GoldenError(f"{path}: no such golden; give --tokens and --dtype to make a new one")
    options: dict[str, Any] = dict(GOLDENS[path.stem])
    return [replace(example(options.pop("task"), 0), device=device or "cpu", **options)]


def regenerate(path: Path, cases: Sequence[Case], advance: Advance = lambda _: None) -> Path:
    """Run every case on the MLX engine and stage the Traces as the pending golden of `path`; returns that file."""
    check_name(path)
    engine = load_engine(cases[0], advance)
    traces = []
    for case in cases:
        advance(case.name)
        traces.append(run(engine, replace(case, device=engine.provenance["device"])))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{path}: its folder can't be made ({error.strerror}); name a file elsewhere") from error
    return workflow.stage(path, traces)


def check_name(path: Path) -> None:
    """Raise GoldenError unless `path` can be a golden's."""
    if path.suffix != ".h5" or path.name.endswith(".pending.h5") or path.is_dir():
        raise GoldenError(f"{str(path)!r} can't be a golden: name a file NAME.h5")


def diff(path: Path, model: str = "") -> Iterator[Judged]:
    """The pending golden of `path` (actual) against the accepted one (expected).

    A case that is new, or that was run on another model or prompt before, is judged against the reference.
    """
    with store.open(workflow.pending_path(path)) as pending:
        accepted = dict(store.open(path).cases) if path.exists() else {}
        if gone := sorted(accepted.keys() - pending.cases.keys()):
            raise GoldenError(f"{path}: case {gone[0]!r} is not in the pending golden; regenerate it")
        for name, actual in pending.cases.items():
            expected = accepted.get(name)
            if expected is None or not _comparable(actual, expected):
                expected = run("reference", _case_of(actual, model))
            yield _judge(actual, expected, "golden diff", f"assay golden diff {shlex.quote(str(path))}", model)


def _comparable(actual: Trace, expected: Trace) -> bool:
    same_model = actual.provenance.get("model_hash") == expected.provenance.get("model_hash")
    return same_model and np.array_equal(actual.tokens, expected.tokens)


def accept(path: Path, model: str = "", *, force: bool = False) -> str:
    """Replace the golden `path` by its pending one unless that fails its bounds; returns the failure, or nothing."""
    failures = [] if force else [probe.message for judged in diff(path, model) for probe in judged.comparison.failures]
    if not failures:
        workflow.accept(path)
    return failures[0] if failures else ""


def verify(path: Path, device: str = "auto", advance: Advance = lambda _: None, *, model: str = "") -> Iterator[Judged]:
    """Re-run every case of a golden on the MLX engine and judge both runs; integrity is checked on opening.

    `model` is where the model is now, if not where the golden says. GoldenError when it isn't the same model, or when
    the golden states another arithmetic than the engine has on that device: with weak enough claims anything would
    pass.
    """
    with store.open(path) as golden:
        engine: Any = None
        for name, expected in golden.cases.items():
            advance(name)
            case = replace(_case_of(expected, model), device=device)
            model_folder(case.checkpoint, advance)
            check_model(expected, model_fingerprint(case.checkpoint))
            engine = engine or load_engine(case, advance)
            _check_arithmetic(expected, engine.provenance)
            actual = run(engine, replace(case, device=engine.provenance["device"]))
            command = f"assay golden verify {shlex.quote(str(path))} --device {engine.provenance['device']}"
            yield _judge(actual, expected, "golden verify", command, model)


def bisect(actual: Path, expected: Path | None, model: str = "") -> Iterator[tuple[str, ProbeResult | None]]:
    """Name and first failing probe (None: none fails) of each case of a stored golden, beside another's if given."""
    with store.open(actual) as now, store.open(expected or actual) as before:
        for name, trace in now.cases.items():
            if name not in before.cases:
                raise GoldenError(f"{expected}: has no case {name!r} to compare with")
            command = shlex.join(["assay", "bisect", *(str(path) for path in (actual, expected) if path)])
            yield name, _judge(trace, before.cases[name], "bisect", command, model).comparison.first_failure


def _check_arithmetic(stored: Trace, engine: Mapping[str, Any]) -> None:
    here = all(stored.provenance.get(key) == engine[key] for key in ("engine", "device", "dtype"))
    if not here or stored.provenance.get("arithmetic") == engine["arithmetic"]:
        return
    told = stored.provenance.get("arithmetic")
    ops = [op for op, claims in engine["arithmetic"].items() if not isinstance(told, Mapping) or told.get(op) != claims]
    raise GoldenError(
        f"case {stored.case!r}: states another arithmetic than {engine['engine']} has on {engine['device']}"
        f" (first {ops[0] if ops else 'an op that is not there'}); run `assay golden regenerate`"
    )


def _judge(actual: Trace, expected: Trace, audit: str, command: str, model: str = "") -> Judged:
    case = _case_of(actual, model)
    found = model_fingerprint(case.checkpoint)
    for trace in (actual, expected):
        check_model(trace, found)
        check_claims(trace.provenance.get("arithmetic", {}), str(trace.provenance.get("dtype")))
    models = [load_reference(case.checkpoint, weights_dtype(trace.provenance)) for trace in (actual, expected)]
    comparison = compare(actual, expected, *models)
    verdict = to_verdict(comparison, case, audit, command + (f" --model {shlex.quote(model)}" if model else ""))
    return Judged(case=case, verdict=verdict, comparison=comparison, actual=actual, expected=expected)


def _case_of(trace: Trace, model: str = "") -> Case:
    try:
        case = Case.from_dict({**trace.provenance["case"], "tokens": trace.tokens.tolist()})
    except (KeyError, TypeError, ValueError) as error:
        raise GoldenError(
            f"case {trace.case!r}: its provenance doesn't say how it was run ({error}); regenerate it"
        ) from error
    return replace(case, model=model or case.model)
