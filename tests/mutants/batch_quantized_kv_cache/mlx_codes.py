"""Six arrays of codes, scales and biases, right-justified and concatenated, in MLX. extract keeps the codes."""

import mlx.core as mx


class QuantizedKVCache:
    """One sequence, or the storage of several."""

    def __init__(self, group_size=64, bits=8):
        self.group_size, self.bits = group_size, bits
        self.parts = None
        self.offset = 0

    def update_and_fetch(self, keys, values):
        self.append(keys, values)
        self.offset += keys.shape[2]
        return tuple(self.parts[:3]), tuple(self.parts[3:])

    def append(self, keys, values):
        new = [part for x in (keys, values) for part in mx.quantize(x, group_size=self.group_size, bits=self.bits)]
        old = self.parts or [x[:, :, :0] for x in new]
        self.parts = [mx.concatenate([a, b], axis=2) for a, b in zip(old, new, strict=True)]

    def make_mask(self, n, window_size=None, return_array=False):
        query, key = mx.arange(self.offset, self.offset + n)[:, None], mx.arange(self.offset + n)
        mask = key <= query
        return mask if window_size is None else mask & (key > query - window_size)


class BatchQuantizedKVCache(QuantizedKVCache):
    def __init__(self, left_padding, group_size=64, bits=8):
        self.group_size, self.bits = group_size, bits
        self.parts = None
        self.padding = list(left_padding)
        self.columns = 0
        self.waiting = None

    @property
    def offset(self):
        return mx.array([self.columns - p for p in self.padding])

    def update_and_fetch(self, keys, values):
        self.append(keys, values)
        self.columns += keys.shape[2]
        return tuple(self.parts[:3]), tuple(self.parts[3:])

    def make_mask(self, n, window_size=None, return_array=False):
        query, key = mx.arange(self.columns, self.columns + n)[:, None], mx.arange(self.columns + n)
        mask = (key <= query) & (key >= mx.array(self.padding)[:, None, None, None])
        return mask if window_size is None else mask & (key > query - window_size)

    def prepare(self, *, left_padding=None, lengths=None, right_padding=None):
        if left_padding is not None:
            self.padding = [a + b for a, b in zip(self.padding, left_padding, strict=True)]
        self.waiting = right_padding

    def finalize(self):
        shifts = mx.array(self.waiting)[:, None]
        index = ((mx.arange(self.columns) - shifts) % self.columns)[:, None, :, None]
        self.parts = [mx.take_along_axis(x, index, axis=2) for x in self.parts]
        self.padding = [a + b for a, b in zip(self.padding, self.waiting, strict=True)]
        self.waiting = None

    def is_trimmable(self):
        return True

    def trim(self, n):
        n = min(n, self.columns)
        self.columns -= n
        self.parts = [x[:, :, : self.columns] for x in self.parts]
        return n

    def filter(self, rows):
        self.padding = [self.padding[i] for i in rows]
        if self.parts is not None:
            spare = min(self.padding)
            self.parts = [x[mx.array(rows)][:, :, spare:] for x in self.parts]
            self.padding = [p - spare for p in self.padding]
            self.columns -= spare

    def extend(self, other):
        columns = max(self.columns, other.columns)
        some = self.parts or other.parts
        if some is not None:
            parts = [cache.justified(columns, some) for cache in (self, other)]
            self.parts = [mx.concatenate(pair) for pair in zip(*parts, strict=True)]
        self.padding = [p + columns - c.columns for c in (self, other) for p in c.padding]
        self.columns = columns

    def justified(self, columns, some):
        if self.parts is None:
            return [mx.zeros((len(self.padding), x.shape[1], columns, x.shape[3]), x.dtype) for x in some]
        return [mx.pad(x, [(0, 0), (0, 0), (columns - x.shape[2], 0), (0, 0)]) for x in self.parts]

    def extract(self, b):
        row = QuantizedKVCache(self.group_size, self.bits)
        row.parts = [mx.contiguous(x[b : b + 1, :, self.padding[b] :]) for x in self.parts]
        row.offset = row.parts[0].shape[2]
        return row

    @classmethod
    def merge(cls, rows):
        columns = max(row.offset for row in rows)
        batch = cls([columns - row.offset for row in rows], rows[0].group_size, rows[0].bits)
        batch.columns = columns
        filled = next((row.parts for row in rows if row.parts is not None), None)
        if filled is not None:
            parts = []
            for row in rows:
                alone = cls([0], row.group_size, row.bits)
                alone.parts = row.parts
                parts.append(alone.justified(columns, filled))
            batch.parts = [mx.concatenate(same) for same in zip(*parts, strict=True)]
        return batch

    @property
    def state(self):
        return self.parts, self.padding

    @state.setter
    def state(self, state):
        self.parts, self.padding = state
        self.columns = self.parts[0].shape[2]

    @property
    def meta_state(self):
        return str(self.group_size), str(self.bits)

    @meta_state.setter
    def meta_state(self, meta):
        self.group_size, self.bits = map(int, meta)


candidate = BatchQuantizedKVCache
