"""`assay audit` on somebody's file: exit codes, what is printed where, what is written, and replays."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from junitparser import JUnitXml

from assay import cli, screen

HONEST = """
import numpy as np

print("loading weights")

def softmax(x):
    print("a candidate may print")
    y = np.exp((x - x.max(-1, keepdims=True)).astype(np.float32))
    return (y / y.sum(-1, keepdims=True)).astype(x.dtype)
"""
WRONG = HONEST.replace("    return (", "    y[..., 40:] = 0\n    return (")
STRANGERS = """
import sys

def raising(x):
    raise RuntimeError("no such \\x1b[31m kernel")

def exiting(x):
    sys.exit(0)

def interrupted(x):
    import signal
    signal.raise_signal(signal.SIGINT)

def interrupting(x):
    raise KeyboardInterrupt

def pairs(x, y):
    return x

def promoting(x):
    import numpy as np
    y = np.exp((x - x.max(-1, keepdims=True)).astype(np.float32))
    y = y / y.sum(-1, keepdims=True)
    return y if x.shape[-1] < 40 else y.astype(x.dtype)

calls = 0

def changing(x):
    import numpy as np
    global calls
    calls += 1
    return np.nextafter(promoting(x), np.float32(calls % 2))

def either(x, up=None, *, limit=None):
    import numpy as np
    if up is None:
        return promoting(x).astype(x.dtype)
    g, u = (x, up) if limit is None else (np.minimum(x, limit), np.clip(up, -limit, limit))
    return g / (1 + np.exp(-g)) * u

number = 3
"""

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def audit(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run `assay audit ARGUMENTS` in an empty folder with mine.py; returns (exit code, standard output, error)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(HONEST, encoding="utf-8")
    (tmp_path / "strangers.py").write_text(STRANGERS, encoding="utf-8")

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["assay", "audit", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capfd.readouterr()
        return int(stop.value.code or 0), out, err

    return run


FLOAT32 = ("--dtype", "float32")
KERNEL_CASE = (
    '{"contract": "moe_matmul", "kernel": "kernel_mul_mm_id_q8_0_f32_n32", "tokens": %s, "K": %s, "M": 64,'
    ' "load": "%s", "seed": 0}'
)


def one_line(err: str) -> str:
    (line,) = [text for text in err.splitlines() if not text.startswith("…")]
    assert line.startswith("assay: ")
    return line


def left() -> set[str]:
    return {path.name for path in Path().iterdir()} - {"mine.py", "strangers.py", "__pycache__", ".hypothesis"}


def test_an_honest_candidate_passes_and_leaves_nothing_behind(audit: Run) -> None:
    code, out, err = audit("softmax", "--candidate", "mine.py:softmax", *FLOAT32)
    assert code == 0, out + err
    assert "pass" in out
    assert ", 0 failed, 0 could not be judged" in out
    assert "… audit: " in err, "progress goes to standard error"
    assert "a candidate may print" in err
    assert "loading weights" in err
    assert left() == set()


def test_a_log_gets_a_line_a_contract(audit: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    now = itertools.count()
    monkeypatch.setattr("assay.screen.time.monotonic", lambda: next(now) / 10)  # a hundred cases take ten seconds
    _, _, err = audit("softmax", "swiglu", "--candidate", "strangers.py:either", *FLOAT32)
    progress = [text for text in err.splitlines() if text.startswith("…")]
    assert progress[0].startswith("… audit: 1/2 softmax float32")
    assert [text.split()[2] for text in progress if "1/2" in text or "2/2" in text] == ["1/2", "2/2"], progress


def test_a_long_contract_is_heard_of_once_a_minute(capfd: pytest.CaptureFixture[str], monkeypatch) -> None:
    now = iter([0.0, 30.0, 61.0, 70.0, 80.0])
    monkeypatch.setattr("assay.screen.time.monotonic", lambda: next(now))
    with screen.progress("audit", None) as tell:
        for name in ("1/2 a first", "1/2 a second", "1/2 a third", "2/2 b first", "2/2 b second"):
            tell(name)
    told = capfd.readouterr().err.splitlines()
    assert told == ["… audit: 1/2 a first", "… audit: 1/2 a third", "… audit: 2/2 b first"]


def test_a_failure_exits_1_and_its_replay_does_too_until_it_is_mended(audit: Run) -> None:
    Path("mine.py").write_text(WRONG, encoding="utf-8")
    code, out, _ = audit("softmax", "--candidate", "mine.py:softmax", *FLOAT32)
    assert code == 1
    assert left() == {"assay-failures"}
    told = next(text for text in out.splitlines() if text.startswith("FAIL softmax"))
    command = next(text for text in out.splitlines() if "replay: " in text).partition("replay: ")[2]
    _, _, *arguments = shlex.split(command)
    code, again, _ = audit(*arguments)
    assert code == 1
    assert told in again
    Path("mine.py").write_text(HONEST, encoding="utf-8")
    code, again, _ = audit(*arguments)
    assert code == 0, again


@pytest.mark.parametrize(
    ("name", "dtype", "check"), [("promoting", "float16", "dtype"), ("changing", "float32", "rerun")]
)
def test_what_depends_on_other_runs_replays_too(audit: Run, name: str, dtype: str, check: str) -> None:
    code, _, _ = audit("softmax", "--candidate", f"strangers.py:{name}", "--dtype", dtype, "--failures", "found")
    assert code == 1
    assert left() == {"found"}
    (stored,) = Path("found").glob(f"softmax-{check}-*.json")
    body = json.loads(stored.read_text())
    assert body["evidence"]["check"] == check
    code, again, _ = audit("--replay", stored, "--failures", "found")
    assert code == 1
    assert body["message"] in again
    code, again, _ = audit("--replay", json.dumps(body["case"]), "--failures", "found")
    assert code == 1
    assert f"FAIL softmax [{check}]" in again


def test_a_candidate_that_always_raises_fails(audit: Run) -> None:
    for name, told in (
        ("raising", "raised RuntimeError: no such ?[31m kernel"),
        ("exiting", "raised SystemExit: 0"),
        ("interrupting", "raised KeyboardInterrupt"),
    ):
        code, out, err = audit("softmax", "--candidate", f"strangers.py:{name}")
        assert code == 1, err
        assert told in out
        assert "Traceback" not in out + err


def test_an_interrupt_exits_130_and_leaves_nothing_half_written(audit: Run) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    code, _, err = audit("softmax", "--candidate", "strangers.py:interrupted", "--json", "r.json", "--html", "r.html")
    assert code == 130
    assert "interrupted" in one_line(err)
    assert left() == set()


def test_every_format_is_written(audit: Run) -> None:
    Path("mine.py").write_text(WRONG, encoding="utf-8")
    kinds = ("json", "junit", "sarif", "html")
    reports = [word for kind in kinds for word in (f"--{kind}", f"report.{kind}")]
    code, _, _ = audit("softmax", "--candidate", "mine.py:softmax", *FLOAT32, *reports)
    assert code == 1
    verdicts = json.loads(Path("report.json").read_text())["verdicts"]
    failed = sum(verdict["outcome"] == "fail" for verdict in verdicts)
    xml = JUnitXml.fromfile("report.junit")
    assert (xml.tests, xml.failures) == (len(verdicts), failed)
    (run,) = json.loads(Path("report.sarif").read_text())["runs"]
    assert len(run["results"]) == failed
    assert run["results"][0]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "mine.py"
    assert Path("report.html").read_text().count('<td class="fail">fail</td>') == failed + 1, "one more in the table"


def test_a_contract_that_cannot_judge_loses_nothing_of_the_others(audit: Run) -> None:
    arguments = ("--candidate", "mine.py:softmax", *FLOAT32, "--json", "r.json")
    for contracts in (("softmax", "matmul"), ("matmul", "softmax")):
        code, out, err = audit(*contracts, *arguments)
        assert code == 2, err
        assert "COULD-NOT-JUDGE matmul: mine.py:softmax takes 1 argument by position; the contract passes a, b" in out
        verdicts = json.loads(Path("r.json").read_text())["verdicts"]
        (other,) = [verdict for verdict in verdicts if verdict["audit"] == "matmul"]
        assert (other["outcome"], other["case"]["candidate"]) == ("could-not-judge", "mine.py:softmax")
        assert len(verdicts) > 100
        assert {verdict["outcome"] for verdict in verdicts if verdict["audit"] == "softmax"} == {"pass"}


def test_an_error_of_ours_says_so_and_has_its_traceback(audit: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise TypeError("not theirs")

    monkeypatch.setattr("audits.catalogue._check_claims", broken)
    code, _, err = audit("softmax", "--candidate", "mine.py:softmax", *FLOAT32)
    assert code == 2
    line = one_line(err)
    assert "an error in assay itself at audits/catalogue.py:" in line
    assert "TypeError: not theirs; please report it, with the traceback that ASSAY_DEBUG=1 shows" in line
    monkeypatch.setenv("ASSAY_DEBUG", "1")
    code, _, err = audit("softmax", "--candidate", "mine.py:softmax", *FLOAT32)
    assert code == 2
    assert "Traceback (most recent call last)" in err


def test_files_whose_names_are_not_utf_8_are_reported_too(audit: Run) -> None:
    name = os.fsdecode(b"m\xffne.py")
    try:
        Path(name).write_text(WRONG, encoding="utf-8")
    except OSError:
        pytest.skip("this file system takes UTF-8 names alone")
    reports = [word for kind in ("json", "junit", "sarif", "html") for word in (f"--{kind}", f"report.{kind}")]
    code, out, err = audit("softmax", "--candidate", f"{name}:softmax", *FLOAT32, *reports)
    assert code == 1, out + err
    assert all(Path(f"report.{kind}").stat().st_size for kind in ("json", "junit", "sarif", "html"))
    assert "m%FFne.py" in Path("report.sarif").read_text()
    (stored,) = Path("assay-failures").glob("*values*")
    assert audit("--replay", stored)[0] == 1


def test_a_report_that_cannot_be_written_keeps_none_of_the_others_from_it(audit: Run) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    code, _, err = audit(
        "softmax", "--candidate", "mine.py:softmax", *FLOAT32, "--json", "/dev/full", "--html", "r.html"
    )
    assert code == 2
    assert "not written: --json /dev/full: " in err
    assert "audit" in Path("r.html").read_text()


@pytest.mark.parametrize("kind", ["json", "junit", "sarif", "html"])
def test_a_report_on_standard_output_is_only_that(audit: Run, kind: str) -> None:
    code, out, err = audit("softmax", "--candidate", "mine.py:softmax", *FLOAT32, f"--{kind}", "-")
    assert code == 0
    assert out.lstrip()[0] == {"json": "{", "sarif": "{"}.get(kind, "<")
    if kind in ("json", "sarif"):
        json.loads(out)
    assert "a candidate may print" not in out
    assert ", 0 failed, 0 could not be judged" in err


def test_files_are_written_where_the_user_is_wherever_the_candidate_goes(audit: Run, tmp_path: Path) -> None:
    (tmp_path / "away").mkdir()
    Path("mine.py").write_text(WRONG + "\nimport os; os.chdir('away')\n", encoding="utf-8")
    assert audit("softmax", "--candidate", "mine.py:softmax", *FLOAT32, "--json", "r.json")[0] == 1
    assert left() == {"away", "r.json", "assay-failures"}
    assert not list((tmp_path / "away").iterdir())


def test_claims_and_framework_reach_the_verdicts(audit: Run) -> None:
    arguments = ("--framework", "numpy", "--claims", "accumulate=f16,intermediate=input", "--dtype", "float16")
    code, out, _ = audit("softmax", "--candidate", "mine.py:softmax", *arguments, "--json", "-")
    assert code == 2, "a sum of 32769 terms in float16 says nothing"
    body = json.loads(out)
    assert {verdict["outcome"] for verdict in body["verdicts"]} == {"pass", "could-not-judge"}
    assert body["verdicts"][0]["case"]["claims"] == {"accumulate": "float16", "intermediate": "input"}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["softmaxx"], "no contract 'softmaxx'; there is "),
        (["softmax", "--candidate", "none.py:f"], "there is no file none.py"),
        (["softmax", "--candidate", "none.py:x"], "--candidate none.py:x: there is no file none.py"),
        (["softmax", "--candidate", "mine.py"], "FILE.py:NAME is expected"),
        (["softmax", "--candidate", "mine.py:f"], "defines no 'f'"),
        (["softmax", "--candidate", "strangers.py:number"], "is of type int, which can't be called"),
        (
            ["softmax", "--candidate", "mine.py:softmax", "--device", "cuda"],
            "device 'cuda' is for candidates in mlx or",
        ),
        (["--replay", '{"contract": "softmax", "candidate": "mine.py:softmax"}', "--device", "cpu"], "leave it out"),
        (["moe_matmul", "--candidate", "none.toml", "--device", "cpu"], "run on the host CPU; device can be"),
        (["softmax", "--candidate", "strangers.py:pairs", "--framework", "jax"], "no framework 'jax'"),
        (["rope", "--candidate", "strangers.py:raising"], "takes no argument 'dims'"),
        (["--candidate", "mine.py:softmax"], "name the contract"),
        (["softmax", "--candidate", "mine.py:softmax", "--dtype", "float8"], "no dtype 'float8'"),
        (["softmax", "--candidate", "mine.py:softmax", "--claims", "accumulate"], "NAME=DTYPE,… is expected"),
        (["softmax", "--candidate", "mine.py:softmax", "--claims", "sum=f32"], "no claim 'sum'"),
        (["softmax", "--candidate", "mine.py:softmax", "--claims", "accumulate=f8"], "is no dtype"),
        (["softmax", "--framework", "torch"], "the engine's own softmax is in mlx"),
        (["softmax", "--candidate", "mine.py:softmax", "--html", "nowhere/r.html"], "--html nowhere/r.html: nowhere"),
        (["softmax", "--candidate", "mine.py:softmax", "--junit", "."], "--junit .: it can't be written to"),
        (["softmax", "--candidate", "mine.py:softmax", "--failures", "mine.py"], "mine.py is no folder"),
        (["softmax", "--candidate", "mine.py:softmax", "--failures", "mine.py/x"], "mine.py is no folder"),
        (["softmax", "--candidate", "mine.py:softmax", "--json", "-", "--html", "-"], "--json and --html can't share"),
        (
            ["softmax", "--replay", "{}", "--seed", "0"],
            "--replay: the case says what is run; leave out CONTRACT, --seed",
        ),
        (["softmax", "--candidate", "mine.py:softmax", "--framework", ""], "no framework ''"),
        (["softmax", "--device", ""], "device '' is unknown"),
        (["softmax", "--candidate", "mine.py:softmax", "--claims", ","], "NAME=DTYPE,… is expected"),
        (
            ["softmax", "--candidate", "mine.py:softmax", "--json", "r", "--html", "./r"],
            "--json and --html can't share",
        ),
        (["--replay", '{"contract": "moe_matmul", "kernel": "k", "K": 3}'], "it lacks tokens, M, load, seed"),
        (["--replay", KERNEL_CASE % (0, 256, "one")], "its tokens is 0; a whole number from 1 on is expected"),
        (
            ["--replay", KERNEL_CASE % (1, 100, "one")],
            "its K is 100; a whole number from 32 on, in whole blocks of 32,",
        ),
        (["--replay", KERNEL_CASE % (1, 256, "x")], "its load is 'x'; there is one, even, skewed, empty"),
        (["--replay", "{}", "--framework", "mlx", "--full"], "leave out --framework, --full"),
        (["softmax", "--mutants", "--json", "r.json"], "prints a table; leave out CONTRACT, --json"),
        (["--replay", "none.json"], "--replay takes a JSON file, or the JSON itself"),
        (["--replay", "mine.py"], "--replay takes a JSON file, or the JSON itself"),
        (["--replay", "{"], "--replay takes a JSON file, or the JSON itself"),
        (["--replay", "{}"], 'a case to replay has a "contract"'),
        (["--replay", '{"contract": "softmaxx"}'], "this one has 'softmaxx'"),
        (["--replay", '{"contract": "softmax", "candidate": "mine.py:softmax", "S": "3"}'], "S can't be '3'"),
        (["--replay", '{"contract": "softmax", "candidate": "mine.py:softmax", "seed": NaN}'], "seed can't be nan"),
        (["--replay", '{"contract": "softmax", "candidate": "none.py:f"}'], "there is no file none.py"),
        (["--replay", '{"contract": "softmax", "candidate": "__main__:f"}'], "pass it again as candidate"),
        (["--replay", '{"contract": "softmax", "candidate": "mine.py:softmax", "framework": 3}'], "no framework 3"),
        (["--replay", '{"contract": "matmul", "candidate": "mine.py:softmax"}'], "takes 1 argument by position"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2_before_anything_runs(
    audit: Run, arguments: list[str], told: str
) -> None:
    code, out, err = audit(*arguments)
    assert code == 2, out + err
    lines = [text for text in err.splitlines() if text != "loading weights"]
    assert told in one_line("\n".join(lines))
    assert "a candidate may print" not in err
    assert left() == set()
