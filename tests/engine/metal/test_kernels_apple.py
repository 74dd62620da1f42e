"""The text that MLX would make of a kernel's description, run by the host executor."""

from __future__ import annotations

import numpy as np
import pytest

from engine.metal import table
from engine.metal.kernels import apple, host
from engine.metal.library import compile
from tests.engine.metal.kernel_oracle import make_case

# How mx.fast.metal_kernel writes a signature: inputs, outputs, then the attributes that the body names.
MLX_ATTRIBUTES = {
    "threadgroup_position_in_grid": "uint3",
    "thread_index_in_threadgroup": "uint",
    "simdgroup_index_in_threadgroup": "uint",
    "thread_index_in_simdgroup": "uint",
}
MLX_TYPES = {"args": "int", "weights": "uint8_t", "x": "float", "counts": "uint32_t", "pairs": "uint32_t"}


@pytest.mark.parametrize("tile", tuple(table.TILES))
def test_the_text_given_to_mlx_computes_the_same(tile: int) -> None:
    case = make_case("IQ2_XXS", "float32", 65, 256)
    experts, M, args = host._operands(case.x, case.blocks, case.ids, case.kind)
    plan = table.plan_mul_mm_id("IQ2_XXS", "float32", len(case.ids), M, experts, tile=tile)
    described = apple.metal_kernel(plan)
    inputs = [
        f"const device {MLX_TYPES[name]}* {name} [[buffer({i})]]" for i, name in enumerate(described["input_names"])
    ]
    attributes = [f"{kind} {name} [[{name}]]" for name, kind in MLX_ATTRIBUTES.items() if name in described["source"]]
    signature = ",\n".join([*inputs, "device float* out [[buffer(5)]]", *attributes])
    text = f"{described['header']}\n[[kernel]] void custom_kernel({signature}) {{\n{described['source']}\n}}\n"
    lib = compile(text)
    assert lib.kernels == ["custom_kernel"]
    counts, pairs = host.expert_pairs(case.ids, experts)
    out = np.empty((*case.ids.shape, M), np.float32)
    call = apple.grid(plan)
    run = lib["custom_kernel"].launch(
        {0: args + bytes(12), 1: case.blocks, 2: case.x, 3: counts, 4: pairs, 5: out},
        grid=call["grid"],
        threads=call["threadgroup"],
        outputs=(5,),
    )
    assert not run.faults
    assert np.array_equal(out, host.mul_mm_id(case.x, case.blocks, case.ids, case.kind, tile=tile))


def test_mlx_takes_the_description() -> None:
    import mlx.core as mx

    plan = table.plan_mul_mm_id("Q4_K", "float16", 64, 64, 2)
    described = apple.metal_kernel(plan)
    assert '#include "' not in described["header"]
    assert callable(mx.fast.metal_kernel(**described))
    with pytest.raises(ValueError, match="kernel_mul_mm_id_map is no expert-major matmul"):
        apple.metal_kernel(table.plan_mul_mm_id_map(2))
