"""What documents and docstrings point at exists: links, headings, paths, modules and what lies in them."""

import re
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT

TOPS = "fastssl|pipelines|kernels|tests|benchmarks|configs|docs|docker|launch|requirements|scripts"
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/*.md")
    for path in ROOT.glob(pattern)
    if path.name != "CHANGELOG.md"  # of what was
)
SOURCES = sorted(path for top in TOPS.split("|") for path in (ROOT / top).rglob("*.py"))
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PATH = re.compile(rf"(?<![\w/.-])((?:{TOPS})/[\w./*-]*[\w*])")
MODULE = re.compile(r"`((?:fastssl|pipelines|kernels)(?:\.\w+)+)`")


def anchors(text: str) -> set[str]:
    """The fragments of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_of_a_document_lead_somewhere(document: Path) -> None:
    for link in LINK.findall(document.read_text()):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, fragment = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        assert target.exists(), f"{document}: {link}"
        if fragment and target.suffix == ".md":
            assert fragment in anchors(target.read_text()), f"{document}: {link}"


@pytest.mark.parametrize("document", [*DOCUMENTS, *SOURCES], ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_and_modules_that_are_named_exist(document: Path) -> None:
    text = document.read_text()
    is_test = "tests" in document.relative_to(ROOT).parts  # a test's paths may be made up
    # Results may be what a command is to write, and configs/X.yaml stands for any configuration.
    wanted = re.compile(r".*\.(py|md|sh)|configs/(?!\w\.).*\.yaml")
    named = set() if is_test else {path for path in PATH.findall(text) if wanted.fullmatch(path)}
    missing = {path for path in named if not list(ROOT.glob(path))}
    unknown = {name for name in MODULE.findall(text) if not is_known(name)}
    assert missing | unknown == set()


def is_known(name: str) -> bool:
    """Whether a dotted name is a module, or a module's own name, or an attribute of a class in it."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        folder = ROOT.joinpath(*parts[:length])
        file = next((path for path in (folder.with_suffix(".py"), folder / "__init__.py") if path.exists()), None)
        if file is not None:
            text = file.read_text()
            return all(re.search(rf"(?<!\w){part}(?!\w)", text) for part in parts[length:])
    return False


def test_a_wrong_name_is_found() -> None:
    """Or the tests above would pass whatever is written."""
    assert is_known("fastssl.config.Config")
    assert not is_known("fastssl.config.Configuration")
    assert not is_known("fastssl.nowhere")
    assert anchors("# On one H200\n## A step, `captured`") == {"on-one-h200", "a-step-captured"}


def test_every_page_has_a_place_in_the_navigation() -> None:
    """As scripts/docs_site/build.py wants it; decisions are listed by it."""
    config = (ROOT / "docs/mkdocs.yml").read_text()
    in_nav = re.findall(r": (\S+\.md)$", config, flags=re.MULTILINE)
    pages = {str(path.relative_to(ROOT)) for path in (*DOCUMENTS, ROOT / "CHANGELOG.md")}
    assert sorted(in_nav) == sorted(page for page in pages if not page.startswith("docs/adr/"))
