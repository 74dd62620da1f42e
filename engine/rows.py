"""The rows of a batch: requests, and what each has on the device while it's prefilled and while it decodes.

Everything that a step changes is evaluated with it, or graphs would grow from step to step. What chooses a row's token
(options, key, counts) belongs to the row and goes with it, so its place and its neighbours don't matter.

B rows, L tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from engine.caches.batched import BatchCache
from engine.penalties import Counts, penalise
from engine.sampling import NOTHING, sampler


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a request's tokens are chosen; see engine.sampling and engine.penalties. The default is greedy.

    Penalties count the prompt and what was generated. The same request with the same seed draws the same tokens.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    seed: int = 0

    @property
    def penalised(self) -> bool:
        """Whether any penalty is on."""
        return (self.repetition, self.presence, self.frequency) != (1, 0, 0)


@dataclass(frozen=True, kw_only=True)
class Event:
    """A generated `token` of `request`, or None; and why the request is done with it ("" if it isn't).

    reason: "length" with the last token; with None "stop", the stop token being no part of the text, and "no token"
    when the logits left nothing to choose (all −inf, or a NaN).
    """

    request: int
    token: int | None
    reason: str = ""


@dataclass(kw_only=True)
class Request:
    """What was asked for, by its number, and what was generated so far.

    Raises ValueError for max_tokens below 1, or an option of `sampling` out of range.
    """

    number: int
    prompt: list[int]
    max_tokens: int
    stop: frozenset[int]
    sampling: Sampling
    generated: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}; at least 1 is expected")
        # A trial, so that a bad option is refused here and not in the middle of a batch.
        Rows([self], V=2).choose(mx.zeros((1, 2)))

    @property
    def history(self) -> list[int]:
        """The prompt and what was generated."""
        return self.prompt + self.generated

    @property
    def last(self) -> int:
        """The token to feed next."""
        return (self.generated or self.prompt)[-1]

    def accept(self, token: int) -> Event:
        """Note the next token, and say what became of it."""
        if token == NOTHING:
            return Event(request=self.number, token=None, reason="no token")
        if token in self.stop:
            return Event(request=self.number, token=None, reason="stop")
        self.generated.append(token)
        done = len(self.generated) == self.max_tokens
        return Event(request=self.number, token=token, reason="length" if done else "")


class Rows:
    """Requests and, row by row, their state on the device: a batched cache a layer, keys [B, 2], counts [B, V]."""

    def __init__(self, requests: Sequence[Request] = (), caches: Sequence[BatchCache] = (), *, V: int) -> None:
        self.requests = list(requests)
        self.caches = list(caches)
        self.V = V
        self._keys = mx.array(np.array([_key(request.sampling.seed) for request in requests], np.uint32).reshape(-1, 2))
        # None while no row has a penalty.
        self._counts: Counts | None = None

    def choose(self, logits: mx.array) -> mx.array:
        """[B, V] → [B] int32: each row's next token, by its own options and key."""
        options = [request.sampling for request in self.requests]
        if any(sampling.penalised for sampling in options):
            logits = penalise(
                logits.astype(mx.float32),
                self._counted().array,
                repetition=[sampling.repetition for sampling in options],
                presence=[sampling.presence for sampling in options],
                frequency=[sampling.frequency for sampling in options],
            )
        pairs = mx.vmap(mx.random.split)(self._keys)
        self._keys = mx.contiguous(pairs[:, 0])
        ids = sampler(
            logits,
            temperature=[sampling.temperature for sampling in options],
            top_k=[sampling.top_k for sampling in options],
            top_p=[sampling.top_p for sampling in options],
            min_p=[sampling.min_p for sampling in options],
            key=pairs[:, 1],
        )
        if self._counts is not None:
            self._counts.add(ids)
        return ids

    @property
    def state(self) -> list[Any]:
        """Everything that the next step builds on; unevaluated, its graph would hold this one's."""
        return [self._keys, [cache.state for cache in self.caches]]

    def evaluate(self, *more: mx.array) -> None:
        """Compute `state`, and `more` with it."""
        mx.eval(*more, self.state)

    def filter(self, keep: list[int]) -> None:
        """Keep these rows; the others' memory is released."""
        self.requests = [self.requests[i] for i in keep]
        if not keep:
            self.caches, self._counts = [], None
            self._keys = self._keys[:0]
            return
        for cache in self.caches:
            cache.filter(keep)
        self._keys = self._keys[mx.array(keep)]
        if self._counts is not None:
            self._counts.filter(keep)
        self.evaluate()

    def extend(self, other: Rows) -> None:
        """Append the rows of `other`."""
        if self._counts is not None:
            self._counts.extend(other._counted())
        if self.caches:
            for mine, theirs in zip(self.caches, other.caches, strict=True):
                mine.extend(theirs)
        else:
            self.caches = other.caches
        self.requests += other.requests
        self._keys = mx.concatenate([self._keys, other._keys])
        self.evaluate()

    def _counted(self) -> Counts:
        if self._counts is None:
            histories = [request.history for request in self.requests]
            longest = max(map(len, histories))
            self._counts = Counts(mx.array([[-1] * (longest - len(ids)) + ids for ids in histories]), self.V)
        return self._counts


class Joining:
    """Rows in prefill: their prompts' tokens that are still to be fed, right-padded, the last one left for decoding."""

    def __init__(self, rows: Rows, fed: list[int]) -> None:
        self.rows = rows
        self.fed = fed
        left = [request.prompt[n:-1] for request, n in zip(rows.requests, fed, strict=True)]
        lengths = [len(tokens) for tokens in left]
        L = max(lengths)
        self._tokens = np.zeros((len(left), L), np.int32)
        for row, tokens in zip(self._tokens, left, strict=True):
            row[: len(tokens)] = tokens
        self._at = 0
        for cache in rows.caches:
            cache.prepare(lengths=lengths, right_padding=[L - n for n in lengths])

    @property
    def done(self) -> bool:
        """Whether every token has been fed."""
        return self._at == self._tokens.shape[1]

    def next(self, size: int) -> mx.array | None:
        """The next chunk [B, L] of at most `size` columns."""
        if self.done:
            return None
        chunk = self._tokens[:, self._at : self._at + size]
        self._at += chunk.shape[1]
        return mx.array(chunk)

    def finalize(self) -> None:
        """Turn right padding into left padding."""
        for cache in self.rows.caches:
            cache.finalize()
        self.rows.evaluate()

    def filter(self, keep: list[int]) -> Joining | None:
        """These rows alone; None if there are none."""
        self.rows.filter(keep)
        self.fed = [self.fed[i] for i in keep]
        self._tokens = self._tokens[keep]
        return self if keep else None


def _key(seed: int) -> list[int]:
    """mx.random.key's two words, without a trip to the device."""
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed is {seed}; 0 to 2⁶⁴ − 1 is expected")
    return [seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF]
