"""Concatenation at every update, with an additive mask, in torch."""

import torch


class KVCache:
    def __init__(self):
        self.keys = self.values = None

    @property
    def offset(self):
        return 0 if self.keys is None else self.keys.shape[2]

    def update_and_fetch(self, keys, values):
        self.keys = keys.clone() if self.keys is None else torch.cat([self.keys, keys], dim=2)
        self.values = values.clone() if self.values is None else torch.cat([self.values, values], dim=2)
        return self.keys, self.values

    def make_mask(self, n, window_size=None, return_array=False):
        query = torch.arange(self.offset, self.offset + n)[:, None]
        key = torch.arange(self.offset + n)
        mask = key > query
        if window_size is not None:
            mask = mask | (key <= query - window_size)
        return torch.zeros(mask.shape).masked_fill(mask, torch.finfo(torch.float32).min)

    def is_trimmable(self):
        return True

    def trim(self, n):
        n = min(n, self.offset)
        if n:
            self.keys, self.values = self.keys[:, :, :-n].clone(), self.values[:, :, :-n].clone()
        return n

    @property
    def state(self):
        return [self.keys, self.values]

    @state.setter
    def state(self, state):
        self.keys, self.values = state


candidate = KVCache
