"""A checkpoint folder as the reference sees it: every weight as the exact number that an honest engine must hold.

Floating weights are rounded to the run's dtype (round to nearest even); e_score_correction_bias stays float32; GGUF
blocks go through the `gguf` package's dequantiser; MLX affine codes are unpacked here from the layout. Nothing of mlx
is used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reference.config import Config
from reference.errors import CheckpointError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
KEPT_FLOAT32 = "e_score_correction_bias"
GGUF_NAMES = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A weight's exact values in float64, and, where the engine works on scale·code and bias apart, Σ of their
    magnitudes.

    `stored` maps each tensor of the file that makes up this weight (the weight itself, or codes, scales and biases) to
    the values that an engine must hold for it.
    """

    exact: Tensor
    magnitude: Tensor | None
    stored: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        object.__setattr__(self, "_float32", self.exact.to(torch.float32))

    def to(self, dtype: torch.dtype) -> Tensor:
        """The values in the dtype that the reference computes in."""
        single: Tensor = self._float32  # type: ignore[attr-defined]  # set in __post_init__ of a frozen record
        return single if dtype == torch.float32 else self.exact.to(dtype)


def load_weights(folder: Path, config: Config, dtype: str) -> dict[str, Weight]:
    """All weights of the checkpoint by the name of their tensor; CheckpointError names what is missing or
    mis-shaped.
    """
    if dtype not in DTYPES:
        raise CheckpointError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
    tensors = _read_safetensors(folder)
    experts = _read_gguf(folder, len(config.windows))
    weights: dict[str, Weight] = {}
    for name, shape in expected_shapes(config).items():
        if name in experts:
            if name in tensors:
                raise CheckpointError(f"{folder}: {name} is both in safetensors and in experts.gguf; keep one")
            weight = _plain(name, experts.pop(name), dtype)
        elif name.removesuffix("weight") + "scales" in tensors:
            weight = _affine(name, tensors, config, dtype)
        elif name in tensors:
            weight = _plain(name, tensors.pop(name), dtype)
        else:
            raise CheckpointError(f"{folder}: tensor {name} is missing")
        if tuple(weight.exact.shape) != shape:
            raise CheckpointError(f"{folder}: {name} has shape {tuple(weight.exact.shape)}, config.json says {shape}")
        if not bool(torch.isfinite(weight.exact).all()):
            raise CheckpointError(f"{folder}: {name} holds values that are not finite in {dtype}")
        weights[name] = weight
    if extra := sorted([*tensors, *experts]):
        raise CheckpointError(f"{folder}: tensor {extra[0]} (of {len(extra)} unknown) belongs to no part of the model")
    return weights


def expected_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight; linear weights are [out, in], expert stacks [E, out, in]."""
    d, f, e = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, d)}
    for i in range(len(config.windows)):
        layer = {
            "input_layernorm.weight": (d,),
            "self_attn.q_proj.weight": (q, d),
            "self_attn.k_proj.weight": (kv, d),
            "self_attn.v_proj.weight": (kv, d),
            "self_attn.o_proj.weight": (d, q),
            "post_attention_layernorm.weight": (d,),
            "mlp.gate.weight": (e, d),
            "mlp.experts.gate_proj.weight": (e, f, d),
            "mlp.experts.up_proj.weight": (e, f, d),
            "mlp.experts.down_proj.weight": (e, d, f),
        }
        if config.attention_sinks:
            layer["self_attn.sinks"] = (config.num_attention_heads,)
        if config.scoring_bias:
            layer["mlp.gate.e_score_correction_bias"] = (e,)
        if shared := config.n_shared_experts * f:
            layer["mlp.shared_experts.gate_proj.weight"] = (shared, d)
            layer["mlp.shared_experts.up_proj.weight"] = (shared, d)
            layer["mlp.shared_experts.down_proj.weight"] = (d, shared)
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (d,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, d)
    return shapes


def _read_safetensors(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    index = folder / "model.safetensors.index.json"
    try:
        names = (
            sorted(set(json.loads(index.read_text())["weight_map"].values()))
            if index.exists()
            else ["model.safetensors"]
        )
        tensors: dict[str, Tensor] = {}
        for name in names:
            tensors |= load_file(folder / name)
    except (OSError, SafetensorError, KeyError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder}: the safetensors can't be read: {error}") from error
    return tensors


def _read_gguf(folder: Path, layers: int) -> dict[str, Tensor]:
    path = folder / "experts.gguf"
    if not path.exists():
        return {}
    import gguf

    try:
        found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        values = {
            name: torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
            for name, tensor in found.items()
        }
    except (OSError, ValueError, KeyError, IndexError, NotImplementedError) as error:
        raise CheckpointError(f"{path}: can't be read: {error}") from error
    for i in range(layers):
        for ours, theirs in GGUF_NAMES.items():
            if (tensor := values.pop(f"blk.{i}.{theirs}.weight", None)) is not None:
                values[f"model.layers.{i}.mlp.experts.{ours}.weight"] = tensor
    return values


def _plain(name: str, tensor: Tensor, dtype: str) -> Weight:
    held = tensor.to(torch.float32 if name.endswith(KEPT_FLOAT32) else DTYPES[dtype])
    return Weight(exact=held.to(torch.float64), magnitude=None, stored={name: held})


def _affine(name: str, tensors: dict[str, Tensor], config: Config, dtype: str) -> Weight:
    """An MLX affine-quantised weight: value = scale·code + bias, one scale and bias for each group along the last
    axis.
    """
    stem = name.removesuffix("weight")
    try:
        settings: Mapping[str, Any] = config.quantization or {}
        group_size, bits = int(settings["group_size"]), int(settings["bits"])
        words, scales, biases = tensors.pop(name), tensors.pop(stem + "scales"), tensors.pop(stem + "biases")
    except KeyError as error:
        raise CheckpointError(f"{name} is affine-quantised, but {error.args[0]!r} is missing") from error
    scales, biases = scales.to(DTYPES[dtype]), biases.to(DTYPES[dtype])
    codes = torch.from_numpy(unpack_codes(words.view(torch.int32).numpy().view(np.uint32), bits)).to(torch.float64)
    if codes.shape[-1] != scales.shape[-1] * group_size or biases.shape != scales.shape:
        raise CheckpointError(
            f"{name}: {codes.shape[-1]} codes of {bits} bits a row don't fit {scales.shape[-1]} groups of {group_size}"
        )
    scale = scales.to(torch.float64).repeat_interleave(group_size, -1)
    bias = biases.to(torch.float64).repeat_interleave(group_size, -1)
    return Weight(
        exact=scale * codes + bias,
        magnitude=scale.abs() * codes + bias.abs(),
        stored={name: words, stem + "scales": scales, stem + "biases": biases},
    )


def unpack_codes(words: np.ndarray[Any, np.dtype[np.uint32]], bits: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Codes [..., n·32/bits] of MLX's affine packing: a row is one little-endian bit stream, lowest bits first."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=-1, bitorder="little")
    codes = stream.reshape(*words.shape[:-1], -1, bits)
    return np.packbits(codes, axis=-1, bitorder="little")[..., 0]
