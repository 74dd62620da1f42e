"""The same codes, but attention gets dequantised arrays: for models whose route takes no codes."""

from numpy_affine import QuantizedKVCache, dequantize


class DequantizingKVCache(QuantizedKVCache):
    def update_and_fetch(self, keys, values):
        fetched = super().update_and_fetch(keys, values)
        return tuple(dequantize(*parts, self.group_size, self.bits) for parts in fetched)


candidate = DequantizingKVCache
