"""`fastssl manifest` at the command line."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastssl.cli import main
from pipelines.remote import RemoteStore
from tests.helpers.fault_server import FaultServer
from tests.helpers.s3 import s3_server, use
from tests.helpers.shards import contents, put_all, write_shards


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


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3_server() as url:
        yield url


def test_s3_gets_a_manifest_and_the_rows_it_lacks(folder, endpoint, monkeypatch, capsys):
    use(monkeypatch, endpoint)
    url, rows = "s3://bucket/many/set", folder / "x-00001-of-00003.beton.rows"
    expected = rows.read_bytes()
    rows.unlink()
    put_all(folder, url)
    assert main(["manifest", f"{url}/", "--verify"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{url}/dataset.json: 3 shards, 18 images (9 JPEG, 9 raw), ")
    assert said.endswith("rows files written: 1; all images match their checksums; written\n")
    with RemoteStore(url) as store:
        assert store.get_whole(rows.name, 1000)[0] == expected
        assert all(shard["etag"] for shard in json.loads(store.get_whole("dataset.json", 10_000)[0])["shards"])
        assert main(["manifest", f"{url}/dataset.json", "--check"]) == 0
        assert capsys.readouterr().out.endswith("; matches the files\n")
        store.put("x-00002-of-00003.beton", (folder / "x-00002-of-00003.beton").read_bytes() + b"x")
    assert main(["manifest", url, "--check"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "x-00002-of-00003.beton has" in line


def test_a_copy_of_a_local_data_set_matches_its_manifest(folder, endpoint, monkeypatch, capsys):
    use(monkeypatch, endpoint)
    assert main(["manifest", str(folder)]) == 0
    put_all(folder, "s3://bucket/copy")
    assert main(["manifest", "s3://bucket/copy", "--check", "--verify"]) == 0
    assert capsys.readouterr().err == ""


def test_a_web_server_without_a_list(folder, capsys):
    with FaultServer(folder) as server:
        server.always("", "405")
        assert main(["manifest", server.url]) == 2
        line = capsys.readouterr().err
        assert (
            line == f"fastssl: error: {server.url}: the server has no list of its files (no WebDAV): name each file\n"
        )
        assert main(["manifest", str(folder)]) == 0
        assert main(["manifest", server.url, "--check"]) == 0  # the manifest names them
        (folder / "x-00001-of-00003.beton.rows").unlink()
        assert main(["manifest", server.url, "--check"]) == 2
        assert "x-00001-of-00003.beton.rows: missing" in capsys.readouterr().err


def test_an_unknown_scheme_is_one_line(capsys):
    assert main(["manifest", "ftp://host/set"]) == 2
    assert capsys.readouterr().err.startswith("fastssl: error: ftp:// is no address of remote objects")
