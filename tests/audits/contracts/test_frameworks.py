"""Arrays of each framework in each layout: same values, the strides that the layout names, poison around them."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from audits.frameworks import DTYPES, FRAMEWORKS, LAYOUTS, differs, give, poison, take

NAMES = (*DTYPES, "int32", "uint32", "bool")


def values(shape: tuple[int, ...], dtype: str) -> Any:
    x = np.random.default_rng(len(shape)).standard_normal(shape) * 50
    return np.asarray((x > 0) if dtype == "bool" else np.asarray(x).astype(DTYPES.get(dtype, dtype)))


def same(actual: Any, expected: Any) -> bool:
    return bool(
        actual.shape == expected.shape and actual.dtype == expected.dtype and actual.tobytes() == expected.tobytes()
    )


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_the_same_values(framework: str, layout: str) -> None:
    for shape in ((), (1,), (5,), (3, 4), (2, 3, 5), (1, 1), (2, 0, 3)):
        for dtype in NAMES:
            x = values(shape, dtype)
            given = give(x, framework, layout)
            assert tuple(given.shape) == shape
            assert same(take(given), x), (shape, dtype)


def test_numpy_layouts_lie_in_memory_as_they_say() -> None:
    x = values((3, 4, 5), "float32")
    laid = {layout: give(x, "numpy", layout) for layout in LAYOUTS}
    whole = (80, 20, 4)  # bytes from one element to the next, along each axis
    assert laid["contiguous"].strides == whole
    assert laid["transposed"].strides == (80, 4, 16)
    assert laid["permuted"].strides == (20, 60, 4)
    assert laid["sliced"].strides == (6 * 7 * 4, 7 * 4, 4)
    assert laid["strided"].strides == (160, 40, 8)
    assert laid["reversed"].strides == (-80, 20, 4)
    assert laid["offset"].strides == whole
    base = laid["offset"]
    while base.base is not None:
        base = base.base
    assert laid["offset"].ctypes.data - base.ctypes.data == 4


def test_torch_layouts_lie_in_memory_as_they_say() -> None:
    x = values((3, 4, 5), "float16")
    laid = {layout: give(x, "torch", layout) for layout in LAYOUTS}
    assert laid["transposed"].stride() == (20, 1, 4)
    assert laid["permuted"].stride() == (5, 15, 1)
    assert laid["strided"].stride() == (40, 10, 2)
    assert laid["sliced"].stride() == laid["reversed"].stride() == (42, 7, 1)
    assert laid["offset"].storage_offset() == 1
    assert laid["permuted"].stride() == (5, 15, 1)
    # Nothing repeats in these values: there is no axis to broadcast along.
    assert [layout for layout in LAYOUTS if laid[layout].is_contiguous()] == ["contiguous", "offset", "broadcast"]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_what_repeats_is_broadcast_and_only_that(framework: str) -> None:
    x = np.broadcast_to(values((3, 1, 5), "float32"), (3, 4, 5))
    given = give(x, framework, "broadcast")
    assert same(take(given), x)
    if framework != "mlx":  # whose arrays don't tell their strides
        strides = given.strides if framework == "numpy" else given.stride()
        assert strides[1] == 0
        assert 0 not in (strides[0], strides[2])
    assert differs(x, "broadcast")
    assert not differs(values((3, 4), "float32"), "broadcast")
    assert not differs(values((3, 4), "float32"), "permuted")


@pytest.mark.parametrize("dtype", NAMES)
def test_poison_lies_around_a_view(dtype: str) -> None:
    x = values((3, 4), dtype)
    around = give(x, "numpy", "sliced").base
    assert around.shape == (5, 6)
    outside = np.ones((5, 6), bool)
    outside[1:-1, 1:-1] = False
    between = give(x, "numpy", "strided").base[:, 1::2]
    first = give(x, "torch", "offset")
    first = take(first.as_strided((1,), (1,), 0))
    for found in (around[outside], between, first):
        if dtype in DTYPES:
            assert np.isnan(found.astype(np.float64)).all()
        else:
            assert (found == poison(np.dtype(x.dtype))).all()


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_bfloat16_comes_back_bit_for_bit(framework: str) -> None:
    bits = np.arange(2**16, dtype=np.uint16)  # every bfloat16: subnormals, infinities, each NaN
    x = bits.view(ml_dtypes.bfloat16).reshape(256, 256)
    assert (take(give(x, framework)).view(np.uint16) == bits.reshape(256, 256)).all()
    assert (take(give(x, framework, "transposed")).view(np.uint16) == bits.reshape(256, 256)).all()


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_neither_giving_nor_taking_shares_memory(framework: str, dtype: str) -> None:
    x = values((4, 4), dtype)
    before = x.copy()
    given = give(x, framework)
    taken = take(given)
    given[0] = 7
    assert same(x, before), "what the candidate writes doesn't reach the case"
    assert same(taken, before), "nor what was taken before"


def test_take_understands_what_candidates_return() -> None:
    assert take(1.5).shape == ()
    assert take([[1.0, 2.0]]).shape == (1, 2)
    assert take(torch.ones(2, requires_grad=True)).tolist() == [1.0, 1.0]

    class Weight(torch.nn.Parameter):
        pass

    Weight.__module__ = "somebody.elses"
    assert same(take(Weight(torch.ones(2, dtype=torch.bfloat16))), np.ones(2, ml_dtypes.bfloat16))
    assert take(None).dtype.kind == "O"


def test_unknown_names_are_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match="no framework 'jax'; there is numpy, mlx, torch"):
        give(np.ones(2), "jax")
    with pytest.raises(ValueError, match="no layout 'fortran'; there is contiguous, transposed"):
        give(np.ones(2), "numpy", "fortran")
