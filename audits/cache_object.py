"""A candidate's cache as the audits use it: made by its factory, fed, asked for its mask, saved and restored.

Whatever a candidate raises becomes a CandidateError; what it doesn't have, or hasn't implemented, a Lacks.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from audits.affine import unpack
from audits.candidate import Candidate, CandidateError, guarded
from audits.contract import Finding
from audits.frameworks import give, take

Array = np.ndarray[Any, np.dtype[Any]]


class Lacks(Exception):
    """The cache has no such operation."""


def call(what: str, work: Callable[[], Any]) -> Any:
    """The result of candidate code; Lacks for what it hasn't implemented, CandidateError for all else it raises."""
    try:
        return guarded(work)
    except CandidateError as error:
        if isinstance(error.__cause__, NotImplementedError):
            raise Lacks(what) from error
        raise CandidateError(f"{what} {error}") from error


def has(cache: Any, name: str) -> bool:
    """Whether a cache has an attribute, without asking a property for its value."""
    return hasattr(type(cache), name) or name in getattr(cache, "__dict__", ())


def shown(cache: Any, name: str, expected: Any) -> str:
    """What a cache shows as its option `name`, if that is another value than expected; else ""."""

    def look() -> str:
        actual = getattr(cache, name, expected)
        return "" if callable(actual) or bool(actual == expected) else str(actual)

    return str(call(name, look))


def needs(cache: Any, *names: str) -> None:
    """Lacks for the first of these attributes that a cache hasn't."""
    for name in names:
        if not has(cache, name):
            raise Lacks(name)


def make(candidate: Candidate, options: Mapping[str, Any]) -> Any:
    """A fresh cache: options by name where the factory has the names, else by position in the contract's order."""
    taken = parameters(candidate.function)
    if taken is None or set(options) <= taken:
        return call("the factory", lambda: candidate.function(**copy.deepcopy(dict(options))))
    return call("the factory", lambda: candidate.function(*copy.deepcopy(list(options.values()))))


def parameters(function: Any) -> set[str] | None:
    """The names of a function's parameters; None when it takes any, or doesn't tell."""
    return _parameters(getattr(function, "__func__", function))  # a method's object isn't to be kept alive


@lru_cache(maxsize=64)
def _parameters(function: Any) -> set[str] | None:
    try:
        found = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in found):
        return None
    return {p.name for p in found if p.kind not in (p.VAR_POSITIONAL, p.POSITIONAL_ONLY)}


def alike(cache: Any, options: Mapping[str, Any]) -> Any:
    """An empty cache of the same class as `cache`, which no factory is known for; Lacks if that can't be done."""
    taken = parameters(type(cache))
    known = {name: value for name, value in options.items() if taken is None or name in taken}
    try:
        return guarded(lambda: type(cache)(**known))
    except CandidateError as error:
        raise Lacks(f"constructor that takes {', '.join(known) or 'nothing'}") from error


def mask_of(cache: Any, n: int, window: int | None, as_array: bool) -> Any:
    """What make_mask gives for the next n tokens: None, a string, or a NumPy array."""
    taken = parameters(cache.make_mask)
    wanted = {"window_size": window, "return_array": as_array}
    given = {name: value for name, value in wanted.items() if taken is None or name in taken}
    mask = call("make_mask", lambda: cache.make_mask(n, **given))
    return mask if mask is None or isinstance(mask, str) else call("make_mask", lambda: take(mask))


def takes_window(cache: Any) -> bool:
    """Whether make_mask takes a window_size."""
    taken = parameters(cache.make_mask)
    return taken is None or "window_size" in taken


def fetch(cache: Any, keys: Array, values: Array, framework: str, device: str | None) -> tuple[Any, Any]:
    """What update_and_fetch returns; CandidateError if it raises or changes its inputs."""
    given = [give(x, framework, device=device) for x in (keys, values)]
    result = call("update_and_fetch", lambda: cache.update_and_fetch(*given))
    if not isinstance(result, tuple | list) or len(result) != 2:
        raise CandidateError(f"update_and_fetch returns a {type(result).__name__}, not keys and values")
    for before, after, name in zip((keys, values), given, ("keys", "values"), strict=True):
        if before.tobytes() != take(after).tobytes():
            raise InputChanged(f"update_and_fetch changes its input {name}")
    return result[0], result[1]


class InputChanged(CandidateError):
    """update_and_fetch wrote into what it was given."""


def dense(fetched: Any, bits: int | None, dtype: Any) -> tuple[Array, tuple[Array, ...], Finding | None]:
    """Fetched keys or values as one array; as their parts, if they are codes, scales and biases; and what is wrong."""
    if not isinstance(fetched, tuple | list):
        x = call("update_and_fetch", lambda: take(fetched))
        return x, (), _wrong_dtype(x, dtype, "what was fed")
    parts: tuple[Array, ...] = call("update_and_fetch", lambda: tuple(take(x) for x in fetched))
    shapes = ", ".join(str(list(x.shape)) for x in parts)
    if bits is None or len(parts) != 3 or parts[0].dtype != np.uint32:
        problem = f"returns {len(parts)} arrays {shapes}; {'codes (uint32), scales, biases' if bits else 'one array'}"
        return np.zeros(0), parts, Finding(check="shape", message=f"{problem} expected")
    words, scales, biases = parts
    wide = words.shape[-1] * 32 // bits
    fits = scales.shape == biases.shape and scales.shape[:-1] == words.shape[:-1]
    if not fits or words.shape[-1] * 32 % bits or wide % max(scales.shape[-1], 1):
        return np.zeros(0), parts, Finding(check="shape", message=f"codes, scales, biases are {shapes}: they don't fit")
    return _dequantised(words, scales, biases, bits), parts, _wrong_dtype(scales, dtype, "what was fed")


def _dequantised(words: Array, scales: Array, biases: Array, bits: int) -> Array:
    """MLX's affine layout (audits/affine.py) -> float32, whose rounding is far below any quantisation step."""
    if 32 % bits:
        codes = unpack(words, bits)
    else:
        shifts = np.arange(0, 32, bits, dtype=np.uint32)
        codes = ((words[..., None] >> shifts) & np.uint32((1 << bits) - 1)).reshape(*words.shape[:-1], -1)
    grouped = codes.astype(np.float32).reshape(*scales.shape, -1)
    full = grouped * scales.astype(np.float32)[..., None] + biases.astype(np.float32)[..., None]
    return full.reshape(codes.shape)


def _wrong_dtype(x: Array, dtype: Any, of: str) -> Finding | None:
    if x.dtype == dtype:
        return None
    return Finding(check="dtype", message=f"returns {x.dtype}, where {of} is {np.dtype(dtype)}")


def offsets(cache: Any) -> list[int]:
    """A cache's offset, of each row if it is an array."""
    value = call("offset", lambda: cache.offset)
    if isinstance(value, int):
        return [value]
    return [int(n) for n in np.asarray(call("offset", lambda: take(value))).reshape(-1)]


def saved(cache: Any) -> tuple[Any, Any]:
    """Copies of state and meta_state (None if there is none), as if written to a file and read back."""
    state = call("state", lambda: cache.state)
    meta = call("meta_state", lambda: cache.meta_state) if has(cache, "meta_state") else None
    return call("state", lambda: copied(state)), copy.deepcopy(meta)


def restore(cache: Any, state: Any, meta: Any) -> None:
    """Set state, then meta_state, the order in which prompt caches are loaded."""

    declared = getattr(type(cache), "state", None)
    if isinstance(declared, property) and declared.fset is None:
        raise Lacks("state that can be set")

    def work() -> None:
        cache.state = state
        if meta is not None:
            cache.meta_state = meta

    call("setting state", work)


def copies(cache: Any) -> bool:
    """Whether a cache has a way of its own to be copied; Python's is right by itself."""
    return any(has(cache, name) for name in ("copy", "__copy__", "__deepcopy__"))


def twin(cache: Any) -> Any:
    """A copy that has nothing in common with the cache: by its copy(), or by copy.deepcopy."""
    return call("copy", cache.copy if has(cache, "copy") else lambda: copy.deepcopy(cache))


def copied(tree: Any) -> Any:
    """Nested tuples, lists and dicts with every array copied, within its framework."""
    if isinstance(tree, tuple | list):
        return type(tree)(copied(part) for part in tree)
    if isinstance(tree, dict):
        return {name: copied(part) for name, part in tree.items()}
    kind = type(tree).__module__.split(".")[0]
    if kind in ("mlx", "torch", "numpy") and hasattr(tree, "shape") and hasattr(tree, "dtype"):
        return give(take(tree), kind)
    return copy.deepcopy(tree)
