"""The names that `import assay` offers: wrong arguments are one clear line of the one exception root, ValueError."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import assay

KERNEL = "kernel void k(device int * p) { p[0] = 1; }"


def softmax(x: Any) -> Any:
    return x


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda: assay.compare(1, 2), "actual is of type int; a Trace is expected"),  # type: ignore[arg-type]
        (lambda: assay.bisect({}, {}), "actual is of type dict; a Trace is expected"),  # type: ignore[arg-type]
        (lambda: assay.audit("sdpa", candidate=3), "candidate is of type int, which can't be called; give a function"),
        (
            lambda: assay.audit("sdpa", candidate=np.ones((9, 9))),
            "candidate is of type ndarray, which can't be called; give a function",
        ),
        (
            lambda: assay.audit("sdpa", candidate={"sdpa": 3}),
            "candidate is of type int, which can't be called; give a function",
        ),
        (lambda: assay.audit("softmax", candidate=softmax, device="cuda"), "device 'cuda' is for candidates in mlx"),
        (lambda: assay.audit(3), "contracts are of type int"),  # type: ignore[arg-type]
        (lambda: assay.audit([["sdpa"]]), "no contract"),  # type: ignore[list-item]
        (lambda: assay.audit("softmax", softmax, dtypes=3), "dtypes are of type int"),  # type: ignore[arg-type]
        (lambda: assay.audit("softmax", softmax, layouts=3), "layouts are of type int"),  # type: ignore[arg-type]
        (lambda: assay.audit("softmax", softmax, seed=-1), "seed is -1; a whole number from 0 on"),
        (lambda: assay.audit("softmax", softmax, seed="x"), "seed is 'x'"),  # type: ignore[arg-type]
        (lambda: assay.golden.open(3), "opened by its path; this is of type int"),  # type: ignore[arg-type]
        (lambda: assay.metal.compile(3), "this is of type int"),  # type: ignore[arg-type]
        (lambda: assay.metal.compile(KERNEL, defines=["N"]), "defines is a dict"),  # type: ignore[arg-type]
        (lambda: assay.metal.compile(KERNEL, constants=3), "constants is a dict"),  # type: ignore[arg-type]
        (lambda: assay.metal.compile(KERNEL, include_dirs="headers"), "include_dirs is a list of folders"),
        (lambda: assay.metal.compile(KERNEL)[3], "no kernel is named 3"),  # type: ignore[index]
    ],
)
def test_a_wrong_argument_is_one_clear_line(wrong: Callable[[], Any], told: str) -> None:
    with pytest.raises(ValueError, match=told) as error:
        wrong()
    assert "\n" not in str(error.value)
