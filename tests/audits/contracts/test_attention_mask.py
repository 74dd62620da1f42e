"""attention_mask's contract: which forms are taken, what is judged, and what each check sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from audits.candidate import Candidate
from audits.contract import Call
from audits.contracts.attention_mask import CONTRACT, expected, judge
from audits.domain import filled
from audits.sweep import Sweep
from reference.arithmetic import Arithmetic

ARITHMETIC = Arithmetic.claim("float32")


def found(output: Any, **args: Any) -> str | None:
    """The check that a returned mask fails, or None."""
    finding = judge(Call(args), (np.array(output),), ARITHMETIC)
    return None if finding is None else finding.check


def test_the_rule_is_stated_with_window_and_padding() -> None:
    seen, real = expected(Call({"n": 2, "offset": 3, "window_size": 3, "left_padding": [0, 2, 4]}))
    assert seen[:, 0].astype(int).tolist() == [
        [[0, 1, 1, 1, 0], [0, 0, 1, 1, 1]],
        [[0, 0, 1, 1, 0], [0, 0, 1, 1, 1]],
        [[0, 0, 0, 0, 0], [0, 0, 0, 0, 1]],
    ]
    assert real.tolist() == [[True, True], [True, True], [False, True]]


def test_none_and_causal_pass_only_where_they_say_the_same() -> None:
    assert found(None, n=1, offset=5) is None
    assert found("causal", n=1, offset=5) is None
    assert found("causal", n=3, offset=5, window_size=8) is None
    assert found(None, n=2, offset=0) == "values"
    assert found(None, n=1, offset=5, window_size=5) == "values"
    assert found("causal", n=3, offset=5, window_size=7) == "values"
    assert found("causal", n=1, offset=5, left_padding=[0, 1]) == "values"
    assert found("causal", n=1, offset=5, left_padding=[0, -3]) is None
    assert found("full", n=1, offset=5) == "form"


def test_only_bool_arrays_that_broadcast_are_masks() -> None:
    seen, _ = expected(Call({"n": 2, "offset": 3, "left_padding": [0, 2]}))
    args = {"n": 2, "offset": 3, "left_padding": [0, 2]}
    assert found(seen, **args) is None
    assert found(seen.astype(np.float32), **args) == "form"
    assert found(seen.astype(np.int8), **args) == "form"
    assert found(seen[:, 0], **args) == "shape"
    assert found(seen[..., :-1], **args) == "shape"
    wrong = seen.copy()
    wrong[1, 0, 1, 1] = True
    assert found(wrong, **args) == "values"


def test_queries_inside_padding_are_not_judged() -> None:
    args = {"n": 3, "offset": 1, "left_padding": [9, 2]}
    seen, _ = expected(Call(args))
    other = seen.copy()
    other[0] = True
    other[1, 0, 0] = True  # token 1 of a row with two tokens of padding
    assert found(other, **args) is None
    other[1, 0, 1, 0] = True
    assert found(other, **args) == "values"


def sweep(function: Callable[..., Any]) -> Sweep:
    return Sweep(CONTRACT, Candidate(function=function, framework="numpy", name="test"), shrinking=False)


def rule(n: int, *, offset: int, window_size: int | None = None, left_padding: Any = None) -> Any:
    args = {"n": n, "offset": offset, "window_size": window_size}
    return expected(Call({**args, **({} if left_padding is None else {"left_padding": left_padding})}))[0]


def dependent(n: int, *, offset: int, window_size: int | None = None, left_padding: Any = None) -> Any:
    if left_padding is not None and len(left_padding) > 1:
        left_padding = [max(left_padding)] * len(left_padding)
    return rule(n, offset=offset, window_size=window_size, left_padding=left_padding)


def chunky(n: int, *, offset: int, window_size: int | None = None, left_padding: Any = None) -> Any:
    return rule(n, offset=offset, window_size=None if n == 1 else window_size, left_padding=left_padding)


@pytest.mark.parametrize(
    ("relation", "base", "fault"), [("batch equals alone", 0, dependent), ("decode equals prefill", 2, chunky)]
)
def test_a_relation_sees_its_fault_and_passes_the_rule(relation: str, base: int, fault: Callable[..., Any]) -> None:
    case = {**filled(CONTRACT.domain, CONTRACT.bases[base]), "relation": relation}
    assert sweep(fault).verdict(case).evidence["check"] == relation
    assert sweep(rule).verdict(case).outcome == "pass"


def test_padding_comes_in_the_form_that_a_candidate_takes() -> None:
    def arrays_alone(n: int, *, offset: int, window_size: int | None = None, left_padding: Any = None) -> Any:
        return rule(
            n,
            offset=offset,
            window_size=window_size,
            left_padding=left_padding if left_padding is None else left_padding.tolist(),
        )

    verdicts = list(sweep(arrays_alone).run(full=False, seed=0, advance=lambda _: None))
    assert {v.outcome for v in verdicts} == {"pass", "skipped"}
    assert "given=array" in verdicts[0].message


def test_a_candidate_without_padding_or_window_is_judged_on_the_rest() -> None:
    verdicts = list(sweep(lambda n, *, offset: rule(n, offset=offset)).run(full=False, seed=0, advance=lambda _: None))
    assert {v.outcome for v in verdicts} == {"pass", "skipped"}
    assert sum(v.outcome == "pass" for v in verdicts) > 30
