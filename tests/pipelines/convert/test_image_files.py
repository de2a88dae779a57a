"""Folders with links, loops, pipes, devices and unusual names."""

import os
import socket

import numpy as np
import pytest
from PIL import Image

from fastssl.encoder import list_images
from pipelines.beton import BetonReader, inspect
from pipelines.contact_sheet import contact_sheet
from pipelines.convert import convert
from pipelines.convert.image_files import ImageFiles
from pipelines.errors import DataError
from pipelines.files import read_file


def save(path, level=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 5, 3), level, np.uint8)).save(path, "PNG")
    return path


def converted(folder, out, capsys, **options):
    report = convert("folder", str(folder), out, labels="folders", **options)
    reader = BetonReader(report.out)
    levels = [int(reader.decode(i)[0, 0, 0]) for i in range(reader.num_samples)]
    return levels, reader, capsys.readouterr().out


def test_loops_and_crossing_links_end(tmp_path, capsys):
    images = tmp_path / "images"
    save(images / "a" / "1.png", 10)
    save(images / "b" / "deep" / "2.png", 20)
    (images / "a" / "up").symlink_to("..")
    (images / "a" / "across").symlink_to("../b")
    (images / "b" / "across").symlink_to("../a")
    (images / "loop").symlink_to(".")
    (images / "a" / "self").symlink_to("self")
    levels, reader, out = converted(images, tmp_path / "x.beton", capsys)
    assert levels == [10, 20]  # a link from a to b does not take b's images
    assert reader.labels.tolist() == [0, 1]
    assert reader.class_names == ["a", "b"]
    assert f"{images}: 4 further names (links) of files or folders were left out: each counts once" in out


def test_names_of_one_file_count_once(tmp_path, capsys):
    images = tmp_path / "images"
    first = save(images / "m" / "1.png", 10)
    os.link(first, images / "m" / "2.png")
    (images / "a").mkdir()
    (images / "a" / "1.png").symlink_to(first)  # before m in sorted order, but a link
    outside = save(tmp_path / "elsewhere" / "3.png", 30)
    (images / "a" / "3.png").symlink_to(outside)
    (images / "z").symlink_to(outside.parent)
    levels, reader, out = converted(images, tmp_path / "x.beton", capsys)
    assert levels == [10, 30]
    assert reader.labels.tolist() == [1, 2]  # the file of the folder z, not the link in a
    assert "3 further names" in out


def test_links_to_elsewhere_are_followed(tmp_path, capsys):
    store = tmp_path / "store"
    save(store / "blob", 10)
    save(store / "more" / "2.png", 20)
    images = tmp_path / "images" / "a"
    images.mkdir(parents=True)
    (images / "1.png").symlink_to(store / "blob")
    (images / "more").symlink_to(store / "more")
    levels, _, out = converted(images.parent, tmp_path / "x.beton", capsys)
    assert levels == [10, 20]
    assert "left out" not in out
    assert [path.name for path in list_images(images)[0]] == ["1.png", "2.png"]


def test_the_order_of_directory_entries_does_not_matter(tmp_path, monkeypatch):
    for name in ("c", "a", "b"):
        first = save(tmp_path / "images" / name / f"{name}.png")
        os.link(first, tmp_path / "images" / name / "again.png")
    roots = [str(tmp_path / "images")]
    expected = ImageFiles().find(roots)
    scan = os.scandir

    class Reversed(list):
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(os, "scandir", lambda path: Reversed(sorted(scan(path), key=lambda e: e.name, reverse=True)))
    assert ImageFiles().find(roots) == expected
    assert len(expected[0]) == 3


def test_pipes_sockets_and_devices_are_skipped(tmp_path, capsys):
    images = tmp_path / "images"
    save(images / "1.png", 10)
    os.mkfifo(images / "pipe.png")
    (images / "zero.jpg").symlink_to("/dev/zero")
    (images / "null").symlink_to("/dev/null")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(images / "socket.png"))
        levels, _, out = converted(images, tmp_path / "x.beton", capsys)
    assert levels == [10]
    assert f"{images}: 4 sockets, pipes or devices were left out" in out


@pytest.mark.parametrize("kind", ["csv", "npz", "embed"])
def test_pipes_and_devices_elsewhere(tmp_path, kind):
    os.mkfifo(tmp_path / "pipe.png")
    if kind == "csv":
        for row, reason in (("pipe.png", "not a regular file"), ("/dev/zero", "not a regular file")):
            (tmp_path / "list.csv").write_text(f"path\n{row}\n")
            with pytest.raises(DataError, match=reason):
                convert("csv", str(tmp_path / "list.csv"), tmp_path / "x.beton", on_error="fail")
    elif kind == "npz":
        with pytest.raises(DataError, match=r"pipe\.png: .*not a regular file"):
            convert("npz", str(tmp_path / "pipe.png"), tmp_path / "x.beton")
    else:
        assert list_images(tmp_path)[0] == []


def test_a_file_is_read_up_to_a_limit(tmp_path):
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(10 << 40)
    with pytest.raises(OSError, match=r"10,995,116,277,760 bytes; at most 268,435,456 are read"):
        read_file(tmp_path / "huge.png")
    with pytest.raises(DataError, match=r"huge\.png: 10,995,116,277,760 bytes"):
        convert("folder", str(tmp_path), tmp_path / "x.beton", on_error="fail")


def test_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
    save(tmp_path / "images" / "a" / "1.png")

    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"images: cannot be read \(Permission denied\)"):
        convert("folder", str(tmp_path / "images"), tmp_path / "x.beton")


def test_names_that_are_not_utf8(tmp_path, capsys):
    """Their images are converted; the sidecar holds the class's name as it is, and what is printed is escaped."""
    images = tmp_path / os.fsdecode(b"caf\xe9")
    save(images / os.fsdecode(b"\xff\x1b[2J") / os.fsdecode(b"\xfe.png"), 10)
    (images / os.fsdecode(b"\xff\x1b[2J") / "bad\n\u202e.png").write_bytes(b"bad")
    levels, reader, _ = converted(images, tmp_path / "x.beton", capsys, on_error="skip")
    assert levels == [10]
    assert reader.class_names == ["\udcff\x1b[2J"]
    errors = (tmp_path / "x.beton.errors.txt").read_text()
    assert errors.startswith(f"{tmp_path}/caf\\udce9/\\udcff\\x1b[2J/bad\\n\\u202e.png\tnot an image")
    assert errors.count("\n") == 1
    contact_sheet(reader, tmp_path / "sheet.png")
    assert "caf\\udce9" in inspect(report := tmp_path / "x.beton")["source"], report


@pytest.mark.parametrize("row", ["x" * 300 + ".png", "a\0b.png", "../" * 2000 + "x.png", "\x1b[2J.png"])
def test_paths_that_cannot_be(tmp_path, row):
    (tmp_path / "list.csv").write_text(f"path\n{row}\n")
    with pytest.raises(DataError, match=r"name|No such file") as caught:
        convert("csv", str(tmp_path / "list.csv"), tmp_path / "x.beton", on_error="fail")
    assert str(caught.value).isprintable()
    assert not (tmp_path / "x.beton.partial").exists()


def test_what_a_command_prints(tmp_path, in_process):
    images = tmp_path / "\x1b[31m\nfolder"
    save(images / "class\u202e\x1b[2J" / "1.png")
    out = tmp_path / "\x1b]0;x.beton"
    for arguments in (["convert", "--from", "folder", images, out], ["verify", out], ["inspect", out]):
        done = in_process(*arguments)
        assert done.returncode == 0, done.stderr
        assert all(line.isprintable() for line in (done.stdout + done.stderr).split("\n"))
    for arguments in (["verify", "\x1b[2J"], ["verify", "x" * 300], ["convert", "--from", "folder", "x" * 300, out]):
        done = in_process(*arguments)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert done.stderr.strip().isprintable()
