"""`fastssl report`: one page that holds everything, whatever state its runs are in."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.fastssl.report.conftest import HOSTILE
from tests.helpers.processes import ROOT
from tests.helpers.runs import make_run


class Elements(HTMLParser):
    """The start tags of a page with their attributes, and its visible text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] not in ("script", "style"):
            self.words += data


def test_a_page_holds_everything_and_no_name_becomes_html(tiny_run, tmp_path, in_process):
    out = tmp_path / "x.html"
    done = in_process("report", tiny_run, "--out", out, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert str(out) in done.stdout
    page = Elements(out.read_text())
    for heading in ("Summary", "Configuration", "Training", "Similarities of pairs", "Features", "Nearest neighbours",
                    "Most-confused images", "Views", "First-layer filters", "Bad samples"):  # fmt: skip
        assert ("h2", {"id": heading.lower().replace(" ", "-")}) in page.tags, heading
    assert HOSTILE in page.words
    assert "</script><b>" in page.words
    assert [tag for tag, _ in page.tags].count("script") == 3
    assert not {"b", "iframe", "object", "form"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        for name in ("src", "href", "action"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), (tag, attributes)


def test_figures_are_json_without_tags_and_scripts_have_their_hashes(tiny_run, tmp_path, in_process):
    out = tmp_path / "x.html"
    assert in_process("report", tiny_run, "--out", out, "--device", "cpu").returncode == 0
    text = out.read_text()
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', text, re.DOTALL)
    assert found
    assert "<" not in found[1]
    figures = json.loads(found[1])
    assert len({figure["id"] for figure in figures}) == len(figures) > 8
    shown = [figure for figure in figures if "sheet" in figure]
    assert len(shown) == 1
    names = {trace["name"] for trace in shown[0]["data"]}
    assert names == {"&lt;img src=x onerror=alert(1)&gt;", "&lt;/script&gt;&lt;b&gt;", "c"}
    assert re.search(r"default-src 'none'; .*script-src 'sha256-\S+' 'sha256-\S+'", text)


def test_runs_without_a_checkpoint_get_a_page_that_says_so(tmp_path, in_process):
    runs = [make_run(tmp_path / name, epochs_done=num).path for name, num in (("a", 2), ("b", 0))]
    for run in runs:
        for step in (run / "checkpoints").iterdir():
            step.rmdir()
    make_run(tmp_path / "c").lock()
    done = in_process("report", *runs, tmp_path / "c", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    page = Elements((runs[0] / "report.html").read_text())
    assert page.words.count("the run has no checkpoint yet") == 2
    assert "no weights at" in page.words  # its checkpoint is not written yet
    assert "running, 1 of 3 epochs" in page.words
    assert "crashed, 2 of 3 epochs" in page.words
    assert done.stdout.count("no pictures of the encoder") == 3


def test_the_difference_of_two_runs_is_what_differs(tmp_path, in_process):
    make_run(tmp_path / "a", loss={"name": "byol"})
    make_run(tmp_path / "b", loss={"name": "byol"}, data={"global_batch_size": 64})
    assert in_process("report", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "x.html").returncode == 0
    text = (tmp_path / "x.html").read_text()
    section = text[text.index('id="configuration"') : text.index('id="training"')]
    assert re.findall(r"<tr><th>([\w.]+)</th><td>(\w+)</td><td>(\w+)</td>", section) == [
        ("data.global_batch_size", "256", "64")
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none"], "none is not the folder of a run: it has no config.yaml"),
        (["empty"], "empty is not the folder of a run"),
        (["a", "./a"], "given twice"),
        (["a", "--out", "missing/x.html"], "--out: missing/x.html cannot be written"),
        (["a", "--out", "empty"], "--out: empty cannot be written"),
        (["a", "--out", "blocked.html"], "--out: blocked.html cannot be written (Is a directory)"),
        (["a", "--num-images", "2"], "--num-images must be >= 3"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, in_process, arguments, words):
    make_run(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    (tmp_path / ".blocked.html.tmp").mkdir()  # the name under which the page is written first
    (tmp_path / "blocked.html").write_text("before")
    monkeypatch.chdir(tmp_path)
    done = in_process("report", *arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert words in done.stderr
    assert (tmp_path / "blocked.html").read_text() == "before"


def test_without_plotly_one_line_says_what_to_install(tmp_path: Path):
    run = make_run(tmp_path / "a").path
    code = "import sys; sys.modules['plotly'] = None; from fastssl.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "report", run], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        "fastssl: error: fastssl report needs the package plotly: pip install"
    )
    assert not (run / "report.html").exists()
