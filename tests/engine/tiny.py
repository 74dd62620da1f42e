"""Tiny random checkpoints on disk, for any test: every config option, affine quantisation, shards, experts in GGUF.

Weights are scaled so that activations stay near 1 and every option shows in the output: biases aren't zero, sinks and
router scores spread, gate and up projections reach the clamp.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np
from safetensors.numpy import save_file

Array = np.ndarray[Any, np.dtype[Any]]

CONFIG: dict[str, Any] = {
    "architectures": ["AssayMoeForCausalLM"],
    "model_type": "assay_moe",
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 5,
    "attention_sinks": True,
    "n_routed_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "scoring_func": "sqrtsoftplus",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "quantization": None,
}
# Smallest block bytes and the byte offsets of each format's half-precision scales (llama.cpp, ggml-common.h).
BLOCKS = {
    "Q8_0": (32, 34, (0,)),
    "Q2_K": (256, 84, (80, 82)),
    "Q3_K": (256, 110, (108,)),
    "Q4_K": (256, 144, (0, 2)),
    "Q5_K": (256, 176, (0, 2)),
    "Q6_K": (256, 210, (208,)),
    "IQ2_XXS": (256, 66, (0,)),
}


def make_checkpoint(
    folder: Path,
    seed: int = 0,
    *,
    stored: str = "float32",
    shards: int = 1,
    gguf: str | None = None,
    edit: Any = None,
    **config: Any,
) -> Path:
    """Write a checkpoint into `folder` and return it.

    `config` overrides keys of CONFIG (layer_types is cut or repeated to num_hidden_layers unless given). `stored` is
    the dtype of floating tensors in the file, `shards` the number of files, `gguf` the block format of experts.gguf
    (Q8_0, Q2_K … Q6_K, IQ2_XXS, F16, F32; None: experts in the safetensors). `edit(tensors)` may change the tensors
    before they are saved.
    """
    merged = CONFIG | config
    if "layer_types" not in config:
        merged["layer_types"] = [CONFIG["layer_types"][i % 2] for i in range(merged["num_hidden_layers"])]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(merged, indent=1), encoding="utf-8")
    rng = np.random.default_rng(seed)
    tensors = random_weights(rng, merged)
    if gguf is not None:
        write_gguf(folder / "experts.gguf", {n: tensors.pop(n) for n in list(tensors) if ".experts." in n}, gguf, rng)
    if merged["quantization"] is not None:
        tensors = quantized(tensors, **merged["quantization"])
    tensors = {n: cast(x, "float32" if n.endswith("correction_bias") else stored) for n, x in tensors.items()}
    if edit is not None:
        edit(tensors)
    save(folder, tensors, shards)
    return folder


def random_weights(rng: np.random.Generator, config: dict[str, Any]) -> dict[str, Array]:
    """Float32 tensors of `config` under the checkpoint's names."""
    D, V, E, F = (config[k] for k in ("hidden_size", "vocab_size", "n_routed_experts", "moe_intermediate_size"))
    Hq, Hkv, Dh = (config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))

    def normal(*shape: int, scale: float = 1.0) -> Array:
        return (rng.standard_normal(shape) * scale / np.sqrt(shape[-1])).astype(np.float32)

    def near_one(n: int) -> Array:
        return (1 + 0.2 * rng.standard_normal(n)).astype(np.float32)

    tensors = {"model.embed_tokens.weight": normal(V, D, scale=np.sqrt(D)), "model.norm.weight": near_one(D)}
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = normal(V, D, scale=2.0)
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        tensors[p + "input_layernorm.weight"] = near_one(D)
        tensors[p + "post_attention_layernorm.weight"] = near_one(D)
        for name, shape in {"q": (Hq * Dh, D), "k": (Hkv * Dh, D), "v": (Hkv * Dh, D), "o": (D, Hq * Dh)}.items():
            tensors[p + f"self_attn.{name}_proj.weight"] = normal(*shape, scale=1.5)
        if config["attention_sinks"]:
            tensors[p + "self_attn.sinks"] = rng.standard_normal(Hq).astype(np.float32)
        tensors[p + "mlp.gate.weight"] = normal(E, D, scale=1.5)
        if config["scoring_func"] in ("sigmoid", "sqrtsoftplus"):
            tensors[p + "mlp.gate.e_score_correction_bias"] = (0.3 * rng.standard_normal(E)).astype(np.float32)
        wide = F * config["n_shared_experts"]
        for owner, lead, width in (("experts", (E,), F), *((("shared_experts", (), wide),) if wide else ())):
            tensors[p + f"mlp.{owner}.gate_proj.weight"] = normal(*lead, width, D, scale=2.0)
            tensors[p + f"mlp.{owner}.up_proj.weight"] = normal(*lead, width, D, scale=2.0)
            tensors[p + f"mlp.{owner}.down_proj.weight"] = normal(*lead, D, width)
    return tensors


def is_linear(name: str) -> bool:
    """Whether quantisation applies: linear and stacked expert projections, not embeddings, router, norms or sinks."""
    return name.endswith("_proj.weight") or name == "lm_head.weight"


def quantized(tensors: dict[str, Array], *, group_size: int, bits: int) -> dict[str, Array]:
    """`tensors` with each linear weight as MLX's affine triple: packed weight, scales, biases."""
    result: dict[str, Array] = {}
    for name, x in tensors.items():
        if not is_linear(name):
            result[name] = x
            continue
        stem = name.removesuffix("weight")
        parts = mx.quantize(mx.array(x), group_size=group_size, bits=bits)
        for part, value in zip(("weight", "scales", "biases"), parts, strict=True):
            result[stem + part] = np.array(value)
    return result


def cast(x: Array, dtype: str) -> Array:
    """Floating `x` rounded to `dtype`; anything else as it is."""
    return x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype) if x.dtype == np.float32 else x


def save(folder: Path, tensors: dict[str, Array], shards: int = 1) -> None:
    """model.safetensors, or `shards` files with their index."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    where: dict[str, str] = {}
    for i in range(shards):
        part = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        names = list(tensors)[i::shards]
        save_file({name: tensors[name] for name in names}, folder / part)
        where |= dict.fromkeys(names, part)
    index = json.dumps({"metadata": {}, "weight_map": where})
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")


def random_blocks(rng: np.random.Generator, kind: str, rows: tuple[int, ...], width: int, scale: float = 2e-3) -> Array:
    """(*rows, bytes) uint8: random blocks of `kind`, `width` elements a row, with finite scales of about `scale`."""
    elements, size, halves = BLOCKS[kind]
    if width % elements:
        raise ValueError(f"{width} elements are not whole {kind} blocks of {elements}")
    blocks = rng.integers(0, 256, (*rows, width // elements, size), dtype=np.uint8)
    for start in halves:
        d = (scale * rng.uniform(0.5, 1.5, blocks.shape[:-1])).astype(np.float16)
        blocks[..., start : start + 2] = d[..., None].view(np.uint8)
    return blocks.reshape(*rows, -1)


def write_gguf(path: Path, experts: dict[str, Array], kind: str, rng: np.random.Generator) -> None:
    """experts.gguf with llama.cpp's names: `experts` themselves in F16 or F32, else random blocks of their shapes."""
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, "assay")
    for name, x in experts.items():
        layer, projection = name.split(".")[2], name.split(".")[5].removesuffix("_proj")
        gguf_name = f"blk.{layer}.ffn_{projection}_exps.weight"
        if kind in ("F16", "F32"):
            writer.add_tensor(gguf_name, x.astype(np.float16 if kind == "F16" else np.float32))
            continue
        blocks = random_blocks(rng, kind, x.shape[:-1], x.shape[-1])
        writer.add_tensor(gguf_name, blocks, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
