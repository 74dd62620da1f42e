"""What a cache keeps alive: lazy graph nodes that nobody evaluates, and bytes beyond the tokens that it must hold; and
whether it shares its memory with another one.

Decoding evaluates what attention is given, the fetched keys and values, and no more: a counter that is an array and is
only ever added to then grows the graph by a node a step, unless something else happens to read it. Bytes are the
allocator's for MLX; for NumPy and torch those of all arrays that can be reached from the object, each with the array
that it is a view of.
"""

from __future__ import annotations

import gc
import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from audits import cache_object as obj
from audits.candidate import Candidate, CandidateError
from audits.contract import Finding
from audits.frameworks import DTYPES, give, take

if TYPE_CHECKING:
    from audits.cache_contract import CacheContract

NODES, BYTES = "growth in graph nodes", "growth in bytes"
CHECKS = (NODES, BYTES)
TWINS = "independence"
CONSTANT = "constant groups"
CASES = ("decode", "chunks", "prefill", "filter", "extract", "twins", "constants")
STEP = 256  # tokens by which caches grow (mlx-lm's); samples are that far apart, so that they meet the same spare room
SAMPLES = (40, 40 + STEP, 40 + 2 * STEP)
PREFILL = 2048
CHUNKS = 400
NODES_A_STEP = 0.25  # more is a leak: a counter gives 1, whatever is rebuilt each step 0
# Of a token's bytes, for a cache that holds a fixed number of tokens: half-filled buffers come to less.
BYTES_A_STEP = 0.25


def applies(case: str, contract: str, framework: str, lacking: Iterable[str]) -> bool:
    """Whether a growth case means something for a contract's cache."""
    if case == "constants":
        return "quantized" in contract
    if case in ("prefill", "chunks"):
        return "rotating" in contract or ("chunked" in contract and "maybe_trim_front" not in lacking)
    if case in ("filter", "extract"):
        return "batch" in contract and case not in lacking
    return True


def check(
    contract: CacheContract, candidate: Candidate, case: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[Finding | None, str]:
    """What grows in one growth case, or None; the digest is empty, for no values are looked at."""
    if case["growth"] in ("twins", "constants"):
        return {"twins": _twins, "constants": _constants}[case["growth"]](candidate, case, options), ""
    run = {"decode": _decode, "chunks": _chunks, "prefill": _prefill, "filter": _filter, "extract": _extract}[
        case["growth"]
    ]
    rows = 4 if case["growth"] in ("filter", "extract") else 2
    if "left_padding" in options:
        options = {**options, "left_padding": [0] * rows}
    gc.freeze()  # what is there already is neither looked at nor freed: `_active` would take long, and wander
    try:
        return run(_Feeder(contract, candidate, case, options, rows)), ""
    except CandidateError as error:
        return Finding(check="raises", message=f"{case['growth']}: {error}"), ""
    finally:
        gc.unfreeze()


class _Feeder:
    """A fresh cache, fed as a decode loop feeds it."""

    def __init__(
        self,
        contract: CacheContract,
        candidate: Candidate,
        case: Mapping[str, Any],
        options: Mapping[str, Any],
        rows: int,
    ) -> None:
        self.framework, self.device, self.rows, self.heads = candidate.framework, candidate.device, rows, case["heads"]
        self.dims, self.dtype = case["dims"], np.dtype(DTYPES[case["dtype"]])
        self.before = _active() if self.framework == "mlx" else 0
        self.cache = obj.make(candidate, options)
        self.fixed = options.get("max_size") or options.get("chunk_size")
        self.batched = "left_padding" in options
        self.chunked = "chunk_size" in options and obj.has(self.cache, "maybe_trim_front")

    def feed(self, n: int) -> None:
        """One chunk; evaluates what is fetched."""
        if self.chunked:
            obj.call("maybe_trim_front", self.cache.maybe_trim_front)
        one = [np.zeros((self.rows, self.heads, n, d), self.dtype) for d in self.dims]
        given = [give(x, self.framework, device=self.device) for x in one]
        fetched = obj.call("update_and_fetch", lambda: self.cache.update_and_fetch(*given))
        if self.framework == "mlx":
            import mlx.core as mx

            obj.call("update_and_fetch", lambda: mx.eval(fetched))

    def trims(self) -> bool:
        """Whether the cache says that it can be trimmed, or says nothing."""
        return not obj.has(self.cache, "is_trimmable") or bool(self.cache.is_trimmable())

    def bytes(self) -> int:
        """What is alive for the cache."""
        return _active() - self.before if self.framework == "mlx" else reachable_bytes(self.cache)

    def token(self) -> int:
        """Bytes of one token of every row, as it is fed."""
        return int(self.rows * self.heads * sum(self.dims) * self.dtype.itemsize)

    def allowed(self, held: int) -> int:
        """Bytes that a cache of `held` tokens may keep: twice what it needs (for growing by doubling), and spare room
        of a step of the buffer and one of a copy."""
        return (2 * held + 2 * STEP) * self.token()


def _twins(candidate: Candidate, case: Mapping[str, Any], options: Mapping[str, Any]) -> Finding | None:
    """Two caches of one model, fed in turn: what one returns is what it returned when there was no other."""
    rows = len(options["left_padding"]) if "left_padding" in options else 1
    rng = np.random.default_rng(case["seed"])
    dtype = np.dtype(DTYPES[case["dtype"]])
    shapes = [[(rows, case["heads"], n, d) for d in case["dims"]] for n in (3, 1, 1, 2)]
    mine, others = ([[rng.standard_normal(x).astype(dtype) for x in pair] for pair in shapes] for _ in range(2))

    def feed(cache: Any, pair: list[Any]) -> list[bytes]:
        given = [give(x, candidate.framework, device=candidate.device) for x in pair]
        fetched = obj.call("update_and_fetch", lambda: cache.update_and_fetch(*given))
        parts = [y for x in fetched for y in (x if isinstance(x, tuple | list) else (x,))]
        return [take(x).tobytes() for x in parts]

    try:
        first = obj.make(candidate, options)
        alone = [feed(first, pair) for pair in mine]
        one, other = obj.make(candidate, options), obj.make(candidate, options)
        for i, (pair, second) in enumerate(zip(mine, others, strict=True)):
            if feed(one, pair) != alone[i]:
                message = f"update {i} of one cache returns other bits when a second cache is fed in turn with it"
                return Finding(check=TWINS, message=message)
            feed(other, second)
    except CandidateError as error:
        return Finding(check="raises", message=f"twins: {error}")
    return None


def _constants(candidate: Candidate, case: Mapping[str, Any], options: Mapping[str, Any]) -> Finding | None:
    """A quantisation group whose numbers are all equal has no range to divide by: it comes back as it was."""
    rows = len(options["left_padding"]) if "left_padding" in options else 1
    options = {**options, "left_padding": [0] * rows} if "left_padding" in options else options
    dtype = np.dtype(DTYPES[case["dtype"]])
    levels = np.array([0, 1, -0.75, 0], dtype)[:, None]
    given = [np.broadcast_to(levels, (rows, case["heads"], 4, d)).copy() for d in case["dims"]]
    try:
        fetched = obj.fetch(obj.make(candidate, options), given[0], given[1], candidate.framework, candidate.device)
        found = [obj.dense(x, options.get("bits"), dtype) for x in fetched]
    except CandidateError as error:
        return Finding(check="raises", message=f"constant groups: {error}")
    for (actual, _, wrong), expected, name in zip(found, given, ("keys", "values"), strict=True):
        if wrong is not None:
            return wrong
        if actual.shape != expected.shape:
            return Finding(check="shape", message=f"{name} {expected.shape} come back as {actual.shape}")
        apart = np.abs(actual.astype(np.float64) - expected.astype(np.float64))
        if not (apart <= 2.0**-6).all():
            message = f"{name} whose groups are constant, 0, 1 and −0.75, come back changed by up to {apart.max():.3g}"
            return Finding(check=CONSTANT, message=message)
    return None


def _decode(feeder: _Feeder) -> Finding | None:
    """Nodes and bytes over SAMPLES[-1] decode steps, after whatever may leave an array behind has been done once."""
    feeder.feed(3)
    if obj.has(feeder.cache, "trim") and obj.call("is_trimmable", feeder.trims):
        obj.call("trim", lambda: feeder.cache.trim(1))
    if feeder.batched and obj.has(feeder.cache, "filter"):
        obj.call("filter", lambda: feeder.cache.filter([1, 0]))
    feeder.feed(8)
    nodes, sizes = [], []
    for step in range(1, SAMPLES[-1] + 1):
        feeder.feed(1)
        if step in SAMPLES:
            nodes.append(_nodes(feeder.cache) if feeder.framework == "mlx" else 0)
            sizes.append(feeder.bytes())
    steps = np.diff(SAMPLES)
    grown = np.diff(nodes) / steps
    evidence = {"steps": list(SAMPLES), "nodes": nodes, "bytes": sizes}
    if (grown > NODES_A_STEP).all():
        message = (
            f"the graph behind the cache has {_list(nodes)} nodes after {_list(SAMPLES)} decode steps that"
            " evaluated the fetched keys and values: an array in it is only evaluated if something else reads it"
        )
        return Finding(check=NODES, message=message, evidence=evidence)
    rate = np.diff(sizes) / steps
    if feeder.fixed is not None and (rate > BYTES_A_STEP * feeder.token()).all():
        message = (
            f"it holds {_list(sizes)} bytes after {_list(SAMPLES)} decode steps, though no more than"
            f" {feeder.fixed} tokens a row are visible"
        )
        return Finding(check=BYTES, message=message, evidence=evidence)
    held = feeder.fixed or 10 + SAMPLES[-1]
    return _too_many(feeder, sizes[-1], held, f"{SAMPLES[-1]} decode steps", evidence)


def _chunks(feeder: _Feeder) -> Finding | None:
    """A cache that shows few tokens keeps few, when each step brings three, as drafts to be verified do."""
    for _ in range(CHUNKS):
        feeder.feed(3)
    return _too_many(feeder, feeder.bytes(), feeder.fixed or 3 * CHUNKS, f"{CHUNKS} chunks of 3 tokens")


def _prefill(feeder: _Feeder) -> Finding | None:
    """A cache that shows few tokens keeps few, however long the chunk that they came in."""
    feeder.feed(PREFILL)
    for _ in range(3):
        feeder.feed(1)
    return _too_many(feeder, feeder.bytes(), feeder.fixed or PREFILL, f"a chunk of {PREFILL} tokens and 3 decode steps")


def _filter(feeder: _Feeder) -> Finding | None:
    """One row of four keeps nothing of the others."""
    feeder.feed(PREFILL)
    obj.call("filter", lambda: feeder.cache.filter([1]))
    feeder.rows = 1
    feeder.feed(1)
    return _too_many(feeder, feeder.bytes(), feeder.fixed or PREFILL, f"{PREFILL} tokens, filter to one row of four")


def _extract(feeder: _Feeder) -> Finding | None:
    """A row that has been taken out and evaluated keeps nothing of the batch."""
    feeder.feed(PREFILL)
    feeder.feed(1)
    row = obj.call("extract", lambda: feeder.cache.extract(1))
    if feeder.framework == "mlx":
        import mlx.core as mx

        obj.call("evaluating the state of the extracted row", lambda: mx.eval(_arrays(row, "mlx")))
    feeder.cache, feeder.rows = row, 1
    what = f"{PREFILL} tokens, extract of one row of four, the batch dropped"
    return _too_many(feeder, feeder.bytes(), feeder.fixed or PREFILL, what)


def _too_many(
    feeder: _Feeder, actual: int, held: int, what: str, evidence: Mapping[str, Any] | None = None
) -> Finding | None:
    allowed = feeder.allowed(held)
    if actual <= allowed:
        return None
    message = f"after {what} it keeps {actual} bytes alive for {held} tokens a row, {allowed} allowed"
    return Finding(check=BYTES, message=message, evidence={**(evidence or {}), "actual": actual, "allowed": allowed})


def _active() -> int:
    import mlx.core as mx

    gc.collect()
    mx.synchronize()  # a GPU frees what it has finished with
    return int(mx.get_active_memory())


def _nodes(cache: Any) -> int:
    """Operations in the graph behind every array of a cache; Graphviz draws them as rectangles."""
    import mlx.core as mx

    arrays = _arrays(cache, "mlx")
    text = io.StringIO()
    mx.export_to_dot(text, *arrays)
    return text.getvalue().count("shape=rectangle")


def reachable_bytes(cache: Any) -> int:
    """Bytes of all NumPy and torch arrays that can be reached from an object, views as what they are views of."""
    owners: dict[int, int] = {}
    for x in _arrays(cache, "numpy"):
        while isinstance(x.base, np.ndarray):
            x = x.base
        owners[x.__array_interface__["data"][0]] = max(x.nbytes, owners.get(x.__array_interface__["data"][0], 0))
    for x in _arrays(cache, "torch"):
        storage = x.untyped_storage()
        owners[storage.data_ptr()] = storage.nbytes()
    return sum(owners.values())


def _arrays(root: Any, framework: str) -> list[Any]:
    """Every array of a framework that can be reached by attributes, containers and what functions close over."""
    seen: set[int] = set()
    found: list[Any] = []
    waiting: deque[Any] = deque([root])
    keep: list[Any] = []  # what `vars` makes must live as long as `seen` has its id
    while waiting:
        x = waiting.popleft()
        if id(x) in seen or isinstance(x, str | bytes | int | float | type | None):
            continue
        seen.add(id(x))
        keep.append(x)
        if type(x).__module__.split(".")[0] == framework and hasattr(x, "shape") and hasattr(x, "dtype"):
            found.append(x)
        else:
            waiting += _inside(x)
    return found


def _inside(x: Any) -> Iterator[Any]:
    if isinstance(x, Mapping):
        yield from x.values()
    elif isinstance(x, list | tuple | set | frozenset | deque):
        yield from x
    elif isinstance(x, Callable) and getattr(x, "__closure__", None):  # type: ignore[arg-type]
        yield from (cell.cell_contents for cell in x.__closure__)
    else:
        for cls in type(x).__mro__:
            for name in getattr(cls, "__slots__", ()):
                yield getattr(x, name, None)
        yield from getattr(x, "__dict__", {}).values()
        yield getattr(x, "__self__", None)


def _list(values: Sequence[int]) -> str:
    return ", ".join(str(int(x)) for x in values)
