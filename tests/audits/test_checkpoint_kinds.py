"""No false alarms: the honest engine passes on every kind of checkpoint, and what was run says what it was."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from audits.cases import Case
from audits.side_by_side import audit_model
from tests.engine.tiny import make_checkpoint

SIZE_256 = {"hidden_size": 256, "moe_intermediate_size": 256, "n_routed_experts": 4}
KINDS: list[dict[str, Any]] = [
    *({"quantization": {"group_size": 32, "bits": bits}} for bits in (2, 3, 4, 6, 8)),
    *({"scoring_func": s, "norm_topk_prob": n} for s in ("softmax", "topk_softmax", "sigmoid") for n in (True, False)),
    *({"gguf": kind, **SIZE_256} for kind in ("Q8_0", "Q2_K", "Q4_K", "Q6_K", "F16")),
    {"quantization": {"group_size": 32, "bits": 4}, "tie_word_embeddings": False},
    {"n_shared_experts": 2, "swiglu_limit": None, "attention_sinks": False},
    {"num_key_value_heads": 1, "sliding_window": 1, "head_dim": 16},
    {"stored": "bfloat16", "shards": 3},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_an_honest_run_passes(tiny_case: Case, tmp_path: Path, kind: dict[str, Any], dtype: str) -> None:
    folder = make_checkpoint(tmp_path / "model", **kind)
    (judged,) = audit_model([replace(tiny_case, model=str(folder), dtype=dtype)])
    assert judged.verdict.outcome == "pass", judged.verdict.message
    assert judged.actual.provenance["weights"]["tensors"] > 0


@pytest.mark.parametrize(("chunk", "decode"), [(1, 0), (3, 0), (64, 0), (64, 20), (5, 1)])
def test_how_the_tokens_are_fed_does_not_matter(tiny_case: Case, chunk: int, decode: int) -> None:
    (judged,) = audit_model([replace(tiny_case, chunk=chunk, decode=decode)])
    assert judged.verdict.outcome == "pass", judged.verdict.message


def test_a_single_token_passes(tiny_case: Case) -> None:
    (judged,) = audit_model([replace(tiny_case, tokens=(3,), decode=0)])
    assert judged.verdict.outcome == "pass", judged.verdict.message
