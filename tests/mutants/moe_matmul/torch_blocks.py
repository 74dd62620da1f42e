"""Q8_0 and Q4_K alone, never decoded: sums of code·x over each sub-block, times its scale, less its min times the sum
of x, as matrix-vector kernels do it.
"""

import torch


def candidate(x, w, ids, *, format=None):
    wide = x.float()
    if format is None:
        return torch.stack([w[row.long()].float() @ v for row, v in zip(ids, wide, strict=True)]).to(x.dtype)
    if format not in FORMATS:
        raise ValueError(f"{format} is not read")
    E, M, _ = w.shape
    size, read = FORMATS[format]
    blocks = w.contiguous().reshape(-1, size)
    codes, scales, least = (part.reshape(E, M, -1, part.shape[-1]) for part in read(blocks))
    out = []
    for row, v in zip(ids, wide, strict=True):
        runs = v.reshape(-1, 32)
        scales_of, mins_of = (part[row.long()].reshape(len(row), M, -1) for part in (scales, least))
        sums = (codes[row.long()].reshape(len(row), M, -1, 32) * runs).sum(-1)
        out.append((scales_of * sums).sum(-1) - (mins_of * runs.sum(-1)).sum(-1))
    return torch.stack(out).to(x.dtype)


def half(blocks, at):
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def q8_0(b):
    d = half(b, 0)
    return b[:, 2:].contiguous().view(torch.int8).float(), d, torch.zeros_like(d)


def q4_k(b):
    s = b[:, 4:16]
    scale = torch.cat([s[:, :4] & 63, s[:, 8:] & 15 | s[:, :4] >> 6 << 4], 1)
    least = torch.cat([s[:, 4:8] & 63, s[:, 8:] >> 4 | s[:, 4:8] >> 6 << 4], 1)
    qs = b[:, 16:].reshape(-1, 4, 1, 32)
    codes = torch.cat([qs & 15, qs >> 4], 2).reshape(-1, 256)
    return codes.float(), half(b, 0) * scale, half(b, 2) * least


FORMATS = {"Q8_0": (34, q8_0), "Q4_K": (144, q4_k)}
