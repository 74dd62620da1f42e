"""One layer's cache, whatever it stores and drops: what the single-row and the batched classes have in common.

A cache is a Rules record (how tokens are stored, which of them stay), its Slots, and for each row two numbers: `first`,
the column of the first token that is held, and `offset`, how many tokens the row's history has. Both are Python
integers, because an array that is only ever added to would grow the lazy graph by a node a step. A single-row cache
has one such pair for all the rows of its arrays.

Rows are right-justified: their last tokens share a column, left padding takes up the difference, and tokens that leave
a window leave a smaller `offset - held` behind for nobody: masks count columns (engine/masks.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

import mlx.core as mx

from engine.caches.codecs import DENSE, Affine, Arrays, Codec, Fetched
from engine.caches.slots import Slots
from engine.masks import Mask, attention_mask


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How tokens are stored, and which stay.

    `max_size` tokens are visible at most, the row's first `keep` and its last max_size − keep; beyond `chunk_size`
    tokens are dropped from the front when the model asks for it. Caches join only if their rules are equal.
    """

    codec: Codec = DENSE
    max_size: int | None = None
    keep: int = 0
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_size", "chunk_size"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"{name} is {size}; at least 1 is expected")
        if not 0 <= self.keep <= (1 << 62 if self.max_size is None else self.max_size - 1):
            raise ValueError(f"keep is {self.keep}; 0 to max_size − 1 is expected, so that a new token has a place")

    @property
    def affine(self) -> Affine:
        """The codec of a quantised cache."""
        assert isinstance(self.codec, Affine)
        return self.codec


class LayerCache:
    """mlx-lm's cache protocol over Rules and Slots; B batch, H heads, n new tokens, D and Dv head sizes."""

    # Rules of the class's kind, for a cache that gets its own from a state.
    _blank: ClassVar[Rules] = Rules()

    def __init__(self, rules: Rules, padding: Sequence[int] = (0,)) -> None:
        self._rules = rules
        self._slots = Slots()
        self._first = [int(p) for p in padding]
        self._offsets = [-p for p in self._first]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Fetched, Fetched]:
        """[B, H, n, D], [B, H, n, Dv] → what the new tokens may look at: [B, H, S, D], [B, H, S, Dv] in order of time.

        S is `offset` + n, and in a sliding window min(offset, max_size − 1) + n; which key each query sees is said by
        the `make_mask(n)` of before. Quantised caches return (codes, scales, biases) each. Raises ValueError for
        shapes that don't fit the cache.
        """
        codec, room = self._rules.codec, self._room()
        new_keys, new_values = codec.encode(keys), codec.encode(values)
        if room is not None:
            self._make_room(room)
        self._slots.append(new_keys + new_values)
        self._offsets = [offset + keys.shape[2] for offset in self._offsets]
        view = self._slots.view()
        return codec.decode(view[: len(new_keys)]), codec.decode(view[len(new_keys) :])

    def make_mask(self, N: int, window_size: int | None = None, return_array: bool = False) -> Mask:
        """The mask for the next `update_and_fetch` of N tokens; see engine.masks.attention_mask for its forms.

        A `window_size` narrows what the cache itself shows; the `keep` first tokens stay visible.
        """
        first, cut = self._after(self._room())
        windows = [w for w in (window_size, self._window()) if w is not None]
        return attention_mask(
            N,
            offset=self._slots.end - cut,
            window_size=min(windows, default=None),
            left_padding=[column - cut for column in first],
            keep=self._rules.keep,
            return_array=return_array,
        )

    def is_trimmable(self) -> bool:
        """Whether the last tokens can be taken back: not once a window has dropped tokens that would have to return."""
        return self._rules.max_size is None or max(self._offsets, default=0) < self._rules.max_size

    def trim(self, n: int) -> int:
        """Forget the last n tokens, or as many as are held; how many that were, 0 if the cache isn't trimmable."""
        n = min(n, self._slots.held) if self.is_trimmable() else 0
        if n < 0:
            raise ValueError(f"n is {n}; a number of tokens to forget, at least 0, is expected")
        self._slots.end -= n
        self._offsets = [offset - n for offset in self._offsets]
        return n

    def size(self) -> int:
        """How many columns the next token could look at."""
        held = self._slots.held
        return held if self._rules.max_size is None else min(held, self._rules.max_size)

    def empty(self) -> bool:
        """Whether nothing is held."""
        return self._slots.held == 0

    @property
    def codec(self) -> Codec:
        """How tokens are stored."""
        return self._rules.codec

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, room to grow included."""
        return self._slots.nbytes

    @property
    def keys(self) -> Fetched | None:
        """The stored keys in the order of time, or (codes, scales, biases); None if nothing is held."""
        return self._stored()[0]

    @property
    def values(self) -> Fetched | None:
        """The stored values, as `keys`."""
        return self._stored()[1]

    @property
    def meta_state(self) -> tuple[str, ...]:
        """Everything that `state` doesn't say, as "name=value": the rules, and what derived classes add."""
        found = {f.name: getattr(self._rules, f.name) for f in fields(Rules) if f.name != "codec"}
        if isinstance(codec := self._rules.codec, Affine):
            found |= {f.name: getattr(codec, f.name) for f in fields(Affine) if f.name != "dense"}
        found |= self._counters()
        return tuple(f"{name}={value}" for name, value in found.items() if value is not None)

    @meta_state.setter
    def meta_state(self, meta: Sequence[str]) -> None:
        values = dict(item.split("=", 1) for item in meta)
        codec = self._rules.codec
        if ("bits" in values) != isinstance(codec, Affine):
            raise ValueError(f"a state with {' '.join(meta)} is not one of a {type(self).__name__}")
        if isinstance(codec, Affine):
            codec = replace(codec, group_size=int(values["group_size"]), bits=int(values["bits"]), mode=values["mode"])
        sizes = {name: int(values[name]) if name in values else None for name in ("max_size", "chunk_size")}
        self._rules = Rules(codec=codec, keep=int(values.get("keep", 0)), **sizes)
        self._set_counters(values)

    @classmethod
    def from_state(cls, state: Any, meta_state: Sequence[str]) -> Self:
        """The cache whose `state` and `meta_state` these are."""
        cache = cls._of(cls._blank)
        cache.state, cache.meta_state = state, meta_state
        return cache

    @classmethod
    def _of(cls, rules: Rules, padding: Sequence[int] = (0,)) -> Self:
        """An empty cache of these rules, whatever the constructor of `cls` asks for."""
        cache = cls.__new__(cls)
        LayerCache.__init__(cache, rules, padding)
        return cache

    @property
    def state(self) -> Any:
        """The arrays that, with `meta_state`, are the cache; they must be evaluated with each step."""
        return self._stored()

    @state.setter
    def state(self, state: Any) -> None:
        raise TypeError("a state belongs to a single-row or a batched cache")

    def _counters(self) -> Mapping[str, Any]:
        return {}

    def _set_counters(self, values: Mapping[str, str]) -> None:
        """Take back what `_counters` gave."""

    def _window(self) -> int | None:
        """How many of the newest tokens a window shows."""
        return None if self._rules.max_size is None else self._rules.max_size - self._rules.keep

    def _room(self) -> int | None:
        """How many columns may be left before an update: a window's first new token counts itself."""
        return None if self._rules.max_size is None else self._rules.max_size - 1

    def _excess(self) -> Sequence[int]:
        """By how many columns each row must move right, because its last ones are right padding."""
        return [0] * len(self._first)

    def _after(self, room: int | None) -> tuple[list[int], int]:
        """What `_make_room(room)` would leave: the rows' first columns, and the first of all."""
        if room is None:
            return self._first, self._slots.start
        cut = max(self._slots.start, self._slots.end - room)
        return [max(first + moved, cut) for first, moved in zip(self._first, self._excess(), strict=True)], cut

    def _make_room(self, room: int | None) -> None:
        """Move right padding out of the rows' ends; then drop all but the last `room` columns, each row's first `keep`
        tokens taking the place of the oldest others."""
        excess = self._excess()
        if any(excess):
            self._slots.roll(excess)
            self._first = [first + moved for first, moved in zip(self._first, excess, strict=True)]
            self._offsets = [offset - moved for offset, moved in zip(self._offsets, excess, strict=True)]
        first, cut = self._after(room)
        if cut > self._slots.start:
            if self._rules.keep:
                # A row that loses nothing but padding keeps its columns: it is carried from where it goes.
                self._slots.carry([min(f, cut) for f in self._first], cut, self._rules.keep)
            self._first, self._slots.start = first, cut

    def _stored(self) -> tuple[Fetched | None, Fetched | None]:
        if self.empty():
            return None, None
        view = self._slots.view()
        half = len(view) // 2
        return _packed(view[:half]), _packed(view[half:])

    def _restored(self, keys: Fetched | None, values: Fetched | None) -> Slots:
        """Slots of stored keys and values; ValueError unless they are of this cache's kind."""
        if keys is None or values is None:
            return Slots()
        parts = 3 if isinstance(self._rules.codec, Affine) else 1
        flat = [_flat(keys), _flat(values)]
        if any(len(x) != parts for x in flat):
            raise ValueError(f"the state of a {type(self).__name__} has {parts} arrays for keys and for values each")
        return Slots(flat[0] + flat[1])


def _packed(parts: Arrays) -> Fetched:
    return parts[0] if len(parts) == 1 else parts


def _flat(stored: Fetched) -> Arrays:
    return (stored,) if isinstance(stored, mx.array) else tuple(stored)
