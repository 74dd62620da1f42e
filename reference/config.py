"""What the reference reads from a checkpoint's config.json (Hugging Face layout)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reference.errors import CheckpointError

SCORINGS = ("softmax", "topk_softmax", "sigmoid", "sqrtsoftplus")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes and switches of a decoder, under the Hugging Face names; `windows[i]` is None for a full layer."""

    vocab_size: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    windows: tuple[int | None, ...]
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
    quantization: Mapping[str, int] | None

    @property
    def scoring_bias(self) -> bool:
        """Whether the router adds a bias to the scores it selects by (DeepSeek's e_score_correction_bias)."""
        return self.scoring_func in ("sigmoid", "sqrtsoftplus")


def read_config(folder: Path) -> Config:
    """The Config of the checkpoint in `folder`; CheckpointError names the key that is missing or makes no sense."""
    path = folder / "config.json"
    try:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{path}: can't be read ({error.strerror}); name a folder in the Hugging Face layout"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: holds no JSON object")
    try:
        return _config(raw)
    except KeyError as error:
        raise CheckpointError(f"{path}: {error.args[0]!r} is missing") from error
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _config(raw: Mapping[str, Any]) -> Config:
    kinds = raw["layer_types"]
    if len(kinds) != raw["num_hidden_layers"]:
        raise ValueError(f"layer_types names {len(kinds)} layers, num_hidden_layers says {raw['num_hidden_layers']}")
    if unknown := set(kinds) - {"sliding_attention", "full_attention"}:
        raise ValueError(f"unknown layer_types {sorted(unknown)}")
    window = int(raw["sliding_window"]) if "sliding_attention" in kinds else 0
    if "sliding_attention" in kinds and window < 1:
        raise ValueError(f"sliding_window is {window}, it must be at least 1")
    if raw["scoring_func"] not in SCORINGS:
        raise ValueError(f"scoring_func {raw['scoring_func']!r} is none of {', '.join(SCORINGS)}")
    limit = raw.get("swiglu_limit")
    return Config(
        vocab_size=int(raw["vocab_size"]),
        hidden_size=int(raw["hidden_size"]),
        num_attention_heads=int(raw["num_attention_heads"]),
        num_key_value_heads=int(raw["num_key_value_heads"]),
        head_dim=int(raw["head_dim"]),
        rms_norm_eps=float(raw["rms_norm_eps"]),
        rope_theta=float(raw["rope_theta"]),
        windows=tuple(window if kind == "sliding_attention" else None for kind in kinds),
        attention_sinks=bool(raw.get("attention_sinks", False)),
        n_routed_experts=int(raw["n_routed_experts"]),
        num_experts_per_tok=int(raw["num_experts_per_tok"]),
        moe_intermediate_size=int(raw["moe_intermediate_size"]),
        n_shared_experts=int(raw.get("n_shared_experts", 0)),
        scoring_func=raw["scoring_func"],
        norm_topk_prob=bool(raw["norm_topk_prob"]),
        routed_scaling_factor=float(raw.get("routed_scaling_factor", 1.0)),
        swiglu_limit=None if limit is None else float(limit),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        quantization=raw.get("quantization"),
    )
