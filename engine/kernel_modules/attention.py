"""Attention with RoPE by kernel_rope, a single query by kernel_attention, and kernel_softmax over quantised keys.

B batch, L new tokens, S keys, Hq and Hkv heads, Dh head_dim.
"""

from __future__ import annotations

import mlx.core as mx

from engine.attention import Attention
from engine.caches import Cache
from engine.caches.codecs import Fetched
from engine.config import Config
from engine.kernel_modules.place import Note, Place
from engine.masks import Mask
from engine.metal.kernels import ops
from engine.metal.table import MOST_HEAD_DIM


class KernelAttention(Attention):
    """(B, L, D) → (B, L, D): what engine/attention.py computes, with the kernels that there are; `note` is told."""

    def __init__(self, config: Config, place: Place, note: Note) -> None:
        super().__init__(config)
        self._place, self._note = place, note

    def attend(self, q: mx.array, keys: Fetched, values: Fetched, mask: Mask, cache: Cache) -> mx.array:
        """As Attention.attend; more than one query over dense keys, and heads beyond the kernel's room, are MLX's."""
        fits = q.shape[2] == 1 and self.head_dim <= MOST_HEAD_DIM
        if fits and isinstance(keys, mx.array) and isinstance(values, mx.array):
            return self._single(q, keys, values, mask)
        return super().attend(q, keys, values, mask, cache)

    def _single(self, q: mx.array, keys: mx.array, values: mx.array, mask: Mask) -> mx.array:
        """q (B, Hq, 1, Dh), keys and values (B, Hkv, S, Dh), mask None or bool, one row or B → (B, Hq, 1, Dh)."""
        enter, sinks = self._place.enter, self.get("sinks")
        B, S = keys.shape[0], keys.shape[2]
        # "causal" hides nothing from the last token.
        shown = mx.broadcast_to(mask.reshape(-1, S), (B, S)) if isinstance(mask, mx.array) else None
        context = ops.attention(
            enter(q[:, :, 0]),
            enter(keys),
            enter(values),
            scale=self.scale,
            mask=None if shown is None else enter(shown),
            sinks=None if sinks is None else enter(sinks),
            run=self._place.run(self._note, "context"),
        )
        return self._place.leave(context)[:, :, None]

    def softmax(self, scores: mx.array) -> mx.array:
        """(…, S) float32 → (…, S): softmax over the last axis."""
        place = self._place
        return place.leave(ops.softmax(place.enter(scores), run=place.run(self._note, "context")))

    def rope(self, x: mx.array, offset: int | mx.array, probe: str) -> mx.array:
        """(B, H, L, Dh) at positions offset…, as Attention.rope."""
        place = self._place
        B, H, L, Dh = x.shape
        positions = mx.broadcast_to(mx.array(offset).reshape(-1, 1) + mx.arange(L), (B, L)).flatten()
        tokens = place.enter(x.swapaxes(1, 2).reshape(B * L, H, Dh))
        turned = ops.rope(tokens, place.enter(positions), self.rope_theta, run=place.run(self._note, probe))
        return place.leave(turned).reshape(B, L, H, Dh).swapaxes(1, 2)
