"""The README's commands and its Python run as they are written."""

import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from assay import cli
from audits import cases, golden_jobs, moe_matmul

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for kind, block in BLOCKS if not kind for line in block.splitlines() if line.startswith("assay ")]


@pytest.fixture(scope="module")
def copied_goldens(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the goldens to accept into, and one short prompt instead of six: the commands, not their breadth."""
    folder = tmp_path_factory.mktemp("readme") / "traces"
    folder.mkdir()
    shutil.copy(cases.TRACES_FOLDER / "float16.h5", folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(golden_jobs, "TRACES_FOLDER", folder)
        patch.setattr(golden_jobs, "GOLDENS", {"float16": golden_jobs.GOLDENS["float16"]})
        patch.setattr(cases, "DEFAULT_TASKS", ("close",))
        sweep = moe_matmul.cases
        patch.setattr(moe_matmul, "cases", lambda specs, **options: list(sweep(specs[6:7], **options))[:4])
        patch.chdir(ROOT)
        yield folder


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.xdist_group("readme")
def test_a_command_works(
    command: str, copied_goldens: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    if command in ("assay golden diff", "assay golden accept"):
        golden_jobs.regenerate(copied_goldens / "float16.h5", golden_jobs.golden_cases(copied_goldens / "float16.h5"))
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code, capfd.readouterr().err


def test_every_command_of_the_tool_is_in_the_readme() -> None:
    named = {command.split()[1] for command in COMMANDS}
    assert named == set(cli.COMMANDS)


def test_the_python_works(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    (program,) = (block for kind, block in BLOCKS if kind == "python")
    monkeypatch.chdir(ROOT)
    exec(compile(program, "README.md", "exec"), {})
    assert capfd.readouterr().out.startswith("True ")


def test_the_files_that_it_names_are_there() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
