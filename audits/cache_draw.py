"""Drawing programs with Hypothesis: a rule-based state machine over a candidate's cache and its model.

Each rule appends one operation to the program and runs it. A machine that has found something stops there, and its
program is made smaller afterwards (audits/cache_shrink.py), so that what is reported replays without Hypothesis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from audits.cache_contents import Found
from audits.cache_machine import Invalid, Live, Machine
from audits.cache_object import Lacks
from audits.candidate import CandidateError
from audits.contract import Finding

if TYPE_CHECKING:
    from audits.cache_contract import CacheContract, CacheSweep

STEPS = 9
MOST_CACHES = 4  # alive in one program
WINDOWS = (None, None, None, 1, 3, 6, 50)
Drawn = tuple[dict[str, Any], Finding | None, str]


def drawn(
    contract: CacheContract,
    sweep: CacheSweep,
    options: Sequence[Mapping[str, Any]],
    operations: Sequence[str],
    dtypes: Sequence[str],
    count: int,
    seed: int,
) -> list[Drawn]:
    """What became of `count` drawn programs: case, what was wrong or None, digest."""
    results: list[Drawn] = []

    class Programs(_Programs):
        """The state machine of this contract and candidate."""

        def __init__(self) -> None:
            super().__init__(contract, sweep, operations, results, seed)

        @initialize(
            option=st.sampled_from(list(options)),
            dtype=st.sampled_from(list(dtypes)),
            rows=st.integers(1, 3),
            heads=st.integers(1, 2),
            padding=st.lists(st.integers(0, 4), min_size=3, max_size=3),
        )
        def begin(self, option: Mapping[str, Any], dtype: str, rows: int, heads: int, padding: list[int]) -> None:
            self.start(option, dtype, rows, heads, padding)

    seeded(seed)(Programs)
    run_state_machine_as_test(
        Programs,
        settings=settings(
            max_examples=count,
            stateful_step_count=STEPS,
            database=None,
            deadline=None,
            derandomize=False,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
    return results


class _Programs(RuleBasedStateMachine):
    """Rules over one Machine; `choice` numbers pick among what is there, so that every draw is possible."""

    def __init__(
        self, contract: CacheContract, sweep: CacheSweep, operations: Sequence[str], results: list[Drawn], seed: int
    ) -> None:
        super().__init__()
        self.contract, self.sweep, self.operations, self.results = contract, sweep, operations, results
        self.seed_ = seed
        self.case: dict[str, Any] = {}
        self.machine: Machine | None = None
        self.finding: Finding | None = None
        self.next = 1

    def start(self, option: Mapping[str, Any], dtype: str, rows: int, heads: int, padding: list[int]) -> None:
        from audits.cache_contract import Plan

        if self.contract.batched:
            option = {**option, "left_padding": padding[:rows]}
        plan = Plan(program=[], options=option, batch=rows, heads=heads)
        self.case = self.contract.case(plan, dtype, self.seed_)
        try:
            self.machine = self.sweep.machine(self.case)
        except CandidateError as error:
            self.finding = Finding(check="raises", message=str(error))

    def can(self, operation: str) -> bool:
        return operation in self.operations and self.machine is not None and self.finding is None

    def run_op(self, **op: Any) -> None:
        """Append one operation and run it; an operation that isn't possible here is forgotten."""
        if self.machine is None or self.finding is not None:
            return
        try:
            self.machine.apply(op)
        except (Invalid, Lacks):
            return
        except Found as found:
            self.finding = found.finding
        self.case["program"].append(op)

    def pick(self, choice: int, derived: bool | None = None, batched: bool | None = None) -> int:
        """The number of some live cache of that kind; −1, which no cache has, if there is none."""
        assert self.machine is not None
        fits = [
            number
            for number, live in self.machine.live.items()
            if derived in (None, live.derived) and batched in (None, live.batched)
        ]
        return fits[choice % len(fits)] if fits else -1

    def at(self, number: int) -> Live | None:
        assert self.machine is not None
        return self.machine.live.get(number)

    def fresh(self) -> int:
        self.next += 1
        return self.next - 1

    @property
    def room(self) -> bool:
        return self.machine is not None and len(self.machine.live) < MOST_CACHES

    @rule(choice=st.integers(0, 5), n=st.one_of(st.just(1), st.integers(1, 12)), window=st.sampled_from(WINDOWS),
          array=st.booleans())  # fmt: skip
    def feed(self, choice: int, n: int, window: int | None, array: bool) -> None:
        if self.can("feed"):
            keeps = self.case.get("keep", 0) > 0  # what a narrower window does to kept tokens isn't laid down
            self.run_op(op="feed", on=self.pick(choice), n=n, window=None if keeps else window, array=array)

    @precondition(lambda self: self.can("trim"))
    @rule(choice=st.integers(0, 5), n=st.integers(1, 9))
    def trim(self, choice: int, n: int) -> None:
        self.run_op(op="trim", on=self.pick(choice), n=n)

    @precondition(lambda self: self.can("trim_front"))
    @rule(choice=st.integers(0, 5))
    def trim_front(self, choice: int) -> None:
        self.run_op(op="trim_front", on=self.pick(choice))

    @precondition(lambda self: self.can("restore") and self.room)
    @rule(choice=st.integers(0, 5))
    def restore(self, choice: int) -> None:
        self.run_op(**{"op": "restore", "on": self.pick(choice, derived=False), "as": self.fresh()})

    @precondition(lambda self: self.can("new") and self.room)
    @rule(padding=st.lists(st.integers(0, 3), min_size=1, max_size=2), n=st.integers(0, 7))
    def new(self, padding: list[int], n: int) -> None:
        number = self.fresh()
        self.run_op(**{"op": "new", "as": number, "left_padding": padding})
        if n and self.finding is None:
            self.run_op(op="feed", on=number, n=n)

    @precondition(lambda self: self.can("right_pad"))
    @rule(choice=st.integers(0, 5), lengths=st.lists(st.integers(1, 9), min_size=6, max_size=6), cut=st.integers(2, 9))
    def right_pad(self, choice: int, lengths: list[int], cut: int) -> None:
        number = self.pick(choice, batched=True)
        live = self.at(number)
        if live is None:
            return
        lengths = lengths[: len(live.rows)]
        total = max(2, *lengths)
        chunks = [cut, total - cut] if total - cut >= 2 else [total]
        self.run_op(op="right_pad", on=number, lengths=lengths, chunks=chunks)

    @precondition(lambda self: self.can("filter"))
    @rule(choice=st.integers(0, 5), rows=st.lists(st.integers(0, 5), min_size=1, max_size=4))
    def filter(self, choice: int, rows: list[int]) -> None:
        number = self.pick(choice, batched=True)
        live = self.at(number)
        if live is not None:
            self.run_op(op="filter", on=number, rows=[i % len(live.rows) for i in rows])

    @precondition(lambda self: self.can("extend"))
    @rule(choice=st.integers(0, 5), other=st.integers(0, 5))
    def extend(self, choice: int, other: int) -> None:
        a, b = self.pick(choice, batched=True), self.pick(other, batched=True)
        self.run_op(**{"op": "extend", "on": a, "with": b})

    @precondition(lambda self: self.can("extract") and self.room)
    @rule(choice=st.integers(0, 5), row=st.integers(0, 5))
    def extract(self, choice: int, row: int) -> None:
        number = self.pick(choice, batched=True)
        live = self.at(number)
        if live is not None:
            self.run_op(**{"op": "extract", "on": number, "row": row % len(live.rows), "as": self.fresh()})

    @precondition(lambda self: self.can("merge") and self.room)
    @rule(empty=st.booleans(), turned=st.booleans())
    def merge(self, empty: bool, turned: bool) -> None:
        assert self.machine is not None
        parts = [number for number, live in self.machine.live.items() if live.derived]
        if parts and empty:
            number = self.fresh()
            self.run_op(**{"op": "single", "like": parts[0], "as": number})
            parts += [number] if number in self.machine.live else []
        if parts and self.finding is None:
            self.run_op(**{"op": "merge", "of": parts[::-1] if turned else parts, "as": self.fresh()})

    def teardown(self) -> None:
        if not self.case or (self.machine is None and self.finding is None):
            return
        assert self.machine is not None or self.finding is not None
        if self.machine is not None and self.finding is None:
            try:
                self.machine.finish()
            except Found as found:
                self.finding = found.finding
            except Lacks:
                return
        digest = self.machine.digest.hexdigest()[:16] if self.machine is not None else ""
        self.results.append((self.case, self.finding, digest))
