"""The engine's front door: load a checkpoint, run tokens through it with probes, generate greedily.

Prefill feeds chunks, decode feeds single tokens; every step ends in one evaluation that covers the next token, the
caches and, with a tap, the probes. Runs are independent: each starts with empty caches.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from engine.arithmetic import arithmetic
from engine.cache import Cache, make_cache
from engine.checkpoint import load_checkpoint
from engine.config import DTYPES, Config, read_config
from engine.device import Device, select
from engine.layers import has_packed_experts, widen
from engine.model import Decoder
from engine.module import parameters
from engine.probes import Array, Step, Tap, to_numpy

# Tokens of a prefill chunk when the caller names no size.
CHUNK = 512


def load(folder: str | Path, *, dtype: str | None = None, device: str = "auto") -> Engine:
    """The checkpoint in `folder` as an Engine that computes in `dtype` (None: the config's torch_dtype) on `device`.

    Raises CheckpointError for a folder that isn't exactly what its config.json says, DeviceError for an absent device.
    """
    chosen = select(device)
    folder = Path(folder)
    config = read_config(folder)
    dtype = config.torch_dtype if dtype is None else dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; one of {', '.join(DTYPES)} is expected")
    with mx.stream(chosen.handle):
        checkpoint = load_checkpoint(folder, config, getattr(mx, dtype))
        model = Decoder(config, checkpoint.experts)
        model.load_weights(list(checkpoint.tensors.items()))
        if chosen.name == "cpu":
            widen(model)
        mx.eval(parameters(model))
    return Engine(model, config, dtype=dtype, device=chosen)


class Engine:
    """A loaded model on one device; `run` and `generate` leave no state behind."""

    def __init__(self, model: Decoder, config: Config, *, dtype: str, device: Device) -> None:
        self.model = model
        self.config = config
        self.dtype = dtype
        self.device = device

    @property
    def provenance(self) -> dict[str, Any]:
        """Which engine, version, device and dtype, and the arithmetic that each op is done in on that device."""
        return {
            "engine": "mlx",
            "version": version("mlx"),
            "device": self.device.name,
            "device_info": self.device.detail,
            "dtype": self.dtype,
            "arithmetic": arithmetic(
                self.device, self.dtype, self.config, packed_experts=has_packed_experts(self.model)
            ),
        }

    def run(self, tokens: Sequence[int], *, tap: Tap | None = None, chunk: int | None = None, decode: int = 0) -> None:
        """Feed `tokens` (T): prefill in chunks of `chunk`, then the last `decode` tokens one by one.

        Every probe is tapped for all T tokens: after each step, in the order of computation, as (tokens of the step, …)
        arrays. Raises ValueError for an empty sequence, an id outside the vocabulary, or a chunk or decode count out of
        range.
        """
        ids = self._checked(tokens)
        if not 0 <= decode <= len(ids):
            raise ValueError(f"decode is {decode}; 0 to {len(ids)} (the number of tokens) is expected")
        caches = self._caches()
        prefill = len(ids) - decode
        for step in _chunks(ids[:prefill], chunk):
            self._step(step, caches, tap)
        for token in ids[prefill:]:
            self._step([token], caches, tap)

    def generate(
        self,
        tokens: Sequence[int],
        *,
        max_tokens: int,
        tap: Tap | None = None,
        chunk: int | None = None,
        stop: Collection[int] = (),
    ) -> list[int]:
        """Greedy continuation of `tokens`: up to `max_tokens` ids, ending before the first that is in `stop`.

        Taps every token that is fed: the prompt, and each generated token but the last. Raises ValueError as `run`
        does.
        """
        ids = self._checked(tokens)
        if max_tokens < 1:
            raise ValueError(f"max_tokens is {max_tokens}; at least 1 is expected")
        caches = self._caches()
        token = -1
        for step in _chunks(ids, chunk):
            token = self._step(step, caches, tap)
        generated: list[int] = []
        while token not in stop:
            generated.append(token)
            if len(generated) == max_tokens:
                break
            token = self._step([token], caches, tap)
        return generated

    def weights(self) -> Iterator[tuple[str, Array]]:
        """The parameters exactly as held, under the checkpoint's names: affine weights as codes, scales and biases.

        In the run's dtype, but for the correction bias and what `engine.layers.widen` keeps in float32 on the CPU.
        """
        for name, x in parameters(self.model).items():
            yield name, to_numpy(x)

    def _step(self, tokens: Sequence[int], caches: list[Cache], tap: Tap | None) -> int:
        """Feed `tokens` (L) at once; the greedy next token. One evaluation, then the probes go to the tap."""
        with mx.stream(self.device.handle):
            step = None if tap is None else Step()
            probe = None if step is None else step.note
            logits = self.model(mx.array([tokens], dtype=mx.int32), caches, probe)
            # argmax returns the lowest id among equals on every backend of MLX.
            token = mx.argmax(logits, axis=-1).astype(mx.int32)
            if step is not None:
                step.note("token", token)
            mx.eval(token, [cache.state for cache in caches], [] if step is None else step.arrays)
            if step is not None and tap is not None:
                step.flush(tap)
            return int(np.array(token)[0, -1])

    def _caches(self) -> list[Cache]:
        return make_cache(self.config.layer_types, self.config.sliding_window)

    def _checked(self, tokens: Sequence[int]) -> list[int]:
        ids = [int(token) for token in tokens]
        if not ids:
            raise ValueError("tokens is empty; at least one token id is expected")
        for i, token in enumerate(ids):
            if not 0 <= token < self.config.vocab_size:
                raise ValueError(f"tokens[{i}] is {token}; the vocabulary has ids 0 to {self.config.vocab_size - 1}")
        return ids


def _chunks(tokens: list[int], size: int | None) -> Iterator[list[int]]:
    size = CHUNK if size is None else size
    if size < 1:
        raise ValueError(f"chunk is {size}; at least 1 is expected")
    for start in range(0, len(tokens), size):
        yield tokens[start : start + size]
