"""The decoder's modules with the engine's own Metal kernels in the place of MLX's, on the host or an Apple GPU.

Parameters keep their names, and what is computed is what the modules of engine/model.py compute. Kernels do RMSNorm,
RoPE, the attention of a single query (and the softmax over quantised keys), the choice of experts, the routed experts
and their SwiGLU; the dense projections, prefill's attention and the shared experts stay MLX's.
"""

from __future__ import annotations

from collections.abc import Mapping

from engine.checkpoint import PROJECTIONS, Blocks
from engine.config import Config
from engine.kernel_modules.attention import KernelAttention
from engine.kernel_modules.moe import KernelMoE
from engine.kernel_modules.norm import KernelNorm
from engine.kernel_modules.place import PLACES, Note, Place, scoped_note
from engine.model import Decoder

__all__ = ["PLACES", "Note", "Place", "install"]


def install(model: Decoder, config: Config, blocks: Mapping[str, Blocks], place: Place, note: Note) -> None:
    """Put kernels into every layer of `model`, whose weights aren't loaded yet; `blocks` has the experts by name."""
    model.model.norm = KernelNorm(config, place, note, "final_norm")
    for i, layer in enumerate(model.model.layers):
        told = scoped_note(note, f"layers.{i}")
        stacks = {p: blocks[f"model.layers.{i}.mlp.experts.{p}_proj.weight"] for p in PROJECTIONS}
        layer.input_layernorm = KernelNorm(config, place, told, "attn_norm")
        layer.self_attn = KernelAttention(config, place, scoped_note(told, "attn"))
        layer.post_attention_layernorm = KernelNorm(config, place, told, "mlp_norm")
        layer.mlp = KernelMoE(config, stacks, place, scoped_note(told, "moe"))
