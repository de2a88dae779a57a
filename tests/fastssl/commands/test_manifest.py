"""`fastssl manifest` at the command line."""

import json
from pathlib import Path

import pytest

from fastssl.cli import main
from tests.helpers.shards import contents, write_shards


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr("pipelines.beton.writer.PAGE_BYTES", 4096)
    write_shards(tmp_path / "set", class_names=["a", "b", "c"])
    return tmp_path / "set"


def test_writes_and_says_what_it_wrote(folder, capsys):
    (folder / "x-00001-of-00003.beton.rows").unlink()
    assert main(["manifest", str(folder)]) == 0
    said = capsys.readouterr().out
    num_bytes = sum(path.stat().st_size for path in folder.glob("*.beton"))
    assert said == (
        f"{folder}/dataset.json: 3 shards, 18 images (9 JPEG, 9 raw), {num_bytes:,} bytes, 3 classes; "
        "rows files written: 1; written\n"
    )
    assert main(["manifest", str(folder), "--verify"]) == 0
    assert capsys.readouterr().out.endswith(" 3 classes; all images match their checksums; written\n")


def test_json(folder, capsys):
    assert main(["manifest", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.pop("digest") == json.loads((folder / "dataset.json").read_text())["digest"]
    num_bytes, image_bytes = found.pop("num_bytes"), found.pop("image_bytes")
    assert num_bytes == sum(path.stat().st_size for path in folder.glob("*.beton"))
    assert 0 < image_bytes < num_bytes
    assert found == {
        "path": f"{folder}/dataset.json",
        "num_shards": 3,
        "num_images": 18,
        "num_raw": 9,
        "num_classes": 3,
        "num_rows_written": 0,
        "num_images_read": 0,
    }


def test_check_writes_nothing(folder, capsys):
    assert main(["manifest", str(folder), "--check"]) == 2
    assert capsys.readouterr().err.endswith("dataset.json: no such file; write it with `fastssl manifest`\n")
    assert main(["manifest", str(folder)]) == 0
    before = contents(folder)
    capsys.readouterr()
    assert main(["manifest", str(folder), "--check"]) == 0
    assert capsys.readouterr().out.endswith(" 3 classes; matches the files\n")
    with (folder / "x-00002-of-00003.beton").open("ab") as file:
        file.write(b"x")
    assert main(["manifest", str(folder), "--check"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "x-00002-of-00003.beton has" in line
    del before["x-00002-of-00003.beton"]
    assert {name: found for name, found in contents(folder).items() if name in before} == before


def test_no_folder_is_one_line(tmp_path, capsys):
    assert main(["manifest", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err == f"fastssl: error: {tmp_path}/none: no such folder\n"


def test_a_wrong_option_names_the_right_one(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["manifest", str(tmp_path), "--verfy"])
    assert "did you mean --verify" in capsys.readouterr().err
