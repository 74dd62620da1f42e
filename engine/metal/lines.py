"""From addresses in a compiled kernel to lines of the user's source.

The compiler writes line tables and, for each inlined call, where it was called from. The place that is shown is the
innermost one outside the executor's own headers. On Linux the module's DWARF is read with pyelftools; on macOS `atos`
follows the module's debug map to its object file, and without `atos` faults have no line.
"""

from __future__ import annotations

import bisect
import functools
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HOST = str(Path(__file__).parent / "host")
_IN_HOST = "/".join(Path(__file__).parts[-3:-1]) + "/host/"  # the compiler shortens paths below its working folder


# The optimiser makes one access of two in the branches of an `if`, which then has no line: it stands a few instructions
# behind one that has.
_NEAR = 48
# Bytes of code at the beginning of a function that are not the user's: room for its frame, its arguments.
_PROLOGUE = 1024


@dataclass(frozen=True)
class Place:
    file: str
    line: int


class _Table:
    """Line rows and inlined calls of one module."""

    def __init__(self, module: Path) -> None:
        self.rows: list[tuple[int, int, Place]] = []
        self.calls: list[tuple[int, int, Place]] = []
        with module.open("rb") as stream:
            self._read(stream)
        self.rows.sort(key=lambda row: row[0])
        self._starts = [row[0] for row in self.rows]

    def _read(self, stream: Any) -> None:
        from elftools.elf.elffile import ELFFile

        elf = ELFFile(stream)
        if not elf.has_dwarf_info():
            return
        dwarf = elf.get_dwarf_info()
        for unit in dwarf.iter_CUs():
            program = dwarf.line_program_for_CU(unit)
            if program is None:
                continue
            names = _file_names(program, unit)
            previous: Any = None
            for entry in program.get_entries():
                state = entry.state
                if state is None:
                    continue
                if previous is not None and state.address > previous.address and previous.line:
                    place = Place(names(previous.file), previous.line)
                    self.rows.append((previous.address, state.address, place))
                previous = None if state.end_sequence else state
            self._add_calls(dwarf, unit, names)

    def _add_calls(self, dwarf: Any, unit: Any, names: Any) -> None:
        ranges = dwarf.range_lists()
        for die in unit.iter_DIEs():
            if die.tag != "DW_TAG_inlined_subroutine" or "DW_AT_call_line" not in die.attributes:
                continue
            place = Place(names(die.attributes["DW_AT_call_file"].value), die.attributes["DW_AT_call_line"].value)
            for low, high in _spans(die, unit, ranges):
                self.calls.append((low, high, place))

    def places(self, address: int) -> list[Place]:
        """The line at an address, innermost first, then the calls that it was inlined through."""
        at = bisect.bisect_right(self._starts, address) - 1
        if at < 0 or address >= self.rows[at][1] + _NEAR:
            return []
        calls = sorted((c for c in self.calls if c[0] <= address < c[1]), key=lambda call: call[1] - call[0])
        return [self.rows[at][2], *(call[2] for call in calls)]


def _file_names(program: Any, unit: Any) -> Any:
    header = program.header
    first = 0 if header.version >= 5 else 1
    directories = [_text(d) for d in header.include_directory]

    def name(index: int) -> str:
        if not 0 <= index - first < len(header.file_entry):
            return "?"
        entry = header.file_entry[index - first]
        text, folder = _text(entry.name), entry.dir_index
        if header.version < 5:
            folder -= 1
        return text if text.startswith("/") or not 0 < folder < len(directories) else f"{directories[folder]}/{text}"

    return name


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _spans(die: Any, unit: Any, ranges: Any) -> Iterable[tuple[int, int]]:
    attributes = die.attributes
    if "DW_AT_low_pc" in attributes and "DW_AT_high_pc" in attributes:
        low, high = attributes["DW_AT_low_pc"].value, attributes["DW_AT_high_pc"]
        return [(low, high.value if high.form == "DW_FORM_addr" else low + high.value)]
    if "DW_AT_ranges" not in attributes or ranges is None:
        return []
    top = unit.get_top_DIE().attributes
    base = top["DW_AT_low_pc"].value if "DW_AT_low_pc" in top else 0
    offset = attributes["DW_AT_ranges"]
    listed = ranges.get_range_list_at_offset(offset.value, cu=unit)
    found = []
    for entry in listed:
        if hasattr(entry, "begin_offset"):
            absolute = getattr(entry, "is_absolute", False)
            found.append((entry.begin_offset + (0 if absolute else base), entry.end_offset + (0 if absolute else base)))
        elif hasattr(entry, "base_address"):
            base = entry.base_address
    return found


@functools.lru_cache(maxsize=32)
def _table(module: Path) -> _Table:
    return _Table(module)


def user_place(module: Path, addresses: Iterable[int]) -> Place | None:
    """The first place of a list of return addresses (innermost first) that lies in the user's source, if any."""
    for address in addresses:
        for place in _places(module, address - 1):
            if _is_users(place):
                return place
    return None


def place_behind(module: Path, address: int) -> Place | None:
    """The first place in the user's source behind an address: where a function without room for its frame begins."""
    if sys.platform == "darwin":
        return None
    table = _table(module)
    behind = (place for start, _, place in table.rows if address <= start < address + _PROLOGUE)
    return next((place for place in behind if _is_users(place)), None)


def _is_users(place: Place) -> bool:
    foreign = place.file.startswith((HOST, _IN_HOST, "runtime.h", "kernel.", "<"))
    return not foreign and "/making-" not in place.file and "/lib/libcxx/" not in place.file and place.line > 0


def _places(module: Path, address: int) -> list[Place]:
    if sys.platform == "darwin":
        return _atos(module, address)
    return _table(module).places(address)


def _atos(module: Path, address: int) -> list[Place]:
    try:
        done = subprocess.run(
            ["atos", "-i", "-fullPath", "-o", str(module), hex(address)], capture_output=True, text=True, check=False
        )
    except OSError:
        return []
    places = []
    for line in done.stdout.splitlines():
        if line.endswith(")") and ":" in line:
            file, _, number = line[line.rindex("(") + 1 : -1].rpartition(":")
            if number.isdigit():
                places.append(Place(file, int(number)))
    return places
