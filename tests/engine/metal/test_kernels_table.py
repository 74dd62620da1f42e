"""The table against the tile rule, the kernels' own text and the grids that cover every token and row."""

from __future__ import annotations

import re

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import IQ2_XXS

from engine.metal import table
from engine.metal.kernels import host


@pytest.mark.parametrize(
    ("n_tokens", "max_tile", "tile"),
    [
        *((n, 128, 32) for n in (1, 32, 33, 63, 65, 96, 127, 129, 2047)),
        *((n, 128, 64) for n in (64, 192, 320)),
        *((n, 128, 128) for n in (128, 256, 2048)),
        *((128, 64, 64), (192, 64, 64), (128, 32, 32), (64, 32, 32)),
    ],
)
def test_tile_rule(n_tokens: int, max_tile: int, tile: int) -> None:
    assert table.choose_tile(n_tokens, max_tile) == tile


@pytest.mark.parametrize("kind", table.FORMATS)
@pytest.mark.parametrize("rhs", table.RHS)
def test_kernel_grid_and_staging_belong_to_one_tile(kind: str, rhs: str) -> None:
    for n_tokens in (1, 32, 33, 64, 96, 128, 129, 192, 2048):
        for max_tile in table.TILES:
            for rows in (1, 64, 65, 2048):
                plan = table.plan_mul_mm_id(kind, rhs, n_tokens, rows, 7, max_tile)
                name = table.FORMATS[kind].name
                assert plan.kernel == f"kernel_mul_mm_id_{name}_{table.RHS[rhs]}_n{plan.tile}"
                assert plan.tile <= max_tile
                x, y, z = plan.threadgroups
                assert n_tokens <= x * plan.tile < n_tokens + plan.tile
                assert rows <= y * 64 < rows + 64
                assert z == 7
                # The staging while summing, and the tile in float.
                assert plan.threadgroup_bytes >= max(2 * 32 * (64 + plan.tile), 4 * 64 * plan.tile)
                assert plan.threads == (128, 1, 1)


PLANS = {
    "moe.metal": [
        table.plan_mul_mm_id_map(3),
        *(
            table.plan_mul_mm_id(kind, rhs, 64, 64, 2, tile=n)
            for kind in table.FORMATS
            for rhs in table.RHS
            for n in table.TILES
        ),
        *(table.plan_mul_mv_id(kind, rhs, 4, 64) for kind in table.FORMATS for rhs in table.RHS),
    ],
    "router.metal": [table.plan_router(3, 16)],
    "rows.metal": [table.plan_rows(op, t, 3) for op in ("rms_norm", "softmax") for t in table.TYPES],
    "elementwise.metal": [
        *(table.plan_rope(t, 3, 2, 64) for t in table.TYPES),
        *(table.plan_swiglu(t, 3, 200) for t in table.TYPES),
    ],
    "attention.metal": [table.plan_attention(t, 2, 4, 64, 48) for t in table.TYPES],
}


@pytest.mark.parametrize("source", PLANS)
def test_the_sources_have_what_the_table_names_and_nothing_else(source: str) -> None:
    kernels = set(host.library(source, False).kernels)
    planned = {plan.kernel for plan in PLANS[source]}
    # A name without a tile is the n32 kernel, for callers who bring their own grid.
    plain = {f"kernel_mul_mm_id_{form.name}_{rhs}" for form in table.FORMATS.values() for rhs in table.RHS.values()}
    assert kernels == planned | (plain if source == "moe.metal" else set())
    assert {plan.source for plan in PLANS[source]} == {source}


@pytest.mark.parametrize("source", PLANS)
def test_an_entry_is_what_the_source_instantiates_under_the_name(source: str) -> None:
    scanned = host.library(source, False)._source
    for plan in PLANS[source]:
        declared = scanned.kernels[plan.kernel]
        first, end = declared.entry or (declared.function.name_at, declared.function.name_at + 1)
        assert "".join(token.was for token in scanned.tokens[first:end]) == plan.entry.replace(" ", "")


def test_every_metal_file_is_in_the_table() -> None:
    assert {path.name for path in table.KERNELS.glob("*.metal")} == set(PLANS)


def test_a_plain_name_is_the_narrow_kernel() -> None:
    """Same parameters as every tiled one, so that a caller's bindings do for all."""
    lib = host.library("moe.metal", False)
    plain, tiled = lib["kernel_mul_mm_id_q4_K_f32"], lib["kernel_mul_mm_id_q4_K_f32_n32"]
    assert [(p.name, p.kind, p.index) for p in plain.parameters] == [
        (p.name, p.kind, p.index) for p in tiled.parameters
    ]


@pytest.mark.parametrize("source", PLANS)
def test_headers_state_the_threads_of_the_table(source: str) -> None:
    """The comment before each kernel says `threads (n, 1, 1)`: the same n as the table's plans."""
    text = (table.KERNELS / source).read_text(encoding="utf-8")
    stated = {(int(n), 1, 1) for n in re.findall(r"threads \((\d+), 1, 1\)", text)}
    assert stated == {plan.threads for plan in PLANS[source]}


def test_staging_is_stated_with_the_kernels() -> None:
    text = (table.KERNELS / "moe.metal").read_text(encoding="utf-8")
    assert "threadgroup bytes 256·tile: " + ", ".join(map(str, table.TILES.values())) in text
    assert table.plan_attention("float32", 1, 1, 64, 64).threadgroup_bytes == 16 * (64 + 2)
    assert "threadgroup bytes 16·(Dv + 2)" in (table.KERNELS / "attention.metal").read_text(encoding="utf-8")


def test_block_sizes_are_ggmls() -> None:
    for kind, form in table.FORMATS.items():
        assert (form.elements, form.bytes) == GGML_QUANT_SIZES[GGMLQuantizationType[kind]]


def test_iq2_points_are_the_gguf_packages() -> None:
    text = (table.KERNELS / "iq2_tables.h").read_text(encoding="utf-8")
    packed = np.array([int(word, 16) for word in re.findall(r"0x([0-9a-f]{4}),", text)])
    codes = packed[:, None] >> 2 * np.arange(8) & 3
    IQ2_XXS.init_grid()  # type: ignore[no-untyped-call]
    assert IQ2_XXS.grid is not None
    assert np.array_equal(np.array([8, 25, 43])[codes], IQ2_XXS.grid.reshape(256, 8))


def test_what_has_no_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="Q5_K has no matmul kernel; one of Q8_0, Q4_K, Q2_K, IQ2_XXS is expected"):
        table.plan_mul_mm_id("Q5_K", "float32", 1, 1, 1)
    with pytest.raises(ValueError, match="bfloat16 operands have no kernel; one of float32, float16 is expected"):
        table.plan_mul_mm_id("Q4_K", "bfloat16", 1, 1, 1)
    with pytest.raises(ValueError, match="max_tile is 48; one of 32, 64, 128 is expected"):
        table.plan_mul_mm_id("Q4_K", "float32", 1, 1, 1, 48)
    with pytest.raises(ValueError, match="tile is 16; one of 32, 64, 128 is expected"):
        table.plan_mul_mm_id("Q4_K", "float32", 1, 1, 1, tile=16)
    with pytest.raises(ValueError, match="n_tokens is 0; at least 1 is expected"):
        table.plan_mul_mm_id("Q4_K", "float32", 0, 1, 1)
    with pytest.raises(ValueError, match="argsort is no kernel of rows"):
        table.plan_rows("argsort", "float32", 1)
