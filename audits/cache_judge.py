"""What is wrong with one fetch: for every query, the tokens that attention would see by the mask, against the model.

Places that no query sees may hold any finite numbers, in any order; a place that one sees must hold a token of the
row's own, its key and its value, in every head, once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from audits.cache_model import Row, Sight
from audits.cache_values import BLANK, KEY, VALUE, Tokens, decode, parts, serials_of
from audits.contract import Finding

Array = np.ndarray[Any, np.dtype[Any]]
KINDS = ("key", "value")


@dataclass(frozen=True)
class Fetch:
    """What an update returned, dense in NumPy: keys [B, H, S, D], values [B, H, S, Dv]; visible [B, N, S]."""

    keys: Array
    values: Array
    visible: Array


def visible_places(mask: Any, shape: tuple[int, int, int, int]) -> Array | Finding:
    """A mask in any of its forms -> bool [B, N, S]; a Finding for what doesn't fit scores of shape [B, H, N, S]."""
    B, _, N, S = shape
    if mask is None:
        return np.ones((B, N, S), bool)
    if isinstance(mask, str):
        if mask != "causal":
            return Finding(check="mask", message=f"the mask is {mask!r}; 'causal', None or an array is expected")
        return np.broadcast_to(np.arange(S) <= np.arange(N)[:, None] + S - N, (B, N, S))
    try:
        fits = np.broadcast_shapes(mask.shape, shape) == shape
    except ValueError:
        fits = False
    if not fits:
        return Finding(
            check="mask shape",
            message=f"a mask of shape {list(mask.shape)} doesn't fit scores [B, H, N, S] of {list(shape)}",
        )
    if mask.dtype != np.bool_:
        added = mask.astype(np.float64)
        mask = added == 0
        if np.isnan(added).any() or (added[~mask] > -1e3).any():
            return Finding(check="mask", message="an additive mask holds other values than 0 and very negative ones")
    full = np.broadcast_to(mask, shape)
    if (full != full[:, :1]).any():
        return Finding(check="mask", message="the mask differs between heads")
    return full[:, 0]


def judge(fetch: Fetch, rows: Sequence[Row], sights: Sequence[Sight], tokens: Tokens) -> tuple[Finding | None, Array]:
    """The first thing wrong with a fetch, or None, and the serials [2, B, H, S] of keys and values (−1: unknown)."""
    idents = [decode(fetch.keys), decode(fetch.values)]
    serials = np.stack([serials_of(found, kind) for kind, found in enumerate(idents)])
    for b, (row, seen) in enumerate(zip(rows, sights, strict=True)):
        if not len(seen.queries):
            continue
        index = np.full(len(tokens.labels) + 1, -1)
        index[row.tokens] = np.arange(len(row.tokens))
        places = index[serials[:, b]]  # a serial of −1 takes the last entry: −1
        visible = fetch.visible[b][seen.queries]
        alike = (places == places[0, 0]).all()
        for kind in (KEY, VALUE):
            for head in range(places.shape[1]):
                finding = _judge_row(visible, places[kind, head], seen, row)
                if finding is not None:
                    check, message, place = finding
                    if place is not None:
                        check, what = _named(idents[kind][b, head, place], kind, head, row, tokens)
                        message = f"the {KINDS[kind]} at place {place} {what}{message}"
                    return Finding(check=check, message=f"{row.name} head {head}: {message}"), serials
                if alike:
                    break
            if alike:
                break
    return None, serials


def _judge_row(visible: Array, places: Array, seen: Sight, row: Row) -> tuple[str, str, int | None] | None:
    """(check, message, place of a token that isn't the row's) for one head's keys or values, or None.

    visible [Q, S], places [S]: the index of the token in each place.
    """
    own = places >= 0
    counts = np.zeros(seen.must.shape, np.int32)
    order = np.flatnonzero(own & visible.any(0))
    if not len(order) or np.bincount(places[order]).max() == 1:
        counts[:, places[order]] = visible[:, order]
    else:
        np.add.at(counts.T, places[order], visible[:, order].T)
    lost = seen.must & (counts == 0)
    if (visible & ~own).any():
        q = int(np.flatnonzero((visible & ~own).any(1))[0])
        place = int(np.flatnonzero(visible[q] & ~own)[0])
        instead = f"; expected position {int(np.flatnonzero(lost[q])[0])} of {row.name}" if lost[q].any() else ""
        return "foreign token", f", and {_query(seen, q)} sees it{instead}", place
    if (wrong := (counts > 0) & ~seen.may).any():
        q, t = (int(i[0]) for i in np.nonzero(wrong))
        future = t > len(row.tokens) - len(seen.queries) + q
        check = "future token" if future else "outside window"
        return check, f"{_query(seen, q)} sees position {t}, which {_beyond(future, seen, q)}", None
    if lost.any():
        q, t = (int(i[0]) for i in np.nonzero(lost))
        held = "is held but hidden" if (places == t).any() else "is nowhere in what was returned"
        return "lost token", f"{_query(seen, q)} doesn't see position {t}, which {held}", None
    if (counts > 1).any():
        q, t = (int(i[0]) for i in np.nonzero(counts > 1))
        at = ", ".join(str(int(i)) for i in np.flatnonzero((places == t) & visible[q])[:4])
        return "repeated token", f"{_query(seen, q)} sees position {t} more than once, at places {at}", None
    return None


def _query(seen: Sight, q: int) -> str:
    position = seen.must.shape[1] - len(seen.queries) + q
    return f"the query at position {position}"


def _beyond(future: bool, seen: Sight, q: int) -> str:
    if future:
        return "comes later"
    return f"is before the first that it may see, {int(np.flatnonzero(seen.may[q])[0])}"


def _named(ident: int, kind: int, head: int, row: Row, tokens: Tokens) -> tuple[str, str]:
    """(check, what the vector is): "foreign token", "is position 3 of row 0"."""
    if ident == BLANK:
        return "unwritten place", "was never written (all its numbers are equal)"
    serial, its_head, its_kind = parts(int(ident)) if ident >= 0 else (len(tokens.labels), 0, 0)
    if serial >= len(tokens.labels):
        return "garbled token", "is no token that was fed"
    label = tokens.labels[serial]
    where = f"padding of {label.row}" if label.position is None else f"position {label.position} of {label.row}"
    if its_kind != kind:
        return "key for value", f"is the {KINDS[its_kind]} of {where}"
    if its_head != head:
        return "foreign head", f"is {where}, head {its_head}"
    if label.position is None:
        return "padding", f"is {where}"
    if label.row == row.name:
        return "stale token", f"is {where}, which was taken back"
    return "foreign token", f"is {where}"
