"""One launch: what a caller asked for, checked, laid out in shared memory, run by a worker, and read back.

A launch that Metal could not issue (too many threads, too much threadgroup memory, a buffer that the kernel doesn't
have) is refused: what it would show is no finding.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

import numpy as np

from engine.metal import faults, worker
from engine.metal.arguments import Argument, Bytes, Element, Piece, Slot, argument, check_dtype, place
from engine.metal.errors import MetalError
from engine.metal.faults import Fault, Triple
from engine.metal.parameters import Parameter

# Limits of every Apple GPU since Apple4 (Metal feature set tables).
MOST_THREADS = 1024
MOST_THREADGROUP_BYTES = 32 * 1024
# Below this many threads, waking other host threads costs more than it saves.
_ALONE_BELOW = 2048
_SPACES = ("device", "constant", "threadgroup")
_NOT_A_BUFFER = -(2**31)
Size = int | Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Stats:
    """What a launch did. `loads` and `stores` count accesses by address space, in checked mode only; `barriers` counts
    completed threadgroup barriers, `simdgroup_matrix_operations` once per simdgroup. `seconds`: in the kernel;
    `wall_seconds`: the whole launch as its caller saw it."""

    threadgroups: int
    barriers: int
    loads: Mapping[str, int]
    stores: Mapping[str, int]
    simdgroup_matrix_operations: int
    threadgroup_memory_bytes: int
    seconds: float
    wall_seconds: float


@dataclass(frozen=True, kw_only=True)
class Run:
    """The outcome of a launch. `completed`: the kernel ran to its end, and arrays have been written in place."""

    kernel: str
    device: str
    faults: tuple[Fault, ...]
    stats: Stats
    completed: bool = True


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A compiled kernel: `module` holds its code, `variables` names its threadgroup variables by number, `optional` are
    the buffers that a launch may leave out."""

    name: str
    parameters: tuple[Parameter, ...]
    most_threads: int
    module: Path
    variables: Mapping[int, str]
    checked: bool
    optional: frozenset[int] = frozenset()

    @cached_property
    def buffers(self) -> dict[int, Parameter]:
        return {p.index: p for p in self.parameters if p.kind == "buffer" and p.index is not None}

    @cached_property
    def threadgroup(self) -> dict[int, Parameter]:
        return {p.index: p for p in self.parameters if p.kind == "threadgroup" and p.index is not None}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A dispatch: threadgroups, threads of each, and threads in all. At a grid's edge threadgroups may be smaller."""

    threadgroups: Triple
    threads: Triple
    grid: Triple


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to run: threadgroup memory in bytes by index, outputs to fill with NaNs, and the rest as for `launch`."""

    memory: Mapping[int, int]
    outputs: tuple[int, ...]
    seed: int | None
    timeout: float
    poison: bool


def _triple(value: Size, what: str) -> Triple:
    parts = tuple(value) if isinstance(value, Sequence) else (value,)
    whole = all(isinstance(part, (int, np.integer)) for part in parts)
    full = (*(int(part) for part in parts), 1, 1, 1)[:3] if whole else (0, 0, 0)
    if not 1 <= len(parts) <= 3 or any(not 0 < part < 2**31 for part in full):
        raise MetalError(f"{what}={value!r}: one to three positive integers (x, y, z) are wanted")
    return full[0], full[1], full[2]


def shape(threads: Size, threadgroups: Size | None, grid: Size | None, most_threads: int) -> Shape:
    """The dispatch of `threadgroups`, or of a `grid` of threads. Raises MetalError for one that Metal can't issue."""
    group = _triple(threads, "threads")
    if prod(group) > most_threads:
        raise MetalError(f"threads={group}: a threadgroup of this kernel has at most {most_threads} threads")
    if grid is not None and threadgroups is None:
        whole = _triple(grid, "grid")
        x, y, z = (-(-size // part) for size, part in zip(whole, group, strict=True))
        groups: Triple = (x, y, z)
    elif threadgroups is not None and grid is None:
        groups = _triple(threadgroups, "threadgroups")
        x, y, z = (count * part for count, part in zip(groups, group, strict=True))
        whole = (x, y, z)
    else:
        raise MetalError("pass either threadgroups=(x, y, z) or grid=(x, y, z) threads")
    if prod(groups) >= 2**31 or max(whole) >= 2**32:
        raise MetalError(f"a grid of {groups} threadgroups is more than the host can count")
    return Shape(threadgroups=groups, threads=group, grid=whole)


def check_options(kernel: Compiled, options: Options) -> None:
    """Raises MetalError for threadgroup memory or a time limit that no launch could have."""
    for index, size in options.memory.items():
        if index not in kernel.threadgroup:
            raise MetalError(f"{kernel.name} has no threadgroup({index}); it has {sorted(kernel.threadgroup)}")
        if size < 0:
            raise MetalError(f"threadgroup_memory[{index}] = {size} bytes")
    missing = sorted(kernel.threadgroup.keys() - options.memory.keys())
    if missing:
        name = kernel.threadgroup[missing[0]].name
        raise MetalError(f"{kernel.name}: pass threadgroup_memory={{{missing[0]}: bytes}} for its {name!r}")
    _limit(kernel, sum(options.memory.values()))
    if not 0 < options.timeout < 1e6:
        raise MetalError(f"timeout={options.timeout}: seconds, more than 0 and less than a million")


def _limit(kernel: Compiled, total: int) -> None:
    if total > MOST_THREADGROUP_BYTES:
        raise MetalError(f"{kernel.name} uses {total} bytes of threadgroup memory; a GPU has {MOST_THREADGROUP_BYTES}")


def check_bound(kernel: Compiled, buffers: Mapping[int, object]) -> None:
    """Raises MetalError for a buffer that the kernel doesn't have, and for one that it has and nobody mentions."""
    for index in buffers:
        if index not in kernel.buffers:
            raise MetalError(f"{kernel.name} has no buffer({index}); it has {sorted(kernel.buffers)}")
    missing = kernel.buffers.keys() - buffers.keys() - kernel.optional
    if missing:
        named = ", ".join(f"buffer({i}) {kernel.buffers[i].name!r}" for i in sorted(missing))
        raise MetalError(
            f"{kernel.name}: nothing is bound to {named}; pass {{{min(missing)}: None}} for what the kernel doesn't use"
        )


def check_outputs(slots: Mapping[int, Slot], outputs: Sequence[int]) -> None:
    """Raises MetalError for an output whose memory is also another buffer's, which isn't one."""
    for index in outputs:
        for other, slot in slots.items():
            if slot.owner == slots[index].owner and other not in outputs:
                raise MetalError(
                    f"outputs names buffer({index}), but buffer({other}) shares its memory: what it holds matters"
                )


def schedule(value: object) -> int | None:
    """A schedule's seed, from 0 to 2**64 - 1."""
    if value is None:
        return None
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or not 0 <= int(value) < 2**64:  # type: ignore[call-overload]
        raise MetalError(f"schedule_seed={value!r}: an integer from 0 to 2**64 - 1 is wanted, or None")
    return int(value)  # type: ignore[call-overload, no-any-return]


class Launch:
    """A launch of one kernel on one worker."""

    def __init__(self, kernel: Compiled, process: worker.Worker, dispatch: Shape, options: Options) -> None:
        check_options(kernel, options)
        self.kernel, self.worker, self.shape, self.options = kernel, process, dispatch, options
        self.number, infos = process.load(kernel.module)[kernel.name]
        pairs = zip(kernel.parameters, infos, strict=True)
        # (size, align, const, pointer, reference, element, element's size) of each buffer, as C++ has deduced them.
        self.infos = {p.index: info for p, info in pairs if p.kind == "buffer" and p.index is not None}

    def bind(self, buffers: Mapping[int, object]) -> dict[int, Argument | None]:
        """An Argument for each buffer of the kernel, None for those that aren't bound."""
        kernel = self.kernel
        check_bound(kernel, buffers)
        found: dict[int, Argument | None] = {}
        for index, parameter in kernel.buffers.items():
            size, _, const, _, reference, element, element_size = self.infos[index]
            value = buffers.get(index)
            if value is None:
                found[index] = None
                continue
            given = found[index] = argument(index, parameter.name, value, written=not const)
            label = f"buffer({index}) {parameter.name!r}"
            check_dtype(label, parameter.type_text, value, Element(chr(element), element_size))
            if reference and given.data.size < size:
                raise MetalError(f"{label} is a {parameter.type_text} of {size} bytes, not of {given.data.size}")
        for index in self.options.outputs:
            bound = found.get(index)
            if bound is None or bound.target is None:
                raise MetalError(f"outputs names buffer({index}), which is no array that {kernel.name} writes")
        return found

    def run(self, buffers: Mapping[int, object], began: float) -> Run:
        """Launch and wait; `began` is when the caller started (time.perf_counter)."""
        arguments = self.bind(buffers)
        # A load from a reference may be hoisted out of its condition: it still finds memory where None is bound.
        self.unbound = frozenset(i for i, given in arguments.items() if given is None)
        unbound = {i: self.infos[i][0] for i in self.unbound if self.infos[i][4]}
        slots, pieces, end = place(arguments, unbound)
        check_outputs(slots, self.options.outputs)
        self.worker.reserve(end)
        layout = tuple(slots.items())
        self._describe(fresh=layout != self.worker.layout)
        self.worker.layout = None
        whole: Bytes = np.frombuffer(self.worker.memory, np.uint8)
        self._bind_pieces(slots, pieces)
        for index, slot in slots.items():
            given = arguments[index]
            if given is not None:
                place_in = whole[slot.offset : slot.offset + slot.size]
                place_in[:] = 0xFF if index in self.options.outputs else given.data
        ended = self.worker.run(self.options.timeout)
        control = self.worker.control
        if ended is None:
            self.worker.layout = layout
            _limit(self.kernel, control.counts.threadgroup_bytes)
            for index, slot in slots.items():
                given = arguments[index]
                if given is not None and given.target is not None:
                    given.target[:] = whole[slot.offset : slot.offset + slot.size]
        found = self._faults(control, ended)
        wall = time.perf_counter() - began
        stats = _stats(control, self.kernel, wall)
        return Run(kernel=self.kernel.name, device="host", faults=found, stats=stats, completed=ended is None)

    def _describe(self, *, fresh: bool) -> None:
        """Fill the control page, but for the buffers."""
        control, options, dispatch = self.worker.control, self.options, self.shape
        ctypes.memset(ctypes.addressof(control), 0, worker.Control.faults.offset)
        control.protocol, control.kernel = worker.PROTOCOL, self.number
        control.threadgroups = worker.Vec3(*dispatch.threadgroups)
        control.threads = worker.Vec3(*dispatch.threads)
        control.grid = worker.Vec3(*dispatch.grid)
        control.flags = worker.FLAG_POISON * options.poison | worker.FLAG_SEEDED * (options.seed is not None)
        control.flags |= worker.FLAG_FRESH_LAYOUT * fresh
        control.seed = options.seed or 0
        control.timeout_microseconds = max(1, int(options.timeout * 1e6))
        control.host_threads = _host_threads(dispatch)
        for index, size in options.memory.items():
            control.threadgroup_memory[index] = size

    def _bind_pieces(self, slots: Mapping[int, Slot], pieces: Mapping[int, Piece]) -> None:
        bindings, outputs = self.worker.control.buffers, self.options.outputs
        for index, slot in slots.items():
            piece = pieces.get(index)
            if piece is None:
                bindings[index] = worker.Binding(offset=slot.offset, owner=slot.owner)
                continue
            # Written through one of its bindings, memory may be written.
            writable = any(not self.infos[i][2] for i, other in slots.items() if other.owner == index)
            constant = self.kernel.buffers[index].address_space == "constant"
            bindings[index] = worker.Binding(
                slot.offset, piece.size, piece.room, index, True, writable, index not in outputs, constant
            )

    def _faults(self, control: worker.Control, ended: str | None) -> tuple[Fault, ...]:
        kernel = self.kernel
        launched = faults.Launched(
            kernel=kernel.name,
            module=kernel.module,
            threads=self.shape.threads,
            threadgroups=self.shape.threadgroups,
            grid=self.shape.grid,
            constant_buffers=frozenset(i for i, p in kernel.buffers.items() if p.address_space == "constant"),
            unbound=self.unbound,
            variables=kernel.variables,
            timeout=self.options.timeout,
        )
        records = [control.faults[i] for i in range(min(control.fault_count, worker.MOST_FAULTS))]
        if ended in ("crash", "timeout"):
            nothing = dict.fromkeys(("op", "thread", "other_thread", "threadgroup", "other_threadgroup"), -1)
            kind = faults.KINDS.index(ended)
            records.append(worker.FaultRecord(kind=kind, space=3, buffer=_NOT_A_BUFFER, **nothing))
        found = [fault for record in records if (fault := faults.read(record, launched)) is not None]
        return faults.merged([fault for fault in found if not _seen_happen(fault, found)])


def _seen_happen(fault: Fault, found: Sequence[Fault]) -> bool:
    """Whether a broken guard gap only shows again what a checker saw happen."""
    same = (other for other in found if other.kind == fault.kind and other.line is not None)
    return fault.line is None and any((o.address_space, o.buffer) == (fault.address_space, fault.buffer) for o in same)


def _host_threads(dispatch: Shape) -> int:
    groups = prod(dispatch.threadgroups)
    if groups * prod(dispatch.threads) < _ALONE_BELOW:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(groups, cores)


def _stats(control: worker.Control, kernel: Compiled, wall: float) -> Stats:
    counts = control.counts
    return Stats(
        threadgroups=counts.threadgroups,
        barriers=counts.barriers,
        loads=dict(zip(_SPACES, counts.loads, strict=True)) if kernel.checked else {},
        stores=dict(zip(_SPACES, counts.stores, strict=True)) if kernel.checked else {},
        simdgroup_matrix_operations=counts.matrix_ops,
        threadgroup_memory_bytes=counts.threadgroup_bytes,
        seconds=counts.nanoseconds * 1e-9,
        wall_seconds=wall,
    )
