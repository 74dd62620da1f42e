"""The `assay` command's door: answers --help and --version itself, and imports the rest only for real work.

The table of commands is here, so that the help above and the commands' own help (assay/app.py) are one text.
"""

from __future__ import annotations

import sys
from typing import NoReturn

SUMMARY = "Does a Metal LLM engine still compute what its reference computes?"
COMMANDS = {
    "run": "Run an engine beside the reference (or a golden) on prompts: probes, first divergence, flips.",
    "audit": "Judge implementations by contracts: our own, anybody's Python functions, or Metal kernels.",
    "kernel": "Metal kernels on the host CPU: list, check.",
    "golden": "Stored traces: regenerate, diff, accept, verify, show.",
    "bisect": "Name the first op whose own error exceeds its bound, from two stored traces.",
    "doctor": "Show devices and versions, and which lanes can run here or why not.",
    "list": "List the audits, judged ops, models and goldens.",
}
EXIT_CODES = "Exit codes: 0 pass, 1 something failed, 2 could not judge or bad usage, 130 interrupted."


def help_text() -> str:
    """What `assay --help` prints."""
    rows = "\n".join(f"  {name:<8} {summary}" for name, summary in COMMANDS.items())
    return (
        f"Usage: assay COMMAND [OPTIONS]\n\n{SUMMARY}\n\nCommands (assay COMMAND --help has the options):\n{rows}\n\n"
        f"Options:\n  --version  Show the version.\n  --help     Show this help.\n\n{EXIT_CODES}"
    )


def command() -> None:
    """What the installed `assay` runs: `main`, watched from another process where somebody's candidate may end it."""
    words = sys.argv[1:]
    try:
        if words[:1] == ["audit"] and any(word.split("=")[0] in ("--candidate", "--replay") for word in words):
            from assay.guard import watch

            watch()
        _main()
    except KeyboardInterrupt:
        _interrupted()


def main() -> None:
    """Entry point; exits with 0, 1, 2 or 130."""
    try:
        _main()
    except KeyboardInterrupt:
        _interrupted()


def _interrupted() -> NoReturn:
    """What an interrupt comes to before there is anything that it could interrupt (assay/screen.py has the rest)."""
    print("assay: interrupted", file=sys.stderr)
    sys.exit(130)


def _main() -> None:
    arguments = sys.argv[1:]
    if arguments in ([], ["--help"], ["-h"], ["help"]):
        try:
            print(help_text(), flush=True)
        except OSError:
            sys.exit(2)
        sys.exit(0 if arguments else 2)
    if arguments == ["--version"]:
        from assay import __version__

        print(f"assay {__version__}")
        sys.exit(0)
    from assay.app import app
    from assay.screen import start

    start(app)
