"""ds4's own Metal sources: every kernel compiles, and its main kernels compute what NumPy does, checked and not.

They are not part of the repository (see ds4_checkout); without them these tests are skipped. Arguments, grids and
threadgroup memory are those of ds4_metal.m.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engine.metal.ds4_checkout import CHECKOUTS, Array, kargs, launch, library, run
from tests.engine.metal.kernel_oracle import Case, assert_within, make_case, random_blocks, routed

MODES = pytest.mark.parametrize("checked", [False, True], ids=["fast", "checked"])
pytestmark = [
    pytest.mark.skipif(not CHECKOUTS, reason="ASSAY_THIRD_PARTY names no folder with a checkout of ds4"),
    pytest.mark.parametrize("ds4", CHECKOUTS, ids=[p.name for p in CHECKOUTS]),
]
MM = {"FC_mul_mm_bc_inp": False, "FC_mul_mm_bc_out": False, "FC_mul_mm_m5_sgmatrix": False}
F16_MAX = 65504.0
# Values that some host gives, by the end of the constant's name; 2 (or true) for the others.
_VALUES = {"nxpsg": 8, "ext_nsg": 4, "nqptg": 8, "blk_ncpsg": 64, "ncpsg": 32, "ns10": 512, "ns20": 512, "_DV": 512,
           "_nwg": 32, "_NWG": 32}  # fmt: skip


def given(ds4: Path, constants: dict[str, Any]) -> dict[str, object]:
    """Those of the constants that this version has."""
    return {name: value for name, value in constants.items() if name in library(ds4, False)._source.constants}


@MODES
def test_every_kernel_compiles(ds4: Path, checked: bool) -> None:
    names = library(ds4, checked)._source.constants
    values = {name: next((v for end, v in _VALUES.items() if name.endswith(end)), 2) for name in names}
    made, began = library(ds4, checked, tuple(values.items())), time.monotonic()
    for first in range(0, len(made.kernels), 40):
        made.build(made.kernels[first : first + 40])
    print(f"{len(made.kernels)} kernels in {time.monotonic() - began:.0f} s")


def expert_map(ds4: Path, checked: bool, case: Case) -> tuple[Array, Array]:
    """Counts (E,) and pairs (E, n) of kernel_mul_mm_id_map0; the host allocates their sum in one buffer."""
    (n, top_k), E = case.ids.shape, len(case.blocks)
    counts, pairs = np.empty(E, np.uint32), np.empty((E, n), np.int32)
    args = kargs(ds4, "mul_mm_id_map0", ne02=E, ne10=case.x.shape[-1], ne21=n, ne20=top_k, nb21=case.ids.strides[0])
    run(
        ds4, f"kernel_mul_mm_id_map0_ne20_{top_k}", checked, {0: args, 1: case.ids, 2: counts, 3: pairs}, out=(2, 3),
        memory=E * top_k * 2, threadgroups=1, threads=E,
    )  # fmt: skip
    return counts, pairs


def expert_args(ds4: Path, case: Case) -> bytes:
    (n, top_k), (M, row) = case.ids.shape, case.blocks.shape[1:]
    K, size = case.x.shape[-1], case.x.itemsize
    per_slot = case.x.ndim == 3
    return kargs(
        ds4, "mul_mm_id", ne00=K, ne02=len(case.blocks), nb01=row, nb02=M * row, nb03=len(case.blocks) * M * row,
        ne11=top_k if per_slot else 1, nb10=size, nb11=K * size, nb12=K * size * (top_k if per_slot else 1),
        ne20=top_k, ne21=n, ne0=M, ne1=top_k, r2=1, r3=1,
    )  # fmt: skip


@MODES
@pytest.mark.parametrize("rhs", ["f4", "f2"], ids=["f32", "f16"])
@pytest.mark.parametrize("kind", ["Q2_K", "Q4_K", "IQ2_XXS"])
def test_map_and_expert_matmul(ds4: Path, checked: bool, kind: str, rhs: str) -> None:
    case = make_case(kind, rhs, 40, 512, 100, per_slot=rhs == "f2")
    (n, top_k), M = case.ids.shape, case.blocks.shape[1]
    counts, pairs = expert_map(ds4, checked, case)
    assert counts.tolist() == [int((case.ids == e).sum()) for e in range(len(counts))]
    for expert, count in enumerate(counts):
        assert pairs[expert, :count].tolist() == np.flatnonzero(case.ids == expert).tolist()
    out = np.empty((n, top_k, M), np.float32)
    name = f"kernel_mul_mm_id_{kind.lower().replace('_k', '_K')}_{'f32' if rhs == 'f4' else 'f16'}"
    run(
        ds4, name, checked, {0: expert_args(ds4, case), 1: case.blocks, 2: case.x, 3: counts, 4: pairs, 5: out},
        out=(5,), constants=given(ds4, MM), memory=8192, threadgroups=(-(-n // 32), -(-M // 64), len(counts)),
        threads=128,
    )  # fmt: skip
    assert_within(out, *routed(case, half=True), name)


@MODES
@pytest.mark.parametrize("tile", [64, 128])
@pytest.mark.parametrize("kind", ["q2_K", "q4_K", "iq2_xxs"])
def test_wide_tiles_are_right_up_to_token_32(ds4: Path, checked: bool, kind: str, tile: int) -> None:
    """Where a version has them, its wide tiles: garbage past token 32 of a tile (docs/wide-tile-audit.md)."""
    name = f"kernel_mul_mm_id_{kind}_f32_n{tile}"
    if name not in library(ds4, checked).kernels:
        pytest.skip(f"this version of ds4 has no {name}")
    R, M, K = 96, 64, 256
    rng = np.random.default_rng(9)
    case = Case(
        kind=kind.upper(), x=rng.standard_normal((R, K)).astype("f4"), ids=np.zeros((R, 1), np.int32),
        blocks=random_blocks(rng, kind.upper(), (1, M), K),
    )  # fmt: skip
    counts, pairs = expert_map(ds4, checked, case)
    out = np.empty((R, 1, M), np.float32)
    made = launch(
        ds4, name, checked, {0: expert_args(ds4, case), 1: case.blocks, 2: case.x, 3: counts, 4: pairs, 5: out},
        out=(5,), constants=given(ds4, MM), memory=8192, threadgroups=(-(-R // tile), 1, 1), threads=128,
    )  # fmt: skip
    expected, bound = routed(case, half=True)
    with np.errstate(invalid="ignore"):
        wrong = ~(np.abs(out - expected) <= bound).all((1, 2))
    garbage = np.arange(R) % tile >= 32
    assert wrong.tolist() == garbage.tolist() or not wrong.any()
    assert bool(made.faults) == bool(checked and wrong.any())
    print(name, int(wrong.sum() * M), "elements wrong;", *(fault.message for fault in made.faults[:1]))


def vector_args(ds4: Path, case: Case) -> bytes:
    (n, top_k), (M, row) = case.ids.shape, case.blocks.shape[1:]
    K = case.x.shape[-1]
    per_slot = case.x.ndim == 3
    return kargs(
        ds4, "mul_mv_id", nei0=top_k, nei1=n, nbi1=case.ids.strides[0], ne00=K, ne01=M, ne02=len(case.blocks),
        nb00=row * 256 // K, nb01=row, nb02=M * row, ne10=K, ne11=top_k if per_slot else 1, ne12=n, ne13=1, nb10=4,
        nb11=K * 4, nb12=K * 4 * (top_k if per_slot else 1), ne0=M, ne1=top_k, nb1=M * 4, nr0=ROWS[case.kind],
    )  # fmt: skip


# Weight rows of a simdgroup (of a threadgroup: Q8_0), simdgroups, and threadgroup bytes.
ROWS = {"Q8_0": 2, "Q2_K": 4, "Q4_K": 2, "IQ2_XXS": 4}
GROUPS = {"Q8_0": 4, "Q2_K": 2, "Q4_K": 2, "IQ2_XXS": 2}
STAGING = {"Q8_0": 32 * 4 * 2, "IQ2_XXS": 256 * 8 + 128}


@MODES
@pytest.mark.parametrize("kind", ["Q8_0", "Q2_K", "Q4_K", "IQ2_XXS"])
def test_expert_product_by_vector(ds4: Path, checked: bool, kind: str) -> None:
    case = make_case(kind, "f4", 3, 512, 64)
    (n, top_k), M, nsg = case.ids.shape, 64, GROUPS[kind]
    out, name = np.empty((n, top_k, M), np.float32), f"kernel_mul_mv_id_{kind.lower().replace('_k', '_K')}_f32"
    rows = ROWS[kind] if kind == "Q8_0" else ROWS[kind] * nsg
    run(
        ds4, name, checked, {0: vector_args(ds4, case), 1: case.blocks, 2: case.x, 3: out, 4: case.ids}, out=(3,),
        constants={"FC_mul_mv_nsg": nsg}, memory=STAGING.get(kind, 0) or 16, threadgroups=(M // rows, 1, n * top_k),
        threads=(32, nsg, 1),
    )  # fmt: skip
    assert_within(out, *wider(routed(case, half=False)), name)


def wider(judged: tuple[Array, Array]) -> tuple[Array, Array]:
    """Their products of scales, codes and 2⁻⁸ round a few times more than a decoded weight does."""
    expected, bound = judged
    return expected, 4 * bound


@MODES
@pytest.mark.parametrize("kind", ["IQ2_XXS", "Q4_K"])
def test_gate_and_up_with_swiglu_then_down_with_its_sum(ds4: Path, checked: bool, kind: str) -> None:
    """Decoding: one token, six experts; SwiGLU clamped at 7 and weighted, then the sum over the experts."""
    rng = np.random.default_rng(3)
    E, top_k, K, M, limit = 8, 6, 512, 256, 7.0
    ids = rng.permutation(E)[None, :top_k].astype(np.int32)
    gate, up = (
        Case(kind=kind, x=np.ones((1, K), "f4"), blocks=random_blocks(rng, kind, (E, M), K), ids=ids) for _ in range(2)
    )
    x, weights = rng.standard_normal((1, K)).astype("f4"), rng.random((1, top_k)).astype("f4")
    gate, up = (Case(kind=kind, x=x, blocks=one.blocks, ids=ids) for one in (gate, up))
    act = kargs(
        ds4, "dsv4_moe_swiglu_weight_args", width=M, rows=top_k, gate_row_stride=M * 4, up_row_stride=M * 4,
        mid_row_stride=M * 4, weight_stride=4, clamp_value=limit,
    )  # fmt: skip
    mid, nsg = np.empty((1, top_k, M), "f4"), GROUPS[kind]
    buffers: dict[int, object] = {
        0: vector_args(ds4, gate), 1: act, 2: gate.blocks, 3: up.blocks, 4: x, 5: np.empty((top_k, M), "f4"),
        6: np.empty((top_k, M), "f4"), 7: mid, 8: ids, 9: weights,
    }  # fmt: skip
    name = f"kernel_mul_mv_id_{kind.lower().replace('_k', '_K')}_pair_swiglu_f32"
    made = launch(
        ds4, name, checked, buffers, out=(5, 6, 7), constants={"FC_mul_mv_nsg": nsg}, memory=STAGING.get(kind, 16),
        threadgroups=(M // (ROWS[kind] * nsg), 1, top_k), threads=(32, nsg, 1),
    )  # fmt: skip
    # The IQ2_XXS one writes gate and up, which nothing reads, of all six experts to one row.
    assert {(fault.kind, fault.buffer) for fault in made.faults} <= {("race", 5), ("race", 6)}
    g, u = np.minimum(routed(gate, half=False)[0], limit), np.clip(routed(up, half=False)[0], -limit, limit)
    expected = g / (1 + np.exp(-g)) * u * weights[..., None]
    np.testing.assert_allclose(mid, expected, rtol=2e-4, atol=2e-5)

    down = Case(kind="Q2_K", x=mid, blocks=random_blocks(rng, "Q2_K", (E, 64), M), ids=ids)
    out = np.empty((1, 64), np.float32)
    run(
        ds4, "kernel_mul_mv_id_q2_K_sum6_f32", checked,
        {0: vector_args(ds4, down), 1: down.blocks, 2: mid, 3: out, 4: ids}, out=(3,), constants={"FC_mul_mv_nsg": 2},
        memory=16, threadgroups=(64 // 8, 1, 1), threads=(32, 2, 1),
    )  # fmt: skip
    products, bound = routed(down, half=False)
    assert_within(out, products.sum(1), 8 * bound.sum(1))


@MODES
@pytest.mark.parametrize("biased", [False, True])
def test_router(ds4: Path, checked: bool, biased: bool) -> None:
    """Top six of 256 by √softplus (+ bias), weighted by their share times 1.5."""
    rng = np.random.default_rng(4)
    probs = np.sqrt(np.log1p(np.exp(rng.standard_normal(256)))).astype("f4")
    bias = rng.uniform(-1, 1, 256).astype("f4")
    chosen, weights = np.empty(6, np.int32), np.empty(6, np.float32)
    args = kargs(ds4, "dsv4_router_select_one", has_bias=biased, hash_rows=1)
    run(
        ds4, "kernel_dsv4_router_finalize_one", checked,
        {0: args, 1: probs, 2: bias, 3: np.zeros(6, np.int32), 4: np.zeros(1, np.int32), 5: chosen}, out=(5,),
        memory=256 * 8, threadgroups=1, threads=256,
    )  # fmt: skip
    assert chosen.tolist() == np.argsort(-(probs + bias if biased else probs), kind="stable")[:6].tolist()
    run(
        ds4, "kernel_dsv4_router_weights_one", checked, {0: probs, 1: chosen, 2: weights}, out=(2,), threadgroups=1,
        threads=6,
    )  # fmt: skip
    np.testing.assert_allclose(weights, probs[chosen] / probs[chosen].astype("f8").sum() * 1.5, rtol=1e-6)
