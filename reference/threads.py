"""How many threads PyTorch gets: one for small models.

A parallel region costs a rendezvous of all threads; where another process holds a core, that is a scheduler tick.
Measured for the bound of a 256 × 256 linear layer with one of two cores busy: 72 ms with two threads, 0.55 ms with one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Elements of the largest weight matrix from which a second thread pays: 1024 × 1024 in float64 is 8 MB, beyond most L2.
WORTH_THREADS = 1 << 20


@contextmanager
def threads_for(elements: int) -> Iterator[None]:
    """Within it, PyTorch uses one thread if the largest matrix of the work has fewer than WORTH_THREADS elements."""
    before = torch.get_num_threads()
    if elements < WORTH_THREADS:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
