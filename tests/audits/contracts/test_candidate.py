"""Whatever a candidate does wrong has a name of its own: never a traceback of ours, never a pass."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from audits import catalogue
from audits.candidate import Candidate, CandidateError, ChangedInput, guarded, load
from audits.contract import Call, Contract, Finding, arguments_of
from audits.contracts.softmax import CONTRACT as SOFTMAX
from audits.contracts.swiglu import CONTRACT as SWIGLU
from audits.frameworks import take
from audits.interrupts import told_apart
from audits.verdict import Verdict

Array = Any
ARGUMENTS = arguments_of("op(a, b, *, eps, limit=None)")
# Few cases, so that a test can sweep many candidates; relations, pairs and layouts are all there.
FEW = replace(SOFTMAX, corpus=lambda full: iter([{"rows": 2, "S": 257}]), examples=3)


def softmax(x: Array) -> Array:
    y = np.exp((x - x.max(-1, keepdims=True)).astype(np.float32))
    return (y / y.sum(-1, keepdims=True)).astype(x.dtype)


def swiglu(gate: Array, up: Array, *, limit: float | None = None) -> Array:
    g, u = gate.astype(np.float32), up.astype(np.float32)
    if limit is not None:
        g, u = np.minimum(g, limit), np.clip(u, -limit, limit)
    return (g / (1 + np.exp(-g)) * u).astype(gate.dtype)


def candidate(function: Callable[..., Any], **told: Any) -> Candidate:
    return Candidate(**{"function": function, "framework": "numpy", "name": "test", **told})


def judged(function: Callable[..., Any], contract: Contract = FEW, **told: Any) -> list[Verdict]:
    return list(contract.audit(candidate(function, **told)))


def failing(verdicts: list[Verdict]) -> set[str]:
    return {str(verdict.evidence["check"]) for verdict in verdicts if verdict.outcome == "fail"}


def test_arguments_are_read_from_a_signature() -> None:
    assert [(a.name, a.optional, a.positional) for a in ARGUMENTS] == [
        ("a", False, True),
        ("b", False, True),
        ("eps", False, False),
        ("limit", True, False),
    ]


@pytest.mark.parametrize(
    ("function", "lacking"),
    [
        (lambda a, b, *, eps, limit=None: 0, ()),
        (lambda x, y, eps=1, limit=None, more=None: 0, ()),
        (lambda a, b, *, eps: 0, ("limit",)),
        (lambda a, b, eps: 0, ("limit",)),
        (lambda *all, eps: 0, ("limit",)),
        (lambda *all, **named: 0, ()),
        (lambda a, b, **named: 0, ()),
        (max, ()),  # a builtin tells nothing
    ],
)
def test_optional_arguments_that_are_not_taken_are_known(function: Any, lacking: tuple[str, ...]) -> None:
    assert candidate(function).lacks(ARGUMENTS) == lacking


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (lambda a, b: 0, "test takes no argument 'eps', which the contract passes by name"),
        (lambda a, b, eps, /: 0, "test takes no argument 'eps', which the contract passes by name"),
        (lambda a, *, eps: 0, "test takes 1 argument by position; the contract passes a, b"),
        (lambda **named: 0, None),
    ],
)
def test_a_missing_argument_is_one_clear_line(function: Any, told: str | None) -> None:
    if told is None:
        assert candidate(function).lacks(ARGUMENTS) == ()
        return
    with pytest.raises(ValueError, match=told) as error:
        candidate(function).lacks(ARGUMENTS)
    assert "\n" not in str(error.value)


def test_arguments_are_passed_by_position_and_name() -> None:
    got: dict[str, Any] = {}

    def op(*places: Any, **named: Any) -> Array:
        got.update(places=places, named=named)
        return places[0]

    call = Call({"a": np.ones(2), "b": (np.ones(3), None), "eps": 0.5})
    (output,) = candidate(op)(call, ARGUMENTS)
    assert output.tolist() == [1.0, 1.0]
    assert got["places"][0].tolist() == [1.0, 1.0]
    assert got["places"][1][1] is None
    assert got["named"] == {"eps": 0.5}


def test_what_cannot_be_called_and_other_frameworks_are_refused() -> None:
    with pytest.raises(ValueError, match="test is of type int, which can't be called"):
        candidate(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no framework 'jax'; there is numpy, mlx, torch"):
        candidate(softmax, framework="jax")


@pytest.mark.parametrize("error", [ValueError("a\nb\tc"), SystemExit(0), RecursionError("deep"), MemoryError()])
def test_whatever_a_candidate_raises_is_one_line_of_ours(error: BaseException) -> None:
    def work() -> None:
        raise error

    with pytest.raises(CandidateError) as caught:
        guarded(work)
    assert str(caught.value).startswith(f"raised {type(error).__name__}")
    assert not str(caught.value).endswith(": "), "an error that says nothing"
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error


def test_an_error_that_cannot_even_be_shown_is_the_candidates() -> None:
    class Unreadable(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no message")

    def work() -> None:
        raise Unreadable

    with pytest.raises(CandidateError, match=r"^raised Unreadable: a message that can't be read$"):
        guarded(work)


def test_control_characters_and_halves_of_characters_are_not_passed_on() -> None:
    def work() -> None:
        raise ValueError("red \x1b[31m \x00 \udcff" + "x" * 1000)

    with pytest.raises(CandidateError, match=r"^raised ValueError: red \?\[31m \? \?x+$") as caught:
        guarded(work)
    assert len(str(caught.value)) < 400


def _swallowed() -> None:
    with suppress(BaseException):
        signal.raise_signal(signal.SIGINT)


def _turned_into_another_error() -> None:
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt as error:
        raise ValueError("not me") from error


@pytest.fixture
def python_handles_interrupts() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("python_handles_interrupts")
@pytest.mark.parametrize("work", [lambda: signal.raise_signal(signal.SIGINT), _swallowed, _turned_into_another_error])
def test_the_user_can_interrupt_whatever_the_candidate_makes_of_it(work: Callable[[], None]) -> None:
    with pytest.raises(KeyboardInterrupt), told_apart():
        guarded(work)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def _interrupts_itself(*_: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.usefixtures("python_handles_interrupts")
def test_an_interrupt_of_the_candidates_own_is_an_error_of_its() -> None:
    with told_apart(), pytest.raises(CandidateError, match=r"^raised KeyboardInterrupt"):
        guarded(_interrupts_itself)
    report = catalogue.audit("softmax", _interrupts_itself, dtypes=["float32"])
    assert [verdict.evidence.get("check") for verdict in report.verdicts if verdict.outcome == "fail"] == ["raises"]


@pytest.mark.usefixtures("python_handles_interrupts")
def test_where_nobody_can_tell_an_interrupt_is_the_users() -> None:
    with pytest.raises(KeyboardInterrupt):
        guarded(_interrupts_itself)
    signal.signal(signal.SIGINT, lambda *_: None)
    with told_apart(), pytest.raises(KeyboardInterrupt):
        guarded(_interrupts_itself)


@pytest.mark.parametrize("place", ["a", "b", "nested"])
@pytest.mark.parametrize("framework", ["numpy", "mlx", "torch"])
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_writing_into_any_operand_is_seen(place: str, framework: str, layout: str) -> None:
    def op(a: Any, b: Any, *, eps: float) -> Any:
        {"a": a, "b": b[0], "nested": b[1][0]}[place][1] = 9
        return a + 0

    call = Call({"a": np.ones(4, np.float32), "b": (np.ones(3), (np.ones(2),)), "eps": 0.5})
    name = "a" if place == "a" else "b"
    if framework == "mlx":
        call = call.with_(b=(np.ones(3, np.float32), (np.ones(2, np.float32),)))
    with pytest.raises(ChangedInput, match=f"changes its input {name}"):
        candidate(op, framework=framework)(call, ARGUMENTS, {name: layout})


def test_writing_into_a_list_is_seen() -> None:
    def op(a: Any, b: Any, *, eps: float) -> Any:
        b.append(3)
        return a

    with pytest.raises(ChangedInput, match="changes its input b"):
        candidate(op)(Call({"a": np.ones(2), "b": [1, 2], "eps": 1.0}), ARGUMENTS)


def test_honest_candidates_pass() -> None:
    for function, contract in ((softmax, FEW), (swiglu, replace(SWIGLU, corpus=lambda full: iter([]), examples=3))):
        verdicts = judged(function, contract)
        assert {verdict.outcome for verdict in verdicts} == {"pass"}
        assert {"rerun", "permuted rows", "after 1", ""} <= {verdict.case["relation"] for verdict in verdicts}
        assert len({verdict.case["layout"] for verdict in verdicts}) == 6


WRONG: dict[str, tuple[Callable[[Array], Any], str]] = {
    "None": (lambda x: None, "shape"),
    "a float": (lambda x: 1.0, "shape"),
    "a 0-d array": (lambda x: softmax(x)[0, 0], "shape"),
    "a row too few": (lambda x: softmax(x)[:-1], "shape"),
    "no batch": (lambda x: softmax(x).ravel(), "shape"),
    "an axis more": (lambda x: softmax(x)[None], "shape"),
    "nothing": (lambda x: (), "shape"),
    "two arrays": (lambda x: (softmax(x), softmax(x)), "shape"),
    "a list of lists": (lambda x: softmax(x).tolist(), "shape"),
    "a ragged list": (lambda x: [[1.0], [1.0, 2.0]], "shape"),
    "a name": (lambda x: "causal", "shape"),
    "objects": (lambda x: softmax(x).astype(object), "shape"),
    "complex numbers": (lambda x: softmax(x).astype(np.complex64), "shape"),
    "a dict": (lambda x: {"y": softmax(x)}, "shape"),
    "NaN": (lambda x: softmax(x) * np.float32(np.nan), "values"),
    "one NaN in one row": (lambda x: np.where(np.arange(x.size).reshape(x.shape) == 5, np.nan, softmax(x)), "values"),
    "zeros": (np.zeros_like, "values"),
    "integers": (lambda x: softmax(x).astype(np.int32), "values"),
    "the first row everywhere": (lambda x: np.repeat(softmax(x)[:1], len(x), axis=0), "values"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_result_fails_the_right_check(name: str) -> None:
    function, check = WRONG[name]
    verdicts = judged(lambda x: function(x))
    assert check in failing(verdicts), {(v.outcome, v.message) for v in verdicts}
    # In a single row, or of a single key, some of these are right.
    plain = [v for v in verdicts if v.case.get("relation") == "" and v.case["rows"] > 1 and v.case["S"] > 5]
    assert len(plain) > 10
    assert "pass" not in {verdict.outcome for verdict in plain}
    assert all("\n" not in verdict.message for verdict in verdicts)


def test_a_list_of_one_array_and_arrays_of_other_frameworks_are_results() -> None:
    import mlx.core as mx
    import torch

    assert not failing(judged(lambda x: [softmax(x)]))
    assert not failing(judged(lambda x: mx.array(softmax(x)), dtypes=["float32"]))
    assert not failing(judged(lambda x: torch.from_numpy(softmax(x)).requires_grad_(), dtypes=["float32"]))


def test_writing_into_the_input_is_its_own_check() -> None:
    def in_place(x: Array) -> Array:
        x -= x.max(-1, keepdims=True)
        return softmax(x)

    verdicts = judged(in_place)
    assert failing(verdicts) == {"inputs unchanged"}
    assert "pass" not in {verdict.outcome for verdict in verdicts}


def test_reading_memory_instead_of_elements_is_seen_by_the_layouts() -> None:
    def flat(x: Array) -> Array:
        """Takes every array for a contiguous one, as a kernel does that ignores strides."""
        memory = x if x.base is None else x.base
        return softmax(memory.reshape(-1)[: x.size].reshape(x.shape))

    verdicts = judged(flat)
    layouts = {verdict.case["layout"] for verdict in verdicts if verdict.outcome == "fail"}
    assert layouts == {"transposed", "sliced", "strided", "reversed", "offset"}


def test_a_dtype_that_is_refused_is_left_out_and_said() -> None:
    def no_bfloat16(x: Array) -> Array:
        if x.dtype not in (np.float32, np.float16):
            raise TypeError(f"{x.dtype} isn't supported")
        return softmax(x)

    verdicts = judged(no_bfloat16)
    (skipped,) = [verdict for verdict in verdicts if verdict.outcome == "skipped"]
    assert skipped.case["dtype"] == "bfloat16"
    assert skipped.message == "bfloat16 is left out: the candidate raised TypeError: bfloat16 isn't supported"
    assert {verdict.outcome for verdict in verdicts} == {"pass", "skipped"}
    assert {verdict.case["dtype"] for verdict in verdicts if verdict.outcome == "pass"} == {"float32", "float16"}


def test_a_candidate_that_always_raises_fails_with_a_case_that_replays() -> None:
    def broken(x: Array) -> Array:
        raise RuntimeError("no such kernel")

    *skipped, failed = judged(broken)
    assert [verdict.case["dtype"] for verdict in skipped] == ["float32", "float16", "bfloat16"]
    assert (failed.outcome, failed.evidence["check"]) == ("fail", "raises")
    assert failed.message == "raised RuntimeError: no such kernel"
    again = FEW.replay(failed.case, candidate(broken))
    assert (again.message, again.evidence["check"]) == (failed.message, "raises")


def test_raising_for_some_sizes_alone_is_shrunk_within_the_wanted_dtypes() -> None:
    def to_128(x: Array) -> Array:
        if x.shape[1] > 128:
            raise IndexError("too long")
        return softmax(x)

    verdicts = judged(to_128, dtypes=["float16", "bfloat16"])
    assert failing(verdicts) == {"raises"}
    shrunk = next(verdict for verdict in verdicts if verdict.evidence.get("shrunk"))
    assert (shrunk.case["S"], shrunk.case["rows"]) == (129, 1)
    assert shrunk.case["dtype"] in ("float16", "bfloat16")
    assert {verdict.case.get("dtype") for verdict in verdicts} == {"float16", "bfloat16"}


def test_an_exit_is_no_way_out() -> None:
    assert failing(judged(lambda x: sys.exit(0))) == {"raises"}


def test_a_relation_that_stumbles_over_a_wrong_shape_names_the_shape() -> None:
    calls = 0

    def now_and_then(x: Array) -> Array:
        nonlocal calls
        calls += 1
        return softmax(x) if calls % 4 else softmax(x)[0, 0]

    assert {"shape", "rerun"} & failing(judged(now_and_then))


@pytest.mark.parametrize("error", [IndexError("of ours"), ValueError("of ours")])
@pytest.mark.parametrize("place", ["judge", "relations", "build"])
def test_an_error_of_ours_is_blamed_on_nobody_and_loses_nothing(place: str, error: Exception) -> None:
    def broken(*_: Any) -> Any:
        raise error

    changed = {
        "judge": {"judge": lambda call, *rest: broken() if call.args["x"].shape[1] == 257 else FEW.judge(call, *rest)},
        "relations": {"relations": [replace(FEW.relations[0], check=broken)]},
        "build": {"build": lambda case: broken() if case["S"] == 257 else FEW.build(case)},
    }[place]
    verdicts = judged(softmax, replace(FEW, **changed))
    assert {verdict.outcome for verdict in verdicts} == {"pass", "could-not-judge"}
    ours = [verdict for verdict in verdicts if verdict.outcome == "could-not-judge"]
    assert all(type(error).__name__ + ": of ours; please report it" in verdict.message for verdict in ours)
    assert all("in broken" in verdict.evidence["traceback"] for verdict in ours)
    assert all("\n" not in verdict.message for verdict in ours)


def test_an_error_of_ours_outside_any_case_is_no_bad_input() -> None:
    def corpus(full: bool) -> Any:
        raise ValueError("of ours")

    *others, last = judged(softmax, replace(FEW, corpus=corpus))
    assert {verdict.outcome for verdict in others} == {"pass"}
    assert last.outcome == "could-not-judge"
    assert "nothing is judged from here on: an error in assay itself" in last.message
    assert last.evidence["check"] == "internal error"


def test_files_are_loaded_by_name_and_again_when_they_change(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("FACTOR = 2\n")
    path = tmp_path / "mine.py"
    path.write_text("from beside import FACTOR\ndef op(x):\n    return FACTOR * x\n")
    assert load(f"{path}:op")(3) == 6
    assert load(f"{path}:op") is load(f"{path}:op")
    path.write_text("def op(x):\n    return x\n")
    assert load(f"{path}:op")(3) == 3
    sys.modules.pop("beside")


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("mine.py:other", "def op(x): pass", "defines no 'other' \\(it has op\\)"),
        (
            "mine.py:softmx",
            "import os\nfrom json import dumps\nN = 3\ndef op(x): pass\nclass softmax: pass",
            "has softmax, op\\)",
        ),
        ("mine.py:op", "import numpy as np", "has no function and no class"),
        ("mine.py", "", "FILE.py:NAME is expected"),
        ("mine.txt:op", "", "FILE.py:NAME is expected"),
        ("none.py:op", None, "there is no file"),
        ("mine.py:op", "def op(x:\n", "can't be imported: SyntaxError"),
        ("mine.py:op", "import nowhere_at_all", "can't be imported: ModuleNotFoundError: No module named"),
        ("mine.py:op", "raise SystemExit(0)", "can't be imported: SystemExit: 0"),
        ("mine.py:op", "raise ValueError('a\\nb')", "can't be imported: ValueError: a b"),
    ],
)
def test_what_cannot_be_loaded_is_one_clear_line(tmp_path: Path, name: str, text: str | None, told: str) -> None:
    path = tmp_path / name.partition(":")[0]
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=told) as error:
        load(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(self))

    (tmp_path / "mine.py").write_text("def op(x): pass")
    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(ValueError, match=r"^--candidate .*mine.py:op: .*mine.py can't be read \(Permission denied\)$"):
        load(f"{tmp_path / 'mine.py'}:op")


def test_unwritten_memory_is_unlikely_to_look_right() -> None:
    (output,) = candidate(lambda x: np.empty_like(x))(Call({"x": np.ones((64, 64), np.float32)}), SOFTMAX.arguments)
    assert not (take(output) == 1 / 64).all()
    assert isinstance(FEW.judge(Call({"x": np.ones((64, 64), np.float32)}), [output], _float32()), Finding)


def _float32() -> Any:
    from reference.arithmetic import Arithmetic

    return Arithmetic.claim("float32")
