"""Floating-point formats and the arithmetic a candidate states it computes in.

Everything the bounds need to know about a format follows from three integers: precision p, least and greatest exponent
of a normal number. Rounding is done here in float64 by those integers, so that tf32, which no tensor library stores, is
a format like the others.

An `Arithmetic` says which roundings are *allowed*; the bounds turn that into numbers. It is no description of a kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from reference.errors import ArithmeticClaimError


@dataclass(frozen=True, kw_only=True)
class Format:
    """A binary format: precision in bits (hidden bit included), exponents of the least and greatest normal numbers."""

    precision: int
    least_exponent: int
    greatest_exponent: int
    # IEEE 754 lets a GPU flush float32 subnormals to zero (Metal and CUDA fast math do); bfloat16 shares its exponents
    # and its arithmetic. float16 subnormals are kept by Apple and NVIDIA GPUs alike.
    flushes: bool = False


# IEEE 754-2019 table 3.5 (binary16/32/64); bfloat16: float32 cut to 8 bits; TF32: 10 stored mantissa bits (NVIDIA A100
# whitepaper), float32's exponents.
FORMATS: dict[str, Format] = {
    "float64": Format(precision=53, least_exponent=-1022, greatest_exponent=1023),
    "float32": Format(precision=24, least_exponent=-126, greatest_exponent=127, flushes=True),
    "tf32": Format(precision=11, least_exponent=-126, greatest_exponent=127, flushes=True),
    "float16": Format(precision=11, least_exponent=-14, greatest_exponent=15),
    "bfloat16": Format(precision=8, least_exponent=-126, greatest_exponent=127, flushes=True),
}

UNIT_ROUNDOFF: dict[str, float] = {name: 2.0**-f.precision for name, f in FORMATS.items()}
LARGEST: dict[str, float] = {n: (2.0 - 2.0 ** (1 - f.precision)) * 2.0**f.greatest_exponent for n, f in FORMATS.items()}
SMALLEST_NORMAL: dict[str, float] = {name: 2.0**f.least_exponent for name, f in FORMATS.items()}
SMALLEST_SUBNORMAL: dict[str, float] = {n: 2.0 ** (f.least_exponent + 1 - f.precision) for n, f in FORMATS.items()}
# Round to nearest gives infinity from here on: half an ulp above the largest finite number.
OVERFLOW: dict[str, float] = {
    name: LARGEST[name] + 2.0 ** (f.greatest_exponent - f.precision) for name, f in FORMATS.items()
}
# What one operation may lose near zero beyond its relative error: all of a subnormal where they are flushed, else half
# the spacing of subnormals.
UNDERFLOW: dict[str, float] = {
    name: SMALLEST_NORMAL[name] if f.flushes else SMALLEST_SUBNORMAL[name] / 2 for name, f in FORMATS.items()
}


def gamma(n: float, u: float) -> float:
    """γₙ = n·u/(1 − n·u), Higham, Accuracy and Stability, lemma 3.1; infinity when n·u ≥ 1, where the lemma ends."""
    return n * u / (1 - n * u) if n * u < 1 else float("inf")


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent, exactly, for int64 exponents of normal float64 numbers (an exp2 need not be exact)."""
    return ((exponent + 1023) << 52).view(torch.float64)


def _half_spacing(magnitude: Tensor, dtype: str) -> Tensor:
    """Half the distance of neighbours in `dtype` at `magnitude`: u·2^floor(log2 magnitude), at least a subnormal's."""
    form = FORMATS[dtype]
    exponent = torch.frexp(magnitude).exponent.to(torch.int64) - 1
    exponent = exponent.clamp(form.least_exponent, form.greatest_exponent) - form.precision
    return _power_of_two(exponent.clamp(min=-1022))  # below, float64 has no normal number; nothing here goes there


def half_ulp(magnitude: Tensor, dtype: str) -> Tensor:
    """Greatest error of rounding to nearest any real y, |y| ≤ magnitude, to `dtype`: u·2^floor(log2 magnitude).

    float64 in and out. At most twice as small as u·magnitude; half the spacing of subnormals near zero, and never
    more than the magnitude itself, since zero is in every format. Knows no overflow: compare with OVERFLOW.
    """
    return torch.minimum(_half_spacing(magnitude, dtype), magnitude)


def round_to(x: Tensor, dtype: str) -> Tensor:
    """x [...] float64 rounded to nearest even in `dtype`, kept in float64; overflow gives an infinity."""
    spacing = 2 * _half_spacing(x.abs(), dtype)
    rounded = torch.round(x / spacing) * spacing
    return torch.where(x.abs() >= OVERFLOW[dtype], torch.copysign(torch.full_like(x, torch.inf), x), rounded)


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """The roundings a candidate is allowed. Every field takes a name in FORMATS, or "input", which means `dtype`.

    dtype: of the inputs, which are exact. operand: the operands of matrix products (including the ones made on the way:
    scaled queries, probabilities) are rounded to it once more; None, not at all. accumulate: every sum and every scalar
    operation. intermediate: what is stored between the steps of a composite op. output: what is returned; `dtype`
    unless said otherwise. Raises ArithmeticClaimError for a format that does not exist.
    """

    dtype: str
    operand: str | None = None
    accumulate: str = "float32"
    intermediate: str = "float32"
    output: str = "input"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value == "input" and field.name != "dtype":
                object.__setattr__(self, field.name, self.dtype)
            elif value not in FORMATS and not (field.name == "operand" and value is None):
                known = ", ".join([*FORMATS, "input"])
                raise ArithmeticClaimError(f"arithmetic: {field.name}={value!r} is no dtype; use one of {known}")

    @classmethod
    def claim(cls, dtype: str, **claims: str | None) -> Arithmetic:
        """The Arithmetic of inputs of `dtype` under named claims, e.g. accumulate="float32", intermediate="input"."""
        names = [field.name for field in fields(cls) if field.name != "dtype"]
        for name in claims:
            if name not in names:
                raise ArithmeticClaimError(f"arithmetic: no claim {name!r}; the claims are {', '.join(names)}")
        return cls(dtype=dtype, **claims)  # type: ignore[arg-type]  # __post_init__ checks every value
