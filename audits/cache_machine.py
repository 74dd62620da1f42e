"""Running a program of cache operations on a candidate and on the model at once, and judging after each.

audits/cache_program.py says what a program is. After the last operation every cache that is left is fed one more token,
for a cache that shares memory with another, or was to be copied later, is wrong only then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from audits import cache_object as obj
from audits.cache_contents import Contents, Found
from audits.cache_look import Live, Look
from audits.cache_model import Row, Rules, Sight, sight
from audits.cache_program import Op, op_text
from audits.cache_values import Label, Tokens
from audits.candidate import Candidate, CandidateError
from audits.contract import Finding

Array = np.ndarray[Any, np.dtype[Any]]


class Invalid(Exception):
    """An operation that makes no sense where it stands, such as one on a cache that isn't there."""


class Machine:
    """One program's run. `case` has dtype, seed, batch, heads, dims and the factory's options."""

    def __init__(self, candidate: Candidate, case: Mapping[str, Any], options: Mapping[str, Any], batched: bool):
        self.candidate, self.options, self.batched = candidate, dict(options), batched
        self.rules = Rules.of(options)
        self.bits: int | None = options.get("bits")
        group = int(options.get("group_size", 32))
        self.tokens = Tokens(
            seed=case["seed"], heads=case["heads"], dims=tuple(case["dims"]), group=group, dtype=case["dtype"]
        )
        alone = {**self.options, "left_padding": [0]} if batched else self.options
        self.contents = Contents(candidate, self.tokens, self.bits, group, lambda: obj.make(candidate, alone))
        self.look = Look(
            framework=candidate.framework, options=self.options, rules=self.rules, bits=self.bits, tokens=self.tokens,
            contents=self.contents,
        )  # fmt: skip
        self.live: dict[int, Live] = {}
        padding = self.options.get("left_padding", [0] * case["batch"])
        cache = obj.make(candidate, self.options)
        self.live[0] = Live(cache, [Row(f"row {b}", padding=p) for b, p in enumerate(padding)], batched)

    def apply(self, op: Op) -> None:
        """Run one operation; Found if something is wrong, Invalid if it can't be run here, Lacks."""
        try:
            work: Callable[[Op], None] = getattr(self, f"_{op['op']}")
            work(op)
        except obj.InputChanged as error:
            raise Found(Finding(check="inputs unchanged", message=str(error))) from error
        except CandidateError as error:
            raise Found(Finding(check="raises", message=f"{op_text(op)}: {error}")) from error

    def finish(self) -> None:
        """Feed every cache one more token, and compare quantisation codes with those of one chunk."""
        for number in list(self.live):
            self.apply({"op": "feed", "on": number, "n": 1})
        try:
            for live in self.live.values():
                self.contents.check_one_shot(live.rows)
        except CandidateError as error:
            raise Found(Finding(check="raises", message=f"all tokens in one chunk: {error}")) from error

    # Operations

    def _feed(self, op: Op) -> None:
        live = self._on(op)
        self._update(live, op["n"], op.get("window"), bool(op.get("array")), None)
        self.look.counts(live)

    def _right_pad(self, op: Op) -> None:
        live = self._on(op)
        lengths, chunks = op["lengths"], op["chunks"]
        total = sum(chunks)
        if len(lengths) != len(live.rows) or max(lengths) > total or any(row.padding for row in live.rows):
            raise Invalid("lengths")
        obj.needs(live.cache, "prepare", "finalize")
        padding = [total - n for n in lengths]
        obj.call("prepare", lambda: live.cache.prepare(lengths=list(lengths), right_padding=padding))
        done = 0
        for n in chunks:
            self._update(live, n, op.get("window"), bool(op.get("array")), [max(0, x - done) for x in lengths])
            done += n
        obj.call("finalize", live.cache.finalize)
        live.fetched.clear()
        self.look.counts(live)

    def _left_pad(self, op: Op) -> None:
        live = self._on(op)
        if len(op["left_padding"]) != len(live.rows) or live.fed or any(row.tokens for row in live.rows):
            raise Invalid("left_padding")
        obj.needs(live.cache, "prepare")
        obj.call("prepare", lambda: live.cache.prepare(left_padding=list(op["left_padding"])))
        for row, p in zip(live.rows, op["left_padding"], strict=True):
            row.padding += p
        self.look.counts(live)

    def _trim(self, op: Op) -> None:
        live, n = self._on(op), op["n"]
        held = min(len(row.tokens) - row.dropped for row in live.rows)
        if held == 0 or (live.batched and n > held) or any(row.padding for row in live.rows):
            raise Invalid("nothing to trim")
        obj.needs(live.cache, "trim")
        size = self.rules.max_size
        wrapped = size is not None and max(len(row.tokens) for row in live.rows) >= size
        if obj.has(live.cache, "is_trimmable"):
            trimmable = obj.call("is_trimmable", lambda: bool(live.cache.is_trimmable()))
            if not trimmable and not wrapped:
                raise Lacks_trim()
        else:
            trimmable = not wrapped
        if not trimmable:
            return
        live.fetched.clear()
        did = obj.call("trim", lambda: live.cache.trim(n))
        did = 0 if n == 0 and did is None else did
        if did != min(n, held) and not (wrapped and did == 0):
            raise Found(Finding(check="trim", message=f"trim({n}) of {held} tokens returns {did}"))
        for row in live.rows:
            row.tokens = row.tokens[: len(row.tokens) - did]
        self.look.counts(live)

    def _trim_front(self, op: Op) -> None:
        live = self._on(op)
        obj.needs(live.cache, "maybe_trim_front")
        obj.call("maybe_trim_front", live.cache.maybe_trim_front)
        for row in live.rows:
            row.dropped = max(row.dropped, len(row.tokens) - (self.rules.chunk_size or 0))
        live.fetched.clear()
        self.look.counts(live)

    def _restore(self, op: Op) -> None:
        live = self._on(op)
        if live.derived or not all(row.tokens for row in live.rows):
            raise Invalid("restores a full cache of the factory's class")
        obj.needs(live.cache, "state")
        state, meta = obj.saved(live.cache)
        fresh = {**self.options, "left_padding": [0] * len(live.rows)} if self.batched else self.options
        cache = obj.make(self.candidate, fresh)
        obj.restore(cache, state, meta)
        rows = [row.copy(f"{row.name} of restored cache {op['as']}") for row in live.rows]
        self._add(op, Live(cache, rows, self.batched))

    def _copy(self, op: Op) -> None:
        live = self._on(op)
        if not obj.copies(live.cache):
            raise obj.Lacks("copy")
        rows = [row.copy(f"{row.name} of copy {op['as']}") for row in live.rows]
        self._add(op, Live(obj.twin(live.cache), rows, live.batched, live.derived), check=True)

    def _new(self, op: Op) -> None:
        cache = obj.make(self.candidate, {**self.options, "left_padding": op["left_padding"]})
        rows = [Row(f"row {b} of cache {op['as']}", padding=p) for b, p in enumerate(op["left_padding"])]
        self._add(op, Live(cache, rows, True), check=True)

    def _filter(self, op: Op) -> None:
        live = self._on(op)
        kept = op["rows"]
        if not kept or max(kept) >= len(live.rows):
            raise Invalid("rows")
        started = live.fed or any(row.tokens for row in live.rows)
        if started and any(not live.rows[i].tokens for i in kept):
            raise Invalid("rows that are inside their padding")
        obj.needs(live.cache, "filter")
        obj.call("filter", lambda: live.cache.filter(list(kept)))
        repeated = {i for i in kept if kept.count(i) > 1}
        live.rows = [live.rows[i].copy(f"{live.rows[i].name} ({j})" if i in repeated else None)
                     for j, i in enumerate(kept)]  # fmt: skip
        live.fetched.clear()
        self.look.counts(live)

    def _extend(self, op: Op) -> None:
        live, other = self._on(op), self._on(op, "with")
        if live is other or not (live.batched and other.batched):
            raise Invalid("extend")
        obj.needs(live.cache, "extend")
        obj.call("extend", lambda: live.cache.extend(other.cache))
        live.rows += [row.copy() for row in other.rows]
        live.fed |= other.fed
        live.fetched.clear()
        del self.live[op["with"]]
        self._disturb(other)
        self.look.counts(live)

    def _extract(self, op: Op) -> None:
        live = self._on(op)
        if not live.batched or op["row"] >= len(live.rows) or not live.rows[op["row"]].tokens:
            raise Invalid("row")
        obj.needs(live.cache, "extract")
        cache = obj.call("extract", lambda: live.cache.extract(op["row"]))
        row = live.rows[op["row"]]
        self.contents.requantised.update(row.tokens)
        # Not looked at yet: a row that is copied when it is first asked for copies what is there by then.
        self._add(op, Live(cache, [row.copy(f"{row.name} extracted as cache {op['as']}")], False, derived=True))

    def _single(self, op: Op) -> None:
        like = self._on(op, "like")
        if not like.derived:
            raise Invalid("like")
        cache = obj.alike(like.cache, {name: x for name, x in self.options.items() if name != "left_padding"})
        self._add(op, Live(cache, [Row(f"row 0 of cache {op['as']}")], False, derived=True))

    def _merge(self, op: Op) -> None:
        parts = [self._on(op, number=number) for number in op["of"]]
        if not parts or any(part.batched or not part.derived for part in parts) or len(set(op["of"])) < len(parts):
            raise Invalid("merge")
        batch = type(self.live[0].cache) if 0 in self.live else type(obj.make(self.candidate, self.options))
        if not hasattr(batch, "merge"):
            raise obj.Lacks("merge")
        cache = obj.call("merge", lambda: batch.merge([part.cache for part in parts]))
        rows = [part.rows[0].copy(f"row {b} of merged cache {op['as']}") for b, part in enumerate(parts)]
        for row in rows:
            self.contents.requantised.update(row.tokens)
        self._add(op, Live(cache, rows, True), check=True)

    # What they have in common

    def _on(self, op: Op, name: str = "on", number: int | None = None) -> Live:
        key = op[name] if number is None else number
        if key not in self.live:
            raise Invalid(f"there is no cache {key}")
        return self.live[key]

    def _add(self, op: Op, made: Live, check: bool = False) -> None:
        if op["as"] in self.live:
            raise Invalid(f"there is a cache {op['as']}")
        self.live[op["as"]] = made
        if check:
            self.look.counts(made)

    def _update(self, live: Live, n: int, window: int | None, array: bool, limits: Sequence[int] | None) -> None:
        """One chunk of n columns; rows get padding where they are inside it, or past their limit."""
        live.fed = True
        real = [row.real(n, None if limits is None else limits[b]) for b, row in enumerate(live.rows)]
        labels = [_labels(row, places) for row, places in zip(live.rows, real, strict=True)]
        serials, keys, values = self.tokens.make(labels)
        has_mask = obj.has(live.cache, "make_mask")
        if has_mask and window is not None and not obj.takes_window(live.cache):
            window = None
        mask = obj.mask_of(live.cache, n, window, array) if has_mask else None if n == 1 else "causal"
        device = self.candidate.device
        fetched = obj.fetch(live.cache, keys, values, self.candidate.framework, device)
        for b, row in enumerate(live.rows):
            row.tokens += serials[b][real[b]].tolist()
            row.padding = max(0, row.padding - n)
        sights = [
            sight(self.rules, row, np.flatnonzero(places).tolist(), window if has_mask else None, n == 1)
            for row, places in zip(live.rows, real, strict=True)
        ]
        if not has_mask and n > 1:  # a window that nobody asked it for
            sights = [Sight(s.queries, s.must, _causal(*s.may.shape)) for s in sights]
        seen = self.look.fetch(live, fetched, mask, sights, (keys.shape, values.shape))
        rows, columns = np.nonzero(seen)
        self.look.keep(live, fetched, (rows, columns))

    def _disturb(self, live: Live) -> None:
        """Feed a cache whose rows were taken over: they must not notice. What it does with that is its own affair."""
        labels = [[Label(f"{row.name} after it was taken over", 0)] for row in live.rows]
        _, keys, values = self.tokens.make(labels)
        try:
            fetched = obj.fetch(live.cache, keys, values, self.candidate.framework, self.candidate.device)
            for x in fetched:
                obj.dense(x, self.bits, self.tokens.dtype)
        except (CandidateError, obj.Lacks):
            return


class Lacks_trim(obj.Lacks):
    """is_trimmable says no to a cache that has dropped nothing."""

    def __init__(self) -> None:
        super().__init__("trim (is_trimmable says no)")


def _labels(row: Row, places: Sequence[bool]) -> list[Label]:
    position, labels = len(row.tokens), []
    for real in places:
        labels.append(Label(row.name, position if real else None))
        position += real
    return labels


def _causal(queries: int, tokens: int) -> Array:
    """Which tokens the last `queries` of them may see."""
    return np.arange(tokens) <= np.arange(tokens - queries, tokens)[:, None]
