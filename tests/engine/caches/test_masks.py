"""The mask rule, entry by entry against its definition, and its short forms exactly where they mean the same."""

from __future__ import annotations

import itertools
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from engine.masks import attention_mask
from tests.engine.caches.oracle import seen


@pytest.fixture(autouse=True)
def on_the_cpu() -> Any:
    with mx.stream(mx.cpu):
        yield


@pytest.mark.parametrize("padding", [None, [0, 0], [2, 0], [-3, 4], [5, 5]], ids=str)
@pytest.mark.parametrize("keep", [0, 2])
def test_every_entry(padding: list[int] | None, keep: int) -> None:
    short = 0
    for n, offset, window in itertools.product((1, 2, 5), (0, 1, 4, 7), (None, 1, 3, 5, 8, 20)):
        S, rows = offset + n, padding or [0, 0]
        expected = np.zeros((2, n, S), bool)
        for (b, pad), i, j in itertools.product(enumerate(rows), range(n), range(S)):
            near = window is None or j > offset + i - window or j < max(pad, 0) + keep
            expected[b, i, j] = pad <= j <= offset + i and near
        for given in (padding, None if padding is None else mx.array(padding)):
            for whole in (False, True):
                mask = attention_mask(
                    n, offset=offset, window_size=window, left_padding=given, keep=keep, return_array=whole
                )
                assert np.array_equal(seen(mask, 2, n, S), expected), (n, offset, window)
                if mask is None:
                    assert n == 1 and (window is None or window + keep >= S) and max(rows) <= 0
                elif isinstance(mask, str):
                    assert not whole and max(rows) <= 0 and (window is None or window + keep >= S)
                short += not isinstance(mask, mx.array)
    assert (short > 0) == (padding is None or max(padding) <= 0)


@pytest.mark.parametrize("options", [{"n": 0}, {"window_size": 0}, {"window_size": -1}], ids=str)
def test_sizes_below_one_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        attention_mask(options.pop("n", 1), offset=0, **options)
