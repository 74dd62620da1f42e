"""What the commands show: tables, lines, progress, and errors as one line with exit code 2."""

from __future__ import annotations

import math
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from json import dumps, loads
from pathlib import Path
from traceback import print_exception
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from assay import guard

if TYPE_CHECKING:
    from audits.report import Noticed
    from audits.side_by_side import Judged
    from audits.verdict import Report, Verdict

# Not a terminal (a CI log): wide enough for every column of the table.
LOG_WIDTH = 140
LOG_SECONDS = 60.0  # a log gets a line a contract, or a job, and one so often, for whoever ends what says nothing
PART = re.compile(r"(\d+)/(\d+) ")
DEBUG = "ASSAY_DEBUG"  # set in the environment: errors show their traceback
INTERRUPTED, CLOSED_PIPE = 130, 141  # 128 + SIGINT, 128 + SIGPIPE: what a shell reports


class _Screen(Console):
    """A rich Console that leaves a closed pipe to `start`: rich's own would exit with 1, which says that something
    failed.
    """

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def _console(stream: Any, *, stderr: bool) -> Console:
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="replace")  # a terminal without Unicode shows "?" rather than a traceback
    terminal = stream is not None and stream.isatty()
    return _Screen(emoji=False, soft_wrap=True, highlight=False, width=None if terminal else LOG_WIDTH, stderr=stderr)


console = _console(sys.stdout, stderr=False)
errors = _console(sys.stderr, stderr=True)


def line(where: Console, text: str) -> None:
    """One line of plain text: names of files and cases are never read as markup."""
    where.print(text, markup=False)


def start(app: typer.Typer) -> NoReturn:
    """Run the command line and exit: errors at the edge become one line and exit code 2."""
    code = _run(app)
    guard.done(code)
    sys.exit(code)


def _run(app: typer.Typer) -> int:
    """The exit code of the command line."""
    try:
        code = app(prog_name="assay", standalone_mode=False)
        if code == INTERRUPTED:  # typer may have made an exit of it
            raise KeyboardInterrupt
        sys.stdout.flush() if sys.stdout else None
        return code if isinstance(code, int) else 0
    except BrokenPipeError:
        # The reader (head, less) has enough; the rest of standard output goes nowhere.
        with suppress(OSError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE
    except (typer.Abort, KeyboardInterrupt):
        line(errors, "assay: interrupted; nothing that was accepted has changed")
        return INTERRUPTED
    except Exception as error:
        if complaint := _complaint(error):
            line(errors, f"assay: {complaint}")
        if os.environ.get(DEBUG):
            print_exception(error)
        return 2


def _complaint(error: Exception) -> str:
    """What stopped a command, in one line with the way out."""
    if hasattr(error, "format_message"):
        said = str(error.format_message())  # typer's own complaint about the usage; none where it shows the help
        return f"{said} (see --help)" if said else ""
    if isinstance(error, ValueError | OSError):
        return " ".join(str(error).split())
    if isinstance(error, MemoryError):
        return f"out of memory: {error}".rstrip(": ")
    from audits.errors import REPORT, told

    return f"{told(error)}; {REPORT}, with the traceback that {DEBUG}=1 shows"


@dataclass(frozen=True, kw_only=True)
class Job:
    """A group of cases shown as one table; `steps` judges them, calling its argument before each."""

    title: str
    steps: Callable[[Callable[[str], None]], Iterable[Judged]]
    total: int | None = None


def judge(jobs: Sequence[Job], json: Path | None, *, every: bool) -> NoReturn:
    """Run the jobs, show each as it is done, write the JSON, and exit with the report's code.

    What can't be judged (a golden that is refused, a checkpoint that can't be read) is one verdict; the rest goes on.
    """
    from audits.report import report_json
    from audits.verdict import Report, Verdict

    if json is not None:
        _check_writable("json", json)
    # With the JSON on standard output, people read the tables on standard error.
    screen = errors if str(json) == "-" else console
    judged: list[Judged] = []
    verdicts: list[Verdict] = []
    for job in jobs:
        done: list[Judged] = []
        try:
            with progress(job.title, job.total) as advance:
                done.extend(job.steps(advance))
        except (ValueError, OSError) as error:
            if isinstance(error, BrokenPipeError):
                raise
            message = " ".join(str(error).split())
            line(errors, f"assay: {message}")
            case = {"name": job.title}
            verdicts.append(Verdict(outcome="could-not-judge", audit="run", case=case, message=message))
        if done:
            _show(screen, job.title, done, every=every)
        judged += done
        verdicts += [one.verdict for one in done]
    report = Report(verdicts=verdicts)
    if json is not None:
        write_json(json, report_json(report, judged))
    raise typer.Exit(report.exit_code)


def show_audit(
    work: Callable[[Callable[[str], None]], Report], files: Mapping[str, Path | None], failures: Path
) -> NoReturn:
    """Run an audit, show a row a contract and a line a failure with its replay, and exit with the report's code."""
    from audits.exports import write_reports
    from audits.report import audit_table, verdict_line

    wanted = {kind: path for kind, path in files.items() if path is not None}
    for kind, path in wanted.items():
        _check_writable(kind, path)
    _check_folder(failures)
    on_output = [f"--{kind}" for kind, path in wanted.items() if str(path) == "-"]
    if len(on_output) > 1:
        raise ValueError(f"{' and '.join(on_output)} can't share standard output")
    places: dict[Path, str] = {}
    for kind, path in wanted.items():
        if (other := places.setdefault(path.absolute(), kind)) != kind and str(path) != "-":
            raise ValueError(f"--{other} and --{kind} can't share {path}")
    screen = errors if on_output else console
    # What a candidate prints is no part of a report.
    with progress("audit", None) as advance, redirect_stdout(sys.stderr):

        def tell(name: str) -> None:
            guard.note(name)
            advance(name)

        here = Path.cwd()
        report = work(tell)
        os.chdir(here)  # wherever a candidate has gone
    # Before anything is shown: the reader of what is may close it early.
    write_reports(report, wanted, write_json)
    screen.print(audit_table(report.verdicts))
    for verdict in report.verdicts:
        if verdict.outcome == "skipped":
            screen.print(verdict_line(verdict))
    wrong = [verdict for verdict in report.verdicts if verdict.outcome in ("fail", "could-not-judge")]
    kinds: dict[tuple[str, str], list[Verdict]] = {}
    for verdict in wrong:
        kinds.setdefault((verdict.audit, str(verdict.evidence.get("check", verdict.outcome))), []).append(verdict)
    for alike in kinds.values():
        _show_failure(screen, alike, failures)
    failed = sum(verdict.outcome == "fail" for verdict in wrong)
    count = len(report.verdicts)
    line(screen, f"{count} verdict{'s' * (count != 1)}, {failed} failed, {len(wrong) - failed} could not be judged")
    raise typer.Exit(report.exit_code)


def _show_failure(screen: Console, alike: Sequence[Verdict], failures: Path) -> None:
    """What failed the same check: the smallest case of it with its replay, and how many more there are."""
    from audits.report import case_line, verdict_line

    first = next((verdict for verdict in alike if verdict.evidence.get("shrunk")), alike[0])
    screen.print(verdict_line(first))
    case = case_line(first)
    if case:
        line(screen, f"  case: {case}")
        line(screen, f"  replay: assay audit --replay {shlex.quote(str(write_failure(failures, first)))}")
    elif "traceback" in first.evidence:
        line(screen, f"  traceback: {write_failure(failures, first)}")
    if len(alike) > 1:
        more = "1 more case is" if len(alike) == 2 else f"{len(alike) - 1} more cases are"
        line(screen, f"  {more} like it (--json has all)")


def write_failure(folder: Path, verdict: Verdict) -> Path:
    """One JSON file that `--replay` takes: the case, and what was found."""
    from hashlib import sha256

    case = dumps(dict(verdict.case), sort_keys=True)
    check = str(verdict.evidence.get("check", verdict.outcome)).replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{verdict.audit}-{check}-{sha256(case.encode()).hexdigest()[:8]}.json"
    body = {"case": dict(verdict.case), "message": verdict.message, "evidence": dict(verdict.evidence)}
    write_json(path, dumps(body, indent=1, default=str))
    return path


def _check_writable(kind: str, path: Path) -> None:
    if str(path) == "-":
        return
    if not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise ValueError(f"--{kind} {path}: {path.parent} is no folder that can be written to")
    if path.is_dir() or (path.exists() and not os.access(path, os.W_OK)):
        raise ValueError(f"--{kind} {path}: it can't be written to")


def _check_folder(failures: Path) -> None:
    """ValueError unless the folder for failures is there, or can be made, and can be written to."""
    there = next((path for path in (failures, *failures.absolute().parents) if path.exists()), failures)
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise ValueError(f"--failures {failures}: {there} is no folder that can be written to; name another")


def show_mutants(work: Callable[[Callable[[str], None]], Iterable[Noticed]]) -> NoReturn:
    """Plant every bug and show which check caught it; exit code 1 if one was missed."""
    from audits.report import mutant_table

    with progress("mutants", None) as advance:
        catches = list(work(advance))
    console.print(mutant_table(catches))
    raise typer.Exit(0 if catches and all(one.ok for one in catches) else 1)


def read_case(text: str) -> Any:
    """A case from JSON, or from the file that holds it."""
    path = Path(text)
    try:
        return loads(text if text.lstrip().startswith("{") else path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"--replay takes a JSON file, or the JSON itself ({error})") from error


def write_json(path: Path, text: str) -> None:
    """To the file, or to standard output for "-"."""
    if str(path) == "-":
        print(text)
    else:
        path.write_text(text + "\n", encoding="utf-8", errors="replace")  # names of files needn't be UTF-8


def _show(screen: Console, title: str, judged: Sequence[Judged], *, every: bool) -> None:
    from audits.report import probe_table, summary_lines, verdict_line

    told = judged[0].actual.provenance
    where = f"{told.get('engine')} {told.get('version', '')} on {told.get('device', 'an unnamed device')}"
    screen.print(probe_table(judged, f"{title} ({where})", every=every, width=screen.width))
    for text in summary_lines(judged):
        line(screen, text)
    for verdict in (one.verdict for one in judged):
        screen.print(verdict_line(verdict))
        if verdict.outcome != "pass":
            line(screen, f"  replay: {verdict.evidence['replay']}")


@contextmanager
def progress(title: str, total: int | None) -> Iterator[Callable[[str], None]]:
    """A progress bar on a terminal, a few lines in a log, on standard error; the yielded function names a step.

    A step whose name starts with "3/22 " is one of many in the third of 22 parts, which the bar then counts.
    """
    if not errors.is_terminal:
        shown, group = -math.inf, ""

        def tell(name: str) -> None:
            nonlocal shown, group
            part = PART.match(name)
            now, before = time.monotonic(), group
            group = part[0] if part else group
            if group != before or now - shown >= LOG_SECONDS:
                shown = now
                line(errors, f"… {title}: {name}")

        yield tell
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True) as bar:
        task = bar.add_task(title, total=total, completed=-1 if total else 0)

        def advance(name: str) -> None:
            part = PART.match(name)
            if part:
                place, of = int(part[1]) - 1, int(part[2])
                bar.update(task, completed=place, total=of, description=f"{title}: {name[part.end() :]}")
            else:
                bar.update(task, advance=1, description=f"{title}: {name}")

        yield advance
