"""Experts in ggml's blocks: each row decoded block by block in float32, then as dense weights."""

import functools

import numpy as np
from gguf.quants import IQ2_XXS


def candidate(x, w, ids, *, format=None):
    stack = w.astype(np.float32) if format is None else decoded(w, *FORMATS[format])
    out = np.empty((*ids.shape, w.shape[1]), np.float32)
    for expert in np.unique(ids):
        token, slot = np.nonzero(ids == expert)
        out[token, slot] = x[token].astype(np.float32) @ stack[expert].T
    return out.astype(x.dtype)


def decoded(w, size, decode):
    blocks = np.ascontiguousarray(w).reshape(-1, size)
    return decode(blocks).astype(np.float32).reshape(*w.shape[:2], -1)


def half(blocks, at):
    return blocks[:, at : at + 2].copy().view(np.float16).astype(np.float32)


def q8_0(b):
    return half(b, 0) * b[:, 2:34].view(np.int8)


def q4_k(b):
    d, dmin, s = half(b, 0), half(b, 2), b[:, 4:16]
    scale = np.concatenate([s[:, :4] & 63, s[:, 8:] & 15 | s[:, :4] >> 6 << 4], 1)
    least = np.concatenate([s[:, 4:8] & 63, s[:, 8:] >> 4 | s[:, 4:8] >> 6 << 4], 1)
    qs = b[:, 16:].reshape(-1, 4, 1, 32)
    q = np.concatenate([qs & 15, qs >> 4], 2).reshape(-1, 8, 32)
    return (d * scale)[..., None] * q - (dmin * least)[..., None]


def q2_k(b):
    d, dmin, s = half(b, 80), half(b, 82), b[:, :16]
    qs = b[:, 16:80].reshape(-1, 2, 1, 32)
    q = np.concatenate([qs >> shift & 3 for shift in (0, 2, 4, 6)], 2).reshape(-1, 16, 16)
    return (d * (s & 15))[..., None] * q - (dmin * (s >> 4))[..., None]


@functools.cache
def grid():
    IQ2_XXS.init_grid()
    return IQ2_XXS.grid.reshape(256, 8).astype(np.float32)


def iq2_xxs(b):
    groups = b[:, 2:].reshape(-1, 8, 8)
    word = groups[..., 4:].copy().view(np.uint32)
    bits = word[..., None] >> (np.arange(4, dtype=np.uint32)[:, None] * 7 + np.arange(7, dtype=np.uint32)) & 1
    minus = np.concatenate([bits, bits.sum(-1, keepdims=True) & 1], -1)
    step = half(b, 0) * (0.5 + (word[..., 0] >> 28)) * 0.25
    return step[..., None, None] * grid()[groups[..., :4]] * (1 - 2.0 * minus)


FORMATS = {"Q8_0": (34, q8_0), "Q4_K": (144, q4_k), "Q2_K": (84, q2_k), "IQ2_XXS": (66, iq2_xxs)}
