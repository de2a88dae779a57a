"""The check of the built site: what it must find."""

import runpy
from pathlib import Path

from tests.helpers.processes import ROOT

check_site = runpy.run_path(str(ROOT / "scripts/docs_site/check.py"))["check_site"]


def test_links_headings_and_what_is_loaded_are_checked(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    page = """
        <link rel="stylesheet" href="https://fonts.example/x.css"><link rel="canonical" href="https://site.example/">
        <script src="site.js"></script><a href="docs/a.html#heading">good</a> <a href="https://elsewhere.example">good</a>
        <a href="#nowhere">bad</a> <a href="docs/b.html">bad</a> <a href="docs/a.html#nothing">bad</a>"""
    (tmp_path / "index.html").write_text(page)
    (tmp_path / "docs/a.html").write_text('<h2 id="heading">Heading</h2> <a href="../index.html">good</a>')
    (tmp_path / "site.css").write_text("@import url(https://fonts.example/y.css);")
    assert check_site(tmp_path) == [
        "index.html loads https://fonts.example/x.css",
        "index.html: #nowhere has no such heading",
        "index.html: docs/b.html does not exist",
        "index.html: docs/a.html#nothing has no such heading",
        "site.css loads https://fonts.example/y.css",
    ]
