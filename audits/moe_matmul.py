"""The wide-tile audit: does a routed matmul compute every token of every tile, at every residue?

Each case runs the very kernel on the host executor and judges it token by token: weights decoded by the `gguf` package,
weights and activations rounded to half as the kernels do, products and sums bounded as float32 ones. A different x for
each token, random blocks, NaN-filled outputs and several experts, because uniform data can't see a permuted token, a
wrong slot or a block that is read twice.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from audits.blocks import random_blocks
from audits.kernel_spec import FORMATS, RHS, KernelSpec, read_specs
from audits.verdict import Verdict
from engine.metal.library import Library
from engine.metal.library import compile as compile_metal
from engine.metal.table import KERNELS
from reference import bounds
from reference.arithmetic import Arithmetic
from reference.threads import threads_for

Array = np.ndarray[Any, np.dtype[Any]]

NAME = "moe_matmul"
OWN = KERNELS / "moe.toml"
# Tokens of the fullest expert: both sides of every tile boundary (spec of the published defect, which began at token
# 32).
TOKENS = (1, 31, 32, 33, 63, 64, 65, 96, 127, 128, 129)
WIDTHS = (256, 512, 1024)
LOADS = ("one", "even", "skewed", "empty")
# Products of two halves are exact in float32, which accumulates; one store, in float32 too.
PART = 6  # kernels that are compiled in one go
ARITHMETIC = Arithmetic.claim("float16", accumulate="float32", output="float32")


@dataclass(frozen=True, kw_only=True)
class MatmulCase:
    """One launch: `tokens` of the fullest expert, K elements, M weight rows, how the experts are loaded, and the
    seed.
    """

    kernel: str
    tokens: int
    K: int
    M: int
    load: str
    seed: int
    checked: bool = False
    poison: bool = True


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The operands of a case and what honest arithmetic gives: ids [n,k], pairs [E,n], expected and bound [n,k,M]."""

    arrays: Mapping[str, Array]
    sizes: Mapping[str, int]
    ids: Array
    expected: Array
    bound: Array


def routing(load: str, tokens: int, rng: np.random.Generator) -> tuple[Array, int]:
    """Expert ids [n,k], distinct within a token, and the number of experts E; the fullest expert has `tokens` tokens.

    one: a single expert. even: all four as full. skewed: expert 0 gets all tokens, the rest few. empty: as skewed, but
    two of six experts get none.
    """
    if load == "one":
        return np.zeros((tokens, 1), dtype=np.int64), 1
    if load == "even":
        first = 2 * (np.arange(2 * tokens) % 2)
        ids = np.stack([first, first + 1], axis=1)[rng.permutation(2 * tokens)]
        return rng.permuted(ids, axis=1), 4
    others = [1, 2, 3] if load == "skewed" else [1, 3, 4]
    chance = np.array([0.8, 0.15, 0.05])
    ids = np.stack([np.zeros(tokens, dtype=np.int64), rng.choice(others, size=tokens, p=chance)], axis=1)
    return rng.permuted(ids, axis=1), 4 if load == "skewed" else 6


def expert_pairs(ids: Array, experts: int) -> tuple[Array, Array]:
    """counts [E] and pairs [E,n] (token·k + slot, ascending; unused entries 0xFFFFFFFF) of ids [n,k]."""
    n = len(ids)
    pairs = np.full((experts, n), 0xFFFFFFFF, dtype=np.uint32)
    counts = np.zeros(experts, dtype=np.uint32)
    for expert in range(experts):
        chosen = np.flatnonzero(ids.reshape(-1) == expert)
        counts[expert] = len(chosen)
        pairs[expert, : len(chosen)] = chosen
    return counts, pairs


@lru_cache(maxsize=8)
def _weights(kind: str, experts: int, M: int, K: int, seed: int) -> tuple[Array, Array]:
    """Blocks and the half-rounded values that they decode to, float64 [E,M,K]; kept, as cases share them."""
    rng = np.random.default_rng([seed, experts, M, K])
    if kind == "f16":
        values = rng.standard_normal((experts, M, K)).astype(np.float16)
        return values.view(np.uint8), values.astype(np.float64)
    blocks = random_blocks(FORMATS[kind][0], (experts, M), K, rng)
    decoded = gguf.dequantize(blocks, gguf.GGMLQuantizationType[FORMATS[kind][0]])
    return blocks, decoded.reshape(experts, M, K).astype(np.float16).astype(np.float64)


def problem(spec: KernelSpec, case: MatmulCase) -> Problem:
    """Operands, expected result and bound of a case."""
    rng = np.random.default_rng([case.seed, case.tokens, case.K, case.M])
    ids, experts = routing(case.load, case.tokens, rng)
    blocks, values = _weights(spec.format, experts, case.M, case.K, case.seed)
    n, k = ids.shape
    x = rng.standard_normal((n, case.K)).astype(RHS[spec.rhs])
    counts, pairs = expert_pairs(ids, experts)
    half = torch.from_numpy(x.astype(np.float16).astype(np.float64))
    expected, bound = np.empty((n, k, case.M)), np.empty((n, k, case.M))
    for expert in range(experts):
        token, slot = np.nonzero(ids == expert)
        if len(token):
            with threads_for(values[expert].size):
                found = bounds.linear(half[torch.from_numpy(token)], torch.from_numpy(values[expert]), ARITHMETIC)
            expected[token, slot], bound[token, slot] = found.expected.numpy(), found.bound.numpy()
    row_bytes = blocks.shape[-1]
    sizes = {"n": n, "K": case.K, "M": case.M, "E": experts, "top_k": k, "row_bytes": row_bytes}
    sizes |= {"expert_bytes": case.M * row_bytes, "x_row_bytes": x.nbytes // n, "out_row_bytes": 4 * case.M}
    arrays = {"weights": blocks, "x": x, "counts": counts, "pairs": pairs, "experts": ids.astype(np.int32)}
    return Problem(arrays=arrays, sizes=sizes, ids=ids, expected=expected, bound=bound)


@lru_cache(maxsize=8)
def library(
    spec_source: Path,
    checked: bool,
    include_dirs: tuple[Path, ...],
    defines: tuple[Any, ...],
    constants: tuple[Any, ...],
) -> Library:
    """The compiled source, kept for the session."""
    return compile_metal(
        spec_source, checked=checked, include_dirs=include_dirs, defines=dict(defines), constants=dict(constants)
    )


def _library(spec: KernelSpec, checked: bool) -> Library:
    return library(spec.source, checked, spec.include_dirs, tuple(spec.defines.items()), tuple(spec.constants.items()))


def build(wanted: Iterable[tuple[KernelSpec, MatmulCase]]) -> None:
    """Compile what the cases launch, a few kernels of a library in one go and as many such parts at once as there are
    cores: one kernel at a time takes several times as long, and that is most of a first run.
    """
    names: dict[Library, dict[str, None]] = {}
    for spec, case in wanted:
        names.setdefault(_library(spec, case.checked), {})[spec.name] = None
    parts = [(lib, list(found)[i : i + PART]) for lib, found in names.items() for i in range(0, len(found), PART)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda part: part[0].build(part[1]), parts))


def run_case(spec: KernelSpec, case: MatmulCase, advance: Callable[[str], None] = lambda _: None) -> Verdict:
    """Run one case and judge it token by token."""
    advance(f"{case.kernel} R={case.tokens} K={case.K} M={case.M} {case.load}")
    work = problem(spec, case)
    out = np.empty(work.expected.shape, dtype=np.float32)
    kernel = _library(spec, case.checked)[spec.name]
    # As bytes, which is what Metal binds: operands of another type than the kernel's are a defect for this to find.
    operands = {name: array.reshape(-1).view(np.uint8) for name, array in {**work.arrays, "out": out}.items()}
    run = kernel.launch(
        spec.bind(operands, work.sizes),
        threadgroups=spec.grid(work.sizes),
        threads=spec.threads,
        threadgroup_memory=spec.staging(work.sizes),
        outputs=(spec.out,),
        poison=case.poison,
        schedule_seed=case.seed if case.checked else None,
    )
    faults = [asdict(fault) for fault in run.faults]
    # `<=` is false for NaN, so a NaN is a mismatch.
    with np.errstate(invalid="ignore"):
        wrong = ~(np.abs(out.astype(np.float64) - work.expected) <= work.bound)
    evidence = {"kernel": run.kernel, "device": run.device, **mismatch(wrong, work.ids, spec.tile), "faults": faults}
    failed = evidence["elements"] or faults
    return Verdict(
        outcome="fail" if failed else "pass",
        audit="moe_matmul",
        case={"contract": "moe_matmul", "source": str(spec.source.name), **asdict(case)},
        message=_message(spec, case, evidence) if failed else f"{case.kernel}: every token within its bound",
        evidence=evidence,
    )


def mismatch(wrong: Array, ids: Array, tile: int) -> dict[str, Any]:
    """What is wrong and where, from a mask [n,k,M]: elements, share, first bad token (by its place in its expert's
    list), and the boundary b such that, in every tile, exactly the places from b on are bad (None: no such b).
    """
    bad, place = wrong.any(axis=-1), np.empty(ids.shape, dtype=np.int64)
    for expert in np.unique(ids):
        chosen = np.nonzero(ids == expert)
        place[chosen] = np.arange(len(chosen[0]))
    within = place % tile
    boundary: int | None = None
    if bad.any():
        first = int(within[bad].min())
        boundary = first if first > 0 and bool((bad == (within >= first)).all()) else None
    return {
        "elements": int(wrong.sum()),
        "share": float(wrong.mean()),
        "tokens": int(bad.sum()),
        "first_bad_token": int(place[bad].min()) if bad.any() else None,
        "boundary": boundary,
    }


def _message(spec: KernelSpec, case: MatmulCase, evidence: Mapping[str, Any]) -> str:
    where = f"{case.kernel} R={case.tokens} K={case.K} M={case.M} {case.load} experts"
    parts = []
    if evidence["elements"]:
        parts.append(
            f"{evidence['elements']} elements ({evidence['share']:.1%}) of {evidence['tokens']} tokens are wrong,"
            f" the first at token {evidence['first_bad_token']} of its expert"
        )
    if evidence["boundary"] is not None:
        parts.append(f"correct for positions < {evidence['boundary']} in a tile of {spec.tile}")
    if evidence["faults"]:
        parts.append(f"{len(evidence['faults'])} faults, first: {evidence['faults'][0]['message']}")
    return f"{where}: {'; '.join(parts)}"


def cases(specs: Sequence[KernelSpec], *, full: bool, seed: int) -> Iterator[tuple[KernelSpec, MatmulCase]]:
    """The sweep. Quick: every kernel at every boundary with one expert and a ragged row tile, the other widths and
    loads in turn, and one checked run each. Full: everything crossed, and every residue modulo the tile.
    """
    for i, spec in enumerate(specs):
        ragged = spec.rows[-1]
        for j, tokens in enumerate(TOKENS):
            if full:
                combinations = [(K, M, load) for K in WIDTHS for M in spec.rows for load in LOADS]
            else:
                M = spec.rows[j % len(spec.rows)]
                combinations = [(256, ragged, "one"), (WIDTHS[(i + j) % 3], M, LOADS[(i + j) % 4])]
            for K, M, load in dict.fromkeys(combinations):
                yield spec, MatmulCase(kernel=spec.name, tokens=tokens, K=K, M=M, load=load, seed=seed)
        for tokens in range(1, 2 * spec.tile + 1) if full else ():
            yield spec, MatmulCase(kernel=spec.name, tokens=tokens, K=256, M=spec.rows[0], load="one", seed=seed)
        for tokens in (spec.tile - 1, spec.tile + 1) if full else (33,):
            yield (
                spec,
                MatmulCase(kernel=spec.name, tokens=tokens, K=256, M=ragged, load="skewed", seed=seed, checked=True),
            )


def audit(
    candidate: str | Path | None, *, full: bool, seed: int, advance: Callable[[str], None] = lambda _: None
) -> Iterator[Verdict]:
    """Sweep tile × format × right-hand side × tokens × widths × loads, judged token by token.

    `candidate` is a TOML file that describes kernels (docs/wide-tile-audit.md); None: our own.
    """
    sweep = list(cases(read_specs(described(candidate)), full=full, seed=seed))
    advance("compiling the kernels")
    build(sweep)
    for spec, case in sweep:
        verdict = run_case(spec, case, advance)
        yield replace(verdict, case={**verdict.case, "candidate": None if candidate is None else str(candidate)})


def replay(case: Mapping[str, Any]) -> Verdict:
    """Run the one case that a Verdict of this audit recorded."""
    known = {field.name for field in fields(MatmulCase)}
    if missing := [f.name for f in fields(MatmulCase) if f.default is MISSING and f.name not in case]:
        raise ValueError(f"this is no case of moe_matmul: it lacks {', '.join(missing)}")
    wanted = MatmulCase(**{key: value for key, value in case.items() if key in known})
    specs = {spec.name: spec for spec in read_specs(described(case.get("candidate")))}
    if not isinstance(wanted.kernel, str) or wanted.kernel not in specs:
        raise ValueError(f"{described(case.get('candidate'))} describes no kernel {wanted.kernel!r}")
    _check_case(wanted, specs[wanted.kernel])
    return run_case(specs[wanted.kernel], wanted)


def _check_case(case: MatmulCase, spec: KernelSpec) -> None:
    """ValueError for a field that can't be what it is."""
    block = FORMATS[spec.format][1]
    for name, least in (("tokens", 1), ("K", block), ("M", 1), ("seed", 0)):
        value = getattr(case, name)
        if type(value) is not int or value < least or (name == "K" and value % block):
            blocks = f", in whole blocks of {block}," * (name == "K" and block > 1)
            expected = f"a whole number from {least} on{blocks} is expected"
            raise ValueError(f"this is no case of moe_matmul: its {name} is {value!r}; {expected}")
    if case.load not in LOADS:
        raise ValueError(f"this is no case of moe_matmul: its load is {case.load!r}; there is {', '.join(LOADS)}")


def described(candidate: Any) -> Path:
    """The TOML file of a candidate; ValueError for what is none."""
    if candidate is None:
        return OWN
    if not isinstance(candidate, str | Path) or Path(candidate).suffix != ".toml":
        raise ValueError("moe_matmul takes a TOML file that describes kernels; docs/wide-tile-audit.md has the keys")
    return Path(candidate)
