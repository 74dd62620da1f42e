"""Attention over quantised tokens in the dtype of the inputs throughout, the softmax in float32."""

import torch


def dequantise(packed, bits):
    codes, scales, biases = packed
    shifts = torch.arange(0, 32, bits, dtype=torch.int64)
    values = (codes.to(torch.int64)[..., None] >> shifts) & (2**bits - 1)
    values = values.flatten(-2).to(scales.dtype)
    grouped = values.unflatten(-1, (scales.shape[-1], -1))
    return (grouped * scales[..., None] + biases[..., None]).flatten(-2)


def candidate(q, keys, values, *, scale, mask=None, sinks=None, group_size, bits):
    k, v = dequantise(keys, bits), dequantise(values, bits)
    r, L, S = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    k, v = k.repeat_interleave(r, dim=1), v.repeat_interleave(r, dim=1)
    scores = (q * scale) @ k.transpose(-1, -2)
    if isinstance(mask, str):
        mask = torch.arange(S) <= torch.arange(S - L, S)[:, None]
    if mask is not None:
        hidden = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if hidden else scores + mask
        if not hidden:  # NaN would spread: torch 2.13's bfloat16 product on AMX puts it into the row before, too
            scores = scores.clamp(min=torch.finfo(scores.dtype).min)
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(*scores.shape[:3], 1)], dim=-1)
    weights = torch.softmax(scores.float(), dim=-1).to(q.dtype)
    return weights[..., :S] @ v
