"""Caches are tested on the CPU, whatever else there is."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest


@pytest.fixture(autouse=True)
def on_the_cpu() -> Any:
    with mx.stream(mx.cpu):
        yield
