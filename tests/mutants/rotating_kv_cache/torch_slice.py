"""The whole window in order, cut after each update, in torch. It can't be trimmed once it is full."""

import torch


class RotatingKVCache:
    def __init__(self, max_size, keep):
        self.max_size, self.keep, self.offset = max_size, keep, 0
        self.held = None

    def update_and_fetch(self, keys, values):
        new = (keys, values)
        if self.held is None:
            self.held = [x.clone() for x in new]
        else:
            self.held = [torch.cat([self.cut(old), x], dim=2) for old, x in zip(self.held, new, strict=True)]
        self.offset += keys.shape[2]
        return tuple(self.held)

    def cut(self, x):
        excess = x.shape[2] - (self.max_size - 1)
        if excess <= 0:
            return x
        keep = min(self.keep, self.max_size - 1)
        return torch.cat([x[:, :, :keep], x[:, :, keep + excess :]], dim=2)

    def make_mask(self, n, window_size=None, return_array=False):
        held = 0 if self.held is None else min(self.held[0].shape[2], self.max_size - 1)
        window = min(window_size or self.max_size, self.max_size)
        query, key = torch.arange(held, held + n)[:, None], torch.arange(held + n)
        near = (key > query - window) | (key < self.keep)
        return (key <= query) & near

    def is_trimmable(self):
        return self.offset < self.max_size

    def trim(self, n):
        if not self.is_trimmable():
            return 0
        n = min(n, self.offset)
        self.offset -= n
        self.held = [x[:, :, : self.offset] for x in self.held]
        return n

    @property
    def state(self):
        return {"held": self.held, "offset": self.offset}

    @state.setter
    def state(self, state):
        self.held, self.offset = state["held"], state["offset"]


candidate = RotatingKVCache
