"""`python -m audits.accuracy`: what the shipped model gets right, on the reference and on the engine.

Held-out accuracy is the semantic measure of drift: a whole answer is right or wrong. It forgives much that the probes
don't (goldens/model/README.md), so it stands beside them and replaces nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from audits.cases import SHIPPED, Case
from audits.runs import load_engine, load_reference
from goldens.fixture.accuracy import is_right
from goldens.fixture.tasks import TASKS, held_out

Logits = Callable[[Sequence[int]], Any]


def logits_of(engine: str, dtype: str, device: str) -> Logits:
    """tokens [T] -> logits [T,V] of the shipped model on "reference" or "mlx"."""
    if engine == "reference":
        return load_reference(SHIPPED, dtype).run
    loaded = load_engine(Case(name="accuracy", tokens=(0,), dtype=dtype, device=device))

    def logits(tokens: Sequence[int]) -> Any:
        rows: list[Any] = []
        loaded.run(tokens, tap=lambda name, array: rows.append(array) if name == "logits" else None)
        return np.concatenate(rows)

    return logits


def main() -> None:
    """Print one Markdown row a task."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--engine", choices=("reference", "mlx"), default="reference")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--n", type=int, default=100, help="held-out prompts a task")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logits = logits_of(options.engine, options.dtype, options.device)
    print(f"| task | right, of {options.n} held-out prompts |\n| --- | --- |", flush=True)
    for task in TASKS:
        right = sum(is_right(logits, *pair) for pair in held_out(task, options.n, options.seed))
        print(f"| {task} | {right / options.n:.1%} |", flush=True)


if __name__ == "__main__":
    main()
