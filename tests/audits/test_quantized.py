"""Checkpoints with quantised experts: what they hold, that they're made once and whole, and cases that ask for them."""

from __future__ import annotations

import hashlib
import json
import shlex
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from audits import cases, quantized
from audits.cases import Case, cases_for, model_folder
from audits.quantized import quantized_checkpoint
from engine import kquants
from engine.checkpoint import load_checkpoint
from engine.config import read_config
from engine.quantize import fit
from goldens.fingerprint import PUBLISHED, changes_since_published, fingerprint
from reference.model import Reference
from tests.engine.tiny import make_checkpoint

SIZE_256 = {"hidden_size": 256, "moe_intermediate_size": 256, "n_routed_experts": 3, "num_hidden_layers": 1}
STACKS = [f"model.layers.0.mlp.experts.{p}_proj.weight" for p in ("down", "gate", "up")]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(quantized, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = make_checkpoint(tmp_path / "model", stored="bfloat16", shards=2, **SIZE_256)
    (folder / PUBLISHED).write_text("{}", encoding="utf-8")
    return folder


@pytest.mark.parametrize("kind", quantized.FORMATS)
def test_it_is_the_model_but_for_its_experts(model: Path, kind: str) -> None:
    made = quantized_checkpoint(model, kind)
    assert (made / "config.json").read_bytes() == (model / "config.json").read_bytes()
    before, after = fingerprint(model).tensor_hashes, fingerprint(made).tensor_hashes
    dense = {name for name in before if quantized.STACK not in name}
    assert {name: after[name] for name in dense} == {name: before[name] for name in dense}
    assert after.keys() - dense == {f"blk.0.ffn_{p}_exps.weight" for p in ("gate", "up", "down")}
    assert changes_since_published(made, fingerprint(made)) == []

    blocks = load_checkpoint(made, read_config(made), mx.float32, keep_blocks=True).blocks
    exact, seen = Reference(model).weights, Reference(made).weights
    for name in STACKS:
        found = fit(exact[name].exact.float().numpy(), quantized.FORMATS[kind])
        assert blocks[name].kind == quantized.FORMATS[kind]
        assert np.array_equal(blocks[name].data, found.blocks)
        assert np.array_equal(kquants.dequantize(blocks[name].data, blocks[name].kind), found.values)
        assert np.array_equal(seen[name].exact.float().numpy(), found.values), "as the gguf package reads them"


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_it_is_made_once_and_alike(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    made = quantized_checkpoint(model, "q8_0", told.append)
    assert quantized_checkpoint(model, "q8_0", told.append) == made
    assert len(told) == 1
    assert "q8_0" in told[0]
    first = contents(made)
    monkeypatch.setattr(quantized, "cache_folder", lambda: tmp_path / "another")
    assert contents(quantized_checkpoint(model, "q8_0")) == first


def test_another_model_or_quantiser_is_another_checkpoint(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {quantized_checkpoint(model, "q8_0"), quantized_checkpoint(model, "q4_k")}
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rope_theta": 5000.0}))
    made.add(quantized_checkpoint(model, "q8_0"))
    monkeypatch.setattr(quantized, "_recipe", lambda: "other")
    made.add(quantized_checkpoint(model, "q8_0"))
    assert len(made) == 4


def test_a_cache_that_cannot_be_written_says_what_to_set(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "cache_folder", lambda: Path("/dev/null/cache"))
    with pytest.raises(ValueError, match=r"can't be kept in /dev/null/cache \(Not a directory\); set ASSAY_CACHE"):
        quantized_checkpoint(model, "q8_0")


def test_what_was_interrupted_is_not_there(model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(quantized, "publish", stop)
        with pytest.raises(KeyboardInterrupt):
            quantized_checkpoint(model, "q8_0")
    assert list(cache.iterdir()) == []
    assert quantized_checkpoint(model, "q8_0").is_dir()


def test_a_copy_that_another_process_made_first_is_taken(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = quantized._make

    def overtaken(folder: Path, kind: str, made: Path) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(quantized, "_make", original)
            quantized_checkpoint(folder, kind)
        original(folder, kind, made)

    monkeypatch.setattr(quantized, "_make", overtaken)
    found = quantized_checkpoint(model, "q8_0")
    assert changes_since_published(found, fingerprint(found)) == []


def test_a_kept_copy_that_was_altered_is_reported(model: Path) -> None:
    made = quantized_checkpoint(model, "q8_0")
    path = made / "experts.gguf"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    (change,) = changes_since_published(made, fingerprint(made))
    assert change.startswith("tensor blk.0.ffn_up_exps.weight changed")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"gguf": "Q8_0"}, "no experts in its safetensors"),
        ({"quantization": {"group_size": 32, "bits": 4}}, "only floating-point experts can be quantised"),
        ({"moe_intermediate_size": 32}, "down_proj.weight: Q4_K: a row of shape .* is not a whole number of blocks"),
    ],
)
def test_experts_that_cannot_be_quantised_are_refused(
    tmp_path: Path, cache: Path, options: dict[str, object], told: str
) -> None:
    folder = make_checkpoint(tmp_path / "other", **{**SIZE_256, **options})
    with pytest.raises(ValueError, match=told):
        quantized_checkpoint(folder, "q4_k")
    assert list(cache.iterdir()) == []


def test_an_unknown_format_is_refused(model: Path) -> None:
    with pytest.raises(ValueError, match="'q5_k'; one of q8_0, q4_k, q2_k, iq2_xxs"):
        quantized_checkpoint(model, "q5_k")


def test_a_case_names_its_checkpoint(model: Path) -> None:
    case = Case(name="c", tokens=(1, 2), model=str(model), experts="q8_0", kernels="host")
    assert model_folder(case.checkpoint) == quantized_checkpoint(model, "q8_0")
    assert model_folder(str(model)) == model
    plus = model.rename(model.with_name("model+q8_0"))
    assert model_folder(str(plus)) == plus, "a folder of that name is itself"


def test_a_case_keeps_its_options_and_older_ones_have_defaults() -> None:
    case = Case(name="c", tokens=(1, 2), dtype="float16", experts="iq2_xxs", kernels="host")
    assert Case.from_dict(case.as_dict()) == case
    words = shlex.split(case.replay_command())
    assert words[words.index("--experts") + 1] == "iq2_xxs"
    assert words[words.index("--kernels") + 1] == "host"
    old = Case.from_dict({"tokens": [1], "options": {"dtype": "float32", "device": "cpu", "chunk": 32, "decode": 0}})
    assert (old.experts, old.kernels) == ("", "mlx")
    assert "--experts" not in old.replay_command()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"experts": "q5_k"}, r"experts is 'q5_k'; one of \(none\), q8_0, q4_k, q2_k, iq2_xxs is expected"),
        ({"kernels": "cuda"}, "kernels is 'cuda'; one of mlx, host, metal is expected"),
        ({"kernels": None}, "kernels is None"),
    ],
)
def test_options_of_no_case_are_refused(options: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Case.from_dict({"tokens": [1], "options": options})
    with pytest.raises(ValueError, match=told):
        cases_for(cases.SHIPPED, tokens="1", **options)
