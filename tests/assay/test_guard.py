"""A candidate that ends or hangs the process is a failure, never a pass and never silence."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

CANDIDATES = """
import ctypes, os, time


def ends(gate, up):
    os._exit(0)


def complains(gate, up):
    os._exit(2)  # as a complaint of ours would


def crashes(gate, up):
    ctypes.string_at(0)


def hangs(gate, up):
    print("it runs", flush=True)
    time.sleep(60)
"""
# The limit is shortened in the child alone: the command has no option for it.
COMMAND = "from assay import guard; guard.SILENCE = 8.0; from assay.cli import command; command()"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("ends", "ended the process (exit code 0)"),
        ("complains", "ended the process (exit code 2)"),
        ("crashes", "ended the process (signal"),
        ("hangs", "has not come back"),
    ],
)
def test_it_is_reported_and_fails(name: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(CANDIDATES, encoding="utf-8")
    arguments = ["audit", "swiglu", "--candidate", f"mine.py:{name}"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    _, _, command = done.stderr.partition("replay: ")
    assert command.startswith("assay audit --replay "), "the very first call has a case too"
    case = json.loads(shlex.split(command)[-1])
    assert (case["contract"], case["candidate"], case["dtype"]) == ("swiglu", f"mine.py:{name}", "float32")


def test_a_candidate_cannot_change_how_a_report_ends(tmp_path: Path) -> None:
    text = "import atexit, os\natexit.register(lambda: os._exit(0))\ndef zeros(gate, up): return 0 * gate\n"
    (tmp_path / "mine.py").write_text(text, encoding="utf-8")
    arguments = ["audit", "swiglu", "--candidate", "mine.py:zeros", "--dtype", "float32"]
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1, done.stderr
    assert "FAIL swiglu" in done.stdout


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_watching_process_alone_ends_both(number: int, code: int, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(CANDIDATES, encoding="utf-8")
    arguments = ["audit", "swiglu", "--candidate", "mine.py:hangs"]
    # A shell's background jobs ignore interrupts.
    handled = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); {COMMAND}"
    child = subprocess.Popen(
        [sys.executable, "-c", handled, *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stderr is not None
    while "it runs" not in (line := child.stderr.readline()):  # what a candidate prints goes to standard error
        assert line, "it ended before it ran"
    child.send_signal(number)
    _, err = child.communicate(timeout=30)  # returns when the other process has let go of standard error, too
    assert child.returncode == code
    assert "FAIL" not in err and "Traceback" not in err
