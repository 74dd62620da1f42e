"""What is looked at on a candidate's cache after each operation: fetched arrays, the mask, and what the cache says.

`fetch` judges an update's result against the model's rows, `keep` that arrays returned before stay as they were, and
`counts` offset, size, empty and the options that the cache shows. Each raises Found with what is wrong.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from audits import cache_object as obj
from audits.cache_contents import Contents, Found
from audits.cache_judge import Fetch, judge, visible_places
from audits.cache_model import Row, Rules, Sight
from audits.cache_values import KEY, VALUE, Tokens
from audits.contract import Finding
from audits.frameworks import take

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass
class Live:
    """A candidate's cache beside its model.

    fetched: arrays it returned, the places [B, S] in them that queries saw, and what they held.
    """

    cache: Any
    rows: list[Row]
    batched: bool
    derived: bool = False  # not of the factory's class
    fed: bool = False
    fetched: list[tuple[Any, tuple[Array, Array], bytes]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Look:
    """How the caches of one program are looked at. `digest` takes in everything that was fetched."""

    framework: str
    options: Mapping[str, Any]
    rules: Rules
    bits: int | None
    tokens: Tokens
    contents: Contents
    digest: Any = field(default_factory=hashlib.sha256)

    def fetch(
        self, live: Live, fetched: tuple[Any, Any], mask: Any, sights: Sequence[Sight], shapes: tuple[Any, Any]
    ) -> Array:
        """Found if something is wrong with a fetch; the places [B, S] that some query saw."""
        found = []
        for x, shape, name in zip(fetched, shapes, ("keys", "values"), strict=True):
            full, parts, finding = obj.dense(x, self.bits, self.tokens.dtype)
            if finding is not None:
                raise Found(Finding(check=finding.check, message=f"{name}: {finding.message}"))
            if full.ndim != 4 or (*full.shape[:2], full.shape[3]) != (*shape[:2], shape[3]):
                expected = [*shape[:2], "S", shape[3]]
                raise Found(Finding(check="shape", message=f"{name} are {list(full.shape)}, expected {expected}"))
            found.append((full, parts))
            for part in parts or (full,):
                self.digest.update(np.ascontiguousarray(part).tobytes())
        (keys, key_parts), (values, value_parts) = found
        for x, name in ((keys, "keys"), (values, "values")):
            if not np.isfinite(x.astype(np.float32, copy=False)).all():
                message = (
                    f"{name} hold NaN or infinity, which attention turns into NaN even where it gives them no weight"
                )
                raise Found(Finding(check="finite", message=message))
        if keys.shape[2] != values.shape[2]:
            message = f"{keys.shape[2]} keys are returned, but {values.shape[2]} values"
            raise Found(Finding(check="shape", message=message))
        if isinstance(mask, np.ndarray):
            self.digest.update(np.ascontiguousarray(mask).tobytes())
        visible = visible_places(mask, (*keys.shape[:2], shapes[0][2], keys.shape[2]))
        if isinstance(visible, Finding):
            raise Found(visible)
        finding, serials = judge(Fetch(keys, values, visible), live.rows, sights, self.tokens)
        if finding is not None:
            raise Found(finding)
        seen = np.stack([visible[b][s.queries].any(0) for b, s in enumerate(sights)])
        for kind, full, parts in ((KEY, keys, key_parts), (VALUE, values, value_parts)):
            self.contents.check(kind, full, parts, serials[kind], seen, live.rows)
        return seen

    def keep(self, live: Live, fetched: tuple[Any, Any], seen: tuple[Array, Array]) -> None:
        """What was seen in arrays that were returned stays as it is while tokens are only appended.

        A ring that has wrapped, and trimming, may reuse their memory: attention is done with them by then.
        """
        for x, places, before in live.fetched:
            if _at(x, places) != before:
                message = "arrays that an earlier update returned have changed, though tokens were only appended"
                raise Found(Finding(check="fetched unchanged", message=message))
        size = self.rules.max_size
        if size is not None and max(len(row.tokens) for row in live.rows) >= size:
            live.fetched.clear()
        elif self.framework != "mlx":
            arrays = [x for part in fetched for x in (part if isinstance(part, tuple | list) else (part,))]
            live.fetched = [*live.fetched[-2:], *((x, seen, _at(x, seen)) for x in arrays)]

    def counts(self, live: Live) -> None:
        """offset, size, empty, and the options that the cache shows as attributes."""
        cache = live.cache
        if obj.has(cache, "offset"):
            actual, expected = obj.offsets(cache), [row.offset for row in live.rows]
            if actual != (expected if live.batched else expected[:1]):
                shown = expected if live.batched else expected[0]
                message = f"offset is {actual if live.batched else actual[0]}, expected {shown}"
                raise Found(Finding(check="offset", message=message))
        longest = max(len(row.tokens) - row.dropped for row in live.rows)
        if longest and obj.has(cache, "empty") and obj.call("empty", lambda: bool(cache.empty())):
            raise Found(Finding(check="empty", message=f"empty() says True of {longest} tokens"))
        if obj.has(cache, "size"):
            self._size(live, obj.call("size", lambda: int(cache.size())), longest)
        for name, expected in self.options.items():
            if name != "left_padding" and (found := obj.shown(cache, name, expected)):
                raise Found(Finding(check="options", message=f"{name} has become {found}, it was {expected}"))

    def _size(self, live: Live, size: int, longest: int) -> None:
        """0 (mlx-lm's caches needn't tell), or the columns that the next token could see, padding included."""
        if size == 0:
            return
        cap = self.rules.max_size
        low = longest if cap is None else min(longest, cap)
        high = len(self.tokens.labels) + max(row.padding for row in live.rows)
        high = max(low, high if live.batched else longest if cap is None else cap)
        if not low <= size <= high:
            raise Found(Finding(check="size", message=f"size() is {size} of {longest} tokens"))


def _at(x: Any, places: tuple[Array, Array]) -> bytes:
    """The bytes of an array [B, H, S, ·] in some of its places [B, S]."""
    return take(x)[places[0], :, places[1]].tobytes()
