"""Driving a whole model: a sequence of calls with one cache, as prefill, decode, chunks or drafts would make them.

A decoder is called as decoder(tokens [B, n], cache=None) and returns logits [B, n, V], or those and a cache to be
passed to the next call. In place of that it may offer `make_cache()` (and `make_cache(left_padding=[…])` for batches of
unequal lengths): a cache, or a list of them a layer, that the calls update. `vocab_size` says which ids there are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np

from audits.candidate import Candidate, CandidateError, guarded
from audits.frameworks import give, take

VOCABULARY = 32  # ids below this are used where a decoder doesn't say how many it has
DRAFTED = 7  # ids below this are drafted


def vocabulary(candidate: Candidate) -> int:
    """How many ids the decoder takes; ValueError if it says what is no such number."""
    told = getattr(candidate.function, "vocab_size", VOCABULARY)
    if not isinstance(told, int) or told < DRAFTED:
        raise ValueError(f"{candidate.name} has a vocab_size of {told!r}; an integer from {DRAFTED} on is expected")
    return told


def adapted(candidate: Candidate) -> Candidate:
    """The candidate as a function of a whole session, session(tokens, *, chunks, draft, left_padding) -> logits.

    chunks: how many tokens each call gets, in order (None: one call without a cache). draft: after that many tokens,
    feed a draft of three or eight, of which none, one or two are right, and take the others back; a cache that says by
    then that it can't be trimmed is made anew, as engines do. Its signature leaves out what the candidate offers no
    means for.
    """
    decoder = candidate.function
    make = getattr(decoder, "make_cache", None)
    offered = ["tokens"]
    if "cache" in _parameters(decoder) and (make is not None or _returns_cache(candidate)):
        offered.append("chunks")
        if make is not None and _trims(make):
            offered.append("draft")
    if make is not None and "left_padding" in _parameters(make):
        offered.append("left_padding")
    session = _session(decoder, make, candidate.framework)
    session.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # what inspect.signature looks at first
        [
            inspect.Parameter(name, _KEYWORD if name != "tokens" else inspect.Parameter.POSITIONAL_OR_KEYWORD)
            for name in offered
        ]
    )
    session.vocab_size = vocabulary(candidate)  # type: ignore[attr-defined]
    return replace(candidate, function=session)


_KEYWORD = inspect.Parameter.KEYWORD_ONLY


def _session(decoder: Any, make: Any, framework: str) -> Callable[..., Any]:
    def session(
        tokens: Any,
        *,
        chunks: Sequence[int] | None = None,
        draft: int | None = None,
        left_padding: Sequence[int] | None = None,
    ) -> Any:
        if chunks is None and left_padding is None:
            return _logits(decoder(tokens))[0]
        cache = None if make is None else make() if left_padding is None else make(left_padding=list(left_padding))
        parts, at = [], 0
        for end in accumulate(chunks or (tokens.shape[1],)):
            if draft is not None and at == draft:
                logits, cache = drafted(tokens, at, cache)
                parts.append(logits)
                at += logits.shape[1]
            if end > at:
                logits, cache = _logits(decoder(tokens[:, at:end], cache=cache), cache)
                parts.append(take(logits))
                at = end
        return np.concatenate(parts, axis=1)

    def drafted(tokens: Any, at: int, cache: Any) -> tuple[Any, Any]:
        """Logits of the accepted part of a draft after `at` tokens, and the cache with the rest taken back."""
        known = take(tokens)
        count, accepted = (8, 3)[at % 2], min(at % 3, known.shape[1] - at)
        wrong = (known[:, np.arange(count - accepted) % known.shape[1]] + 1) % DRAFTED
        draft = np.concatenate([known[:, at : at + accepted], wrong], axis=1).astype(np.int32)
        logits, cache = _logits(decoder(give(draft, framework), cache=cache), cache)
        if not all(_trimmable(one) for one in _layers(cache)):
            cache = make()
            decoder(tokens[:, :at], cache=cache)
            return take(logits)[:, :0], cache
        for one in _layers(cache):
            one.trim(count - accepted)
        return take(logits)[:, :accepted], cache

    return session


def _trimmable(cache: Any) -> bool:
    return bool(getattr(cache, "is_trimmable", lambda: True)())


def _logits(result: Any, cache: Any = None) -> tuple[Any, Any]:
    """The logits of one call, and the cache to go on with."""
    return (result[0], result[1]) if isinstance(result, tuple) else (result, cache)


def _layers(cache: Any) -> list[Any]:
    return list(cache) if isinstance(cache, list | tuple) else [cache]


def _parameters(function: Any) -> set[str]:
    with suppress(TypeError, ValueError):
        return set(inspect.signature(function).parameters)
    return set()


def _trims(make: Any) -> bool:
    """Whether every layer's cache can take back tokens; not if it can't be made, which the sweep will find."""
    with suppress(CandidateError):
        layers = guarded(lambda: _layers(make()))
        return bool(guarded(lambda: all(hasattr(x, "trim") and _trimmable(x) for x in layers)))
    return False


def _returns_cache(candidate: Candidate) -> bool:
    tokens = give(np.zeros((1, 2), dtype=np.int32), candidate.framework, device=candidate.device)
    with suppress(CandidateError):
        return isinstance(guarded(lambda: candidate.function(tokens)), tuple)
    return False
