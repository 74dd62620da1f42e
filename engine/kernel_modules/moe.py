"""The mixture-of-experts block by kernel_router, the routed matmuls over a GGUF file's blocks (expert-major for several
tokens, by vector for one) and kernel_swiglu. The router's logits, the shared experts and the weighted sum stay MLX's.

B batch, L tokens, D hidden_size, F width of an expert, K experts a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from engine.checkpoint import Blocks
from engine.config import Config
from engine.kernel_modules.place import Note, Place
from engine.metal.kernels import ops
from engine.module import Module
from engine.moe import Experts, MoE
from engine.probes import Probe


class KernelMoE(MoE):
    """MoE whose choice of experts and whose experts are kernels; `note` is told of every launch."""

    def __init__(self, config: Config, stacks: Mapping[str, Blocks], place: Place, note: Note) -> None:
        super().__init__(config, (None, None, None))
        self._place = place
        self._run = place.run(note, "experts")
        self.experts = KernelExperts(config, stacks, place, note)

    def choose(self, logits: mx.array) -> tuple[mx.array, mx.array]:
        """(B, L, E) float32 logits → (B, L, K) int32 ids and float32 weights, best first."""
        config, place, bias = self._config, self._place, self.gate.get("e_score_correction_bias")
        ids, weights = ops.route(
            place.enter(logits.reshape(-1, logits.shape[-1])),
            None if bias is None else place.enter(bias),
            config.num_experts_per_tok,
            config.scoring_func,
            run=self._run,
            normalise=config.norm_topk_prob,
            factor=config.routed_scaling_factor,
        )
        shape = (*logits.shape[:-1], -1)
        return place.leave(ids).reshape(shape), place.leave(weights).reshape(shape)


class KernelExperts(Experts):
    """(B, L, D) and (B, L, K) ids → (B, L, K, D), every step rounded to the dtype of x as it leaves a kernel."""

    def __init__(self, config: Config, stacks: Mapping[str, Blocks], place: Place, note: Note) -> None:
        Module.__init__(self)  # Experts would make parameters of its own
        self.limit = config.swiglu_limit
        self._place, self._note = place, note
        # The underscore keeps what is in MLX's arrays out of the parameters.
        self._stacks = {name: (stack.kind, place.hold(stack.data)) for name, stack in stacks.items()}

    def __call__(self, x: mx.array, ids: mx.array, probe: Probe | None = None) -> mx.array:
        rows = self._place.enter(x.reshape(-1, x.shape[-1]))
        chosen = self._place.enter(ids.reshape(-1, ids.shape[-1]))
        gate = self._project("gate", rows, chosen)
        up = self._project("up", rows, chosen)
        act = ops.swiglu(gate, up, self.limit, run=self._place.run(self._note, "act"))
        down = self._project("down", act, chosen)
        values = {"gate": gate, "up": up, "act": act, "down": down}
        out = {name: self._place.leave(value).reshape(*ids.shape, -1) for name, value in values.items()}
        if probe is not None:
            for name, value in out.items():
                probe(name, value)
        return out["down"]

    def _project(self, name: str, x: Any, ids: Any) -> Any:
        """x (B·L, in) or (B·L, K, in) by the stack's experts `ids` → (B·L, K, out).

        The vector kernel keeps weights in float32. A float16 run's weights are their values rounded to float16, which
        the expert-major kernel multiplies, so there it serves single tokens too: by vector, outputs were off by up to
        3.6 times what rounding them allows.
        """
        kind, data = self._stacks[name]
        product = ops.mul_mv_id if len(ids) == 1 and ops.dtype_name(x) == "float32" else ops.mul_mm_id
        with np.errstate(over="ignore"):  # an infinity is a result too, and the audit names it
            return product(x, data, ids, kind, run=self._place.run(self._note, name)).astype(x.dtype)
