"""The caches and masks of several mlx-lm releases, judged by the cache contracts: python -m audits.releases FOLDER...

A FOLDER is an unpacked wheel, of any release from 0.19 on (pip download --no-deps mlx-lm==X, then unzip); nothing is
fetched here. Only mlx_lm/models/{cache,base}.py are imported, so that a model's requirements aren't needed. Releases
whose caches have no make_mask are asked for their masks as their models asked: by create_attention_mask in base.py.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from audits.cache_contract import CacheContract
from audits.candidate import Candidate
from audits.catalogue import contract
from audits.verdict import Verdict

CLASSES: Mapping[str, str] = {
    "kv_cache": "KVCache",
    "rotating_kv_cache": "RotatingKVCache",
    "chunked_kv_cache": "ChunkedKVCache",
    "quantized_kv_cache": "QuantizedKVCache",
    "batch_kv_cache": "BatchKVCache",
    "batch_rotating_kv_cache": "BatchRotatingKVCache",
}


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One class of one release: how many programs passed, and by check how many failed and the first that did."""

    release: str
    contract: str
    passed: int
    failed: Mapping[str, tuple[int, Verdict]]
    skipped: tuple[str, ...]


def judge(folder: Path, names: tuple[str, ...] = tuple(CLASSES), *, shrinking: bool = True) -> Iterator[Judged]:
    """Judge every cache class that a release has; ValueError for a folder without mlx_lm/models/cache.py."""
    cache, base = _modules(folder)
    for name in names:
        made = getattr(cache, CLASSES[name], None)
        if made is None:
            continue
        chosen = contract(name)
        assert isinstance(chosen, CacheContract)
        candidate = Candidate(function=_masked(made, base), framework="mlx", name=f"mlx-lm {folder.name}")
        passed = 0
        failed: dict[str, tuple[int, Verdict]] = {}
        skipped: list[str] = []
        for verdict in chosen.audit(candidate, shrinking=shrinking):
            if verdict.outcome == "fail":
                check = str(verdict.evidence["check"])
                count, first = failed.get(check, (0, verdict))
                failed[check] = (count + 1, first)
            elif verdict.outcome == "skipped":
                skipped.append(verdict.message)
            else:
                passed += 1
        yield Judged(release=folder.name, contract=name, passed=passed, failed=failed, skipped=tuple(skipped))


def _modules(folder: Path) -> tuple[ModuleType, ModuleType]:
    """The release's cache and base modules, under names of their own; its package's __init__ isn't run."""
    root = folder / "mlx_lm"
    if not (root / "models" / "cache.py").is_file():
        raise ValueError(f"{folder} holds no mlx_lm/models/cache.py: give the folder of an unpacked mlx-lm wheel")
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "mlx_lm"}
    try:
        for name, path in (("mlx_lm", root), ("mlx_lm.models", root / "models")):
            package = ModuleType(name)
            package.__path__ = [str(path)]
            sys.modules[name] = package
        return importlib.import_module("mlx_lm.models.cache"), importlib.import_module("mlx_lm.models.base")
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "mlx_lm"]:
            del sys.modules[name]
        sys.modules.update(kept)


def _masked(made: type[Any], base: ModuleType) -> type[Any]:
    """The class itself, or with a make_mask that asks base.py's create_attention_mask as the release's models do."""
    if hasattr(made, "make_mask") or made.__name__ == "ChunkedKVCache":  # Llama 4 makes its own masks of chunks
        return made

    def make_mask(self: Any, n: int) -> Any:
        import mlx.core as mx

        return base.create_attention_mask(mx.zeros((1, n, 1)), [self])

    return type(made.__name__, (made,), {"make_mask": make_mask})


def _line(judged: Judged) -> str:
    if not judged.failed:
        return f"{judged.release:16} {judged.contract:24} pass ({judged.passed})"
    found = "; ".join(f"{check} ({count}): {first.message}" for check, (count, first) in judged.failed.items())
    return f"{judged.release:16} {judged.contract:24} FAIL ({judged.passed} pass) {found}"


def main(folders: list[str]) -> int:
    """Print a line for each class of each release; 1 when something fails, 2 without folders."""
    if not folders:
        print("usage: python -m audits.releases FOLDER...: folders of unpacked mlx-lm wheels")
        return 2
    status = 0
    for folder in folders:
        try:
            for judged in judge(Path(folder)):
                print(_line(judged), flush=True)
                status |= bool(judged.failed)
        except ValueError as error:
            print(error)
            return 2
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
