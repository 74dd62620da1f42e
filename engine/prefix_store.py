"""Prefix checkpoints on disk: one file an entry, and nothing but an exact match is ever loaded.

A file is a fixed preamble (magic, version, length and SHA-256 of the header), a JSON header, and a payload that is a
safetensors file of the layers' keys and values. Before a byte of the payload is read, everything that decides whether
it fits must be equal: magic, version, payload ABI, version of the policy that chose the caches, model id, quantisation
bits, context size, hash of the tokens. Then the payload's length and SHA-256 must be the header's. Anything else, a
truncated, damaged, foreign or unreadable file included, is a miss: no load and no exception.

An entry that is intact and still can't be restored is discarded, that very file and no other, or it would be found
again and again (`discard`, which compares the nonce that each file has).
"""

from __future__ import annotations

import hashlib
import io
import json
import secrets
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

from engine.caches import POLICY_VERSION
from engine.entries import Entries
from engine.prefixes import Caches, Checkpoint, Factory, Layer, Layout, restore

MAGIC = b"ASSAYKV\0"
VERSION = 1
# What the payload means: the arrays of engine.prefixes.Layer as tensors "{layer}.keys.{part}", "{layer}.values.{part}".
PAYLOAD_ABI = f"layers/1-{sys.byteorder}"
_PREAMBLE = struct.Struct("<8sII32s")  # magic, version, bytes of the header, SHA-256 of the header
# A header has some hundred bytes a layer; a length beyond this is damage.
_MAX_HEADER = 1 << 22
_NAME = r"(?P<count>\d+)-[0-9a-f]{40}\.kv"


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What a payload belongs to: the weights (any id that changes with them), bits of the quantised KV cache (0: none),
    context size in tokens, and the run's dtype."""

    model_id: str
    quant_bits: int
    ctx: int
    dtype: str

    def fields(self, tokens: Sequence[int]) -> dict[str, Any]:
        """The header fields that must be equal before a payload is read."""
        return {
            "payload_abi": f"{PAYLOAD_ABI}-{self.dtype}",
            "cache_policy": POLICY_VERSION,
            "model_id": self.model_id,
            "quant_bits": self.quant_bits,
            "ctx": self.ctx,
            "text_hash": hashlib.sha256(_bytes(tokens)).hexdigest(),
            "token_count": len(tokens),
        }


@dataclass(frozen=True, kw_only=True)
class Found:
    """A checkpoint that was read whole, and which file it came from."""

    checkpoint: Checkpoint
    name: str
    nonce: str


class PrefixStore:
    """The checkpoints in `folder` within `max_bytes`, of any identity; read and written here are those of `identity`.

    Several stores and processes may share a folder (see engine.entries).
    """

    def __init__(self, folder: str | Path, *, identity: Identity, max_bytes: int) -> None:
        self.identity = identity
        self.entries = Entries(folder, pattern=_NAME.replace("?P<count>", "?:"), max_bytes=max_bytes)

    @property
    def nbytes(self) -> int:
        """The real size of all entries of the folder, in bytes."""
        return self.entries.nbytes

    def put(self, checkpoint: Checkpoint) -> bool:
        """Store `checkpoint`, evicting the least recently used entries before; False when it wasn't stored.

        One that is larger than the whole budget evicts nothing.
        """
        return self.entries.write(self._name(checkpoint.tokens), _encode(checkpoint, self.identity))

    def find(self, prompt: Sequence[int], *, below: int | None = None) -> Found | None:
        """The longest stored prefix of `prompt` that leaves at least one token to feed; shorter than `below`, if given.

        Finding counts as use.
        """
        limit = len(prompt) if below is None else min(below, len(prompt))
        counts = {int(name.partition("-")[0]) for name in self.entries.names()}
        for count in sorted((n for n in counts if 1 <= n < limit), reverse=True):
            found = self._read(tuple(prompt[:count]))
            if found is not None:
                return found
        return None

    def discard(self, found: Found) -> bool:
        """Remove the very file that `found` was read from; a newer one under its name stays."""

        def is_it(file: BinaryIO) -> bool:
            header = _header(file)
            return header is not None and header.get("nonce") == found.nonce

        return self.entries.remove(found.name, is_it)

    def restore(
        self, prompt: Sequence[int], factory: Factory, layout: Layout | None = None
    ) -> tuple[Caches, int] | None:
        """Caches from `factory` with the longest stored prefix of `prompt`, and its length; None: start cold.

        A file whose checkpoint doesn't fit the factory's caches is discarded, and the next shorter one tried.
        """
        below: int | None = None
        while (found := self.find(prompt, below=below)) is not None:
            caches = restore(found.checkpoint, prompt, factory, layout)
            if caches is not None:
                return caches, found.checkpoint.token_count
            self.discard(found)
            below = found.checkpoint.token_count
        return None

    def _name(self, tokens: Sequence[int]) -> str:
        fields = json.dumps(self.identity.fields(tokens), sort_keys=True)
        return f"{len(tokens)}-{hashlib.sha256(fields.encode()).hexdigest()[:40]}.kv"

    def _read(self, tokens: tuple[int, ...]) -> Found | None:
        name = self._name(tokens)
        file = self.entries.open(name)
        if file is None:
            return None
        with file:
            try:
                header = _header(file)
                if header is None or not _matches(header, self.identity.fields(tokens)):
                    return None
                data = _payload(file, header)
                if data is None:
                    return None
                found = Found(checkpoint=_decode(data, header, tokens), name=name, nonce=str(header["nonce"]))
            except (OSError, KeyError, TypeError, ValueError, RuntimeError):  # another writer's idea of version 1
                return None
            self.entries.touch(file)
        return found


def _encode(checkpoint: Checkpoint, identity: Identity) -> bytes:
    tensors: dict[str, mx.array] = {}
    for i, layer in enumerate(checkpoint.layers):
        tensors |= {f"{i}.keys.{j}": x for j, x in enumerate(layer.keys)}
        tensors |= {f"{i}.values.{j}": x for j, x in enumerate(layer.values)}
    buffer = io.BytesIO()
    mx.save_safetensors(buffer, tensors)
    payload = buffer.getvalue()
    header = identity.fields(checkpoint.tokens) | {
        "layers": [{"kind": x.kind, "offset": x.offset, "codec": x.codec} for x in checkpoint.layers],
        "nonce": secrets.token_hex(16),
        "payload_bytes": len(payload),
        "payload_sha256": hashlib.sha256(payload).hexdigest(),
    }
    text = json.dumps(header, sort_keys=True).encode()
    return _PREAMBLE.pack(MAGIC, VERSION, len(text), hashlib.sha256(text).digest()) + text + payload


def _header(file: BinaryIO) -> dict[str, Any] | None:
    """The header of an entry of this magic and version, or None; leaves the file at its payload."""
    preamble = file.read(_PREAMBLE.size)
    if len(preamble) < _PREAMBLE.size:
        return None
    magic, version, length, digest = _PREAMBLE.unpack(preamble)
    if magic != MAGIC or version != VERSION or length > _MAX_HEADER:
        return None
    text = file.read(length)
    if hashlib.sha256(text).digest() != digest:
        return None
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return header if isinstance(header, dict) else None


def _matches(header: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return all(type(header.get(name)) is type(value) and header[name] == value for name, value in wanted.items())


def _payload(file: BinaryIO, header: dict[str, Any]) -> bytes | None:
    """The rest of the file, if it's what the header says."""
    data = file.read()
    whole = len(data) == header.get("payload_bytes")
    return data if whole and hashlib.sha256(data).hexdigest() == header.get("payload_sha256") else None


def _decode(data: bytes, header: dict[str, Any], tokens: tuple[int, ...]) -> Checkpoint:
    tensors = mx.load(io.BytesIO(data), format="safetensors")
    assert isinstance(tensors, dict)
    mx.eval(tensors)  # MLX reads lazily, and a checkpoint mustn't wait for anything
    layers = []
    for i, of in enumerate(header["layers"]):
        kind, offset, codec = of["kind"], of["offset"], of["codec"]
        if [type(x) for x in (kind, offset, codec)] != [str, int, str]:
            raise TypeError(f"layer {i} of the header is {of}; a kind, an offset and a codec are expected")
        parts = range(3 if codec else 1)
        keys, values = (tuple(tensors[f"{i}.{name}.{j}"] for j in parts) for name in ("keys", "values"))
        layers.append(Layer(kind=kind, offset=offset, keys=keys, values=values, codec=codec))
    return Checkpoint(tokens=tokens, layers=tuple(layers))


def _bytes(tokens: Sequence[int]) -> bytes:
    return np.asarray(tokens, dtype="<i8").tobytes()
