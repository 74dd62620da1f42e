"""The engine under judgement: a mixture-of-experts decoder in MLX, on Metal, CUDA or the CPU.

    import engine
    model = engine.load(folder, dtype="bfloat16", device="auto")
    model.run(tokens, tap=recorder)          # every probe of every token, in the order of computation
    model.generate(tokens, max_tokens=32)    # greedy
    model.generate(tokens, max_tokens=32, sampling=engine.Sampling(temperature=0.8, top_p=0.9, seed=7))

It shares no code and no type with the reference that it is judged by. MLX is imported with the first name used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.errors import CheckpointError, DeviceError
    from engine.generate import Engine, load
    from engine.rows import Sampling

__all__ = ["CheckpointError", "DeviceError", "Engine", "Sampling", "load"]


def __getattr__(name: str) -> Any:
    if name in ("CheckpointError", "DeviceError"):
        from engine import errors

        return getattr(errors, name)
    if name in ("Engine", "load"):
        from engine import generate

        return getattr(generate, name)
    if name == "Sampling":
        from engine.rows import Sampling

        return Sampling
    raise AttributeError(f"module 'engine' has no attribute {name!r}")
