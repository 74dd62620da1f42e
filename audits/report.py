"""Showing what was judged: a table for people (rich), JSON for programs."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from audits.cache_program import program_text
from audits.compare import Comparison, ProbeResult
from audits.launched import kernel_lines
from audits.metrics import Metrics
from audits.side_by_side import Judged
from audits.verdict import Report, Verdict
from goldens import store

STYLES = {"pass": "green", "fail": "bold red", "skipped": "yellow", "could-not-judge": "yellow"}
FLIPS_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class _Row:
    """A kind of probe: the case and result with the largest own error, and the largest drift and counts over all."""

    case: str
    result: ProbeResult
    drift: Metrics | None
    flips: int
    suspicious: int


COLUMNS = ("probe", "own/bound", "worst element", "drift rel L2", "max abs", "ULP p99", "suspicious")
# How many of them, besides the outcome, fit into a terminal of that width (a pipe counts as wide).
FITTING = ((100, 7), (70, 4), (45, 2), (0, 1))


def probe_table(judged: Sequence[Judged], title: str, *, every: bool = False, width: int = 120) -> Table:
    """A rich Table: one row a kind of probe (its worst over layers and cases), or with `every` one a probe and case.

    own/bound: largest own error as a share of its bound, and where; drift: against the expected run, as a whole tensor;
    suspicious: elements inside their worst-case bound and beyond the probabilistic one.
    """
    shown = next(columns for least, columns in FITTING if width >= least)
    table = Table(title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD)
    for name in COLUMNS[:shown]:
        table.add_column(name, justify="left" if name in ("probe", "worst element") else "right", no_wrap=True)
    table.add_column("", min_width=len("skipped"))
    for row in _rows(judged, every=every):
        *cells, outcome = _cells(row)
        table.add_row(*cells[:shown], outcome)
    return table


def _rows(judged: Sequence[Judged], *, every: bool) -> Iterable[_Row]:
    results = [(j.case.name, result) for j in judged for result in j.comparison.probes]
    if every:
        return [_row([one]) for one in results]
    kinds: dict[str, list[tuple[str, ProbeResult]]] = {}
    for case, result in results:
        kinds.setdefault(_kind(result.probe), []).append((case, result))
    return [_row(group) for group in kinds.values()]


def _row(group: Sequence[tuple[str, ProbeResult]]) -> _Row:
    case, worst = max(group, key=lambda one: _severity(one[1]))
    drifts = [result.drift for _, result in group if result.drift is not None]
    return _Row(
        case=case,
        result=worst,
        # NaN first: a tensor with one has no relative error, and is the worst there is.
        drift=max(drifts, key=lambda m: (m.rel_l2 != m.rel_l2, m.rel_l2), default=None),
        flips=sum(len(result.flips) for _, result in group),
        suspicious=sum(result.own.suspicious for _, result in group if result.own is not None),
    )


def _kind(probe: str) -> str:
    """`layers.3.moe.gate` → `moe.gate`."""
    parts = probe.split(".")
    return ".".join(parts[2:]) if parts[0] == "layers" else probe


def _severity(result: ProbeResult) -> tuple[int, float]:
    rank = {"fail": 3, "could-not-judge": 2, "skipped": 1, "pass": 0}[result.outcome]
    if result.own is not None and result.own.metrics is not None:
        return rank, result.own.metrics.ratio
    return rank, float(len(result.flips))


def _cells(row: _Row) -> list[str]:
    result, drift = row.result, row.drift
    own = result.own.metrics if result.own is not None else None
    layer = f" layer {result.probe.split('.')[1]}" if result.probe.startswith("layers.") else ""
    where, share = row.case + layer, f"{row.flips} flips" if row.flips else "–"
    if own is not None:
        share = _number(own.ratio)
        where += " [" + ",".join(str(i) for i in own.worst.index) + "]"
    figures = [_number(x) for x in (drift.rel_l2, drift.max_abs, drift.ulp[99])] if drift is not None else ["–"] * 3
    outcome = f"[{STYLES[result.outcome]}]{result.outcome}[/]"
    return [_kind(result.probe), share, escape(where), *figures, str(row.suspicious or "–"), outcome]


def _number(x: float) -> str:
    return f"{x:.3g}"


def summary_lines(judged: Sequence[Judged]) -> list[str]:
    """Lines under the table: kernels that ran, agreement of the logits, answers, flips with their margins."""
    lines = kernel_lines(j.actual.provenance.get("kernels", {}) for j in judged)
    agreements = [j.comparison.logits for j in judged if j.comparison.logits is not None]
    if agreements:
        tokens = sum(a.tokens for a in agreements)
        top1 = sum(a.top1 * a.tokens for a in agreements) / tokens
        top5 = sum(a.top5 * a.tokens for a in agreements) / tokens
        top20 = sum(a.top20 * a.tokens for a in agreements) / tokens
        kl, gap = max(a.kl_max for a in agreements), max(a.max_abs for a in agreements)
        lines.append(
            f"logits over {tokens} tokens: top-1 equal {top1:.2%}, top-5 overlap {top5:.2%}, top-20 {top20:.2%},"
            f" KL at most {kl:.3g} nats, max |Δ| {gap:.3g},"
            f" smallest top-1 margin {min(a.smallest_margin for a in agreements):.3g}"
        )
    if any(j.case.answer for j in judged):
        right = [(_answer_right(j, "actual"), _answer_right(j, "expected")) for j in judged if j.case.answer]
        lines.append(
            f"answers right: engine {sum(a for a, _ in right)} of {len(right)},"
            f" reference {sum(e for _, e in right)} of {len(right)}"
        )
    flips = [(j.case.name, flip) for j in judged for flip in j.comparison.flips]
    for name, f in flips[:FLIPS_SHOWN]:
        lines.append(
            f"flip: {name} {f.probe}[{f.token},{f.slot}] {f.old} → {f.new}, margin {f.margin:.3g}, scores moved"
            f" {f.drift:.3g}: {'which explains it' if f.explained else 'which does NOT explain it'}"
        )
    if len(flips) > FLIPS_SHOWN:
        lines.append(f"flips: {len(flips) - FLIPS_SHOWN} more (--json has all)")
    return lines


def _answer_right(judged: Judged, which: str) -> bool:
    trace = judged.actual if which == "actual" else judged.expected
    start, token = judged.case.answer, trace.probes.get("token")
    return token is not None and bool((token[start - 1 : -1] == trace.tokens[start:]).all())


def verdict_line(verdict: Verdict) -> str:
    """One line of rich markup for a verdict."""
    style = STYLES[verdict.outcome]
    name = verdict.case.get("name", "")
    dtype = verdict.case.get("options", {}).get("dtype", "")
    check = f"[{verdict.evidence['check']}]" if "check" in verdict.evidence else ""
    what = " ".join(part for part in (verdict.audit, dtype, name, check) if part)
    return f"[{style}]{verdict.outcome.upper()}[/] {escape(what)}: {escape(verdict.message)}"


def case_line(verdict: Verdict) -> str:
    """The case in one line: what differs from nothing, the seed last; "" for a contract that came to no case."""
    hidden = ("contract", "candidate", "framework")
    told = {k: v for k, v in verdict.case.items() if k not in hidden and v not in ("", None)}
    if "program" in told:
        told["program"] = f"[{program_text(told['program'])}]"
    return " ".join(f"{k}={v}" for k, v in told.items())


def report_json(report: Report, judged: Sequence[Judged] = ()) -> str:
    """The whole report as JSON; non-finite numbers are null."""
    body = {
        "ok": report.ok,
        "verdicts": [asdict(verdict) for verdict in report.verdicts],
        "runs": [
            {
                "case": j.case.as_dict(),
                "engine": {k: v for k, v in j.actual.provenance.items() if k != "tensor_hashes"},
                **comparison_dict(j.comparison),
            }
            for j in judged
        ],
    }
    return json.dumps(_finite(body), indent=1)


def comparison_dict(comparison: Comparison) -> dict[str, Any]:
    """A Comparison as plain data, without arrays."""
    first = comparison.first_failure
    return {
        "outcome": comparison.outcome,
        "first_failure": first.probe if first else None,
        "message": comparison.message,
        "logits": asdict(comparison.logits) if comparison.logits else None,
        "probes": [_probe_dict(probe) for probe in comparison.probes],
    }


def _probe_dict(result: ProbeResult) -> dict[str, Any]:
    def own(which: Any) -> Any:
        if which is None:
            return None
        metrics = asdict(which.metrics) if which.metrics else None
        return {
            "outcome": which.outcome,
            "message": which.message,
            "suspicious": which.suspicious,
            "metrics": metrics,
            "wrong": [asdict(wrong) for wrong in which.wrong],
        }

    return {
        "probe": result.probe,
        "outcome": result.outcome,
        "message": result.message,
        "own": own(result.own),
        "expected_own": own(result.expected_own),
        "drift": asdict(result.drift) if result.drift else None,
        "inherited": result.inherited,
        "flips": [{**asdict(flip), "explained": flip.explained} for flip in result.flips],
    }


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def golden_lines(path: Path, *, every: bool = False) -> Iterable[str]:
    """What a golden holds: hashes, and for each case its provenance and probes (with `every`, one line a probe)."""
    with store.open(path) as golden:
        yield f"{path}: {path.stat().st_size:,} bytes, content {golden.content_hash}"
        for name, trace in golden.cases.items():
            told = {
                k: v for k, v in trace.provenance.items() if k not in ("tensor_hashes", "config", "arithmetic", "case")
            }
            size = sum(array.nbytes for array in trace.probes.values())
            yield f"  case {name}: {len(trace.tokens)} tokens, {len(trace.probes)} probes, {size:,} bytes unpacked"
            yield from (f"    {key}: {value}" for key, value in told.items())
            for probe, array in trace.probes.items() if every else ():
                dims = " ".join(f"{label}={n}" for label, n in zip(trace.dims(probe), array.shape, strict=True))
                yield f"    {probe}: {array.dtype} {dims}"


@dataclass(frozen=True, kw_only=True)
class Tally:
    """The verdicts of one contract, or of one Metal kernel, counted; `what` says what failed."""

    name: str
    cases: int
    failed: int
    unjudged: int
    skipped: int
    what: str
    outcome: str


def tally(verdicts: Sequence[Verdict]) -> list[Tally]:
    """One Tally a contract, or a kernel where one ran, in the order of the verdicts."""
    groups: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        groups.setdefault(str(verdict.evidence.get("kernel", verdict.audit)), []).append(verdict)
    return [_tally(name, group) for name, group in groups.items()]


def _tally(name: str, group: Sequence[Verdict]) -> Tally:
    count = Counter(verdict.outcome for verdict in group)
    failed = [verdict for verdict in group if verdict.outcome == "fail"]
    checks = Counter(str(v.evidence["check"]) for v in failed if "check" in v.evidence)
    what = [f"{check} ({n})" for check, n in checks.items()]
    if shares := [v.evidence["share"] for v in failed if v.evidence.get("share") and "kernel" in v.evidence]:
        firsts = [v.evidence["first_bad_token"] for v in failed if v.evidence.get("first_bad_token") is not None]
        what.append(f"up to {max(shares):.1%} of the elements, from token {min(firsts)} on")
    if boundaries := sorted({v.evidence["boundary"] for v in failed if v.evidence.get("boundary") is not None}):
        what.append("right below " + ", ".join(map(str, boundaries)))
    if faults := sum(len(v.evidence.get("faults", ())) for v in group):
        what.append(f"{faults} faults")
    judged = count["pass"] + count["fail"]
    outcome = "fail" if failed else "could-not-judge" if count["could-not-judge"] else "pass" if judged else "skipped"
    return Tally(
        name=name,
        cases=judged,
        failed=count["fail"],
        unjudged=count["could-not-judge"],
        skipped=count["skipped"],
        what="; ".join(what),
        outcome=outcome,
    )


def audit_table(verdicts: Sequence[Verdict]) -> Table:
    """One row a contract, or a Metal kernel that ran: how many cases were judged and failed, and what failed."""
    table = Table(title="audit", title_justify="left", header_style="bold", box=SIMPLE_HEAD)
    for name in ("judged", "cases", "failed", "not judged", "skipped", "what failed", ""):
        table.add_column(name, justify="left" if name in ("judged", "what failed", "") else "right")
    for row in tally(verdicts):
        numbers = (str(n or "–") for n in (row.cases, row.failed, row.unjudged, row.skipped))
        table.add_row(escape(row.name), *numbers, escape(row.what), f"[{STYLES[row.outcome]}]{row.outcome}[/]")
    return table


class Noticed(Protocol):
    """A planted bug and the checks that noticed it, of a Metal kernel (audits/mutants.py) or of Python
    (audits/planted.py).
    """

    @property
    def mutant(self) -> Any: ...
    @property
    def messages(self) -> Mapping[str, str]: ...
    @property
    def ok(self) -> bool: ...


def mutant_table(catches: Sequence[Noticed]) -> Table:
    """Which checks caught which planted bug; a bug that a check had to catch and didn't is a failure."""
    table = Table(title="planted bugs", title_justify="left", header_style="bold", box=SIMPLE_HEAD)
    for name in ("bug", "caught by", "missed by", "", "what it is"):
        table.add_column(name)
    for one in catches:
        missed = [check for check in one.mutant.caught_by if check not in one.messages]
        outcome = "pass" if one.ok else "fail"
        source = f" ({one.mutant.source})" if one.mutant.source else ""
        table.add_row(
            f"{one.mutant.contract}/{one.mutant.name}",
            ", ".join(one.messages) or "–",
            ", ".join(missed) or "–",
            f"[{STYLES[outcome]}]{outcome}[/]",
            escape(one.mutant.title + source),
        )
    return table
