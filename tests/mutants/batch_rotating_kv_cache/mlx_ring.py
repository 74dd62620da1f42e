"""One ring for all rows, column c in place c mod max_size, in MLX. Pending right padding evicts nothing."""

import mlx.core as mx


class RotatingKVCache:
    """One sequence, in time order."""

    def __init__(self, max_size):
        self.max_size, self.offset = max_size, 0
        self.held = None

    def update_and_fetch(self, keys, values):
        new = (keys, values)
        old = self.held or [x[:, :, :0] for x in new]
        first = max(0, old[0].shape[2] - (self.max_size - 1))
        self.held = [mx.concatenate([a[:, :, first:], b], axis=2) for a, b in zip(old, new, strict=True)]
        self.offset += keys.shape[2]
        return tuple(self.held)

    def make_mask(self, n, window_size=None, return_array=False):
        held = min(self.offset, self.max_size - 1)
        query, key = mx.arange(held, held + n)[:, None], mx.arange(held + n)
        return (key <= query) & (key > query - min(window_size or self.max_size, self.max_size))

    def is_trimmable(self):
        return False


class BatchRotatingKVCache:
    def __init__(self, max_size, left_padding):
        self.max_size = max_size
        self.ring = None
        self.columns = 0  # that were fed, padding included
        self.first = list(left_padding)  # the column of each row's first token
        self.before = [0] * len(self.first)  # tokens that came before column 0
        self.lengths = None

    @property
    def offset(self):
        return mx.array([self.columns - f + before for f, before in zip(self.first, self.before, strict=True)])

    def ordered(self, count):
        """The newest `count` columns, in time order; all that are held if there are fewer."""
        held = self.ring[0].shape[2]
        count = min(count, held)
        places = [c % self.max_size if held == self.max_size else c for c in range(self.columns - count, self.columns)]
        if self.lengths is not None or held > self.max_size:
            places = list(range(held - count, held))
        return [mx.take(x, mx.array(places, mx.int32), axis=2) for x in self.ring]

    def set_ordered(self, arrays):
        """Take columns in time order as what is held; the newest is column self.columns − 1."""
        held = arrays[0].shape[2]
        if held > self.max_size:
            arrays = [x[:, :, held - self.max_size :] for x in arrays]
        if held >= self.max_size:
            arrays = [mx.roll(x, self.columns % self.max_size, axis=2) for x in arrays]
        elif held < self.columns:
            # Fewer than were fed: count columns anew.
            gone = self.columns - held
            self.first = [f - gone for f in self.first]
            self.columns = held
        self.ring = arrays

    def update_and_fetch(self, keys, values):
        new, n = (keys, values), keys.shape[2]
        if self.ring is None:
            self.ring = [x[:, :, :0] for x in new]
        full = self.ring[0].shape[2] == self.max_size and self.lengths is None
        if n == 1 and full:
            place = self.columns % self.max_size
            for x, y in zip(self.ring, new, strict=True):
                x[:, :, place : place + 1] = y
            self.columns += 1
            return tuple(mx.array(x) for x in self.ring)
        count = self.max_size - 1 if self.lengths is None else self.ring[0].shape[2]
        fetched = [mx.concatenate([a, b], axis=2) for a, b in zip(self.ordered(count), new, strict=True)]
        if count < self.ring[0].shape[2] and fetched[0].shape[2] < self.max_size:
            raise AssertionError("a column of the ring is lost")
        self.columns += n
        if self.lengths is None:
            self.set_ordered(fetched)
        else:
            self.ring = fetched
        return tuple(fetched)

    def make_mask(self, n, window_size=None, return_array=False):
        window = min(window_size or self.max_size, self.max_size)
        held = 0 if self.ring is None else self.ring[0].shape[2]
        query = mx.arange(self.columns, self.columns + n)[:, None]
        if n == 1 and held == self.max_size and self.lengths is None:
            place = mx.arange(self.max_size)
            column = self.columns - (self.columns - place) % self.max_size
        else:
            shown = held if self.lengths is not None else min(held, self.max_size - 1)
            column = mx.arange(self.columns - shown, self.columns + n)
        mask = (column <= query) & (column > query - window)
        return mask & (column >= mx.array(self.first)[:, None, None, None])

    def prepare(self, *, left_padding=None, lengths=None, right_padding=None):
        if left_padding is not None:
            self.first = [a + b for a, b in zip(self.first, left_padding, strict=True)]
        if lengths is not None:
            if self.ring is not None:
                self.ring = self.ordered(self.max_size)
            self.lengths = (self.columns, list(lengths))

    def finalize(self):
        start, lengths = self.lengths
        shifts = [self.columns - start - n for n in lengths]
        held = self.ring[0].shape[2]
        index = ((mx.arange(held) - mx.array(shifts)[:, None]) % held)[:, None, :, None]
        arrays = [mx.take_along_axis(x, index, axis=2) for x in self.ring]
        self.first = [f + shift for f, shift in zip(self.first, shifts, strict=True)]
        self.lengths = None
        self.set_ordered(arrays)

    def is_trimmable(self):
        return self.columns < self.max_size

    def trim(self, n):
        n = min(n, self.columns)
        self.columns -= n
        self.ring = [x[:, :, : self.columns] for x in self.ring]
        return n

    def filter(self, rows):
        if self.ring is not None:
            self.ring = [x[mx.array(rows)] for x in self.ring]
        self.first = [self.first[i] for i in rows]
        self.before = [self.before[i] for i in rows]

    def extend(self, other):
        columns = max(self.columns, other.columns)
        some = self.ring or other.ring
        first = [f + columns - c.columns for c in (self, other) for f in c.first]
        before = self.before + other.before
        if some is not None:
            width = max(min(c.columns, self.max_size) for c in (self, other))
            parts = [c.justified(width, some) for c in (self, other)]
            arrays = [mx.concatenate([part[i] for part in parts]) for i in (0, 1)]
        self.first, self.before, self.columns = first, before, columns
        if some is not None:
            self.set_ordered(arrays)

    def justified(self, width, some):
        if self.ring is None:
            return [mx.zeros((len(self.first), x.shape[1], width, x.shape[3]), x.dtype) for x in some]
        arrays = self.ordered(width)
        return [mx.pad(x, [(0, 0), (0, 0), (width - x.shape[2], 0), (0, 0)]) for x in arrays]

    def extract(self, b):
        row = RotatingKVCache(self.max_size)
        row.offset = self.columns - self.first[b] + self.before[b]
        count = min(self.columns - self.first[b], self.max_size)
        row.held = [mx.contiguous(x[b : b + 1]) for x in self.ordered(count)]
        return row

    @classmethod
    def merge(cls, rows):
        size = rows[0].max_size
        held = [min(row.offset, size) for row in rows]
        columns = max(held)
        batch = cls(size, [columns - n for n in held])
        batch.before = [row.offset - n for row, n in zip(rows, held, strict=True)]
        batch.columns = columns
        filled = next((row.held for row in rows if row.held is not None), None)
        if filled is None:
            return batch
        arrays = []
        for i in (0, 1):
            parts = []
            for row, n in zip(rows, held, strict=True):
                x = filled[i][:, :, :0] if n == 0 else row.held[i][:, :, row.held[i].shape[2] - n :]
                parts.append(mx.pad(x, [(0, 0), (0, 0), (columns - n, 0), (0, 0)]))
            arrays.append(mx.concatenate(parts))
        batch.set_ordered(arrays)
        return batch

    @property
    def state(self):
        return self.ring, self.first, self.before, self.columns

    @state.setter
    def state(self, state):
        self.ring, self.first, self.before, self.columns = state


candidate = BatchRotatingKVCache
