"""The command line: exit codes, one-line errors, and that what is printed can be used."""

import io
import json
import shlex
import subprocess
import sys
from dataclasses import replace
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
    for group in ("kernel", "golden"):
        code, out, err = assay(group)
        assert (code, err) == (2, ""), "the help says it all"
        assert f"Usage: assay {group}" in out
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
    import engine.caches

    monkeypatch.setattr(engine.caches.KVCache, "make_mask", lambda self, N: None)
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
        (["golden", "regenerate", "--tokens", "1,2"], "NAME.h5"),
        (["golden", "regenerate", "a.txt", "--tokens", "1,2", "--dtype", "float32"], "NAME.h5"),
        (["golden", "regenerate", ".", "--tokens", "1,2", "--dtype", "float32"], "NAME.h5"),
        (["golden", "regenerate", "--dtype", "float32"], "--tokens"),
        (["golden", "regenerate", "/dev/null/x/g.h5", "--tokens", "1,2"], "its folder can't be made (Not a directory)"),
        (["run", "--golden", "g.h5", "--seed", "3"], "leave out --seed"),
        (["run", "--golden", "g.h5", "--dtype", "float16"], "leave out --dtype"),
        (["run", "--golden", "g.h5", "--experts", "q4_k", "--kernels", "host"], "leave out --experts, --kernels"),
        (["run", "--experts", "q5_k", "--tokens", "1"], "one of (none), q8_0, q4_k, q2_k, iq2_xxs"),
        (["run", "--kernels", "cuda", "--tokens", "1"], "one of mlx, host"),
        (["run", "--kernels", "host", "--tokens", "1"], "not in blocks"),
        (["run", "--kernels", "host", "--device", "metal", "--tokens", "1"], "run on the CPU"),
        (["run", "--kernels", "metal", "--device", "cpu", "--tokens", "1"], "run on an Apple GPU"),
        (["run", "--kernels", "host", "--dtype", "bfloat16", "--tokens", "1"], "float32 and float16"),
        (["golden", "regenerate", "--kernels", "host"], "--tokens"),
        (["run", "--tokens", ""], "--tokens"),
        (["run", "--tokens", "1,2", "--decode", "3"], "decode is 3"),
        (["run", "--tokens", "1", "--json", "nowhere/x.json"], "--json"),
        (["run", "--model", "a[/]b"], "a[/]b"),
        (["run", "--nonsense"], "--nonsense"),
        (["golden", "verify", ""], "file"),
        (["bisect", "nowhere.h5"], "nowhere.h5"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(assay, model: Path, arguments: list[str], told: str) -> None:
    if arguments[0] == "run" and "--tokens" in arguments and "--prompt" not in arguments:
        arguments = [*arguments, "--model", str(model)]
    code, _, err = assay(*arguments)
    lines = [line for line in err.splitlines() if not line.startswith("…")]
    assert code == 2
    assert len(lines) == 1, err
    assert lines[0].startswith("assay: ")
    assert told in lines[0]


def test_which_kernels_ran_is_printed_stored_and_repeated(assay, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("audits.quantized.cache_folder", lambda: tmp_path / "cache")
    sizes = {"hidden_size": 256, "moe_intermediate_size": 256}
    model, golden, report = make_checkpoint(tmp_path / "model", **sizes), tmp_path / "g.h5", tmp_path / "r.json"
    ours = ["--tokens", TOKENS, "--model", model, "--experts", "q8_0", "--kernels", "host"]
    code, out, err = assay("run", *ours, "--json", report)
    assert code == 0, out + err
    assert "quantising experts to q8_0" in err
    told = (
        "kernels of layers 0, 1: attn_norm, mlp_norm kernel_rms_norm_f32; q, k kernel_rope_f32;"
        " context kernel_attention_f32; experts kernel_router; gate, up, down kernel_mul_mm_id_map"
        " + kernel_mul_mm_id_q8_0_f32_n32 + kernel_mul_mv_id_q8_0_f32; act kernel_swiglu_f32"
    )
    assert told in out
    (run,) = json.loads(report.read_text())["runs"]
    assert run["engine"]["kernels"]["layers.1.moe.experts"] == ["kernel_router"]
    assert run["case"]["options"]["experts"] == "q8_0"

    assert assay("golden", "regenerate", golden, *ours)[0] == 0
    assert assay("golden", "accept", golden)[0] == 0
    code, out, err = assay("golden", "verify", golden)
    assert code == 0, out + err
    assert told in out
    assert "quantising" not in err


def test_short_prompts_need_no_options(assay, model: Path) -> None:
    for tokens in ("1", "1,2", "1,2,3"):
        code, out, _ = assay("run", "--model", model, "--tokens", tokens)
        assert code == 0, out


def test_one_bad_golden_does_not_lose_the_others(assay, model: Path, tmp_path: Path) -> None:
    good, bad, report = tmp_path / "good.h5", tmp_path / "bad.h5", tmp_path / "r.json"
    assay("golden", "regenerate", good, "--model", model, "--tokens", TOKENS)
    assay("golden", "accept", good)
    bad.write_bytes(good.read_bytes()[:-100])
    code, out, err = assay("golden", "verify", bad, good, "--json", report)
    assert code == 2
    assert "bad.h5" in err
    assert "PASS golden verify" in out
    outcomes = [verdict["outcome"] for verdict in json.loads(report.read_text())["verdicts"]]
    assert outcomes == ["could-not-judge", "pass"]


def test_a_closed_pipe_is_no_failed_audit(model: Path) -> None:
    command = f"{sys.executable} -m assay run --model {model} --tokens {TOKENS} | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode in (0, 141), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("redirect", [">&-", ">/dev/full"])
def test_no_standard_output_is_no_traceback(redirect: str) -> None:
    if redirect == ">/dev/full" and not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m assay --help {redirect}"], capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("width", [30, 60, 90, 200])
def test_probe_and_outcome_fit_into_every_terminal(width: int, model: Path) -> None:
    from rich.console import Console

    from audits.cases import cases_for
    from audits.report import probe_table
    from audits.side_by_side import audit_model

    judged = list(audit_model(cases_for(str(model), tokens=TOKENS, device="cpu")))
    screen = Console(width=width, record=True, file=io.StringIO())
    screen.print(probe_table(judged, "title", width=width))
    row = next(text for text in screen.export_text().splitlines() if "moe.router" in text)
    assert row.rstrip().endswith("pass")


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
    code, out, _ = assay("golden", "diff", golden)
    assert code == 0, "a new golden is judged against the reference"
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


def test_a_pending_golden_that_fails_is_accepted_by_force_only(assay, model: Path, tmp_path: Path, monkeypatch) -> None:
    import engine.caches

    golden = tmp_path / "g.h5"
    with monkeypatch.context() as patch:
        patch.setattr(engine.caches.KVCache, "make_mask", lambda self, N: None)
        assay("golden", "regenerate", golden, "--model", model, "--tokens", TOKENS)
    code, out, _ = assay("golden", "accept", golden)
    assert code == 1
    assert "NOT accepted" in out
    assert "layers.1.attn.context" in out
    assert not golden.exists()
    assert assay("golden", "accept", golden, "--force")[0] == 0
    code, out, _ = assay("golden", "verify", golden)
    assert code == 1
    replay = next(text for text in out.splitlines() if "replay:" in text).split("replay:")[1]
    assert assay(*shlex.split(replay)[1:])[0] == 1, "the replay fails as the run did"


def test_a_golden_with_weaker_claims_is_refused(assay, model: Path, tmp_path: Path) -> None:
    golden = tmp_path / "g.h5"
    assay("golden", "regenerate", golden, "--model", model, "--tokens", TOKENS)
    assay("golden", "accept", golden)
    trace = store.open(golden).trace
    weaker = {**trace.provenance["arithmetic"], "logits": {"accumulate": "bfloat16"}}
    store.write(golden, [replace(trace, provenance={**trace.provenance, "arithmetic": weaker})])
    code, _, err = assay("golden", "verify", golden)
    assert code == 2
    assert "another arithmetic" in err


@pytest.mark.parametrize("key", ["arithmetic", "weights", "dtype", "case"])
def test_nonsense_in_a_goldens_provenance_is_one_line(assay, model: Path, tmp_path: Path, key: str) -> None:
    golden = tmp_path / "g.h5"
    assay("golden", "regenerate", golden, "--model", model, "--tokens", TOKENS)
    assay("golden", "accept", golden)
    trace = store.open(golden).trace
    store.write(golden, [replace(trace, case="[red]", provenance={**trace.provenance, key: "foo"})])
    code, _, err = assay("golden", "verify", golden)
    assert code == 2
    assert "Traceback" not in err
    assert [text for text in err.splitlines() if text.startswith("assay: ")]


def test_a_golden_of_a_changed_model_can_be_renewed(assay, tmp_path: Path) -> None:
    golden, model = tmp_path / "g.h5", make_checkpoint(tmp_path / "model")
    assay("golden", "regenerate", golden, "--model", model, "--tokens", TOKENS)
    assay("golden", "accept", golden)
    make_checkpoint(model, seed=1)
    assert assay("golden", "verify", golden)[0] == 2
    assert assay("golden", "regenerate", golden)[0] == 0
    assert assay("golden", "diff", golden)[0] == 0, "against the reference, since the accepted one is another model's"
    assert assay("golden", "accept", golden)[0] == 0
    assert assay("golden", "verify", golden)[0] == 0


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


CONFIGURED = """constant int rows [[function_constant(3)]];
constant bool masked [[function_constant(4)]];
#ifndef GATE
#error GATE is not defined
#endif
kernel void scaled(device float * x [[buffer(2)]]) { x[0] = masked ? FACTOR : rows; }
"""


def test_kernel_check_takes_macros_and_function_constants(assay, tmp_path: Path) -> None:
    source = tmp_path / "configured.metal"
    source.write_text(CONFIGURED)
    macros = ["kernel", "check", source, "-D", "GATE", "-D", "FACTOR=(2 + 1)"]
    code, out, err = assay(*macros, "--constant", "3=8", "--constant", "masked=true")
    assert (code, out) == (0, "ok scaled: buffer(2) x\n"), err
    code, out, _ = assay(*macros, "--constant", "rows=0x10")
    assert code == 1
    assert "FAIL scaled" in out and "'masked'" in out
    code, _, err = assay("kernel", "check", source)
    assert code != 0
    assert "GATE is not defined" in err


@pytest.mark.parametrize("constant", ["rows", "rows=", "=3", "rows=many", "rows=[1]", "height=3"])
def test_kernel_check_refuses_constants_that_are_none(assay, tmp_path: Path, constant: str) -> None:
    source = tmp_path / "configured.metal"
    source.write_text(CONFIGURED)
    code, _, err = assay("kernel", "check", source, "-D", "GATE", "-D", "FACTOR=1", "--constant", constant)
    assert code == 2
    assert constant.partition("=")[0] in err and "constant" in err


def test_kernel_check_of_several_sources_loses_none_and_passes_nothing_unseen(assay, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.metal", tmp_path / "bad.metal"
    good.write_text("kernel void k(device float * x [[buffer(0)]]) { x[0] = 1; }\n")
    bad.write_text("float helper(float x) { return x; }\n")
    code, out, err = assay("kernel", "check", bad, tmp_path / "none.metal", good)
    assert (code, out) == (2, "ok k: buffer(0) x\n")
    assert "bad.metal has no kernel" in err and "there is no Metal source" in err
    for wrong, told in (("-I", tmp_path / "none"), "there is no folder"), (("-D", ""), "a macro without a name"):
        code, out, err = assay("kernel", "check", good, *wrong)
        assert (code, out) == (2, ""), err
        assert told in err
    code, out, err = assay("kernel", "check", good, "--only", "mul")
    assert (code, out) == (2, "")
    assert "good.metal has 'mul' in its name" in err
