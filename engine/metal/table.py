"""Which kernel runs, over which grid, with how much threadgroup memory: one Dispatch, made in one place.

A kernel's tile, its grid and its staging are one decision. Taken in three places they can disagree (a grid of 64-token
tiles over a kernel that computes 32 leaves rows unwritten; staging of the smaller tile is overrun by the larger), so
here the tile is chosen once and the other numbers are looked up by it. The kernels' header comments in
engine/metal/kernels/*.metal state the same numbers; tests/engine/metal/test_kernels_table.py holds the two together.
E experts, M rows of an expert's weights, n tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

KERNELS = Path(__file__).parent / "kernels"
DEFAULT_TILE = 128
# Weight rows of a tile of the expert-major matmul, and of a threadgroup of the vector kernel (a simdgroup each).
TILE_ROWS = 64
VECTOR_ROWS = 4
# Pairs of a RoPE threadgroup, elements of a SwiGLU one: any size is right, a simdgroup's or four's width is usual.
ROPE_PAIRS = 32
SWIGLU_ELEMENTS = 128
# The most that kernel_attention and kernel_router have room for.
MOST_HEAD_DIM = 256
MOST_EXPERTS = 1024


@dataclass(frozen=True, kw_only=True)
class Dispatch:
    """What a launch needs besides its buffers; `source` is a file name in KERNELS, `entry` the function in it that has
    the host name `kernel`, with its template arguments."""

    source: str
    kernel: str
    entry: str
    threadgroups: tuple[int, int, int]
    threads: tuple[int, int, int]
    threadgroup_bytes: int = 0
    tile: int = 1


@dataclass(frozen=True, kw_only=True)
class Format:
    """A block format: its name in kernel names and in ggml, elements and bytes of a block."""

    name: str
    elements: int
    bytes: int


# By ggml's name.
FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "Q8_0": Format(name="q8_0", elements=32, bytes=34),
        "Q4_K": Format(name="q4_K", elements=256, bytes=144),
        "Q2_K": Format(name="q2_K", elements=256, bytes=84),
        "IQ2_XXS": Format(name="iq2_xxs", elements=256, bytes=66),
    }
)
# Right-hand sides of the matmuls, and element types of the other kernels, by NumPy's name.
RHS: Mapping[str, str] = MappingProxyType({"float32": "f32", "float16": "f16"})
TYPES: Mapping[str, str] = MappingProxyType({"float32": "f32", "float16": "f16", "bfloat16": "bf16"})
# What the element types are called in Metal.
METAL_TYPES: Mapping[str, str] = MappingProxyType({"float32": "float", "float16": "half", "bfloat16": "bfloat"})
# Tokens of a tile → threadgroup bytes: while summing, 32 elements of 64 rows and of the tokens in half; then the tile
# itself in float over the same memory, which is always the larger: 64·tile·4.
TILES: Mapping[int, int] = MappingProxyType({tile: TILE_ROWS * tile * 4 for tile in (32, 64, 128)})


def choose_tile(n_tokens: int, max_tile: int = DEFAULT_TILE) -> int:
    """The tile for a batch of n_tokens: the largest of 128 and 64 that divides it and is allowed, else 32.

    n_tokens is the most that one expert can have (each token visits an expert once). The rule is ds4's; with tiles that
    cover their tokens at every residue it decides speed alone.
    """
    if max_tile not in TILES:
        raise ValueError(f"max_tile is {max_tile}; one of {', '.join(map(str, TILES))} is expected")
    return next((tile for tile in (128, 64) if tile <= max_tile and n_tokens >= tile and n_tokens % tile == 0), 32)


def plan_mul_mm_id(
    kind: str, rhs: str, n_tokens: int, rows: int, experts: int, max_tile: int = DEFAULT_TILE, tile: int | None = None
) -> Dispatch:
    """The expert-major matmul of n_tokens (the most an expert can have) by `rows` weight rows of each expert.

    tile, where given, is taken in place of choose_tile's. Raises ValueError for a format, type or tile without a kernel
    and for sizes below 1.
    """
    _positive(n_tokens=n_tokens, rows=rows, experts=experts)
    chosen = choose_tile(n_tokens, max_tile) if tile is None else tile
    if chosen not in TILES:
        raise ValueError(f"tile is {chosen}; one of {', '.join(map(str, TILES))} is expected")
    return Dispatch(
        source="moe.metal",
        kernel=f"kernel_mul_mm_id_{_format(kind).name}_{_suffix(rhs, RHS)}_n{chosen}",
        entry=f"kernel_mul_mm_id<block_{_format(kind).name}, {METAL_TYPES[rhs]}, {chosen}>",
        threadgroups=(-(-n_tokens // chosen), -(-rows // TILE_ROWS), experts),
        threads=(128, 1, 1),
        threadgroup_bytes=TILES[chosen],
        tile=chosen,
    )


def plan_mul_mm_id_map(experts: int) -> Dispatch:
    """Each expert's (token, slot) pairs: a simdgroup an expert."""
    _positive(experts=experts)
    return Dispatch(
        source="moe.metal",
        kernel="kernel_mul_mm_id_map",
        entry="kernel_mul_mm_id_map",
        threadgroups=(experts, 1, 1),
        threads=(32, 1, 1),
    )


def plan_mul_mv_id(kind: str, rhs: str, pairs: int, rows: int) -> Dispatch:
    """The matrix–vector product of each of `pairs` = n·top_k (token, slot) pairs: a simdgroup a weight row."""
    _positive(pairs=pairs, rows=rows)
    return Dispatch(
        source="moe.metal",
        kernel=f"kernel_mul_mv_id_{_format(kind).name}_{_suffix(rhs, RHS)}",
        entry=f"kernel_mul_mv_id<block_{_format(kind).name}, {METAL_TYPES[rhs]}>",
        threadgroups=(-(-rows // VECTOR_ROWS), pairs, 1),
        threads=(32 * VECTOR_ROWS, 1, 1),
        tile=VECTOR_ROWS,
    )


def plan_router(n_tokens: int, experts: int) -> Dispatch:
    """The router's top K: a simdgroup a token, a float of threadgroup memory an expert."""
    _positive(n_tokens=n_tokens, experts=experts)
    if experts > MOST_EXPERTS:
        raise ValueError(f"{experts} experts; kernel_router has room for {MOST_EXPERTS}")
    return Dispatch(
        source="router.metal",
        kernel="kernel_router",
        entry="kernel_router",
        threadgroups=(n_tokens, 1, 1),
        threads=(32, 1, 1),
        # Metal rounds threadgroup memory to 16 bytes.
        threadgroup_bytes=-(-4 * experts // 16) * 16,
    )


def plan_rows(op: str, dtype: str, rows: int) -> Dispatch:
    """`rms_norm` or `softmax`, a threadgroup a row; 128 bytes hold a float for each of 32 simdgroups."""
    _positive(rows=rows)
    if op not in ("rms_norm", "softmax"):
        raise ValueError(f"{op} is no kernel of rows; rms_norm or softmax is expected")
    return Dispatch(
        source="rows.metal",
        kernel=f"kernel_{op}_{_suffix(dtype, TYPES)}",
        entry=f"kernel_{op}<{METAL_TYPES[dtype]}>",
        threadgroups=(rows, 1, 1),
        threads=(128, 1, 1),
        threadgroup_bytes=128,
    )


def plan_rope(dtype: str, tokens: int, heads: int, head_dim: int) -> Dispatch:
    """Half-split RoPE: a thread a pair."""
    _positive(tokens=tokens, heads=heads, head_dim=head_dim)
    if head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}; RoPE pairs its halves, so it must be even")
    return Dispatch(
        source="elementwise.metal",
        kernel=f"kernel_rope_{_suffix(dtype, TYPES)}",
        entry=f"kernel_rope<{METAL_TYPES[dtype]}>",
        threadgroups=(-(-head_dim // 2 // ROPE_PAIRS), heads, tokens),
        threads=(ROPE_PAIRS, 1, 1),
    )


def plan_swiglu(dtype: str, rows: int, width: int) -> Dispatch:
    """The clamped SwiGLU: a thread an element."""
    _positive(rows=rows, width=width)
    return Dispatch(
        source="elementwise.metal",
        kernel=f"kernel_swiglu_{_suffix(dtype, TYPES)}",
        entry=f"kernel_swiglu<{METAL_TYPES[dtype]}>",
        threadgroups=(-(-width // SWIGLU_ELEMENTS), rows, 1),
        threads=(SWIGLU_ELEMENTS, 1, 1),
    )


def plan_attention(dtype: str, batch: int, heads: int, key_dim: int, value_dim: int) -> Dispatch:
    """One query a sequence: four simdgroups a head share its keys, each keeping value_dim sums and two scalars."""
    _positive(batch=batch, heads=heads, key_dim=key_dim, value_dim=value_dim)
    if max(key_dim, value_dim) > MOST_HEAD_DIM:
        raise ValueError(f"heads of {key_dim} and {value_dim}; kernel_attention has room for {MOST_HEAD_DIM}")
    return Dispatch(
        source="attention.metal",
        kernel=f"kernel_attention_{_suffix(dtype, TYPES)}",
        entry=f"kernel_attention<{METAL_TYPES[dtype]}>",
        threadgroups=(heads, batch, 1),
        threads=(128, 1, 1),
        threadgroup_bytes=16 * (value_dim + 2),
    )


def _format(kind: str) -> Format:
    if kind not in FORMATS:
        raise ValueError(f"{kind} has no matmul kernel; one of {', '.join(FORMATS)} is expected")
    return FORMATS[kind]


def _suffix(dtype: str, names: Mapping[str, str]) -> str:
    if dtype not in names:
        raise ValueError(f"{dtype} operands have no kernel; one of {', '.join(names)} is expected")
    return names[dtype]


def _positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}; at least 1 is expected")
