"""Whether what a cache returns is what was fed: bit for bit, or within one quantisation of it, in codes that stay.

Codes must be those of the same tokens quantised at once: each token's own, however the sequence was split.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from audits import cache_object as obj
from audits.cache_judge import KINDS as NAMES
from audits.cache_model import Row
from audits.cache_values import KEY, VALUE, Tokens, quantisation_error
from audits.candidate import Candidate
from audits.contract import Finding
from audits.frameworks import give, take

Array = np.ndarray[Any, np.dtype[Any]]


class Found(Exception):
    """Something is wrong; the finding says what."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.message)
        self.finding = finding


class Contents:
    """What has been seen of one program's tokens. bits is None for a cache that isn't quantised; `fresh` makes a cache
    of one row.
    """

    def __init__(
        self, candidate: Candidate, tokens: Tokens, bits: int | None, group: int, fresh: Callable[[], Any]
    ) -> None:
        self.candidate, self.tokens, self.bits, self.group, self.fresh = candidate, tokens, bits, group, fresh
        self.codes: list[dict[int, bytes]] = [{}, {}]  # of keys and values: serial -> its codes, when first seen
        self.requantised: set[int] = set()  # serials that went through a cache that may have dequantised them

    def check(
        self, kind: int, full: Array, parts: Sequence[Array], serials: Array, seen: Array, rows: Sequence[Row]
    ) -> None:
        """Vectors in visible places: bit for bit what was fed, or within one quantisation of it; codes unchanged."""
        b, s = np.nonzero(seen)
        if not len(b):
            return
        actual = full[b, :, s]  # [n, H, D]
        who = serials[b, 0, s]
        fed = self.tokens.fed(kind, who)
        if self.bits is None:
            wrong = (actual.view(f"u{actual.itemsize}") != fed.view(f"u{fed.itemsize}")).any((1, 2))
        else:
            allowed = quantisation_error(fed, self.group, self.bits)
            again = np.isin(who, list(self.requantised))
            # Quantised anew after extract or merge: once more on the way in, and once more on the way out.
            wrong = (np.abs(actual - fed.astype(np.float64)) > allowed * np.where(again, 3, 1)[:, None, None]).any(
                (1, 2)
            )
        if wrong.any():
            i = int(np.flatnonzero(wrong)[0])
            worst = float(np.abs(actual[i].astype(np.float64) - fed[i].astype(np.float64)).max())
            label = self.tokens.labels[who[i]]
            message = (
                f"{rows[b[i]].name}: the {NAMES[kind]} of position {label.position} of {label.row} came back"
                f" changed, by up to {worst:.3g}"
            )
            raise Found(Finding(check="values", message=message))
        if parts:
            self._check_codes(kind, [part[b, :, s] for part in parts], who, rows, b)

    def _check_codes(self, kind: int, parts: Sequence[Array], who: Array, rows: Sequence[Row], b: Array) -> None:
        known = self.codes[kind]
        for i, (serial, code) in enumerate(zip(who.tolist(), _bytes_of(parts), strict=True)):
            if known.setdefault(serial, code) != code and serial not in self.requantised:
                label = self.tokens.labels[serial]
                message = (
                    f"{rows[b[i]].name}: the codes of the {NAMES[kind]} at position {label.position} have changed"
                    " since they were stored"
                )
                raise Found(Finding(check="codes", message=message))

    def check_one_shot(self, rows: Sequence[Row]) -> None:
        """Codes are those of the same tokens in one chunk: by MLX for an MLX candidate, else by a fresh cache."""
        for row in rows:
            serials = np.array([x for x in row.tokens if x in self.codes[KEY] and x not in self.requantised], int)
            if not len(serials):
                continue
            fed = [self.tokens.fed(kind, serials).swapaxes(0, 1)[None] for kind in (KEY, VALUE)]
            for kind, parts in enumerate(self._one_shot(fed)):
                codes = _bytes_of([part[0].swapaxes(0, 1) for part in parts])
                for serial, code in zip(serials.tolist(), codes, strict=True):
                    if code != self.codes[kind][serial]:
                        message = (
                            f"{row.name}: the codes of the {NAMES[kind]} at position"
                            f" {self.tokens.labels[serial].position} are not those of the same tokens quantised at once"
                        )
                        raise Found(Finding(check="codes", message=message))

    def _one_shot(self, fed: Sequence[Array]) -> list[tuple[Array, ...]]:
        if self.candidate.framework == "mlx":
            import mlx.core as mx

            made = [mx.quantize(give(x, "mlx"), group_size=self.group, bits=self.bits) for x in fed]
            return [tuple(take(part) for part in parts) for parts in made]
        cache = self.fresh()
        fetched = obj.fetch(cache, fed[0], fed[1], self.candidate.framework, self.candidate.device)
        return [obj.dense(x, self.bits, self.tokens.dtype)[1] for x in fetched]


def _bytes_of(parts: Sequence[Array]) -> list[bytes]:
    """The bytes of all parts [n, ...] together, for each of n."""
    flat = [np.ascontiguousarray(part).reshape(len(part), -1).view(np.uint8) for part in parts]
    joined = np.concatenate(flat, axis=1)
    return [row.tobytes() for row in joined]
