"""The sweep: what is tried, what is left out and said, which faults its own relations see, and that failures replay."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from audits.candidate import Candidate
from audits.contract import Contract
from audits.contracts.attention_mask import CONTRACT as MASK
from audits.contracts.matmul import CONTRACT as MATMUL
from audits.contracts.penalties import CONTRACT as PENALTIES
from audits.contracts.router import CONTRACT as ROUTER
from audits.contracts.swiglu import CONTRACT as SWIGLU
from audits.domain import Case, Range, turn
from audits.sweep import replay
from audits.verdict import Verdict

Array = Any


def few(contract: Contract, *corpus: Case, **changed: Any) -> Contract:
    """The contract with a small corpus."""
    return replace(contract, **{"corpus": lambda full: iter(corpus), "examples": 4, **changed})


SMALL = few(SWIGLU, {"rows": 2, "F": 129, "values": "large", "limit": 7.0})


def swiglu(gate: Array, up: Array, *, limit: float | None = None) -> Array:
    g, u = gate.astype(np.float32), up.astype(np.float32)
    if limit is not None:
        g, u = np.minimum(g, np.float32(limit)), np.clip(u, -limit, limit)
    return (g / (1 + np.exp(-g)) * u).astype(gate.dtype)


def candidate(function: Callable[..., Any], **told: Any) -> Candidate:
    return Candidate(**{"function": function, "framework": "numpy", "name": "test", **told})


def judged(
    function: Callable[..., Any], contract: Contract = SMALL, full: bool = False, seed: int = 0, **told: Any
) -> list[Verdict]:
    return list(contract.audit(candidate(function, **told), full=full, seed=seed))


def failing(verdicts: list[Verdict]) -> Counter[str]:
    return Counter(str(verdict.evidence["check"]) for verdict in verdicts if verdict.outcome == "fail")


def again(verdict: Verdict, function: Callable[..., Any], contract: Contract = SMALL, **told: Any) -> Verdict:
    """The verdict's case, written as JSON and read back, judged by itself."""
    return replay(contract, json.loads(json.dumps(dict(verdict.case))), candidate(function, **told))


# What is tried


def test_the_same_seed_gives_the_same_verdicts_and_another_draws_other_cases() -> None:
    first, second, other = judged(swiglu), judged(swiglu), judged(swiglu, seed=1)
    assert first == second
    assert all(verdict.evidence["digest"] for verdict in first)
    assert Counter(v.outcome for v in other) == {"pass": len(other)}
    sizes = [{(v.case["F"], v.case["rows"]) for v in verdicts} for verdicts in (first, other)]
    assert sizes[0] != sizes[1]
    assert {v.case["seed"] for v in first} != {v.case["seed"] for v in other}


def test_what_a_corpus_takes_in_turn_meets_every_dtype() -> None:
    for period in (2, 3, 6, 9, 27):
        met = {(i % period, turn(i, 3, 0)) for i in range(9 * period)}
        assert len(met) == 3 * period, period
    assert {turn(i, 1, 5) for i in range(9)} == {0}


def test_a_part_of_a_corpus_with_a_dtype_of_its_own_runs_in_that_alone_or_not_at_all() -> None:
    contract = few(SWIGLU, {"rows": 2, "F": 77, "dtype": "bfloat16"})
    assert [v.case["dtype"] for v in judged(swiglu, contract) if v.case.get("F") == 77] == ["bfloat16"]
    assert not [v for v in judged(swiglu, contract, dtypes=("float32",)) if v.case.get("F") == 77]


def test_a_router_of_one_scoring_is_judged_by_that_alone() -> None:
    def sigmoid(
        logits: Array, *, top_k: int, scoring: str, bias: Array = None, norm: bool = True, scale: float = 1.0
    ) -> tuple[Array, Array]:
        if scoring != "sigmoid":
            raise NotImplementedError(scoring)
        scores = 1 / (1 + np.exp(-logits.astype(np.float32)))
        ids = np.argsort(-(scores if bias is None else scores + bias), axis=-1, kind="stable")[:, :top_k]
        weights = np.take_along_axis(scores, ids, -1)
        weights = weights / weights.sum(-1, keepdims=True) if norm else weights
        return ids, weights * np.float32(scale)

    verdicts = judged(sigmoid, few(ROUTER, {"rows": 3, "E": 9, "k": 2, "scoring": "softmax"}))
    assert {v.case["scoring"] for v in verdicts if v.outcome == "pass"} == {"sigmoid"}
    assert not [v for v in verdicts if v.outcome not in ("pass", "skipped")]
    assert any("softmax is left out" in v.message for v in verdicts)


def test_each_case_is_judged_once_and_bases_in_every_way() -> None:
    verdicts = judged(swiglu)
    cases = [json.dumps(dict(verdict.case), sort_keys=True) for verdict in verdicts]
    assert len(set(cases)) == len(cases)
    tried = Counter((v.case["relation"], v.case["dtype"]) for v in verdicts if v.case["operand"] == "")
    for dtype in ("float32", "float16", "bfloat16"):
        assert tried["rerun", dtype] == tried["permuted rows", dtype] == 2
        assert tried["limit binds", dtype] == 1, "it means nothing without a limit"
    assert tried["after 0", "float32"] == tried["after 1", "float32"] == 2, "each base after each, itself included"
    laid = {(v.case["operand"], v.case["layout"]) for v in verdicts if v.case["layout"] != "contiguous"}
    assert {(n, x) for n in ("gate", "up") for x in ("transposed", "sliced", "strided", "reversed", "offset")} <= laid


def test_full_crosses_the_corpus_with_dtypes_and_draws_more() -> None:
    quick, full = judged(swiglu), judged(swiglu, few(SWIGLU, {"F": 129}, examples=1), full=True)
    assert len({v.case["dtype"] for v in quick if v.case["F"] == 129}) == 1
    assert len({v.case["dtype"] for v in full if v.case["F"] == 129}) == 3
    drawn = [v for v in full if v.case["F"] not in (129, 70)]
    assert len(drawn) > 12


def test_dtypes_are_respected() -> None:
    verdicts = judged(swiglu, dtypes=["bfloat16"])
    assert {verdict.case["dtype"] for verdict in verdicts} == {"bfloat16"}
    assert judged(swiglu, dtypes=["bfloat16", "bfloat16"]) == verdicts
    with pytest.raises(ValueError, match="swiglu has no dtype 'float8'; there is float32, float16, bfloat16"):
        judged(swiglu, dtypes=["float8"])


def test_a_dtype_that_the_contract_lacks_is_left_out_and_said() -> None:
    (verdict,) = judged(lambda n, *, offset, window_size=None, left_padding=None: None, MASK, dtypes=["float16"])
    assert (verdict.outcome, verdict.message) == ("skipped", "attention_mask has no float16")


def test_progress_names_contract_dtype_and_relation() -> None:
    told: list[str] = []
    list(SMALL.audit(candidate(swiglu), advance=told.append))
    assert told[:2] == ["swiglu float32 values", "swiglu float32 rerun"]


# What is left out


def test_an_optional_argument_that_is_not_taken_is_left_out_and_said() -> None:
    verdicts = judged(lambda gate, up: swiglu(gate, up))
    assert [v.message for v in verdicts if v.outcome == "skipped"] == [
        "the candidate takes no limit: what needs it is left out"
    ]
    assert {v.outcome for v in verdicts} == {"pass", "skipped"}
    assert {v.case.get("limit") for v in verdicts} == {None}
    assert "limit binds" not in {v.case.get("relation") for v in verdicts}


def test_a_case_that_needs_it_replays_as_skipped_never_as_passed() -> None:
    case = next(v.case for v in judged(swiglu) if v.case["limit"] and v.case["relation"] == "")
    verdict = replay(SMALL, case, candidate(lambda gate, up: swiglu(gate, up)))
    assert verdict.outcome == "skipped"
    assert "takes no limit" in verdict.message


def test_the_form_that_a_candidate_takes_is_used_in_every_dtype() -> None:
    def one_row(logits: Array, history: Array, *, repetition: float, presence: float, frequency: float) -> Array:
        if logits.ndim != 1 or logits.dtype == np.float32:
            raise TypeError("one row of half precision")
        counts = np.bincount(history[(history >= 0) & (history < len(logits))], minlength=len(logits))
        x = logits.astype(np.float32)
        scaled = np.where(x > 0, x / repetition, x * repetition)
        x = np.where(counts > 0, scaled - presence - frequency * counts, x)
        return x.astype(logits.dtype)

    verdicts = judged(one_row, few(PENALTIES, {"V": 50}))
    skipped = [v.message for v in verdicts if v.outcome == "skipped"]
    assert skipped[0] == "the candidate takes its operands with batched=False alone"
    assert skipped[1].startswith("float32 is left out: the candidate raised TypeError: one row")
    assert {v.outcome for v in verdicts} == {"pass", "skipped"}
    assert {v.case["batched"] for v in verdicts if v.outcome == "pass"} == {False}


# What its own checks see


def caching() -> Callable[..., Array]:
    kept: dict[Any, Any] = {}

    def by_shape(gate: Array, up: Array, *, limit: float | None = None) -> Array:
        """Compiled for a shape with the options of its first call."""
        return swiglu(gate, up, limit=kept.setdefault((gate.shape, str(gate.dtype)), limit))

    return by_shape


def test_a_candidate_that_caches_by_shape_is_caught_by_pairs_and_replays_in_a_fresh_process() -> None:
    verdicts = judged(caching())
    pair = next(v for v in verdicts if v.outcome == "fail" and v.case["relation"] == "after 0")
    assert pair.case["limit"] == 7.0
    assert "passes" not in pair.message
    fresh = again(pair, caching())
    assert (fresh.outcome, fresh.message, fresh.evidence["digest"]) == ("fail", pair.message, pair.evidence["digest"])
    assert again(pair, swiglu).outcome == "pass"


def test_a_candidate_that_keeps_its_last_result_is_caught_by_pairs() -> None:
    def keeping() -> Callable[..., Array]:
        kept: dict[Any, Array] = {}

        def by_shape(gate: Array, up: Array, *, limit: float | None = None) -> Array:
            """Computes once for each shape, dtype and options."""
            return kept.setdefault((gate.shape, str(gate.dtype), limit), swiglu(gate, up, limit=limit))

        return by_shape

    verdicts = judged(keeping())
    failed = [v for v in verdicts if v.outcome == "fail" and v.case["relation"].startswith("after")]
    assert {(v.case["relation"], v.case["limit"]) for v in failed} >= {("after 1", 7.0)}
    pair = next(v for v in failed if v.case["limit"] and v.case["relation"] == "after 1")
    fresh = again(pair, keeping())
    assert (fresh.outcome, fresh.evidence["check"]) == ("fail", "values")


def test_a_lost_device_ends_the_sweep_unjudged(monkeypatch: pytest.MonkeyPatch) -> None:
    from audits import candidate as module

    for lost_after in (0, 1, 40):
        left = [lost_after]

        def give(*arguments: Any, real: Any = module.give, left: list[int] = left) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise RuntimeError("an illegal memory access was encountered")
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(module, "give", give)
            verdicts = judged(swiglu)
            assert verdicts[-1].outcome == "could-not-judge"
            assert "the device is lost: an illegal memory access" in verdicts[-1].message
            assert len(verdicts) < 40
            assert replay(SMALL, {}, candidate(swiglu)).outcome == "could-not-judge"


def test_a_random_candidate_is_caught_by_the_rerun() -> None:
    rng = np.random.default_rng(0)

    def noisy(gate: Array, up: Array, *, limit: float | None = None) -> Array:
        out = swiglu(gate, up, limit=limit)
        return np.nextafter(out, rng.choice([-np.inf, np.inf], out.shape).astype(out.dtype))

    found = failing(judged(noisy, dtypes=["float32"]))
    assert "rerun" in found
    assert "values" not in found, "it is within its bound each time"


def test_a_failure_that_comes_and_goes_is_told_as_one() -> None:
    calls = 0

    def once(gate: Array, up: Array, *, limit: float | None = None) -> Array:
        nonlocal calls
        calls += 1
        return swiglu(gate, up, limit=limit) * (3 if calls == 5 else 1)

    verdicts = judged(once)
    (failed,) = [v for v in verdicts if v.outcome == "fail"]
    assert failed.evidence["check"] == "rerun"


def promoting(gate: Array, up: Array, *, limit: float | None = None) -> Array:
    """A limit of Python's makes it float32."""
    out = swiglu(gate, up, limit=limit)
    return out if limit is None else out.astype(np.float32)


def test_a_dtype_that_depends_on_an_option_is_caught_and_replays() -> None:
    verdicts = judged(promoting)
    assert set(failing(verdicts)) == {"dtype"}
    shrunk = next(v for v in verdicts if v.evidence.get("shrunk"))
    assert shrunk.case["dtype"] == "float16"
    assert shrunk.case["output_dtypes"] == {"float16": ["float16"]}
    assert shrunk.message == "returns float32 here, but float16 for other float16"
    told = again(shrunk, promoting)
    assert (told.message, told.evidence["digest"]) == (shrunk.message, shrunk.evidence["digest"])
    assert told.case == shrunk.case
    assert again(shrunk, swiglu).outcome == "pass"


def test_the_smaller_cases_that_are_tried_do_not_settle_what_is_usual() -> None:
    contract = few(SWIGLU, dtype_key=lambda case: f"{case['dtype']} {case['F']}")
    verdicts = judged(promoting, replace(contract, corpus=lambda full: iter([{"F": 3}, {"F": 1}, {"F": 2}])))
    assert "float16 for other float16 70" in {v.message.partition("but ")[2] for v in verdicts if v.outcome == "fail"}
    assert all(v.case["limit"] for v in verdicts if v.outcome == "fail")


@pytest.mark.parametrize(
    ("function", "check"),
    [
        (lambda gate, up, *, limit=None: swiglu(gate, up), "values"),
        (lambda gate, up, *, limit=None: swiglu(gate, up, limit=limit) * (np.arange(len(gate)) < 2)[:, None], "values"),
        (lambda gate, up, *, limit=None: swiglu(gate, up, limit=limit and limit * 1.25), "limit binds"),
        (
            lambda gate, up, *, limit=None: (
                swiglu(gate, up, limit=limit) * np.float32(1 + 0.1 * (gate[:1] > gate[-1:]))
            ),
            "permuted rows",
        ),
    ],
)
def test_failures_replay_to_the_same_message_and_digest(function: Callable[..., Any], check: str) -> None:
    verdicts = judged(lambda *a, **k: function(*a, **k).astype(a[0].dtype))
    shrunk = {str(v.evidence["check"]): v for v in verdicts if v.evidence.get("shrunk")}
    assert check in shrunk
    for verdict in shrunk.values():
        told = again(verdict, lambda *a, **k: function(*a, **k).astype(a[0].dtype))
        assert told.outcome == "fail"
        assert (told.message, told.evidence["digest"]) == (verdict.message, verdict.evidence["digest"])
        assert told.case == verdict.case
        fixed = again(verdict, swiglu)
        assert fixed.outcome == "pass", "a candidate that has been mended since"


def test_the_first_failure_of_a_check_is_shrunk_and_the_rest_are_not() -> None:
    def wrong_from_40(gate: Array, up: Array, *, limit: float | None = None) -> Array:
        out = swiglu(gate, up, limit=limit)
        out[..., 40:] = 0
        return out

    verdicts = judged(wrong_from_40)
    shrunk = [v for v in verdicts if v.evidence.get("shrunk") and v.evidence["check"] == "values"]
    assert len(shrunk) == 1
    assert (shrunk[0].case["F"], shrunk[0].case["rows"], shrunk[0].case["limit"]) == (41, 1, None)
    assert failing(verdicts)["values"] > 5
    unshrunk = SMALL.audit(candidate(wrong_from_40), shrinking=False)
    assert not any(v.evidence.get("shrunk") for v in unshrunk)


# Claims


def lengths(full: bool) -> Iterator[Case]:
    yield from ({"rows": 2, "K": K, "N": 2, "values": "positive"} for K in (96, 129, 200))


SUMS = replace(MATMUL, fields={**MATMUL.fields, "K": Range(1, 200), "N": Range(1, 9)}, corpus=lengths, examples=3)


def sums_in_half(a: Array, b: Array) -> Array:
    """Every partial sum is stored in the inputs' dtype."""
    total = np.zeros((*a.shape[:-1], b.shape[-1]), a.dtype)
    for k in range(a.shape[-1]):
        total = (total + (a[..., k, None] * b[..., k, None, :]).astype(a.dtype)).astype(a.dtype)
    return total


def test_claims_let_honest_half_sums_pass_that_fail_by_default() -> None:
    assert failing(judged(sums_in_half, SUMS, dtypes=["float16"]))["values"] > 0
    claimed = judged(sums_in_half, SUMS, dtypes=["float16"], claims=lambda dtype: {"accumulate": "float16"})
    assert {v.outcome for v in claimed} == {"pass"}
    assert {json.dumps(v.case["claims"]) for v in claimed} == {'{"accumulate": "float16"}'}


def test_too_loose_a_claim_cannot_be_judged_and_never_passes() -> None:
    long = replace(SUMS, corpus=lambda full: iter([{"rows": 2, "K": 4097, "N": 2}]), examples=0)
    verdicts = judged(
        lambda a, b: (a.astype(np.float64) @ b.astype(np.float64)).astype(a.dtype),
        long,
        dtypes=["bfloat16"],
        claims=lambda dtype: {"accumulate": "bfloat16"},
    )
    (loose,) = [v for v in verdicts if v.case["K"] == 4097]
    assert loose.outcome == "could-not-judge"
    assert "wider than the values in every row" in loose.message
    told = replay(long, loose.case, candidate(sums_in_half, claims=lambda dtype: {"accumulate": "bfloat16"}))
    assert told.outcome == "could-not-judge"


# What is no case


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"F": "3"}, "F can't be '3'"),
        ({"F": None}, "F can't be None"),
        ({"F": -3}, "F can't be -3"),
        ({"rows": 2.5}, "rows can't be 2.5"),
        ({"dtype": "float8"}, "dtype can't be 'float8'; it is one of 'float32', 'float16', 'bfloat16'"),
        ({"dtype": 16}, "dtype can't be 16"),
        ({"layout": "fortran"}, "layout can't be 'fortran'"),
        ({"operand": "x"}, "operand can't be 'x'; it is one of '', 'gate', 'up', 'limit'"),
        ({"seed": -1}, "seed can't be -1"),
        ({"values": ["normal"]}, "values can't be"),
        ({"limit": "7"}, "limit can't be '7'"),
        (
            {"relation": "upside down"},
            "swiglu has no relation 'upside down'; there is rerun, permuted rows, limit binds",
        ),
        ({"relation": "after 9"}, "no relation 'after 9'"),
        ({"relation": "after x"}, "no relation 'after x'"),
        ({"relation": 3}, "no relation 3"),
        ({"relation": ["rerun"]}, "no relation"),
        ({"relation": "limit binds"}, "'limit binds' means nothing for this case"),
        ({"output_dtypes": 3}, "output_dtypes"),
        ({"output_dtypes": {"float16": 3}}, "output_dtypes"),
    ],
)
def test_what_is_no_case_is_one_clear_line(changed: dict[str, Any], told: str) -> None:
    case = next(v.case for v in judged(swiglu) if v.case["limit"] is None)
    with pytest.raises(ValueError, match=told) as error:
        replay(SMALL, {**case, **changed}, candidate(swiglu))
    assert "\n" not in str(error.value)


def test_fields_that_do_not_go_together_are_no_case() -> None:
    contract = few(SWIGLU, valid=lambda case: case["F"] != 13)
    with pytest.raises(ValueError, match="no case of swiglu: its fields don't go together"):
        replay(contract, {"F": 13}, candidate(swiglu))


def test_missing_fields_take_their_simplest_value() -> None:
    verdict = replay(SMALL, {}, candidate(swiglu))
    assert verdict.outcome == "pass"
    assert (verdict.case["F"], verdict.case["dtype"], verdict.case["limit"]) == (1, "float32", None)


def test_a_first_call_that_is_wrong_is_seen() -> None:
    """Nothing but the first call of the process, which only asks whether the dtype is taken, goes wrong."""
    calls: list[int] = []

    def warms_up(gate: Array, up: Array, *, limit: float | None = None) -> Array:
        calls.append(1)
        return swiglu(gate, up, limit=limit) * (2 if len(calls) == 1 else 1)

    failed = [v for v in judged(warms_up) if v.outcome == "fail"]
    assert [v.message for v in failed] == ["fails at times and passes at times, in one and the same case"]


@pytest.mark.parametrize("period", [3, 6, 9])
def test_the_corpus_pairs_every_option_with_every_dtype(period: int) -> None:
    """Options that return every three, six or nine cases: dtypes that took turns so too would meet one each alone."""
    limits = (1.0, 7.0, 10.0)
    cases = [{"F": 401 + i, "limit": limits[i % period % 3]} for i in range(6 * period)]
    verdicts = judged(swiglu, few(SWIGLU, *cases, examples=0))
    assert len({(v.case["dtype"], v.case["limit"]) for v in verdicts if v.case["F"] > 400}) == 9


@pytest.mark.parametrize(("dtypes", "expected"), [(("float32",), 0), (("bfloat16",), 1)])
def test_a_case_of_one_dtype_is_left_out_with_it(dtypes: tuple[str, ...], expected: int) -> None:
    only = few(SWIGLU, {"F": 257, "dtype": "bfloat16"}, examples=0)
    assert sum(v.case["F"] == 257 for v in judged(swiglu, only, dtypes=dtypes)) == expected
