"""Goldens for users' code: `with assay.golden.open(path) as g: g.trace, g.provenance`."""

from goldens.errors import GoldenError
from goldens.store import open, write

__all__ = ["GoldenError", "open", "write"]
