"""The engine's front door: load a checkpoint, run tokens through it with probes, generate.

Prefill feeds chunks, decode feeds single tokens; every step ends in one evaluation that covers the next token, the
caches and, with a tap, the probes. Runs are independent: each starts with empty caches.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from engine.arithmetic import arithmetic
from engine.caches import Cache, row_cache
from engine.caches.codecs import Affine
from engine.checkpoint import Blocks, load_checkpoint
from engine.config import DTYPES, Config, read_config
from engine.device import Device, devices, select
from engine.errors import DeviceError
from engine.layers import has_packed_experts, widen
from engine.masks import integers
from engine.metal.table import RHS
from engine.model import Decoder
from engine.module import parameters
from engine.probes import Array, Step, Tap, to_numpy
from engine.rows import Request, Rows, Sampling

# Tokens of a prefill chunk when the caller names no size.
CHUNK = 512
# Whose kernels compute: MLX's, or this engine's own on the host executor or an Apple GPU.
KERNELS = ("mlx", "host", "metal")
# What was launched: kernel names, each once and in the order of first use, by the probe that they compute.
Launched = dict[str, list[str]]


def load(
    folder: str | Path,
    *,
    dtype: str | None = None,
    device: str = "auto",
    kernels: str = "mlx",
    kv_bits: int | None = None,
    kv_group_size: int = 64,
) -> Engine:
    """The checkpoint in `folder` as an Engine that computes in `dtype` (None: the config's torch_dtype) on `device`.

    kernels: "mlx", or the engine's own Metal kernels (engine/kernel_modules says for what) on the "host" (the host
    executor, on the CPU) or on "metal" (an Apple GPU, untested on hardware): in float32 or float16, of a checkpoint
    whose experts are blocks in a GGUF file. kv_bits: None, or with how many bits
    the keys and values of full-attention layers are kept, in groups of kv_group_size, which must divide head_dim.
    Raises CheckpointError for a folder that isn't exactly what its config.json says, DeviceError for an absent device,
    ValueError for what has no kernels.
    """
    if kernels not in KERNELS:
        raise ValueError(f"kernels is {kernels!r}; one of {', '.join(KERNELS)} is expected")
    own = kernels != "mlx"
    chosen = select(_device_for(kernels, device))
    folder = Path(folder)
    config = read_config(folder)
    dtype = config.torch_dtype if dtype is None else dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; one of {', '.join(DTYPES)} is expected")
    if own and dtype not in RHS:
        raise ValueError(f"dtype is {dtype!r}; our kernels multiply {' and '.join(RHS)}, kernels mlx any")
    kv = None if kv_bits is None else Affine(group_size=kv_group_size, bits=kv_bits)
    if kv is not None and config.head_dim % kv.group_size:
        raise ValueError(f"kv_group_size is {kv.group_size}; it must divide the model's head_dim, {config.head_dim}")
    launched: Launched = {}
    with mx.stream(chosen.handle):
        checkpoint = load_checkpoint(folder, config, getattr(mx, dtype), keep_blocks=own)
        model = Decoder(config, checkpoint.experts)
        if own:
            _install(model, config, checkpoint.blocks, kernels, launched)
        model.load_weights(list(checkpoint.tensors.items()))
        if chosen.name == "cpu":
            widen(model)
        mx.eval(parameters(model))
    return Engine(model, config, dtype=dtype, device=chosen, blocks=checkpoint.blocks, launched=launched, kv=kv)


def _device_for(kernels: str, device: str) -> str:
    """The device to select for `kernels`, given the one asked for; DeviceError where the two can't be had together."""
    if kernels == "mlx":
        return device
    place, needed = {"host": ("the CPU", "cpu"), "metal": ("an Apple GPU", "metal")}[kernels]
    if device not in ("auto", needed):
        raise DeviceError(
            f"device {device!r}: kernels {kernels} run on {place}; ask for device {needed}, or for kernels mlx"
        )
    found = devices()[needed]
    if not found.available:
        raise DeviceError(
            f"--kernels metal needs an Apple GPU; {found.detail}: --kernels host runs the same kernels on the CPU"
        )
    return needed


def _install(model: Decoder, config: Config, blocks: Mapping[str, Blocks], kernels: str, launched: Launched) -> None:
    # Imported here: it needs the pinned C++ compiler, and who asks for MLX's kernels doesn't.
    from engine.kernel_modules import PLACES, install

    def note(probe: str, kernel: str) -> None:
        names = launched.setdefault(probe, [])
        if kernel not in names:
            names.append(kernel)

    install(model, config, blocks, PLACES[kernels], note)


class Engine:
    """A loaded model on one device; `run` and `generate` leave nothing behind but the names in `kernels`.

    `blocks` are the expert stacks that are kept as blocks, by tensor name, and `launched` is where their kernels are
    noted: both empty unless the kernels are this engine's own. `kv` is how full-attention layers keep their
    keys and values, if not as they are.
    """

    def __init__(
        self,
        model: Decoder,
        config: Config,
        *,
        dtype: str,
        device: Device,
        blocks: Mapping[str, Blocks] | None = None,
        launched: Launched | None = None,
        kv: Affine | None = None,
    ) -> None:
        self.model = model
        self.config = config
        self.dtype = dtype
        self.device = device
        self.blocks = blocks or {}
        self.kv = kv
        self._launched = {} if launched is None else launched

    @property
    def kernels(self) -> dict[str, list[str]]:
        """The engine's own kernels that the last run launched, by the probe that they computed; none with MLX's."""
        return {probe: list(names) for probe, names in self._launched.items()}

    @property
    def provenance(self) -> dict[str, Any]:
        """Which engine, version, device and dtype, the arithmetic that each op is done in on that device, and the
        `kernels` of the last run; `kv_cache` if keys and values are quantised."""
        kv = {} if self.kv is None else {"kv_cache": {"group_size": self.kv.group_size, "bits": self.kv.bits}}
        return kv | {
            "engine": "mlx",
            "version": version("mlx"),
            "device": self.device.name,
            "device_info": self.device.detail,
            "dtype": self.dtype,
            "arithmetic": arithmetic(
                self.device,
                self.dtype,
                self.config,
                packed_experts=has_packed_experts(self.model),
                own_kernels=bool(self.blocks),
            ),
            "kernels": self.kernels,
        }

    def run(self, tokens: Sequence[int], *, tap: Tap | None = None, chunk: int | None = None, decode: int = 0) -> None:
        """Feed `tokens` (T): prefill in chunks of `chunk`, then the last `decode` tokens one by one.

        Every probe is tapped for all T tokens: after each step, in the order of computation, as (tokens of the step, …)
        arrays. Raises ValueError for an empty sequence, an id outside the vocabulary, or a chunk or decode count out of
        range.
        """
        ids = self.checked(tokens)
        if not 0 <= decode <= len(ids):
            raise ValueError(f"decode is {decode}; 0 to {len(ids)} (the number of tokens) is expected")
        caches = self.caches()
        self._launched.clear()
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
        sampling: Sampling | None = None,
        tap: Tap | None = None,
        chunk: int | None = None,
        stop: Collection[int] = (),
    ) -> list[int]:
        """Continuation of `tokens`: up to `max_tokens` ids, ending before the first that is in `stop`, or where the
        logits leave nothing to choose (all −inf, or a NaN).

        Greedy unless `sampling` says otherwise. Tokens are chosen as engine.batching.Batcher chooses a row's, so the
        same prompt, options and seed give the same tokens there. Taps every token that is fed: the prompt, and each
        generated token but the last; the probe "token" is the greedy one, whichever is drawn. Raises ValueError as
        `run` does, and for an option out of range.
        """
        ids = self.checked(tokens)
        request = Request(
            number=1, prompt=ids, max_tokens=max_tokens, stop=frozenset(stop), sampling=sampling or Sampling()
        )
        rows, caches = Rows([request], V=self.config.vocab_size), self.caches()
        self._launched.clear()
        *before, last = _chunks(ids, chunk)
        for step in before:
            self._step(step, caches, tap)
        event = request.accept(self._step(last, caches, tap, rows))
        while not event.reason:
            event = request.accept(self._step([request.last], caches, tap, rows))
        return request.generated

    def weights(self) -> Iterator[tuple[str, Array]]:
        """The parameters exactly as held, under the checkpoint's names: affine weights as codes, scales and biases.

        In the run's dtype, but for the correction bias and what `engine.layers.widen` keeps in float32 on the CPU.
        Stacks held as blocks are given as the values of the blocks.
        """
        for name, x in parameters(self.model).items():
            yield name, to_numpy(x)
        for name, stack in self.blocks.items():
            yield name, stack.values(self.dtype)

    def _step(self, tokens: Sequence[int], caches: list[Cache], tap: Tap | None, rows: Rows | None = None) -> int:
        """Feed `tokens` (L) at once; the next token, greedy or as `rows` (of one request) choose it.

        One evaluation, then the probes go to the tap.
        """
        with mx.stream(self.device.handle):
            step = None if tap is None else Step()
            probe = None if step is None else step.note
            logits = self.model(mx.array([tokens], dtype=mx.int32), caches, probe)
            # argmax returns the lowest id among equals on every backend of MLX.
            token = mx.argmax(logits, axis=-1).astype(mx.int32)
            if step is not None:
                step.note("token", token)
            chosen = token[:, -1] if rows is None else rows.choose(logits[:, -1])
            mx.eval(
                chosen,
                [cache.state for cache in caches],
                [] if rows is None else rows.state,
                [] if step is None else step.arrays,
            )
            if step is not None and tap is not None:
                step.flush(tap)
            return integers(chosen)[0]

    def caches(self) -> list[Cache]:
        """Empty caches for one sequence, one a layer."""
        config = self.config
        kv = {} if self.kv is None else {"kv_bits": self.kv.bits, "kv_group_size": self.kv.group_size}
        return [
            row_cache(kind, config.sliding_window, sinks=config.attention_sinks, **kv) for kind in config.layer_types
        ]

    def checked(self, tokens: Sequence[int]) -> list[int]:
        """`tokens` as a list of ids; ValueError for none at all, or one outside the vocabulary."""
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
