"""What a sliding, a chunked and a quantised cache have besides the rest, be it of one row or of a batch."""

from __future__ import annotations

from engine.caches.codecs import Affine
from engine.caches.layer import LayerCache, Rules


class Windowed(LayerCache):
    """A cache that drops tokens by itself."""

    _blank = Rules(max_size=1)

    @property
    def max_size(self) -> int:
        """How many tokens are visible at most."""
        return self._rules.max_size or 0

    @property
    def keep(self) -> int:
        """How many of the first tokens stay."""
        return self._rules.keep


class Chunked(LayerCache):
    """A cache that drops tokens when the model asks for it."""

    _blank = Rules(chunk_size=1)

    @property
    def chunk_size(self) -> int:
        """How many tokens `maybe_trim_front` leaves."""
        return self._rules.chunk_size or 0

    def maybe_trim_front(self) -> None:
        """Drop all but each row's last `chunk_size` tokens."""
        self._make_room(self._rules.chunk_size)


class Quantized(LayerCache):
    """A cache that returns codes; mlx-lm's models take the quantised route for one that has the attribute `bits`."""

    _blank = Rules(codec=Affine(group_size=64, bits=8))

    @property
    def group_size(self) -> int:
        """How many consecutive numbers share a scale and a bias."""
        return self._rules.affine.group_size

    @property
    def bits(self) -> int:
        """Bits a number."""
        return self._rules.affine.bits

    @property
    def mode(self) -> str:
        """The quantisation's mode, as mx.quantize names it."""
        return self._rules.affine.mode


class Dequantizing(LayerCache):
    """A cache that stores codes and returns arrays; without the attribute `bits`, hence for the ordinary route."""

    _blank = Rules(codec=Affine(group_size=64, bits=8, dense=True))
