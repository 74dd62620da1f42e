"""What is run: a model, tokens and options, as plain data that goes into a Verdict and comes back as a replay."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from audits import quantized
from goldens.fixture import tasks
from goldens.fixture.tasks import encode, held_out
from reference.config import read_config

SHIPPED = "shipped"
SHIPPED_FOLDER = Path(tasks.__file__).parent.parent / "model"
TRACES_FOLDER = SHIPPED_FOLDER.parent / "traces"
# The prompts a run takes when none is given: one example a task, for tasks whose documents differ in length, so that
# the sliding window (32) wraps in some and not in others, and recall reaches back further than the window.
DEFAULT_TASKS = ("add", "recall", "chain", "copy", "sort", "balanced")
DECODED = 4  # tokens that are fed one by one at the end, unless told otherwise
RANDOM_LENGTH = 48  # tokens drawn for a model that comes without a vocabulary: one and a half sliding windows
# What experts are quantised to before the run (none: run as they are), and whose kernels compute them.
EXPERTS = ("", *quantized.FORMATS)
KERNELS = ("mlx", "host", "metal")
OPTIONS = ("dtype", "device", "chunk", "decode", "experts", "kernels")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run. `chunk` tokens are prefilled at a time, the last `decode` are fed one by one; `answer` is where the
    answer starts in `tokens` (0: there is none). `experts` and `kernels` are one of EXPERTS and KERNELS.
    """

    name: str
    tokens: tuple[int, ...]
    model: str = SHIPPED
    dtype: str = "float32"
    device: str = "auto"
    chunk: int = 32
    decode: int = 0
    seed: int = 0
    answer: int = 0
    experts: str = ""
    kernels: str = "mlx"

    @property
    def checkpoint(self) -> str:
        """What is run, as `model_folder` takes it: the model, or what its experts' quantisation makes of it."""
        return f"{self.model}+{self.experts}" if self.experts else self.model

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; `from_dict` takes it back."""
        options = {name: getattr(self, name) for name in OPTIONS}
        return {
            "name": self.name,
            "model": self.model,
            "tokens": list(self.tokens),
            "options": options,
            "seed": self.seed,
            "answer": self.answer,
        }

    @classmethod
    def from_dict(cls, case: Mapping[str, Any]) -> Case:
        """The Case of a plain dict: "tokens" is needed; "name", "model", "seed", "answer" and "options" (OPTIONS) have
        defaults (decode: 0). ValueError names a key that is unknown or a value of the wrong kind."""
        if not isinstance(case, Mapping) or not isinstance(options := case.get("options", {}), Mapping):
            raise ValueError('a case is a dict with "tokens", and its "options", if any, are one too')
        known = {"name", "model", "tokens", "options", "seed", "answer"}
        for what, given, names in (("a case has", case, known), ("a case's options have", options, set(OPTIONS))):
            if unknown := sorted(set(given) - names):
                raise ValueError(f"{what} no {unknown[0]!r}; there is {', '.join(sorted(names))}")
        if "tokens" not in case:
            raise ValueError("a case needs 'tokens', a sequence of token ids")
        found = cls(
            name=str(case.get("name", "case")),
            tokens=_tokens(case["tokens"]),
            model=str(case.get("model", SHIPPED)),
            dtype=str(options.get("dtype", cls.dtype)),
            device=str(options.get("device", cls.device)),
            chunk=_count("chunk", options.get("chunk", cls.chunk), 1),
            decode=_count("decode", options.get("decode", 0), 0),
            seed=_count("seed", case.get("seed", 0), 0),
            answer=_count("answer", case.get("answer", 0), 0),
            experts=_choice("experts", options.get("experts", cls.experts), EXPERTS),
            kernels=_choice("kernels", options.get("kernels", cls.kernels), KERNELS),
        )
        if found.decode > len(found.tokens):
            raise ValueError(f"decode is {found.decode}, but there are {len(found.tokens)} tokens")
        return found

    def replay_command(self) -> str:
        """The command that runs this case alone."""
        words = ["assay", "run", "--model", self.model, "--dtype", self.dtype, "--device", self.device]
        words += ["--experts", self.experts] if self.experts else []
        words += ["--kernels", self.kernels] if self.kernels != "mlx" else []
        words += ["--chunk", str(self.chunk), "--decode", str(self.decode), "--tokens", ",".join(map(str, self.tokens))]
        return shlex.join(words)


def _tokens(given: Any) -> tuple[int, ...]:
    array = np.asarray(given) if not isinstance(given, str | bytes) else np.empty(0)
    if array.ndim != 1 or array.dtype.kind not in "iu" or not array.size:
        raise ValueError("a case's tokens are a non-empty sequence of whole numbers")
    return tuple(array.tolist())


def _count(name: str, given: Any, least: int) -> int:
    if isinstance(given, bool) or not isinstance(given, int | np.integer) or given < least:
        raise ValueError(f"{name} is {given!r}; a whole number from {least} on is expected")
    return int(given)


def _choice(name: str, given: Any, choices: Sequence[str]) -> str:
    if given not in choices:
        raise ValueError(
            f"{name} is {given!r}; one of {', '.join(choice or '(none)' for choice in choices)} is expected"
        )
    return str(given)


def model_folder(model: str, advance: Callable[[str], None] = lambda _: None) -> Path:
    """The folder of a model: "shipped" is the one in the repository, MODEL+FORMAT is MODEL with its experts quantised.

    The latter is made when it isn't there yet; `advance` is told so before.
    """
    base, _, kind = model.rpartition("+")
    if base and kind in quantized.FORMATS and not Path(model).exists():
        return quantized.quantized_checkpoint(model_folder(base), kind, advance)
    return SHIPPED_FOLDER if model == SHIPPED else Path(model)


def cases_for(
    model: str,
    *,
    prompts: Sequence[str] = (),
    tokens: str | None = None,
    seed: int = 0,
    decode: int | None = None,
    **options: Any,
) -> list[Case]:
    """Cases for `model` with `options` (OPTIONS but decode): the given tokens or prompts, else built-in ones.

    Built in are held-out examples for the shipped model, and random tokens for any other. `decode` None decodes the
    last four tokens, or all but the first of a shorter prompt. ValueError for bad input.
    """
    if tokens is not None and prompts:
        raise ValueError("give either --prompt or --tokens")
    if tokens is not None:
        bases = [Case(name="given", tokens=parse_tokens(tokens), model=model, seed=seed)]
    elif prompts:
        if model != SHIPPED:
            raise ValueError("--prompt is text in the shipped model's vocabulary; for other models give --tokens")
        bases = [Case(name=f"prompt-{i}", tokens=tuple(encode(p)), seed=seed) for i, p in enumerate(prompts)]
    elif model == SHIPPED:
        bases = [example(task, seed) for task in DEFAULT_TASKS]
    else:
        vocabulary = read_config(model_folder(model)).vocab_size
        drawn = np.random.default_rng(seed).integers(vocabulary, size=RANDOM_LENGTH)
        bases = [Case(name=f"random-{seed}", tokens=tuple(drawn.tolist()), model=model, seed=seed)]
    cases = [replace(base, **options) for base in bases]
    fed = [min(DECODED, len(case.tokens) - 1) if decode is None else decode for case in cases]
    # Through from_dict, so that what the command line gives is checked as what Python gives is.
    return [Case.from_dict(replace(case, decode=n).as_dict()) for case, n in zip(cases, fed, strict=True)]


def example(task: str, seed: int) -> Case:
    """One held-out example of a task, prompt and answer, for the shipped model."""
    prompt, answer = held_out(task, 1, seed)[0]
    return Case(name=task, tokens=tuple(encode(prompt + answer)), decode=DECODED, seed=seed, answer=len(encode(prompt)))


def parse_tokens(text: str) -> tuple[int, ...]:
    """Token ids from "1,2,3"."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"--tokens takes ids separated by commas, as in 1,5,7 ({error})") from error
