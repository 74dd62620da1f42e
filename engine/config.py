"""config.json of a checkpoint, read and checked once; every later stage trusts it.

A key that is missing, of the wrong type or out of range stops the load with one line that names it. Nothing has a
default that changes arithmetic: a config that doesn't say is refused, because two programs guess differently.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError

MODEL_TYPE = "assay_moe"
SCORING_FUNCS = ("sqrtsoftplus", "softmax", "topk_softmax", "sigmoid")
# Scores of these two are independent of each other, so a per-expert bias can shift the selection alone.
BIASED_SCORING_FUNCS = ("sqrtsoftplus", "sigmoid")
LAYER_TYPES = ("sliding_attention", "full_attention")
DTYPES = ("float32", "float16", "bfloat16")
# What mx.quantized_matmul takes in affine mode and a whole number of elements fills a 32-bit word per group.
QUANT_BITS = (2, 3, 4, 6, 8)
QUANT_GROUPS = (32, 64, 128)


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """MLX affine quantisation: `bits` a weight, one scale and one bias for `group_size` consecutive inputs."""

    group_size: int
    bits: int


@dataclass(frozen=True, kw_only=True)
class Config:
    """The model's sizes and rules, under the names of config.json."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    layer_types: tuple[str, ...]
    sliding_window: int
    attention_sinks: bool
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    n_shared_experts: int
    scoring_func: str
    norm_topk_prob: bool
    routed_scaling_factor: float
    swiglu_limit: float | None
    tie_word_embeddings: bool
    torch_dtype: str
    quantization: Quantization | None

    @property
    def has_correction_bias(self) -> bool:
        """Whether the router adds a per-expert bias to the scores that it selects by."""
        return self.scoring_func in BIASED_SCORING_FUNCS


def read_config(folder: Path) -> Config:
    """The Config of `folder`/config.json; raises CheckpointError naming the first key that is wrong."""
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; a checkpoint has config.json and safetensors") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: unreadable ({error})") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: a JSON object is expected, found {type(raw).__name__}")
    try:
        return parse_config(raw)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def parse_config(raw: Mapping[str, Any]) -> Config:
    """The Config that `raw` (config.json as a mapping) states; keys that this engine doesn't use are left alone."""
    if raw.get("model_type") != MODEL_TYPE:
        raise CheckpointError(f"model_type is {raw.get('model_type')!r}; this engine runs {MODEL_TYPE!r} only")
    values: dict[str, Any] = {name: _integer(raw, name, least) for name, least in _INTEGERS.items()}
    values |= {name: _number(raw, name) for name in ("rms_norm_eps", "rope_theta", "routed_scaling_factor")}
    values |= {name: _flag(raw, name) for name in ("attention_sinks", "norm_topk_prob", "tie_word_embeddings")}
    config = Config(
        **values,
        layer_types=_layer_types(raw),
        scoring_func=_choice(raw, "scoring_func", SCORING_FUNCS),
        torch_dtype=_choice(raw, "torch_dtype", DTYPES),
        swiglu_limit=None if _get(raw, "swiglu_limit") is None else _number(raw, "swiglu_limit"),
        quantization=_quantization(_get(raw, "quantization")),
    )
    _check_sizes(config)
    return config


_INTEGERS = {
    "vocab_size": 1,
    "hidden_size": 1,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 2,
    "sliding_window": 1,
    "n_routed_experts": 1,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 1,
    "n_shared_experts": 0,
}


def _get(raw: Mapping[str, Any], name: str) -> Any:
    if name not in raw:
        raise CheckpointError(f"{name} is missing")
    return raw[name]


def _integer(raw: Mapping[str, Any], name: str, least: int) -> int:
    value = _get(raw, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise CheckpointError(f"{name} is {value!r}; an integer of at least {least} is expected")
    return value


def _number(raw: Mapping[str, Any], name: str) -> float:
    value = _get(raw, name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e300:
        raise CheckpointError(f"{name} is {value!r}; a positive number is expected")
    return float(value)


def _flag(raw: Mapping[str, Any], name: str) -> bool:
    value = _get(raw, name)
    if not isinstance(value, bool):
        raise CheckpointError(f"{name} is {value!r}; true or false is expected")
    return value


def _choice(raw: Mapping[str, Any], name: str, choices: tuple[str, ...]) -> str:
    value = _get(raw, name)
    if value not in choices:
        raise CheckpointError(f"{name} is {value!r}; one of {', '.join(choices)} is expected")
    return str(value)


def _layer_types(raw: Mapping[str, Any]) -> tuple[str, ...]:
    value, layers = _get(raw, "layer_types"), _get(raw, "num_hidden_layers")
    if not isinstance(value, list) or len(value) != layers:
        found = len(value) if isinstance(value, list) else repr(value)
        raise CheckpointError(f"layer_types has {found} entries; num_hidden_layers is {layers}")
    for i, kind in enumerate(value):
        if kind not in LAYER_TYPES:
            raise CheckpointError(f"layer_types[{i}] is {kind!r}; one of {', '.join(LAYER_TYPES)} is expected")
    return tuple(value)


def _quantization(value: Any) -> Quantization | None:
    if value is None:
        return None
    if not isinstance(value, dict) or value.get("mode", "affine") != "affine":
        raise CheckpointError(f'quantization is {value!r}; null or {{"group_size": …, "bits": …}} (affine) is expected')
    group_size, bits = _get(value, "group_size"), _get(value, "bits")
    if group_size not in QUANT_GROUPS:
        raise CheckpointError(f"quantization.group_size is {group_size!r}; one of {QUANT_GROUPS} is expected")
    if bits not in QUANT_BITS:
        raise CheckpointError(f"quantization.bits is {bits!r}; one of {QUANT_BITS} is expected")
    return Quantization(group_size=group_size, bits=bits)


def _check_sizes(config: Config) -> None:
    """Relations between keys that no single key shows."""
    if config.num_attention_heads % config.num_key_value_heads:
        raise CheckpointError(
            f"num_attention_heads ({config.num_attention_heads}) is not a multiple of num_key_value_heads "
            f"({config.num_key_value_heads})"
        )
    if config.head_dim % 2:
        raise CheckpointError(f"head_dim is {config.head_dim}; RoPE pairs its halves, so it must be even")
    if config.num_experts_per_tok > config.n_routed_experts:
        raise CheckpointError(
            f"num_experts_per_tok ({config.num_experts_per_tok}) exceeds n_routed_experts ({config.n_routed_experts})"
        )
    if config.n_routed_experts > 1 << 16:
        raise CheckpointError(f"n_routed_experts is {config.n_routed_experts}; this engine's top-k holds 65536 at most")
    if config.quantization is not None:
        _check_groups(config, config.quantization.group_size)


def _check_groups(config: Config, group_size: int) -> None:
    widths = {
        "hidden_size": config.hidden_size,
        "moe_intermediate_size": config.moe_intermediate_size,
        "num_attention_heads * head_dim": config.num_attention_heads * config.head_dim,
    }
    for name, width in widths.items():
        if width % group_size:
            raise CheckpointError(f"{name} ({width}) is not a multiple of quantization.group_size ({group_size})")
