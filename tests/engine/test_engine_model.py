"""The engine against its formulas in float64, against itself fed in other steps, and against its own config."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest

import engine
from engine import moe
from engine.generate import Engine
from tests.engine.oracle import forward
from tests.engine.tiny import CONFIG, make_checkpoint

Array = np.ndarray[Any, np.dtype[Any]]
TOKENS = [7, 3, 60, 11, 3, 42, 0, 19, 25, 33, 8, 8, 51, 14, 2, 37, 46]
SCORING = ("sqrtsoftplus", "sigmoid", "softmax", "topk_softmax")


def record(model: Engine, tokens: list[int] = TOKENS, **how: Any) -> dict[str, Array]:
    """Every probe of a run, its steps joined."""
    steps: dict[str, list[Array]] = {}
    model.run(tokens, tap=lambda name, x: steps.setdefault(name, []).append(x), **how)
    return {name: np.concatenate(parts) for name, parts in steps.items()}


def assert_close(actual: dict[str, Array], expected: dict[str, Array], tolerance: float) -> None:
    """Same probes; same experts and tokens; everything else within `tolerance` of the probe's largest value."""
    assert sorted(actual) == sorted(expected)
    for name, x in actual.items():
        wanted = expected[name].astype(np.float64)
        assert x.shape == wanted.shape, name
        if name == "token" or name.endswith(".experts"):
            assert np.array_equal(x, wanted), name
        else:
            error = np.abs(x.astype(np.float64) - wanted).max() / np.abs(wanted).max()
            assert error < tolerance, f"{name}: {error:.2e} of the largest value, {tolerance:.0e} allowed"


@pytest.mark.parametrize("scoring", SCORING)
@pytest.mark.parametrize("norm", [True, False])
def test_every_probe_agrees_with_the_formulas_in_float64(tmp_path: Path, scoring: str, norm: bool) -> None:
    options: dict[str, Any] = {"scoring_func": scoring, "norm_topk_prob": norm, "tie_word_embeddings": norm}
    model = engine.load(make_checkpoint(tmp_path, 3, **options), device="cpu")
    assert_close(record(model), forward(dict(model.weights()), CONFIG | options, TOKENS), 2e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"n_shared_experts": 0},
        {"n_shared_experts": 2, "swiglu_limit": None},
        {"swiglu_limit": 0.5},
        {"attention_sinks": False, "num_key_value_heads": 4},
        {"num_key_value_heads": 1, "head_dim": 16, "rope_theta": 500.0},
        {"num_hidden_layers": 3, "layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
        {"num_experts_per_tok": 1, "n_routed_experts": 2},
        {"num_experts_per_tok": 6},
        {"hidden_size": 48, "moe_intermediate_size": 24, "vocab_size": 97},
    ],
    ids=str,
)
def test_every_option_agrees_with_the_formulas(tmp_path: Path, options: dict[str, Any]) -> None:
    model = engine.load(make_checkpoint(tmp_path, 4, **options), device="cpu")
    assert_close(record(model), forward(dict(model.weights()), CONFIG | options, TOKENS), 2e-5)


@pytest.mark.parametrize(("bits", "group"), [(2, 32), (3, 32), (4, 32), (6, 32), (8, 32), (4, 64), (8, 128)])
def test_quantised_weights_agree_with_their_dequantised_values(tmp_path: Path, bits: int, group: int) -> None:
    options: dict[str, Any] = {"quantization": {"group_size": group, "bits": bits}, "tie_word_embeddings": False}
    if group > 32:
        options |= {"hidden_size": group, "moe_intermediate_size": group, "head_dim": group // 4}
    options |= {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}
    model = engine.load(make_checkpoint(tmp_path, 5, **options), device="cpu")
    assert_close(record(model), forward(dict(model.weights()), CONFIG | options, TOKENS), 2e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("quantization", [None, {"group_size": 32, "bits": 4}])
def test_half_precision_stays_near_the_formulas(
    tmp_path: Path, dtype: str, quantization: dict[str, int] | None
) -> None:
    options: dict[str, Any] = {"quantization": quantization, "num_experts_per_tok": 6, "num_hidden_layers": 1}
    options |= {"layer_types": ["sliding_attention"]}
    model = engine.load(make_checkpoint(tmp_path, 6, **options), dtype=dtype, device="cpu")
    actual, expected = record(model), forward(dict(model.weights()), CONFIG | options, TOKENS)
    kept = np.float16 if dtype == "float16" else ml_dtypes.bfloat16
    for name, x in actual.items():
        wide = {"router_logits": np.float32, "weights": np.float32, "experts": np.int32, "token": np.int32}
        assert x.dtype == wide.get(name.rsplit(".", 1)[-1], kept), name
    # One layer of roundings with unit roundoff u: a dozen of them in a row, or a wrong op is off by far more.
    u = 2.0**-11 if dtype == "float16" else 2.0**-8
    for name in ("layers.0.attn.context", "layers.0.attn_residual", "layers.0.mlp_norm", "layers.0.moe.router_logits"):
        error = np.linalg.norm(actual[name].astype(np.float64) - expected[name]) / np.linalg.norm(expected[name])
        assert error < 12 * u, f"{name}: {error / u:.1f} u"


@pytest.mark.parametrize("how", [{"chunk": 1}, {"chunk": 2}, {"chunk": 3}, {"chunk": 4}, {"chunk": 5}, {"chunk": 6},
                                 {"chunk": 16}, {"decode": 17}, {"chunk": 7, "decode": 5}], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_chunked_prefill_and_decode_equal_whole_prefill(tmp_path: Path, how: dict[str, int], dtype: str) -> None:
    model = engine.load(make_checkpoint(tmp_path, 7), dtype=dtype, device="cpu")
    whole, fed = record(model), record(model, **how)
    assert list(whole) == list(fed)
    assert_close(fed, whole, 2e-6 if dtype == "float32" else 2e-2)


@pytest.mark.parametrize("window", [1, 2, 3, 4, 7, 8, 16, 17, 40])
def test_the_ring_is_right_at_every_wrap(tmp_path: Path, window: int) -> None:
    options: dict[str, Any] = {"sliding_window": window, "layer_types": ["sliding_attention", "sliding_attention"]}
    model = engine.load(make_checkpoint(tmp_path, 8, **options), device="cpu")
    expected = forward(dict(model.weights()), CONFIG | options, TOKENS)
    for how in ({}, {"chunk": 1}, {"chunk": 2}, {"chunk": 3}, {"chunk": 5}, {"chunk": 8}, {"chunk": 5, "decode": 9}):
        assert_close(record(model, **how), expected, 2e-5)


def test_a_prompt_longer_than_the_buffers_first_step_still_agrees(tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_hidden_layers": 2, "sliding_window": 270, "moe_intermediate_size": 8}
    model = engine.load(make_checkpoint(tmp_path, 9, **options), device="cpu")
    tokens = [(i * i + 3 * i) % 61 for i in range(530)]
    whole = record(model, tokens, chunk=530)
    assert_close(record(model, tokens, chunk=130, decode=12), whole, 1e-5)


def test_only_keys_inside_the_window_matter(tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_hidden_layers": 1, "layer_types": ["sliding_attention"], "sliding_window": 4}
    model = engine.load(make_checkpoint(tmp_path, 10, **options), device="cpu")
    before = record(model)["logits"]
    changed = [*TOKENS]
    changed[5] = 1
    for how in ({}, {"chunk": 3}, {"decode": 17}):
        after = record(model, changed, **how)["logits"]
        moved = np.abs(after - before).max(-1) > 1e-5
        assert moved.tolist() == [5 <= i < 5 + 4 for i in range(len(TOKENS))]


CHANGES: dict[str, dict[str, Any]] = {
    "rms_norm_eps": {"rms_norm_eps": 0.1},
    "rope_theta": {"rope_theta": 100.0},
    "layer_types": {"layer_types": ["full_attention", "sliding_attention"]},
    "sliding_window": {"sliding_window": 6},
    "num_experts_per_tok": {"num_experts_per_tok": 2},
    "scoring_func": {"scoring_func": "sigmoid"},
    "norm_topk_prob": {"norm_topk_prob": False},
    "routed_scaling_factor": {"routed_scaling_factor": 1.0},
    "swiglu_limit": {"swiglu_limit": 1.0},
    "no swiglu_limit": {"swiglu_limit": None},
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_option_that_needs_no_other_weights_changes_the_output(tmp_path: Path, change: str) -> None:
    base = {"swiglu_limit": 2.0}
    model = engine.load(make_checkpoint(tmp_path / "base", 11, **base), device="cpu")
    other = engine.load(make_checkpoint(tmp_path / "other", 11, **base | CHANGES[change]), device="cpu")
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(model.weights(), other.weights(), strict=True))
    assert np.abs(record(model)["logits"] - record(other)["logits"]).max() > 1e-3


def scaled(part: str, change: Callable[[Array], Array]) -> Callable[[dict[str, Array]], None]:
    """An edit of a checkpoint: `change` applied to every tensor whose name has `part`."""

    def edit(tensors: dict[str, Array]) -> None:
        for name in [name for name in tensors if part in name]:
            tensors[name] = change(tensors[name])

    return edit


@pytest.mark.parametrize("part", ["sinks", "e_score_correction_bias", "shared_experts.up_proj", "experts.down_proj",
                                  "gate.weight", "q_proj", "k_proj", "v_proj", "o_proj", "input_layernorm",
                                  "post_attention_layernorm", "model.norm", "lm_head", "embed_tokens"])  # fmt: skip
def test_every_tensor_changes_the_output(tmp_path: Path, part: str) -> None:
    options = {"tie_word_embeddings": False}
    model = engine.load(make_checkpoint(tmp_path / "base", 12, **options), device="cpu")
    edit = scaled(part, lambda x: (x * 1.5 + 0.25 * np.arange(len(x)).reshape(-1, *[1] * (x.ndim - 1))).astype(x.dtype))
    other = engine.load(make_checkpoint(tmp_path / "other", 12, edit=edit, **options), device="cpu")
    assert np.abs(record(model)["logits"] - record(other)["logits"]).max() > 1e-3


def test_a_sink_far_below_every_score_is_no_sink_and_zero_is_one(tmp_path: Path) -> None:
    plain = engine.load(make_checkpoint(tmp_path / "plain", 13, attention_sinks=False), device="cpu")
    weights = dict(plain.weights())

    def with_sink(value: float) -> Array:
        def edit(tensors: dict[str, Array]) -> None:
            tensors |= weights | {f"model.layers.{i}.self_attn.sinks": np.full(4, value, np.float32) for i in (0, 1)}

        return record(engine.load(make_checkpoint(tmp_path / str(value), 13, edit=edit), device="cpu"))["logits"]

    expected = record(plain)["logits"]
    assert np.abs(with_sink(-1e4) - expected).max() < 1e-5
    assert np.abs(with_sink(0.0) - expected).max() > 1e-2


@pytest.mark.parametrize("quantization", [None, {"group_size": 32, "bits": 8}])
def test_rows_sorted_by_expert_give_the_same_probes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantization: dict[str, int] | None
) -> None:
    model = engine.load(make_checkpoint(tmp_path, 14, quantization=quantization), device="cpu")
    monkeypatch.setattr(moe, "SORT_FROM", 1)
    in_order = record(model, chunk=5)
    monkeypatch.setattr(moe, "SORT_FROM", 10**9)
    assert_close(in_order, record(model, chunk=5), 1e-6)


def test_generate_is_greedy_and_stops_where_told(tmp_path: Path) -> None:
    model = engine.load(make_checkpoint(tmp_path, 15), device="cpu")
    text = [*TOKENS[:4]]
    for _ in range(9):
        text.append(int(record(model, text)["token"][-1]))
    expected = text[4:]
    assert model.generate(TOKENS[:4], max_tokens=9) == expected
    assert model.generate(TOKENS[:4], max_tokens=9, chunk=3) == expected
    first = expected.index(expected[5])
    assert model.generate(TOKENS[:4], max_tokens=9, stop=(expected[5],)) == expected[:first]
    fed: list[Array] = []
    model.generate(TOKENS[:4], max_tokens=3, tap=lambda name, x: fed.append(x) if name == "token" else None)
    assert np.concatenate(fed)[3:].tolist() == expected[:3]


def test_runs_leave_no_state_behind(tmp_path: Path) -> None:
    model = engine.load(make_checkpoint(tmp_path, 16), device="cpu")
    first = record(model, chunk=4)
    model.generate(TOKENS, max_tokens=5)
    again = record(model, chunk=4)
    assert all(np.array_equal(x, again[name]) for name, x in first.items())


def test_greedy_takes_the_lowest_id_of_equal_logits(tmp_path: Path) -> None:
    def edit(tensors: dict[str, Array]) -> None:
        tensors["lm_head.weight"][:] = tensors["lm_head.weight"][:1]

    folder = make_checkpoint(tmp_path, 17, edit=edit, tie_word_embeddings=False)
    assert record(engine.load(folder, device="cpu"))["token"].tolist() == [0] * len(TOKENS)


@pytest.mark.parametrize(
    ("tokens", "how", "message"),
    [
        ([], {}, "tokens is empty"),
        ([1, 61], {}, r"tokens\[1\] is 61; the vocabulary has ids 0 to 60"),
        ([-1], {}, r"tokens\[0\] is -1"),
        ([1], {"chunk": 0}, "chunk is 0"),
        ([1], {"decode": 2}, "decode is 2"),
        ([1], {"decode": -1}, "decode is -1"),
    ],
)
def test_arguments_out_of_range_are_refused(
    tmp_path: Path, tokens: list[int], how: dict[str, Any], message: str
) -> None:
    model = engine.load(make_checkpoint(tmp_path, 18), device="cpu")
    with pytest.raises(ValueError, match=message):
        model.run(tokens, **how)
    with pytest.raises(ValueError, match="max_tokens is 0"):
        model.generate([1], max_tokens=0)


def test_the_default_device_of_a_run_is_the_engines_own(tmp_path: Path) -> None:
    model = engine.load(make_checkpoint(tmp_path, 19), device="cpu")
    assert mx.default_device() == mx.Device(mx.cpu)
    assert model.provenance["device"] == "cpu"
