"""The engine on its own Metal kernels: what runs, what is said of it, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import engine
from engine import device
from engine.device import Device
from engine.errors import CheckpointError, DeviceError
from engine.metal import table
from engine.metal.kernels import host, ops
from engine.metal.library import Kernel
from tests.engine.metal.mlx_on_host import OnHost, stand_in
from tests.engine.tiny import make_checkpoint

SIZE_256 = {"hidden_size": 256, "moe_intermediate_size": 256, "n_routed_experts": 4}
TOKENS = [3, 17, 60, 2, 9, 9, 41, 28]
PARTS = ("experts", "gate", "up", "act", "down")
LAYERS = 2
on_host = pytest.fixture(stand_in)


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("blocks") / "model", gguf="Q4_K", **SIZE_256)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that the executor launched, as it sees them."""
    seen: list[str] = []
    original = Kernel.launch

    def launch(self: Kernel, *args: Any, **options: Any) -> Any:
        seen.append(self.name)
        return original(self, *args, **options)

    monkeypatch.setattr(Kernel, "launch", launch)
    return seen


def expected_names(dtype: str, tokens: int) -> dict[str, list[str]]:
    """What the table says for `tokens` at once, in the order of computation: for one token attention by the kernel, and
    in float32 products by vector; for more expert-major ones."""
    if tokens == 1 and dtype == "float32":
        product = [table.plan_mul_mv_id("Q4_K", dtype, 3, 256).kernel]
    else:
        product = ["kernel_mul_mm_id_map", table.plan_mul_mm_id("Q4_K", dtype, tokens, 256, 4).kernel]
    act = [table.plan_swiglu(dtype, 3 * tokens, 256).kernel]
    norm = [table.plan_rows("rms_norm", dtype, tokens).kernel]
    turn = [table.plan_rope(dtype, tokens, 4, 16).kernel]
    layer = {"attn_norm": norm, "attn.q": turn, "attn.k": turn}
    if tokens == 1:
        layer["attn.context"] = [table.plan_attention(dtype, 1, 4, 16, 16).kernel]
    layer["mlp_norm"] = norm
    moe = zip(PARTS, (["kernel_router"], product, product, act, product), strict=True)
    layer |= {f"moe.{part}": names for part, names in moe}
    every = {f"layers.{i}.{part}": names for i in range(LAYERS) for part, names in layer.items()}
    return every | {"final_norm": norm}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_is_said_to_have_run_is_what_was_launched(blocks: Path, launches: list[str], dtype: str) -> None:
    model = engine.load(blocks, dtype=dtype, kernels="host")
    assert model.kernels == {}
    for tokens in (8, 1):
        launches.clear()
        model.run(TOKENS[:tokens])
        told = expected_names(dtype, tokens)
        assert model.kernels == told == model.provenance["kernels"], "and nothing of the run before"
        assert launches == [name for names in told.values() for name in names]


def test_prefill_and_decode_of_one_run_are_both_told(blocks: Path, launches: list[str]) -> None:
    model = engine.load(blocks, dtype="float32", kernels="host")
    model.run(TOKENS, chunk=5, decode=2)
    names = model.kernels["layers.1.moe.down"]
    assert names == ["kernel_mul_mm_id_map", "kernel_mul_mm_id_q4_K_f32_n32", "kernel_mul_mv_id_q4_K_f32"]
    assert set(launches) == {name for names in model.kernels.values() for name in names}
    model.generate(TOKENS[:1], max_tokens=2)
    assert model.kernels["layers.1.moe.down"] == ["kernel_mul_mv_id_q4_K_f32"]


def test_the_record_is_of_the_launch_not_of_the_plan(blocks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that gives another kernel than it was asked for: the record has the one that ran."""
    lib = host.library("elementwise.metal", False)

    class Swapped:
        def __getitem__(self, name: str) -> Kernel:
            return lib[name.replace("swiglu_f32", "swiglu_f16")]

    original = host.library
    monkeypatch.setattr(host, "library", lambda name, checked: Swapped() if "elem" in name else original(name, checked))
    gate = np.ones((1, 8), np.float16)
    noted: list[str] = []
    plan = table.plan_swiglu("float32", 1, 8)
    half = (gate, "float16")
    host.run(plan, [ops.pack("iiiif", 1, 8, 0, 0, 0), half, half, None], [((1, 8), "float16")], note=noted.append)
    assert noted == ["kernel_swiglu_f16"]


def test_mlx_launches_none_of_them(blocks: Path, launches: list[str]) -> None:
    model = engine.load(blocks, dtype="float32", device="cpu")
    model.run(TOKENS)
    assert model.provenance["kernels"] == {}
    assert not launches


def test_both_kinds_of_kernels_compute_one_model(blocks: Path) -> None:
    """In layer 0, from equal inputs; how close they must be is for the audit to say, here within one percent."""
    outputs: dict[str, Any] = {}
    for kernels in ("mlx", "host"):
        seen: dict[str, Any] = {}
        engine.load(blocks, dtype="float32", device="cpu", kernels=kernels).run(TOKENS, tap=seen.__setitem__)
        outputs[kernels] = seen["layers.0.moe.output"]
        assert seen["layers.0.moe.gate"].shape == (8, 3, 256)
        assert seen["layers.0.moe.weights"].dtype == np.float32
        assert seen["layers.0.moe.experts"].dtype == np.int32
    assert np.abs(outputs["host"] - outputs["mlx"]).max() < 1e-2 * np.abs(outputs["mlx"]).max()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_apple_gpu_is_given_the_same_launches(
    blocks: Path, monkeypatch: pytest.MonkeyPatch, on_host: OnHost, dtype: str
) -> None:
    """What `kernels="metal"` sends to MLX, run by the host executor: the host's bits, and the host's record."""
    host_engine = engine.load(blocks, dtype=dtype, kernels="host")
    monkeypatch.setattr(device, "_probe", lambda name: Device(name=name, available=True, detail="a stand-in"))
    monkeypatch.setattr(Device, "handle", mx.Device(mx.cpu))
    metal_engine = engine.load(blocks, dtype=dtype, kernels="metal")
    actual, expected = {}, {}
    metal_engine.run(TOKENS, tap=actual.__setitem__, chunk=7)
    host_engine.run(TOKENS, tap=expected.__setitem__, chunk=7)
    assert actual.keys() == expected.keys()
    for name in expected:
        assert np.array_equal(actual[name], expected[name]), name
    assert metal_engine.kernels == host_engine.kernels != {}
    assert metal_engine.provenance["device"] == "metal"
    assert metal_engine.provenance["arithmetic"]["experts"] == host_engine.provenance["arithmetic"]["experts"]
    told = [name for tokens in (7, 1) for names in expected_names(dtype, tokens).values() for name in names]
    for (exported, _), name in zip(on_host.calls, told, strict=True):
        assert exported.name.startswith(f"custom_kernel_{name}_")


def test_no_apple_gpu_is_one_clear_line(blocks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    told = (
        r"^--kernels metal needs an Apple GPU; MLX has Metal on macOS .*: --kernels host runs the same .* on the CPU$"
    )
    with pytest.raises(DeviceError, match=told):
        engine.load(blocks, kernels="metal")


def test_weights_are_the_values_of_the_blocks_that_the_kernels_read(blocks: Path) -> None:
    mlx, host = (engine.load(blocks, dtype="float16", device="cpu", kernels=kernels) for kernels in ("mlx", "host"))
    expected, actual = dict(mlx.weights()), dict(host.weights())
    assert actual.keys() == expected.keys()
    assert all(np.array_equal(actual[name], expected[name]) for name in expected)
    name = "model.layers.0.mlp.experts.up_proj.weight"
    assert actual[name].dtype == np.float16
    host.blocks[name].data[1, 2, 20] ^= 1
    assert not np.array_equal(dict(host.weights())[name], actual[name])


def test_the_claims_are_those_of_the_weaker_kernel(blocks: Path) -> None:
    mlx, host = (engine.load(blocks, dtype="float32", device="cpu", kernels=kernels) for kernels in ("mlx", "host"))
    exact = {"accumulate": "float32", "intermediate": "float32", "output": "input"}
    changed = {
        "experts": exact | {"operand": "float16"},
        "rms_norm": exact,
        "rope": {"operand": "input", "intermediate": "float32", "output": "input"},
    }
    assert host.provenance["arithmetic"] == mlx.provenance["arithmetic"] | changed


@pytest.mark.parametrize("place", ["host", "metal"])
def test_softmax_over_quantised_keys_is_the_kernel(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch, on_host: OnHost
) -> None:
    """Models without sinks multiply quantised keys as they are; the layer that has a window doesn't quantise."""
    shape = SIZE_256 | {"head_dim": 32, "attention_sinks": False}
    folder = make_checkpoint(tmp_path / "model", gguf="Q4_K", **shape)
    seen: dict[str, dict[str, Any]] = {}
    if place == "metal":
        monkeypatch.setattr(device, "_probe", lambda name: Device(name=name, available=True, detail="a stand-in"))
        monkeypatch.setattr(Device, "handle", mx.Device(mx.cpu))
    for kernels in ("mlx", place):
        on = {"device": "cpu"} if kernels == "mlx" else {}
        model = engine.load(folder, dtype="float32", kernels=kernels, kv_bits=8, kv_group_size=32, **on)
        seen[kernels] = {}
        model.run(TOKENS, chunk=5, tap=seen[kernels].__setitem__)
    full, sliding = (i for kind in ("full_attention", "sliding_attention") for i in _layers(model, kind))
    assert model.kernels[f"layers.{full}.attn.context"] == ["kernel_softmax_f32"]
    assert f"layers.{sliding}.attn.context" not in model.kernels, "several queries at a time"
    actual, expected = (seen[kernels]["layers.0.attn.context"] for kernels in (place, "mlx"))
    assert np.abs(actual - expected).max() < 1e-5 * np.abs(expected).max()


def _layers(model: engine.Engine, kind: str) -> list[int]:
    return [i for i, found in enumerate(model.config.layer_types) if found == kind]


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"kernels": "cuda"}, ValueError, "kernels is 'cuda'; one of mlx, host, metal"),
        ({"kernels": "host", "device": "metal"}, DeviceError, "'metal': kernels host run on the CPU"),
        (
            {"kernels": "metal", "device": "cpu"},
            DeviceError,
            "'cpu': kernels metal run on an Apple GPU; ask for device",
        ),
        ({"kernels": "host", "dtype": "bfloat16"}, ValueError, "'bfloat16'; our kernels multiply float32 and"),
        ({"kernels": "host", "dtype": "float8"}, ValueError, "one of float32, float16, bfloat16"),
    ],
)
def test_what_has_no_kernels_is_refused(
    blocks: Path, options: dict[str, str], error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        engine.load(blocks, **options)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (None, "experts.gate_proj.weight is not in blocks; the kernels read experts in experts.gguf as Q8_0, Q4_K,"),
        ("F16", "experts.gate_proj.weight is F16; the kernels read"),
        ("Q6_K", "experts.gate_proj.weight is Q6_K; the kernels read"),
    ],
)
def test_experts_that_no_kernel_reads_are_refused(tmp_path: Path, kind: str | None, told: str) -> None:
    folder = make_checkpoint(tmp_path / "model", gguf=kind, **SIZE_256)
    with pytest.raises(CheckpointError, match=told):
        engine.load(folder, dtype="float32", kernels="host")
