"""Which kernels ran, as an engine says it of its run ("kernels": probe -> names), in lines for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from goldens.trace import DIMS

Launched = Mapping[str, Sequence[str]]


def kernel_lines(runs: Iterable[Launched]) -> list[str]:
    """A line a layer, what all `runs` launched together; layers that launched the same share one."""
    merged: dict[str, list[str]] = {}
    for run in runs:
        for probe, names in run.items():
            merged.setdefault(probe, []).extend(names)
    layers: dict[str, dict[str, list[str]]] = {}
    # In the order of computation, which a stored run's provenance has not kept.
    for layer, op, names in sorted(((*_split(probe), names) for probe, names in merged.items()), key=_place):
        # By kernels first, so that gate, up and down are named together.
        layers.setdefault(layer, {}).setdefault(" + ".join(dict.fromkeys(names)), []).append(op)
    texts: dict[str, list[str]] = {}
    for layer, ops in layers.items():
        texts.setdefault("; ".join(f"{', '.join(names)} {kernels}" for kernels, names in ops.items()), []).append(layer)
    return [f"kernels of {_named(found)}: {text}" for text, found in texts.items()]


def _place(one: tuple[str, str, list[str]]) -> tuple[int, int, str]:
    layer, op, _ = one
    ops = list(DIMS)
    return int(layer or -1), ops.index(op) if op in ops else len(ops), op


def _split(probe: str) -> tuple[str, str]:
    """`layers.3.moe.gate` → (`3`, `gate`); any other probe has no layer."""
    parts = probe.split(".")
    return (parts[1], parts[-1]) if parts[0] == "layers" and len(parts) > 2 and parts[1].isdecimal() else ("", probe)


def _named(layers: Sequence[str]) -> str:
    if layers == [""]:
        return "the run"
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {', '.join(layers)}"
