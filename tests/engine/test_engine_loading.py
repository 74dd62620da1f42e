"""Loading: what a good folder gives, and one planted fault a test, each refused with a line that names it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import engine
from engine import CheckpointError
from tests.engine.tiny import CONFIG, cast, make_checkpoint, random_blocks

Array = np.ndarray[Any, np.dtype[Any]]
NUMPY = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
GATE = "model.layers.1.mlp.experts.gate_proj.weight"


def load(folder: Path, dtype: str | None = None) -> engine.Engine:
    return engine.load(folder, dtype=dtype, device="cpu")


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_weights_are_the_files_rounded_once(tmp_path: Path, stored: str, dtype: str) -> None:
    folder = make_checkpoint(tmp_path, stored=stored, tie_word_embeddings=False)
    saved = load_file(folder / "model.safetensors")
    loaded = dict(load(folder, dtype).weights())
    assert sorted(loaded) == sorted(saved)
    for name, x in loaded.items():
        # The CPU's gather_mm takes float32 alone, so expert stacks are widened after they were rounded.
        wide = name.endswith("e_score_correction_bias") or ".experts." in name
        assert x.dtype == (np.float32 if wide else NUMPY[dtype]), name
        rounded = np.dtype(np.float32) if name.endswith("e_score_correction_bias") else NUMPY[dtype]
        assert np.array_equal(x, saved[name].astype(np.float32).astype(rounded).astype(x.dtype)), name


def test_the_configs_dtype_is_the_default(tmp_path: Path) -> None:
    model = load(make_checkpoint(tmp_path, torch_dtype="bfloat16"))
    assert model.provenance["dtype"] == "bfloat16"
    assert dict(model.weights())["model.norm.weight"].dtype == NUMPY["bfloat16"]


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_quantised_weights_stay_packed(tmp_path: Path, bits: int) -> None:
    folder = make_checkpoint(tmp_path, quantization={"group_size": 32, "bits": bits})
    saved = load_file(folder / "model.safetensors")
    loaded = dict(load(folder, "float16").weights())
    assert sorted(loaded) == sorted(saved)
    stem = GATE.removesuffix("weight")
    assert np.array_equal(loaded[GATE], saved[GATE])
    for part in (stem + "scales", stem + "biases"):
        assert loaded[part].dtype == np.float32, "widened, with values that were rounded before"
        assert np.array_equal(loaded[part], saved[part].astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("kind", ["Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "F16", "F32"])
def test_experts_come_from_gguf(tmp_path: Path, kind: str) -> None:
    from gguf import GGUFReader
    from gguf.quants import dequantize

    size = {"hidden_size": 256, "moe_intermediate_size": 256, "n_routed_experts": 2, "num_experts_per_tok": 1}
    folder = make_checkpoint(tmp_path, gguf=kind, num_hidden_layers=1, **(size if kind.endswith("K") else {}))
    model = load(folder, "bfloat16")
    loaded = dict(model.weights())
    tensors = {t.name: t for t in GGUFReader(folder / "experts.gguf").tensors}
    for part in ("gate", "up", "down"):
        tensor = tensors[f"blk.0.ffn_{part}_exps.weight"]
        expected = dequantize(tensor.data, tensor.tensor_type).astype(ml_dtypes.bfloat16)
        assert np.array_equal(loaded[f"model.layers.0.mlp.experts.{part}_proj.weight"], expected)
    model.run([1, 2, 3])


def test_dense_gguf_experts_serve_a_quantised_model(tmp_path: Path) -> None:
    model = load(make_checkpoint(tmp_path, gguf="Q8_0", quantization={"group_size": 32, "bits": 4}), "float16")
    model.run([1, 2, 3])
    held = dict(model.weights())
    assert "model.layers.0.self_attn.q_proj.scales" in held
    assert GATE.removesuffix("weight") + "scales" not in held
    assert held[GATE].shape == (6, 32, 32)


def test_shards_load_as_one_file_does(tmp_path: Path) -> None:
    one, three = load(make_checkpoint(tmp_path / "1", 1)), load(make_checkpoint(tmp_path / "3", 1, shards=3))
    assert all(np.array_equal(x, dict(three.weights())[name]) for name, x in one.weights())


def dropped(name: str) -> Callable[[dict[str, Array]], None]:
    return lambda tensors: tensors.update({}) if tensors.pop(name, None) is None else None


def changed(name: str, change: Callable[[Array], Array]) -> Callable[[dict[str, Array]], None]:
    return lambda tensors: tensors.update({name: change(tensors[name])})


def poisoned(value: float) -> Callable[[Array], Array]:
    def change(x: Array) -> Array:
        x = x.copy()
        x.reshape(-1)[-1] = value
        return x

    return change


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (dropped(GATE), rf"{GATE} is missing; shape \[6, 32, 32\] is expected"),
        (dropped("model.layers.0.self_attn.sinks"), r"model.layers.0.self_attn.sinks is missing"),
        (
            lambda t: t.update({"model.layers.2.mlp.gate.weight": t["model.norm.weight"]}),
            "layers.2.mlp.gate.weight is not",
        ),
        (lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}), "lm_head.weight is not a tensor of"),
        (
            changed(GATE, lambda x: x.swapaxes(0, 1).copy()),
            rf"{GATE} has shape \[32, 6, 32\]; \[6, 32, 32\] is expected",
        ),
        (
            changed("model.norm.weight", lambda x: x[:-1].copy()),
            r"model.norm.weight has shape \[31\]; \[32\] is expected",
        ),
        (
            changed("model.norm.weight", poisoned(np.nan)),
            "model.norm.weight has 1 values that are not finite in float32",
        ),
        (changed(GATE, poisoned(-np.inf)), rf"{GATE} has 1 values that are not finite"),
        (changed("model.norm.weight", lambda x: x.astype(np.int32)), "model.norm.weight is int32; float32, float16 or"),
    ],
)
def test_a_wrong_tensor_is_refused_by_name(
    tmp_path: Path, edit: Callable[[dict[str, Array]], None], message: str
) -> None:
    folder = make_checkpoint(tmp_path, edit=edit)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (dropped("model.layers.0.self_attn.q_proj.scales"), "q_proj.scales is missing"),
        (changed(GATE, lambda x: x.view(np.int32)), f"{GATE} is int32; quantization is set, so uint32 is expected"),
        (changed(GATE, lambda x: x[..., :-1].copy()), rf"{GATE} has shape \[6, 32, 3\]; \[6, 32, 4\] is expected"),
        (
            changed(GATE.replace("weight", "biases"), poisoned(np.inf)),
            "gate_proj.biases has 1 values that are not finite",
        ),
    ],
)
def test_a_wrong_quantised_tensor_is_refused_by_name(
    tmp_path: Path, edit: Callable[[dict[str, Array]], None], message: str
) -> None:
    folder = make_checkpoint(tmp_path, edit=edit, quantization={"group_size": 32, "bits": 4})
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_a_dense_file_under_a_quantised_config_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"quantization": {"group_size": 32, "bits": 8}}))
    with pytest.raises(CheckpointError, match=r"self_attn\.q_proj\.weight has shape"):
        load(folder)


def test_a_weight_beyond_float16_is_refused_in_float16_alone(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, edit=changed("model.norm.weight", poisoned(1e5)))
    load(folder, "float32")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has 1 values that are not finite in float16"):
        load(folder, "float16")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scoring_func": "softplus"}, "scoring_func is 'softplus'; one of sqrtsoftplus, softmax"),
        ({"model_type": "llama"}, "model_type is 'llama'; this engine runs 'assay_moe' only"),
        ({"hidden_size": 0}, "hidden_size is 0; an integer of at least 1 is expected"),
        ({"hidden_size": 32.0}, "hidden_size is 32.0; an integer"),
        ({"n_shared_experts": -1}, "n_shared_experts is -1; an integer of at least 0"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True; an integer"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries; num_hidden_layers is 2"),
        ({"layer_types": "full_attention"}, "layer_types has 'full_attention' entries"),
        ({"layer_types": ["full_attention", "chunked"]}, r"layer_types\[1\] is 'chunked'; one of sliding_attention"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(4\) is not a multiple of num_key_value_heads \(3\)"),
        ({"head_dim": 7}, "head_dim is 7; RoPE pairs its halves"),
        ({"num_experts_per_tok": 7}, r"num_experts_per_tok \(7\) exceeds n_routed_experts \(6\)"),
        ({"n_routed_experts": 1 << 17}, "n_routed_experts is 131072; this engine's top-k holds 65536 at most"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0; a positive number is expected"),
        ({"rope_theta": "1e4"}, "rope_theta is '1e4'; a positive number is expected"),
        ({"routed_scaling_factor": float("nan")}, "routed_scaling_factor is nan; a positive number"),
        ({"swiglu_limit": -7.0}, "swiglu_limit is -7.0; a positive number is expected"),
        ({"attention_sinks": 1}, "attention_sinks is 1; true or false is expected"),
        ({"torch_dtype": "float64"}, "torch_dtype is 'float64'; one of float32, float16, bfloat16"),
        ({"quantization": {"bits": 4}}, "group_size is missing"),
        ({"quantization": {"bits": 5, "group_size": 32}}, "quantization.bits is 5; one of"),
        ({"quantization": {"bits": 4, "group_size": 16}}, "quantization.group_size is 16; one of"),
        ({"quantization": {"bits": 4, "group_size": 32, "mode": "mxfp4"}}, "quantization is .*affine"),
        (
            {"quantization": {"bits": 4, "group_size": 64}},
            r"hidden_size \(32\) is not a multiple of quantization.group_size",
        ),
    ],
    ids=str,
)
def test_a_wrong_config_is_refused_by_key(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = make_checkpoint(tmp_path)
    (folder / "config.json").write_text(json.dumps(CONFIG | change))
    with pytest.raises(CheckpointError, match=message) as caught:
        load(folder)
    assert str(folder / "config.json") in str(caught.value)


@pytest.mark.parametrize("key", [key for key in CONFIG if key != "architectures"])
def test_every_missing_key_is_named(tmp_path: Path, key: str) -> None:
    folder = make_checkpoint(tmp_path)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in CONFIG.items() if k != key}))
    with pytest.raises(CheckpointError, match=key):
        load(folder)


def test_folders_that_are_no_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no such file; a checkpoint has config\.json and safetensors"):
        load(tmp_path)
    folder = make_checkpoint(tmp_path / "model")
    with pytest.raises(ValueError, match="dtype is 'float64'; one of float32, float16, bfloat16"):
        load(folder, "float64")
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json: unreadable \("):
        load(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="a JSON object is expected, found list"):
        load(folder)


def test_damaged_or_absent_files_are_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    for damaged in (b"", whole[:100], whole[:-64], b"\xff" * 64):
        (folder / "model.safetensors").write_bytes(damaged)
        with pytest.raises(CheckpointError, match="not a readable safetensors file"):
            load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model.safetensors: no such file; model.safetensors, or shards with"):
        load(folder)


def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, shards=2)
    path = folder / "model.safetensors.index.json"
    good = json.loads(path.read_text())["weight_map"]
    first = next(iter(good))

    def refused(index: Any, message: str) -> None:
        path.write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match=message):
            load(folder)

    refused({"weight_map": {k: v for k, v in good.items() if k != first}}, f"{first} is in the file alone")
    refused({"weight_map": good | {"model.extra": good[first]}}, "model.extra is in the index alone")
    refused(
        {"weight_map": good | {first: "../elsewhere.safetensors"}}, "'../elsewhere.safetensors' is not the name of a"
    )
    refused({"weight_map": good | {first: "model-3.safetensors"}}, "model-3.safetensors: no such file")
    refused({}, "no usable weight_map")
    refused([], "no usable weight_map")
    path.write_text(json.dumps({"weight_map": good}))
    load(folder)
    save_file({"x": np.zeros(1, np.float32)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"both model\.safetensors and model\.safetensors\.index\.json"):
        load(folder)


def gguf_file(path: Path, **tensors: tuple[Array, str]) -> None:
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, "assay")
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_wrong_gguf_experts_are_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    folder = make_checkpoint(tmp_path, gguf="F32")
    path, name = folder / "experts.gguf", "blk.0.ffn_gate_exps.weight"
    shape = (6, 32, 32)

    def refused(message: str, **tensors: tuple[Array, str]) -> None:
        gguf_file(path, **tensors)
        with pytest.raises(CheckpointError, match=message):
            load(folder)

    good = rng.standard_normal(shape).astype(np.float32)
    refused("layers.0.mlp.experts.up_proj.weight is missing", **{name: (good, "F32")})
    refused("blk.0.attn_q.weight is not an expert tensor", **{"blk.0.attn_q.weight": (good, "F32")})
    refused("blk.9.ffn_up_exps.weight is not an expert tensor", **{"blk.9.ffn_up_exps.weight": (good, "F32")})
    refused(r"gate_exps.weight has shape \[5, 32, 32\]; \[6, 32, 32\] is expected", **{name: (good[:5].copy(), "F32")})
    refused("Q4_0 blocks can't be read; one of Q8_0", **{name: (np.zeros((6, 32, 18), np.uint8), "Q4_0")})
    refused("gate_proj.weight has 1 values that are not finite", **{name: (poisoned(np.nan)(good), "F32")})
    blocks = random_blocks(rng, "Q8_0", (6, 32), 32)
    blocks[0, 0, :2] = np.frombuffer(np.float16(np.inf).tobytes(), np.uint8)
    refused("gate_proj.weight has .* values that are not finite", **{name: (blocks, "Q8_0")})
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(CheckpointError, match="not a readable GGUF file"):
        load(folder)


def test_experts_in_both_files_are_refused(tmp_path: Path) -> None:
    with_gguf, without = make_checkpoint(tmp_path / "a", gguf="F32"), make_checkpoint(tmp_path / "b")
    (without / "experts.gguf").write_bytes((with_gguf / "experts.gguf").read_bytes())
    with pytest.raises(CheckpointError, match=r"is in both the safetensors and experts\.gguf; keep one"):
        load(without)


def test_the_helper_writes_what_it_says(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, stored="bfloat16", quantization={"group_size": 32, "bits": 4})
    saved = load_file(folder / "model.safetensors")
    assert saved[GATE].dtype == np.uint32
    assert saved["model.norm.weight"].dtype == ml_dtypes.bfloat16
    assert saved["model.layers.0.mlp.gate.e_score_correction_bias"].dtype == np.float32
    assert cast(np.ones(1, np.float32), "float16").dtype == np.float16
    assert mx.default_device() == mx.Device(mx.cpu)
