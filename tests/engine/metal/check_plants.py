"""Every planted fault of kernels/*.metal: what to launch and what the checkers must say.

A kernel is compiled as it is, and with FIXED defined, which takes its fault out. The lines at which a fault may be
reported carry `// expect: KIND` in the source: a race has two, and the schedule decides which side is seen second.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

KERNELS = Path(__file__).parent / "kernels"
THREADS, GROUPS = 64, 2
N = THREADS * GROUPS


@dataclass(frozen=True, kw_only=True)
class Plant:
    kernel: str
    file: str
    kind: str
    space: str = "threadgroup"
    buffer: int | None = 0
    offset: int | None = None  # checked where it is the same under every schedule
    size: int | None = None
    outputs: tuple[int, ...] = ()
    timeout: float = 10.0
    out_elements: int = N
    where: tuple[int, int] | None = None  # thread and threadgroup, in the order of a launch without a seed
    clean: bool = False  # the faulty form is no fault either
    also: frozenset[str] = field(default_factory=frozenset)  # kinds that the same mistake may also show as


def bounds(
    kernel: str, kind: str, space: str, buffer: int | None, offset: int | None, size: int | None = 4, **more: Any
) -> Plant:
    return Plant(kernel=kernel, file="bounds", kind=kind, space=space, buffer=buffer, offset=offset, size=size, **more)


def unwritten(kernel: str, **more: Any) -> Plant:
    return Plant(kernel=kernel, file="uninitialised", kind="uninitialised-read", **more)


def race(kernel: str, space: str = "threadgroup", buffer: int | None = 0, **more: Any) -> Plant:
    return Plant(kernel=kernel, file="races", kind="race", space=space, buffer=buffer, **more)


def divergence(kernel: str, kind: str, **more: Any) -> Plant:
    return Plant(kernel=kernel, file="divergence", kind=kind, space="", buffer=None, **more)


def misaligned(kernel: str, space: str, buffer: int, **more: Any) -> Plant:
    return Plant(kernel=kernel, file="alignment", kind="misaligned", space=space, buffer=buffer, **more)


READ, WRITE = "out-of-bounds-read", "out-of-bounds-write"
EARLY = frozenset({"uninitialised-read"})  # the reader may come before any writer
PLANTS = [
    bounds("device_read_past_end", READ, "device", 0, 4 * N, where=(63, 1)),
    bounds("device_read_before_begin", READ, "device", 0, -4, where=(0, 0)),
    bounds("device_write_past_end", WRITE, "device", 1, 4 * N - 4, out_elements=N - 1, where=(63, 1)),
    bounds("device_write_before_begin", WRITE, "device", 1, -4, where=(0, 0)),
    bounds("vector_write_past_end", WRITE, "device", 1, 4 * N, size=None),
    bounds("constant_read_past_end", READ, "constant", 3, 16, size=2),
    bounds("constant_read_before_begin", READ, "constant", 3, -2, size=2),
    bounds("threadgroup_read_past_end", READ, "threadgroup", 0, 256),
    bounds("threadgroup_write_past_end", WRITE, "threadgroup", 0, 256, also=EARLY),
    bounds("threadgroup_read_before_begin", READ, "threadgroup", 0, -4),
    bounds("threadgroup_write_before_begin", WRITE, "threadgroup", 0, -4, also=EARLY),
    bounds("overrun_into_neighbour", WRITE, "threadgroup", None, 252),
    bounds("block_read_past_end", READ, "device", 0, None, size=None),
    bounds("far_pointer", READ, "device", 0, None, size=4, where=(0, 0)),
    bounds("vector_over_the_end", WRITE, "device", 1, None, size=None, out_elements=N - 2, where=(31, 0)),
    bounds("vector_read_over_the_end", READ, "device", 1, None, size=None, out_elements=N - 2, where=(31, 0)),
    bounds("atomic_past_end", WRITE, "device", 5, 4, where=(6, 1)),
    bounds("threadgroup_atomic_past_end", WRITE, "threadgroup", None, 32, where=(6, 1)),
    bounds("declared_array_past_end", READ, "threadgroup", None, 256, where=(6, 1)),
    bounds("threadgroup_far_past_end", READ, "threadgroup", 0, 4 << 22, where=(6, 1)),
    bounds("threadgroup_far_write", WRITE, "threadgroup", 0, 12000, where=(6, 1)),
    bounds("unsigned_underflow", READ, "device", 0, (4 << 32) - 4, where=(0, 0)),
    bounds("constant_far_past_end", READ, "constant", 3, 2 << 24, size=2, where=(6, 1)),
    bounds("load_in_one_branch", READ, "device", 0, 4 * N, where=(63, 1)),
    bounds("index_that_wraps_back", READ, "device", 0, None, clean=True),
    bounds("null_pointer", "crash", "", None, None, size=None),
    unwritten("half_staged_tile"),
    unwritten("variable_never_written", buffer=None),
    unwritten("output_read_modify_write", space="device", buffer=1, outputs=(1,)),
    unwritten("half_of_a_float"),
    unwritten("left_by_another_threadgroup"),
    unwritten("counter_never_cleared", buffer=None),
    unwritten("row_not_staged"),
    unwritten("padding_is_copied", clean=True),
    unwritten("padding_between_members", clean=True),
    unwritten("member_beside_padding", buffer=None, offset=40, size=8, where=(4, 0)),
    unwritten("missing_member_is_used", buffer=None, where=(0, 0)),
    unwritten("missing_member_is_copied", clean=True),
    unwritten("maximum_never_cleared", buffer=None, where=(0, 0)),
    unwritten("output_partly_written", outputs=(1,), clean=True),
    race("no_barrier_before_use", also=EARLY),
    race("no_barrier_before_reuse"),
    race("mem_none_is_no_fence"),
    race("fence_of_the_other_memory"),
    race("device_memory_not_fenced", "device", 4),
    race("simdgroup_barrier_between_simdgroups", also=EARLY),
    race("lanes_without_barrier", also=EARLY),
    race("reduction_without_lane_barriers"),
    race("all_threads_write_one_place", "device", 1),
    race("threadgroups_write_one_place", "device", 1, offset=0),
    race("threadgroups_are_not_ordered", "device", 4),
    race("last_threadgroup_sums", "device", 4),
    race("plain_counter", "device", 5, offset=0),
    race("plain_read_beside_atomics", "device", 5, offset=0),
    race("plain_store_beside_atomics", buffer=None),
    race("staged_through_both", "device", 4),
    race("two_values_from_two_threadgroups", "device", 1, offset=28, where=(9, 1)),
    race("counter_cleared_without_barrier", buffer=None, offset=0, also=EARLY),
    race("conditional_stores", buffer=None, offset=0),
    race("one_lane_writes_another_reads", buffer=None, also=EARLY),
    race("same_value_from_everyone", "device", 5, clean=True),
    race("neighbouring_bytes", clean=True),
    race("atomic_minimum", "device", 5, clean=True),
    divergence("conditional_barrier", "barrier-divergence"),
    divergence("two_barriers", "barrier-divergence"),
    divergence("return_before_barrier", "barrier-divergence", also=EARLY),
    divergence("shuffle_from_a_lane_that_left", "simdgroup-divergence"),
    divergence("shuffle_from_a_lane_elsewhere", "simdgroup-divergence"),
    divergence("simdgroup_barrier_for_half", "simdgroup-divergence"),
    divergence("sum_of_active_lanes", "simdgroup-divergence", clean=True),
    divergence("sums_in_branches", "simdgroup-divergence", clean=True),
    divergence("broadcast_from_a_lane_that_returned", "simdgroup-divergence"),
    divergence("barrier_in_an_uneven_loop", "barrier-divergence"),
    divergence("matrix_load_by_half", "simdgroup-divergence"),
    divergence("matrix_product_in_an_uneven_loop", "simdgroup-divergence"),
    divergence("matrix_after_a_lane_returned", "simdgroup-divergence"),
    divergence("matrix_store_before_a_barrier", "simdgroup-divergence", also=EARLY),
    divergence("matrix_among_diverged_lanes", "simdgroup-divergence", clean=True),
    divergence("endless_loop", "timeout", timeout=0.5),
    misaligned("misaligned_float4", "device", 0, size=16),
    misaligned("misaligned_half4", "device", 0, size=8),
    misaligned("misaligned_float2", "device", 0, offset=4, size=8, where=(0, 0)),
    misaligned("misaligned_atomic", "device", 4, offset=14, size=4, where=(3, 0)),
    misaligned("misaligned_store", "device", 1, offset=4, size=8),
    misaligned("float3_over_packed_rows", "device", 0, size=16),
    misaligned("misaligned_in_threadgroup", "threadgroup", 0, size=16),
]


def expected_lines(plant: Plant) -> set[int]:
    """Line numbers in the plant's source that carry its mark."""
    lines = (KERNELS / f"{plant.file}.metal").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if re.match(rf"kernel void {plant.kernel}\(", line))
    marked = set()
    for i in range(start, len(lines)):
        if f"expect: {plant.kind}" in lines[i]:
            marked.add(i + 1)
        if lines[i] == "}":
            break
    return marked


def launch(library: Any, plant: Plant, schedule_seed: int | None = None) -> Any:
    """Runs the plant's kernel: 2 threadgroups of 64 threads over buffers of 128 elements."""
    kernel = library[plant.kernel]
    # As bytes: kernels here read them as what they like.
    buffers = {
        0: np.arange(1, N + 1, dtype=np.float32).view(np.uint8),
        1: np.zeros(plant.out_elements, np.float32).view(np.uint8),
        2: np.uint32(plant.out_elements),
        3: np.arange(8, dtype=np.float16),
        4: np.zeros(4 * N, np.uint8),
        5: np.zeros(1, np.uint32),
    }
    used = {p.index for p in kernel.parameters if p.kind == "buffer"}
    groups = {p.index: 4 * THREADS for p in kernel.parameters if p.kind == "threadgroup"}
    return kernel.launch(
        {index: value for index, value in buffers.items() if index in used},
        threadgroups=(GROUPS, 1, 1),
        threads=(THREADS, 1, 1),
        threadgroup_memory=groups,
        schedule_seed=schedule_seed,
        timeout=plant.timeout,
        outputs=plant.outputs,
    )
