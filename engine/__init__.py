"""The engine under judgement: a mixture-of-experts decoder in MLX, on Metal, CUDA or the CPU.

    import engine
    model = engine.load(folder, dtype="bfloat16", device="auto")
    model.run(tokens, tap=recorder)          # every probe of every token, in the order of computation
    model.generate(tokens, max_tokens=32)    # greedy

It shares no code and no type with the reference that it is judged by. MLX is imported with the first name used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.errors import CheckpointError, DeviceError
    from engine.generate import Engine, load

__all__ = ["CheckpointError", "DeviceError", "Engine", "load"]


def __getattr__(name: str) -> Any:
    if name in ("CheckpointError", "DeviceError"):
        from engine import errors

        return getattr(errors, name)
    if name in ("Engine", "load"):
        from engine import generate

        return getattr(generate, name)
    raise AttributeError(f"module 'engine' has no attribute {name!r}")
