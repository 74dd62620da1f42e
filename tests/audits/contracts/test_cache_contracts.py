"""The cache contracts: what a failure says, that it shrinks and replays, what is skipped, and no false alarm."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from audits.affine import decode as dequantised
from audits.cache_contract import CacheContract
from audits.cache_judge import visible_places
from audits.cache_object import shown
from audits.cache_program import program_text
from audits.cache_values import KEY, Label, Tokens, decode, parts, quantisation_error
from audits.candidate import Candidate, CandidateError, load
from audits.catalogue import contract
from audits.contract import Finding
from audits.exports import html
from audits.frameworks import DTYPES, give, take
from audits.report import case_line, report_json
from audits.verdict import Report, Verdict

MUTANTS = Path(__file__).parents[2] / "mutants"
CONTRACTS = (
    "kv_cache",
    "rotating_kv_cache",
    "chunked_kv_cache",
    "quantized_kv_cache",
    "batch_kv_cache",
    "batch_rotating_kv_cache",
    "batch_quantized_kv_cache",
)


def base(name: str, file: str) -> Any:
    return load(f"{MUTANTS / name / file}:candidate")


def audited(name: str, function: Callable[..., Any], framework: str = "numpy", **options: Any) -> list[Verdict]:
    candidate = Candidate(function=function, framework=framework, name="candidate", dtypes=options.pop("dtypes", ()))
    return list(contract(name).audit(candidate, full=False, seed=0, advance=lambda _: None, **options))


def failures(verdicts: list[Verdict]) -> list[Verdict]:
    return [verdict for verdict in verdicts if verdict.outcome in ("fail", "could-not-judge")]


@pytest.mark.parametrize("name", CONTRACTS)
def test_the_engines_own_caches_pass(name: str) -> None:
    from engine.contracts import implementation

    verdicts = audited(name, implementation(name), "mlx", shrinking=False)
    assert not failures(verdicts), failures(verdicts)[0].message
    assert {v.case["dtype"] for v in verdicts if v.outcome == "pass"} == set(DTYPES)


class Ring(base("rotating_kv_cache", "numpy_ring.py")):  # type: ignore[misc]
    """Trims a full ring as if it were in order."""

    def is_trimmable(self) -> bool:
        return True


def test_a_failure_is_named_shrunk_and_replays_bit_for_bit() -> None:
    candidate = Candidate(function=Ring, framework="numpy", name="ring")
    found = contract("rotating_kv_cache")
    verdicts = list(found.audit(candidate, full=False, seed=0, advance=lambda _: None))
    failed = failures(verdicts)
    shrunk = next(v for v in failed if v.evidence.get("shrunk") and v.evidence["check"] == "stale token")
    assert "was taken back" in shrunk.message and "row 0 head 0: the key at place" in shrunk.message
    assert len(shrunk.case["program"]) <= 4
    assert [op["op"] for op in shrunk.case["program"]].count("trim") == 1
    again = found.replay(shrunk.case, candidate)
    assert again.outcome == "fail" and again.message == shrunk.message
    assert again.evidence["digest"] == shrunk.evidence["digest"]
    assert found.replay(shrunk.case, Candidate(function=base("rotating_kv_cache", "numpy_ring.py"),
                                               framework="numpy", name="honest")).outcome == "pass"  # fmt: skip


def test_two_audits_of_one_seed_are_the_same_to_the_bit_and_another_seed_draws_other_programs() -> None:
    found = contract("chunked_kv_cache")
    candidate = Candidate(function=base("chunked_kv_cache", "numpy_buffer.py"), framework="numpy", name="rows")
    first, second, other = (
        [(v.outcome, v.case, v.evidence.get("digest")) for v in found.audit(
            candidate, full=False, seed=seed, advance=lambda _: None)] for seed in (0, 0, 1)
    )  # fmt: skip
    assert first == second
    programs = [[case.get("program") for _, case, _ in run] for run in (first, other)]
    assert programs[0] != programs[1]


def test_codes_of_another_width_than_was_asked_for_are_a_finding() -> None:
    made = base("quantized_kv_cache", "numpy_affine.py")
    for bits in (3, 4):
        verdicts = audited("quantized_kv_cache", lambda group_size, bits, told=bits: made(group_size, told))
        assert failures(verdicts)[0].evidence["check"] == "shape"


def test_a_lost_and_a_foreign_token_are_told_with_what_was_expected() -> None:
    class Swapped(base("kv_cache", "numpy_buffer.py")):  # type: ignore[misc]
        def update_and_fetch(self, keys: Any, values: Any) -> Any:
            return super().update_and_fetch(keys[::-1], values)

    failed = failures(audited("kv_cache", Swapped))
    assert any("is position 0 of row 1" in v.message and "expected position 0 of row 0" in v.message for v in failed)


class Bare:
    """The least that a cache can be: no offset, mask, state or trimming."""

    def __init__(self) -> None:
        self.held: Any = None

    def update_and_fetch(self, keys: Any, values: Any) -> Any:
        new = [keys, values]
        old = self.held or [x[:, :, :0] for x in new]
        self.held = [np.concatenate(pair, axis=2) for pair in zip(old, new, strict=True)]
        return tuple(self.held)


def test_what_an_object_lacks_is_skipped_by_name_and_the_rest_judged() -> None:
    verdicts = audited("kv_cache", Bare)
    skipped = " ".join(v.message for v in verdicts if v.outcome == "skipped")
    for name in ("trim", "state", "offset", "make_mask"):
        assert f"no {name}" in skipped
    assert not failures(verdicts)
    assert sum(v.outcome == "pass" for v in verdicts) > 20


def test_an_unimplemented_method_is_skipped_and_a_broken_one_fails() -> None:
    class Unfinished(base("batch_kv_cache", "numpy_rows.py")):  # type: ignore[misc]
        def extend(self, other: Any) -> None:
            raise NotImplementedError

    class Broken(base("batch_kv_cache", "numpy_rows.py")):  # type: ignore[misc]
        def extend(self, other: Any) -> None:
            raise TypeError("no")

    verdicts = audited("batch_kv_cache", Unfinished)
    assert not failures(verdicts)
    assert any(v.outcome == "skipped" and "no extend" in v.message for v in verdicts)
    failed = failures(audited("batch_kv_cache", Broken))
    assert {v.evidence["check"] for v in failed} == {"raises"} and "TypeError: no" in failed[0].message


def test_a_dtype_that_is_refused_is_skipped_and_all_refused_fails() -> None:
    class Narrow(base("kv_cache", "numpy_buffer.py")):  # type: ignore[misc]
        def update_and_fetch(self, keys: Any, values: Any) -> Any:
            if keys.dtype == np.float32:
                raise TypeError("half precision only")
            return super().update_and_fetch(keys, values)

    verdicts = audited("kv_cache", Narrow)
    assert any(v.outcome == "skipped" and "float32 is left out" in v.message for v in verdicts)
    assert not failures(verdicts)
    (refused,) = failures(audited("kv_cache", Narrow, dtypes=("float32",)))
    assert refused.evidence["check"] == "raises"


def test_an_option_that_a_factory_lacks_is_left_out_and_a_needed_one_is_an_error() -> None:
    made = base("rotating_kv_cache", "numpy_ring.py")
    verdicts = audited("rotating_kv_cache", lambda max_size: made(max_size))
    assert any("keep" in v.message for v in verdicts if v.outcome == "skipped")
    assert all(v.case["keep"] == 0 for v in verdicts if v.outcome == "pass")
    assert not failures(verdicts)
    assert not failures(audited("rotating_kv_cache", lambda m, k: made(m, k)))
    with pytest.raises(ValueError, match="takes no argument 'max_size'"):
        audited("rotating_kv_cache", lambda keep: made(8, keep))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_identities_survive_quantisation(bits: int, dtype: str) -> None:
    for group in (32, 64):
        tokens = Tokens(seed=3, heads=2, dims=(64, 128), group=group, dtype=dtype)
        serials, keys, values = tokens.make([[Label("row 0", i) for i in range(40)], [Label("row 1", None)] * 40])
        for kind, x in enumerate((keys, values)):
            codes = [take(part) for part in mx.quantize(give(x, "mlx"), group_size=group, bits=bits)]
            found, _ = dequantised(*codes, bits)
            idents = decode(found)
            assert parts(int(idents[1, 1, 7])) == (serials[1, 7], 1, kind)
            assert ((idents & 0xFFFF) == serials[:, None]).all()
            assert (np.abs(found - x.astype(np.float64)) <= quantisation_error(x, group, bits)).all()
            swapped = codes[0], np.roll(codes[1], 1, axis=2), codes[2]
            # The first token gets the last one's, which happens to be as wide.
            wrong = np.abs(dequantised(*swapped, bits)[0] - x.astype(np.float64)) > quantisation_error(x, group, bits)
            assert wrong[:, :, 1:].any(-1).all(), "a neighbour's scale must show in every token"


def test_a_vector_that_is_no_token_is_never_taken_for_one() -> None:
    rng = np.random.default_rng(0)
    assert (decode(rng.standard_normal((20000, 64))) < 0).all()
    assert (decode(np.zeros((3, 64))) == -2).all()
    assert (decode(np.full((3, 64), np.nan)) < 0).all()
    tokens = Tokens(seed=0, heads=1, dims=(64, 64), group=32, dtype="float32")
    serials, keys, _ = tokens.make([[Label("row 0", i) for i in range(8)]])
    mixed = np.concatenate([keys[:, :, :4, :32], keys[:, :, 4:, 32:]], axis=-1)
    assert (decode(mixed) == -1).all()
    assert np.array_equal(tokens.fed(KEY, serials[0])[:, 0], keys[0, 0])


def test_masks_in_every_form_say_the_same() -> None:
    shape = (2, 3, 4, 9)
    causal = np.arange(9) <= np.arange(5, 9)[:, None]
    forms = ["causal", causal, causal[None, None], np.where(causal, 0.0, -np.inf), np.where(causal, 0, -65504.0)]
    for form in forms:
        found = visible_places(form, shape)
        assert not isinstance(found, Finding) and np.array_equal(found, np.broadcast_to(causal, (2, 4, 9)))
    assert np.all(visible_places(None, shape))


@pytest.mark.parametrize(
    ("mask", "check"),
    [
        (np.ones((9, 4), bool), "mask shape"),
        (np.ones((2, 4, 9), bool), "mask shape"),
        (np.ones((4, 10), bool), "mask shape"),
        (np.ones((4, 9)), "mask"),
        (np.arange(3)[:, None, None] * np.ones((4, 9)) == 1, "mask"),
        ("future", "mask"),
    ],
)
def test_a_mask_that_does_not_fit_is_a_finding(mask: Any, check: str) -> None:
    found = visible_places(mask, (2, 3, 4, 9))
    assert isinstance(found, Finding) and found.check == check


def test_a_case_without_program_or_with_another_dtype_is_refused() -> None:
    found = contract("kv_cache")
    candidate = Candidate(function=base("kv_cache", "numpy_buffer.py"), framework="numpy", name="honest")
    for case in ({"program": None}, {"dtype": "int8"}):
        with pytest.raises(ValueError, match="no case of kv_cache"):
            found.replay(case, candidate)
    feed = {"op": "feed", "on": 0, "n": 1}
    for wrong, told in (
        ({"program": [3]}, "a list of operations"),
        ({"program": [{}]}, "operation 0 is None; there is feed"),
        ({"program": [feed, {"op": "feed", "on": 0}]}, "operation 1, feed, has n None; a whole number is expected"),
        ({"program": [{"op": "merge", "of": 0, "as": 1}]}, "merge, has of 0; a list of whole numbers"),
        ({"program": [{**feed, "window": "x"}]}, "window 'x'"),
        ({"program": [feed], "heads": 0}, "its heads is 0"),
        ({"program": [feed], "dims": [8]}, r"its dims are \[8\]"),
        ({"program": [], "growth": "up"}, "its growth is 'up'; there is decode"),
    ):
        with pytest.raises(ValueError, match=f"this is no case of kv_cache: .*{told}"):
            found.replay(wrong, candidate)
    batch = Candidate(function=base("batch_kv_cache", "numpy_rows.py"), framework="numpy", name="honest")
    with pytest.raises(ValueError, match=r"its left_padding is 3; something like \[0, 2\] is expected"):
        contract("batch_kv_cache").replay({"program": [feed], "left_padding": 3}, batch)
    lost = found.replay({"program": [{"op": "feed", "on": 7, "n": 1}]}, candidate)
    assert lost.outcome == "could-not-judge" and "there is no cache 7" in lost.message


def test_growth_cases_replay() -> None:
    class Log(base("kv_cache", "torch_concat.py")):  # type: ignore[misc]
        def update_and_fetch(self, keys: Any, values: Any) -> Any:
            self.log = [*getattr(self, "log", []), self.keys]
            return super().update_and_fetch(keys, values)

    failed = failures(audited("kv_cache", Log, "torch"))
    assert [v.evidence["check"] for v in failed] == ["growth in bytes"]
    assert "after 552 decode steps" in failed[0].message
    again = contract("kv_cache").replay(failed[0].case, Candidate(function=Log, framework="torch", name="log"))
    assert again.outcome == "fail" and again.message == failed[0].message


@pytest.mark.parametrize("name", CONTRACTS)
def test_every_contract_shows_its_face(name: str) -> None:
    found = contract(name)
    assert isinstance(found, CacheContract)
    assert found.signature.startswith(name) and found.doc and found.relations
    assert [a.name for a in found.arguments] == [*found.settings[0]] or name == "kv_cache"


def test_programs_are_written_as_people_do() -> None:
    ops = [
        {"op": "feed", "on": 0, "n": 3, "window": None, "array": False},
        {"op": "trim", "on": 0, "n": 2},
        *[{"op": "feed", "on": 0, "n": 1}] * 4,
        {"op": "extract", "on": 0, "row": 0, "as": 1},
        {"op": "feed", "on": 1, "n": 1, "window": 4, "array": True},
    ]
    text = "feed(3) trim(2) feed(1)×4 extract(row=0, as=1) feed(1, on=1, window=4, array=True)"
    assert program_text(ops) == text
    verdict = Verdict(outcome="fail", audit="kv_cache", case={"dtype": "float32", "program": ops}, message="lost")
    assert case_line(verdict) == f"dtype=float32 program=[{text}]"
    report = Report(verdicts=[verdict])
    assert text in html(report)
    assert json.loads(report_json(report))["verdicts"][0]["case"]["program"] == ops, "JSON keeps what replays"


@pytest.mark.parametrize(
    ("name", "value"),
    [("size", "x"), ("size", np.ones(3)), ("empty", np.ones(3)), ("is_trimmable", np.ones(3))],
)
def test_a_method_that_answers_nonsense_is_the_caches_fault(name: str, value: Any) -> None:
    cache = type("Odd", (base("kv_cache", "numpy_buffer.py"),), {name: lambda self: value})
    verdicts = audited("kv_cache", cache)
    assert {verdict.outcome for verdict in verdicts} <= {"pass", "fail", "skipped"}
    assert f"{name} raised" in next(v for v in verdicts if v.outcome == "fail").message


@pytest.mark.parametrize("value", [np.ones(3), property(lambda self: 1 / 0)])
def test_an_option_that_shows_nonsense_is_the_caches_fault(value: Any) -> None:
    with pytest.raises(CandidateError, match=r"keep raised"):
        shown(type("Odd", (), {"keep": value})(), "keep", 0)
