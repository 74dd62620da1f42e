"""Driving a decoder: what it offers is found out, each route feeds it the same tokens, and its errors are its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from audits.candidate import Candidate
from audits.contract import Call
from audits.contracts.decoder import CONTRACT
from audits.decoding import VOCABULARY, adapted, vocabulary

Array = Any


class Cache:
    """The tokens so far, [B, n]."""

    def __init__(self, left_padding: list[int] | None = None) -> None:
        self.left_padding = left_padding
        self.tokens: Array = None

    def trim(self, n: int) -> int:
        self.tokens = self.tokens[:, : self.tokens.shape[1] - n]
        return n


class Sums:
    """Logits that tell the running sum of all tokens so far; `fed` notes every call."""

    vocab_size = 50

    def __init__(self) -> None:
        self.fed: list[list[int]] = []

    def make_cache(self, left_padding: list[int] | None = None) -> list[Cache]:
        return [Cache(left_padding)]

    def __call__(self, tokens: Array, cache: list[Cache] | None = None) -> Array:
        self.fed.append(tokens[0].tolist())
        so_far = tokens
        if cache is not None:
            (layer,) = cache
            so_far = tokens if layer.tokens is None else np.concatenate([layer.tokens, tokens], axis=1)
            layer.tokens = so_far
        real = so_far
        if cache is not None and cache[0].left_padding:
            real = so_far * (np.arange(so_far.shape[1]) >= np.array(cache[0].left_padding)[:, None])
        sums = np.cumsum(real, axis=1)[:, -tokens.shape[1] :, None]
        return np.sin(sums * np.linspace(0.1, 3, 8)).astype(np.float32)


def candidate(decoder: Any) -> Candidate:
    return Candidate(function=decoder, framework="numpy", name="test")


def offered(decoder: Any) -> tuple[str, ...]:
    lacking = adapted(candidate(decoder)).lacks(CONTRACT.arguments)
    return tuple(a.name for a in CONTRACT.arguments if a.name not in lacking)


def routed(decoder: Any, **route: Any) -> Array:
    session = adapted(candidate(decoder))
    tokens = np.array([[1, 2, 3, 4, 5]], np.int32)
    (logits,) = session(Call({"tokens": tokens, **route}), CONTRACT.arguments)
    return logits


def test_what_a_decoder_offers_is_found_out() -> None:
    assert offered(Sums()) == ("tokens", "chunks", "draft", "left_padding")
    assert offered(lambda tokens: tokens) == ("tokens",)
    assert offered(lambda tokens, cache=None: tokens) == ("tokens",), "a cache that nobody can make"
    assert offered(lambda tokens, cache=None: (tokens, cache)) == ("tokens", "chunks")

    class NoTrim(Sums):
        def make_cache(self) -> list[Any]:  # type: ignore[override]
            return [object()]

    class SaysNo(Sums):
        def make_cache(self) -> list[Any]:  # type: ignore[override]
            cache = Cache()
            cache.is_trimmable = lambda: False  # type: ignore[attr-defined]
            return [cache]

    assert offered(NoTrim()) == offered(SaysNo()) == ("tokens", "chunks")


def test_what_raises_while_it_is_asked_is_not_offered() -> None:
    class Broken(Sums):
        def make_cache(self) -> list[Any]:  # type: ignore[override]
            raise RuntimeError("no memory")

    def raises(tokens: Array, cache: Any = None) -> Array:
        raise RuntimeError("no weights")

    assert offered(Broken()) == ("tokens", "chunks")
    assert offered(raises) == ("tokens",)


def test_chunks_feed_the_same_tokens_in_order() -> None:
    decoder = Sums()
    whole = routed(decoder)
    chunked = routed(decoder, chunks=[2, 1, 2])
    assert decoder.fed == [[1, 2, 3, 4, 5], [1, 2], [3], [4, 5]]
    assert chunked.shape == (1, 5, 8)
    np.testing.assert_array_equal(whole, chunked)


def test_a_draft_feeds_other_tokens_and_takes_them_back() -> None:
    decoder = Sums()
    np.testing.assert_array_equal(routed(decoder, chunks=[3, 1, 1], draft=3), routed(decoder))
    assert decoder.fed[:4] == [[1, 2, 3], [2, 3, 4], [4], [5]]


def test_a_returned_cache_is_passed_on() -> None:
    def returning(tokens: Array, cache: Any = None) -> tuple[Array, Any]:
        so_far = tokens if cache is None else np.concatenate([cache, tokens], axis=1)
        return so_far[:, -tokens.shape[1] :, None].cumsum(1) + (0 if cache is None else cache.sum()), so_far

    np.testing.assert_array_equal(routed(returning, chunks=[1, 4]), routed(returning))


def test_an_honest_decoder_passes_with_all_relations() -> None:
    verdicts = list(CONTRACT.audit(candidate(Sums())))
    assert {verdict.outcome for verdict in verdicts} == {"pass"}
    assert {relation.name for relation in CONTRACT.relations} <= {verdict.case["relation"] for verdict in verdicts}


@pytest.mark.parametrize("size", [8, 50, None])
def test_tokens_are_those_that_the_decoder_has(size: int | None) -> None:
    class Sized(Sums):
        seen: set[int] = set()  # noqa: RUF012  # shared on purpose

        def __call__(self, tokens: Array, cache: Any = None) -> Array:
            self.seen.update(tokens.ravel().tolist())
            return super().__call__(tokens, cache)

    decoder = Sized()
    decoder.seen.clear()
    decoder.vocab_size = VOCABULARY if size is None else size
    assert vocabulary(candidate(decoder)) == (size or VOCABULARY)
    verdicts = list(CONTRACT.audit(candidate(decoder)))
    assert max(decoder.seen) == (size or VOCABULARY) - 1
    assert {verdict.case["V"] for verdict in verdicts} == {size or VOCABULARY}


@pytest.mark.parametrize("told", ["many", 2, None, 3.5])
def test_a_vocabulary_that_is_no_number_is_one_clear_line(told: Any) -> None:
    decoder = Sums()
    decoder.vocab_size = told
    with pytest.raises(ValueError, match=r"test has a vocab_size of .*; an integer from 7 on is expected"):
        list(CONTRACT.audit(candidate(decoder)))


def raises(tokens: Array, cache: Any = None) -> Array:
    raise RuntimeError("no weights")


@pytest.mark.parametrize(
    ("decoder", "check"),
    [
        (raises, "raises"),
        (lambda: 0, "raises"),
        (lambda tokens: None, "shape"),
        (lambda tokens: 1.0, "shape"),
        (lambda tokens: tokens, "shape"),
        (lambda tokens: tokens[..., None] * np.float32(np.nan), "values"),
        (lambda tokens: np.ones((*tokens.shape, 4), np.float32), "history matters"),
    ],
)
def test_a_wrong_decoder_fails_the_right_check(decoder: Callable[..., Any], check: str) -> None:
    verdicts = list(CONTRACT.audit(candidate(decoder)))
    failed = {str(verdict.evidence["check"]) for verdict in verdicts if verdict.outcome == "fail"}
    assert check in failed


def test_a_draft_that_stays_fails_its_relation_and_replays() -> None:
    class Keeps(Sums):
        def make_cache(self, left_padding: list[int] | None = None) -> list[Cache]:
            cache = Cache(left_padding)
            cache.trim = lambda n: 0  # type: ignore[method-assign]
            return [cache]

    verdicts = list(CONTRACT.audit(candidate(Keeps())))
    failed = [verdict for verdict in verdicts if verdict.outcome == "fail"]
    assert {str(verdict.evidence["check"]) for verdict in failed} == {"rejected draft"}
    first = next(verdict for verdict in failed if verdict.evidence.get("shrunk"))
    assert CONTRACT.replay(first.case, candidate(Keeps())).message == first.message
    assert CONTRACT.replay(first.case, candidate(Sums())).outcome == "pass"
