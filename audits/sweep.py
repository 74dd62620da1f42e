"""Running a contract on a candidate: the boundary corpus, what Hypothesis draws, and the relations.

Every case gives one verdict. The first failure of each check is shrunk to the smallest case that still fails it; a
verdict's case is all that is needed to run it again, bit for bit: `replay`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from audits.candidate import Candidate, CandidateError, ChangedInput
from audits.contract import Call, Contract, Finding, Outputs, Refusable, Relation
from audits.domain import Case, draw, filled, shrink, strategy, turn
from audits.errors import CannotJudge, DeviceLost, InternalError
from audits.frameworks import DTYPES, LAYOUTS, differs
from audits.outputs import NO_ARRAY, digest_of, malformed
from audits.relations import RERUN
from audits.verdict import Verdict
from reference.arithmetic import Arithmetic

Advance = Callable[[str], None]
FULL_EXAMPLES = 25  # times as many drawn cases as in a quick run
# A relation is a field of the case, so that a failure of it replays; "" is the comparison with the reference.
VALUES = ""
# What else a verdict's case holds, besides the fields of the domain.
RECORDED = ("contract", "candidate", "framework", "claims", "relation", "output_dtypes")
PAIR = "after "  # the relation "after N": what is due, when base case N has just run on other data


class _Lacking(Exception):
    """A relation needs an optional argument that the candidate doesn't take."""


@dataclass(frozen=True)
class _Run:
    """A candidate with the arrays of one case's layout and dtype; `told` collects what it was asked and gave."""

    run: Callable[[Call], Outputs]
    arithmetic: Arithmetic
    dtypes: Sequence[str] = ()
    told: list[tuple[Call, Outputs]] = field(default_factory=list)

    def __call__(self, call: Call) -> Outputs:
        outputs = self.run(call)
        self.told.append((call, outputs))
        return outputs


@dataclass
class Sweep:
    """One contract, one candidate, and what has been seen of it so far."""

    contract: Contract
    candidate: Candidate
    shrinking: bool = True
    lacking: tuple[str, ...] = ()
    form: Case = field(default_factory=dict)
    taken: list[str] = field(default_factory=list)
    refused: list[tuple[str, Refusable]] = field(default_factory=list)
    doubtful: list[tuple[Case, str]] = field(default_factory=list)
    shrunk: set[str] = field(default_factory=set)
    output_dtypes: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.candidate = self.contract.adapt(self.candidate)
        self.lacking = self.candidate.lacks(self.contract.arguments)
        self.form = {**self.contract.settled(self.candidate), **self.contract.forms[0]}

    def run(self, *, full: bool, seed: int, advance: Advance) -> Iterator[Verdict]:
        """All verdicts: first what is left out and why, then the corpus, the relations and the drawn cases."""
        wanted = self._wanted_dtypes()
        try:
            yield from self._run(wanted, full=full, seed=seed, advance=advance)
        except DeviceLost as error:
            yield self._verdict("could-not-judge", {}, f"{error}; nothing is judged from here on")
        except Exception as error:
            ours = InternalError(error)
            yield self._verdict("could-not-judge", {}, f"nothing is judged from here on: {ours}", **ours.evidence)

    def _run(self, wanted: Sequence[str], *, full: bool, seed: int, advance: Advance) -> Iterator[Verdict]:
        if left_out := [d for d in self.candidate.dtypes if d not in wanted]:
            yield self._verdict("skipped", {}, f"{self.contract.name} has no {', '.join(left_out)}")
        if not wanted:
            return
        forms = self.contract.forms
        found = (f for f in forms if len(forms) == 1 or any(not self._refuses(dtype, f) for dtype in wanted))
        form = next(found, forms[0])
        if form != forms[0]:
            self.form = {**self.form, **form}
            told = ", ".join(f"{name}={value}" for name, value in form.items())
            yield self._verdict("skipped", {}, f"the candidate takes its operands with {told} alone")
        for dtype in wanted:
            reason = self._refuses(dtype)
            if reason:
                yield self._verdict("skipped", {"dtype": dtype}, f"{dtype} is left out: the candidate {reason}")
            else:
                self.taken.append(dtype)
        if self.lacking:
            yield self._verdict(
                "skipped", {}, f"the candidate takes no {', '.join(self.lacking)}: what needs it is left out"
            )
        if not self.taken:
            yield self._fails_everywhere(wanted[0])
            return
        yield from self._find_refused()
        # A first call that was wrong where later ones are right is seen here or never.
        yield from (self._at_times(case) for case, check in self.doubtful if not self._fails(case, check))
        for case in self._cases(self.taken, full=full, seed=seed):
            advance(f"{self.contract.name} {case['dtype']} {case['relation'] or 'values'}")
            try:
                yield self.verdict(case)
            except DeviceLost as error:
                yield self._verdict("could-not-judge", case, f"{error}; nothing is judged from here on")
                return

    @property
    def _plainest(self) -> Case:
        """The first base case that the candidate takes all arguments of."""
        domain, bases = self.contract.domain, self.contract.bases
        return next((b for b in bases if not self._needs_what_lacks(filled(domain, b))), bases[0])

    def _wanted_dtypes(self) -> Sequence[str]:
        """The dtypes to try, of those that the contract has; ValueError for one that there isn't at all."""
        known = self.contract.domain["dtype"].values  # type: ignore[union-attr]  # dtype is always a Choice
        if unknown := [d for d in self.candidate.dtypes if d not in DTYPES]:
            raise ValueError(f"{self.contract.name} has no dtype {unknown[0]!r}; there is {', '.join(known)}")
        return [d for d in dict.fromkeys(self.candidate.dtypes) if d in known] if self.candidate.dtypes else known

    def _find_refused(self) -> Iterator[Verdict]:
        """A verdict for each part of the domain that the candidate refuses in a dtype; what needs an argument that it
        lacks is left out anyway.
        """
        for part in self.contract.refusable:
            for dtype in self.taken:
                if self._needs_what_lacks(self._plain(dtype, part.case)):
                    continue
                if reason := self._refuses(dtype, part.case):
                    self.refused.append((dtype, part))
                    told = f"{part.name} is left out in {dtype}: the candidate {reason}"
                    yield self._verdict("skipped", {"dtype": dtype}, told)

    def _plain(self, dtype: str, changed: Case | None = None) -> dict[str, Any]:
        """The plainest case of `dtype`, with some fields `changed`."""
        plain = {**self._plainest, **self.form, **(changed or {}), "dtype": dtype}
        return {**filled(self.contract.domain, plain), "relation": VALUES}

    def _refuses(self, dtype: str, setting: Case | None = None) -> str:
        """What the candidate raises on the plainest case of `dtype`, with a setting if there is one, or ""."""
        case = self._plain(dtype, setting)
        try:
            finding, _ = self._check(case)
        except CannotJudge:
            return ""
        if finding is not None and finding.check == "raises":
            return finding.message
        if finding is not None:
            self.doubtful.append((case, finding.check))
        return ""

    def _fails_everywhere(self, dtype: str) -> Verdict:
        """The verdict of a candidate that raises on the plainest case of every dtype: that of the first such case."""
        case = self._plain(dtype)
        verdict = self.verdict(case)
        return verdict if verdict.outcome == "fail" else self._at_times(case)

    def _cases(self, dtypes: Sequence[str], *, full: bool, seed: int) -> Iterator[dict[str, Any]]:
        """Every case of the sweep that is valid and that the candidate can take, each once."""
        seen = set()
        for case in self._all_cases(dtypes, full=full, seed=seed):
            case |= self.form
            key = repr(sorted(case.items(), key=str))
            if key in seen or not self.contract.valid(case) or self._needs_what_lacks(case):
                continue
            if not self.applies(case) or case["layout"] not in self.candidate.layouts or self._has_refused(case):
                continue
            seen.add(key)
            yield case

    def _all_cases(self, dtypes: Sequence[str], *, full: bool, seed: int) -> Iterator[dict[str, Any]]:
        domain, bases = self.contract.domain, self.contract.bases
        for dtype in dtypes:
            for i, base in enumerate(bases):
                plain = {**filled(domain, {"seed": seed % 8, **base}), "dtype": dtype, "relation": VALUES}
                yield plain
                yield from ({**plain, "relation": r.name} for r in self._relations(plain))
                if dtype == dtypes[0]:
                    # Other data than this base has had so far, or what a candidate has kept of it would be right.
                    other = {**plain, "seed": (plain["seed"] + 1) % 8}
                    before = (
                        j for j, one in enumerate(bases) if self._possible({**filled(domain, one), "dtype": dtype})
                    )
                    yield from ({**other, "relation": f"{PAIR}{j}"} for j in before)
                if full or i == 0 or dtype == dtypes[0]:
                    yield from self._layouts(plain)
        for i, part in enumerate(self.contract.corpus(full)):
            chosen = (part["dtype"],) if "dtype" in part else dtypes if full else (dtypes[turn(i, len(dtypes), seed)],)
            fields = {name: value for name, value in part.items() if name != "relation"}
            for dtype in (d for d in chosen if d in dtypes):
                case = filled(domain, {"dtype": dtype, "seed": (seed + i) % 8, **fields})
                yield {**case, "relation": part.get("relation", VALUES)}
        count = self.contract.examples * (FULL_EXAMPLES if full else 1)
        fits = strategy(domain, lambda case: case["dtype"] in dtypes and self.contract.valid(case))
        yield from ({**case, "relation": VALUES} for case in draw(fits, count, seed))

    def _relations(self, case: Case) -> Iterator[Relation]:
        known = (RERUN, *self.contract.relations)
        return (r for r in known if r.applies(case) and not set(r.needs) & set(self.lacking))

    def _layouts(self, plain: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Each array operand of a base case in each layout, one at a time."""
        if not self.contract.valid(plain) or self._needs_what_lacks(plain):
            return
        for name, value in self.contract.call(plain).args.items():
            first = value[0] if isinstance(value, tuple) else value
            if isinstance(first, np.ndarray):
                layouts = (layout for layout in LAYOUTS[1:] if differs(first, layout))
                yield from ({**plain, "operand": name, "layout": layout} for layout in layouts)

    def _needs_what_lacks(self, case: Case) -> bool:
        return bool(self.lacking) and bool(set(self.lacking) & self.contract.call(case).args.keys())

    def verdict(self, case: Case) -> Verdict:
        """Judge one case; the first failure of each check is shrunk."""
        try:
            finding, digest = self._check(case)
        except CannotJudge as error:
            return self._verdict("could-not-judge", case, str(error), **error.evidence)
        except _Lacking:
            return self._verdict("skipped", case, f"the candidate takes no {', '.join(self.lacking)}: this needs it")
        if finding is None:
            return self._verdict("pass", case, "within its bound" if not case["relation"] else "holds", digest=digest)
        if not self.shrinking or finding.check in self.shrunk:
            return self._failed(case, finding, digest)
        self.shrunk.add(finding.check)
        try:
            return self._smallest(case, finding.check)
        except DeviceLost:
            return self._failed(case, finding, digest)

    def _smallest(self, case: Case, check: str) -> Verdict:
        """The verdict of the smallest case found that still fails `check`."""
        usual = dict(self.output_dtypes)  # smaller cases that are tried are no measure of what is usual
        case = shrink(self.contract.domain, case, lambda c: self._fails(c, check), self._possible)
        self.output_dtypes = usual
        try:
            finding, digest = self._check(case)
        except CannotJudge:
            finding = None
        return self._at_times(case) if finding is None else self._failed(case, finding, digest, shrunk=True)

    def _failed(self, case: Case, finding: Finding, digest: str, **more: Any) -> Verdict:
        """The verdict on a finding; its case holds all that the finding depends on."""
        if finding.check == "dtype":
            kind = self.contract.dtype_key(case)
            case = {**case, "output_dtypes": {kind: list(self.output_dtypes[kind])}}
        evidence = {"check": finding.check, "digest": digest, **more, **finding.evidence}
        return self._verdict("fail", case, finding.message, **evidence)

    def _at_times(self, case: Case) -> Verdict:
        message = "fails at times and passes at times, in one and the same case"
        return self._verdict("fail", case, message, check="rerun", shrunk=True)

    def _possible(self, case: Case) -> bool:
        """Whether a case, smaller than one that failed, means something for the candidate."""
        known = not self.taken or case["dtype"] in self.taken
        possible = self.contract.valid(case) and not self._needs_what_lacks(case) and self.applies(case)
        return known and possible and not self._has_refused(case)

    def _has_refused(self, case: Case) -> bool:
        return any(case["dtype"] == dtype and part.covers(case) for dtype, part in self.refused)

    def applies(self, case: Case) -> bool:
        """Whether the relation of a case means something for it, and for the candidate."""
        relation = case.get("relation", VALUES)
        return relation == VALUES or relation.startswith(PAIR) or relation in (r.name for r in self._relations(case))

    def _fails(self, case: Case, check: str) -> bool:
        try:
            finding, _ = self._check(case)
        except (CannotJudge, _Lacking):
            return False
        return finding is not None and finding.check == check

    @np.errstate(all="ignore")  # what a candidate gives may be anything
    def _check(self, case: Case) -> tuple[Finding | None, str]:
        """What is wrong with the candidate in one case, or None, and a digest of its outputs."""
        self.candidate.at(self._recorded(case))
        digest = ""
        try:
            call = self.contract.call(case)
            if case["relation"].startswith(PAIR):
                before = self.contract.bases[int(case["relation"].removeprefix(PAIR))]
                same = {name: case[name] for name in ("dtype", *self.form)}
                self._outputs(filled(self.contract.domain, {**before, **same, "seed": (case["seed"] + 1) % 8}))
            outputs = self._runner(case)(call)
            digest = digest_of(outputs)
            if wrong := malformed(outputs, self.contract):
                return wrong, digest
            if case["relation"] == VALUES or case["relation"].startswith(PAIR):
                judged = self.contract.judge(call, outputs, self.arithmetic(case))
                return self._dtype_finding(case, outputs) or judged, digest
            relation = next(r for r in self._relations(case) if r.name == case["relation"])
            return self._broken(relation, case, call, outputs), digest
        except ChangedInput as error:
            return Finding(check="inputs unchanged", message=str(error)), ""
        except CandidateError as error:
            return Finding(check="raises", message=str(error)), ""
        except (CannotJudge, DeviceLost, _Lacking):
            raise
        except Exception as error:
            raise InternalError(error) from error

    def _broken(self, relation: Relation, case: Case, call: Call, outputs: Outputs) -> Finding | None:
        """What is wrong with a relation, or with the shape of a result that it stumbles over."""
        run = self._runner(case)
        run.told.append((call, outputs))
        try:
            problem = relation.check(run, call, outputs, case)
        except (CandidateError, CannotJudge, DeviceLost, _Lacking):
            raise
        except Exception:
            # Relations take the outputs for what is due. One that isn't is found here; else the error is ours.
            for asked, given in run.told:
                finding = malformed(given, self.contract) or self.contract.judge(asked, given, run.arithmetic)
                if finding is not None:
                    return finding
            raise
        return None if problem is None else Finding(check=relation.name, message=problem)

    def arithmetic(self, case: Case) -> Arithmetic:
        """The arithmetic that the candidate claims for a case, or what honest code of its dtype may do."""
        dtype = case["dtype"]
        return Arithmetic.claim(dtype, **{**self.contract.claims(dtype), **self.candidate.claims(dtype)})

    def _outputs(self, case: Case) -> Outputs:
        return self._runner(case)(self.contract.call(case))

    def _runner(self, case: Case) -> _Run:
        layouts = {case["operand"]: case["layout"]} if case["operand"] else {}
        dtypes = self.taken or self.candidate.dtypes or tuple(DTYPES)
        return _Run(lambda call: self._called(call, layouts), self.arithmetic(case), dtypes)

    def _called(self, call: Call, layouts: Mapping[str, str]) -> Outputs:
        if set(self.lacking) & call.args.keys():
            raise _Lacking
        return self.candidate(call, self.contract.arguments, layouts)

    def _dtype_finding(self, case: Case, outputs: Outputs) -> Finding | None:
        """Outputs whose dtype depends on anything but the inputs' dtype: a promotion by an option or a layout."""
        found = tuple(str(x.dtype) for x in outputs if x.dtype.kind not in NO_ARRAY)
        if not found:
            return None
        kind = self.contract.dtype_key(case)
        usual = self.output_dtypes.setdefault(kind, found)
        if found == usual:
            return None
        return Finding(
            check="dtype", message=f"returns {', '.join(found)} here, but {', '.join(usual)} for other {kind}"
        )

    def _recorded(self, case: Case) -> dict[str, Any]:
        """A case with all that is needed to run it again."""
        recorded: dict[str, Any] = {"contract": self.contract.name, "candidate": self.candidate.name}
        recorded["framework"] = self.candidate.framework
        if "dtype" in case and (claims := self.candidate.claims(case["dtype"])):
            recorded["claims"] = dict(claims)
        return {**recorded, **(self.contract.told(case) if case else {})}

    def _verdict(self, outcome: Any, case: Case, message: str, **evidence: Any) -> Verdict:
        recorded = self._recorded(case)
        return Verdict(outcome=outcome, audit=self.contract.name, case=recorded, message=message, evidence=evidence)


def replay(contract: Contract, case: Mapping[str, Any], candidate: Candidate) -> Verdict:
    """Run the one case that a verdict recorded; ValueError for what is no case of the contract."""
    known = {name: value for name, value in case.items() if name not in RECORDED}
    relation = case.get("relation", VALUES)
    relations = [r.name for r in (RERUN, *contract.relations)]
    if relation not in (VALUES, *relations, *(f"{PAIR}{i}" for i in range(len(contract.bases)))):
        raise ValueError(f"{contract.name} has no relation {relation!r}; there is {', '.join(relations)}")
    chosen = {**filled(contract.domain, known), "relation": relation}
    usual = case.get("output_dtypes", {})
    if not isinstance(usual, Mapping) or not all(isinstance(found, list | tuple) for found in usual.values()):
        raise ValueError("output_dtypes holds a list of dtypes for each kind of case")
    if not _buildable(contract, chosen):
        raise ValueError(f"this is no case of {contract.name}: its fields don't go together")
    sweep = Sweep(contract, candidate, shrinking=False)
    sweep.output_dtypes.update({kind: tuple(found) for kind, found in usual.items()})
    if sweep._needs_what_lacks(chosen):
        return sweep._verdict("skipped", chosen, f"the candidate takes no {', '.join(sweep.lacking)}: this needs it")
    if not sweep.applies(chosen):
        raise ValueError(f"{relation!r} means nothing for this case of {contract.name}, or for the candidate")
    try:
        return sweep.verdict(chosen)
    except DeviceLost as error:
        return sweep._verdict("could-not-judge", chosen, str(error))


def _buildable(contract: Contract, case: Case) -> bool:
    """Whether a case that somebody wrote has operands: fields may be what each can be and not go together."""
    try:
        return contract.valid(case) and bool(contract.build(case).args)
    except (ValueError, TypeError, LookupError, ArithmeticError):
        return False
