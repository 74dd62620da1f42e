"""The kernels as mx.fast.metal_kernel gets them: MLX's own text of each, run by the host executor."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest

from engine.metal import table
from engine.metal.kernels import apple, host, ops
from engine.probes import to_numpy
from tests.engine.metal.kernel_oracle import make_case
from tests.engine.metal.mlx_on_host import OnHost, from_numpy, stand_in
from tests.engine.metal.test_kernels_table import PLANS

Op = Callable[..., Any]
on_host = pytest.fixture(stand_in)


def draw(*shape: int, dtype: Any = np.float32) -> np.ndarray[Any, Any]:
    return (2 * np.random.default_rng(shape).standard_normal(shape)).astype(dtype)


CASE = make_case("IQ2_XXS", "float32", 33, 256, 66)
HALF = make_case("Q4_K", "float16", 2, 256, 5, per_slot=True)
CALLS: dict[str, Callable[[Op, Op], Any]] = {
    **{
        f"mul_mm_id n{tile}": lambda op, a, tile=tile: op(
            ops.mul_mm_id, a(CASE.x), a(CASE.blocks), a(CASE.ids), CASE.kind, tile=tile
        )
        for tile in table.TILES
    },
    "mul_mv_id": lambda op, a: op(ops.mul_mv_id, a(HALF.x), a(HALF.blocks), a(HALF.ids), HALF.kind),
    "route": lambda op, a: op(ops.route, a(draw(3, 40)), a(draw(40)), 6, "sqrtsoftplus", factor=1.5),
    "route without bias": lambda op, a: op(ops.route, a(draw(3, 7)), None, 2, "softmax", normalise=False),
    "swiglu": lambda op, a: op(ops.swiglu, a(draw(3, 130)), a(draw(3, 130)), 1.5, a(draw(3))),
    "rms_norm": lambda op, a: op(ops.rms_norm, a(draw(3, 70, dtype=np.float16)), a(draw(70, dtype=np.float16)), 1e-6),
    "softmax": lambda op, a: op(ops.softmax, a(draw(4, 300)), a(draw(4, 300) > 0), 0.5),
    "rope": lambda op, a: op(ops.rope, a(draw(3, 2, 66)), a(np.arange(300, 303)), 1e4),
    "attention": lambda op, a: op(
        ops.attention,
        *(a(draw(*shape, dtype=ml_dtypes.bfloat16)) for shape in ((2, 4, 40), (2, 2, 9, 40), (2, 2, 9, 6))),
        scale=0.2,
        mask=a(draw(2, 9) > -1),
        sinks=a(draw(4)),
        window=7,
    ),
}


def as_list(result: Any) -> list[Any]:
    return list(result) if isinstance(result, tuple) else [result]


@pytest.mark.parametrize("name", CALLS)
def test_what_mlx_would_run_computes_the_same_bits(name: str, on_host: OnHost) -> None:
    """In the same launches: kernels in the same order, as many threadgroups, as much threadgroup memory."""
    plans: list[table.Dispatch] = []
    noted: list[str] = []

    def on_apple(plan: table.Dispatch, *rest: Any) -> Any:
        plans.append(plan)
        return apple.run(plan, *rest, note=noted.append)

    made = CALLS[name](functools.partial(_call, run=on_apple), from_numpy)
    launched: list[str] = []
    expected = CALLS[name](functools.partial(_call, run=functools.partial(host.run, note=launched.append)), lambda a: a)
    for actual, wanted in zip(as_list(made), as_list(expected), strict=True):
        assert np.array_equal(to_numpy(actual), wanted), name
        assert to_numpy(actual).dtype == wanted.dtype
    assert noted == launched == [plan.kernel for plan in plans]
    for plan, (exported, run) in zip(plans, on_host.calls, strict=True):
        assert exported.threads == plan.threads
        assert exported.grid == tuple(g * t for g, t in zip(plan.threadgroups, plan.threads, strict=True))
        assert run.stats.threadgroup_memory_bytes == plan.threadgroup_bytes
        assert plan.kernel in exported.name


def _call(op: Op, *operands: Any, run: ops.Run, **options: Any) -> Any:
    return op(*operands, run=run, **options)


def test_checked_runs_of_mlxs_text_are_clean(on_host: OnHost) -> None:
    """The memory that the body declares is what the kernel uses, and no more is touched."""
    on_host.checked = True
    ops.mul_mm_id(*map(from_numpy, (CASE.x, CASE.blocks, CASE.ids)), CASE.kind, tile=64, run=apple.run)
    assert [run.stats.threadgroup_memory_bytes for _, run in on_host.calls] == [0, 16384]


def test_memory_that_is_too_small_is_seen(on_host: OnHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "TILES", {32: 8192, 64: 8192, 128: 8192})
    on_host.checked = True
    with pytest.raises(AssertionError, match=r"threadgroup memory|shared_memory"):
        ops.mul_mm_id(*map(from_numpy, (CASE.x, CASE.blocks, CASE.ids)), CASE.kind, tile=64, run=apple.run)


@pytest.mark.parametrize("plan", [plan for plans in PLANS.values() for plan in plans], ids=lambda plan: plan.kernel)
def test_a_description_has_the_buffers_of_the_kernel(plan: table.Dispatch) -> None:
    """In the order of their numbers, inputs first; and MLX takes it."""
    described = apple.description(plan)
    declared = host.library(plan.source, False)._source.kernels[plan.kernel].function
    names = described["input_names"] + described["output_names"]
    text = apple.source_text(table.KERNELS / plan.source)
    head = text[text.index(f"kernel void {declared.name}(") :]
    places = [head.index(f" {name} [[buffer({i})]]") for i, name in enumerate(names)]
    assert places == sorted(places)
    assert f"[[buffer({len(names)})]]" not in head[: head.index("{")]
    assert "[[buffer" not in described["header"]
    assert '#include "' not in described["header"]
    assert callable(mx.fast.metal_kernel(**described))


def test_short_and_absent_operands_are_padded_into_device_memory(on_host: OnHost) -> None:
    ops.route(mx.array([[1.0, 2.0, 0.5]]), None, 2, "sigmoid", run=apple.run)
    ((exported, _),) = on_host.calls
    assert "constant " not in exported.text[exported.text.index("[[kernel]]") : exported.text.rindex(") {")]


@pytest.mark.skipif(mx.metal.is_available(), reason="here MLX has Metal")
def test_without_metal_mlx_says_so() -> None:
    with pytest.raises(RuntimeError, match="No Metal back-end"):
        ops.rope(mx.zeros((1, 1, 2)), mx.zeros(1), 1e4, run=apple.run)
