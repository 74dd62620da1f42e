"""A stored Trace of another model or prompt is refused, and what differs is named."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from goldens.errors import GoldenError
from goldens.fingerprint import Fingerprint, changes_since_published, fingerprint, publish
from goldens.matching import check_model, check_tokens
from goldens.trace import Trace

MODEL = Fingerprint(model_hash="m1", tensor_hashes={"a": "1", "b": "2"}, config={"window": 5})


def trace(**provenance: Any) -> Trace:
    told = {"model_hash": "m1", "tensor_hashes": MODEL.tensor_hashes, "config": MODEL.config} | provenance
    return Trace(case="c", tokens=np.array([7, 8, 9]), probes={"x": np.ones((3, 1))}, provenance=told)


def changed(model_hash: str = "m2", **parts: Any) -> Fingerprint:
    return Fingerprint(
        **{"model_hash": model_hash, "tensor_hashes": MODEL.tensor_hashes, "config": MODEL.config} | parts
    )


def test_its_own_model_and_tokens_are_taken() -> None:
    check_model(trace(), MODEL)
    check_tokens(trace(), [7, 8, 9])


@pytest.mark.parametrize(
    ("found", "named"),
    [
        (changed(tensor_hashes={"a": "1", "b": "0"}), "tensor b changed"),
        (changed(tensor_hashes={"a": "1"}), "tensor b is gone"),
        (changed(tensor_hashes={"a": "1", "b": "2", "c": "3"}), "tensor c is new"),
        (changed(config={"window": 6}), "config.json: window was 5, is 6"),
        (changed(tensor_hashes={f"t{i}": "0" for i in range(9)}), "and 8 more"),
    ],
)
def test_another_model_is_refused_with_what_changed(found: Fingerprint, named: str) -> None:
    with pytest.raises(GoldenError, match=named):
        check_model(trace(), found)


@pytest.mark.parametrize("provenance", [{"model_hash": None}, {"model_hash": "m0", "tensor_hashes": 3}])
def test_a_trace_that_does_not_say_its_model_matches_none(provenance: dict[str, Any]) -> None:
    with pytest.raises(GoldenError, match="another model"):
        check_model(trace(**provenance), MODEL)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([7, 0, 9], "token 1 is 8, here it's 0"),
        ([7, 8], "it has 3 tokens, here there are 2: they differ from token 2"),
        ([7, 8, 9, 1], "it has 3 tokens, here there are 4: they differ from token 3"),
        ([], "these have shape"),
        ([[7, 8, 9]], r"these have shape \(1, 3\)"),
    ],
)
def test_other_tokens_are_refused_by_the_first_that_differs(tokens: Any, message: str) -> None:
    with pytest.raises(GoldenError, match=message):
        check_tokens(trace(), tokens)


def checkpoint(folder: Path, value: float = 1.0, files: int = 1, **config: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"width": 2} | config))
    tensors = {"a": np.full((2, 2), value, np.float32), "b": np.zeros(3, np.float16)}
    for i in range(files):
        save_file(dict(list(tensors.items())[i::files]), folder / f"part-{i}.safetensors")
    return folder


def test_a_fingerprint_is_of_the_contents_and_not_of_the_files(tmp_path: Path) -> None:
    one = fingerprint(checkpoint(tmp_path / "one"))
    assert fingerprint(checkpoint(tmp_path / "sharded", files=2)) == one
    assert fingerprint(checkpoint(tmp_path / "value", value=1.01)).model_hash != one.model_hash
    assert fingerprint(checkpoint(tmp_path / "config", width=3)).model_hash != one.model_hash


def test_a_change_since_publication_is_named(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m")
    assert changes_since_published(folder, fingerprint(folder)) == []
    publish(folder)
    assert changes_since_published(folder, fingerprint(folder)) == []
    save_file({"a": np.full((2, 2), 1.01, np.float32), "b": np.zeros(3, np.float16)}, folder / "part-0.safetensors")
    (change,) = changes_since_published(folder, fingerprint(folder))
    assert change.startswith("tensor a changed since fingerprint.json")


@pytest.mark.parametrize("text", ["not json", "[]"])
def test_a_damaged_published_fingerprint_is_refused(tmp_path: Path, text: str) -> None:
    folder = checkpoint(tmp_path / "m")
    (folder / "fingerprint.json").write_text(text)
    with pytest.raises(GoldenError, match="restore it"):
        changes_since_published(folder, fingerprint(folder))


def test_a_folder_without_a_checkpoint_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(GoldenError, match="name a folder"):
        fingerprint(tmp_path)
    folder = checkpoint(tmp_path / "m")
    path = folder / "part-0.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(GoldenError, match="truncated"):
        fingerprint(folder)
