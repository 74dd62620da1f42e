"""The mixture-of-experts block with its routed part in the engine's own Metal kernels, run by the host executor.

What it computes is engine/moe.py's; what computes it is kernel_router, the routed matmuls over the GGUF file's blocks
(expert-major for several tokens, by vector for one) and kernel_swiglu. Arrays leave MLX and come back at this block's
edge; the router's logits, the shared experts and the weighted sum stay MLX's. L tokens, D hidden_size, F width of an
expert, K experts a token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import mlx.core as mx
import numpy as np

from engine.checkpoint import PROJECTIONS, Blocks
from engine.config import Config
from engine.metal import table
from engine.metal.kernels import host
from engine.model import Decoder
from engine.module import Module
from engine.moe import Experts, MoE
from engine.probes import Array, Probe, to_numpy

# Called with the probe that a launch is for, and the kernel's name.
Note = Callable[[str, str], None]
# The matmuls' kernels take these; a bfloat16 has no place in half-precision tiles.
DTYPES = tuple(table.RHS)


def install(model: Decoder, config: Config, blocks: Mapping[str, Blocks], note: Note) -> None:
    """Put the host's kernels in the place of every layer's routed experts, whose stacks `blocks` holds by name."""
    for i, layer in enumerate(model.model.layers):
        stacks = {p: blocks[f"model.layers.{i}.mlp.experts.{p}_proj.weight"] for p in PROJECTIONS}
        layer.mlp = HostMoE(config, stacks, _scoped(note, f"layers.{i}.moe"))


def _scoped(note: Note, prefix: str) -> Note:
    return lambda probe, kernel: note(f"{prefix}.{probe}", kernel)


class HostMoE(MoE):
    """MoE whose choice of experts and whose experts are kernels; `note` is told of every launch."""

    def __init__(self, config: Config, stacks: Mapping[str, Blocks], note: Note) -> None:
        super().__init__(config, (None, None, None))
        self._note = note
        self.experts = HostExperts(config, stacks, note)

    def choose(self, logits: mx.array) -> tuple[mx.array, mx.array]:
        """(1, L, E) float32 logits → (1, L, K) int32 ids and float32 weights, best first."""
        config, bias = self._config, self.gate.get("e_score_correction_bias")
        rows = to_numpy(logits)[0]
        self._note("experts", table.plan_router(*rows.shape).kernel)
        ids, weights = host.route(
            rows,
            None if bias is None else to_numpy(bias),
            config.num_experts_per_tok,
            config.scoring_func,
            normalise=config.norm_topk_prob,
            factor=config.routed_scaling_factor,
        )
        return mx.array(ids)[None], mx.array(weights)[None]


class HostExperts(Experts):
    """(1, L, D) and (1, L, K) ids → (1, L, K, D), every step rounded to the dtype of x as it leaves a kernel."""

    def __init__(self, config: Config, stacks: Mapping[str, Blocks], note: Note) -> None:
        Module.__init__(self)  # Experts would make parameters of its own
        self.limit = config.swiglu_limit
        self._stacks = stacks
        self._note = note

    def __call__(self, x: mx.array, ids: mx.array, probe: Probe | None = None) -> mx.array:
        rows, chosen = to_numpy(x)[0], to_numpy(ids)[0]
        gate = self._project("gate", rows, chosen)
        up = self._project("up", rows, chosen)
        self._note("act", table.plan_swiglu(gate.dtype.name, gate.size // gate.shape[-1], gate.shape[-1]).kernel)
        act = host.swiglu(gate, up, self.limit)
        down = self._project("down", act, chosen)
        if probe is not None:
            for name, values in (("gate", gate), ("up", up), ("act", act)):
                probe(name, mx.array(values)[None])
        result = mx.array(down)[None]
        if probe is not None:
            probe("down", result)
        return result

    def _project(self, name: str, x: Array, ids: Array) -> Array:
        """x (L, in) or (L, K, in) by the stack's experts `ids` → (L, K, out).

        The vector kernel keeps weights in float32. A float16 run's weights are their values rounded to float16, which
        the expert-major kernel multiplies, so there it serves single tokens too: by vector, outputs were off by up to
        3.6 times what rounding them allows.
        """
        stack, dtype = self._stacks[name], x.dtype.name
        tokens, (experts, rows, _) = len(ids), stack.data.shape
        if tokens == 1 and dtype == "float32":
            self._note(name, table.plan_mul_mv_id(stack.kind, dtype, ids.size, rows).kernel)
            result = host.mul_mv_id(x, stack.data, ids, stack.kind)
        else:
            self._note(name, table.plan_mul_mm_id_map(experts).kernel)
            self._note(name, table.plan_mul_mm_id(stack.kind, dtype, tokens, rows, experts).kernel)
            result = host.mul_mm_id(x, stack.data, ids, stack.kind)
        with np.errstate(over="ignore"):  # an infinity is a result too, and the audit names it
            return result.astype(x.dtype)
