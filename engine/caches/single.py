"""Caches of a single sequence, or of several that are equally long: every row of the arrays has the same offset.

KVCache keeps everything, RotatingKVCache the last tokens and some of the first, ChunkedKVCache as many as the model
leaves it, QuantizedKVCache everything as codes for the quantised route of attention, DequantizingKVCache the same codes
for the ordinary route (models with sinks).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

from engine.caches.codecs import Affine
from engine.caches.kinds import Chunked, Dequantizing, Quantized, Windowed
from engine.caches.layer import LayerCache, Rules


class SingleCache(LayerCache):
    """What the five have in common: one offset, and a state of keys and values."""

    @property
    def offset(self) -> int:
        """The position of the next token: how many there were, dropped ones included."""
        return self._offsets[0]

    @property
    def state(self) -> Any:
        """(keys, values) [B, H, held, ·] in the order of time, tuples if quantised; (None, None) if nothing is held."""
        return self._stored()

    @state.setter
    def state(self, state: Any) -> None:
        dropped = self._dropped()
        self._slots, self._first = self._restored(*state), [0]
        self._offsets = [self._slots.held + dropped]

    @classmethod
    def merge(cls, caches: Sequence[Self]) -> Any:
        """The batched cache whose rows these are, each right-justified behind its left padding."""
        # Imported here: the batched classes are written in terms of these.
        from engine.caches.batched import BATCHED

        if cls not in BATCHED:
            raise ValueError(f"{cls.__name__} has no batched form: only the classes of engine.caches themselves do")
        return BATCHED[cls].merge(caches)

    def _counters(self) -> Mapping[str, Any]:
        return {"dropped": self._dropped()}

    def _set_counters(self, values: Mapping[str, str]) -> None:
        self._offsets = [self._slots.held + int(values["dropped"])]

    def _dropped(self) -> int:
        return self._offsets[0] - self._slots.held


class KVCache(SingleCache):
    """Every key and value so far."""

    def __init__(self) -> None:
        super().__init__(Rules())


class RotatingKVCache(Windowed, SingleCache):
    """A sliding window: a token sees the first `keep` tokens and the last max_size − keep, itself included.

    How a sequence was split into chunks makes no difference. Once max_size tokens have come nothing can be trimmed:
    what the window has dropped can't return.
    """

    def __init__(self, max_size: int, keep: int = 0) -> None:
        super().__init__(Rules(max_size=max_size, keep=keep))


class ChunkedKVCache(Chunked, SingleCache):
    """Everything since the last `maybe_trim_front`, which leaves the last `chunk_size` tokens.

    The mask is causal over what is held: chunked attention's rule of which chunk sees which is the model's.
    """

    def __init__(self, chunk_size: int) -> None:
        super().__init__(Rules(chunk_size=chunk_size))

    @property
    def start_position(self) -> int:
        """The position of the first token that is held."""
        return self._dropped()


class QuantizedKVCache(Quantized, SingleCache):
    """KVCache with affine-quantised contents; returns (codes, scales, biases) for engine.sdpa.quantized_sdpa."""

    def __init__(self, group_size: int = 64, bits: int = 8, mode: str = "affine") -> None:
        super().__init__(Rules(codec=Affine(group_size=group_size, bits=bits, mode=mode)))


class DequantizingKVCache(Dequantizing, SingleCache):
    """QuantizedKVCache that returns its values as arrays in the dtype of the input, for the ordinary route.

    It has no attribute `bits`, by which mlx-lm's models would choose the other route.
    """

    def __init__(self, group_size: int = 64, bits: int = 8, mode: str = "affine") -> None:
        super().__init__(Rules(codec=Affine(group_size=group_size, bits=bits, mode=mode, dense=True)))
