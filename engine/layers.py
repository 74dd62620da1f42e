"""The linear layers, dense and affine-quantised, single and stacked by expert; and the clamped SwiGLU between them.

Parameter names are the checkpoint's (weight, scales, biases), so a module tree's flattened names are the tensor names.
B batch, L tokens, K experts a token.
"""

from __future__ import annotations

import mlx.core as mx

from engine.config import Quantization
from engine.module import Module, submodules


class Linear(Module):
    """(…, in) → (…, out) by weight [out, in], in the dtype of the input."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.weight = mx.zeros((out, width))

    def __call__(self, x: mx.array) -> mx.array:
        return x @ self.weight.T


class QuantizedLinear(Module):
    """(…, in) → (…, out), affine-quantised: weight uint32 [out, in·bits/32], scales and biases [out, in/group_size]."""

    def __init__(self, width: int, out: int, quantization: Quantization) -> None:
        super().__init__()
        self.group_size, self.bits = quantization.group_size, quantization.bits
        self.weight = mx.zeros((out, width * self.bits // 32), mx.uint32)
        self.scales = self.biases = mx.zeros((out, width // self.group_size))

    def __call__(self, x: mx.array) -> mx.array:
        y = quantized_matmul(
            x.astype(self.scales.dtype),
            (self.weight, self.scales, self.biases),
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
        )
        return y.astype(x.dtype)


class SwitchLinear(Module):
    """x (…, 1, in) by weight [E, out, in] of the experts `ids`, whose shape is that of x's leading axes, broadcast."""

    def __init__(self, experts: int, width: int, out: int) -> None:
        super().__init__()
        self.weight = mx.zeros((experts, out, width))

    def __call__(self, x: mx.array, ids: mx.array, *, in_order: bool = False) -> mx.array:
        return gather_mm(x, self.weight.swapaxes(-1, -2), ids, in_order=in_order)


class QuantizedSwitchLinear(Module):
    """SwitchLinear with an affine-quantised stack: each of QuantizedLinear's three tensors with a leading axis E."""

    def __init__(self, experts: int, width: int, out: int, quantization: Quantization) -> None:
        super().__init__()
        self.group_size, self.bits = quantization.group_size, quantization.bits
        self.weight = mx.zeros((experts, out, width * self.bits // 32), mx.uint32)
        self.scales = self.biases = mx.zeros((experts, out, width // self.group_size))

    def __call__(self, x: mx.array, ids: mx.array, *, in_order: bool = False) -> mx.array:
        y = mx.gather_qmm(
            x.astype(self.scales.dtype),
            self.weight,
            self.scales,
            self.biases,
            rhs_indices=ids,
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            sorted_indices=in_order,
        )
        return y.astype(x.dtype)


def quantized_matmul(
    x: mx.array, quantized: tuple[mx.array, mx.array, mx.array], *, transpose: bool, group_size: int, bits: int
) -> mx.array:
    """x [..., K] times (codes, scales, biases), [..., N, K] if transpose, else [..., K, N] → [..., N] in x's dtype.

    MLX's own, except where its CUDA backend fails (MLX 0.32.4; docs/evidence/cuda.md): weights of a single group are
    multiplied wrongly from two rows on; float32 ones in groups of 128 raise from 33 on. There they are decoded first.
    """
    codes, scales, biases = quantized
    one_group = scales.shape[-1] == 1
    tall = x.dtype == mx.float32 and group_size == 128 and x.shape[-2] > 32
    if (one_group or tall) and on_cuda():
        w = mx.dequantize(codes, scales, biases, group_size=group_size, bits=bits)
        return x @ (w.swapaxes(-1, -2) if transpose else w)
    return mx.quantized_matmul(x, codes, scales, biases, transpose=transpose, group_size=group_size, bits=bits)


def on_cuda() -> bool:
    """Whether MLX computes on its CUDA backend."""
    return mx.cuda.is_available() and mx.default_device() == mx.Device(mx.gpu)


def gather_mm(x: mx.array, stack: mx.array, ids: mx.array, *, in_order: bool) -> mx.array:
    """x (…, 1, in) @ stack (E, in, out)[ids] → (…, 1, out) in x's dtype.

    On the CPU the stack is float32 (`widen`), with values already rounded to the run's dtype: products are then exact,
    sums are float32, and the result is rounded once.
    """
    y = mx.gather_mm(x.astype(stack.dtype), stack, rhs_indices=ids, sorted_indices=in_order)
    return y.astype(x.dtype)


def has_packed_experts(model: Module) -> bool:
    """Whether any expert stack of `model` is affine-quantised."""
    return any(isinstance(module, QuantizedSwitchLinear) for module in submodules(model))


def widen(model: Module) -> None:
    """Keep dense expert stacks, and the scales and biases of affine weights, in float32, values unchanged.

    For MLX's CPU backend: its gather_mm is in float32 alone ("[GatherMM::eval] Currently only supports float32"), and
    its quantised products keep their running sum in the dtype of the scales (`T sum` in mlx/backend/cpu/quantized.cpp),
    where 256 terms in bfloat16 leave no digit. In float32 both are as good as on a GPU.
    """
    for module in submodules(model):
        if isinstance(module, SwitchLinear):
            module.weight = module.weight.astype(mx.float32)
        if isinstance(module, QuantizedLinear | QuantizedSwitchLinear):
            module.scales, module.biases = module.scales.astype(mx.float32), module.biases.astype(mx.float32)


def swiglu(gate: mx.array, up: mx.array, limit: float | None) -> mx.array:
    """silu(min(gate, limit)) · clamp(up, ±limit), elementwise, in float32 and rounded once to the dtype of `gate`."""
    g, u = gate.astype(mx.float32), up.astype(mx.float32)
    if limit is not None:
        g, u = mx.minimum(g, limit), mx.clip(u, -limit, limit)
    return (g * mx.sigmoid(g) * u).astype(gate.dtype)


def linear(width: int, out: int, quantization: Quantization | None) -> Linear | QuantizedLinear:
    """A linear layer from `width` to `out`, of the checkpoint's kind."""
    return Linear(width, out) if quantization is None else QuantizedLinear(width, out, quantization)


def switch_linear(
    experts: int, width: int, out: int, quantization: Quantization | None
) -> SwitchLinear | QuantizedSwitchLinear:
    """A stack of `experts` linear layers from `width` to `out`, of the checkpoint's kind."""
    if quantization is None:
        return SwitchLinear(experts, width, out)
    return QuantizedSwitchLinear(experts, width, out, quantization)
