"""ds4's own Metal sources, continued: attention, its indexer and caches, rotation, sorting and hyper-connections.

As test_third_party_ds4: skipped without a checkout, with the dispatches of ds4_metal.m. T tokens, H heads of D
elements, S keys.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engine.metal.ds4_checkout import CHECKOUTS, Array, kargs, launch, run

MODES = pytest.mark.parametrize("checked", [False, True], ids=["fast", "checked"])
pytestmark = [
    pytest.mark.skipif(not CHECKOUTS, reason="ASSAY_THIRD_PARTY names no folder with a checkout of ds4"),
    pytest.mark.parametrize("ds4", CHECKOUTS, ids=[p.name for p in CHECKOUTS]),
]
D = 512


def attended(q: Array, kv: Array, mask: Array, sinks: Array) -> Array:
    """(T, H, D) of softmax(q·kv/√D + mask, with a sink) · kv, in float64 from operands rounded to half."""
    q, kv = q.astype("f2").astype("f8"), kv.astype("f2").astype("f8")
    scores = np.einsum("thd,sd->ths", q, kv) / np.sqrt(D) + mask.astype("f8")[:, None, :]
    sink = np.broadcast_to(sinks.astype("f8")[None, :, None], (*scores.shape[:2], 1))
    weights = np.exp(np.concatenate([scores, sink], -1))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("ths,sd->thd", weights[..., :-1], kv)


def flash_args(ds4: Path, struct: str, T: int, H: int, S: int) -> bytes:
    return kargs(
        ds4, struct, ne01=T, ne02=H, ne03=1, nb01=H * D * 4, nb02=D * 4, nb03=T * H * D * 4, ne11=S, ne_12_2=1,
        ne_12_3=1, ns10=D, nb11=D * 2, nb12=S * D * 2, nb13=S * D * 2, ns20=D, nb21=D * 2, nb22=S * D * 2,
        nb23=S * D * 2, ne30=S, ne31=T, ne32=1, ne33=1, nb31=S * 2, nb32=T * S * 2, nb33=T * S * 2, ne1=H, ne2=T, ne3=1,
        scale=D**-0.5,
    )  # fmt: skip


def flash_constants(kind: str, pad: bool, **more: object) -> dict[str, object]:
    flags = {"mask": True, "sinks": True, "bias": False, "scap": False, "kvpad": pad}
    made: dict[str, object] = {f"FC_flash_attn_ext_{kind}has_{flag}": value for flag, value in flags.items()}
    made |= {f"FC_flash_attn_ext_{kind}ns{side}": D for side in (10, 20)}
    return made | {f"FC_flash_attn_ext_{kind}{name}": value for name, value in more.items()}


@MODES
@pytest.mark.parametrize(("T", "S", "nsg"), [(1, 64, 1), (2, 77, 2)])
def test_flash_attention_by_vector(ds4: Path, checked: bool, T: int, S: int, nsg: int) -> None:
    """Padding of the last 32 keys, 32 workgroups' partial softmaxes, and their reduction."""
    rng, H, nwg = np.random.default_rng(1), 2, 32
    q, sinks = rng.standard_normal((T, H, D)).astype("f4"), rng.standard_normal(H).astype("f4")
    kv, mask = rng.standard_normal((S, D)).astype("f2"), rng.choice([0, -np.inf], (T, S), p=[0.8, 0.2]).astype("f2")
    ragged, padding = S % 32 != 0, np.empty(32 * (2 * D * 2 + T * 2), np.uint8)
    if ragged:
        run(
            ds4, "kernel_flash_attn_ext_pad", checked,
            {0: flash_args(ds4, "flash_attn_ext_pad", T, H, S), 1: kv, 2: kv, 3: mask, 4: padding}, out=(4,),
            constants={"FC_flash_attn_ext_pad_has_mask": True, "FC_flash_attn_ext_pad_ncpsg": 32}, threadgroups=32,
            threads=32,
        )  # fmt: skip
    partial, heads = np.empty(T * H * nwg * (D + 2), "f4"), np.empty((T, H, D), "f4")
    made = launch(
        ds4, "kernel_flash_attn_ext_vec_f16_dk512_dv512", checked,
        {0: flash_args(ds4, "flash_attn_ext_vec", T, H, S), 1: q, 2: kv, 3: kv, 4: mask, 5: sinks, 6: padding,
         7: partial},
        out=(7,), constants=flash_constants("vec_", ragged, nsg=nsg, nwg=nwg), memory=(D + 4 * 32 + 2 * D) * nsg * 2,
        threadgroups=(T, H, nwg), threads=(32, nsg, 1),
    )  # fmt: skip
    # Lane 0 writes its sum over scores that other lanes may still have to read: it counts on lockstep.
    assert {fault.kind for fault in made.faults} <= {"race"}
    assert all("relies on lockstep" in fault.message for fault in made.faults)
    reduction = {"FC_flash_attn_ext_vec_reduce_DV": D, "FC_flash_attn_ext_vec_reduce_NWG": nwg}
    run(
        ds4, "kernel_flash_attn_ext_vec_reduce", checked,
        {0: kargs(ds4, "flash_attn_ext_vec_reduce", nrows=T * H), 1: partial, 2: heads}, out=(2,), constants=reduction,
        threadgroups=T * H, threads=32 * nwg,
    )  # fmt: skip
    np.testing.assert_allclose(heads, attended(q, kv, mask, sinks), rtol=1e-4, atol=1e-5)


@MODES
def test_flash_attention_of_a_prompt(ds4: Path, checked: bool) -> None:
    """Tiles of 8 queries by 64 keys on simdgroup matrices, blocks of the mask that are all −∞ left out."""
    rng, T, H, S = np.random.default_rng(2), 11, 2, 200
    q, sinks = rng.standard_normal((T, H, D)).astype("f4"), rng.standard_normal(H).astype("f4")
    kv = rng.standard_normal((S, D)).astype("f2")
    mask = np.where(np.arange(S) > 5 * np.arange(T)[:, None] + 20, -np.inf, 0).astype("f2")
    padding, blocks = np.empty(64 * (2 * D * 2 + T * 2), np.uint8), np.empty((2, 4), np.int8)
    run(
        ds4, "kernel_flash_attn_ext_pad", checked,
        {0: flash_args(ds4, "flash_attn_ext_pad", T, H, S), 1: kv, 2: kv, 3: mask, 4: padding}, out=(4,),
        constants={"FC_flash_attn_ext_pad_has_mask": True, "FC_flash_attn_ext_pad_ncpsg": 64}, threadgroups=64,
        threads=32,
    )  # fmt: skip
    run(
        ds4, "kernel_flash_attn_ext_blk", checked,
        {0: flash_args(ds4, "flash_attn_ext_blk", T, H, S), 1: mask, 2: blocks}, out=(2,),
        constants={"FC_flash_attn_ext_blk_nqptg": 8, "FC_flash_attn_ext_blk_ncpsg": 64}, threadgroups=(4, 2, 1),
        threads=32,
    )  # fmt: skip
    heads = np.empty((T, H, D), "f4")
    run(
        ds4, "kernel_flash_attn_ext_f16_dk512_dv512", checked,
        {0: flash_args(ds4, "flash_attn_ext", T, H, S), 1: q, 2: kv, 3: kv, 4: mask, 5: sinks, 6: padding, 7: blocks,
         8: heads},
        out=(8,), constants=flash_constants("", True, bc_mask=True, nsg=8), memory=8 * (D + 2 * D + 4 * 64) * 2,
        threadgroups=(2, H, 1), threads=(32, 8, 1),
    )  # fmt: skip
    np.testing.assert_allclose(heads, attended(q, kv, mask, sinks), rtol=1e-3, atol=1e-4)


@MODES
@pytest.mark.parametrize("name", ["heads8", "heads8_rb16"])
def test_attention_to_selected_rows(ds4: Path, checked: bool, name: str) -> None:
    """A ring of 16 raw rows, of which the window takes 12, and the rows of the compressed cache that were selected."""
    rng, H, raw_cap, n_raw, comp, pos = np.random.default_rng(3), 8, 16, 14, 20, 61
    q, sinks = rng.standard_normal((1, H, D)).astype("f4"), rng.standard_normal(H).astype("f4")
    raw, kv = (rng.standard_normal((rows, D)).astype("f4") for rows in (raw_cap, comp))
    topk, start, window, ratio = np.array([[-1, 14, 3, 7, 11, 0, 17, 2]], np.int32), 5, 12, 4
    out = np.empty((1, H, D), "f4")
    args = kargs(
        ds4, "dsv4_indexed_attention", n_tokens=1, n_head=H, n_raw=n_raw, raw_cap=raw_cap, raw_start=start, n_comp=comp,
        top_k=8, pos0=pos, window=window, ratio=ratio, q_token_stride=H * D * 4, q_head_stride=D * 4,
        raw_row_stride=D * 4, comp_row_stride=D * 4, topk_token_stride=32, dst_token_stride=H * D * 4,
        dst_head_stride=D * 4, scale=D**-0.5,
    )  # fmt: skip
    run(
        ds4, f"kernel_dsv4_indexed_mixed_attention_{name}", checked,
        {0: args, 1: q, 2: raw, 3: kv, 4: topk, 5: sinks, 6: out}, out=(6,),
        memory=128 * 8 * (16 if "rb16" in name else 1), threadgroups=(1, 1, 1), threads=(32, 8, 1),
    )  # fmt: skip
    rows = [(start + i) % raw_cap for i in range(n_raw - window, n_raw)]
    selected = [14, 3, 7, 11, 0]  # up to the first one that lies ahead of the query, (61 + 1) / 4 = 15
    expected = attended(q, np.concatenate([raw[rows], kv[selected]]), np.zeros((1, 17), "f2"), sinks)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


@MODES
def test_scores_of_the_indexer(ds4: Path, checked: bool) -> None:
    rng, T, S, H, pos, ratio, d = np.random.default_rng(4), 11, 40, 8, 120, 4, 128
    q, weights = rng.standard_normal((T, H, d)).astype("f4"), rng.random((T, H)).astype("f4")
    keys, scores = rng.standard_normal((S, d)).astype("f4"), np.empty((T, S), "f4")
    args = kargs(
        ds4, "dsv4_indexer_scores_fused", n_comp=S, n_tokens=T, n_head=H, head_dim=d, pos0=pos, ratio=ratio,
        q_token_stride=H * d * 4, q_head_stride=d * 4, weights_token_stride=H * 4, index_row_stride=d * 4,
        score_token_stride=S * 4, scale=0.25,
    )  # fmt: skip
    run(
        ds4, "kernel_dsv4_indexer_scores_tiled", checked, {0: args, 1: q, 2: weights, 3: keys, 4: scores}, out=(4,),
        memory=(8 + 32) * d * 2 + 8 * 32 * 4, threadgroups=(-(-S // 32), -(-T // 8), 1), threads=128,
    )  # fmt: skip
    dots = np.einsum("thd,sd->ths", q.astype("f2").astype("f8"), keys.astype("f2").astype("f8"))
    expected = np.einsum("ths,th->ts", np.maximum(dots, 0), weights.astype("f8")) * 0.25
    expected[np.arange(S) >= (pos + np.arange(T)[:, None] + 1) // ratio] = -np.inf
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-4)


@MODES
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("name", ["", "_inplace_pair_shared4"])
def test_rope_of_the_tail(ds4: Path, checked: bool, name: str, inverse: bool) -> None:
    rng, T, H, width, n_dims, base = np.random.default_rng(5), 3, 6, 128, 64, 10000.0
    x, positions = rng.standard_normal((T, H, width)).astype("f4"), np.array([0, 7, 9000], np.int32)
    out = np.empty_like(x) if not name else x.copy()
    args = kargs(
        ds4, "dsv4_rope_tail", ne00=width, ne01=H, ne02=T, ne03=1, nb00=4, nb01=width * 4, nb02=H * width * 4,
        nb03=x.nbytes, nb0=4, nb1=width * 4, nb2=H * width * 4, nb3=x.nbytes, n_dims=n_dims, n_ctx_orig=4096,
        inverse=inverse, freq_base=base, freq_scale=1.0, attn_factor=1.0, beta_fast=32, beta_slow=1,
    )  # fmt: skip
    shape: dict[str, Any] = {"threadgroups": (H, T, 1), "threads": 128}
    if name:
        shape = {"threadgroups": (-(-H // 4), T, 1), "threads": 256}
    buffers: dict[int, object] = {0: args, 1: out if name else x, 2: positions, 3: np.zeros(1, "f4"), 4: out}
    run(ds4, f"kernel_dsv4_rope_tail_f32{name}", checked, buffers, out=() if name else (4,), **shape)
    angle = positions[:, None, None] * base ** (-np.arange(0, n_dims, 2) / n_dims) * (-1 if inverse else 1)
    even, odd = (x[..., width - n_dims + i :: 2].astype("f8") for i in (0, 1))
    expected = x.astype("f8")
    expected[..., width - n_dims :: 2] = even * np.cos(angle) - odd * np.sin(angle)
    expected[..., width - n_dims + 1 :: 2] = even * np.sin(angle) + odd * np.cos(angle)
    # An angle of up to 9000 is off by as many roundings of float32, and pow by a few.
    np.testing.assert_allclose(out, expected, rtol=0, atol=6e-3)
    np.testing.assert_allclose(out[:2], expected[:2], rtol=0, atol=1e-5)


def e4m3(x: Array) -> Array:
    """To the nearest of ±{0, 2⁻⁹ … 448}, ties to even."""
    values = np.array([m * 2.0**-9 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e in range(16) for m in range(8)])
    values = values[:127]
    near = np.abs(np.minimum(np.abs(x), 448)[..., None] - values)
    best = np.where(near == near.min(-1, keepdims=True), np.arange(127) % 2, 2).argmin(-1)
    return np.sign(x) * values[best]


def scaled_by_64(x: Array) -> Array:
    """E4M3 in blocks of 64, under a power of two."""
    blocks = x.reshape(-1, 64).astype("f8")
    scale = 2.0 ** np.ceil(np.log2(np.maximum(np.abs(blocks).max(-1, keepdims=True), 1e-4) / 448))
    return (e4m3(blocks / scale) * scale).reshape(x.shape)


@MODES
def test_fp8_caches(ds4: Path, checked: bool) -> None:
    rng, width, n_rot, rows = np.random.default_rng(6), 512, 64, 3
    x = (rng.standard_normal((rows, width)) * 10.0 ** rng.integers(-3, 3, (rows, width))).astype("f4")
    expected = x.astype("f8")
    expected[:, :-n_rot] = scaled_by_64(x[:, :-n_rot])
    out = np.empty_like(x)
    strides = {"nb00": 4, "nb01": width * 4, "nb02": x.nbytes, "nb03": x.nbytes, "nb0": 4, "nb1": width * 4,
               "nb2": x.nbytes, "nb3": x.nbytes}  # fmt: skip
    args = kargs(ds4, "dsv4_fp8_kv_quantize", ne00=width, ne01=rows, ne02=1, ne03=1, n_rot=n_rot, **strides)
    run(
        ds4, "kernel_dsv4_fp8_kv_quantize_f32", checked, {0: args, 1: x, 2: out}, out=(2,), memory=256,
        threadgroups=rows, threads=64,
    )  # fmt: skip
    np.testing.assert_array_equal(out, expected)
    kv, cache = x[0].copy(), np.zeros((4, width), "f4")
    args = kargs(ds4, "dsv4_kv_fp8_store", head_dim=width, n_rot=n_rot, raw_row=2)
    run(
        ds4, "kernel_dsv4_kv_fp8_store_f32", checked, {0: args, 1: kv, 2: cache}, out=(), memory=256, threadgroups=1,
        threads=64,
    )  # fmt: skip
    np.testing.assert_array_equal(kv, expected[0])
    np.testing.assert_array_equal(cache[2], expected[0].astype("f2"))
    assert not cache[[0, 1, 3]].any()


@MODES
def test_rotated_fp4_of_the_indexer(ds4: Path, checked: bool) -> None:
    rng = np.random.default_rng(7)
    x = rng.standard_normal((3, 128)).astype("f4")
    hadamard = np.array([[(-1.0) ** (i & j).bit_count() for i in range(128)] for j in range(128)])
    rotated = (x.astype("f8") @ hadamard / np.sqrt(128)).reshape(-1, 32)
    scale = 2.0 ** np.ceil(np.log2(np.abs(rotated).max(-1, keepdims=True) / 6))
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    between = np.abs(np.abs(rotated / scale)[..., None] - (values[1:] + values[:-1]) / 2).min(-1) < 1e-5
    nearest = np.sign(rotated) * values[np.abs(np.abs(rotated / scale)[..., None] - values).argmin(-1)] * scale
    args = kargs(ds4, "dsv4_indexer_qat", n_rows=3, head_dim=128, row_stride=512)
    run(
        ds4, "kernel_dsv4_indexer_hadamard_fp4_f32", checked, {0: args, 1: x}, out=(), memory=1024, threadgroups=3,
        threads=128,
    )  # fmt: skip
    np.testing.assert_array_equal(x.reshape(-1, 32)[~between], nearest.astype("f4")[~between])


@MODES
def test_pooling_of_four_rows_when_decoding(ds4: Path, checked: bool) -> None:
    """simd_sum among eight lanes of a simdgroup, within a branch that the others don't take."""
    rng, width = np.random.default_rng(8), 64
    kv, score = (rng.standard_normal((8, 2, width)).astype("f4") for _ in range(2))
    softmax, product, out = np.empty((width, 8), "f4"), np.empty((width, 8), "f4"), np.empty(width, "f4")
    args = kargs(ds4, "dsv4_compressor_pack_ratio4", head_dim=width, n_comp=1, replay=1, n_threads=32)
    run(
        ds4, "kernel_dsv4_compressor_exact_pool_ratio4_decode_ggml", checked,
        {0: args, 1: kv, 2: score, 3: softmax, 4: product, 5: out}, out=(3, 4, 5), memory=128, threadgroups=width,
        threads=32,
    )  # fmt: skip
    half = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    values, weights = kv[np.arange(8), half].astype("f8"), np.exp(score[np.arange(8), half].astype("f8"))
    np.testing.assert_allclose(out, (values * weights / weights.sum(0)).sum(0), rtol=1e-5, atol=1e-6)


@MODES
@pytest.mark.parametrize("form", ["", "_causal", "_causal_shuffle"])
def test_top_k_by_blocks_and_merge(ds4: Path, checked: bool, form: str) -> None:
    """Blocks of 64 columns sorted, the 16 best of each kept, and a merge of two blocks."""
    rng, T, S, width, k = np.random.default_rng(9), 3, 128, 64, 16
    scores = rng.standard_normal((T, S)).astype("f4")
    sizes = {"ne00": S, "ne01": T, "ne02": 1, "ne03": 1, "nb00": 4, "nb01": S * 4, "nb02": T * S * 4,
             "nb03": T * S * 4, "ne0": 2 * k, "ne1": T, "ne2": 1, "ne3": 1, "top_k": k}  # fmt: skip
    causal = {"causal_start": 400, "causal_ratio": 4}  # 100 or 101 columns are visible
    blocks, best = np.empty((T, 2 * k), np.int32), np.empty((T, k), np.int32)
    run(
        ds4, f"kernel_argsort_f32_i32_desc{form}", checked, {0: kargs(ds4, "argsort", **sizes, **causal), 1: scores,
        2: blocks}, out=(2,), memory=width * 8, threadgroups=(2 * T, 1, 1), threads=width,
    )  # fmt: skip
    args = kargs(ds4, "argsort_merge", **sizes, **causal, len=k, block_width=width, block_top_k=k)
    run(
        ds4, f"kernel_argsort_merge_f32_i32_desc{form.removesuffix('_shuffle')}", checked,
        {0: args, 1: scores, 2: blocks, 3: best}, out=(3,), threadgroups=(T, 1, 1), threads=32,
    )  # fmt: skip
    for t in range(T):
        seen = (400 + t + 1) // 4 if form else S
        assert best[t].tolist() == np.argsort(-scores[t, :seen])[:k].tolist()


@MODES
def test_hyper_connections(ds4: Path, checked: bool) -> None:
    rng, rows, width, steps, eps = np.random.default_rng(10), 3, 64, 3, 1e-3
    mixes, scale, base = (rng.standard_normal(shape).astype("f4") for shape in ((rows, 24), 3, 24))
    split = np.empty((rows, 24), "f4")
    args = kargs(ds4, "dsv4_hc_split_sinkhorn", n_hc=4, sinkhorn_iters=steps, n_rows=rows, mix_hc=24, eps=eps)
    run(
        ds4, "kernel_dsv4_hc_split_sinkhorn", checked, {0: args, 1: mixes, 2: scale, 3: base, 4: split}, out=(4,),
        threadgroups=1, threads=32,
    )  # fmt: skip
    z = mixes.astype("f8") * np.repeat(scale, [4, 4, 16]) + base
    comb = z[:, 8:].reshape(rows, 4, 4)
    comb = np.exp(comb - comb.max(-1, keepdims=True))
    comb = comb / comb.sum(-1, keepdims=True) + eps
    comb /= comb.sum(-2, keepdims=True) + eps
    for _ in range(steps - 1):
        comb /= comb.sum(-1, keepdims=True) + eps
        comb /= comb.sum(-2, keepdims=True) + eps
    pre, post = 1 / (1 + np.exp(-z[:, :4])) + eps, 2 / (1 + np.exp(-z[:, 4:8]))
    np.testing.assert_allclose(split, np.concatenate([pre, post, comb.reshape(rows, 16)], -1), rtol=2e-5)

    streams, block = rng.standard_normal((rows, 4, width)).astype("f4"), rng.standard_normal((rows, width)).astype("f4")
    weight = rng.standard_normal(width).astype("f4")
    again, mixed, normed = np.empty_like(split), np.empty((rows, width), "f4"), np.empty((rows, width), "f4")
    args = kargs(
        ds4, "dsv4_hc_split_weighted_sum_norm", n_embd=width, n_hc=4, sinkhorn_iters=steps, n_rows=rows, mix_hc=24,
        nb_mix1=96, nb_split1=96, nb_x0=4, nb_x1=width * 4, nb_x2=width * 16, nb0=4, nb1=width * 4, nb_norm1=width * 4,
        eps=eps, norm_eps=1e-6,
    )  # fmt: skip
    run(
        ds4, "kernel_dsv4_hc_split_weighted_sum_norm4", checked,
        {0: args, 1: mixes, 2: scale, 3: base, 4: streams, 5: again, 6: mixed, 7: weight, 8: normed}, out=(5, 6, 8),
        memory=(width + 4 + 32) * 4, threadgroups=rows, threads=64,
    )  # fmt: skip
    expected = np.einsum("rh,rhd->rd", pre, streams.astype("f8"))
    np.testing.assert_allclose(mixed, expected, rtol=1e-5, atol=1e-5)
    rms = np.sqrt((expected**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(normed, expected / rms * weight, rtol=1e-4, atol=1e-5)

    out = np.empty_like(streams)
    args = kargs(
        ds4, "dsv4_hc_expand", n_embd=width, n_hc=4, n_tokens=rows, nb_block0=4, nb_block1=width * 4, nb_res0=4,
        nb_res1=width * 4, nb_res2=width * 16, nb_post0=4, nb_post1=96, nb_comb0=4, nb_comb1=16, nb_comb2=96, nb0=4,
        nb1=width * 4, nb2=width * 16,
    )  # fmt: skip
    run(
        ds4, "kernel_dsv4_hc_expand4", checked,
        {0: args, 1: block, 2: streams, 3: split.reshape(-1)[4:], 4: split.reshape(-1)[8:], 5: block, 6: out},
        out=(6,), threadgroups=-(-rows * width // 64), threads=64,
    )  # fmt: skip
    expected3 = post[..., None] * block.astype("f8")[:, None] + np.einsum("rsh,rsd->rhd", comb, streams.astype("f8"))
    np.testing.assert_allclose(out, expected3, rtol=1e-4, atol=1e-5)
