"""The Python in docs/*.md runs as it is written: the blocks of a page one after the other, in one namespace."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PAGES = sorted(path for path in DOCS.rglob("*.md") if BLOCK.search(path.read_text(encoding="utf-8")))


def run_blocks(text: str, name: str) -> int:
    """How many blocks ran; whatever they raise has the page's own line numbers."""
    namespace: dict[str, object] = {}
    found = list(BLOCK.finditer(text))
    for match in found:
        before = "\n" * text.count("\n", 0, match.start(1))
        exec(compile(before + match[1], name, "exec"), namespace)
    return len(found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_python_of_a_page_works(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(DOCS.parent)
    assert run_blocks(page.read_text(encoding="utf-8"), page.name)


def test_the_executors_guide_is_among_them() -> None:
    assert "metal-executor" in [page.stem for page in PAGES]


def test_a_block_that_fails_is_seen() -> None:
    with pytest.raises(AssertionError):
        run_blocks("# A page\n\n```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n", "page.md")


def test_links_between_pages_lead_somewhere() -> None:
    for page in sorted(DOCS.rglob("*.md")):
        for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


# NAME#NUMBER or NAME #NUMBER; OWNER/NAME#NUMBER says where that is.
OWNERLESS = re.compile(r"(?<![\w./-])[a-zA-Z][\w.-]* ?#[0-9]+\b(?!\w)")


def test_published_bugs_are_named_with_their_owner() -> None:
    root = DOCS.parent
    sources = [*root.glob("tests/mutants/**/*.toml"), *root.glob("tests/mutants/**/*.py"), *DOCS.rglob("*.md")]
    for page in [*sources, *root.glob("*.md"), *root.glob("audits/**/*.py"), *root.glob("reference/**/*.py")]:
        text = page.read_text(encoding="utf-8")
        assert not OWNERLESS.findall(text), page
        for source in re.findall(r'^source = "([^"]+)"$', text, re.MULTILINE):
            assert re.match(r"[\w.-]+/[\w.-]+(#\d+|@[0-9a-f]{7,}| [\d.]+)?$", source) or ".metal" in source, page
