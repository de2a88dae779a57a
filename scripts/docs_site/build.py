"""Builds the documentation site, build/docs/site, from the Markdown of this repository.

    python scripts/docs_site/build.py        # in the environment of requirements/docs.txt; `make docs` makes it

The pages keep their folders, so that a link has the same form here and on the site. Added are what a code host shows in
its own way: equations (MathML, which needs no script), the reference from the docstrings, and the list of decisions. A
warning, a link that leads nowhere, and a page that loads anything from elsewhere are errors.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from check import check_site
from pages import decisions_nav, stage_pages
from reference import write_reference

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "build/docs"


def main() -> int:
    shutil.rmtree(OUT, ignore_errors=True)
    source = OUT / "source"
    pages = stage_pages(ROOT, source)
    reference = write_reference(ROOT, source / "docs/reference")
    config = (ROOT / "docs/mkdocs.yml").read_text()
    not_in_nav = [name for name in pages if f" {name}\n" not in config and not name.startswith("docs/adr/")]
    if not_in_nav:
        return fail(f"docs/mkdocs.yml has no place for {', '.join(not_in_nav)}: add a line to nav")
    for marker, nav in (("REFERENCE", reference), ("DECISIONS", decisions_nav(ROOT))):
        config = config.replace(f" {marker}\n", "".join(f"\n          - {each}" for each in nav) + "\n")
    (OUT / "mkdocs.yml").write_text(config)
    command = [Path(sys.executable).with_name("zensical"), "build", "--strict", "-f", OUT / "mkdocs.yml"]
    plain = os.environ | {"NO_COLOR": "1"}
    done = subprocess.run(command, env=plain, capture_output=True, text=True, check=False)
    if done.returncode:
        return fail(f"the generator ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    if errors := check_site(OUT / "site"):
        return fail("\n".join(errors))
    number = len(list((OUT / "site").rglob("*.html")))
    print(f"docs: {number} pages: {OUT.relative_to(ROOT)}/site/index.html")
    return 0


def fail(message: str) -> int:
    print(f"docs: error: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
