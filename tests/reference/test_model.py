"""The reference model against an independent NumPy forward in float64, for every option of a checkpoint."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reference.checkpoint import unpack_codes
from reference.errors import CheckpointError
from reference.model import Reference
from tests.engine.oracle import dense, forward
from tests.engine.tiny import CONFIG, make_checkpoint

TOKENS = np.random.default_rng(5).integers(CONFIG["vocab_size"], size=17).tolist()
SIZE_256 = {"hidden_size": 256, "moe_intermediate_size": 256, "n_routed_experts": 4}


def stored(model: Reference) -> dict[str, np.ndarray]:
    return {name: t.numpy() for weight in model.weights.values() for name, t in weight.stored.items()}


def probes_of(model: Reference) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    model.run(TOKENS, found.__setitem__)
    return found


@pytest.mark.parametrize(
    "options",
    [
        *(
            {"scoring_func": s, "norm_topk_prob": n}
            for s in ("softmax", "sigmoid", "sqrtsoftplus")
            for n in (True, False)
        ),
        {"scoring_func": "topk_softmax"},
        {"n_shared_experts": 0},
        {"n_shared_experts": 2, "swiglu_limit": None},
        {"attention_sinks": False, "num_key_value_heads": 1},
        {"tie_word_embeddings": False, "head_dim": 16},
        {"sliding_window": 1},
        {"sliding_window": 16},
        {"num_experts_per_tok": 6},
        {"quantization": {"group_size": 32, "bits": 4}},
        {"quantization": {"group_size": 32, "bits": 3}, "tie_word_embeddings": False},
    ],
    ids=str,
)
def test_every_probe_equals_the_independent_forward(tmp_path: Path, options: dict[str, Any]) -> None:
    model = Reference(make_checkpoint(tmp_path / "m", **options), compute="float64")
    weights = dense(stored(model), options.get("quantization"))
    expected = forward(weights, {**CONFIG, **options, "quantization": None}, TOKENS)
    actual = probes_of(model)
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(actual[name], array, rtol=1e-9, atol=1e-9, err_msg=name)


def test_float32_stays_near_float64(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m")
    single, double = (probes_of(Reference(folder, compute=c)) for c in ("float32", "float64"))
    for name, array in double.items():
        assert single[name].dtype == (np.int32 if array.dtype == np.int32 else np.float32)
        error = np.abs(single[name].astype(np.float64) - array).max()
        assert error <= 2e-5 * np.abs(array).max(), name


@pytest.mark.parametrize(("dtype", "bits"), [("float16", 11), ("bfloat16", 8)])
def test_weights_are_rounded_to_the_dtype_of_the_run(tmp_path: Path, dtype: str, bits: int) -> None:
    folder = make_checkpoint(tmp_path / "m")
    exact, rounded = (Reference(folder, dtype=d).weights for d in ("float32", dtype))
    for name, weight in rounded.items():
        before, after = exact[name].exact.numpy(), weight.exact.numpy()
        if name.endswith("e_score_correction_bias"):
            assert np.array_equal(before, after)
        else:
            assert (np.abs(after - before) <= np.abs(before) * 2.0**-bits + 2.0**-25).all()
            assert not np.array_equal(before, after)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_affine_codes_unpack_as_mlx_packs_them(bits: int) -> None:
    import mlx.core as mx

    w = np.random.default_rng(bits).standard_normal((4, 64)).astype(np.float32)
    words, scales, biases = mx.quantize(mx.array(w), group_size=32, bits=bits)
    codes = unpack_codes(np.array(words), bits).reshape(4, 2, 32)
    value = codes * np.array(scales)[..., None] + np.array(biases)[..., None]
    expected = np.array(mx.dequantize(words, scales, biases, group_size=32, bits=bits))
    np.testing.assert_allclose(value.reshape(4, 64), expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "F16", "F32"])
def test_experts_from_gguf_are_what_gguf_says(tmp_path: Path, kind: str) -> None:
    import gguf

    folder = make_checkpoint(tmp_path / "m", gguf=kind, **SIZE_256)
    model = Reference(folder)
    for tensor in gguf.GGUFReader(folder / "experts.gguf").tensors:
        layer, part = tensor.name.split(".")[1], tensor.name.split("_")[1]
        weight = model.weights[f"model.layers.{layer}.mlp.experts.{part}_proj.weight"]
        expected = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
        assert np.array_equal(weight.exact.numpy(), expected)


def drop(tensors: dict[str, np.ndarray]) -> None:
    del tensors["model.norm.weight"]


def add(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.layers.0.extra"] = np.ones(3, np.float32)


def reshape(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.norm.weight"] = np.ones(3, np.float32)


def infinite(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.norm.weight"][2] = np.inf


@pytest.mark.parametrize(
    ("edit", "told"),
    [(drop, "missing"), (add, "belongs to no part"), (reshape, "has shape"), (infinite, "not finite")],
)
def test_a_wrong_checkpoint_is_refused_by_name(tmp_path: Path, edit: Any, told: str) -> None:
    with pytest.raises(CheckpointError, match=told):
        Reference(make_checkpoint(tmp_path / "m", edit=edit))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"scoring_func": "argmax"}, "argmax"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
    ],
)
def test_a_wrong_config_is_refused_by_name(tmp_path: Path, options: dict[str, Any], told: str) -> None:
    folder = make_checkpoint(tmp_path / "m")
    import json

    config = json.loads((folder / "config.json").read_text()) | options
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=told):
        Reference(folder)


@pytest.mark.parametrize("tokens", [[], [61], [-1], [[1, 2]]])
def test_tokens_that_cannot_be_run_are_refused(tmp_path: Path, tokens: Any) -> None:
    with pytest.raises(CheckpointError):
        Reference(make_checkpoint(tmp_path / "m")).run(tokens)
