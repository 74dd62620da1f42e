"""Continuous batching: requests join and leave between steps, and every step feeds one token of each row at once.

A joining group is prefilled in right-padded chunks, all but each prompt's last token, one chunk a step beside the
decoding of the rows that are there; then its rows are moved to the right end and appended to the batch. A row that is
done is filtered out in the step that finishes it, and its memory with it.

What a row gets doesn't depend on its neighbours beyond arithmetic: the same ops run on other batch shapes and chunk
sizes, where a backend may add in another order. So logits of a row alone and of the row in a batch are within twice
the bound that the run's arithmetic gives each op, layer by layer; greedy tokens are equal unless the two largest
logits are closer than that, and so are drawn ones, whose noise belongs to the request's seed alone.

B rows, L tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from engine.caches.batched import BATCHED
from engine.generate import CHUNK, Engine
from engine.penalties import DOMAIN
from engine.prefixes import Caches, Checkpoint, Factory, Layout, take
from engine.rows import Event, Joining, Request, Rows, Sampling
from engine.sampling import ORDER

__all__ = ["Batcher", "Event", "PrefixSource", "Sampling"]


class PrefixSource(Protocol):
    """What engine.prefixes.Prefixes and engine.prefix_store.PrefixStore have in common."""

    def put(self, checkpoint: Checkpoint) -> bool:
        """Keep a checkpoint; whether it was kept."""
        ...

    def restore(
        self, prompt: Sequence[int], factory: Factory, layout: Layout | None = None
    ) -> tuple[Caches, int] | None:
        """Caches with the longest fitting prefix of `prompt`, and its length."""
        ...


class Batcher:
    """Serves requests with one Engine, at most `max_rows` at a time: `add` them, then `step`, `run` or `complete`.

    chunk: tokens of a row in a prefill step. prefixes: where prompts look for a prefix, and leave their own. The caches
    are the engine's, quantised if it was loaded so. Not for several threads. Raises ValueError for a size below 1.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_rows: int = 8,
        chunk: int = CHUNK,
        prefixes: PrefixSource | None = None,
    ) -> None:
        if max_rows < 1 or chunk < 1:
            raise ValueError(f"max_rows is {max_rows} and chunk {chunk}; at least 1 is expected of each")
        config = engine.config
        self._engine = engine
        self._max_rows = max_rows
        self._chunk = chunk
        self._prefixes = prefixes
        self._layout = Layout(config.num_key_value_heads, config.head_dim, getattr(mx, engine.dtype))
        self._numbers = 0
        self._waiting: list[Request] = []
        self._joining: Joining | None = None
        self._rows = Rows(V=config.vocab_size)

    def add(
        self, tokens: Sequence[int], *, max_tokens: int, sampling: Sampling | None = None, stop: Collection[int] = ()
    ) -> int:
        """Queue a request for up to `max_tokens` ids after `tokens`, ending before the first in `stop`; its number.

        Raises ValueError for an empty sequence, an id outside the vocabulary, or an option out of range.
        """
        prompt = self._engine.checked(tokens)
        request = Request(
            number=self._numbers + 1,
            prompt=prompt,
            max_tokens=max_tokens,
            stop=frozenset(stop),
            sampling=sampling or Sampling(),
        )
        self._numbers += 1
        self._waiting.append(request)
        return request.number

    def cancel(self, number: int) -> bool:
        """Drop the request and free its memory at once; False if it isn't here (any more)."""
        groups = [self._rows] + ([self._joining.rows] if self._joining else [])
        for group in groups:
            keep = [i for i, request in enumerate(group.requests) if request.number != number]
            if len(keep) < len(group.requests):
                if self._joining is not None and group is self._joining.rows:
                    self._joining = self._joining.filter(keep)
                else:
                    group.filter(keep)
                return True
        before = len(self._waiting)
        self._waiting = [request for request in self._waiting if request.number != number]
        return len(self._waiting) < before

    @property
    def provenance(self) -> dict[str, Any]:
        """The engine's, and in what domain and order tokens are chosen."""
        return self._engine.provenance | {"sampling": {"penalties": DOMAIN, "filters": ORDER}}

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._waiting or self._joining or self._rows.requests)

    def step(self) -> list[Event]:
        """Admit, prefill one chunk of those who join, and decode one token of each row; what came out of it."""
        with mx.stream(self._engine.device.handle):
            if self._joining is None and self._waiting and len(self._rows.requests) < self._max_rows:
                self._joining = self._admitted()
            if self._joining is not None:
                self._prefill(self._joining)
            return self._decode() if self._rows.requests else []

    def run(self) -> Iterator[Event]:
        """Every event until no request is left; requests may be added meanwhile."""
        while self.busy:
            yield from self.step()

    def complete(self) -> dict[int, list[int]]:
        """The generated ids of every request, once all are done."""
        found: dict[int, list[int]] = {}
        for event in self.run():
            found.setdefault(event.request, []).extend([] if event.token is None else [event.token])
        return found

    def _admitted(self) -> Joining:
        """As many of the waiting as there's room for, with caches that hold what was restored."""
        room = self._max_rows - len(self._rows.requests)
        requests, self._waiting = self._waiting[:room], self._waiting[room:]
        rows: list[Caches] = []
        fed: list[int] = []
        for request in requests:
            warm = self._prefixes.restore(request.prompt, self._engine.caches, self._layout) if self._prefixes else None
            caches, count = warm or (self._engine.caches(), 0)
            rows.append(caches)
            fed.append(count)
        # Rows of one class each layer, restored or cold: merge refuses anything else.
        batch = [BATCHED[type(column[0])].merge(column) for column in map(list, zip(*rows, strict=True))]
        return Joining(Rows(requests, batch, V=self._engine.config.vocab_size), fed)

    def _prefill(self, joining: Joining) -> None:
        """Feed one chunk; after the last, leave checkpoints and join the rows that decode."""
        chunk = joining.next(self._chunk)
        if chunk is not None:
            self._engine.model(chunk, joining.rows.caches)  # no logits are needed, so none are computed
            joining.rows.evaluate()
        if joining.done:
            joining.finalize()
            self._leave_checkpoints(joining)
            self._rows.extend(joining.rows)
            self._joining = None

    def _leave_checkpoints(self, joining: Joining) -> None:
        for i, (request, fed) in enumerate(zip(joining.rows.requests, joining.fed, strict=True)):
            if self._prefixes is not None and fed < len(request.prompt) - 1:
                # Taken here and now, row by row: `take` returns arrays, not something that will look at `i` later.
                row = [cache.extract(i) for cache in joining.rows.caches]
                self._prefixes.put(take(request.prompt[:-1], row))

    def _decode(self) -> list[Event]:
        rows = self._rows
        tokens = mx.array([[request.last] for request in rows.requests], dtype=mx.int32)
        ids = rows.choose(self._engine.model(tokens, rows.caches)[:, -1])
        rows.evaluate(ids)
        events = [request.accept(int(token)) for request, token in zip(rows.requests, np.array(ids), strict=True)]
        if any(event.reason for event in events):
            rows.filter([i for i, event in enumerate(events) if not event.reason])
        return events
