"""How a cache keeps keys and values: as they are, or affine-quantised along their last axis.

A codec turns an array [B, H, n, D] into a tuple of arrays that share the first three axes, and back; so buffers of
either kind are grown, cut, rolled and joined by the same code (engine/caches/slots.py). Each token is encoded by
itself, hence codes don't depend on how a sequence was split into chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from engine.config import QUANT_BITS, QUANT_GROUPS

Arrays = tuple[mx.array, ...]
# What attention gets for keys, and for values: an array, or (codes, scales, biases).
Fetched = mx.array | Arrays


@dataclass(frozen=True, kw_only=True)
class Dense:
    """Keys and values as they come."""

    def encode(self, x: mx.array) -> Arrays:
        """[B, H, n, D] → the same array."""
        return (x,)

    def decode(self, parts: Arrays) -> Fetched:
        """What `encode` returned → [B, H, n, D]."""
        return parts[0]


@dataclass(frozen=True, kw_only=True)
class Affine:
    """MLX's affine quantisation: codes uint32 [B, H, n, D·bits/32], scales and biases [B, H, n, D/group_size].

    Scales and biases have the dtype of the input. `dense` says that attention gets dequantised arrays in that dtype
    and not the tuple. Raises ValueError for parameters that mx.quantize doesn't know.
    """

    group_size: int
    bits: int
    mode: str = "affine"
    dense: bool = False

    def __post_init__(self) -> None:
        if self.mode != "affine":
            raise ValueError(f"mode is {self.mode!r}; key-value caches are quantised in mode 'affine' only")
        if self.bits not in QUANT_BITS:
            raise ValueError(f"bits is {self.bits!r}; one of {QUANT_BITS} is expected")
        if self.group_size not in QUANT_GROUPS:
            raise ValueError(f"group_size is {self.group_size!r}; one of {QUANT_GROUPS} is expected")

    def encode(self, x: mx.array) -> Arrays:
        """[B, H, n, D] → codes, scales, biases; ValueError unless group_size divides D."""
        if x.shape[-1] % self.group_size:
            raise ValueError(
                f"a head size of {x.shape[-1]} isn't a multiple of group_size {self.group_size}; "
                f"take one of {QUANT_GROUPS} that divides it, or a cache that isn't quantised"
            )
        return tuple(mx.quantize(x, group_size=self.group_size, bits=self.bits, mode=self.mode))

    def decode(self, parts: Arrays) -> Fetched:
        """The tuple itself; with `dense`, its values [B, H, n, D] in the dtype of the scales."""
        if not self.dense:
            return parts
        codes, scales, biases = parts
        return mx.dequantize(codes, scales, biases, group_size=self.group_size, bits=self.bits, mode=self.mode)


Codec = Dense | Affine
DENSE = Dense()
