"""As Hugging Face's: cos and sin in the input's dtype, products stored; half-split alone is written as rotate_half."""

import torch


def candidate(x, *, dims, base, scale, offset, traditional):
    frequency = base ** -(torch.arange(0, dims, 2, dtype=torch.float32) / dims)
    position = torch.arange(offset, offset + x.shape[2], dtype=torch.float32) * scale
    angle = position[:, None] * frequency
    turned, rest = x[..., :dims], x[..., dims:]
    if traditional:
        angle = angle.repeat_interleave(2, dim=-1)
        pairs = turned.reshape(*turned.shape[:-1], dims // 2, 2)
        other = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).reshape(turned.shape)
    else:
        angle = torch.cat([angle, angle], dim=-1)
        other = torch.cat([-turned[..., dims // 2 :], turned[..., : dims // 2]], dim=-1)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    return torch.cat([turned * cos + other * sin, rest], dim=-1)
