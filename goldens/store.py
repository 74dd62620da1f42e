"""The golden store: Traces in one HDF5 file that is written whole, checked whole, and opens in any HDF5 viewer.

    /                     schema, schema_version, content_hash, cases (the cases' names in order, JSON)
    /CASE                 probes (names in order, JSON), provenance (JSON), provenance_hash, content_hash
    /CASE/tokens          int32 [T]
    /CASE/PROBE           [T, …]; dtype, sha256, and HDF5 dimension labels

What the hashes cover is in integrity.py, what is refused in reading.py, how a file is replaced in files.py. A golden
is opened by reading it all: it is small, and a value that was never checked can't be handed out.
"""

from __future__ import annotations

import io
import re
import stat
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from goldens import files
from goldens.arrays import Array
from goldens.errors import GoldenError
from goldens.integrity import (
    RESTORE,
    SCHEMA,
    SCHEMA_VERSION,
    USER_BLOCK,
    canonical,
    case_hash,
    dataset_hash,
    file_hash,
    one_line,
    parse_canonical,
    quote,
    seal,
    sha256_of,
)
from goldens.reading import MAX_BYTES, STORAGE, TOKENS, read
from goldens.trace import Trace

__all__ = ["SCHEMA", "SCHEMA_VERSION", "Golden", "encode", "open", "write"]

# Measured on float32 activations (128 tokens, widths 256 to 4096): levels 1, 4, 6 and 9 leave 87.0, 86.4, 86.1 and
# 86.0 % of the bytes at 65, 54, 27 and 12 MB/s; without shuffle, level 4 leaves 93.3 %. bfloat16: 72.4 % with, 80.3 %
# without. float32 holding bfloat16 values: 36.5 % with, 49.5 % without. Chunks of 64 KiB to 1 MiB differ by under 1 %.
GZIP_LEVEL = 4
CHUNK_BYTES = 256 << 10

# HDF5 1.10's format: checksummed metadata (superblock 3, object headers 2), readable by every viewer since 2016.
LIBVER = ("v110", "v110")

_NAME = re.compile(r"[^/\x00]+")


@dataclass(frozen=True, kw_only=True)
class Golden:
    """A golden that was read and checked whole; nothing of the file stays open. `cases` keeps the stored order."""

    path: Path
    content_hash: str
    cases: Mapping[str, Trace]

    @property
    def trace(self) -> Trace:
        """The Trace of the first (or only) case."""
        return next(iter(self.cases.values()))

    @property
    def provenance(self) -> dict[str, Any]:
        """The provenance of the first (or only) case."""
        return dict(self.trace.provenance)

    def case(self, name: str) -> Trace:
        """The Trace of case `name`; raises GoldenError if there is none."""
        if name not in self.cases:
            raise GoldenError(f"{self.path}: has no case {quote(name)}; it holds {', '.join(map(quote, self.cases))}")
        return self.cases[name]

    def __enter__(self) -> Golden:
        return self

    def __exit__(self, *_: object) -> None:
        return None


def open(path: str | Path) -> Golden:
    """The Golden stored at `path`, usable in `with`; raises GoldenError, in one line, unless every check passes."""
    if not isinstance(path, str | Path):
        raise GoldenError(f"a golden is opened by its path; this is of type {type(path).__name__}")
    path = Path(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise GoldenError(f"{path}: isn't a file")
        if status.st_size > MAX_BYTES + MAX_BYTES // 8:  # deflate adds at most a few bytes to what it can't compress
            raise GoldenError(f"{path}: has {status.st_size} bytes, more than a golden may; {RESTORE}")
        data = path.read_bytes()
    except FileNotFoundError:
        raise GoldenError(f"{path}: doesn't exist; create it with `assay golden regenerate`") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        if isinstance(error, GoldenError):
            raise
        raise GoldenError(f"{path}: can't be read ({one_line(error)})") from error
    try:
        contents = read(data)
    except GoldenError as error:
        raise GoldenError(f"{path}: {error}") from error.__cause__
    return Golden(path=path, content_hash=contents.content_hash, cases=contents.cases)


def write(path: str | Path, traces: Sequence[Trace]) -> str:
    """Store `traces`, one a case, at `path`, all or nothing; returns the content hash.

    Raises GoldenError when another writer holds the lock, and for what can't be stored: no traces, tokens or probes, a
    name twice or with "/", a dtype not in STORAGE, a probe whose first axis isn't the tokens'.
    """
    path = Path(path)
    with files.lock(path):
        data, content_hash = encode(path, traces)
        files.replace(path, data)
    return content_hash


def encode(path: Path, traces: Sequence[Trace]) -> tuple[bytes, str]:
    """The bytes of a golden of `traces`, read back and found whole, and its content hash; `path` is for messages."""
    try:
        _check_traces(traces)
        image = io.BytesIO()
        with h5py.File(image, "w", libver=LIBVER, userblock_size=USER_BLOCK, track_order=True) as file:
            content_hash = _write_file(file, traces)
        data = seal(image.getvalue())
        if read(data).content_hash != content_hash:
            raise GoldenError("HDF5 didn't store what it was given")
    except GoldenError as error:
        raise GoldenError(f"{path}: can't be written: {error}") from None
    except Exception as error:  # h5py raises nearly every built-in exception
        raise GoldenError(f"{path}: can't be written: HDF5 refused it ({one_line(error)})") from error
    return data, content_hash


def _check_traces(traces: Sequence[Trace]) -> None:
    if not traces:
        raise GoldenError("there are no traces")
    for case, count in Counter(trace.case for trace in traces).items():
        _check_name(case, "case")
        if count > 1:
            raise GoldenError(f"case {quote(case)} occurs {count} times")
    for trace in traces:
        tokens = np.asarray(trace.tokens)
        limits = np.iinfo(np.int32)
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or not len(tokens):
            raise GoldenError(f"case {quote(trace.case)} has no tokens, or not a row of integers")
        if tokens.min() < limits.min or tokens.max() > limits.max:
            raise GoldenError(f"case {quote(trace.case)} has tokens that aren't int32")
        if not trace.probes:
            raise GoldenError(f"case {quote(trace.case)} has no probes")
        for name, probe in trace.probes.items():
            _check_probe(name, np.asarray(probe), len(tokens), f"probe {quote(f'{trace.case}/{name}')}")
    if sum(np.asarray(probe).nbytes for trace in traces for probe in trace.probes.values()) > MAX_BYTES:
        raise GoldenError(f"there are more than {MAX_BYTES} bytes of values; use fewer tokens or probes")


def _check_name(name: object, what: str) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name == "." or name == TOKENS:
        raise GoldenError(f"{what} name {quote(name)} is empty, {TOKENS!r}, '.', or holds '/' or NUL")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise GoldenError(f"{what} name {quote(name)} isn't valid Unicode") from None


def _check_probe(name: object, probe: Array, tokens: int, where: str) -> None:
    _check_name(name, "probe")
    if probe.dtype.name not in STORAGE:
        raise GoldenError(f"{where} has dtype {probe.dtype}, which isn't stored; use one of {', '.join(STORAGE)}")
    if probe.ndim == 0 or probe.size == 0 or len(probe) != tokens:
        raise GoldenError(f"{where} has shape {probe.shape}; its first axis must be the {tokens} tokens, none empty")


def _write_file(file: Any, traces: Sequence[Trace]) -> str:
    hashes = [_write_case(file.create_group(trace.case, track_order=True), trace) for trace in traces]
    content_hash = file_hash(hashes)
    file.attrs["schema_version"] = SCHEMA_VERSION
    texts = {"schema": SCHEMA, "content_hash": content_hash, "cases": canonical([trace.case for trace in traces])}
    _write_texts(file, texts)
    return content_hash


def _write_case(group: Any, trace: Trace) -> str:
    try:
        provenance = parse_canonical(canonical(dict(trace.provenance)))
    except (TypeError, ValueError, RecursionError) as error:
        raise GoldenError(f"the provenance of case {quote(trace.case)} isn't JSON ({one_line(error)})") from None
    tokens = _write_dataset(group, TOKENS, np.asarray(trace.tokens).astype(np.int32), ("T",))
    probes = {
        name: _write_dataset(group, name, np.asarray(probe), trace.dims(name)) for name, probe in trace.probes.items()
    }
    found = case_hash(trace.case, tokens, probes, provenance)
    _write_texts(
        group,
        {
            "probes": canonical(list(probes)),
            "provenance": canonical(provenance),
            "provenance_hash": sha256_of(provenance),
            "content_hash": found,
        },
    )
    return found


def _write_dataset(group: Any, name: str, values: Array, dims: tuple[str, ...]) -> str:
    dtype = values.dtype.name
    layout = np.dtype(STORAGE[dtype])
    bits = dtype in ("bfloat16", "bool")  # dtypes whose bits are stored as plain unsigned integers
    stored = np.ascontiguousarray(values).view(layout) if bits else values.astype(layout, copy=False)
    dataset = group.create_dataset(
        name,
        data=stored,
        chunks=_chunks(stored.shape, layout.itemsize),
        shuffle=True,
        compression="gzip",
        compression_opts=GZIP_LEVEL,
        fletcher32=True,
    )
    for axis, label in zip(dataset.dims, dims, strict=True):
        axis.label = label
    found = dataset_hash(dtype, dims, stored)
    _write_texts(dataset, {"dtype": dtype, "sha256": found})
    return found


def _chunks(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Chunks of at most CHUNK_BYTES, split along the first axes, in parts as equal as can be: HDF5 pads the last."""
    chunks = list(shape)
    for axis, length in enumerate(shape):
        rest = itemsize * int(np.prod(chunks[axis + 1 :], dtype=np.int64))
        parts = -(-length // max(1, CHUNK_BYTES // rest))
        chunks[axis] = -(-length // parts)
    return tuple(chunks)


def _write_texts(holder: Any, texts: Mapping[str, str]) -> None:
    """Attributes as text of fixed length: HDF5 keeps that in checksummed metadata, other text in an unchecked heap."""
    for name, text in texts.items():
        data = text.encode()
        holder.attrs.create(name, np.array(data, dtype=h5py.string_dtype("utf-8", len(data))))
