"""What makes a golden trustworthy: content hashes over values, and a seal over the file's bytes.

Content hashes (per dataset, case and file) say what a golden holds. HDF5's bytes differ between library versions, so
these hash names, shapes, labels and little-endian values, and equal Traces have equal hashes on any machine. The seal
is a text header in the file's HDF5 user block, the 512 bytes that HDF5 leaves to the application: schema, length and
SHA-256 of the bytes. It is checked before the HDF5 C library sees a byte, because a parser of damaged binary
structures can crash, hang or allocate without end, and no exception handler helps then. Neither is a signature:
whoever can rewrite a file can recompute both. They catch accidents and careless edits.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from goldens.arrays import Array
from goldens.errors import GoldenError

SCHEMA = "assay-golden"
SCHEMA_VERSION = 1

USER_BLOCK = 512  # the smallest that HDF5 allows
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"  # HDF5 File Format Specification, II.A
RESTORE = "restore it from version control, or rebuild it with `assay golden regenerate`"
UPDATE = "update assay"

# When and how a golden was made, rather than what it holds: runs that agree in all else have the same content hash.
VOLATILE = frozenset({"command", "date", "device_info", "versions"})

_HEADER = re.compile(rb"(assay-golden (\d{1,9})\nbytes (\d{1,18})\n)sha256 ([0-9a-f]{64})\n\0*")


def damaged(reason: str, remedy: str = RESTORE) -> GoldenError:
    """The error for a file that is refused for `reason`, with the way out."""
    return GoldenError(f"{reason}; {remedy}")


def quote(value: object) -> str:
    """`value` for a message: its repr on one line, at most 80 characters of it."""
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"


def one_line(error: BaseException) -> str:
    """An exception of any library as one short line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:159] + "…"


def canonical(value: Any) -> str:
    """The one JSON text of `value`: sorted keys, ASCII, no spaces; raises ValueError or TypeError for other values."""
    return json.dumps(value, sort_keys=True, ensure_ascii=True, allow_nan=False, separators=(",", ":"))


def parse_canonical(text: str) -> Any:
    """The value of canonical JSON `text`; raises ValueError for any other text, NaN and repeated keys included."""
    value = json.loads(text)
    if canonical(value) != text:
        raise ValueError("not in assay's canonical form")
    return value


def sha256_of(value: Any) -> str:
    """SHA-256 (hex) of a JSON-able value's canonical text."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def dataset_hash(dtype: str, dims: Sequence[str], stored: Array) -> str:
    """SHA-256 (hex) over dtype name, shape, dims and the little-endian C-order bytes of `stored` (any shape)."""
    digest = hashlib.sha256(canonical([dtype, list(stored.shape), list(dims)]).encode() + b"\n")
    digest.update(np.ascontiguousarray(stored).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def case_hash(case: str, tokens: str, probes: Mapping[str, str], provenance: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of a case, from the hashes of its tokens and its probes in order; without VOLATILE provenance."""
    lasting = {key: value for key, value in provenance.items() if key not in VOLATILE}
    return sha256_of([case, tokens, [list(item) for item in probes.items()], lasting])


def file_hash(cases: Sequence[str]) -> str:
    """SHA-256 (hex) of a whole golden from the hashes of its cases, in order: its content hash."""
    return sha256_of([SCHEMA, SCHEMA_VERSION, list(cases)])


def seal(image: bytes) -> bytes:
    """The HDF5 file `image` with its user block filled in; the rest of the bytes stays as it is."""
    head = f"{SCHEMA} {SCHEMA_VERSION}\nbytes {len(image)}\n".encode()
    body = memoryview(image)[USER_BLOCK:]
    line = f"sha256 {_digest(head, body)}\n".encode()
    return b"".join(((head + line).ljust(USER_BLOCK, b"\0"), body))


def broken_seal(data: bytes) -> str | None:
    """Why a file's bytes aren't those that were sealed, or None; raises GoldenError for what was never a golden."""
    head = _HEADER.fullmatch(data[:USER_BLOCK])
    if head is None or len(data) <= USER_BLOCK:
        return _without_header(data)
    if len(data) < int(head[3]):
        return f"is truncated: {len(data)} of {int(head[3])} bytes are left"
    if len(data) > int(head[3]):
        return f"has changed since it was written: {len(data)} bytes where {int(head[3])} were written"
    if _digest(head[1], memoryview(data)[USER_BLOCK:]) != head[4].decode():
        return "is corrupted: its bytes don't match their sha256"
    check_version(SCHEMA, int(head[2]))  # believed only now: a damaged header must not say "update assay"
    return None


def check_version(schema: str, version: int) -> None:
    """Raise GoldenError unless a file's schema and version are the ones this code reads and writes."""
    if schema != SCHEMA:
        raise damaged(f"has schema {quote(schema)}, not {SCHEMA!r}")
    if version > SCHEMA_VERSION:
        raise damaged(f"has schema version {version}, newer than {SCHEMA_VERSION}", UPDATE)
    if version != SCHEMA_VERSION:
        raise damaged(
            f"has schema version {version}, this assay reads {SCHEMA_VERSION}",
            "rebuild it with `assay golden regenerate`",
        )


def check_structure(data: bytes) -> None:
    """Raise ValueError for damage that HDF5 would walk into, unlike all that it finds by its own checksums.

    The format that goldens are written in has a checksum on every structure except global heaps (HDF5 File Format
    Specification, III.E), which hold the dimension labels: there a wrong length sends HDF5 2.0 into an endless loop.
    Older superblocks lead to the structures of old, without checksums.
    """
    if data[USER_BLOCK : USER_BLOCK + 9] != HDF5_SIGNATURE + b"\3":
        raise ValueError("no superblock of version 3")
    for heap in re.finditer(rb"GCOL\x01...", data, re.DOTALL):
        start, end = heap.end() + 8, heap.start() + int.from_bytes(data[heap.end() : heap.end() + 8], "little")
        if end > len(data):
            raise ValueError("a global heap reaches beyond the end")
        while start + 16 <= end:
            index, length = (int.from_bytes(data[start + at : start + at + n], "little") for at, n in ((0, 2), (8, 8)))
            start += (
                16 + -(-length // 8) * 8 if index else length
            )  # object 0 is the free space: its length has its header
            if (not index and length < 16) or start > end:
                raise ValueError("a global heap's lengths don't add up")


def _without_header(data: bytes) -> str:
    if not data:
        raise damaged("is empty")
    if len(data) <= USER_BLOCK and (data.startswith(b"assay-golden") or b"assay-golden".startswith(data)):
        return f"is truncated: {len(data)} bytes are left"
    if data[USER_BLOCK:].startswith(HDF5_SIGNATURE):
        return "is corrupted: its header isn't the one that was written"
    if data.startswith(HDF5_SIGNATURE):
        raise damaged("is an HDF5 file, but not a golden (or another tool rewrote it): assay's header is missing")
    raise damaged("isn't an HDF5 file")


def _digest(head: bytes, body: memoryview) -> str:
    digest = hashlib.sha256(head)
    digest.update(body)
    return digest.hexdigest()
