"""Checks the built site: every link leads to a page and a heading of it, and nothing is loaded from elsewhere."""

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADS = {("script", "src"), ("img", "src"), ("iframe", "src"), ("source", "srcset"), ("link", "href")}
LEADS = {("a", "href")}


class _Page(HTMLParser):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value is not None}
        self.ids |= {values[name] for name in ("id", "name") if name in values}
        self.links += [values[name] for of, name in LEADS if tag == of and name in values]
        is_metadata = values.get("rel") in ("canonical", "prev", "next")
        self.loaded += [values[name] for of, name in LOADS if tag == of and name in values and not is_metadata]


def check_site(site: Path) -> list[str]:
    """What is wrong with the site, a line each."""
    pages = {path: _Page(path) for path in sorted(site.rglob("*.html")) if path.name != "404.html"}
    errors = []
    for path, page in pages.items():
        name = path.relative_to(site)
        errors += [f"{name} loads {url}" for url in page.loaded if urlsplit(url).netloc]
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.exists():
                errors.append(f"{name}: {link} does not exist")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
                errors.append(f"{name}: {link} has no such heading")
    for style in site.rglob("*.css"):
        errors += [
            f"{style.relative_to(site)} loads {url}" for url in re.findall(r"url\((https?:[^)]+)", style.read_text())
        ]
    return errors
