"""Drawing programs: one operation after another, each possible where it stands, run on a candidate and its model.

Not Hypothesis's state machine: that one leaves rules out and repeats itself on purpose, so that half of its programs
are empty, which is right for many thousands of them and not for forty. A program that has found something stops there
and is made smaller afterwards (audits/cache_shrink.py), so that what is reported replays by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import TYPE_CHECKING, Any

from audits.cache_contents import Found
from audits.cache_look import Live
from audits.cache_machine import Invalid, Machine
from audits.cache_object import Lacks
from audits.candidate import CandidateError
from audits.contract import Finding

if TYPE_CHECKING:
    from audits.cache_contract import CacheContract, CacheSweep

STEPS = 10
MOST_CACHES = 4  # alive in one program
FULL = -1
FEEDS = 4  # times as likely as any other operation
LONGEST = 40  # chunk
WINDOWS = (None, None, None, 1, 3, 6, 50)
Drawn = tuple[dict[str, Any], Finding | None, str]
Op = dict[str, Any]


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
    programs = (_Program(contract, sweep, operations, seed, Random(f"{seed} {i}")) for i in range(count))
    results = [program.run(options, dtypes) for program in programs]
    return [result for result in results if result is not None]


class _Program:
    """One program, drawn and run on a Machine at once: what is drawn next depends on which caches there are."""

    def __init__(
        self, contract: CacheContract, sweep: CacheSweep, operations: Sequence[str], seed: int, random: Random
    ) -> None:
        self.contract, self.sweep, self.seed, self.random = contract, sweep, seed, random
        self.case: dict[str, Any] = {}
        self.next = 1
        draws = {name: getattr(self, f"_{name}") for name in operations}
        self.draws: list[Callable[[Machine], list[Op]]] = [*draws.values(), *[draws["feed"]] * (FEEDS - 1)]

    def run(self, options: Sequence[Mapping[str, Any]], dtypes: Sequence[str]) -> Drawn | None:
        """The program's case, what was wrong, digest; None if the cache lacks what only its use has shown."""
        option, dtype = self.random.choice(options), self.random.choice(dtypes)
        self.case = self._blank(option, dtype)
        finding = None
        try:
            machine = self.sweep.machine(self.case)
            for _ in range(STEPS):
                self._step(machine)
            machine.finish()
        except Found as found:
            finding = found.finding
        except CandidateError as error:
            return self.case, Finding(check="raises", message=str(error)), ""
        except Lacks:
            return None
        return self.case, finding, machine.look.digest.hexdigest()[:16]

    def _blank(self, option: Mapping[str, Any], dtype: str) -> dict[str, Any]:
        from audits.cache_contract import Plan

        rows = self.random.randint(1, 3)
        if self.contract.batched:
            option = {**option, "left_padding": [self.random.randint(0, 4) for _ in range(rows)]}
        plan = Plan(program=[], options=option, batch=rows, heads=self.random.randint(1, 2))
        return self.contract.case(plan, dtype, self.seed)

    def _step(self, machine: Machine) -> None:
        """Draw one operation and run it; what isn't possible here is forgotten. Found."""
        for op in self.random.choice(self.draws)(machine):
            if op.get("as") == FULL:
                return
            self.case["program"].append(op)
            self.sweep.candidate.at(self.sweep.recorded(self.case))
            try:
                machine.apply(op)
            except (Invalid, Lacks):
                self.case["program"].pop()
                return

    def _pick(self, machine: Machine, **wanted: bool) -> int:
        """The number of some live cache of that kind; −1, which no cache has, if there is none."""
        fits = [n for n, live in machine.live.items() if all(getattr(live, k) == v for k, v in wanted.items())]
        return self.random.choice(fits) if fits else -1

    def _rows(self, machine: Machine, number: int) -> int:
        live: Live | None = machine.live.get(number)
        return len(live.rows) if live else 1

    def _fresh(self, machine: Machine) -> int:
        """A number for another cache; FULL when there are enough."""
        if len(machine.live) >= MOST_CACHES:
            return FULL
        self.next += 1
        return self.next - 1

    # Operations: what an operation of that name could be here

    def _feed(self, machine: Machine) -> list[Op]:
        n = self.random.choice((1, 1, 1, self.random.randint(2, 12), self.random.randint(2, 12), LONGEST))
        n = self.random.randint(1, n)
        # With keep only None is asked for: what a narrower window does to kept tokens isn't laid down.
        window = None if self.case.get("keep", 0) > 0 else self.random.choice(WINDOWS)
        array = self.random.random() < 0.5
        return [{"op": "feed", "on": self._pick(machine), "n": n, "window": window, "array": array}]

    def _trim(self, machine: Machine) -> list[Op]:
        return [{"op": "trim", "on": self._pick(machine), "n": self.random.randint(0, 9)}]

    def _trim_front(self, machine: Machine) -> list[Op]:
        return [{"op": "trim_front", "on": self._pick(machine)}]

    def _restore(self, machine: Machine) -> list[Op]:
        return [{"op": "restore", "on": self._pick(machine, derived=False), "as": self._fresh(machine)}]

    def _copy(self, machine: Machine) -> list[Op]:
        return [{"op": "copy", "on": self._pick(machine), "as": self._fresh(machine)}]

    def _new(self, machine: Machine) -> list[Op]:
        number, padding = self._fresh(machine), [self.random.randint(0, 3) for _ in range(self.random.randint(1, 2))]
        made: Op = {"op": "new", "as": number, "left_padding": padding}
        n = self.random.choice((0, self.random.randint(1, 9)))
        return [made, {"op": "feed", "on": number, "n": n}] if n else [made]

    def _left_pad(self, machine: Machine) -> list[Op]:
        number = self._pick(machine, batched=True)
        padding = [self.random.randint(0, 4) for _ in range(self._rows(machine, number))]
        return [{"op": "left_pad", "on": number, "left_padding": padding}]

    def _right_pad(self, machine: Machine) -> list[Op]:
        number = self._pick(machine, batched=True)
        lengths = [self.random.randint(1, 9) for _ in range(self._rows(machine, number))]
        total = max(2, *lengths)
        cut = self.random.randint(2, total)
        chunks = [cut, total - cut] if total - cut >= 2 else [total]
        return [{"op": "right_pad", "on": number, "lengths": lengths, "chunks": chunks}]

    def _filter(self, machine: Machine) -> list[Op]:
        number = self._pick(machine, batched=True)
        rows = self._rows(machine, number)
        kept = [self.random.randrange(rows) for _ in range(self.random.randint(1, 4))]
        return [{"op": "filter", "on": number, "rows": kept}]

    def _extend(self, machine: Machine) -> list[Op]:
        return [{"op": "extend", "on": self._pick(machine, batched=True), "with": self._pick(machine, batched=True)}]

    def _extract(self, machine: Machine) -> list[Op]:
        number = self._pick(machine, batched=True)
        row = self.random.randrange(self._rows(machine, number))
        return [{"op": "extract", "on": number, "row": row, "as": self._fresh(machine)}]

    def _single(self, machine: Machine) -> list[Op]:
        return [{"op": "single", "like": self._pick(machine, derived=True), "as": self._fresh(machine)}]

    def _merge(self, machine: Machine) -> list[Op]:
        parts = [number for number, live in machine.live.items() if live.derived and not live.batched]
        self.random.shuffle(parts)
        return [{"op": "merge", "of": parts, "as": self._fresh(machine)}]
