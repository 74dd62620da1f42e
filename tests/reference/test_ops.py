"""The reference ops against hand-worked cases, torch's own functions, and published facts; formats and claims."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from reference import ops
from reference.arithmetic import (
    FORMATS,
    LARGEST,
    OVERFLOW,
    SMALLEST_NORMAL,
    SMALLEST_SUBNORMAL,
    UNIT_ROUNDOFF,
    Arithmetic,
    gamma,
    half_ulp,
    round_to,
)

STORED = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def f64(values: list[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-13) -> bool:
    """Whether two float64 tensors of one shape agree to an absolute tolerance."""
    return actual.shape == expected.shape and float((actual - expected).abs().max()) <= tolerance


# --- attention --------------------------------------------------------------------------------------------------------


def test_causal_attention_of_zero_queries_averages_what_it_may_see() -> None:
    """q = 0, L = 8: row i weighs its i + 1 keys equally; a mask filled with 0 instead of −∞ would leak (7 − i)/8."""
    v = torch.eye(8, dtype=torch.float64)[None]
    out = ops.attention(torch.zeros(1, 8, 4).double(), randn(1, 8, 4), v, 0.5, ops.causal_mask(8, 8))
    for i in range(8):
        assert close(out[0, i, : i + 1], torch.full((i + 1,), 1 / (i + 1), dtype=torch.float64), 1e-15)
        assert (out[0, i, i + 1 :] == 0).all()


@pytest.mark.parametrize("sink", [False, True])
def test_attention_agrees_with_torch_over_an_appended_sink_column(sink: bool) -> None:
    q, k, v, sinks = randn(6, 5, 16), randn(2, 9, 16, seed=1), randn(2, 9, 3, seed=2), randn(6, seed=3)
    mask = ops.causal_mask(5, 9)
    scores = (q @ ops.repeat_heads(k, 6).mT * 0.25).masked_fill(~mask, -torch.inf)
    if sink:
        appended = torch.softmax(torch.cat([scores, sinks[:, None, None].expand(6, 5, 1)], -1), -1)
        assert (appended[..., :-1].sum(-1) < 1).all()
        expected = appended[..., :-1] @ ops.repeat_heads(v, 6)
    else:
        expected = torch.nn.functional.scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=mask, scale=0.25, enable_gqa=True
        )[0]
    assert close(ops.attention(q, k, v, 0.25, mask, sinks if sink else None), expected, 1e-14)


def test_no_sink_is_minus_infinity_and_not_zero() -> None:
    q, k, v = randn(2, 4, 8), randn(1, 6, 8, seed=1), randn(1, 6, 8, seed=2)
    plain = ops.attention(q, k, v, 0.3, None, None)
    assert torch.equal(ops.attention(q, k, v, 0.3, None, torch.full((2,), -torch.inf).double()), plain)
    assert (ops.attention(q, k, v, 0.3, None, torch.zeros(2).double()) - plain).abs().max() > 1e-2


@pytest.mark.parametrize("sinks", [None, f64([0.5, -3.0])])
def test_a_row_that_sees_nothing_is_zero(sinks: Tensor | None) -> None:
    mask = torch.ones(2, 3, 4, dtype=torch.bool)
    mask[0, 1] = False
    out = ops.attention(randn(2, 3, 8), randn(2, 4, 8), randn(2, 4, 5), 1.0, mask, sinks)
    assert (out[0, 1] == 0).all()
    assert torch.isfinite(out).all()
    assert (out[1] != 0).all()


def test_grouped_heads_read_their_own_keys_and_masks() -> None:
    q, k, v = randn(4, 2, 8), randn(2, 3, 8, seed=1), randn(2, 3, 8, seed=2)
    mask = torch.rand(4, 2, 3, generator=torch.Generator().manual_seed(0)) < 0.7
    out = ops.attention(q, k, v, 0.5, mask)
    for h in range(4):
        one = ops.attention(q[h : h + 1], k[h // 2 : h // 2 + 1], v[h // 2 : h // 2 + 1], 0.5, mask[h])
        assert close(out[h : h + 1], one, 1e-15)


def test_scores_shifted_by_any_amount_change_nothing() -> None:
    x = randn(3, 20)
    assert close(ops.softmax(x - 1e5), ops.softmax(x), 1e-11)
    assert close(ops.softmax(x), torch.softmax(x, -1), 1e-15)
    assert (ops.softmax(torch.full((2, 3), -torch.inf)) == 0).all()


def test_causal_mask_is_aligned_to_the_last_key() -> None:
    assert ops.causal_mask(2, 4).int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert ops.causal_mask(3, 3, 2).int().tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    assert ops.causal_mask(1, 5, 3).int().tolist() == [[0, 0, 1, 1, 1]]
    assert ops.causal_mask(2, 1).int().tolist() == [[0], [1]]


# --- norm, rope, swiglu -----------------------------------------------------------------------------------------------


def test_rms_norm_by_hand_and_by_torch() -> None:
    out = ops.rms_norm(f64([[3.0, 4.0]]), f64([1.0, 2.0]), 0.0)
    assert close(out, f64([[3.0, 8.0]]) / math.sqrt(12.5), 1e-15)
    x, w = randn(4, 33), randn(33, seed=1)
    assert close(ops.rms_norm(x, w, 1e-5), torch.nn.functional.rms_norm(x, (33,), w, 1e-5), 1e-14)


def test_rope_by_hand() -> None:
    """Dh = 4, base 100: angles are the position and a tenth of it; pairs are (0, 2) and (1, 3)."""
    x = f64([[[1.0, 0.0, 0.0, 1.0]]])
    out = ops.rope(x, torch.tensor([5]), 100.0)[0, 0]
    expected = [math.cos(5), -math.sin(0.5), math.sin(5), math.cos(0.5)]
    assert close(out, f64(expected), 1e-15)


def test_rope_turns_without_stretching_and_sees_only_distances() -> None:
    q, k, positions = randn(6, 1, 32), randn(6, 1, 32, seed=1), torch.arange(6) + 70_000
    turned = ops.rope(q, positions, 1e4)
    assert close(turned.norm(dim=-1), q.norm(dim=-1), 1e-13)
    near = (ops.rope(q, positions - 70_000, 1e4)[3] * ops.rope(k, positions - 70_000, 1e4)[1]).sum()
    assert close((turned[3] * ops.rope(k, positions, 1e4)[1]).sum(), near, 1e-9)
    assert torch.equal(ops.rope(q[:1], torch.tensor([0]), 1e4), q[:1])
    # Angles do not take the dtype of x: at position 70,000 a float32 angle is off by more than float32's last bit.
    assert (
        ops.rope(q.float(), positions, 1e4).double() - ops.rope(q.float().double(), positions, 1e4)
    ).abs().max() < 1e-6


def test_swiglu_clamps_the_gate_from_above_and_the_value_on_both_sides() -> None:
    gate, up = f64([-9.0, 9.0, 1.0, 1.0]), f64([1.0, 1.0, -9.0, 9.0])
    silu = torch.nn.functional.silu
    expected = silu(f64([-9.0, 7.0, 1.0, 1.0])) * f64([1.0, 1.0, -7.0, 7.0])
    assert close(ops.swiglu(gate, up, 7.0), expected, 1e-15)
    assert close(ops.swiglu(gate, up), silu(gate) * up, 1e-15)


# --- router -----------------------------------------------------------------------------------------------------------


def test_square_root_of_softplus_by_hand() -> None:
    x = f64([[0.0, 30.0, -30.0]])
    expected = f64([[math.sqrt(math.log(2)), math.sqrt(30), math.exp(-15)]])
    assert close(ops.router_scores(x, "sqrtsoftplus"), expected, 1e-14)
    edge = f64([[20.0, 20.0 + 1e-9, -20.0, -20.0 - 1e-9]])
    scores = ops.router_scores(edge, "sqrtsoftplus")[0]
    assert close(scores[::2], scores[1::2], 1e-8)


def test_cold_rows_keep_their_order_where_a_naive_softplus_is_a_tie() -> None:
    """Below −16.6, 1 + eˣ rounds to 1 in float32: log(1 + eˣ) is 0 for all experts (antirez/ds4#1044)."""
    x = torch.tensor([[-19.0, -17.0, -18.0]])
    assert (torch.log(1 + torch.exp(x)) == 0).all()
    assert ops.top_k(ops.router_scores(x, "sqrtsoftplus"), 2).tolist() == [[1, 2]]


def test_router_weights_follow_the_formula_of_each_scoring() -> None:
    x = randn(5, 16)
    bias = randn(16, seed=1)
    ids, weights = ops.router(x, 6, "sqrtsoftplus", bias, True, 1.5)
    p = torch.sqrt(torch.nn.functional.softplus(x))
    assert torch.equal(ids, torch.topk(p + bias, 6).indices)
    chosen = p.gather(-1, ids)
    assert close(weights, chosen / chosen.sum(-1, keepdim=True) * 1.5, 1e-8)
    assert close(weights.sum(-1), torch.full((5,), 1.5, dtype=torch.float64))
    assert not torch.equal(ids, ops.router(x, 6, "sqrtsoftplus")[0])  # the bias chose
    ids, weights = ops.router(x, 3, "topk_softmax", scale=2.0)
    assert close(weights, 2 * torch.softmax(x.gather(-1, ids), -1))
    ids, weights = ops.router(x, 3, "softmax", norm=False)
    assert close(weights, torch.softmax(x, -1).gather(-1, ids))
    ids, weights = ops.router(x, 3, "softmax", norm=True)
    assert close(weights, torch.softmax(x.gather(-1, ids), -1))
    ids, weights = ops.router(x, 3, "sigmoid", norm=False)
    assert close(weights, torch.sigmoid(x).gather(-1, ids))


def test_a_sum_below_the_floor_is_divided_by_the_floor() -> None:
    weights = ops.router(torch.full((1, 8), -40.0).double(), 2, "sqrtsoftplus")[1]
    assert close(weights, torch.full((1, 2), math.exp(-20) / 6.1e-5, dtype=torch.float64), 1e-12)


def test_ties_go_to_the_lowest_id() -> None:
    assert ops.top_k(torch.tensor([[1.0, 3.0, 1.0, 3.0, 1.0]]), 4).tolist() == [[1, 3, 0, 2]]
    assert ops.top_k(torch.zeros(2, 300), 5).tolist() == [[0, 1, 2, 3, 4]] * 2
    assert ops.router(torch.zeros(1, 64), 6, "sigmoid")[0].tolist() == [[0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_op_computes_in_the_dtype_it_is_given(dtype: torch.dtype) -> None:
    x, positions = randn(3, 2, 8).to(dtype), torch.arange(3)
    outputs = [
        ops.rms_norm(x, x[0, 0], 1e-6),
        ops.rope(x, positions, 1e4),
        ops.attention(x, x, x, 0.5, ops.causal_mask(2, 2), torch.zeros(3, dtype=dtype)),
        ops.swiglu(x, x, 7.0),
        ops.softmax(x),
        ops.router(x[0], 2, "sqrtsoftplus", torch.zeros(8))[1],
    ]
    assert {out.dtype for out in outputs} == {dtype}


# --- formats and claims -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", STORED)
def test_formats_agree_with_torch(dtype: str) -> None:
    info = torch.finfo(STORED[dtype])
    assert UNIT_ROUNDOFF[dtype] == info.eps / 2
    assert LARGEST[dtype] == info.max
    assert SMALLEST_NORMAL[dtype] == info.smallest_normal
    assert SMALLEST_SUBNORMAL[dtype] == info.smallest_normal * info.eps


def test_tf32_is_float16s_precision_with_float32s_range() -> None:
    assert UNIT_ROUNDOFF["tf32"] == UNIT_ROUNDOFF["float16"] == 2.0**-11
    assert SMALLEST_NORMAL["tf32"] == SMALLEST_NORMAL["float32"]
    x = randn(500)
    assert torch.equal(round_to(x, "tf32"), x.half().double())
    assert OVERFLOW["float16"] == 65520


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rounding_agrees_with_torch_and_half_an_ulp_is_its_greatest_error(dtype: str) -> None:
    exponents = torch.arange(-160, 128).double()
    x = (randn(200, len(exponents)) * 2**exponents).clamp(-1.7e38, 1.7e38)
    rounded = round_to(x, dtype)
    assert torch.equal(rounded, x.to(STORED[dtype]).double())
    finite = torch.isfinite(rounded)
    error, limit = (rounded - x).abs()[finite], half_ulp(x.abs(), dtype)[finite]
    assert (error <= limit).all()
    assert (error[limit > 0] / limit[limit > 0]).max() > 0.99
    tie = f64([1 + UNIT_ROUNDOFF[dtype], 1 + 3 * UNIT_ROUNDOFF[dtype]])
    assert torch.equal((round_to(tie, dtype) - tie).abs(), half_ulp(tie, dtype))
    assert half_ulp(torch.zeros(1).double(), dtype).item() == 0


def test_gamma_ends_where_its_lemma_does() -> None:
    assert gamma(100, 2.0**-24) == pytest.approx(100 * 2.0**-24, rel=1e-5)
    assert gamma(100, 2.0**-24) > 100 * 2.0**-24
    assert gamma(256, UNIT_ROUNDOFF["bfloat16"]) == math.inf
    assert gamma(0, 0.5) == 0


def test_claims_resolve_input_and_refuse_what_does_not_exist() -> None:
    arith = Arithmetic.claim("bfloat16", intermediate="input", operand="tf32")
    assert (arith.output, arith.intermediate, arith.accumulate, arith.operand) == (
        "bfloat16",
        "bfloat16",
        "float32",
        "tf32",
    )
    assert Arithmetic.claim("float16", output="float32").output == "float32"
    with pytest.raises(ValueError, match="no claim 'accumulator'; the claims are operand, accumulate") as caught:
        Arithmetic.claim("float16", accumulator="float32")
    assert "\n" not in str(caught.value)
    for name, value in {"accumulate": "fp32", "operand": "int8", "output": None}.items():
        with pytest.raises(ValueError, match=f"{name}={value!r} is no dtype; use one of {', '.join(FORMATS)}, input"):
            Arithmetic.claim("float16", **{name: value})
    with pytest.raises(ValueError, match="dtype='input' is no dtype"):
        Arithmetic.claim("input")
