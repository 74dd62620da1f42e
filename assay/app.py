"""The commands: options in, one call into `audits`, a table or JSON out, an exit code. No logic of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from assay.cli import COMMANDS, EXIT_CODES, SUMMARY

if TYPE_CHECKING:
    from audits.side_by_side import Judged

app = typer.Typer(help=SUMMARY, epilog=EXIT_CODES, add_completion=False, no_args_is_help=True)
golden_app = typer.Typer(help=COMMANDS["golden"], no_args_is_help=True)
app.add_typer(golden_app, name="golden")
# Not a terminal (a CI log): wide enough for every column of the table.
LOG_WIDTH = 140
console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else LOG_WIDTH)
errors = Console(soft_wrap=True, width=None if sys.stderr.isatty() else LOG_WIDTH, stderr=True)

Model = Annotated[str, typer.Option(help="A checkpoint folder in the Hugging Face layout, or 'shipped'.")]
Dtypes = Annotated[list[str], typer.Option("--dtype", help="float32, float16 or bfloat16; may be given several times.")]
DeviceOption = Annotated[str, typer.Option("--device", help="metal, cuda, cpu, or auto: the best there is.")]
Tokens = Annotated[str, typer.Option(help="Token ids, separated by commas.")]
Json = Annotated[
    Path | None, typer.Option("--json", help="Write the whole report as JSON to PATH ('-': standard output).")
]
Goldens = Annotated[list[Path] | None, typer.Argument(help="Golden files; none: the committed ones.")]


def start() -> None:
    """Run the command line; errors at the edge become one line and exit code 2."""
    try:
        app(standalone_mode=True)
    except (ValueError, OSError) as error:
        errors.print(f"assay: {error}", markup=False, highlight=False)
        sys.exit(2)
    except KeyboardInterrupt:
        errors.print("assay: interrupted")
        sys.exit(2)


@app.command("run", help=COMMANDS["run"], epilog=EXIT_CODES)
def run_command(
    model: Model = "shipped",
    dtype: Dtypes = ["float32"],  # noqa: B006  # typer's way to give a list option its default
    device: DeviceOption = "auto",
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text for the shipped model; several times if wanted.")
    ] = None,
    tokens: Tokens = "",
    golden: Annotated[
        Path | None, typer.Option(help="Judge against this golden; it says model, dtype, tokens.")
    ] = None,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens prefilled at a time.")] = 32,
    decode: Annotated[int, typer.Option(min=0, help="Last tokens fed one by one.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Draws the built-in prompts.")] = 0,
    probes: Annotated[bool, typer.Option("--probes", help="Show every probe, not the worst of each kind.")] = False,
    json: Json = None,
) -> None:
    from audits.cases import cases_for
    from audits.golden_jobs import verify
    from audits.side_by_side import audit_model

    if golden is not None:
        if prompt or tokens:
            raise ValueError("--golden says which tokens to run; leave out --prompt and --tokens")
        elsewhere = "" if model == "shipped" else model
        steps = [Job(title=str(golden), steps=lambda advance: verify(golden, device, advance, model=elsewhere))]
        judge(steps, json, every=probes)
    jobs = []
    for name in dict.fromkeys(dtype):
        cases = cases_for(
            model, prompts=prompt or (), tokens=tokens, seed=seed, dtype=name, device=device, chunk=chunk, decode=decode
        )
        jobs.append(
            Job(
                title=f"{model} in {name} beside the reference",
                steps=lambda advance, cases=cases: audit_model(cases, advance),  # type: ignore[misc]  # mypy can't infer a default
                total=len(cases),
            )
        )
    judge(jobs, json, every=probes)


@golden_app.command(
    "regenerate", help="Run the engine anew and stage the result as a pending golden, beside the accepted one."
)
def golden_regenerate(
    goldens: Goldens = None,
    model: Model = "shipped",
    dtype: Annotated[str, typer.Option(help="For a new golden: float32, float16 or bfloat16.")] = "",
    device: Annotated[str, typer.Option(help="metal, cuda, cpu or auto; else the one the golden was made on.")] = "",
    tokens: Annotated[str, typer.Option(help="For a new golden: token ids, separated by commas.")] = "",
) -> None:
    from audits.cases import cases_for
    from audits.golden_jobs import default_golden_paths, golden_cases, regenerate

    for path in goldens or default_golden_paths():
        if tokens:
            cases = cases_for(model, tokens=tokens, dtype=dtype or "float32", device=device or "auto")
        else:
            cases = golden_cases(path, device)
        with progress(f"regenerate {path.name}", len(cases)) as advance:
            pending = regenerate(path, cases, advance)
        console.print(f"pending: {pending}", highlight=False)
    console.print("Look at `assay golden diff`, then `assay golden accept`.", highlight=False)


@golden_app.command(
    "diff", help="What a pending golden would change: what moved, by how much, and whether within bound."
)
def golden_diff(goldens: Goldens = None, probes: bool = False, json: Json = None) -> None:
    from audits.golden_jobs import diff, pending_goldens

    jobs = [
        Job(title=f"{path}: pending against accepted", steps=lambda _, path=path: diff(path))  # type: ignore[misc]
        for path in pending_goldens(goldens or ())
    ]
    judge(jobs, json, every=probes)


@golden_app.command("accept", help="Replace accepted goldens by their pending ones.")
def golden_accept(goldens: Goldens = None) -> None:
    from audits.golden_jobs import pending_goldens
    from goldens.workflow import accept

    for path in pending_goldens(goldens or ()):
        accept(path)
        console.print(f"accepted: {path}", highlight=False)


@golden_app.command("verify", help="Check goldens' integrity and re-run the engine against them.")
def golden_verify(
    goldens: Goldens = None, device: DeviceOption = "auto", probes: bool = False, json: Json = None
) -> None:
    from audits.golden_jobs import golden_paths, verify

    jobs = [
        Job(title=f"{path.name}: engine against golden", steps=lambda advance, path=path: verify(path, device, advance))  # type: ignore[misc]
        for path in golden_paths(goldens or ())
    ]
    judge(jobs, json, every=probes)


@golden_app.command("show", help="Print what goldens hold and where it comes from.")
def golden_show(goldens: Goldens = None, probes: bool = False) -> None:
    from audits.golden_jobs import golden_paths
    from audits.report import golden_lines

    for path in golden_paths(goldens or ()):
        for line in golden_lines(path, every=probes):
            console.print(line, markup=False, highlight=False)


@app.command("bisect", help=COMMANDS["bisect"], epilog=EXIT_CODES)
def bisect_command(
    actual: Annotated[Path, typer.Argument(help="A golden file with the run in question.")],
    expected: Annotated[Path | None, typer.Argument(help="Another, to compare with.")] = None,
) -> None:
    from audits.golden_jobs import bisect

    found = 0
    for case, failure in bisect(actual, expected):
        found += failure is not None
        console.print(
            f"{case}: {failure.message if failure else 'every op is within its bound'}", markup=False, highlight=False
        )
    raise typer.Exit(1 if found else 0)


@app.command("doctor", help=COMMANDS["doctor"])
def doctor_command() -> None:
    from audits.doctor import lanes
    from audits.side_by_side import versions

    for name, value in versions().items():
        console.print(f"{name:<10} {value}", markup=False, highlight=False)
    for lane in lanes():
        state = "[green]can run[/]" if lane.available else "[yellow]skipped[/]"
        console.print(f"{state} {escape(f'{lane.name}: {lane.detail or lane.reason}')}", highlight=False)


@app.command("list", help=COMMANDS["list"])
def list_command() -> None:
    from audits.listing import sections

    for title, rows in sections():
        console.print(f"[bold]{escape(title)}[/]")
        for name, line in rows:
            console.print(f"  {name:<18} {line}", markup=False, highlight=False)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A group of cases shown as one table; `steps` judges them, calling its argument before each."""

    title: str
    steps: Callable[[Callable[[str], None]], Iterable[Judged]]
    total: int | None = None


def judge(jobs: Sequence[Job], json: Path | None, *, every: bool) -> NoReturn:
    """Run the jobs, show each as it is done, write the JSON, and exit with the report's code."""
    from audits.report import probe_table, report_json, summary_lines, verdict_line
    from audits.verdict import Report

    # With the JSON on standard output, people read the tables on standard error.
    screen = errors if str(json) == "-" else console
    everything: list[Judged] = []
    for job in jobs:
        with progress(job.title, job.total) as advance:
            judged = list(job.steps(advance))
        provenance = judged[0].actual.provenance
        where = f"{provenance['engine']} {provenance['version']} on {provenance['device']}"
        screen.print(probe_table(judged, f"{job.title} ({where})", every=every, width=screen.width))
        for line in summary_lines(judged):
            screen.print(line, markup=False, highlight=False)
        for verdict in (one.verdict for one in judged):
            screen.print(verdict_line(verdict), highlight=False)
            if verdict.outcome == "fail" and "replay" in verdict.evidence:
                screen.print(f"  replay: {verdict.evidence['replay']}", markup=False, highlight=False)
        everything += judged
    report = Report(verdicts=[one.verdict for one in everything])
    if json is not None:
        text = report_json(report, everything)
        if str(json) == "-":
            print(text)
        else:
            json.write_text(text + "\n", encoding="utf-8")
    raise typer.Exit(report.exit_code)


@contextmanager
def progress(title: str, total: int | None) -> Iterator[Callable[[str], None]]:
    """A progress bar on standard error; the yielded function names what comes next."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True) as bar:
        task = bar.add_task(title, total=total, completed=-1 if total else 0)

        def advance(name: str) -> None:
            bar.update(task, advance=1, description=f"{title}: {name}")

        yield advance
