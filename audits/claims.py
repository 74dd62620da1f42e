"""Reading claims of arithmetic from the command line: accumulate=f32,intermediate=input."""

from __future__ import annotations

SHORT = {"f64": "float64", "f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def read_claims(text: str) -> dict[str, str]:
    """Claims by name, e.g. {"accumulate": "float32"}; ValueError for what is no NAME=DTYPE list."""
    claims = {}
    for part in text.split(",") if text else ():
        name, equals, value = part.partition("=")
        if not equals or not name.strip() or not value.strip():
            raise ValueError(f"--claims {text}: NAME=DTYPE,… is expected, e.g. accumulate=f32,intermediate=input")
        claims[name.strip()] = SHORT.get(value.strip(), value.strip())
    return claims
