"""Goldens: what diff shows, what verify refuses, and the committed ones."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from audits import golden_jobs
from audits.cases import SHIPPED_FOLDER, TRACES_FOLDER, Case
from audits.golden_jobs import GOLDENS, default_golden_paths, diff, golden_cases, regenerate, verify
from audits.quantized import STACK
from goldens import store, workflow
from goldens.errors import GoldenError
from goldens.fingerprint import changes_since_published, fingerprint


@pytest.fixture
def accepted(tiny_case: Case, tmp_path: Path) -> Path:
    path = tmp_path / "g.h5"
    regenerate(path, [tiny_case])
    workflow.accept(path)
    return path


def test_a_golden_says_how_it_was_run_and_is_run_so_again(accepted: Path, tiny_case: Case) -> None:
    (case,) = golden_cases(accepted)
    assert case == tiny_case
    (judged,) = verify(accepted)
    assert judged.verdict.outcome == "pass"
    assert judged.comparison.logits is not None
    assert judged.comparison.logits.max_abs == 0


def test_provenance_is_complete(accepted: Path) -> None:
    with store.open(accepted) as golden:
        told = golden.provenance
    wanted = {"source", "engine", "version", "device", "dtype", "arithmetic", "model", "model_hash", "tensor_hashes"}
    assert wanted | {"config", "seed", "command", "versions", "date", "case", "weights"} <= told.keys()


def test_diff_shows_what_moved_and_that_both_runs_are_within_bound(accepted: Path, tiny_case: Case) -> None:
    regenerate(accepted, [replace(tiny_case, dtype="bfloat16")])
    (judged,) = diff(accepted)
    assert judged.verdict.outcome == "pass", "two honest runs in two dtypes: everything that moved is inherited"
    logits = next(p for p in judged.comparison.probes if p.probe == "logits")
    assert logits.drift is not None
    assert logits.drift.max_abs > 1e-3


def test_diff_fails_when_the_pending_run_is_wrong(
    accepted: Path, tiny_case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    import engine.caches

    monkeypatch.setattr(engine.caches.KVCache, "make_mask", lambda self, N: None)
    regenerate(accepted, [tiny_case])
    (judged,) = diff(accepted)
    assert judged.verdict.outcome == "fail"
    assert judged.verdict.message.startswith("layers.1.attn.context")


def test_every_probe_of_a_golden_is_judged_on_its_own_inputs(accepted: Path) -> None:
    """Change one value of each probe in turn, store it with fresh hashes, and see it named."""
    with store.open(accepted) as golden:
        trace = golden.trace
    rng = np.random.default_rng(0)
    for name, array in trace.probes.items():
        changed = array.copy()
        index = tuple(int(rng.integers(n)) for n in array.shape)
        changed[index] = changed[index] + 1 if array.dtype.kind == "i" else changed[index] * 1.5 + 1
        store.write(accepted, [replace(trace, probes={**trace.probes, name: changed})])
        (judged,) = verify(accepted)
        assert judged.verdict.message.startswith(f"expected trace: {name}["), (name, judged.verdict.message)


def test_a_case_without_its_options_is_refused(accepted: Path) -> None:
    with store.open(accepted) as golden:
        trace = golden.trace
    provenance = {key: value for key, value in trace.provenance.items() if key != "case"}
    store.write(accepted, [replace(trace, provenance=provenance)])
    with pytest.raises(GoldenError, match="regenerate it"):
        list(verify(accepted))


def test_pending_goldens_are_asked_for_by_name(tmp_path: Path) -> None:
    with pytest.raises(GoldenError, match="no pending golden"):
        golden_jobs.pending_goldens([tmp_path / "g.h5"])


def test_the_committed_goldens_belong_to_the_shipped_model_and_stay_small() -> None:
    found = fingerprint(SHIPPED_FOLDER)
    assert changes_since_published(SHIPPED_FOLDER, found) == []
    for path, options in zip(default_golden_paths(), GOLDENS.values(), strict=True):
        with store.open(path) as golden:
            told = golden.provenance
            assert told["dtype"] == options["dtype"]
            assert [case.name for case in golden_cases(path)] == [options["task"]]
            if experts := options.get("experts"):
                dense = {name: tensor for name, tensor in found.tensor_hashes.items() if STACK not in name}
                assert {name: told["tensor_hashes"].get(name) for name in dense} == dense
                assert told["model"] == f"shipped+{experts}"
                assert told["config"] == found.config
                assert all("kernel_mul_mm_id_q4_K_f32_n32" in told["kernels"][f"layers.{i}.moe.up"] for i in range(4))
            else:
                assert told["model_hash"] == found.model_hash
                assert len(golden.trace.tokens) > found.config["sliding_window"], "the window must wrap"
    assert sum(path.stat().st_size for path in TRACES_FOLDER.glob("*.h5")) < 20e6
    assert (SHIPPED_FOLDER / "model.safetensors").stat().st_size < 32e6
