"""A checkpoint with its experts quantised: made from another one, once, and kept.

The same config.json and tensors, but expert stacks as blocks in experts.gguf, so that the engine's own kernels, which
read blocks, can run any model and the shipped one first. Kept by the model's hash, the format and the text of the
quantisers; made in a folder aside that takes its name by one rename, so what carries the name is whole. Its
fingerprint is published with it: a copy that is damaged later is reported as such.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import engine.quantize
from engine.metal import compiler
from goldens.fingerprint import fingerprint, publish

# What --experts takes, and ggml's names for it.
FORMATS = {"q8_0": "Q8_0", "q4_k": "Q4_K", "q2_k": "Q2_K", "iq2_xxs": "IQ2_XXS"}
STACK = ".mlp.experts."
Tensors = dict[str, Any]
Advance = Callable[[str], None]


def stamp(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Changes when a file of the folder does, so that nothing stale is kept."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return tuple((f.name, f.stat().st_mtime_ns, f.stat().st_size) for f in files if f.is_file())


def cache_folder() -> Path:
    """Where made checkpoints are kept: beside the compiled kernels, or with them where ASSAY_CACHE names a folder."""
    kernels = compiler.cache_folder()
    return (kernels if os.environ.get("ASSAY_CACHE") else kernels.parent) / "checkpoints"


def quantized_checkpoint(folder: Path, kind: str, advance: Advance = lambda _: None) -> Path:
    """The folder of a checkpoint like `folder` whose experts are blocks of `kind` (one of FORMATS).

    Made when it isn't there yet, which takes the seconds that engine/quantize.py lists; `advance` is told so before.
    Raises ValueError for another format, and for experts that aren't floating tensors in whole blocks.
    """
    if kind not in FORMATS:
        raise ValueError(f"experts is {kind!r}; one of {', '.join(FORMATS)} is expected")
    kept = cache_folder() / f"{_model_hash(folder, stamp(folder))[:16]}-{kind}-{_recipe()}"
    if not kept.exists():
        advance(f"quantising experts to {kind}, once: a minute at most")
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=kept.parent, prefix="making-") as aside:
                made = Path(aside) / "model"
                _make(folder, kind, made)
                # Another process may have been quicker: a folder is not renamed over one that isn't empty.
                if not kept.exists():
                    made.rename(kept)
        except OSError as error:
            raise ValueError(
                f"quantised experts can't be kept in {kept.parent} ({error.strerror or error}); set ASSAY_CACHE to a"
                " folder that can be written"
            ) from error
    return kept


@lru_cache(maxsize=4)
def _model_hash(folder: Path, _: Any) -> str:
    return fingerprint(folder).model_hash


@lru_cache(maxsize=1)
def _recipe() -> str:
    """Changes when a quantiser does."""
    text = b"".join(path.read_bytes() for path in sorted(Path(engine.quantize.__file__).parent.glob("quantize*.py")))
    return hashlib.sha256(text).hexdigest()[:8]


def _make(folder: Path, kind: str, made: Path) -> None:
    from safetensors.torch import save_file

    tensors = dict(sorted(_tensors(folder)))
    stacks = {name: tensors.pop(name) for name in list(tensors) if STACK in name}
    for name, tensor in stacks.items():
        if not tensor.is_floating_point() or tensor.dim() != 3:
            raise ValueError(f"{folder}: {name} is {tensor.dtype}; only floating-point experts can be quantised")
    if not stacks:
        raise ValueError(f"{folder}: no experts in its safetensors; its experts can't be quantised to {kind}")
    made.mkdir()
    shutil.copyfile(folder / "config.json", made / "config.json")
    save_file(tensors, made / "model.safetensors")
    _write_blocks(made / "experts.gguf", stacks, FORMATS[kind])
    publish(made)


def _tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    from safetensors.torch import load_file

    for path in sorted(folder.glob("*.safetensors")):
        yield from load_file(path).items()


def _write_blocks(path: Path, stacks: Mapping[str, Any], kind: str) -> None:
    """experts.gguf under llama.cpp's names."""
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, "assay")
    for name, tensor in stacks.items():
        _, _, layer, _, _, projection, _ = name.split(".")
        try:
            blocks = engine.quantize.quantize(tensor.float().numpy(), kind)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        gguf_name = f"blk.{layer}.ffn_{projection.removesuffix('_proj')}_exps.weight"
        writer.add_tensor(gguf_name, blocks, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
