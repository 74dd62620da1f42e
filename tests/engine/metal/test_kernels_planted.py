"""What the tests of the routed matmul would see: faults planted in its text, in its launch and in its table.

Each is a fault that has been published: staging that does not grow with the tile, a missing barrier, a grid of another
tile than the kernel's, an operand of another type than the kernel's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine.metal import table
from engine.metal.errors import MetalError
from engine.metal.kernels import apple, host, ops
from engine.metal.library import Run, compile
from tests.engine.metal.kernel_oracle import Case, make_case, random_blocks, routed

MOE = apple.source_text(table.KERNELS / "moe.metal")


def launched(text: str, case: Case, plan: table.Dispatch, *, checked: bool = False, **changes: Any) -> tuple[Any, Run]:
    """The matmul of a source text, as host.mul_mm_id launches it; returns the outputs with unwritten ones NaN."""
    experts, M, args = ops._operands(case.x, case.blocks, case.ids, case.kind)
    counts, pairs = host.expert_pairs(case.ids, experts)
    out = np.full((*case.ids.shape, M), np.nan, np.float32)
    options = {
        "threadgroups": plan.threadgroups,
        "threads": plan.threads,
        "threadgroup_memory": {0: plan.threadgroup_bytes},
        "outputs": (5,),
    }
    kernel = compile(text, checked=checked)[plan.kernel]
    # x as bytes, as Metal binds it: the executor would refuse an array of another type than the kernel's.
    run = kernel.launch(
        {0: args, 1: case.blocks, 2: case.x.view(np.uint8), 3: counts, 4: pairs, 5: out}, **(options | changes)
    )
    return out, run


def one_expert(load: int) -> tuple[Case, table.Dispatch]:
    rng = np.random.default_rng(load)
    x = rng.standard_normal((load, 256)).astype(np.float32)
    case = Case(kind="Q4_K", x=x, blocks=random_blocks(rng, "Q4_K", (1, 64), 256), ids=np.zeros((load, 1), np.int32))
    return case, table.plan_mul_mm_id("Q4_K", "float32", load, 64, 1, tile=64)


NARROW = (
    "band < NR1 / 32; ++band) {\n            const short token",
    "band < 1; ++band) {\n            const short token",
)


@pytest.mark.parametrize(
    ("load", "wrong"), [(1, 0), (32, 0), (33, 64), (64, 2048), (65, 2048), (96, 2048), (128, 4096)]
)
def test_staging_that_does_not_grow_with_the_tile_is_seen(load: int, wrong: int) -> None:
    """32 tokens staged for a tile of 64: 64·Σ max(0, tokens of the tile − 32) elements are wrong, none below 33."""
    assert MOE.count(NARROW[0]) == 1
    case, plan = one_expert(load)
    actual, run = launched(MOE.replace(*NARROW), case, plan)
    assert not run.faults
    expected, bound = routed(case, half=True)
    assert (~(np.abs(actual - expected) <= bound)).sum() == wrong


def test_checked_mode_names_what_was_not_staged() -> None:
    case, plan = one_expert(64)
    _, run = launched(MOE.replace(*NARROW), case, plan, checked=True)
    assert {fault.kind for fault in run.faults} == {"uninitialised-read"}
    _, run = launched(MOE, case, plan, checked=True, threadgroup_memory={0: table.TILES[32]})
    assert {fault.kind for fault in run.faults} <= {"out-of-bounds-read", "out-of-bounds-write"}
    assert run.faults


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("to[row] = result[NR0 * token + row];", "to[row] = half(result[NR0 * token + row]);"),
        ("to[i] = half(x_rows[band][k + i]);", "to[i] = half(x_rows[band][k + (i + 1) % 8]);"),
        ("% args.top_k) % args.x_slots;\n        x_rows", "% args.top_k);\n        x_rows"),
        ("(k % Block::elements) / 16 + a_half", "(k % 128) / 16 + a_half"),
        ("own[token]) * args.M", "own[token] / args.top_k * args.top_k) * args.M"),
        ("* float((codes[i] >> shift) & 15) - offset", "* float((codes[i] >> shift) & 15) + offset"),
    ],
    ids=["sum rounded to half", "elements rotated", "row of another token", "sub-block read twice", "slot", "min"],
)
def test_wrong_values_are_seen(right: str, wrong: str) -> None:
    """Each compiles, keeps in bounds or nearly so, and is out of every bound."""
    case = make_case("Q4_K", "float32", 33, 512)
    plan = table.plan_mul_mm_id("Q4_K", "float32", len(case.ids), 70, 5, tile=64)
    expected, bound = routed(case, half=True)
    actual, run = launched(MOE, case, plan)
    assert not run.faults
    assert (np.abs(actual - expected) <= bound).all()
    assert MOE.count(right) == 1
    actual, run = launched(MOE.replace(right, wrong), case, plan)
    assert run.faults or not (np.abs(actual - expected) <= bound).all()


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_every_barrier_is_needed(place: int) -> None:
    barrier = "threadgroup_barrier(mem_flags::mem_threadgroup);"
    parts = MOE.split(barrier)
    assert len(parts) == 5
    text = barrier.join(parts[: place + 1]) + barrier.join(parts[place + 1 :])
    case, plan = one_expert(33)
    _, run = launched(text, case, plan, checked=True)
    assert "race" in {fault.kind for fault in run.faults}


def test_a_grid_of_another_tile_leaves_rows_unwritten() -> None:
    """The n32 kernel over a grid of 64-token tiles covers 32·⌈load/64⌉ tokens: what one table rules out."""
    case, wide = one_expert(96)
    narrow = table.plan_mul_mm_id("Q4_K", "float32", 96, 64, 1, tile=32)
    actual, run = launched(MOE, case, narrow, threadgroups=wide.threadgroups)
    assert not run.faults
    assert np.isnan(actual).sum() == 64 * 32


def test_a_float16_x_read_as_float32_is_a_fault() -> None:
    case, plan = one_expert(32)
    half = Case(kind="Q4_K", x=case.x.astype(np.float16), blocks=case.blocks, ids=case.ids)
    _, run = launched(MOE, half, plan, checked=True)
    assert {fault.kind for fault in run.faults} == {"out-of-bounds-read"}


def test_a_fault_is_an_error_for_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "TILES", {32: 8192, 64: 8192, 128: 8192})
    case = make_case("Q4_K", "float32", 64, 256)
    with pytest.raises(MetalError, match="kernel_mul_mm_id_q4_K_f32_n64: "):
        host.mul_mm_id(case.x, case.blocks, case.ids, "Q4_K", tile=64, checked=True)
