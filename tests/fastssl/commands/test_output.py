"""--json: JSON alone on stdout, whatever else is printed on the way; --wide: all columns."""

import argparse
import json
import os
import subprocess

import pytest

from fastssl.cli import main
from fastssl.commands.output import print_json, print_report
from fastssl.tracking.report import Report
from pipelines.convert import convert
from tests.helpers.fault_server import FaultServer
from tests.helpers.shards import write_pictures


@pytest.fixture
def beton(tmp_path):
    path = tmp_path / "digits.beton"
    convert("digits", None, path, split="test")
    return path


def test_json_is_alone_on_stdout(capfd):
    def find():
        print("from Python")
        os.write(1, b"from C\n")
        subprocess.run(["echo", "from a program"], check=True)
        return {"a": 1}

    print_json(find)
    out, err = capfd.readouterr()
    assert json.loads(out) == {"a": 1}
    assert {"from Python", "from C", "from a program"} <= set(err.splitlines())
    print("and then stdout is as before")
    assert capfd.readouterr().out == "and then stdout is as before\n"


def test_another_process_than_the_one_with_the_result_prints_nothing(capfd):
    print_json(lambda: None)
    assert capfd.readouterr() == ("", "")


def test_stdout_is_as_before_after_an_error(capfd):
    with pytest.raises(KeyError):
        print_json(lambda: {}["a"])
    print("x")
    assert capfd.readouterr() == ("x\n", "")


@pytest.mark.parametrize(
    ("columns", "is_wide", "shown"), [("20", False, False), ("20", True, True), ("99", False, True)]
)
def test_the_table_has_the_width_of_the_terminal(columns, is_wide, shown, monkeypatch, capfd):
    monkeypatch.setenv("COLUMNS", columns)
    report = Report(values={}, rows=[{"a": 1, "b": "x" * 30}], columns={"a": "a", "b": "b"}, details=("b",))
    print_report(argparse.Namespace(json=False, wide=is_wide), lambda: report)
    out = capfd.readouterr().out
    assert ("x" * 30 in out) == shown
    assert ("not shown: b" in out) != shown


def test_inspect_shows_what_a_person_asks_for(beton, tmp_path, capfd):
    assert main(["inspect", str(beton), "--out", str(tmp_path / "sheet.png")]) == 0
    lines = dict(line.split("  ", 1) for line in capfd.readouterr().out.splitlines())
    shown = {name: value.strip() for name, value in lines.items()}
    assert shown["images"] == "500 (0 JPEG, 500 raw)"
    assert shown["labels"] == "yes"
    assert shown["classes"].startswith("10, 48 to 51 images each")
    assert shown["width"] == "8 px, median 8"
    assert shown["from"] == "scikit-learn digits, test"
    assert "recorded at the conversion" in shown["checksum"]
    sidecar = beton.parent / f"{beton.name}.json"
    entries = json.loads(sidecar.read_text())
    assert entries["duplicates"] == {"copies": 0, "similar": 0}
    for entry, line in (
        (entries["duplicates"], "0 copies of other images, 0 more look almost like another"),
        ({"copies": 3, "similar": 2}, "3 copies of other images, 2 more look almost like another"),
        ({"copies": 1234, "similar": None}, "1,234 copies of other images, similar ones not counted"),
        (None, "unknown: no sidecar has their number"),
    ):
        sidecar.write_text(json.dumps(entries | {"duplicates": entry}))
        assert main(["inspect", str(beton), "--out", str(tmp_path / "sheet.png")]) == 0
        [found] = [each for each in capfd.readouterr().out.splitlines() if each.startswith("duplicates ")]
        assert found.split(None, 1)[1] == line
    sidecar.unlink()
    assert main(["inspect", str(beton), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert (found["num_images"], found["num_labelled"], found["checksum"]) == (500, 500, "none")


def test_inspect_and_verify_take_a_data_set_of_many_shards(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("pipelines.beton.writer.PAGE_BYTES", 4096)
    folder, here = tmp_path / "set", tmp_path / "here"
    write_pictures(folder)
    here.mkdir()
    monkeypatch.chdir(here)
    for place in (folder, folder / "dataset.json", f"{folder}/x-*.beton"):
        assert main(["inspect", str(place)]) == 0
        shown = dict(line.split("  ", 1) for line in capfd.readouterr().out.splitlines())
        assert shown["shards"].strip() == "3"
        assert shown["images"].strip() == "24 (24 JPEG, 0 raw)"
        assert shown["classes"].strip() == "2, 12 images each"
        assert shown["height x width"].strip() == "40 x 44 px, all"
        (tmp_path / "set.png").rename(tmp_path / "old.png")  # next to the folder
    with FaultServer(folder) as server:
        assert main(["inspect", f"{server.url}/", "--json"]) == 0
        fetched = [each.path for each in server.requests if each.range and each.path.endswith(".beton")]
        assert 0 < len(fetched) <= 24
        found = json.loads(capfd.readouterr().out)
        assert found["class_counts"] == {"cat": 12, "dog": 12}
        assert found["digest"] == json.loads((folder / "dataset.json").read_text())["digest"]
        assert found["path"] == server.url
        assert (here / "127.0.0.1.png").exists()  # in the current folder
        assert main(["verify", server.url, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["num_images"] == 24
    (folder / "dataset.json").unlink()
    assert main(["inspect", str(folder)]) == 2
    line = capfd.readouterr().err
    assert line.count("\n") == 1
    assert "`fastssl manifest " in line


def test_verify_and_convert_as_json(beton, tmp_path, capfd):
    assert main(["verify", str(beton), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert (found["num_images"], found["num_raw"], len(found["digest"])) == (500, 500, 64)
    again = ["convert", "--from", "digits", "--split", "test", str(tmp_path / "b.beton"), "--json"]
    assert main(again) == 0
    [file] = json.loads(capfd.readouterr().out)["files"]
    assert (file["out"], file["num_images"], file["errors_path"]) == (str(tmp_path / "b.beton"), 500, None)
    assert main(again) == 2  # it exists
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("fastssl: error: ")
