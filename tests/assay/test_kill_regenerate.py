"""`assay golden regenerate` may be killed at any moment: the accepted golden stays what it was, whole.

tests/goldens/test_crash.py kills the store's own steps hundreds of times; here the real command is killed, at seeded
moments between its start and its end. `--full` does it a hundred times.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from goldens import store
from goldens.workflow import pending_path
from tests.engine.tiny import make_checkpoint

COMMAND = [sys.executable, "-m", "assay", "golden", "regenerate"]
NEW = ["--tokens", "1,5,7,2", "--dtype", "float32", "--device", "cpu"]


def kill_after(seconds: float, command: list[str]) -> bool:
    """Run `command`, kill it after `seconds`; whether it was still running."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True
    return False


def test_killing_regenerate_never_touches_the_accepted_golden(tmp_path: Path, full: bool) -> None:
    golden = tmp_path / "g.h5"
    model = make_checkpoint(tmp_path / "model")
    began = time.perf_counter()
    subprocess.run([*COMMAND, str(golden), "--model", str(model), *NEW], check=True, capture_output=True)
    whole = time.perf_counter() - began
    pending_path(golden).rename(golden)
    accepted, content = golden.read_bytes(), store.open(golden).content_hash

    seed = 0
    moments = random.Random(seed)
    killed = 0
    for round_number in range(100 if full else 6):
        # Imports take most of the time; the writing is at the end, so half of the kills are aimed there.
        share = moments.random() if round_number % 2 else moments.uniform(0.7, 1.1)
        killed += kill_after(whole * share, [*COMMAND, str(golden)])
        assert golden.read_bytes() == accepted, f"seed {seed}, round {round_number}: the accepted golden changed"
        if (pending := pending_path(golden)).exists():
            assert store.open(pending).content_hash == content, "a pending golden is whole or not there"
    assert killed, "no kill came in time: the test tests nothing"

    subprocess.run([*COMMAND, str(golden)], check=True, capture_output=True)
    left = {path.name for path in tmp_path.iterdir()} - {"model"}
    assert left == {"g.h5", "g.h5.lock", "g.pending.h5"}, "a later run cleans up after a killed one"


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    from goldens.errors import GoldenError
    from goldens.workflow import lock, stage

    golden = tmp_path / "g.h5"
    with lock(golden), pytest.raises(GoldenError, match=str(os.getpid())):
        stage(golden, [])
