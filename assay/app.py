"""The commands: options in, one call into `audits`, a table or JSON out, an exit code. No logic of its own."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from assay import guard
from assay.cli import COMMANDS, EXIT_CODES, SUMMARY
from assay.screen import Job, console, errors, judge, line, progress, read_case, show_audit, show_mutants

app = typer.Typer(help=SUMMARY, epilog=EXIT_CODES, add_completion=False, no_args_is_help=True)
golden_app = typer.Typer(help=COMMANDS["golden"], no_args_is_help=True)
app.add_typer(golden_app, name="golden")
kernel_app = typer.Typer(help=COMMANDS["kernel"], no_args_is_help=True)
app.add_typer(kernel_app, name="kernel")

Model = Annotated[str, typer.Option(help="A checkpoint folder in the Hugging Face layout, or 'shipped'.")]
Elsewhere = Annotated[str, typer.Option("--model", help="Where the model is now, if not where the golden says.")]
Dtypes = Annotated[list[str] | None, typer.Option("--dtype", help="float32 (default), float16, bfloat16; repeatable.")]
DeviceOption = Annotated[str, typer.Option("--device", help="metal, cuda, cpu, or auto: the best there is.")]
Experts = Annotated[str, typer.Option(help="Quantise the experts first: q8_0, q4_k, q2_k or iq2_xxs.")]
Kernels = Annotated[
    str, typer.Option(help="Computed by mlx's kernels, or by our own: host (on the CPU), metal (on an Apple GPU).")
]
Tokens = Annotated[str | None, typer.Option(help="Token ids, separated by commas.")]
Probes = Annotated[bool, typer.Option("--probes", help="Show every probe, not the worst of each kind.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the report as JSON to PATH ('-': standard output).")]
Goldens = Annotated[list[Path] | None, typer.Argument(help="Golden files; none: the committed ones.")]


@app.command("run", help=COMMANDS["run"], epilog=EXIT_CODES)
def run_command(
    model: Model = "shipped",
    dtype: Dtypes = None,
    device: DeviceOption = "auto",
    prompt: Annotated[list[str] | None, typer.Option(help="Text for the shipped model; repeatable.")] = None,
    tokens: Tokens = None,
    golden: Annotated[Path | None, typer.Option(help="Judge against this golden: it says dtype and tokens.")] = None,
    chunk: Annotated[int | None, typer.Option(min=1, help="Tokens prefilled at a time; 32.")] = None,
    decode: Annotated[int | None, typer.Option(min=0, help="Last tokens fed one by one; 4.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Draws the built-in prompts; 0.")] = None,
    experts: Experts = "",
    kernels: Kernels = "",
    probes: Probes = False,
    json: Json = None,
) -> None:
    from audits.cases import cases_for
    from audits.golden_jobs import verify
    from audits.side_by_side import audit_model

    if golden is not None:
        given = {"prompt": prompt, "tokens": tokens, "dtype": dtype, "chunk": chunk, "decode": decode, "seed": seed}
        given |= {"experts": experts or None, "kernels": kernels or None}
        if said := [f"--{name}" for name, value in given.items() if value is not None]:
            raise ValueError(f"--golden says how to run; leave out {', '.join(said)}")
        elsewhere = "" if model == "shipped" else model
        judge([Job(title=str(golden), steps=partial(verify, golden, device, model=elsewhere))], json, every=probes)
    jobs = []
    for name in dict.fromkeys(dtype or ["float32"]):
        cases = cases_for(
            model,
            prompts=prompt or (),
            tokens=tokens,
            seed=seed or 0,
            dtype=name,
            device=device,
            chunk=chunk or 32,
            decode=decode,
            experts=experts,
            kernels=kernels or "mlx",
        )
        title = f"{cases[0].checkpoint} in {name} beside the reference"
        jobs.append(Job(title=title, steps=partial(audit_model, cases), total=len(cases)))
    judge(jobs, json, every=probes)


@app.command("audit", help=COMMANDS["audit"], epilog=EXIT_CODES)
def audit_command(
    contracts: Annotated[list[str] | None, typer.Argument(help="Names from `assay list`; none: all.")] = None,
    candidate: Annotated[
        str | None,
        typer.Option(help="What is judged instead of our own: FILE.py:NAME, or FILE.toml for Metal kernels."),
    ] = None,
    framework: Annotated[
        str | None, typer.Option(help="Of the arrays that it is given: numpy (default), mlx or torch.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="mlx: metal, cuda, cpu or auto; torch: its own names.")] = None,
    claims: Annotated[
        str, typer.Option(help="Its arithmetic, e.g. accumulate=f32,intermediate=input; default: by dtype.")
    ] = "",
    dtype: Annotated[list[str] | None, typer.Option("--dtype", help="Try these alone; repeatable.")] = None,
    layout: Annotated[
        list[str] | None, typer.Option("--layout", help="Lay operands out so and contiguous alone; repeatable.")
    ] = None,
    full: Annotated[bool, typer.Option("--full/--quick", help="Everything crossed, or the boundaries.")] = False,
    seed: Annotated[int | None, typer.Option(min=0, help="Draws the operands; 0.")] = None,
    replay: Annotated[str | None, typer.Option(help="Run one case again: a JSON file, or the JSON itself.")] = None,
    mutants: Annotated[
        bool, typer.Option("--mutants", help="Plant the known bugs, and show which check sees which.")
    ] = False,
    failures: Annotated[Path, typer.Option(help="Folder for one JSON file a failure, to replay it.")] = Path(
        "assay-failures"
    ),
    json: Json = None,
    junit: Annotated[Path | None, typer.Option(help="Write the verdicts as JUnit XML.")] = None,
    sarif: Annotated[Path | None, typer.Option(help="Write the failures as SARIF 2.1.0.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report as one HTML page.")] = None,
) -> None:
    # Hypothesis keeps a little on disk; a user's folder is no place for it.
    os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(Path(tempfile.gettempdir()) / "assay-hypothesis"))
    from audits import catalogue
    from audits.claims import read_claims

    said: dict[str, object] = {"CONTRACT": contracts, "--framework": framework, "--claims": claims, "--dtype": dtype}
    said |= {"--layout": layout, "--full": full, "--seed": seed is not None}
    if replay is not None:
        _leave_out("--replay", "the case says what is run", said | {"--mutants": mutants})
    if mutants:
        said |= {"--candidate": candidate, "--device": device, "--json": json, "--junit": junit, "--sarif": sarif}
        _leave_out("--mutants", "it plants all bugs and prints a table", said | {"--html": html})
        show_mutants(partial(catalogue.mutants, Path("tests") / "mutants"))
    files = {"json": json, "junit": junit, "sarif": sarif, "html": html}
    if replay is not None:
        show_audit(
            lambda _: catalogue.replay(read_case(replay), candidate, device=device, at=guard.note), files, failures
        )
    work = partial(
        catalogue.audit,
        contracts or [],
        candidate,
        framework=framework,
        device=device,
        claims=read_claims(claims),
        dtypes=dtype or (),
        layouts=layout or (),
        full=full,
        seed=seed or 0,
        at=guard.note,
    )
    show_audit(lambda advance: work(advance=advance), files, failures)


def _leave_out(option: str, why: str, said: Mapping[str, object]) -> None:
    """ValueError for what was said beside `option` and would be ignored."""
    if names := [name for name, value in said.items() if value]:
        raise ValueError(f"{option}: {why}; leave out {', '.join(names)}")


@kernel_app.command("list", help="List our Metal kernels.")
def kernel_list() -> None:
    from audits.listing import kernels

    for source, name in kernels():
        line(console, f"{source:<20} {name}")


@kernel_app.command("check", help="Compile every kernel of Metal sources for the host and say what each one takes.")
def kernel_check(
    sources: Annotated[list[Path], typer.Argument(help="FILE.metal …")],
    include: Annotated[list[Path] | None, typer.Option("-I", help="Folder of included headers; repeatable.")] = None,
    only: Annotated[str, typer.Option(help="Part of a kernel's name: compile those alone.")] = "",
    define: Annotated[list[str] | None, typer.Option("-D", help="NAME or NAME=VALUE: a macro; repeatable.")] = None,
    constant: Annotated[
        list[str] | None,
        typer.Option("--constant", help="NAME=VALUE or INDEX=VALUE: a function constant; repeatable."),
    ] = None,
) -> None:
    from audits.listing import check_kernels

    failed = unread = checked = 0
    for source in sources:
        try:
            for name, message in check_kernels(source, include or [], only, define or [], constant or []):
                checked += 1
                failed += bool(message.error)
                line(console, f"{'FAIL' if message.error else 'ok'} {name}: {message.error or message.parameters}")
        except (ValueError, OSError) as error:  # one source that can't be read loses nothing of the others
            if isinstance(error, BrokenPipeError) or len(sources) == 1:
                raise
            unread += 1
            line(errors, f"assay: {' '.join(str(error).split())}")
    if not checked and not unread:
        raise ValueError(f"no kernel of {', '.join(map(str, sources))} has {only!r} in its name")
    raise typer.Exit(1 if failed else 2 if unread else 0)


@golden_app.command(
    "regenerate", help="Run the engine anew and stage the result as a pending golden, beside the accepted one."
)
def golden_regenerate(
    goldens: Goldens = None,
    model: Annotated[str, typer.Option(help="For a new golden: a checkpoint folder, or 'shipped'.")] = "",
    dtype: Annotated[str, typer.Option(help="For a new golden: float32 (default), float16 or bfloat16.")] = "",
    device: Annotated[str, typer.Option(help="metal, cuda, cpu or auto; else the one the golden was made on.")] = "",
    tokens: Annotated[str | None, typer.Option(help="For a new golden: token ids, separated by commas.")] = None,
    experts: Annotated[str, typer.Option(help="For a new golden: as for `assay run`.")] = "",
    kernels: Annotated[str, typer.Option(help="For a new golden: as for `assay run`.")] = "",
) -> None:
    from audits.cases import cases_for
    from audits.golden_jobs import check_name, default_golden_paths, golden_cases, regenerate

    paths = goldens or default_golden_paths()
    if tokens is not None and (goldens is None or len(goldens) != 1):
        raise ValueError("--tokens makes one new golden: name its file, NAME.h5")
    if tokens is None and (model or dtype or experts or kernels):
        raise ValueError("--model, --dtype, --experts and --kernels are for a new golden: give its --tokens too")
    for path in paths:
        check_name(path)
        if tokens is None:
            cases = golden_cases(path, device)
        else:
            cases = cases_for(
                model or "shipped",
                tokens=tokens,
                dtype=dtype or "float32",
                device=device or "auto",
                experts=experts,
                kernels=kernels or "mlx",
            )
        with progress(f"regenerate {path.name}", len(cases)) as advance:
            pending = regenerate(path, cases, advance)
        line(console, f"pending: {pending}")
    named = " ".join(str(path) for path in goldens or ())
    line(console, f"Look at it with `assay golden diff {named}`".rstrip() + ", then `assay golden accept`.")


@golden_app.command(
    "diff", help="What a pending golden would change: what moved, by how much, and whether within bound."
)
def golden_diff(goldens: Goldens = None, model: Elsewhere = "", probes: Probes = False, json: Json = None) -> None:
    from audits.golden_jobs import diff, pending_goldens

    title = "{}: pending against accepted (a new one: against the reference)"
    paths = pending_goldens(goldens or ())
    judge([Job(title=title.format(p), steps=lambda _, p=p: diff(p, model)) for p in paths], json, every=probes)  # type: ignore[misc]  # mypy can't infer a lambda's default


@golden_app.command("accept", help="Replace accepted goldens by their pending ones, unless these fail their bounds.")
def golden_accept(
    goldens: Goldens = None,
    model: Elsewhere = "",
    force: Annotated[bool, typer.Option("--force", help="Accept what fails, too.")] = False,
) -> None:
    from audits.golden_jobs import accept, pending_goldens

    refused = 0
    for path in pending_goldens(goldens or ()):
        failure = accept(path, model, force=force)
        refused += bool(failure)
        line(console, f"NOT accepted: {path}: {failure}" if failure else f"accepted: {path}")
    if refused:
        line(console, "Mend the engine and regenerate, or accept with --force.")
        raise typer.Exit(1)


@golden_app.command("verify", help="Check goldens' integrity and re-run the engine against them.")
def golden_verify(
    goldens: Goldens = None,
    model: Elsewhere = "",
    device: DeviceOption = "auto",
    probes: Probes = False,
    json: Json = None,
) -> None:
    from audits.golden_jobs import golden_paths, verify

    jobs = [
        Job(title=f"{path.name}: engine against golden", steps=partial(verify, path, device, model=model))
        for path in golden_paths(goldens or ())
    ]
    judge(jobs, json, every=probes)


@golden_app.command("show", help="Print what goldens hold and where it comes from.")
def golden_show(goldens: Goldens = None, probes: Probes = False) -> None:
    from audits.golden_jobs import golden_paths
    from audits.report import golden_lines

    for path in golden_paths(goldens or ()):
        for text in golden_lines(path, every=probes):
            line(console, text)


@app.command("bisect", help=COMMANDS["bisect"], epilog=EXIT_CODES)
def bisect_command(
    actual: Annotated[Path, typer.Argument(help="A golden file with the run in question.")],
    expected: Annotated[Path | None, typer.Argument(help="Another, to compare with.")] = None,
    model: Elsewhere = "",
) -> None:
    from audits.golden_jobs import bisect

    found = 0
    for case, failure in bisect(actual, expected, model):
        found += failure is not None
        line(console, f"{case}: {failure.message if failure else 'every op is within its bound'}")
    raise typer.Exit(1 if found else 0)


@app.command("doctor", help=COMMANDS["doctor"])
def doctor_command() -> None:
    from audits.doctor import lanes
    from audits.runs import versions

    for name, value in versions().items():
        line(console, f"{name:<10} {value}")
    for lane in lanes():
        line(console, f"{'can run' if lane.available else 'skipped'} {lane.name}: {lane.detail or lane.reason}")


@app.command("list", help=COMMANDS["list"])
def list_command() -> None:
    from audits.listing import sections

    for title, rows in sections():
        line(console, title)
        for name, text in rows:
            line(console, f"  {name:<18} {text}")
