"""Faults as callers see them: what, where in memory, which threads, and the user's line.

Their kinds: uninitialised-read, out-of-bounds-read, out-of-bounds-write, race, barrier-divergence,
simdgroup-divergence, misaligned, timeout, crash. Unchecked runs can report only divergence at barriers, writes that
hit the guard gaps, time-outs and crashes.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from engine.metal.lines import Place, place_behind, user_place
from engine.metal.worker import FaultRecord

KINDS = (
    "uninitialised-read", "out-of-bounds-read", "out-of-bounds-write", "race", "barrier-divergence",
    "simdgroup-divergence", "misaligned", "timeout", "crash",
)  # fmt: skip
_SPACES = ("device", "constant", "threadgroup", None)
_NO_BUFFER = -(2**31)
_GUESSED = 1  # FaultRecord.op of an access whose buffer isn't certain (host/worker.h)
# A list that somebody can still read.
MOST_LISTED = 64
_SIMD_WIDTH = 32  # kSimdWidth of host/runtime.h
_OPS = (
    "a simd reduction", "a simd prefix operation", "a simd vote", "simd_broadcast_first", "a simd shuffle",
    "simd_broadcast", "a quad operation", "simdgroup_barrier", "a simdgroup matrix operation", "a simdgroup async copy",
)  # fmt: skip

Triple = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault. `buffer` is an index ([[buffer(n)]] or [[threadgroup(n)]]); None: a threadgroup `variable` declared in
    the body, or no buffer at all. `offset` counts bytes from its start. Positions are (x, y, z): of threads in their
    threadgroup, of the threadgroup in the grid. `line` is in `file`, None where only the run's end showed the fault."""

    kind: str
    address_space: str | None
    buffer: int | None
    offset: int | None
    size: int | None
    thread: Triple | None
    other_thread: Triple | None
    threadgroup: Triple | None
    line: int | None
    message: str
    kernel: str
    file: str | None = None
    other_line: int | None = None
    variable: str | None = None


@dataclass(frozen=True, kw_only=True)
class Launched:
    """What a fault's record is read against."""

    kernel: str
    module: Path
    threads: Triple
    threadgroups: Triple
    grid: Triple
    constant_buffers: frozenset[int]
    unbound: frozenset[int]
    variables: Mapping[int, str]
    timeout: float


def _position(index: int, extent: Triple) -> Triple | None:
    if index < 0:
        return None
    return index % extent[0], index // extent[0] % extent[1], index // (extent[0] * extent[1])


def _thread_position(index: int, group: int, launched: Launched) -> Triple | None:
    """A thread's position from its linear index in a threadgroup, which is smaller at the edge of a grid. None for a
    lane that the threadgroup doesn't have: its last simdgroup may not be full."""
    at = _position(group, launched.threadgroups) or (0, 0, 0)
    edges = zip(launched.threads, launched.grid, at, strict=True)
    x, y, z = (min(most, whole - place * most) for most, whole, place in edges)
    return _position(index, (x, y, z)) if index < x * y * z else None


def read(record: FaultRecord, launched: Launched) -> Fault | None:
    """A Fault from the worker's record; None for two barriers that turn out to stand on one line (unrolled loops)."""
    place = user_place(launched.module, [pc for pc in record.pcs if pc])
    other = user_place(launched.module, [pc for pc in record.other_pcs if pc])
    kind = KINDS[record.kind]
    if kind == "crash" and place is None and record.pcs[0]:
        place = place_behind(launched.module, record.pcs[0])
    if kind == "barrier-divergence" and place is not None and place == other:
        return None
    space = _SPACES[record.space]
    if space == "device" and record.buffer in launched.constant_buffers:
        space = "constant"
    thread = _thread_position(record.thread, record.threadgroup, launched)
    others = record.threadgroup if record.other_threadgroup < 0 else record.other_threadgroup
    other_thread = _thread_position(record.other_thread, others, launched)
    threadgroup = _position(record.threadgroup, launched.threadgroups)
    message = record.message.decode(errors="replace") or _words(kind, record, launched, space, place, other)
    if kind == "race" and other is not None:
        message += (
            f" ({other.file}:{other.line})" if place is None or other.file != place.file else f" (line {other.line})"
        )
    if kind == "race":
        message += _lockstep(record)
    if kind.startswith("out-of-bounds") and record.bound == 0 and record.buffer >= 0 and space != "threadgroup":
        message += " (it isn't bound)" if record.buffer in launched.unbound else ""
    if record.buffer < 0:
        message = message.replace(f"threadgroup({record.buffer})", _buffer_name(record, launched, space))
    return Fault(
        kind=kind,
        address_space=space,
        buffer=record.buffer if record.buffer >= 0 else None,
        offset=record.offset if record.buffer != _NO_BUFFER else None,
        size=record.size or None,
        thread=thread,
        other_thread=other_thread,
        threadgroup=threadgroup,
        line=place.line if place else None,
        file=place.file if place else None,
        other_line=other.line if other else None,
        variable=_variable(record, launched),
        message=f"{launched.kernel}{_at(place, ', ')}: {message}",
        kernel=launched.kernel,
    )


def merged(found: Sequence[Fault]) -> tuple[Fault, ...]:
    """The same faults, with the parts of one access as one: the compiler splits a float4 into floats. What one line
    does to one memory is told once, however often the compiler has unrolled its loop."""
    kept: list[Fault] = []
    for fault in found:
        before = next((at for at, other in enumerate(kept) if _continues(fault, other)), None)
        if before is None:
            kept.append(fault)
            continue
        first = kept[before]
        size = max((first.size or 0), (fault.offset or 0) - (first.offset or 0) + (fault.size or 0))
        message = first.message.replace(f" {first.size} bytes at ", f" {size} bytes at ", 1)
        kept[before] = replace(first, size=size, message=message)
    told: dict[tuple[object, ...], Fault] = {}
    for number, fault in enumerate(kept):
        told.setdefault(_story(fault) if fault.line is not None else (number,), fault)
    listed = tuple(told.values())
    ended = listed[-1:] if listed and listed[-1].kind in ("crash", "timeout") else ()
    return listed if len(listed) <= MOST_LISTED else listed[: MOST_LISTED - len(ended)] + ended


def _story(fault: Fault) -> tuple[object, ...]:
    """What two faults have in common if one line does the same thing twice."""
    return fault.kind, fault.file, fault.line, fault.other_line, fault.address_space, fault.buffer, fault.variable


def _continues(fault: Fault, other: Fault) -> bool:
    """Whether a fault is of the same thread, line and memory as an earlier one, and of the bytes in or next to its."""
    named = ("kind", "address_space", "buffer", "variable", "thread", "threadgroup", "file", "line")
    parties = ("other_thread", "other_line")
    if fault.line is None or fault.thread is None or None in (fault.offset, other.offset, fault.size, other.size):
        return False
    assert fault.offset is not None and other.offset is not None and other.size is not None  # for the type checker
    inside = other.offset <= fault.offset <= other.offset + other.size
    return inside and all(getattr(fault, name) == getattr(other, name) for name in named + parties)


def _lockstep(record: FaultRecord) -> str:
    """What to say of a race between two lanes of one simdgroup."""
    simdgroup = record.thread // _SIMD_WIDTH
    if record.other_thread < 0 or record.other_threadgroup != record.threadgroup:
        return ""
    if record.other_thread // _SIMD_WIDTH != simdgroup:
        return ""
    return f"; both threads are of simdgroup {simdgroup}: a kernel that relies on lockstep needs a simdgroup_barrier"


def _at(place: Place | None, before: str) -> str:
    return f"{before}{place.file}:{place.line}" if place else ""


def _variable(record: FaultRecord, launched: Launched) -> str | None:
    return launched.variables.get(-1 - record.buffer) if _NO_BUFFER < record.buffer < 0 else None


def _buffer_name(record: FaultRecord, launched: Launched, space: str | None) -> str:
    """`buffer(1)`, `threadgroup(0)`, or the name of what a body declares."""
    if record.buffer < 0:
        return _variable(record, launched) or "threadgroup memory"
    return f"threadgroup({record.buffer})" if space == "threadgroup" else f"buffer({record.buffer})"


def _who(record: FaultRecord, launched: Launched) -> str:
    thread = _thread_position(record.thread, record.threadgroup, launched)
    group = _position(record.threadgroup, launched.threadgroups)
    parts = [f"thread {thread}"] if thread else []
    return " of ".join([*parts, f"threadgroup {group}"] if group else parts)


def _words(
    kind: str, record: FaultRecord, launched: Launched, space: str | None, place: Place | None, other: Place | None
) -> str:
    who = _who(record, launched)
    rest = _thread_position(record.other_thread, record.threadgroup, launched)
    if kind == "barrier-divergence":
        fate = f"waits at the one at line {other.line}" if other else "has ended"
        return f"threadgroup_barrier not reached by all: {who} waits here while thread {rest} {fate}"
    if kind == "simdgroup-divergence":
        op = _OPS[record.op] if 0 <= record.op < len(_OPS) else "a simdgroup operation"
        if rest is None:
            lane = record.other_thread % _SIMD_WIDTH
            return f"{op} needs lane {lane}, which this simdgroup doesn't have: {who} is here"
        return f"{op} needs a lane that takes no part: {who} is here, thread {rest} is not"
    if kind == "timeout":
        return f"stopped after {launched.timeout:g} s" + (f", {who} running" if who else "")
    if kind == "crash":
        number = record.op
        cause = signal.Signals(number).name if number > 0 else "the worker ended"
        where = (
            f" near {_buffer_name(record, launched, space)}+{record.offset} of {record.bound} bytes"
            if record.buffer != _NO_BUFFER
            else ""
        )
        if not where and number in (signal.SIGSEGV, signal.SIGBUS):
            where = (
                f" at address {record.offset:#x}, outside every buffer"
                if record.offset
                else " far outside every buffer"
            )
        return f"{cause}{where}" + (f", {who}" if who else "")
    return _out_of_bounds(record, _buffer_name(record, launched, space), who, kind.removeprefix("out-of-bounds-"))


def _out_of_bounds(record: FaultRecord, name: str, who: str, verb: str) -> str:
    """Words for what no checker saw: a broken guard gap (thread unknown), or a signal (size unknown)."""
    offset, bound = record.offset, record.bound
    side = f"{-offset} bytes before it begins" if offset < 0 else f"{offset - bound} bytes past its end"
    size = f"{record.size} bytes " if record.size else ""
    found = f"{who or 'a thread'} {verb}s {size}at {name}{offset:+}: {side}, it has {bound} bytes"
    if record.op == _GUESSED:
        found += "; far from every buffer, so this is a guess"
    return found if who else found + "; found after the run"
