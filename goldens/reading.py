"""From the bytes of a golden to its Traces, or to one GoldenError: nothing is taken on trust, and nothing is half-read.

The order is what keeps it safe. First the seal and what HDF5 itself doesn't check of its structure (integrity.py);
then, without reading a value, links, objects, types, filters and declared sizes; only then are values read, and
hashed. HDF5 opens the very bytes that were checked, from memory, so that the file can't change in between. A file
whose seal is broken is refused whatever it holds. It's parsed nevertheless, to say *which* dataset somebody changed:
what can still crash HDF5 then has been looked for, by flipping every bit of a golden, and is what `check_structure`
stops.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import h5py
import ml_dtypes
import numpy as np

from goldens.arrays import Array
from goldens.errors import GoldenError
from goldens.integrity import (
    broken_seal,
    case_hash,
    check_structure,
    check_version,
    damaged,
    dataset_hash,
    file_hash,
    one_line,
    parse_canonical,
    quote,
    sha256_of,
)
from goldens.trace import Trace, probe_dims

# How each dtype is stored. HDF5 has no bfloat16 (its bits are stored as uint16), and h5py's bool is an enumeration.
STORAGE: dict[str, str] = {
    "bfloat16": "<u2",
    "bool": "|u1",
    "float16": "<f2",
    "float32": "<f4",
    "float64": "<f8",
    "int32": "<i4",
    "int64": "<i8",
    "uint8": "|u1",
    "uint16": "<u2",
    "uint32": "<u4",
}
TOKENS = "tokens"
FILE_ATTRIBUTES = frozenset({"schema", "schema_version", "content_hash", "cases"})
CASE_ATTRIBUTES = frozenset({"probes", "provenance", "provenance_hash", "content_hash"})
DATASET_ATTRIBUTES = frozenset({"dtype", "sha256"})
FILTERS = (h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_FLETCHER32)

# Of all the values of a file together. A golden lives in a repository and is read whole into memory; deflate makes up
# to 1,032 bytes of one, so that a file of 4 MB could ask for 4 GB.
MAX_BYTES = 2 << 30
MAX_TEXT = 16 << 20  # one attribute; provenance with the hash of each of 100,000 tensors takes about 12 MiB


@dataclass(frozen=True, kw_only=True)
class Contents:
    """A golden's content hash and its Traces by case, all checked."""

    content_hash: str
    cases: dict[str, Trace]


def read(data: bytes) -> Contents:
    """The Contents of a golden's bytes; raises GoldenError (without the file's name) for anything doubtful."""
    broken = broken_seal(data)
    if broken is None:
        return parse(data)
    try:
        parse(data)
    except GoldenError as error:
        if error.__cause__ is None:  # a check of assay's own failed, and names what was changed
            raise
    raise damaged(broken)


def parse(data: bytes) -> Contents:
    """The Contents of HDF5 bytes, whatever their seal; raises GoldenError, with a cause where HDF5 was what failed."""
    try:
        check_structure(data)
        with h5py.File(h5py.h5f.open_file_image(data)) as file:
            return _read_file(file)
    except GoldenError:
        raise
    except Exception as error:  # h5py raises nearly every built-in exception for damaged files
        raise damaged(f"can't be read by HDF5 ({one_line(error)})") from error


def _read_file(file: Any) -> Contents:
    about = _attributes(file, "the file", FILE_ATTRIBUTES)
    names = _names(about["cases"], "the list of cases")
    seen: set[int] = set()
    _check_children(file, "the file", names, h5py.h5o.TYPE_GROUP, seen)
    listed: dict[str, dict[str, Any]] = {}
    declared = 0
    for case in names:
        attributes = _attributes(file[case], f"case {quote(case)}", CASE_ATTRIBUTES)
        listed[case] = attributes
        probes = _names(attributes["probes"], f"the list of probes of case {quote(case)}")
        _check_children(file[case], f"case {quote(case)}", (TOKENS, *probes), h5py.h5o.TYPE_DATASET, seen)
        for name in (TOKENS, *probes):
            declared += _check_dataset(file[case][name], quote(f"{case}/{name}"))
    if declared > MAX_BYTES:
        raise damaged(f"declares {declared} bytes of values, more than the {MAX_BYTES} that a golden may hold")
    read = {case: _read_case(file[case], case, attributes) for case, attributes in listed.items()}
    content_hash = file_hash([found for found, _ in read.values()])
    if about["content_hash"] != content_hash:
        raise damaged("doesn't match its content hash: its list of cases was changed")
    return Contents(content_hash=content_hash, cases={case: trace for case, (_, trace) in read.items()})


def _read_case(group: Any, case: str, attributes: dict[str, Any]) -> tuple[str, Trace]:
    provenance = _provenance(case, attributes)
    names = _names(attributes["probes"], "the list of probes")
    tokens, tokens_hash = _read_dataset(group[TOKENS], quote(f"{case}/{TOKENS}"), ("T",))
    if tokens.dtype != np.int32:
        raise damaged(f"dataset {quote(f'{case}/{TOKENS}')} is {tokens.dtype}, not int32")
    probes: dict[str, Array] = {}
    hashes: dict[str, str] = {}
    for name in names:
        where = quote(f"{case}/{name}")
        probes[name], hashes[name] = _read_dataset(group[name], where, probe_dims(name, group[name].ndim))
        if len(probes[name]) != len(tokens):
            raise damaged(f"dataset {where} has {len(probes[name])} tokens, its case has {len(tokens)}")
    found = case_hash(case, tokens_hash, hashes, provenance)
    if attributes["content_hash"] != found:
        raise damaged(f"case {quote(case)} doesn't match its content hash: its probes or provenance were changed")
    return found, Trace(case=case, tokens=tokens, probes=probes, provenance=provenance)


def _provenance(case: str, attributes: dict[str, Any]) -> dict[str, Any]:
    try:
        provenance = parse_canonical(attributes["provenance"])
        if not isinstance(provenance, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise damaged(f"the provenance of case {quote(case)} isn't valid JSON ({one_line(error)})") from None
    if attributes["provenance_hash"] != sha256_of(provenance):
        raise damaged(f"the provenance of case {quote(case)} doesn't match its hash: it was changed")
    return provenance


def _names(text: str, what: str) -> tuple[str, ...]:
    try:
        names = parse_canonical(text)
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise damaged(f"{what} isn't a JSON list of names")
    return tuple(names)


def _attributes(holder: Any, where: str, names: Collection[str]) -> dict[str, Any]:
    """The attributes of a group or dataset, which must be exactly `names`: text, and one integer, schema_version."""
    found = set(holder.attrs)
    if "schema" in names and {"schema", "schema_version"} <= found:  # before what a newer schema may have more of
        check_version(_attribute(holder, where, "schema"), _attribute(holder, where, "schema_version"))
    for name in sorted(found.symmetric_difference(names)):
        raise damaged(f"{where} {'lacks' if name in names else 'has an unknown'} attribute {quote(name)}")
    return {name: _attribute(holder, where, name) for name in names}


def _attribute(holder: Any, where: str, name: str) -> Any:
    attribute = h5py.h5a.open(holder.id, name.encode())
    kind, expected = attribute.get_type(), h5py.h5t.STRING if name != "schema_version" else h5py.h5t.INTEGER
    if attribute.shape != () or kind.get_class() != expected or kind.get_size() > MAX_TEXT:
        raise damaged(f"attribute {name!r} of {where} isn't one {'text' if name != 'schema_version' else 'integer'}")
    value = holder.attrs[name]
    if expected == h5py.h5t.INTEGER:
        return int(value)
    try:
        return value.decode() if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError:
        raise damaged(f"attribute {name!r} of {where} isn't UTF-8") from None


def _check_children(group: Any, where: str, expected: tuple[str, ...], kind: int, seen: set[int]) -> None:
    """A group must hold `expected`, in that order: plain objects of one kind, each reached by one hard link only."""
    names = tuple(_links(group, where))
    missing, extra = set(expected) - set(names), set(names) - set(expected)
    for name in sorted(missing | extra):
        raise damaged(f"{where} {'lacks' if name in missing else 'holds an unexpected'} {quote(name)}")
    if names != expected:
        raise damaged(f"{where} doesn't hold its members in the recorded order")
    for name in names:
        info = h5py.h5o.get_info(group.id, name.encode())
        if info.type != kind:
            raise damaged(f"{quote(name)} in {where} isn't a {'group' if kind == h5py.h5o.TYPE_GROUP else 'dataset'}")
        if info.rc != 1 or info.addr in seen:
            raise damaged(f"{quote(name)} in {where} is a second hard link to another object")
        seen.add(info.addr)


def _links(group: Any, where: str) -> Iterator[str]:
    links = group.id.links
    found: list[bytes] = []
    links.iterate(found.append, idx_type=h5py.h5.INDEX_CRT_ORDER)
    for name in found:
        if links.get_info(name).type != h5py.h5l.TYPE_HARD:  # asked of the link: nothing is followed
            raise damaged(f"{quote(name.decode(errors='replace'))} in {where} is a soft or external link")
        yield name.decode()


def _check_dataset(dataset: Any, where: str) -> int:
    """Refuse a dataset by what it declares; returns the bytes it would take in memory."""
    about = _attributes_of_dataset(dataset, where)
    kind, layout = dataset.id.get_type(), dataset.id.get_create_plist()
    if about["dtype"] not in STORAGE:
        raise damaged(f"dataset {where} has dtype {quote(about['dtype'])}, not one of {', '.join(STORAGE)}")
    if not kind.equal(h5py.h5t.py_create(np.dtype(STORAGE[about["dtype"]]))):
        raise damaged(f"dataset {where} isn't stored as plain numbers of its dtype, {about['dtype']}")
    if layout.get_layout() != h5py.h5d.CHUNKED or layout.get_external_count():
        raise damaged(f"dataset {where} is virtual, external or not chunked")
    if tuple(layout.get_filter(i)[0] for i in range(layout.get_nfilters())) != FILTERS:
        raise damaged(f"dataset {where} isn't stored with shuffle, deflate and fletcher32")
    shape, chunks = dataset.shape, layout.get_chunk()
    if not shape or dataset.maxshape != shape or any(not 0 < c <= n for c, n in zip(chunks, shape, strict=True)):
        raise damaged(f"dataset {where} has shape {shape} in chunks of {chunks}")
    return int(math.prod(shape) * kind.get_size())  # not dataset.size, which overflows


def _attributes_of_dataset(dataset: Any, where: str) -> dict[str, Any]:
    label = "DIMENSION_LABELS"  # HDF5 Dimension Scale Specification, 3.3: one variable-length text an axis
    if label not in dataset.attrs:
        raise damaged(f"dataset {where} has no dimension labels")
    attribute = h5py.h5a.open(dataset.id, label.encode())
    if attribute.get_type().get_class() != h5py.h5t.STRING or attribute.shape != (dataset.ndim,):
        raise damaged(f"dataset {where} has dimension labels of another form")
    found = set(dataset.attrs) - {label}
    for name in sorted(found.symmetric_difference(DATASET_ATTRIBUTES)):
        raise damaged(
            f"dataset {where} {'lacks' if name in DATASET_ATTRIBUTES else 'has an unknown'} attribute {quote(name)}"
        )
    return {name: _attribute(dataset, f"dataset {where}", name) for name in DATASET_ATTRIBUTES}


def _read_dataset(dataset: Any, where: str, expected_dims: tuple[str, ...]) -> tuple[Array, str]:
    # Not dataset.dims[i].label: H5DSget_label (HDF5 2.0) frees what it never set when the labels are damaged.
    dims = tuple(str(label) for label in dataset.attrs["DIMENSION_LABELS"])
    if dims != expected_dims:
        raise damaged(f"dataset {where} has dimensions {quote(dims)}, not {expected_dims}")
    dtype: str = _attribute(dataset, f"dataset {where}", "dtype")
    try:
        stored: Array = dataset[()]
    except Exception as error:
        raise damaged(f"dataset {where} can't be read by HDF5 ({one_line(error)})") from None
    found = dataset_hash(dtype, dims, stored)
    if _attribute(dataset, f"dataset {where}", "sha256") != found:
        raise damaged(f"dataset {where} doesn't match its sha256: its values were changed")
    if dtype == "bfloat16":
        return stored.view(ml_dtypes.bfloat16), found
    if dtype == "bool":
        if stored.max(initial=0) > 1:
            raise damaged(f"dataset {where} is bool, but holds numbers above 1")
        return stored.view(np.bool_), found
    return stored.astype(stored.dtype.newbyteorder("="), copy=False), found
