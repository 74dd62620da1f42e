"""The public ops: on CUDA, where MLX computes some views wrongly, an op is given copies and the same values."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from engine import layers, ops

WHOLE = mx.arange(6 * 8).reshape(6, 8)
VIEWS = {
    "transposed": lambda x: x.swapaxes(-1, -2),
    "reversed": lambda x: x[::-1],
    "strided": lambda x: x[:, ::2],
    "sliced": lambda x: x[1:4, 1:5],
    "offset": lambda x: x.flatten()[1:41].reshape(5, 8),
}


def address(x: mx.array) -> int:
    return int(np.asarray(x).__array_interface__["data"][0])


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.uint32, mx.bool_])
@pytest.mark.parametrize("view", VIEWS)
def test_on_cuda_an_op_gets_the_same_values_in_memory_of_their_own(
    monkeypatch: pytest.MonkeyPatch, view: str, dtype: mx.Dtype
) -> None:
    seen: list[Any] = []
    op = ops.any_layout(lambda *args, **kwargs: seen.append((args, kwargs)) or mx.zeros(()))
    given = VIEWS[view](WHOLE.astype(dtype))
    op(given, None, packed=(given, given), bits=4)
    ((same, _), kwargs) = seen.pop()
    assert same is given, "elsewhere nothing is copied"
    assert kwargs["packed"] == (given, given)

    monkeypatch.setattr(layers, "on_cuda", lambda: True)
    op(given, None, packed=(given, given), bits=4)
    (first, nothing), kwargs = seen.pop()
    assert nothing is None
    assert kwargs["bits"] == 4
    fresh = address(mx.zeros(3, dtype))
    for copy in (first, *kwargs["packed"]):
        assert copy.dtype == given.dtype
        assert mx.array_equal(copy, given)
        assert np.asarray(copy).flags.c_contiguous
        assert address(copy) % 16 == fresh % 16, "not at an offset into other memory"


@pytest.mark.parametrize(
    "name", ["matmul", "quantized_matmul", "quantize", "moe_matmul", "rope", "sampler", "sdpa", "quantized_sdpa"]
)
def test_what_mlx_gets_wrong_takes_any_layout(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    copied: list[Any] = []
    monkeypatch.setattr(layers, "on_cuda", lambda: True)
    monkeypatch.setattr(ops, "_copied", lambda value: copied.append(value) or value)
    with pytest.raises(TypeError):
        getattr(ops, name)(unknown := mx.zeros(1), missing=unknown)
    assert len(copied) == 2
