"""Copies the pages to the folder that the site is built from: links, equations, the list of decisions."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from latex2mathml.converter import convert

PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md", "docs/adr/*.md", "benchmarks/README.md")
FILES = ("benchmarks/results/*.csv", "benchmarks/results/*.png", "docs/images/*.webp")
INDEX = "README.md"  # of the decisions: made for the site
LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s#]*)(?P<fragment>#[^)\s]*)?\)")
CODE = re.compile(r"^```[\s\S]*?^```$|^(?: {4}.*\n?)+|`[^`\n]+`", re.MULTILINE)
DISPLAY = re.compile(r"^```math\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"\$`([^`]+)`\$")


def stage_pages(root: Path, source: Path) -> list[str]:
    """Write all pages and files to `source`; returns the names of the pages, as in the repository."""
    names = [str(path.relative_to(root)) for pattern in (*PAGES, *FILES) for path in sorted(root.glob(pattern))]
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".md"):
            (source / name).write_text(page_of_site((root / name).read_text(), name, {*names}))
        else:
            shutil.copy(root / name, source / name)
    (source / "docs/adr" / INDEX).write_text(list_of_decisions(root))
    shutil.copy(Path(__file__).with_name("site.css"), source)
    return [name for name in names if name.endswith(".md")]


def page_of_site(text: str, name: str, names: set[str]) -> str:
    """A page with equations in MathML; a link to what the site does not have becomes its text."""

    def keep(match: re.Match[str]) -> str:
        target = match["target"]
        if not target or re.match(r"[a-z]+:", target):
            return match[0]
        path = os.path.normpath(os.path.join(os.path.dirname(name), target))
        if path in names:
            return match[0]
        if path == "docs/adr":
            return f"[{match['text']}]({target}/{INDEX})"
        return match["text"]

    text = INLINE.sub(lambda math: f"<span>{mathml(math[1], 'inline')}</span>", text)
    text = DISPLAY.sub(lambda math: f"<div>{mathml(math[1], 'block')}</div>", text)
    return outside_code(text, lambda part: LINK.sub(keep, part))


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """The text with its parts outside of code changed."""
    result, end = [], 0
    for code in CODE.finditer(text):
        result += [change(text[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*result, change(text[end:])])


def mathml(equation: str, display: str) -> str:
    """LaTeX to MathML in one line that Markdown leaves alone."""
    html = convert(" ".join(equation.split()), display=display)
    html = html.replace("<mi>&#x02032;</mi>", "<mo>&#x02032;</mo>")
    html = re.sub(r"(<mi>log</mi>)(?!<mo[^>]*>&#x00028;)", r'\1<mspace width="0.17em"/>', html)
    return re.sub(r"[*_`\\\[\]|]", lambda found: f"&#{ord(found[0])};", html)


def titles(root: Path) -> list[tuple[str, str]]:
    """File name and title of each decision."""
    paths = sorted((root / "docs/adr").glob("*.md"))
    return [(path.name, path.read_text().splitlines()[0].removeprefix("# ")) for path in paths]


def list_of_decisions(root: Path) -> str:
    rows = "".join(f"| [{title}]({name}) |\n" for name, title in titles(root))
    return f"# Decisions\n\nDecisions that a reader may question, with their reasons.\n\n| |\n|---|\n{rows}"


def decisions_nav(root: Path) -> list[str]:
    """Entries of the navigation."""
    entries = (f"{json.dumps(title)}: docs/adr/{name}" for name, title in titles(root))
    return [f"docs/adr/{INDEX}", *entries]
