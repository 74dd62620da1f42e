"""Does an engine hold the numbers that its checkpoint says, and is the checkpoint the one that was published?

Compared bit by bit, tensor by tensor: one changed weight moves a float16 output by less than its rounding, so no bound
on outputs can show it (docs/decisions/0002-weights-are-compared-bit-by-bit.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from audits.metrics import measure
from goldens.fingerprint import Fingerprint, changes_since_published
from reference.model import Reference

Array = np.ndarray[Any, np.dtype[Any]]
NOT_SHOWN = "the engine doesn't show its weights"


def check_weights(engine: Any, reference: Reference, model: Fingerprint) -> dict[str, Any]:
    """Compare every weight that an engine holds with its checkpoint, bit by bit.

    Returns {"tensors": how many were compared, "wrong": messages, "skipped": reason or ""}, for the run's provenance.
    `engine.weights()` yields (tensor name in the checkpoint, array as held), packed tensors as they are packed.
    """
    wrong = [f"weights: {change}" for change in changes_since_published(reference.folder, model)]
    if not hasattr(engine, "weights"):
        return {"tensors": 0, "wrong": wrong, "skipped": NOT_SHOWN}
    held = {name: _array(tensor) for weight in reference.weights.values() for name, tensor in weight.stored.items()}
    wrong += _differences(dict(engine.weights()), held)
    return {"tensors": len(held), "wrong": wrong, "skipped": ""}


def _array(tensor: torch.Tensor) -> Array:
    # NumPy has no bfloat16; float32 holds every value of it.
    array: Array = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


def _differences(actual: Mapping[str, Any], expected: Mapping[str, Array]) -> Iterator[str]:
    for name, held in expected.items():
        if name not in actual:
            yield f"weights: {name} is missing from the engine"
            continue
        found = np.asarray(actual[name])
        if found.shape != held.shape:
            yield f"weights: {name} has shape {found.shape} in the engine, {held.shape} in the checkpoint"
            continue
        if found.dtype != held.dtype:
            found, held = found.astype(np.float64), held.astype(np.float64)
        if not np.array_equal(found, held):
            worst = measure(found, held).worst
            place = ",".join(str(i) for i in worst.index)
            yield (
                f"weights: {name}[{place}] is {worst.actual:.7g} in the engine, {worst.expected:.7g} in the checkpoint;"
                f" {int(np.sum(found != held))} of {held.size} elements differ"
            )
    for name in actual.keys() - expected.keys():
        yield f"weights: the engine has {name}, the checkpoint hasn't"
