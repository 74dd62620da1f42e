"""As Hugging Face's Llama: normalised in float32, stored, times the weight in the input's dtype."""

import torch


def candidate(x, weight, *, eps):
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)
