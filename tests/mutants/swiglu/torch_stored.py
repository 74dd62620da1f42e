"""silu and the product each stored in the input's dtype."""

import torch


def candidate(gate, up, *, limit=None):
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    return torch.nn.functional.silu(gate) * up
