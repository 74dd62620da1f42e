"""The command line: exit codes, one-line errors, and that what is printed can be used."""

import json
import shlex
import sys
from pathlib import Path

import pytest

from assay import app, cli
from goldens import store
from tests.engine.tiny import CONFIG, make_checkpoint

TOKENS = "1,5,7,2,9,30,12,4"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("cli") / "model")


@pytest.fixture
def assay(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """Run `assay ARGUMENTS`; returns (exit code, standard output, standard error)."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["assay", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capfd.readouterr()
        return int(stop.value.code or 0), out, err

    return run


def test_help_lists_every_command(assay) -> None:
    code, out, _ = assay("--help")
    assert code == 0
    commands = {c.name for c in app.app.registered_commands} | {g.name for g in app.app.registered_groups}
    assert commands == set(cli.COMMANDS)
    assert all(name in out for name in cli.COMMANDS)


def test_no_command_is_bad_usage(assay) -> None:
    assert assay()[0] == 2
    assert assay("nonsense")[0] == 2


def test_run_passes_and_writes_json(assay, model: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    code, out, err = assay(
        "run", "--model", model, "--tokens", TOKENS, "--dtype", "float32", "--dtype", "bfloat16", "--json", report
    )
    assert code == 0, out + err
    assert out.count("PASS run") == 2
    body = json.loads(report.read_text())
    assert body["ok"] is True
    assert len(body["verdicts"]) == 2
    assert {probe["probe"] for probe in body["runs"][0]["probes"]} >= {"weights", "embedding", "logits", "token"}


def test_json_on_standard_output_is_only_json(assay, model: Path) -> None:
    code, out, err = assay("run", "--model", model, "--tokens", TOKENS, "--json", "-")
    assert code == 0
    assert json.loads(out)["ok"] is True
    assert "PASS run" in err


def test_a_failure_exits_1_names_the_place_and_prints_its_replay(assay, model: Path, monkeypatch) -> None:
    import engine.cache

    monkeypatch.setattr(engine.cache.KVCache, "mask", lambda self, L: None)
    code, out, _ = assay("run", "--model", model, "--tokens", TOKENS)
    assert code == 1
    assert "FAIL run" in out
    assert "layers.1.attn.context" in out
    replay = next(line for line in out.splitlines() if "replay:" in line).split("replay:")[1]
    code, again, _ = assay(*shlex.split(replay)[1:])
    assert code == 1
    assert "layers.1.attn.context" in again


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["run", "--model", "nowhere"], "config.json"),
        (["run", "--tokens", "1,x"], "separated by commas"),
        (["run", "--tokens", "1", "--prompt", "^"], "either"),
        (["run", "--dtype", "float8", "--tokens", "1"], "float8"),
        (["run", "--device", "tpu", "--tokens", "1"], "tpu"),
        (["run", "--golden", "nowhere.h5"], "nowhere.h5"),
        (["golden", "verify", "nowhere.h5"], "nowhere.h5"),
        (["golden", "accept", "nowhere.h5"], "nowhere.h5"),
        (["golden", "regenerate", "nowhere.h5"], "--tokens"),
        (["bisect", "nowhere.h5"], "nowhere.h5"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(assay, model: Path, arguments: list[str], told: str) -> None:
    if "--model" not in arguments and "--tokens" in arguments and "--prompt" not in arguments:
        arguments = [*arguments, "--model", str(model)]
    code, _, err = assay(*arguments)
    lines = [line for line in err.splitlines() if line.strip()]
    assert code == 2
    assert len(lines) == 1, err
    assert lines[0].startswith("assay: ")
    assert told in lines[0]


def test_tokens_outside_the_vocabulary(assay, model: Path) -> None:
    code, _, err = assay("run", "--model", model, "--tokens", str(CONFIG["vocab_size"]))
    assert code == 2
    assert "vocabulary" in err


def test_the_golden_workflow(assay, model: Path, tmp_path: Path) -> None:
    golden = tmp_path / "g.h5"
    code, out, err = assay("golden", "regenerate", golden, "--model", model, "--tokens", TOKENS, "--dtype", "float16")
    assert code == 0, err
    assert "pending" in out
    assert not golden.exists()
    assert assay("golden", "accept", golden)[0] == 0
    first = store.open(golden).content_hash
    assert assay("golden", "verify", golden)[0] == 0
    assert assay("run", "--golden", golden)[0] == 0
    code, out, _ = assay("golden", "show", golden, "--probes")
    assert code == 0
    assert "layers.0.attn.q: float16 T=8 Hq=4 Dh=8" in out

    assert assay("golden", "regenerate", golden)[0] == 0
    code, out, _ = assay("golden", "diff", golden)
    assert code == 0, out
    assert assay("golden", "accept", golden)[0] == 0
    assert store.open(golden).content_hash == first, "regenerating is deterministic"
    code, out, _ = assay("bisect", golden)
    assert (code, "every op is within its bound" in out) == (0, True)


def test_a_golden_of_another_model_is_refused_with_what_changed(assay, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model")
    golden = tmp_path / "g.h5"
    assay("golden", "regenerate", golden, "--model", model, "--tokens", TOKENS, "--dtype", "float32")
    assay("golden", "accept", golden)

    def one_percent(tensors) -> None:
        tensors["model.layers.1.self_attn.q_proj.weight"][3, 5] *= 1.01

    changed = make_checkpoint(tmp_path / "changed", edit=one_percent)
    code, _, err = assay("run", "--golden", golden, "--model", changed)
    assert code == 2
    assert "model.layers.1.self_attn.q_proj.weight" in err

    wider = make_checkpoint(tmp_path / "wider", sliding_window=6)
    code, _, err = assay("run", "--golden", golden, "--model", wider)
    assert code == 2
    assert "sliding_window was 5, is 6" in err


def test_a_changed_stored_value_is_named_even_with_fresh_hashes(assay, model: Path, tmp_path: Path) -> None:
    golden = tmp_path / "g.h5"
    assay("golden", "regenerate", golden, "--model", model, "--tokens", TOKENS, "--dtype", "float32")
    assay("golden", "accept", golden)
    trace = store.open(golden).trace
    trace.probes["layers.1.attn.v"][3, 0, 1] *= 1.01
    store.write(golden, [trace])
    code, out, _ = assay("golden", "verify", golden)
    assert code == 1
    assert "expected trace: layers.1.attn.v[3,0,1]" in out


def test_doctor_and_list(assay) -> None:
    code, out, _ = assay("doctor")
    assert code == 0
    for lane in ("metal", "cuda", "cpu"):
        assert f"mlx on {lane}" in out
    code, out, _ = assay("list")
    assert code == 0
    assert "golden verify" in out
    assert "attention" in out
