"""PyTorch's fused attention; a sink is one more key whose value is zero, let in by the mask."""

import torch


def candidate(q, k, v, *, scale, mask=None, sinks=None):
    B, Hq, L, _ = q.shape
    S = k.shape[2]
    if isinstance(mask, str):
        mask = torch.ones(L, S, dtype=torch.bool).tril(S - L)
    k, v = (x.repeat_interleave(Hq // k.shape[1], dim=1) for x in (k, v))
    if sinks is not None:
        bias = torch.zeros(B, Hq, L, S, dtype=q.dtype)
        if mask is not None:
            bias = bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask
        mask = torch.cat([bias, sinks[None, :, None, None].expand(B, Hq, L, 1)], dim=-1)
        k, v = (torch.cat([x, torch.zeros_like(x[:, :, :1])], dim=2) for x in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
