"""The store of prefix checkpoints: what isn't exactly right is a miss, whatever was done to the file."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from engine import prefix_store
from engine.caches import KVCache, QuantizedKVCache, RotatingKVCache
from engine.prefix_store import Found, Identity, PrefixStore
from engine.prefixes import Caches, Checkpoint, take

IDENTITY = Identity(model_id="tiny-1", quant_bits=0, ctx=4096, dtype="float16")
TEXT = [5, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]


def cold() -> Caches:
    return [KVCache(), RotatingKVCache(4)]


def checkpoint(tokens: list[int], *, dtype: mx.Dtype = mx.float16, seed: int = 0) -> Checkpoint:
    caches = cold()
    for i, cache in enumerate(caches):
        key = mx.random.key(1000 * seed + i)
        keys, values = mx.random.normal((2, 1, 2, len(tokens), 8), key=key).astype(dtype)
        cache.update_and_fetch(keys, values)
    return take(tokens, caches)


def equal(actual: Checkpoint, expected: Checkpoint) -> bool:
    return actual.tokens == expected.tokens and all(
        (a.kind, a.offset) == (b.kind, b.offset)
        and a.codec == b.codec
        and [x.dtype for x in a.keys + a.values] == [x.dtype for x in b.keys + b.values]
        and all(mx.array_equal(x, y).item() for x, y in zip(a.keys + a.values, b.keys + b.values, strict=True))
        for a, b in zip(actual.layers, expected.layers, strict=True)
    )


def store(folder: Path, max_bytes: int = 1 << 20, **identity: Any) -> PrefixStore:
    return PrefixStore(folder, identity=replace(IDENTITY, **identity), max_bytes=max_bytes)


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.kv"))


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_what_was_put_is_found_bit_for_bit_by_another_store(tmp_path: Path, dtype: mx.Dtype) -> None:
    kept = checkpoint(TEXT[:7], dtype=dtype)
    assert store(tmp_path).put(kept)
    found = store(tmp_path).find(TEXT)
    assert found is not None
    assert equal(found.checkpoint, kept)
    assert store(tmp_path).nbytes == files(tmp_path)[0].stat().st_size > kept.nbytes


def test_codes_are_found_as_codes(tmp_path: Path) -> None:
    cache = QuantizedKVCache(group_size=32, bits=4)
    cache.update_and_fetch(*mx.random.normal((2, 1, 2, 5, 64), key=mx.random.key(0)).astype(mx.bfloat16))
    kept = take(TEXT[:5], [cache])
    assert store(tmp_path, quant_bits=4).put(kept)
    found = store(tmp_path, quant_bits=4).find(TEXT)
    assert found is not None
    assert found.checkpoint.layers[0].codec == "group_size=32 bits=4 mode=affine"
    assert equal(found.checkpoint, kept)


def test_the_longest_proper_prefix_is_found(tmp_path: Path) -> None:
    mine = store(tmp_path)
    for n in (1, 3, 6):
        assert mine.put(checkpoint(TEXT[:n], seed=n))
    assert mine.put(checkpoint([*TEXT[:4], 7], seed=9))

    def count(prompt: list[int]) -> int | None:
        found = mine.find(prompt)
        return found and found.checkpoint.token_count

    assert [count(TEXT[:n]) for n in range(9)] == [None, None, 1, 1, 3, 3, 3, 6, 6]
    assert count([*TEXT[:4], 7, 7]) == 5
    assert count([*TEXT[:2], 7, 7]) == 1
    assert count([6, 6, 6]) is None


def test_the_same_ids_in_another_order_or_beyond_16_and_32_bits_are_other_tokens(tmp_path: Path) -> None:
    mine, text = store(tmp_path), [5, 1, 4, 70_000]
    mine.put(checkpoint(text))
    for other in (
        text[::-1],
        [1, 5, 4, 70_000],
        [5, 1, 4, 70_000 - 2**16],
        [5 + 2**16, 1, 4, 70_000],
        [5 + 2**32, *text[1:]],
    ):
        assert mine.find([*other, 1]) is None, other
    assert mine.find([*text, 1]) is not None


@pytest.mark.parametrize("field", ["model_id", "quant_bits", "ctx", "dtype"])
def test_another_identity_is_a_miss_and_both_live_side_by_side(tmp_path: Path, field: str) -> None:
    other = {"model_id": "tiny-2", "quant_bits": 8, "ctx": 8192, "dtype": "bfloat16"}[field]
    mine, theirs = store(tmp_path), store(tmp_path, **{field: other})
    mine.put(checkpoint(TEXT[:5], seed=1))
    assert theirs.find(TEXT) is None
    theirs.put(checkpoint(TEXT[:5], seed=2))
    found = mine.find(TEXT), theirs.find(TEXT)
    assert [equal(f.checkpoint, checkpoint(TEXT[:5], seed=i + 1)) for i, f in enumerate(found) if f] == [True, True]


def test_what_another_policy_chose_is_a_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store(tmp_path).put(checkpoint(TEXT[:5]))
    monkeypatch.setattr(prefix_store, "POLICY_VERSION", prefix_store.POLICY_VERSION + 1)
    assert store(tmp_path).find(TEXT) is None
    assert store(tmp_path).put(checkpoint(TEXT[:5]))
    assert store(tmp_path).find(TEXT) is not None


def rewritten(path: Path, change: dict[str, Any], *, version: int | None = None) -> None:
    """The file with another header, whole in itself: right length, right hash."""
    text, payload = parts(path)
    path.write_bytes(headed(json.dumps(json.loads(text) | change).encode(), version=version) + payload)


def parts(path: Path) -> tuple[bytes, bytes]:
    """Header and payload of a file."""
    data, start = path.read_bytes(), prefix_store._PREAMBLE.size
    end = start + prefix_store._PREAMBLE.unpack_from(data)[2]
    return data[start:end], data[end:]


def headed(text: bytes, *, version: int | None = None) -> bytes:
    """A header behind its preamble."""
    number = prefix_store.VERSION if version is None else version
    return prefix_store._PREAMBLE.pack(prefix_store.MAGIC, number, len(text), hashlib.sha256(text).digest()) + text


@pytest.mark.parametrize(
    "change",
    [
        {"payload_abi": "layers/2-little-float16"},
        {"model_id": "tiny-2"},
        {"quant_bits": 4},
        {"quant_bits": False},
        {"ctx": 4097},
        {"text_hash": "0" * 64},
        {"token_count": 4},
        {"model_id": None},
        {"cache_policy": 0},
    ],
    ids=str,
)
def test_a_header_that_differs_is_a_miss_before_any_payload_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    store(tmp_path).put(checkpoint(TEXT[:5]))
    rewritten(files(tmp_path)[0], {})
    assert store(tmp_path).find(TEXT) is not None, "rewriting alone must not be what's noticed"
    rewritten(files(tmp_path)[0], change)
    monkeypatch.setattr(prefix_store, "_payload", lambda *_: pytest.fail("the payload was read"))
    assert store(tmp_path).find(TEXT) is None


def test_another_version_is_a_miss_before_any_payload_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store(tmp_path).put(checkpoint(TEXT[:5]))
    rewritten(files(tmp_path)[0], {}, version=2)
    monkeypatch.setattr(prefix_store, "_payload", lambda *_: pytest.fail("the payload was read"))
    assert store(tmp_path).find(TEXT) is None


@pytest.mark.parametrize("field", ["kind", "offset", "codec", "layers", "nonce"])
def test_a_whole_header_that_makes_no_sense_is_a_miss_and_no_exception(tmp_path: Path, field: str) -> None:
    """Right length and right hash, by another writer: whatever a field of a layer is, nothing is loaded or raised."""

    def coded() -> Caches:
        return [QuantizedKVCache(group_size=32, bits=8), KVCache()]

    caches = coded()
    for cache in caches:
        cache.update_and_fetch(*mx.random.normal((2, 1, 2, 3, 64), key=mx.random.key(0)).astype(mx.float16))
    mine = store(tmp_path, quant_bits=8)
    mine.put(take(TEXT[:3], caches))
    path = files(tmp_path)[0]
    whole, described = path.read_bytes(), take(TEXT[:3], caches).layers
    layers = [{"kind": x.kind, "offset": x.offset, "codec": x.codec} for x in described]
    texts = ["x", "=", "bits=8", "group_size=0 bits=8 mode=affine", "group_size=y bits=8 mode=affine"]
    for value in [None, True, 0, -1, 1.5, 10**30, [], {}, [1], *texts]:
        change = {field: value} if field in ("layers", "nonce") else {"layers": [layers[0] | {field: value}, layers[1]]}
        path.write_bytes(whole)
        rewritten(path, change)
        assert mine.restore(TEXT, coded) is None or field == "nonce", value


def test_a_whole_header_that_is_none_is_a_miss_and_no_exception(tmp_path: Path) -> None:
    mine = store(tmp_path)
    mine.put(checkpoint(TEXT[:3]))
    path = files(tmp_path)[0]
    text, payload = parts(path)
    long = json.dumps(json.loads(text) | {"more": "." * prefix_store._MAX_HEADER}).encode()
    for other in (b"", b"{", b"[]", b"7", b"null", b"\xff", b"[" * 100_000, b"9" * 10_000, long):
        path.write_bytes(headed(other) + payload)
        assert mine.find(TEXT) is None, other[:20]
        found = Found(checkpoint=checkpoint(TEXT[:3]), name=path.name, nonce="")
        assert not mine.discard(found)
    path.write_bytes(headed(text) + payload)
    assert mine.find(TEXT) is not None


def test_every_truncation_and_extension_is_a_miss(tmp_path: Path) -> None:
    mine = store(tmp_path)
    mine.put(checkpoint(TEXT[:1]))
    path = files(tmp_path)[0]
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        assert mine.find(TEXT) is None, length
    path.write_bytes(data + b"\0")
    assert mine.find(TEXT) is None
    path.write_bytes(data)
    assert mine.find(TEXT) is not None


def test_every_damaged_byte_is_a_miss(tmp_path: Path) -> None:
    mine = store(tmp_path)
    mine.put(checkpoint(TEXT[:1]))
    path = files(tmp_path)[0]
    data = path.read_bytes()
    for i, byte in enumerate(data):
        other = byte ^ 1 << (i % 8)
        path.write_bytes(data[:i] + bytes([other]) + data[i + 1 :])
        assert mine.find(TEXT) is None, f"byte {i} of {len(data)} is {other}, was {byte}"


def test_foreign_and_unreadable_files_are_misses_and_stay(tmp_path: Path) -> None:
    mine = store(tmp_path)
    mine.put(checkpoint(TEXT[:5], seed=1))
    mine.put(checkpoint(TEXT[:3], seed=2))
    longer = next(path for path in files(tmp_path) if path.name.startswith("5-"))
    for foreign in (b"", b"GGUF" + bytes(500), struct.pack("<8sII32s", b"ASSAYKV\0", 1, 2**31, bytes(32)), b"{}" * 99):
        longer.write_bytes(foreign)
        found = mine.find(TEXT)
        assert found is not None
        assert found.checkpoint.token_count == 3
        assert longer.read_bytes() == foreign
    longer.unlink()
    longer.mkdir()
    assert (found := mine.find(TEXT)) is not None and found.checkpoint.token_count == 3
    assert not mine.put(checkpoint(TEXT[:5]))
    os.rename(files(tmp_path)[0], tmp_path / ("4-" + "0" * 40 + ".kv"))  # noqa: PTH104 - onto a stranger's name
    assert mine.find(TEXT) is None


def test_an_entry_under_anothers_name_is_a_miss(tmp_path: Path) -> None:
    mine = store(tmp_path)
    mine.put(checkpoint(TEXT[:3], seed=1))
    first = files(tmp_path)[0]
    mine.put(checkpoint([9, 9, 9], seed=2))
    second = next(path for path in files(tmp_path) if path != first)
    first.write_bytes(second.read_bytes())
    assert mine.find(TEXT) is None
    assert mine.find([9, 9, 9, 9]) is not None


def test_a_checkpoint_that_wont_restore_is_discarded_alone(tmp_path: Path) -> None:
    mine = store(tmp_path)
    for n in (2, 4, 6):
        mine.put(checkpoint(TEXT[:n], seed=n))

    def other() -> Caches:
        return [KVCache(), RotatingKVCache(5)]

    mine.put(checkpoint(TEXT[:1]))
    assert len(files(tmp_path)) == 4
    found = mine.find(TEXT)
    assert found is not None
    assert mine.discard(found)
    assert not mine.discard(found)
    assert sorted(path.name.partition("-")[0] for path in files(tmp_path)) == ["1", "2", "4"]
    assert mine.restore(TEXT, cold) is not None
    assert mine.restore(TEXT, other) is None
    assert files(tmp_path) == [], "each was tried, and none fits another window"


def test_a_file_that_wont_restore_nor_go_away_is_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = store(tmp_path)
    mine.put(checkpoint(TEXT[:4]))
    tried: list[int] = []
    monkeypatch.setattr(mine, "discard", lambda found: tried.append(found.checkpoint.token_count))
    assert mine.restore(TEXT, lambda: [KVCache()]) is None
    assert tried == [4]


def test_a_newer_file_under_the_name_is_not_discarded(tmp_path: Path) -> None:
    mine = store(tmp_path)
    mine.put(checkpoint(TEXT[:4], seed=1))
    failed = mine.find(TEXT)
    assert failed is not None
    store(tmp_path).put(checkpoint(TEXT[:4], seed=2))
    assert not mine.discard(failed)
    found = mine.find(TEXT)
    assert found is not None
    assert equal(found.checkpoint, checkpoint(TEXT[:4], seed=2))


def test_the_budget_is_in_real_bytes_and_use_decides(tmp_path: Path) -> None:
    size = 0
    kept = [checkpoint([i, *TEXT[:5]], seed=i) for i in range(5)]
    store(tmp_path / "one").put(kept[0])
    size = store(tmp_path / "one").nbytes
    mine = store(tmp_path, max_bytes=3 * size + size // 2)
    for i in (0, 1, 2):
        assert mine.put(kept[i])
    assert mine.find([0, *TEXT]) is not None
    assert mine.put(kept[3])
    assert [mine.find([i, *TEXT]) is not None for i in range(4)] == [True, False, True, True]
    assert mine.nbytes == sum(path.stat().st_size for path in files(tmp_path)) <= mine.entries.max_bytes
    small = store(tmp_path, max_bytes=size - 1)
    assert not small.put(kept[4])
    assert len(files(tmp_path)) == 3, "an oversized entry evicts nothing"


def test_a_checkpoint_changes_nothing_after_it_was_put(tmp_path: Path) -> None:
    """The restored arrays are read, not waiting for the file."""
    mine = store(tmp_path)
    kept = checkpoint(TEXT[:5])
    mine.put(kept)
    found = mine.find(TEXT)
    assert found is not None
    files(tmp_path)[0].write_bytes(b"gone")
    assert equal(found.checkpoint, kept)
