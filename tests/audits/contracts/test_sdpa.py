"""sdpa's contract: each relation sees its fault, blind queries are judged, failures shrink and replay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from audits.attention_corpus import BASES, THRESHOLDS
from audits.candidate import Candidate, load
from audits.contracts.sdpa import CONTRACT
from audits.domain import filled
from audits.sweep import Sweep, replay

FOLDER = Path(__file__).parents[2] / "mutants" / "sdpa"
Array = Any
HONEST: Callable[..., Array] = load(f"{FOLDER / 'numpy_steps.py'}:candidate")
NONE, CAUSAL, BOOL, ADDITIVE, WINDOW = range(5)


def sweep(function: Callable[..., Array]) -> Sweep:
    return Sweep(CONTRACT, Candidate(function=function, framework="numpy", name="test"))


def case(base: int, **fields: Any) -> dict[str, Any]:
    return {**filled(CONTRACT.domain, {**CONTRACT.bases[base], "dtype": "float32"}), "relation": "", **fields}


def altered(change: Callable[[Array, dict[str, Any]], Array]) -> Callable[..., Array]:
    """The honest candidate with its output changed, given the call's arguments."""

    def candidate(q: Array, k: Array, v: Array, *, scale: float, mask: Array = None, sinks: Array = None) -> Array:
        output = HONEST(q, k, v, scale=scale, mask=mask, sinks=sinks)
        return change(output, {"q": q, "k": k, "v": v, "scale": scale, "mask": mask, "sinks": sinks})

    return candidate


def when(condition: Callable[[dict[str, Any]], bool]) -> Callable[..., Array]:
    """1% off when the condition holds of the arguments."""
    return altered(lambda output, args: output * np.float32(1.01 if condition(args) else 1))


def one_off(place: Any) -> Callable[..., Array]:
    def change(output: Array, args: dict[str, Any]) -> Array:
        output[place] *= np.float32(1.01)
        return output

    return altered(change)


def is_array(mask: Any, kind: str) -> bool:
    return isinstance(mask, np.ndarray) and mask.dtype.kind == kind


LEAK = altered(lambda output, args: output + np.float32(1e-4 * args["k"].mean()))
UNREAD = altered(
    lambda output, args: HONEST(**{**args, "q": np.where(np.arange(args["q"].shape[3]) < 31, args["q"], 0)})
)


def split_convention(output: Array, args: dict[str, Any]) -> Array:
    """Zeros, as the honest one; a mean when there is one query."""
    if not is_array(args["mask"], "b"):
        return output
    seen = np.broadcast_to(args["mask"], (*output.shape[:3], args["k"].shape[2])).any(-1, keepdims=True)
    mean = np.repeat(args["v"].mean(2, keepdims=True), output.shape[1] // args["v"].shape[1], axis=1)
    return np.where(seen, output, mean if output.shape[2] == 1 else 0 * mean)


FAULTS: dict[str, tuple[int, Callable[..., Array]]] = {
    "future key": (CAUSAL, LEAK),
    "outside window": (WINDOW, LEAK),
    "masked key": (BOOL, LEAK),
    "all-true mask equals none": (NONE, when(lambda a: is_array(a["mask"], "b"))),
    "additive zero equals none": (NONE, when(lambda a: is_array(a["mask"], "f") and not a["mask"].any())),
    "shifted scores": (NONE, when(lambda a: is_array(a["mask"], "f") and bool(a["mask"].any()))),
    "causal equals its bool form": (CAUSAL, when(lambda a: is_array(a["mask"], "b"))),
    "batch equals alone": (NONE, when(lambda a: len(a["q"]) == 1)),
    "permuted batch": (NONE, one_off(0)),
    "permuted heads": (NONE, one_off((slice(None), 0))),
    "permuted keys": (BOOL, altered(lambda out, a: out * (1 + np.float32(0.1) * np.tanh(a["k"][0, 0, 0, 0])))),
    "appended hidden keys": (BOOL, when(lambda a: a["k"].shape[2] > 11)),
    "decode equals prefill": (NONE, when(lambda a: a["q"].shape[2] == 1)),
    "chunked equals whole": (CAUSAL, when(lambda a: a["q"].shape[2] == 2)),
    "fully masked rows": (BOOL, altered(split_convention)),
    "options matter": (WINDOW, when(lambda a: a["sinks"] is None)),
    "every element counts": (NONE, UNREAD),
    "rerun": (NONE, altered(lambda output, args: output + np.float32(1e-7) * len(CALLS.append(0) or CALLS))),
}
CALLS: list[int] = []


def test_every_relation_has_a_fault_here() -> None:
    assert set(FAULTS) == {"rerun", *(relation.name for relation in CONTRACT.relations)}


@pytest.mark.parametrize("name", FAULTS)
def test_a_relation_sees_its_fault_and_passes_honest_code(name: str) -> None:
    base, fault = FAULTS[name]
    verdict = Sweep(CONTRACT, sweep(fault).candidate, shrinking=False).verdict(case(base, relation=name))
    assert (verdict.outcome, verdict.evidence.get("check")) == ("fail", name)
    for dtype in ("float32", "float16", "bfloat16"):
        assert sweep(HONEST).verdict(case(base, relation=name, dtype=dtype)).outcome == "pass"


@pytest.mark.parametrize(
    ("fill", "sinks", "outcome"),
    [
        (0.0, "none", "pass"),
        ("mean", "none", "pass"),
        (1.0, "none", "fail"),
        (np.nan, "none", "fail"),
        (0.0, "normal", "pass"),
        ("mean", "normal", "fail"),
        (np.nan, "normal", "fail"),
    ],
)
def test_blind_queries_give_zeros_or_the_mean_and_with_sinks_zeros(fill: Any, sinks: str, outcome: str) -> None:
    def change(output: Array, args: dict[str, Any]) -> Array:
        seen = np.broadcast_to(args["mask"], (*output.shape[:3], args["k"].shape[2])).any(-1, keepdims=True)
        mean = np.repeat(args["v"].mean(2, keepdims=True), output.shape[1] // args["v"].shape[1], axis=1)
        return np.where(seen, output, mean if fill == "mean" else fill)

    verdict = sweep(altered(change)).verdict(case(BOOL, pattern="empty", sinks=sinks))
    assert verdict.outcome == outcome


@pytest.mark.parametrize("fill", [0.0, np.nan, "mean", 1.0, np.inf])
def test_rows_hidden_by_minus_infinity_may_be_zeros_nan_or_the_mean(fill: Any) -> None:
    def change(output: Array, args: dict[str, Any]) -> Array:
        hidden = np.broadcast_to(np.isneginf(args["mask"]), (*output.shape[:3], 11)).all(-1, keepdims=True)
        mean = np.repeat(args["v"].mean(2, keepdims=True), 2, axis=1)
        assert hidden.any()
        return np.where(hidden, mean if fill == "mean" else fill, output)

    def half(output: Array, args: dict[str, Any]) -> Array:
        changed = change(output, args)
        return np.where(np.arange(len(output))[:, None, None, None] == 0, changed, output)

    blind = case(ADDITIVE, fill="-inf", pattern="empty")
    accepted = fill in (0.0, "mean") or np.isnan(fill)
    assert sweep(altered(change)).verdict(blind).outcome == ("pass" if accepted else "fail")
    if fill != 0.0:  # the other half has zeros
        assert sweep(altered(half)).verdict(blind).evidence["check"] == "fully masked rows"


def test_queries_before_the_first_key_see_none_and_a_candidate_may_refuse_them() -> None:
    def refusing(q: Array, k: Array, v: Array, *, scale: float, mask: Array = None, sinks: Array = None) -> Array:
        if isinstance(mask, str) and q.shape[2] > k.shape[2]:
            raise ValueError("more queries than keys")
        return HONEST(q, k, v, scale=scale, mask=mask, sinks=sinks)

    before = case(CAUSAL, L=9, S=4, sinks="none")
    assert sweep(HONEST).verdict(before).outcome == "pass"
    top_left = altered(lambda out, a: HONEST(**{**a, "mask": np.tri(9, 4, dtype=bool)}))
    assert sweep(top_left).verdict(before).outcome == "fail"
    few = replace(CONTRACT, corpus=lambda full: iter([{"L": 9, "S": 4, "mask": "causal"}]), bases=BASES[:1], examples=0)
    verdicts = list(few.audit(Candidate(function=refusing, framework="numpy", name="test", dtypes=("float32",))))
    assert not [v for v in verdicts if v.outcome in ("fail", "could-not-judge")]
    assert [v.message for v in verdicts if "more queries than keys" in v.message]
    assert not [v for v in verdicts if v.case.get("L") == 9]


@pytest.mark.parametrize("fill", ["zeros", "mean", "first", "outside"])
def test_rows_hidden_by_the_least_number_may_be_zeros_or_any_mean(fill: str) -> None:
    def change(output: Array, args: dict[str, Any]) -> Array:
        hidden = (np.broadcast_to(args["mask"], (*output.shape[:3], args["k"].shape[2])) < -1e30).all(-1, keepdims=True)
        assert hidden.any()
        values = np.repeat(args["v"], output.shape[1] // args["v"].shape[1], axis=1)
        filled = {"zeros": 0 * values, "mean": values.mean(2, keepdims=True), "first": values, "outside": values + 9}
        return np.where(hidden, filled[fill][:, :, :1], output)

    verdict = sweep(altered(change)).verdict(case(ADDITIVE, fill="lowest", pattern="empty"))
    assert verdict.outcome == ("fail" if fill == "outside" else "pass")


def test_two_conventions_in_one_output_are_a_finding() -> None:
    def change(output: Array, args: dict[str, Any]) -> Array:
        blind = ~np.broadcast_to(args["mask"], (*output.shape[:3], args["k"].shape[2])).any(-1)
        b, h, query = np.argwhere(blind)[0]
        output[b, h, query] = args["v"][b, h * args["v"].shape[1] // output.shape[1]].mean(0)
        return output

    verdict = sweep(altered(change)).verdict(case(BOOL, pattern="empty"))
    assert verdict.evidence["check"] == "fully masked rows"
    assert "a mean, and others zeros" in verdict.message


def test_a_wrong_element_in_one_row_is_seen_named_and_replayed_bit_for_bit() -> None:
    fault = one_off((-1, -1, -1, -1))
    verdict = Sweep(CONTRACT, sweep(fault).candidate, shrinking=False).verdict(case(ADDITIVE))
    assert verdict.evidence["worst"]["index"] == [1, 3, 2, 31]
    again = replay(CONTRACT, verdict.case, sweep(fault).candidate)
    assert (again.message, again.evidence["digest"]) == (verdict.message, verdict.evidence["digest"])


def test_a_failure_is_shrunk_to_the_tail_that_makes_it() -> None:
    def tail(output: Array, args: dict[str, Any]) -> Array:
        S = args["k"].shape[2]
        if S % 16 == 0 or S < 16 or args["mask"] is not None:
            return output
        return HONEST(**{**args, "k": args["k"][:, :, : S // 16 * 16], "v": args["v"][:, :, : S // 16 * 16]})

    verdict = sweep(altered(tail)).verdict(case(NONE, S=61, D=128, values="ties", L=5))
    assert verdict.outcome == "fail"
    assert {n: verdict.case[n] for n in ("B", "Hkv", "r", "L", "S", "D")} == {
        "B": 1, "Hkv": 1, "r": 1, "L": 1, "S": 17, "D": 32,
    }  # fmt: skip


def test_a_candidate_without_options_is_judged_on_what_it_takes() -> None:
    def plain(q: Array, k: Array, v: Array, *, scale: float) -> Array:
        return HONEST(q, k, v, scale=scale)

    verdicts = [
        sweep(plain).verdict(case(NONE, relation=relation.name))
        for relation in CONTRACT.relations
        if relation.applies(case(NONE))
    ]
    assert {verdict.outcome for verdict in verdicts} == {"pass", "skipped"}
    assert all("takes no mask" in verdict.message for verdict in verdicts if verdict.outcome == "skipped")


def test_the_corpus_covers_all_residues_and_is_valid() -> None:
    full = [filled(CONTRACT.domain, part) for part in CONTRACT.corpus(True)]
    lengths = [c for c in full if CONTRACT.valid(c)]
    assert len(lengths) > 0.95 * len(full)
    assert {c["L"] % 128 for c in lengths} == {(c["S"] - c["L"]) % 128 for c in lengths} == set(range(128))
    quick = [filled(CONTRACT.domain, part) for part in CONTRACT.corpus(False)]
    assert {c["L"] % 128 for c in quick} == {(c["S"] - c["L"]) % 128 for c in quick} == set(range(128))
    assert {(c["L"] % 8, c["S"] % 16) for c in quick} == set(product(range(8), range(16)))


def test_each_pair_of_settings_meets_beyond_every_threshold() -> None:
    found = [c for c in CONTRACT.corpus(False) if "dtype" in c]
    settings = ("mask", "B", "Hkv", "L", "sinks", "dtype")
    for n in THRESHOLDS:
        here = [filled(CONTRACT.domain, c) for c in found if n < c["S"] < n + 50]
        assert all(CONTRACT.valid(c) for c in here)
        for one, other in combinations(settings, 2):
            pairs = {(c[one], c[other]) for c in here}
            assert pairs == set(product({c[one] for c in here}, {c[other] for c in here})), (n, one, other)


def test_a_decoy_outweighs_all_that_its_query_sees() -> None:
    args = CONTRACT.build(case(BOOL, values="decoy", S=60)).args
    scores = args["q"] @ np.repeat(args["k"], 2, axis=1).swapaxes(-1, -2) * args["scale"]
    hidden = ~np.broadcast_to(args["mask"], scores.shape)
    assert (np.where(hidden, scores, -np.inf).max(-1) > np.where(hidden, -np.inf, scores).max(-1)).mean() > 0.9


def test_planes_of_a_mask_differ() -> None:
    for base, plane in ((BOOL, "BHLS"), (BOOL, "B1LS"), (BOOL, "1HLS"), (ADDITIVE, "BHLS")):
        mask = CONTRACT.build(case(base, plane=plane)).args["mask"]
        for axis in (0, 1):
            if mask.shape[axis] > 1:
                assert (np.take(mask, 0, axis=axis) != np.take(mask, 1, axis=axis)).any()
