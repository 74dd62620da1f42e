"""`assay.run`, `assay.compare`, `assay.bisect`, `assay.audit`: the main jobs from Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from audits.cases import model_folder
from audits.catalogue import Auditable
from audits.catalogue import audit as run_audit
from audits.catalogue import contracts as all_contracts
from audits.catalogue import replay as replay_case
from audits.compare import Comparison, ProbeResult
from audits.compare import compare as compare_traces
from audits.runs import load_reference, model_fingerprint, weights_dtype
from audits.runs import run as run_case
from audits.verdict import Report
from goldens.matching import check_model
from goldens.trace import Trace
from reference.replay import check_claims


def run(engine: Any, case: Mapping[str, Any]) -> Trace:
    """The Trace of one run: `engine` is "mlx", "reference", or an object with `run(tokens, tap=, chunk=, decode=)` and
    `provenance`.

    `case`: {"tokens": [ids], "model": "shipped" or a folder, "options": {"dtype", "device", "chunk", "decode",
    "experts", "kernels"}, "seed"}; all but "tokens" have defaults. Raises ValueError for a case that can't be run.
    """
    return run_case(engine, case)


def compare(actual: Trace, expected: Trace, *, model: str | Path | None = None) -> Comparison:
    """Judge two Traces of the same tokens, probe by probe: `.ok`, `.first_failure`, `.probes`, `.flips`, `.logits`.

    Both runs are replayed on their own recorded inputs, with the model that their provenance names ("model", checked
    against "model_hash") or that `model` names; traces that name none are compared within the dtype's tolerance, and
    `.judged_by` says so. Raises ValueError when the tokens differ or the model at hand is another one.
    """
    for which, given in (("actual", actual), ("expected", expected)):
        if not isinstance(given, Trace):
            raise ValueError(
                f"{which} is of type {type(given).__name__}; a Trace is expected, as assay.run returns it and"
                " assay.golden.open(PATH).trace is one"
            )
    name = str(model) if model is not None else actual.provenance.get("model")
    if name is None:
        return compare_traces(actual, expected, None)
    if not model_folder(name).is_dir():
        raise ValueError(f"model {name!r} is no folder here; pass model=FOLDER")
    for trace in (actual, expected):
        check_claims(trace.provenance.get("arithmetic", {}), str(trace.provenance.get("dtype", "float32")))
        if model is None or "model_hash" in trace.provenance:
            check_model(trace, model_fingerprint(name))
    models = [load_reference(name, weights_dtype(trace.provenance)) for trace in (actual, expected)]
    return compare_traces(actual, expected, *models)


def bisect(actual: Trace, expected: Trace, *, model: str | Path | None = None) -> ProbeResult | None:
    """The first op, in the order of computation, whose own error exceeds its bound; None when every op is honest.

    Each op is judged on the inputs that its own run recorded (same-input replay), so an error is named where it is
    made.
    """
    return compare(actual, expected, model=model).first_failure


def audit(
    names: str | Sequence[str],
    candidate: Any = None,
    *,
    framework: str | None = None,
    device: str | None = None,
    claims: Mapping[str, str] | None = None,
    dtypes: Sequence[str] = (),
    layouts: Sequence[str] = (),
    quick: bool = True,
    full: bool = False,
    seed: int = 0,
) -> Report:
    """Judge an implementation by contracts: `.ok`, `.verdicts` (each with .outcome, .case, .evidence, .message).

    names: one contract, several, or none for all (`assay.contracts()` has them). candidate: a function that takes the
    contract's arguments (a factory, for caches), "FILE.py:NAME", a dict of these by contract, for moe_matmul also a
    TOML file that describes Metal kernels; None: the engine's own. framework: of the arrays that it is given, "numpy"
    (the default), "mlx" or "torch". device: what mlx or torch computes on; NumPy has the CPU alone. claims: its
    arithmetic, e.g. {"accumulate": "float32", "intermediate": "input"}; by default what honest code of the inputs'
    dtype may do. dtypes: the ones to try, by default float32, float16 and bfloat16. layouts: how operands may lie in
    memory besides contiguous, by default in every way (audits/frameworks.py). `quick` runs the boundaries, `full`
    everything crossed. Raises ValueError for bad input; of several contracts, one that can't judge is a verdict.
    """
    return run_audit(
        names,
        candidate,
        framework=framework,
        device=device,
        claims=claims,
        dtypes=dtypes,
        layouts=layouts,
        full=full or not quick,
        seed=seed,
    )


def replay(case: Mapping[str, Any], candidate: Any = None) -> Report:
    """Judge one case again, bit for bit, as a verdict recorded it (`verdict.case`).

    `candidate`: the function, if it was one of your program; what was named FILE.py:NAME or is built in is found again.
    """
    return replay_case(case, candidate)


def contracts() -> Mapping[str, Auditable]:
    """Every contract by name: each has .signature, .arguments, .relations and .doc."""
    return all_contracts()
