"""The routed matmuls of every format, tile and right-hand side against float64, at every residue of the tile.

Expert 0 gets exactly `load` tokens, others uneven shares, the last none; every token has its own x, every weight block
is random, outputs start as NaN, and the last weight tile is ragged.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from engine.metal import table
from engine.metal.kernels import host
from engine.quantize import quantize
from tests.engine.metal.kernel_oracle import Case, assert_within, make_case, routed, routed_ids

LOADS = (1, 31, 32, 33, 63, 64, 65, 96, 127, 128, 129)
WIDTHS = (256, 512, 1024)
KINDS = tuple(table.FORMATS)
RHS = tuple(table.RHS)
TILES = tuple(table.TILES)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("rhs", RHS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_load_of_an_expert_is_right(kind: str, rhs: str, tile: int, full: bool) -> None:
    """All loads by all widths with --full; else each load with one width, and each width with several loads."""
    for i, (load, width) in enumerate(itertools.product(LOADS, WIDTHS)):
        if full or i % len(WIDTHS) == (i // len(WIDTHS) + TILES.index(tile)) % len(WIDTHS):
            case = make_case(kind, rhs, load, width, per_slot=bool(i % 2))
            actual = host.mul_mm_id(case.x, case.blocks, case.ids, kind, tile=tile)
            assert_within(actual, *routed(case, half=True), f"{kind} {rhs} n{tile} load {load} K {width}")


@pytest.mark.parametrize("M", [1, 8, 63, 64, 65, 128, 130])
def test_every_residue_of_weight_rows_is_right(M: int) -> None:
    for tile in TILES:
        case = make_case("Q4_K", "float32", 40, 256, M)
        actual = host.mul_mm_id(case.x, case.blocks, case.ids, "Q4_K", tile=tile)
        assert_within(actual, *routed(case, half=True), f"M {M} n{tile}")


@pytest.mark.parametrize("rhs", RHS)
@pytest.mark.parametrize("kind", KINDS)
def test_vector_kernels_are_right(kind: str, rhs: str) -> None:
    for load, width, M in [(1, 256, 70), (3, 512, 3), (6, 1024, 5)]:
        for per_slot in (False, True):
            case = make_case(kind, rhs, load, width, M, per_slot=per_slot)
            actual = host.mul_mv_id(case.x, case.blocks, case.ids, kind)
            assert_within(actual, *routed(case, half=False), f"{kind} {rhs} M {M} K {width}")


@pytest.mark.parametrize("width", [32, 64, 96, 544])
def test_q8_0_takes_widths_that_are_no_multiple_of_256(width: int) -> None:
    case = make_case("Q8_0", "float16", 33, width)
    actual = host.mul_mm_id(case.x, case.blocks, case.ids, "Q8_0", tile=64)
    assert_within(actual, *routed(case, half=True))
    actual = host.mul_mv_id(case.x, case.blocks, case.ids, "Q8_0")
    assert_within(actual, *routed(case, half=False))


def test_pairs_are_ascending_and_complete() -> None:
    rng = np.random.default_rng(0)
    for load, experts, top_k in [(1, 4, 1), (31, 9, 6), (32, 40, 6), (65, 7, 3), (200, 3, 1)]:
        ids = routed_ids(rng, load, experts, top_k)
        counts, pairs = host.expert_pairs(ids, experts)
        for e in range(experts):
            assert np.array_equal(pairs[e, : counts[e]], np.flatnonzero(ids.ravel() == e)), (load, e)
            assert (pairs[e, counts[e] :] == 0xFFFFFFFF).all()
        assert counts[0] == load
        assert counts[-1] == 0


def test_all_tokens_may_go_to_one_expert() -> None:
    case = make_case("Q2_K", "float32", 129, 256, experts=3, top_k=1)
    one = Case(kind="Q2_K", x=case.x, blocks=case.blocks, ids=np.full_like(case.ids, 2))
    actual = host.mul_mm_id(one.x, one.blocks, one.ids, "Q2_K", tile=128)
    assert_within(actual, *routed(one, half=True))


def test_any_schedule_gives_the_same_bits() -> None:
    case = make_case("Q4_K", "float32", 65, 256)
    runs = [
        host.mul_mm_id(case.x, case.blocks, case.ids, "Q4_K", tile=64, schedule_seed=seed) for seed in (None, 1, 2, 3)
    ]
    for other in runs[1:]:
        assert np.array_equal(other, runs[0])


@pytest.mark.parametrize(("kind", "tile"), [("Q4_K", 128), ("IQ2_XXS", 64)])
def test_checked_runs_are_clean(kind: str, tile: int) -> None:
    """No unwritten, foreign or unordered byte is read, in the map, the tile or the vector kernel."""
    case = make_case(kind, "float32", 33, 256)
    actual = host.mul_mm_id(case.x, case.blocks, case.ids, kind, tile=tile, checked=True, schedule_seed=5)
    assert_within(actual, *routed(case, half=True))
    actual = host.mul_mv_id(case.x[:3], case.blocks, case.ids[:3], kind, checked=True)
    few = Case(kind=kind, x=case.x[:3], blocks=case.blocks, ids=case.ids[:3])
    assert_within(actual, *routed(few, half=False))


def test_every_kernel_runs_checked(full: bool) -> None:
    if not full:
        pytest.skip("compiles 32 kernels with checks: --full")
    for kind, rhs in itertools.product(KINDS, RHS):
        case = make_case(kind, rhs, 65, 512)
        for tile in TILES:
            actual = host.mul_mm_id(case.x, case.blocks, case.ids, kind, tile=tile, checked=True)
            assert_within(actual, *routed(case, half=True))
        actual = host.mul_mv_id(case.x, case.blocks, case.ids, kind, checked=True)
        assert_within(actual, *routed(case, half=False))


def test_quantised_weights_give_the_product_they_stand_for() -> None:
    """quantize, then the kernel, against the plain product: off by the formats' loss of 7% and 33%, not more."""
    rng = np.random.default_rng(1)
    weights, x = rng.standard_normal((2, 64, 256)).astype(np.float32), rng.standard_normal((40, 256)).astype(np.float32)
    ids = np.arange(40, dtype=np.int32)[:, None] % 2
    expected = np.einsum("nk,nmk->nm", x, weights[ids[:, 0]])
    for kind, loss in (("Q8_0", 0.01), ("Q4_K", 0.08), ("Q2_K", 0.28), ("IQ2_XXS", 0.36)):
        actual = host.mul_mm_id(x, quantize(weights, kind), ids, kind)[:, 0]
        off = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
        assert 0.5 * loss < off < loss or (kind == "Q8_0" and off < loss), (kind, off)


def test_operands_that_do_not_fit_are_refused() -> None:
    case = make_case("Q4_K", "float32", 3, 256)
    with pytest.raises(ValueError, match=r"x \(5, 255\) and ids \(5, 2\) do not fit \(n, K\)"):
        host.mul_mm_id(case.x[:, :255], case.blocks, case.ids, "Q4_K")
    with pytest.raises(ValueError, match="ids are in 0 to 9; there are 5 experts"):
        host.mul_mm_id(case.x, case.blocks, np.where(case.ids == 0, 9, 0), "Q4_K")
    with pytest.raises(ValueError, match="a token's ids are not distinct"):
        host.mul_mm_id(case.x, case.blocks, np.zeros_like(case.ids), "Q4_K")
    with pytest.raises(ValueError, match="float64 operands have no kernel; one of float32, float16 is expected"):
        host.mul_mm_id(case.x.astype(np.float64), case.blocks, case.ids, "Q4_K")
    with pytest.raises(ValueError, match=r"Q2_K blocks \(E, M, bytes\) uint8 are expected, found \(5, 70, 144\)"):
        host.mul_mm_id(case.x, case.blocks, case.ids, "Q2_K")


def test_weights_are_decoded_as_gguf_decodes_them() -> None:
    """A unit vector picks one column of weights: every bit of it, in float32."""
    for kind in KINDS:
        case = make_case(kind, "float32", 1, 256, 16, experts=3, top_k=1)
        for k in (0, 1, 15, 16, 31, 32, 63, 64, 127, 128, 200, 255):
            x = np.zeros((1, 256), np.float32)
            x[0, k] = 1
            actual = host.mul_mv_id(x, case.blocks, np.ones((1, 1), np.int32), kind)[0, 0]
            expected = dequantize(case.blocks[1], GGMLQuantizationType[kind])[:, k]
            assert np.array_equal(actual, expected), (kind, k)
