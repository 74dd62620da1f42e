"""The oracle: the same model from the same checkpoint, in float32 (or float64) on the CPU, without a cache.

It computes all tokens at once, so that a chunk, a cache or a window that an engine gets wrong has nothing here to agree
with. Never imports mlx or `engine`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reference.checkpoint import load_weights
from reference.config import read_config
from reference.errors import CheckpointError
from reference.graph import decoder_graph
from reference.threads import threads_for

Tap = Callable[[str, Any], None]


class Reference:
    """A checkpoint folder as the oracle runs it.

    `dtype` is the dtype that the weights are rounded to, as an engine that runs in it holds them; `compute` ("float32"
    or "float64") is the arithmetic here. Raises CheckpointError for a folder that can't be run.
    """

    def __init__(self, folder: str | Path, *, dtype: str = "float32", compute: str = "float32") -> None:
        self.folder = Path(folder)
        self.dtype = dtype
        self.compute = {"float32": torch.float32, "float64": torch.float64}[compute]
        self.config = read_config(self.folder)
        self.weights = load_weights(self.folder, self.config, dtype)
        self.graph = decoder_graph(self.config, self.weights)
        self.provenance = {
            "source": "reference",
            "engine": "reference",
            "version": torch.__version__,
            "device": "cpu",
            "dtype": compute,
            "weights_dtype": dtype,
        }

    def check_tokens(self, tokens: Sequence[int]) -> None:
        """Raise CheckpointError unless `tokens` is a non-empty sequence of ids below vocab_size."""
        ids = np.asarray(tokens)
        if ids.ndim != 1 or ids.size == 0:
            raise CheckpointError("a run needs at least one token, in one sequence")
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            bad = int(ids[(ids < 0) | (ids >= self.config.vocab_size)][0])
            raise CheckpointError(f"token {bad} is outside the vocabulary of {self.config.vocab_size}")

    @torch.inference_mode()
    def run(self, tokens: Sequence[int], tap: Tap | None = None) -> np.ndarray[Any, np.dtype[Any]]:
        """Logits [T,V] for tokens [T]; every probe goes to `tap(name, array)`, in the compute dtype (ids: int32)."""
        self.check_tokens(tokens)
        with threads_for(self.largest_matrix):
            return self._run(tokens, tap)

    @property
    def largest_matrix(self) -> int:
        """Elements of the largest matrix that one product multiplies by."""
        return max(w.exact.shape[-1] * w.exact.shape[-2] for w in self.weights.values() if w.exact.dim() > 1)

    def _run(self, tokens: Sequence[int], tap: Tap | None) -> np.ndarray[Any, np.dtype[Any]]:
        values = {"tokens": torch.as_tensor(np.asarray(tokens, dtype=np.int64))}
        last_use = {name: i for i, node in enumerate(self.graph) for name in node.inputs}
        for i, node in enumerate(self.graph):
            out = node.forward(*(values[name] for name in node.inputs), dtype=self.compute)
            values[node.probe] = out
            if tap is not None:
                tap(node.probe, (out if out.is_floating_point() else out.to(torch.int32)).numpy())
            for name in node.inputs:
                if last_use[name] == i and name != "logits":
                    del values[name]
        return np.asarray(values["logits"].numpy())
