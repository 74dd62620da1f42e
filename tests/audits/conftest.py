"""A tiny checkpoint and a case for it, shared by the tests of the audits."""

from pathlib import Path

import numpy as np
import pytest

from audits.cases import Case
from tests.engine.tiny import CONFIG, make_checkpoint

# Four windows of 5 long, prefilled in chunks that don't divide it, and decoded at the end.
LENGTH = 20


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_case(tiny_model: Path) -> Case:
    tokens = np.random.default_rng(0).integers(CONFIG["vocab_size"], size=LENGTH)
    return Case(name="tiny", tokens=tuple(tokens.tolist()), model=str(tiny_model), device="cpu", chunk=7, decode=3)
