"""Right-justified rows that are concatenated, with offsets in Python integers, in MLX."""

import mlx.core as mx


class KVCache:
    """One sequence."""

    def __init__(self):
        self.held = None

    @property
    def offset(self):
        return 0 if self.held is None else self.held[0].shape[2]

    def update_and_fetch(self, keys, values):
        new = (keys, values)
        old = self.held or [x[:, :, :0] for x in new]
        self.held = [mx.concatenate([a, b], axis=2) for a, b in zip(old, new, strict=True)]
        return self.held[0], self.held[1]

    def make_mask(self, n, return_array=False):
        return None if n == 1 else "causal"


class BatchKVCache:
    def __init__(self, left_padding):
        self.padding = list(left_padding)
        self.columns = 0
        self.held = None
        self.waiting = None

    @property
    def offset(self):
        return mx.array([self.columns - p for p in self.padding])

    def update_and_fetch(self, keys, values):
        new = (keys, values)
        old = self.held or [x[:, :, :0] for x in new]
        self.held = [mx.concatenate([a, b], axis=2) for a, b in zip(old, new, strict=True)]
        self.columns += keys.shape[2]
        return tuple(self.held)

    def make_mask(self, n, window_size=None, return_array=False):
        query, key = mx.arange(self.columns, self.columns + n)[:, None], mx.arange(self.columns + n)
        mask = (key <= query) & (key >= mx.array(self.padding)[:, None, None, None])
        if window_size is not None:
            mask = mask & (key > query - window_size)
        return mx.where(mask, 0.0, mx.finfo(mx.float32).min)

    def prepare(self, *, left_padding=None, lengths=None, right_padding=None):
        if left_padding is not None:
            self.padding = [a + b for a, b in zip(self.padding, left_padding, strict=True)]
        self.waiting = right_padding

    def finalize(self):
        shifts = mx.array(self.waiting)[:, None]
        index = ((mx.arange(self.columns) - shifts) % self.columns)[:, None, :, None]
        self.held = [mx.take_along_axis(x, index, axis=2) for x in self.held]
        self.padding = [a + b for a, b in zip(self.padding, self.waiting, strict=True)]
        self.waiting = None

    def is_trimmable(self):
        return True

    def trim(self, n):
        n = min(n, self.columns)
        self.columns -= n
        self.held = [x[:, :, : self.columns] for x in self.held]
        return n

    def filter(self, rows):
        self.padding = [self.padding[i] for i in rows]
        if self.held is not None:
            spare = min(self.padding)
            self.held = [x[mx.array(rows)][:, :, spare:] for x in self.held]
            self.padding = [p - spare for p in self.padding]
            self.columns -= spare

    def extend(self, other):
        columns = max(self.columns, other.columns)
        some = self.held or other.held
        if some is not None:
            self.held = [mx.concatenate([c.justified(i, columns, some[i]) for c in (self, other)]) for i in (0, 1)]
        self.padding = [p + columns - c.columns for c in (self, other) for p in c.padding]
        self.columns = columns

    def justified(self, i, columns, like):
        shape = (len(self.padding), like.shape[1], 0, like.shape[3])
        x = mx.zeros(shape, like.dtype) if self.held is None else self.held[i]
        return mx.pad(x, [(0, 0), (0, 0), (columns - x.shape[2], 0), (0, 0)])

    def extract(self, b):
        row = KVCache()
        row.held = [mx.contiguous(x[b : b + 1, :, self.padding[b] :]) for x in self.held]
        return row

    @classmethod
    def merge(cls, rows):
        columns = max(row.offset for row in rows)
        batch = cls([columns - row.offset for row in rows])
        batch.columns = columns
        filled = next((row.held for row in rows if row.held is not None), None)
        if filled is not None:
            parts = []
            for row in rows:
                alone = cls([0])
                alone.held = row.held
                parts.append([alone.justified(i, columns, filled[i]) for i in (0, 1)])
            batch.held = [mx.concatenate([part[i] for part in parts]) for i in (0, 1)]
        return batch

    @property
    def state(self):
        return {"held": self.held, "padding": self.padding}

    @state.setter
    def state(self, state):
        self.held, self.padding = state["held"], state["padding"]
        self.columns = self.held[0].shape[2]


candidate = BatchKVCache
