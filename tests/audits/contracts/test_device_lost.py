"""After a device is lost nothing is judged any more, and nothing passes; layouts asked for are tried alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import assay
from audits import candidate as candidates

Array = np.ndarray[Any, np.dtype[Any]]


def softmax(x: Array) -> Array:
    e = np.exp(x.astype(np.float32) - x.astype(np.float32).max(-1, keepdims=True))
    return np.asarray((e / e.sum(-1, keepdims=True)).astype(x.dtype))


def test_a_lost_device_ends_the_sweep_without_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    foul = candidates.foul_memory

    def dying(sizes: list[int], framework: str) -> None:
        nonlocal calls
        calls += 1
        if calls > 40:
            raise RuntimeError("an illegal memory access was encountered")
        foul(sizes, framework)

    monkeypatch.setattr(candidates, "foul_memory", dying)
    report = assay.audit("softmax", softmax)
    assert not report.ok and report.exit_code == 2
    last = report.verdicts[-1]
    assert last.outcome == "could-not-judge"
    assert "the device is lost: an illegal memory access" in last.message
    assert len(report.verdicts) <= 40


def test_only_the_layouts_asked_for_are_tried() -> None:
    report = assay.audit("softmax", softmax, layouts=("sliced",))
    assert report.ok
    assert {v.case["layout"] for v in report.verdicts if "layout" in v.case} == {"contiguous", "sliced"}
    with pytest.raises(ValueError, match="no layout 'slced'; there is contiguous"):
        assay.audit("softmax", softmax, layouts=("slced",))
