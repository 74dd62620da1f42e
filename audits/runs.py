"""Running a case: on the MLX engine, the reference, or anybody's engine; the result is a Trace with its provenance."""

from __future__ import annotations

import datetime
import inspect
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from audits.cases import Case, model_folder
from audits.quantized import stamp
from audits.weights import check_weights
from goldens.fingerprint import Fingerprint, fingerprint
from goldens.trace import Recorder, Trace
from reference.model import Reference
from reference.replay import check_claims

PACKAGES = ("assay", "mlx", "numpy", "torch", "h5py")
# What an engine may say of itself; everything else in a Trace's provenance is ours.
ENGINE_KEYS = (
    *("source", "engine", "version", "device", "device_info", "dtype", "weights_dtype", "arithmetic", "kernels"),
)


class EngineLike(Protocol):
    """What `run` needs of an engine: run tokens through a tap, and say what it is and in which arithmetic it computes.

    `provenance` has "dtype" (what it computes in), and may have "weights_dtype" (what it holds the weights in, if
    another), "arithmetic" (op -> claims, see engine/arithmetic.py), "kernels" (probe -> names of the kernels that the
    last run launched for it) and the rest of ENGINE_KEYS. An engine with `weights()`,
    yielding (tensor name, array as held), has its weights compared with the checkpoint.
    """

    @property
    def provenance(self) -> Mapping[str, Any]: ...

    def run(self, tokens: Sequence[int], *, tap: Any, chunk: int | None, decode: int) -> None: ...


def run(engine: str | EngineLike, case: Case | Mapping[str, Any]) -> Trace:
    """The Trace of one run of `case` on `engine`: "mlx", "reference", or an object with `run` and `provenance`.

    `case` is a Case or its dict: {"tokens": […], "model": folder, "options": {"dtype", "device", "chunk", "decode",
    "experts", "kernels"}}. ValueError for a case or an engine that can't be run.
    """
    case = case if isinstance(case, Case) else Case.from_dict(case)
    recorder = Recorder()
    if isinstance(engine, str) and engine == "reference":
        reference = load_reference(case.checkpoint, case.dtype)
        reference.run(case.tokens, recorder)
        told: dict[str, Any] = dict(reference.provenance)
    else:
        loaded = _engine(engine, case)
        told = checked_provenance(loaded)
        load_reference(case.checkpoint, weights_dtype(told)).check_tokens(case.tokens)
        try:
            loaded.run(case.tokens, tap=recorder, chunk=case.chunk, decode=case.decode)
        except RuntimeError as error:  # what MLX and torch raise when a kernel can't be launched
            raise ValueError(f"the engine failed in case {case.name}: {error}") from error
        # Only after the run does an engine know what it launched.
        told["kernels"] = checked_provenance(loaded).get("kernels", {})
        reference = load_reference(case.checkpoint, weights_dtype(told))
        told["weights"] = check_weights(loaded, reference, model_fingerprint(case.checkpoint))
    return recorder.trace(case=case.name, tokens=case.tokens, provenance={"source": "engine", **told, **_origin(case)})


def _engine(engine: Any, case: Case) -> Any:
    if engine == "mlx":
        return load_engine(case)
    if isinstance(engine, str):
        raise ValueError(
            f"no engine {engine!r}; there are mlx and reference, or pass an object with run and provenance"
        )
    for name in ("run", "provenance"):
        if not hasattr(engine, name):
            raise ValueError(f"a {type(engine).__name__} can't be run: an engine has `run` and `provenance`")
    try:
        inspect.signature(engine.run).bind(case.tokens, tap=None, chunk=case.chunk, decode=case.decode)
    except TypeError as error:
        raise ValueError(
            f"an engine's run takes (tokens, tap=, chunk=, decode=); this one doesn't ({error})"
        ) from error
    return engine


def load_engine(case: Case, advance: Callable[[str], None] = lambda _: None) -> Any:
    """The MLX engine for a case; `advance` is told of what takes long besides."""
    import engine

    folder = model_folder(case.checkpoint, advance)
    return engine.load(folder, dtype=case.dtype, device=case.device, kernels=case.kernels)


def checked_provenance(engine: Any) -> dict[str, Any]:
    """What an engine says of itself, checked: ValueError for a missing dtype, or claims that make no sense."""
    told = engine.provenance
    if not isinstance(told, Mapping) or not isinstance(told.get("dtype"), str):
        raise ValueError('an engine\'s provenance is a dict with at least "dtype", e.g. {"dtype": "float16"}')
    check_claims(told.get("arithmetic", {}), told["dtype"])
    launched = told.get("kernels", {})
    if not isinstance(launched, Mapping) or not all(isinstance(names, list | tuple) for names in launched.values()):
        raise ValueError('an engine\'s "kernels" are a dict: probe -> names of the kernels that were launched for it')
    return {key: told[key] for key in ENGINE_KEYS if key in told}


def weights_dtype(provenance: Mapping[str, Any]) -> str:
    """The dtype that a run held its weights in: what it computed in, unless it says otherwise."""
    return str(provenance.get("weights_dtype", provenance.get("dtype", "float32")))


def load_reference(model: str, dtype: str) -> Reference:
    """The reference for a model whose weights are rounded to `dtype`; kept, since every case asks for it again."""
    return _reference(model, dtype, stamp(model_folder(model)))


def model_fingerprint(model: str) -> Fingerprint:
    """The Fingerprint of a model's folder, kept until a file in it changes."""
    return _fingerprint(model, stamp(model_folder(model)))


@lru_cache(maxsize=4)
def _reference(model: str, dtype: str, _: Any) -> Reference:
    return Reference(model_folder(model), dtype=dtype)


@lru_cache(maxsize=4)
def _fingerprint(model: str, _: Any) -> Fingerprint:
    return fingerprint(model_folder(model))


def _origin(case: Case) -> dict[str, Any]:
    """Where a Trace comes from, except what the engine says of itself."""
    model = model_fingerprint(case.checkpoint)
    return {
        "case": {key: value for key, value in case.as_dict().items() if key != "tokens"},
        "model": case.checkpoint,
        "model_hash": model.model_hash,
        "tensor_hashes": dict(model.tensor_hashes),
        "config": dict(model.config),
        "seed": case.seed,
        "command": " ".join(["assay", *sys.argv[1:]]) if Path(sys.argv[0]).name == "assay" else "assay.run",
        "versions": versions(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def versions() -> dict[str, str]:
    """Platform, Python and the packages that figures depend on."""
    here = {"platform": f"{platform.system()} {platform.machine()}", "python": platform.python_version()}
    return here | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
