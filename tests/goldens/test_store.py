"""What is stored comes back bit for bit; what can't be stored is refused before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from goldens import reading, store
from goldens.errors import GoldenError
from goldens.trace import Trace

DTYPES = [np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name) for name in reading.STORAGE]
SPECIAL = [np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-40, -6e-8, 1e-310, 3.5]  # subnormal in some width each


def trace(case: str = "greedy", probes: dict[str, Any] | None = None, tokens: int = 3, **provenance: Any) -> Trace:
    made = probes or {"embedding": np.arange(4 * tokens, dtype=np.float32).reshape(tokens, 4)}
    about = {"model_hash": "m1", "seed": 0, "date": "2025-01-01", **provenance}
    return Trace(case=case, tokens=np.arange(tokens, dtype=np.int32) + 7, probes=made, provenance=about)


def same(actual: Trace, expected: Trace) -> None:
    assert actual.case == expected.case
    assert actual.provenance == expected.provenance
    assert actual.tokens.dtype == np.int32 and actual.tokens.tolist() == expected.tokens.tolist()
    assert list(actual.probes) == list(expected.probes)
    for name, array in expected.probes.items():
        assert actual.probes[name].dtype == array.dtype and actual.probes[name].shape == array.shape, name
        assert actual.probes[name].tobytes() == np.ascontiguousarray(array).tobytes(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path, dtype: np.dtype[Any]) -> None:
    if dtype == np.bool_:
        values = np.array([[True, False], [False, False], [True, True]])
    elif dtype.kind in "iu":
        limits = np.iinfo(dtype)
        values = np.array([[limits.min, limits.max], [0, 1], [2, 3]], dtype=dtype)
    else:
        with np.errstate(over="ignore", under="ignore"):
            values = np.array([SPECIAL[:5], SPECIAL[5:], SPECIAL[:5]]).astype(dtype)
    expected = trace(probes={"x": values})
    store.write(tmp_path / "g.h5", [expected])
    same(store.open(tmp_path / "g.h5").trace, expected)


def test_nan_payloads_and_signalling_nans_survive(tmp_path: Path) -> None:
    bits = np.array([[0x7F800001], [0xFFC12345], [0x00000001]], dtype=np.uint32)
    store.write(tmp_path / "g.h5", [trace(probes={"x": bits.view(np.float32)})])
    assert store.open(tmp_path / "g.h5").trace.probes["x"].view(np.uint32).tolist() == bits.tolist()


def test_cases_and_probes_keep_their_order(tmp_path: Path) -> None:
    names = [f"layers.{i}.{part}" for i in (10, 2, 0) for part in ("residual", "attn.q_proj", "mlp_norm")]
    traces = [trace(case, {name: np.ones((3, 2), np.float32) for name in names}) for case in ("z", "a b", "é")]
    store.write(tmp_path / "g.h5", traces)
    with store.open(tmp_path / "g.h5") as golden:
        assert list(golden.cases) == ["z", "a b", "é"]
        assert all(list(case.probes) == names for case in golden.cases.values())
        same(golden.trace, traces[0])
        same(golden.case("é"), traces[2])
        assert golden.provenance == traces[0].provenance
        with pytest.raises(GoldenError, match="has no case 'nope'; it holds 'z', 'a b', 'é'"):
            golden.case("nope")


def test_the_arrays_may_be_strided_big_endian_or_in_several_chunks(tmp_path: Path) -> None:
    wide = np.random.default_rng(0).standard_normal((5, 3 * store.CHUNK_BYTES // 4 + 1)).astype(np.float32)
    probes = {"strided": wide[:, ::3], "turned": np.asfortranarray(wide[:, :7]), "big": wide[:, :9].astype(">f4")}
    store.write(tmp_path / "g.h5", [trace(probes={"wide": wide, **probes}, tokens=5)])
    stored = store.open(tmp_path / "g.h5").trace.probes
    assert all((stored[name] == array).all() for name, array in {"wide": wide, **probes}.items())
    assert stored["big"].dtype == np.dtype("=f4")


@given(data=st.data(), tokens=st.integers(1, 4))
@settings(derandomize=True, max_examples=60, deadline=None)
def test_any_trace_comes_back(data: st.DataObject, tokens: int) -> None:
    text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1, max_size=8)
    names = data.draw(
        st.lists(text.filter(lambda name: name not in (".", "tokens")), min_size=1, max_size=4, unique=True)
    )
    probes = {}
    for name in names:
        dtype = data.draw(st.sampled_from(DTYPES))
        shape = (tokens, *data.draw(st.lists(st.integers(1, 5), max_size=3)))
        if dtype == np.bool_:
            probes[name] = data.draw(hnp.arrays(np.bool_, shape))
        else:
            probes[name] = data.draw(hnp.arrays(f"u{dtype.itemsize}", shape)).view(dtype)
    json = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
        max_leaves=5,
    )
    about = data.draw(st.dictionaries(text, json, max_size=4))
    case = data.draw(text.filter(lambda name: name not in (".", "tokens")))
    expected = Trace(case=case, tokens=np.arange(tokens, dtype=np.int32), probes=probes, provenance=about)
    image, content_hash = store.encode(Path("g.h5"), [expected])
    contents = reading.read(image)
    assert contents.content_hash == content_hash
    same(contents.cases[case], expected)


def test_the_content_hash_is_of_the_content(tmp_path: Path) -> None:
    def written(name: str, *traces: Trace) -> str:
        content_hash = store.write(tmp_path / name, traces)
        assert store.open(tmp_path / name).content_hash == content_hash
        return content_hash

    first = written("a.h5", trace())
    assert written("b.h5", trace()) == first
    assert written("c.h5", trace(date="2031-12-31", command="assay golden regenerate", versions={"mlx": "9"})) == first
    x, y = np.ones((3, 2), np.float32), np.zeros((3, 2), np.float32)
    others = [
        written("d.h5", trace(seed=1)),
        written("e.h5", trace(model_hash="m2")),
        written("f.h5", trace(case="other")),
        written("g.h5", trace(), trace("second")),
        written("h.h5", trace("second"), trace()),
        written("i.h5", trace(probes={"x": x, "y": y})),
        written("j.h5", trace(probes={"y": y, "x": x})),
        written("k.h5", trace(probes={"x": y, "y": x})),
        written("l.h5", trace(probes={"x": x, "y": -y})),
        written("m.h5", trace(probes={"x": x, "y": y.astype(np.int32)})),
        written("n.h5", trace(probes={"x": x, "y": y.reshape(3, 1, 2)})),
    ]
    assert len({first, *others}) == 1 + len(others)


def test_the_file_is_plain_hdf5_with_labels_shuffle_and_compression(tmp_path: Path) -> None:
    probes = {"layers.0.attn.q": np.ones((3, 2, 4), np.float32), "b": np.ones((3, 2), ml_dtypes.bfloat16)}
    store.write(tmp_path / "g.h5", [trace(probes=probes)])
    with h5py.File(tmp_path / "g.h5") as file:
        assert file.userblock_size == 512 and file.attrs["schema_version"] == store.SCHEMA_VERSION
        assert file.attrs["schema"].decode() == store.SCHEMA
        dataset = file["greedy/layers.0.attn.q"]
        assert [axis.label for axis in dataset.dims] == ["T", "Hq", "Dh"]
        assert dataset.shuffle and dataset.compression == "gzip" and dataset.fletcher32
        assert len(dataset.attrs["sha256"]) == 64 and dataset.attrs["dtype"] == b"float32"
        assert file["greedy/b"].dtype == np.uint16 and file["greedy/b"].attrs["dtype"] == b"bfloat16"
        assert [axis.label for axis in file["greedy/tokens"].dims] == ["T"]


def test_provenance_may_be_longer_than_an_hdf5_object_header(tmp_path: Path) -> None:
    hashes = {f"model.layers.{i}.weight": f"{i:064x}" for i in range(3000)}
    store.write(tmp_path / "g.h5", [trace(tensor_hashes=hashes)])
    assert store.open(tmp_path / "g.h5").provenance["tensor_hashes"] == hashes


ONE = np.ones((3, 2), np.float32)
UNSTORABLE: dict[str, tuple[list[Trace], str]] = {
    "nothing": ([], "there are no traces"),
    "a case twice": ([trace(), trace()], "case 'greedy' occurs 2 times"),
    "a case with a slash": ([trace("a/b")], "case name 'a/b'"),
    "a case without a name": ([trace("")], "case name ''"),
    "a case named dot": ([trace(".")], "case name '.'"),
    "no tokens": ([trace(tokens=0)], "has no tokens"),
    "tokens that aren't integers": ([Trace(case="c", tokens=np.ones(3), probes={"x": ONE})], "not a row of integers"),
    "tokens beyond int32": ([Trace(case="c", tokens=np.array([1, 2, 1 << 31]), probes={"x": ONE})], "aren't int32"),
    "no probes": ([Trace(case="c", tokens=np.arange(3), probes={})], "has no probes"),
    "a probe with a slash": ([trace(probes={"a/b": ONE})], "probe name 'a/b'"),
    "a probe with NUL": ([trace(probes={"a\0": ONE})], r"probe name 'a\\x00'"),
    "a probe that isn't Unicode": ([trace(probes={"\ud800": ONE})], "isn't valid Unicode"),
    "a probe named tokens": ([trace(probes={"tokens": ONE})], "probe name 'tokens'"),
    "objects": ([trace(probes={"x": np.array([None] * 3)})], "has dtype object"),
    "texts": ([trace(probes={"x": np.array(["a"] * 3)})], "has dtype <U1"),
    "complex numbers": ([trace(probes={"x": ONE.astype(complex)})], "has dtype complex128"),
    "records": ([trace(probes={"x": np.zeros(3, "f4,i4")})], "which isn't stored"),
    "another first axis": ([trace(probes={"x": np.ones((2, 3), np.float32)})], r"has shape \(2, 3\).* the 3 tokens"),
    "no axes": ([trace(probes={"x": np.float32(1)})], r"has shape \(\)"),
    "an empty axis": ([trace(probes={"x": np.ones((3, 0), np.float32)})], r"has shape \(3, 0\)"),
    "NaN in provenance": ([trace(loss=float("nan"))], "provenance of case 'greedy' isn't JSON"),
    "infinity in provenance": ([trace(loss=float("inf"))], "provenance of case 'greedy' isn't JSON"),
    "an array in provenance": ([trace(loss=ONE)], "provenance of case 'greedy' isn't JSON"),
    "two keys that JSON makes one": ([trace(map={1: "a", "1": "b"})], "provenance of case 'greedy' isn't JSON"),
}


@pytest.mark.parametrize("name", UNSTORABLE)
def test_what_cannot_be_stored_is_refused_and_nothing_is_written(tmp_path: Path, name: str) -> None:
    path = tmp_path / "g.h5"
    before = store.write(path, [trace()])
    traces, message = UNSTORABLE[name]
    with pytest.raises(GoldenError, match=message) as caught:
        store.write(path, traces)
    assert str(caught.value).startswith(f"{path}: can't be written: ") and "\n" not in str(caught.value)
    assert store.open(path).content_hash == before


def test_more_bytes_than_a_golden_may_hold_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MAX_BYTES", 47)  # the probe has 48
    with pytest.raises(GoldenError, match="more than 47 bytes"):
        store.write(tmp_path / "g.h5", [trace()])
