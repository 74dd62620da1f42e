"""The contract of a cache: what its factory is called with, and the programs that its objects must run like a list.

audits/cache_machine.py runs one program; here a candidate is taken through all of them: a fixed corpus, drawn ones, and
growth over a few hundred decode steps. Each gives one verdict, whose case is all that is needed to run it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from audits import growth
from audits.cache_contents import Found
from audits.cache_machine import Invalid, Machine
from audits.cache_object import Lacks, copies, has, make, parameters, takes_window
from audits.cache_program import Op, check_program
from audits.cache_shrink import shrink
from audits.candidate import Candidate, CandidateError
from audits.contract import Argument, Finding, arguments_of
from audits.errors import CannotJudge, InternalError
from audits.frameworks import DTYPES
from audits.verdict import Verdict

Advance = Callable[[str], None]

# What an operation of a program asks of the object.
NEEDS: Mapping[str, tuple[str, ...]] = {
    "trim": ("trim",),
    "trim_front": ("maybe_trim_front",),
    "restore": ("state",),
    "copy": ("copy",),
    "left_pad": ("prepare",),
    "right_pad": ("prepare", "finalize"),
    "filter": ("filter",),
    "extend": ("extend",),
    "extract": ("extract",),
    "merge": ("merge",),
}
CHECKS = ("visible tokens", "values", "dtype", "finite", "offset", "state", "independence", *growth.CHECKS)
FULL_EXAMPLES = 50  # times as many drawn programs as in a quick audit


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A program and what it runs on: the factory's options, rows of an unbatched cache, heads, dims (or the usual)."""

    program: Sequence[Op]
    options: Mapping[str, Any] = field(default_factory=dict)
    batch: int = 1
    heads: int = 1
    dims: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class CacheContract:
    """A cache's contract.

    signature: as its factory is called. operations: what programs may do with the object, besides "feed". settings:
    the factory's options, the plainest first, of which a drawn program takes one. refusable: values of an option that a
    factory needn't take; they are left out if it raises. corpus: the programs that are always run. dims: D and Dv.
    examples: programs that are drawn in a quick audit.
    """

    name: str
    signature: str
    doc: str
    operations: Sequence[str]
    settings: Sequence[Mapping[str, Any]]
    corpus: Callable[[bool], Iterable[Plan]]
    refusable: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    dims: tuple[int, int] = (64, 32)
    examples: int = 40

    @property
    def arguments(self) -> tuple[Argument, ...]:
        """What the factory is called with."""
        return arguments_of(self.signature)

    @property
    def relations(self) -> Sequence[str]:
        """What is checked beside the tokens that attention sees."""
        return CHECKS

    @property
    def batched(self) -> bool:
        """Whether each row has its own tokens."""
        return any(a.name == "left_padding" for a in self.arguments)

    def audit(
        self,
        candidate: Candidate,
        *,
        full: bool = False,
        seed: int = 0,
        advance: Advance = lambda _: None,
        shrinking: bool = True,
    ) -> Iterator[Verdict]:
        """Judge a factory of caches, one verdict a program; first what is left out, and why."""
        yield from CacheSweep(self, candidate, shrinking=shrinking).run(full=full, seed=seed, advance=advance)

    def replay(self, case: Mapping[str, Any], candidate: Candidate) -> Verdict:
        """Judge the one case that a verdict recorded; ValueError for what is no case of the contract."""
        known = {**self._blank(), **{name: case[name] for name in self.fields if name in case}}
        try:
            self._check_case(known)
        except ValueError as error:
            raise ValueError(f"this is no case of {self.name}: {error}") from error
        return CacheSweep(self, candidate, shrinking=False).verdict(known)

    def _check_case(self, case: Mapping[str, Any]) -> None:
        """ValueError for a field that can't be what it is."""
        check_program(case["program"])
        if case["dtype"] not in tuple(DTYPES):
            raise ValueError(f"its dtype is {case['dtype']!r}; there is {', '.join(DTYPES)}")
        for name, least in (("seed", 0), ("batch", 1), ("heads", 1)):
            if type(case[name]) is not int or case[name] < least:
                raise ValueError(f"its {name} is {case[name]!r}; a whole number from {least} on is expected")
        dims = case["dims"]
        if not isinstance(dims, list) or len(dims) != 2 or not all(type(d) is int and d > 0 for d in dims):
            raise ValueError(f"its dims are {dims!r}; two whole numbers are expected")
        if case.get("growth") and case["growth"] not in growth.CASES:
            raise ValueError(f"its growth is {case['growth']!r}; there is {', '.join(growth.CASES)}")
        for name, usual in self.settings[0].items():
            kinds = {type(setting.get(name, usual)) for setting in self.settings}
            numbers = [case[name]] if not isinstance(case[name], list) else case[name]
            if type(case[name]) not in kinds or not all(type(n) is not int or n >= 0 for n in numbers) or numbers == []:
                raise ValueError(f"its {name} is {case[name]!r}; something like {usual!r} is expected")

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of a case's fields."""
        return ("dtype", "seed", "batch", "heads", "dims", "growth", *(a.name for a in self.arguments), "program")

    def case(self, plan: Plan, dtype: str, seed: int) -> dict[str, Any]:
        """The case of a plan."""
        base = {**self._blank(), "dtype": dtype, "seed": seed, "batch": plan.batch, "heads": plan.heads}
        base["dims"] = list(plan.dims or self.dims)
        return {**base, **plan.options, "program": [dict(op) for op in plan.program]}

    def _blank(self) -> dict[str, Any]:
        blank = {"dtype": "float32", "seed": 0, "batch": 1, "heads": 1, "dims": list(self.dims)}
        return {**blank, **self.settings[0], "program": []}

    def options(self, case: Mapping[str, Any], without: Iterable[str] = ()) -> dict[str, Any]:
        """The factory's options of a case, in the contract's order."""
        return {a.name: case[a.name] for a in self.arguments if a.name in case and a.name not in without}


class CacheSweep:
    """One contract, one candidate, and what has been seen of it so far."""

    def __init__(self, contract: CacheContract, candidate: Candidate, *, shrinking: bool) -> None:
        self.contract, self.candidate, self.shrinking = contract, candidate, shrinking
        self.shrunk: set[str] = set()
        self.untaken = _untaken(contract, candidate)
        self.refused: dict[str, set[Any]] = {}

    def run(self, *, full: bool, seed: int, advance: Advance) -> Iterator[Verdict]:
        """All verdicts."""
        wanted = self._wanted_dtypes()
        try:
            yield from self._run(wanted, full=full, seed=seed, advance=advance)
        except Exception as error:
            ours = InternalError(error)
            yield self._verdict("could-not-judge", {}, f"nothing is judged from here on: {ours}", **ours.evidence)

    def _run(self, wanted: Sequence[str], *, full: bool, seed: int, advance: Advance) -> Iterator[Verdict]:
        from audits.cache_draw import drawn

        taken, refusals = [], []
        for dtype in wanted:
            plain = self.contract.case(Plan(program=[{"op": "feed", "on": 0, "n": 2}]), dtype, seed)
            refused = self.verdict(plain)
            if refused.outcome == "fail" and refused.evidence["check"] == "raises":
                refusals.append(refused)
                yield self._verdict("skipped", {"dtype": dtype}, f"{dtype} is left out: {refused.message}")
            else:
                taken.append(dtype)
        if not taken:
            yield refusals[0]
            return
        lacking, told = self._lacking()
        yield from told
        yield from self._refusals(taken[0], seed)
        for name in growth.CASES if not lacking & {"update_and_fetch"} else ():
            if growth.applies(name, self.contract.name, self.candidate.framework, lacking):
                advance(f"{self.contract.name} {name}")
                yield self.verdict({**self.contract.case(Plan(program=[]), taken[0], seed), "heads": 2, "growth": name})
        allowed = [op for op in ("feed", *self.contract.operations) if not lacking & set(NEEDS.get(op, ()))]
        plans = [plan for plan in self.contract.corpus(full) if self._possible(plan, lacking)]
        cases = [self.contract.case(p, d, seed) for p, d in _with_dtypes(plans, taken, full, seed)]
        for case in cases:
            advance(f"{self.contract.name} {case['dtype']} corpus")
            yield self.verdict(case)
        advance(f"{self.contract.name} drawn")
        count = self.contract.examples * (FULL_EXAMPLES if full else 1)
        settings = [s for s in self.contract.settings if self._takes(s)]
        for case, finding, digest in drawn(self.contract, self, settings, allowed, taken, count, seed):
            yield self._judged(case, finding, digest)

    def verdict(self, case: Mapping[str, Any]) -> Verdict:
        """Judge one case; the first failure of each check is shrunk."""
        try:
            return self._judged(case, *self.check(case))
        except Lacks as error:
            return self._verdict("skipped", case, f"the cache has no {error}: what needs it is left out")
        except Invalid as error:
            return self._verdict("could-not-judge", case, f"the program can't be run: {error}")
        except CannotJudge as error:
            return self._verdict("could-not-judge", case, str(error), **error.evidence)

    def check(self, case: Mapping[str, Any]) -> tuple[Finding | None, str]:
        """What is wrong in one case, or None, and a digest of everything that was fetched; Invalid, Lacks."""
        self.candidate.at(self.recorded(case))
        try:
            return self._check(case)
        except (Invalid, Lacks, CannotJudge):
            raise
        except Exception as error:
            raise InternalError(error) from error

    def _check(self, case: Mapping[str, Any]) -> tuple[Finding | None, str]:
        if case.get("growth"):
            return growth.check(self.contract, self.candidate, case, self.contract.options(case, self.untaken))
        try:
            machine = self.machine(case)
        except CandidateError as error:
            return Finding(check="raises", message=str(error)), ""
        try:
            for op in case["program"]:
                machine.apply(op)
            machine.finish()
        except Found as found:
            return found.finding, machine.look.digest.hexdigest()[:16]
        return None, machine.look.digest.hexdigest()[:16]

    def machine(self, case: Mapping[str, Any]) -> Machine:
        """A fresh run of a case's program."""
        return Machine(self.candidate, case, self.contract.options(case, self.untaken), self.contract.batched)

    def _judged(self, case: Mapping[str, Any], finding: Finding | None, digest: str) -> Verdict:
        if finding is None:
            return self._verdict("pass", case, "holds", digest=digest)
        evidence: dict[str, Any] = {"check": finding.check, "digest": digest, **finding.evidence}
        if self.shrinking and finding.check not in self.shrunk and case["program"]:
            self.shrunk.add(finding.check)
            check = finding.check
            small = shrink(case, lambda c: self._still(c, check))
            again, digest = self.check(small)
            if again is None:
                message = "fails at times and passes at times, in one and the same case"
                return self._verdict("fail", small, message, check="rerun", shrunk=True)
            evidence = {"check": again.check, "digest": digest, "shrunk": True, **again.evidence}
            case, finding = small, again
        return self._verdict("fail", case, finding.message, **evidence)

    def _still(self, case: Mapping[str, Any], check: str) -> bool:
        try:
            finding, _ = self.check(case)
        except (Invalid, Lacks, CannotJudge):
            return False
        return finding is not None and finding.check == check

    def _wanted_dtypes(self) -> Sequence[str]:
        if unknown := [d for d in self.candidate.dtypes if d not in DTYPES]:
            raise ValueError(f"{self.contract.name} has no dtype {unknown[0]!r}; there is {', '.join(DTYPES)}")
        return self.candidate.dtypes or tuple(DTYPES)

    def _lacking(self) -> tuple[set[str], list[Verdict]]:
        """Attributes that the object hasn't, and a skipped verdict for each thing that is left out."""
        cache = make(self.candidate, self.contract.options(self.contract._blank(), self.untaken))
        wanted = dict.fromkeys(name for op in self.contract.operations for name in NEEDS.get(op, ()) if op != "copy")
        lacking = {name for name in wanted if not has(cache, name)}
        said = [f"no {name}: what needs it is left out" for name in wanted if name in lacking]
        said += [f"no {name}: it isn't checked" for name in ("offset", "is_trimmable") if not has(cache, name)]
        if not has(cache, "make_mask"):
            said.append("no make_mask: chunks are judged by a causal mask, windows are left out")
        elif not takes_window(cache):
            said.append("a make_mask without window_size: windows are left out")
        if not has(cache, "meta_state") and "state" not in lacking:
            said.append("no meta_state: its state is taken to hold everything")
        if not copies(cache):
            lacking.add("copy")  # nothing is missing: Python's own way of copying is right by itself
        if self.untaken:
            said.append(f"a factory without {', '.join(sorted(self.untaken))}: other values of it are left out")
        return lacking, [self._verdict("skipped", {}, f"the cache has {text}") for text in said]

    def _refusals(self, dtype: str, seed: int) -> Iterator[Verdict]:
        """A skipped verdict for each value of an option that the factory needn't take, and raises on."""
        for name, value in [(n, v) for n, values in self.contract.refusable.items() for v in values]:
            plan = Plan(program=[{"op": "feed", "on": 0, "n": 2}], options={name: value})
            if self._takes(plan.options) and (raised := self._raises(self.contract.case(plan, dtype, seed))):
                self.refused.setdefault(name, set()).add(value)
                yield self._verdict("skipped", {name: value}, f"{name} {value} is left out: {raised}")

    def _raises(self, case: Mapping[str, Any]) -> str:
        """What the candidate raises in one case, or ""."""
        try:
            finding, _ = self.check(case)
        except (Invalid, Lacks, CannotJudge):
            return ""
        return finding.message if finding is not None and finding.check == "raises" else ""

    def _takes(self, options: Mapping[str, Any]) -> bool:
        """Whether the factory takes these options, as far as is known."""
        blank = self.contract.settings[0]
        if any(options.get(name, blank.get(name)) != blank.get(name) for name in self.untaken):
            return False
        return not any(options.get(name) in values for name, values in self.refused.items())

    def _possible(self, plan: Plan, lacking: set[str]) -> bool:
        if not self._takes(plan.options):
            return False
        return not any(lacking & set(NEEDS.get(op["op"], ())) for op in plan.program)

    def recorded(self, case: Mapping[str, Any]) -> dict[str, Any]:
        """A case with all that is needed to run it again."""
        named = {"contract": self.contract.name, "candidate": self.candidate.name}
        return {**named, "framework": self.candidate.framework, **case}

    def _verdict(self, outcome: Any, case: Mapping[str, Any], message: str, **evidence: Any) -> Verdict:
        case = self.recorded(case)
        return Verdict(outcome=outcome, audit=self.contract.name, case=case, message=message, evidence=evidence)


def _untaken(contract: CacheContract, candidate: Candidate) -> set[str]:
    """The optional options that the factory doesn't take; ValueError if it lacks one that it must have."""
    taken = parameters(candidate.function)
    names = [a.name for a in contract.arguments]
    if taken is None or set(names) <= taken or len(taken) >= len(names):
        return set()
    missing = set(names) - taken
    if needed := [a.name for a in contract.arguments if a.name in missing and not a.optional]:
        raise ValueError(
            f"{candidate.name} takes no argument {needed[0]!r}; the factory is called as {contract.signature}"
        )
    return missing


def _with_dtypes(plans: Sequence[Plan], dtypes: Sequence[str], full: bool, seed: int) -> Iterator[tuple[Plan, str]]:
    """Each plan in one dtype, in turn, or in all."""
    for i, plan in enumerate(plans):
        for dtype in dtypes if full else (dtypes[(i + seed) % len(dtypes)],):
            yield plan, dtype
