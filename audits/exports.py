"""Reports in the formats of other programs: JSON, JUnit XML for CI, SARIF 2.1.0 for code scanning, HTML for people."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote as percent_encoded

from jinja2 import Environment, PackageLoader
from junitparser import Error as JUnitError
from junitparser import Failure, JUnitXml, Skipped, TestCase, TestSuite

from audits.report import case_line, report_json, tally
from audits.verdict import Report, Verdict, case_text, replay_command

SARIF_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
Write = Callable[[Path, str], None]


def write_reports(report: Report, files: Mapping[str, Path], write: Write) -> None:
    """Write `report` in each wanted format ("json", "junit", "sarif", "html") with `write(path, text)`.

    One that can't be written keeps none of the others from it; ValueError says so when they are.
    """
    formats: Mapping[str, Callable[[Report], str]] = {"json": report_json, "junit": junit, "sarif": sarif, "html": html}
    failed = []
    for kind, path in files.items():
        try:
            write(path, formats[kind](report))
        except BrokenPipeError:
            raise
        except (OSError, ValueError) as error:
            failed.append(f"--{kind} {path}: {error}")
    if failed:
        raise ValueError(f"not written: {'; '.join(failed)}")


def junit(report: Report) -> str:
    """JUnit XML: a suite a contract, a test case a verdict; could-not-judge is an error."""
    xml = JUnitXml("assay audit")
    for name, verdicts in _by_audit(report).items():
        suite = TestSuite(name)
        for i, verdict in enumerate(verdicts):
            case = TestCase(f"{i}: {verdict.evidence.get('check') or verdict.case.get('relation') or 'values'}", name)
            message = _printable(verdict.message)
            if verdict.outcome == "fail":
                failure = Failure(message)
                failure.text = replay_command(verdict.case)
                case.result = [failure]
            elif verdict.outcome == "could-not-judge":
                case.result = [JUnitError(message)]
            elif verdict.outcome == "skipped":
                case.result = [Skipped(message)]
            suite.add_testcase(case)
        xml.add_testsuite(suite)
    xml.update_statistics()  # type: ignore[no-untyped-call]  # junitparser has no annotations here
    return str(xml.tostring().decode())  # type: ignore[no-untyped-call]


def sarif(report: Report) -> str:
    """SARIF 2.1.0: a rule a contract and check, a result a failure, at the candidate's file where there is one."""
    wrong = [v for v in report.verdicts if v.outcome in ("fail", "could-not-judge")]
    rules = sorted({_rule(v) for v in wrong})
    run = {
        "tool": {"driver": {"name": "assay", "rules": [{"id": rule} for rule in rules]}},
        "results": [_sarif_result(v) for v in wrong],
    }
    return json.dumps({"$schema": SARIF_SCHEMA, "version": "2.1.0", "runs": [run]}, indent=1)


def _rule(verdict: Verdict) -> str:
    return f"{verdict.audit}/{verdict.evidence.get('check', verdict.outcome)}".replace(" ", "-")


def _sarif_result(verdict: Verdict) -> dict[str, Any]:
    result: dict[str, Any] = {
        "ruleId": _rule(verdict),
        "level": "error" if verdict.outcome == "fail" else "warning",
        "message": {"text": verdict.message},
        "properties": {"replay": case_text(verdict.case)},
    }
    file, _, _ = str(verdict.case.get("candidate", "")).rpartition(":")
    if file.endswith((".py", ".toml")):
        path = Path(file)  # whose name needn't be UTF-8
        uri = path.as_uri() if path.is_absolute() else percent_encoded(os.fsencode(path.as_posix()))
        result["locations"] = [{"physicalLocation": {"artifactLocation": {"uri": uri}}}]
    return result


def html(report: Report) -> str:
    """One self-contained page: a row a contract, and every verdict that is no pass with its case."""
    page = Environment(loader=PackageLoader("audits", "templates"), autoescape=True, trim_blocks=True)
    shown = [
        {
            "verdict": verdict,
            "message": _printable(verdict.message),
            "check": verdict.evidence.get("check", ""),
            "case": _printable(case_line(verdict)),
            "replay": replay_command(verdict.case),
        }
        for verdict in report.verdicts
        if verdict.outcome != "pass"
    ]
    return page.get_template("audit.html").render(report=report, rows=tally(report.verdicts), shown=shown)


def _by_audit(report: Report) -> dict[str, Sequence[Verdict]]:
    groups: dict[str, list[Verdict]] = {}
    for verdict in report.verdicts:
        groups.setdefault(verdict.audit, []).append(verdict)
    return dict(groups)


def _printable(text: str) -> str:
    """Without the control characters that XML 1.0 has no way to write."""
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)
