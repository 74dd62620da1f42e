"""Loading a checkpoint folder strictly: what the config calls for, all of it, and nothing else.

A tensor that is missing, left over, mis-shaped, of the wrong kind or non-finite stops the load with its name. Floating
weights are rounded once (to nearest even) to the run's dtype; the router's correction bias stays float32; packed affine
weights stay packed. Experts may come from experts.gguf, dequantised in float32 by `kquants` and then rounded, or kept
as the blocks that they are, for kernels that read those.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from engine import kquants
from engine.config import Config, Quantization
from engine.errors import CheckpointError
from engine.metal import table

Array = np.ndarray[Any, np.dtype[Any]]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
GGUF = "experts.gguf"
PROJECTIONS = ("gate", "up", "down")
_FLOATS = (mx.float32, mx.float16, mx.bfloat16)


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A weight that the config calls for: its dense shape, and how it may be kept."""

    shape: tuple[int, ...]
    quantization: Quantization | None = None
    keeps_float32: bool = False


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """An expert stack as the GGUF file has it: its format, by ggml's name, and blocks (E, out, bytes) uint8."""

    kind: str
    data: Array

    def values(self, dtype: str) -> Array:
        """(E, out, in): the values of the blocks in float32, rounded to `dtype`."""
        with np.errstate(over="ignore"):
            return kquants.dequantize(self.data, self.kind).astype(dtype)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Tensors under their names, ready for the model, and which expert projections are affine-quantised.

    `blocks` are the expert stacks that were kept as such, under the checkpoint's names; they are in no other part.
    """

    tensors: Mapping[str, mx.array]
    experts: Mapping[int, tuple[Quantization | None, Quantization | None, Quantization | None]]
    blocks: Mapping[str, Blocks]


def expected_weights(config: Config) -> dict[str, Weight]:
    """Every weight of the model by name, linear ones as [out, in], stacked ones as [E, out, in]."""
    D, V = config.hidden_size, config.vocab_size
    weights = {"model.embed_tokens.weight": Weight(shape=(V, D)), "model.norm.weight": Weight(shape=(D,))}
    if not config.tie_word_embeddings:
        weights["lm_head.weight"] = Weight(shape=(V, D), quantization=config.quantization)
    for i in range(config.num_hidden_layers):
        weights |= {f"model.layers.{i}.{name}": weight for name, weight in _layer_weights(config).items()}
    return weights


def _layer_weights(config: Config) -> dict[str, Weight]:
    D, E, F = config.hidden_size, config.n_routed_experts, config.moe_intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    weights = {
        "input_layernorm.weight": Weight(shape=(D,)),
        "post_attention_layernorm.weight": Weight(shape=(D,)),
        "mlp.gate.weight": Weight(shape=(E, D)),
    }
    linears = {
        "self_attn.q_proj.weight": (q, D),
        "self_attn.k_proj.weight": (kv, D),
        "self_attn.v_proj.weight": (kv, D),
        "self_attn.o_proj.weight": (D, q),
        "mlp.experts.gate_proj.weight": (E, F, D),
        "mlp.experts.up_proj.weight": (E, F, D),
        "mlp.experts.down_proj.weight": (E, D, F),
    }
    if config.n_shared_experts:
        wide = F * config.n_shared_experts
        linears["mlp.shared_experts.gate_proj.weight"] = (wide, D)
        linears["mlp.shared_experts.up_proj.weight"] = (wide, D)
        linears["mlp.shared_experts.down_proj.weight"] = (D, wide)
    weights |= {name: Weight(shape=shape, quantization=config.quantization) for name, shape in linears.items()}
    if config.attention_sinks:
        weights["self_attn.sinks"] = Weight(shape=(config.num_attention_heads,))
    if config.has_correction_bias:
        weights["mlp.gate.e_score_correction_bias"] = Weight(shape=(E,), keeps_float32=True)
    return weights


def load_checkpoint(folder: Path, config: Config, dtype: mx.Dtype, *, keep_blocks: bool = False) -> Checkpoint:
    """The tensors of `folder` in `dtype`; raises CheckpointError naming the first tensor or file that is wrong.

    With `keep_blocks` every expert stack must be in a block format that the kernels read, and stays in it.
    """
    found = _safetensors(folder)
    experts: dict[int, tuple[Quantization | None, Quantization | None, Quantization | None]] = {}
    weights = expected_weights(config)
    stacks = _gguf_experts(folder, weights)
    blocks = _readable(folder, weights, stacks) if keep_blocks else {}
    dense = {name: _values(stack) for name, stack in stacks.items()}
    for name in dense:
        weights[name] = Weight(shape=weights[name].shape)
    tensors: dict[str, mx.array] = {}
    for name, weight in weights.items():
        if name in dense:
            clash = next((key for key in _parts(name) if key in found), None)
            if clash is not None:
                raise CheckpointError(f"{folder}: {clash} is in both the safetensors and {GGUF}; keep one")
            tensor = _finite(mx.array(dense.pop(name)).astype(dtype), name, folder / GGUF)
            if name not in blocks:
                tensors[name] = tensor
        elif weight.quantization is None:
            tensors[name] = _dense(found, name, weight, dtype, folder)
        else:
            tensors |= _packed(found, name, weight.shape, weight.quantization, dtype, folder)
    extra = sorted(found.keys() - tensors.keys())
    if extra:
        raise CheckpointError(
            f"{folder}: {extra[0]} is not a tensor of this config (and {len(extra) - 1} more are not)"
        )
    for i in range(config.num_hidden_layers):
        prefix = f"model.layers.{i}.mlp.experts"
        gate, up, down = (weights[f"{prefix}.{p}_proj.weight"].quantization for p in PROJECTIONS)
        experts[i] = gate, up, down
    return Checkpoint(tensors=tensors, experts=experts, blocks=blocks)


def _readable(folder: Path, weights: Mapping[str, Weight], stacks: Mapping[str, Blocks]) -> dict[str, Blocks]:
    """The expert stacks as blocks; CheckpointError for one that no kernel reads."""
    formats = ", ".join(table.FORMATS)
    for name in (name for name in weights if ".mlp.experts." in name):
        kind = stacks[name].kind if name in stacks else "not in blocks"
        if kind not in table.FORMATS:
            raise CheckpointError(f"{folder}: {name} is {kind}; the kernels read experts in {GGUF} as {formats}")
    return dict(stacks)


def _values(stack: Blocks) -> Array:
    """(E, out, in) float32."""
    with np.errstate(invalid="ignore", over="ignore"):  # What isn't finite is refused by name.
        return stack.data.astype(np.float32) if stack.kind in ("F16", "F32") else stack.values("float32")


def _parts(name: str) -> tuple[str, str, str]:
    """The three tensors of an affine-quantised weight."""
    stem = name.removesuffix("weight")
    return name, f"{stem}scales", f"{stem}biases"


def _take(found: Mapping[str, mx.array], name: str, shape: tuple[int, ...], folder: Path) -> mx.array:
    if name not in found:
        raise CheckpointError(f"{folder}: {name} is missing; shape {list(shape)} is expected")
    x = found[name]
    if x.shape != shape:
        raise CheckpointError(f"{folder}: {name} has shape {list(x.shape)}; {list(shape)} is expected")
    return x


def _dense(found: Mapping[str, mx.array], name: str, weight: Weight, dtype: mx.Dtype, folder: Path) -> mx.array:
    x = _take(found, name, weight.shape, folder)
    if x.dtype not in _FLOATS:
        raise CheckpointError(f"{folder}: {name} is {_label(x.dtype)}; float32, float16 or bfloat16 is expected")
    return _finite(x.astype(mx.float32 if weight.keeps_float32 else dtype), name, folder)


def _packed(
    found: Mapping[str, mx.array],
    name: str,
    shape: tuple[int, ...],
    quantization: Quantization,
    dtype: mx.Dtype,
    folder: Path,
) -> dict[str, mx.array]:
    codes_name, scales_name, biases_name = _parts(name)
    *lead, width = shape
    codes = _take(found, codes_name, (*lead, width * quantization.bits // 32), folder)
    if codes.dtype != mx.uint32:
        raise CheckpointError(f"{folder}: {name} is {_label(codes.dtype)}; quantization is set, so uint32 is expected")
    groups = Weight(shape=(*lead, width // quantization.group_size))
    scales = _dense(found, scales_name, groups, dtype, folder)
    biases = _dense(found, biases_name, groups, dtype, folder)
    return {codes_name: codes, scales_name: scales, biases_name: biases}


def _finite(x: mx.array, name: str, source: Path) -> mx.array:
    bad = int(np.array((~mx.isfinite(x)).sum()))
    if bad:
        raise CheckpointError(f"{source}: {name} has {bad} values that are not finite in {_label(x.dtype)}")
    return x


def _label(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def _safetensors(folder: Path) -> dict[str, mx.array]:
    """Every tensor of the folder's safetensors, sharded or not, by name."""
    index = folder / INDEX
    if not index.exists():
        return _read_shard(folder / SINGLE)
    try:
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards: dict[str, list[str]] = {}
        for name, shard in where.items():
            shards.setdefault(str(shard), []).append(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: no usable weight_map ({type(error).__name__}: {error})") from error
    if (folder / SINGLE).exists() and SINGLE not in shards:
        raise CheckpointError(f"{folder}: both {SINGLE} and {INDEX}, which doesn't list it; keep one")
    found: dict[str, mx.array] = {}
    for shard, names in shards.items():
        if Path(shard).name != shard:
            raise CheckpointError(f"{index}: {shard!r} is not the name of a file in the same folder")
        tensors = _read_shard(folder / shard)
        odd = sorted(set(names) ^ tensors.keys())
        if odd:
            place = "the index alone" if odd[0] in names else "the file alone"
            raise CheckpointError(f"{folder / shard}: {odd[0]} is in {place}; the two must agree")
        found |= tensors
    return found


def _read_shard(path: Path) -> dict[str, mx.array]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; {SINGLE}, or shards with {INDEX}, is expected")
    try:
        tensors = mx.load(str(path), format="safetensors")
        mx.eval(tensors)
    except Exception as error:  # MLX raises RuntimeError, ValueError or JSON errors of its own for a damaged file.
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error
    assert isinstance(tensors, dict)
    return tensors


def _gguf_experts(folder: Path, weights: Mapping[str, Weight]) -> dict[str, Blocks]:
    """Expert stacks of experts.gguf under the checkpoint's names; empty without that file. F16 and F32 are [E, out, in]
    numbers, everything else blocks."""
    path = folder / GGUF
    if not path.exists():
        return {}
    stacks: dict[str, Blocks] = {}
    for gguf_name, kind, shape, data in _gguf_tensors(path):
        name = _expert_name(gguf_name)
        if name is None or name not in weights:
            raise CheckpointError(
                f"{path}: {gguf_name} is not an expert tensor (blk.N.ffn_…_exps.weight) of this config"
            )
        if shape != weights[name].shape:
            expected = list(weights[name].shape)
            raise CheckpointError(f"{path}: {gguf_name} has shape {list(shape)}; {expected} is expected")
        if kind not in ("F16", "F32", *kquants.FORMATS):
            raise CheckpointError(
                f"{path}: {gguf_name}: {kind} blocks can't be read; one of {', '.join(kquants.FORMATS)} is expected"
            )
        stacks[name] = Blocks(kind=kind, data=np.array(data).reshape(*shape[:-1], -1))
    return stacks


def _gguf_tensors(path: Path) -> Iterator[tuple[str, str, tuple[int, ...], Array]]:
    """Name, block format, shape (outermost axis first) and raw data of each tensor of a GGUF file."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        tensors = list(reader.tensors)
    except Exception as error:  # The reader raises whatever its struct and NumPy calls meet in a damaged file.
        raise CheckpointError(f"{path}: not a readable GGUF file ({type(error).__name__}: {error})") from error
    for tensor in tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        yield tensor.name, tensor.tensor_type.name, shape, np.asarray(tensor.data)


def _expert_name(gguf_name: str) -> str | None:
    """`blk.3.ffn_up_exps.weight` → `model.layers.3.mlp.experts.up_proj.weight`; None for any other name."""
    match gguf_name.split("."):
        case ["blk", layer, kind, "weight"] if kind in {f"ffn_{p}_exps" for p in PROJECTIONS}:
            return f"model.layers.{layer}.mlp.experts.{kind[4:-5]}_proj.weight"
    return None
