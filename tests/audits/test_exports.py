"""Reports in the formats of other programs say what the report says, whatever is in its messages."""

from __future__ import annotations

import json
import shlex
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from junitparser import Error, Failure, JUnitXml, Skipped

from audits.exports import html, junit, sarif, write_reports
from audits.report import report_json
from audits.verdict import Report, Verdict, case_text, replay_command

NASTY = 'error <script>alert("x")</script> & 3 < 4, \x00\x1b[31m red \ufffe \udcff, "quotes"'


def verdict(outcome: Any, message: str = "fine", audit: str = "softmax", **told: Any) -> Verdict:
    evidence = {"check": told.pop("check")} if "check" in told else {}
    case = {"contract": audit, "candidate": "kernels/my file's.py:softmax", "framework": "numpy", **told}
    return Verdict(outcome=outcome, audit=audit, case=case, message=message, evidence=evidence)


REPORT = Report(
    verdicts=[
        verdict("pass", dtype="float32", S=3, relation=""),
        verdict("pass", dtype="float32", S=4, relation="rerun"),
        verdict("fail", NASTY, check="permuted rows", S=5, relation="permuted rows"),
        verdict("fail", "too large", check="values", S=6),
        verdict("could-not-judge", "the bound is wider than the values", S=7),
        verdict("skipped", "bfloat16 is left out"),
        verdict("fail", "wrong", audit="matmul", check="values", candidate="program:matmul"),
        verdict("pass", audit="matmul", candidate="program:matmul", M=8),
    ]
)


def test_junit_counts_every_verdict() -> None:
    xml = JUnitXml.fromstring(junit(REPORT))
    assert (xml.tests, xml.failures, xml.errors, xml.skipped) == (8, 3, 1, 1)
    softmax, matmul = xml
    assert (softmax.name, softmax.tests, softmax.failures, softmax.errors, softmax.skipped) == ("softmax", 6, 2, 1, 1)
    assert (matmul.name, matmul.tests, matmul.failures) == ("matmul", 2, 1)
    kinds = [[type(result) for result in case.result] for case in softmax]
    assert kinds == [[], [], [Failure], [Failure], [Error], [Skipped]]
    assert len({case.name for case in softmax}) == 6
    assert [case.name for case in softmax][1:4] == ["1: rerun", "2: permuted rows", "3: values"]


def test_junit_holds_messages_and_replays() -> None:
    softmax, _ = JUnitXml.fromstring(junit(REPORT))
    (failure,) = list(softmax)[2].result
    assert failure.message == NASTY.replace("\x00", "?").replace("\x1b", "?").replace("\ufffe", "?").replace(
        "\udcff", "?"
    )
    words = shlex.split(failure.text)
    assert words[:3] == ["assay", "audit", "--replay"]
    assert json.loads(words[3]) == dict(REPORT.verdicts[2].case)


def test_sarif_has_the_shape_of_its_standard() -> None:
    body = json.loads(sarif(REPORT))
    assert body["version"] == "2.1.0"
    assert body["$schema"].endswith("sarif-2.1.0.json")
    (run,) = body["runs"]
    assert run["tool"]["driver"]["name"] == "assay"
    rules = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    assert rules == ["matmul/values", "softmax/could-not-judge", "softmax/permuted-rows", "softmax/values"]
    results = run["results"]
    assert len(results) == 4, "a pass and what was left out are no results"
    assert [result["level"] for result in results] == ["error", "error", "warning", "error"]
    assert all(result["ruleId"] in rules for result in results)
    assert results[0]["message"]["text"] == NASTY
    assert json.loads(results[1]["properties"]["replay"])["S"] == 6


def test_sarif_places_are_files_alone() -> None:
    results = json.loads(sarif(REPORT))["runs"][0]["results"]
    place = results[0]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
    assert place == "kernels/my%20file%27s.py", "a URI, not a path"
    assert "locations" not in results[3], "program:matmul is a function somewhere"
    absolute = Report(verdicts=[verdict("fail", check="values", candidate="/a b/c.py:f")])
    (result,) = json.loads(sarif(absolute))["runs"][0]["results"]
    assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "file:///a%20b/c.py"


class Page(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_html_holds_every_verdict_that_is_no_pass_and_no_markup_of_theirs() -> None:
    page = Page(html(REPORT))
    text = "".join(page.texts)
    assert "script" not in page.tags
    assert '<script>alert("x")</script> & 3 < 4, ??[31m red' in text
    for one in REPORT.verdicts:
        assert (replay_command(one.case) in text) == (one.outcome != "pass")
    assert "assay audit: not passed" in text
    assert "assay audit: pass" in "".join(Page(html(Report(verdicts=[verdict("pass")]))).texts)


def test_a_page_of_nothing_but_passes_lists_no_failures() -> None:
    assert "Failures" not in html(Report(verdicts=[verdict("pass")]))


def test_every_format_can_be_written_as_utf_8(tmp_path: Path) -> None:
    written: dict[str, str] = {}
    files = {kind: tmp_path / f"report.{kind}" for kind in ("json", "junit", "sarif", "html")}
    write_reports(REPORT, files, lambda path, text: written.update({path.suffix[1:]: text}))
    assert set(written) == set(files)
    for text in written.values():
        text.encode("utf-8")
    assert json.loads(written["json"])["verdicts"][2]["message"] == NASTY


def test_json_has_no_numbers_that_json_lacks() -> None:
    odd = Verdict(outcome="fail", audit="a", case={}, message="m", evidence={"x": float("nan"), "y": [float("inf")]})
    (told,) = json.loads(report_json(Report(verdicts=[odd])), parse_constant=pytest.fail)["verdicts"]
    assert told["evidence"] == {"x": None, "y": [None]}


def test_a_case_is_one_line_that_a_shell_passes_on() -> None:
    one = REPORT.verdicts[2]
    assert "\n" not in case_text(one.case)
    assert json.loads(shlex.split(replay_command(one.case))[-1]) == dict(one.case)


def test_an_empty_report_is_no_pass_in_any_format() -> None:
    empty = Report(verdicts=[])
    assert empty.exit_code == 2
    assert JUnitXml.fromstring(junit(empty)).tests in (0, None)
    assert json.loads(sarif(empty))["runs"][0]["results"] == []
    assert "not passed" in html(empty)
