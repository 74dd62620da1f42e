"""What identifies a checkpoint: a hash for every tensor's bytes and for config.json, and one over all of them.

Hashes the contents, not the files, so that the same tensors in other shards are the same model; and names what differs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from goldens.errors import GoldenError

# Beside config.json in a published checkpoint.
PUBLISHED = "fingerprint.json"


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """`model_hash` over everything; `tensor_hashes` by tensor name; `config` as read from config.json."""

    model_hash: str
    tensor_hashes: Mapping[str, str]
    config: Mapping[str, Any]


def fingerprint(folder: str | Path) -> Fingerprint:
    """The Fingerprint of a checkpoint folder; GoldenError when it can't be read."""
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tensors = dict(sorted(_tensors(folder)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GoldenError(
            f"{folder}: not a readable checkpoint ({error}); name a folder with config.json and safetensors"
        ) from error
    total = hashlib.sha256(json.dumps([config, tensors], sort_keys=True).encode()).hexdigest()
    return Fingerprint(model_hash=total, tensor_hashes=tensors, config=config)


def publish(folder: str | Path) -> Path:
    """Write the folder's fingerprint into it, so that whoever runs it later can tell that it is still the same."""
    found, path = fingerprint(folder), Path(folder) / PUBLISHED
    body = {"model_hash": found.model_hash, "tensor_hashes": found.tensor_hashes, "config": found.config}
    path.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    return path


def changes_since_published(folder: str | Path, found: Fingerprint) -> list[str]:
    """What differs from the fingerprint that was published with the checkpoint; nothing if none was."""
    path = Path(folder) / PUBLISHED
    if not path.exists():
        return []
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return [f"{change} since {PUBLISHED} was written" for change in differences(stored, found)]
    except (OSError, ValueError, AttributeError) as error:
        raise GoldenError(f"{path}: can't be read ({error}); restore it, or remove it to run without") from error


def differences(stored: Mapping[str, Any], found: Fingerprint) -> list[str]:
    """What differs between a stored provenance ("tensor_hashes", "config") and a checkpoint, in words."""
    if not isinstance(stored.get("tensor_hashes"), Mapping) or not isinstance(stored.get("config", {}), Mapping):
        return []
    old, new = stored["tensor_hashes"], found.tensor_hashes
    changed = [f"tensor {name} changed" for name in new if name in old and old[name] != new[name]]
    changed += [f"tensor {name} is new" for name in new if name not in old]
    changed += [f"tensor {name} is gone" for name in old if name not in new]
    before = stored.get("config", {})
    for key in sorted({*before, *found.config}):
        if before.get(key) != found.config.get(key):
            changed.append(f"config.json: {key} was {before.get(key)!r}, is {found.config.get(key)!r}")
    return changed


def _tensors(folder: Path) -> Iterator[tuple[str, str]]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no safetensors in {folder}")
    for path in files:
        yield from _safetensors(path)
    if (experts := folder / "experts.gguf").exists():
        import gguf

        for tensor in gguf.GGUFReader(experts).tensors:
            head = f"{tensor.tensor_type.name} {[int(n) for n in tensor.shape]}".encode()
            yield tensor.name, hashlib.sha256(head + tensor.data.tobytes()).hexdigest()


def _safetensors(path: Path) -> Iterator[tuple[str, str]]:
    """Name and hash of each tensor: the format is an 8-byte little-endian length, a JSON header, then the bytes."""
    data = memoryview(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8:start]))
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        if not 0 <= begin <= end <= len(data) - start:
            raise ValueError(f"{path.name} is truncated: tensor {name} lies beyond its end")
        head = f"{entry['dtype']} {entry['shape']}".encode()
        yield name, hashlib.sha256(head + bytes(data[start + begin : start + end])).hexdigest()
