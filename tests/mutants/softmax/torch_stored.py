"""Each step stored in the input's dtype, the total in float32."""

import torch


def candidate(x):
    e = torch.exp(x - x.amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True, dtype=torch.float32).to(x.dtype)
