"""Every way in which a golden can be stale, damaged or dangerous is planted here, and must be refused in one line.

An edit is made with h5py in a good file and tried twice: as it is, with the seal of the bytes broken, and sealed anew,
so that the checks behind the seal have to find it. Long because it is one table of edits.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from goldens import integrity, reading, store
from goldens.errors import GoldenError
from goldens.integrity import RESTORE, dataset_hash, sha256_of
from goldens.trace import Trace

T = 5
WAYS_OUT = (RESTORE, integrity.UPDATE, "; rebuild it with `assay golden regenerate`", "; create it with `assay golden")


def trace(case: str = "c") -> Trace:
    rng = np.random.default_rng(1)
    probes = {
        "embedding": rng.standard_normal((T, 8)).astype(np.float32),
        "residual": rng.standard_normal((T, 8)).astype(np.float32),
        "experts": rng.integers(0, 16, (T, 2)).astype(np.int32),
        "flag": np.arange(T) % 2 == 0,
    }
    return Trace(case=case, tokens=np.arange(T, dtype=np.int32), probes=probes, provenance={"seed": 1, "date": "d"})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    store.write(tmp_path / "g.h5", [trace(), trace("second")])
    return tmp_path / "g.h5"


def refusal(path: Path) -> str:
    """The message with which `path` is refused: one line with its name, what is wrong and the way out."""
    with pytest.raises(GoldenError) as caught:
        store.open(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 600
    assert message.endswith(WAYS_OUT) or any(way in message for way in WAYS_OUT), message
    return message


def retext(holder: Any, name: str, text: str) -> None:
    holder.attrs[name] = np.bytes_(text)


def relabel(dataset: Any, *labels: str) -> None:
    for axis, label in zip(dataset.dims, labels, strict=True):
        axis.label = label


FILTERED = {"shuffle": True, "compression": "gzip", "fletcher32": True, "chunks": True}
ZEROS = np.zeros(T, np.uint8)


def swap(file: Any, name: str, like: dict[str, Any] | None = None, **how: Any) -> None:
    """Put another dataset in the place of one, with its attributes (but for `like`) and its place in the order."""
    group, _, last = name.partition("/")
    attributes = {key: file[name].attrs[key] for key in ("dtype", "sha256")} | (like or {})
    later = list(file[group])[list(file[group]).index(last) + 1 :]
    del file[name]
    dataset = file.create_dataset(name, **how)
    for key, value in attributes.items():
        dataset.attrs[key] = value
    relabel(dataset, *("T", "axis1")[: dataset.ndim])
    for other in later:
        file.move(f"{group}/{other}", f"{group}/{other}_")
        file.move(f"{group}/{other}_", f"{group}/{other}")


def flag(**how: Any) -> Callable[[Any], None]:
    return lambda file: swap(file, "c/flag", **how)


def bomb(*shape: int) -> dict[str, Any]:
    """A dataset that declares much and stores nothing."""
    return FILTERED | {"shape": shape, "dtype": "u1", "chunks": (1, 1 << 16)}


def relink(link: Any) -> Callable[[Any], None]:
    def edit(file: Any) -> None:
        del file["c/flag"]
        file["c/flag"] = link(file) if callable(link) else link

    return edit


def virtual(file: Any) -> None:
    layout = h5py.VirtualLayout(shape=(T,), dtype="u1")
    layout[:] = h5py.VirtualSource("elsewhere.h5", "x", shape=(T,))
    kept = {key: file["c/flag"].attrs[key] for key in ("dtype", "sha256")}
    del file["c/flag"]
    dataset = file.create_virtual_dataset("c/flag", layout)
    dataset.attrs.update(kept)
    relabel(dataset, "T")


def reorder(file: Any) -> None:
    file.move("c/embedding", "c/x")
    file.move("c/x", "c/embedding")


def exchange(file: Any) -> None:
    for old, new in (("c/embedding", "c/x"), ("c/residual", "c/y"), ("c/experts", "c/z"), ("c/flag", "c/w")):
        file.move(old, new)
    for old, new in (("c/y", "c/embedding"), ("c/x", "c/residual"), ("c/z", "c/experts"), ("c/w", "c/flag")):
        file.move(old, new)


def change(name: str, rehash: bool = False) -> Callable[[Any], None]:
    def edit(file: Any) -> None:
        dataset = file[name]
        dataset[0] = dataset[0] + 2
        if rehash:
            labels = [axis.label for axis in dataset.dims]
            retext(dataset, "sha256", dataset_hash(dataset.attrs["dtype"].decode(), labels, dataset[()]))

    return edit


def reprovenance(text: str, rehash: bool = False) -> Callable[[Any], None]:
    def edit(file: Any) -> None:
        retext(file["c"], "provenance", text)
        if rehash:
            retext(file["c"], "provenance_hash", sha256_of(reading.parse_canonical(text)))

    return edit


def retoken(tokens: Any) -> Callable[[Any], None]:
    name = tokens.dtype.name
    like = {"dtype": name, "sha256": dataset_hash(name, ("T",), tokens)}
    return lambda file: swap(file, "c/tokens", like, data=tokens, **FILTERED)


EDITS: dict[str, tuple[Callable[[Any], Any], str]] = {
    # schema
    "another schema": (lambda f: retext(f, "schema", "other"), "has schema 'other', not 'assay-golden'"),
    "a newer version": (lambda f: f.attrs.modify("schema_version", 2), "version 2, newer than 1; update assay"),
    "an older version": (lambda f: f.attrs.modify("schema_version", 0), "version 0, this assay reads 1; rebuild it"),
    "a version that is text": (
        lambda f: retext(f, "schema_version", "1"),
        "'schema_version' of the file isn't one integer",
    ),
    "an attribute too many": (lambda f: f.attrs.update(x=1), "the file has an unknown attribute 'x'"),
    "an attribute too few": (lambda f: f.attrs.pop("cases"), "the file lacks attribute 'cases'"),
    "a case's attribute too many": (lambda f: f["c"].attrs.update(x=1), "case 'c' has an unknown attribute 'x'"),
    "a dataset's attribute too many": (
        lambda f: f["c/flag"].attrs.update(x=1),
        "'c/flag' has an unknown attribute 'x'",
    ),
    "a dataset without its hash": (lambda f: f["c/flag"].attrs.pop("sha256"), "'c/flag' lacks attribute 'sha256'"),
    "a number for a text": (lambda f: f["c"].attrs.update(provenance=3), "'provenance' of case 'c' isn't one text"),
    "many texts for one": (
        lambda f: f["c"].attrs.update(provenance=["{}"] * 2),
        "'provenance' of case 'c' isn't one text",
    ),
    "a reference for a text": (lambda f: f["c"].attrs.update(provenance=f["c"].ref), "isn't one text"),
    "a list of cases that isn't one": (lambda f: retext(f, "cases", '"c"'), "the list of cases isn't a JSON list"),
    "a list of probes that isn't JSON": (
        lambda f: retext(f["c"], "probes", "[}"),
        "probes of case 'c' isn't a JSON list",
    ),
    "a list of deep lists": (lambda f: retext(f["c"], "probes", "[" * 60000), "probes of case 'c' isn't a JSON list"),
    # members
    "a dataset too many": (lambda f: f.create_dataset("c/x", data=[1]), "case 'c' holds an unexpected 'x'"),
    "a dataset too few": (lambda f: f.pop("c/residual"), "case 'c' lacks 'residual'"),
    "no tokens": (lambda f: f.pop("c/tokens"), "case 'c' lacks 'tokens'"),
    "a group in a case": (lambda f: f.create_group("c/x"), "case 'c' holds an unexpected 'x'"),
    "a case too many": (lambda f: f.create_group("x"), "the file holds an unexpected 'x'"),
    "a case too few": (lambda f: f.pop("second"), "the file lacks 'second'"),
    "a dataset beside the cases": (lambda f: f.create_dataset("x", data=[1]), "the file holds an unexpected 'x'"),
    "a dataset for a case": (lambda f: (f.pop("second"), f.create_dataset("second", data=[1])), "isn't a group"),
    "a group for a dataset": (
        lambda f: (f.pop("c/flag"), f.create_group("c/flag")),
        "'flag' in case 'c' isn't a dataset",
    ),
    "another order of probes": (reorder, "case 'c' doesn't hold its members in the recorded order"),
    "another order of cases": (lambda f: (f.move("c", "x"), f.move("x", "c")), "the file doesn't hold its members in"),
    "two probes exchanged": (exchange, "case 'c' doesn't match its content hash"),
    # links
    "a soft link": (relink(h5py.SoftLink("/c/residual")), "'flag' in case 'c' is a soft or external link"),
    "a dangling soft link": (relink(h5py.SoftLink("/no")), "'flag' in case 'c' is a soft or external link"),
    "an external link": (relink(h5py.ExternalLink("x.h5", "/x")), "'flag' in case 'c' is a soft or external link"),
    "a soft link for a case": (
        lambda f: (f.pop("second"), f.update({"second": h5py.SoftLink("/c")})),
        "'second' in the file is a soft or external link",
    ),
    "two names of one dataset": (relink(lambda f: f["c/residual"]), "is a second hard link"),
    "two names of one case": (lambda f: (f.pop("second"), f.update({"second": f["c"]})), "is a second hard link"),
    "a case in itself": (relink(lambda f: f["c"]), "'c' in the file is a second hard link"),
    "a named type": (relink(np.dtype("f4")), "'flag' in case 'c' isn't a dataset"),
    # types and storage
    "a compound type": (
        flag(shape=(T,), dtype=np.dtype([("a", "f4"), ("b", "i4")])),
        "'c/flag' isn't stored as plain numbers",
    ),
    "texts of any length": (flag(shape=(T,), dtype=h5py.string_dtype()), "'c/flag' isn't stored as plain numbers"),
    "texts of fixed length": (flag(shape=(T,), dtype="S4"), "'c/flag' isn't stored as plain numbers"),
    "lists of any length": (
        flag(shape=(T,), dtype=h5py.vlen_dtype(np.int32)),
        "'c/flag' isn't stored as plain numbers",
    ),
    "object references": (flag(shape=(T,), dtype=h5py.ref_dtype), "'c/flag' isn't stored as plain numbers"),
    "region references": (flag(shape=(T,), dtype=h5py.regionref_dtype), "'c/flag' isn't stored as plain numbers"),
    "opaque bytes": (flag(shape=(T,), dtype="V3"), "'c/flag' isn't stored as plain numbers"),
    "an enumeration": (flag(shape=(T,), dtype=np.bool_), "'c/flag' isn't stored as plain numbers"),
    "an array type": (flag(shape=(T,), dtype=np.dtype(("u1", (2,)))), "'c/flag' isn't stored as plain numbers"),
    "big-endian numbers": (
        flag(data=np.zeros(T, ">u2"), like={"dtype": "uint16"}),
        "'c/flag' isn't stored as plain numbers of its dtype, uint16",
    ),
    "another width": (flag(data=np.zeros(T, "<u2")), "'c/flag' isn't stored as plain numbers of its dtype, bool"),
    "an unknown dtype": (lambda f: retext(f["c/flag"], "dtype", "object"), "'c/flag' has dtype 'object', not one of"),
    "one dtype for another": (lambda f: retext(f["c/flag"], "dtype", "uint8"), "'c/flag' doesn't match its sha256"),
    "a virtual dataset": (virtual, "'c/flag' is virtual, external or not chunked"),
    "values in another file": (
        flag(shape=(T,), dtype="u1", external=[("raw.bin", 0, T)]),
        "'c/flag' is virtual, external or not chunked",
    ),
    "values in one piece": (
        flag(data=ZEROS),
        "'c/flag' is virtual, external or not chunked",
    ),
    "another compression": (
        flag(data=ZEROS, **FILTERED | {"compression": "lzf"}),
        "'c/flag' isn't stored with shuffle",
    ),
    "no checksum": (flag(data=ZEROS, **FILTERED | {"fletcher32": False}), "'c/flag' isn't stored with shuffle"),
    "a shape that may grow": (flag(data=ZEROS, maxshape=(None,), **FILTERED), "'c/flag' has shape (5,)"),
    "no shape": (
        flag(data=np.uint8(1)),
        "'c/flag' has no dimension labels",
    ),
    "a decompression bomb": (
        flag(**bomb(T, 1 << 40)),
        "declares 5497558139",
    ),
    "a size beyond 64 bits": (flag(**bomb(1 << 31, 1 << 31)), "declares 461168601842738"),
    "two halves of a bomb": (
        lambda f: [swap(f, f"{case}/flag", **bomb(T, 300 << 20)) for case in ("c", "second")],
        "bytes of values, more than the 2147483648",
    ),
    "fewer tokens": (retoken(np.arange(T - 1, dtype=np.int32)), "dataset 'c/embedding' has 5 tokens, its case has 4"),
    "tokens that aren't integers": (
        retoken(np.arange(T, dtype=np.float32)),
        "dataset 'c/tokens' is float32, not int32",
    ),
    # labels
    "another label": (lambda f: relabel(f["c/embedding"], "T", "V"), "has dimensions ('T', 'V'), not ('T', 'D')"),
    "labels the wrong way": (lambda f: relabel(f["c/experts"], "K", "T"), "has dimensions ('K', 'T'), not ('T', 'K')"),
    "no label": (lambda f: f["c/flag"].attrs.pop("DIMENSION_LABELS"), "'c/flag' has no dimension labels"),
    "labels of another number": (
        lambda f: f["c/flag"].attrs.update(DIMENSION_LABELS=["T", "D"]),
        "'c/flag' has dimension labels of another form",
    ),
    # values
    "a value": (change("c/embedding"), "dataset 'c/embedding' doesn't match its sha256: its values were changed"),
    "a value of the second case": (change("second/experts"), "dataset 'second/experts' doesn't match its sha256"),
    "a token": (change("c/tokens"), "dataset 'c/tokens' doesn't match its sha256"),
    "a value and its hash": (change("c/embedding", rehash=True), "case 'c' doesn't match its content hash"),
    "a bool above 1, and its hash": (change("c/flag", rehash=True), "'c/flag' is bool, but holds numbers above 1"),
    "a case's hash": (lambda f: retext(f["c"], "content_hash", "0" * 64), "case 'c' doesn't match its content hash"),
    "the file's hash": (lambda f: retext(f, "content_hash", "0" * 64), "doesn't match its content hash"),
    # provenance
    "provenance": (reprovenance('{"date":"d","seed":2}'), "the provenance of case 'c' doesn't match its hash"),
    "a volatile provenance": (
        reprovenance('{"date":"e","seed":1}'),
        "the provenance of case 'c' doesn't match its hash",
    ),
    "provenance and its hash": (
        reprovenance('{"date":"d","seed":2}', rehash=True),
        "case 'c' doesn't match its content hash",
    ),
    "no JSON": (reprovenance("seed: 1"), "the provenance of case 'c' isn't valid JSON"),
    "no object": (reprovenance("[1]"), "the provenance of case 'c' isn't valid JSON"),
    "NaN": (reprovenance('{"seed":NaN}'), "the provenance of case 'c' isn't valid JSON"),
    "infinity in disguise": (reprovenance('{"seed":1e999}'), "the provenance of case 'c' isn't valid JSON"),
    "a key twice": (reprovenance('{"seed":1,"seed":1}'), "the provenance of case 'c' isn't valid JSON"),
    "JSON of another form": (reprovenance('{"seed": 1}'), "the provenance of case 'c' isn't valid JSON"),
    "deep JSON": (reprovenance('{"a":' * 30000), "the provenance of case 'c' isn't valid JSON"),
    "bytes that aren't UTF-8": (
        lambda f: f["c"].attrs.update(provenance=np.bytes_(b"\xff\xfe")),
        "attribute 'provenance' of case 'c' isn't UTF-8",
    ),
}


@pytest.mark.parametrize("sealed", [False, True], ids=["", "sealed anew"])
@pytest.mark.parametrize("name", EDITS)
def test_an_edited_golden_is_refused(path: Path, name: str, sealed: bool) -> None:
    edit, message = EDITS[name]
    with h5py.File(path, "r+") as file:
        edit(file)
    if sealed:
        path.write_bytes(integrity.seal(path.read_bytes()))
    assert message in refusal(path)


@pytest.mark.parametrize("length", [0, 1, 8, 12, 13, 60, 511, 512, 513, 520, 600])
def test_a_file_cut_short_is_called_truncated(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])
    assert "is truncated: " in refusal(path) or length == 0


def test_a_file_cut_anywhere_is_refused(path: Path) -> None:
    data = path.read_bytes()
    for length in [*range(0, len(data), 13), len(data) - 1]:
        path.write_bytes(data[:length])
        assert ("is empty" if length == 0 else "is truncated: ") in refusal(path), length


def test_more_bytes_than_were_written_are_refused(path: Path) -> None:
    for more in (b"\n", b"\0" * 4096, path.read_bytes()):
        path.write_bytes(path.read_bytes() + more)
        assert "has changed since it was written" in refusal(path)


def test_a_flipped_byte_anywhere_is_refused(path: Path) -> None:
    data, rng = path.read_bytes(), random.Random(20)
    for offset in [*range(0, 512, 3), *rng.sample(range(512, len(data)), 250)]:
        damaged = bytearray(data)
        damaged[offset] ^= rng.randrange(1, 256)
        path.write_bytes(damaged)
        refusal(path)


def test_a_flipped_byte_behind_a_good_seal_is_refused_or_changes_nothing(path: Path) -> None:
    data, rng = path.read_bytes(), random.Random(21)
    expected = reading.read(data)
    outcomes = {"refused": 0, "the same": 0}
    for offset in rng.sample(range(512, len(data)), 250):
        damaged = bytearray(data)
        damaged[offset] ^= rng.randrange(1, 256)
        try:
            actual = reading.read(integrity.seal(bytes(damaged)))
        except GoldenError:
            outcomes["refused"] += 1
            continue
        outcomes["the same"] += 1  # unused space, which HDF5 leaves between its structures
        for case, trace in expected.cases.items():
            assert actual.cases[case].provenance == trace.provenance
            assert {n: a.tobytes() for n, a in actual.cases[case].probes.items()} == {
                n: a.tobytes() for n, a in trace.probes.items()
            }, offset
    assert outcomes["refused"] > 100, outcomes


def test_a_damaged_chunk_is_named(path: Path) -> None:
    with h5py.File(path) as file:
        offset = file["second/residual"].id.get_chunk_info(0).byte_offset
    data = bytearray(path.read_bytes())
    data[offset + 20] ^= 1
    path.write_bytes(data)
    assert "dataset 'second/residual' can't be read by HDF5" in refusal(path)


@pytest.mark.parametrize("where", ["size of the heap", "length of an object"])
def test_a_heap_that_hdf5_would_never_leave_is_refused(path: Path, where: str) -> None:
    data = bytearray(path.read_bytes())
    heap = data.index(b"GCOL")
    at = heap + 8 if where == "size of the heap" else heap + 16 + 8 + 1
    data[at : at + 2] = (1 << 14 | 8).to_bytes(2, "little")
    path.write_bytes(integrity.seal(bytes(data)))
    assert "a global heap" in refusal(path)


def test_an_older_superblock_is_refused(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[520] = 0
    path.write_bytes(integrity.seal(bytes(data)))
    assert "no superblock of version 3" in refusal(path)


@pytest.mark.parametrize(
    ("version", "message"), [(2, "newer than 1; update assay"), (0, "this assay reads 1; rebuild it")]
)
def test_another_version_in_the_seal_is_refused_before_hdf5_is_asked(
    path: Path, version: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integrity, "SCHEMA_VERSION", version)
    path.write_bytes(integrity.seal(b"x" * 2000))
    monkeypatch.undo()
    assert message in refusal(path)


def test_what_never_was_a_golden_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "g.h5"
    assert "doesn't exist; create it" in refusal(path)
    for content in (b"hello", b"\x93NUMPY" * 200, b"\0" * 9000, b"version https://git-lfs.github.com/spec/v1\n"):
        path.write_bytes(content)
        assert "isn't an HDF5 file" in refusal(path)
    for block in (0, 512, 1024):
        with h5py.File(path, "w", userblock_size=block) as file:
            file["x"] = [1, 2, 3]
        assert re.search("HDF5 file, but not a golden|header isn't the one|isn't an HDF5 file", refusal(path))


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(GoldenError, match="isn't a file"):
            store.open(path)
    for path in (Path("a\0b"), Path("x" * 300)):
        with pytest.raises(GoldenError, match="can't be read"):
            store.open(path)


def test_a_file_beyond_the_limit_is_not_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MAX_BYTES", 100)
    assert "more than a golden may" in refusal(path)


@pytest.mark.parametrize(
    "error",
    [OSError, RuntimeError, KeyError, ValueError, TypeError, MemoryError, RecursionError, IndexError, SystemError],
)
def test_whatever_hdf5_raises_becomes_one_line(
    path: Path, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(file: Any) -> None:
        raise error("several\nlines " + "and more " * 50)

    monkeypatch.setattr(reading, "_read_file", fail)
    assert "can't be read by HDF5 (" in refusal(path)


def test_opening_for_writing_and_changing_nothing_never_changes_what_is_read(path: Path) -> None:
    before = store.open(path).content_hash
    with h5py.File(path, "r+"):
        pass
    try:
        assert store.open(path).content_hash == before
    except GoldenError as error:
        assert "doesn't match" in str(error)
