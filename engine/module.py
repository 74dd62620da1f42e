"""mlx.nn.Module behind a few typed names: MLX ships types for mlx.core alone."""

from __future__ import annotations

import mlx.core as mx
from mlx.nn.layers.base import Module as _Module
from mlx.utils import tree_flatten


class Module(_Module):
    """A tree of parameters and submodules; see mlx.nn.Module."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # mlx.nn has no annotations.


def parameters(model: Module) -> dict[str, mx.array]:
    """Every parameter of `model` under its dotted name."""
    tree = model.parameters()  # type: ignore[no-untyped-call]  # as above
    return dict(tree_flatten(tree))


def submodules(model: Module) -> list[object]:
    """`model` and every module below it."""
    return list(model.modules())  # type: ignore[no-untyped-call]  # as above
