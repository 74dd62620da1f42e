"""Attention as model code writes it: every step in the dtype of the inputs, the softmax in float32."""

import torch


def candidate(q, k, v, *, scale, mask=None, sinks=None):
    r = q.shape[1] // k.shape[1]
    L, S = q.shape[2], k.shape[2]
    keys, values = (x.repeat_interleave(r, dim=1) for x in (k, v))
    scores = (q @ keys.transpose(-1, -2)) * scale
    if isinstance(mask, str):
        mask = torch.ones(L, S, dtype=torch.bool).tril(diagonal=S - L)
    if mask is not None:
        hidden = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if hidden else scores + mask
        if not hidden:  # NaN would spread: torch 2.13's bfloat16 product on AMX puts it into the row before, too
            scores = scores.clamp(min=torch.finfo(scores.dtype).min)
    if sinks is not None:
        column = sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return weights[..., :S] @ values
