"""WebDataset archives: samples, labels, streams, and archives that are damaged or hostile."""

import bz2
import gzip
import io
import json
import lzma
import os
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.beton import BetonReader
from pipelines.convert import convert, convert_shards
from pipelines.convert.webdataset import count_archive, read_archive
from pipelines.errors import DataError


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(60, 200, (3, 3, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((70, 60), Image.Resampling.BILINEAR).save(file, "JPEG")
    return file.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # pyright: ignore
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def samples(first: int, num: int) -> list[tuple[str, bytes]]:
    found = []
    for k in range(first, first + num):
        found += [(f"a/{k:04d}.cls", b"%d\n" % (k % 3)), (f"a/{k:04d}.jpg", jpeg(k)), (f"a/{k:04d}.txt", b"words")]
    return found


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_archives_in_order_with_bytes_and_labels(tmp_path, mode):
    for k in range(3):
        write_tar(tmp_path / f"x-{k:03d}.tar", samples(4 * k, 4), mode)
    report = convert("webdataset", f"{tmp_path}/x-{{000..002}}.tar", tmp_path / "x.beton")
    assert (report.num_images, report.num_passed) == (12, 12)
    reader = BetonReader(report.out)
    assert [reader.image_bytes(k).tobytes() for k in range(12)] == [jpeg(k) for k in range(12)]
    assert reader.labels.tolist() == [k % 3 for k in range(12)]


def test_samples_begin_anywhere(tmp_path):
    archive = str(write_tar(tmp_path / "x.tar", samples(0, 6)))
    assert count_archive(archive) == (6, 0)
    for start in range(6):
        for stop in range(start, 7):
            found = list(read_archive(archive, start, stop))
            assert [item.image for item in found] == [jpeg(k) for k in range(start, stop)]
            assert [item.label for item in found] == [k % 3 for k in range(start, stop)]


def test_labels_and_members_of_other_kinds(tmp_path):
    members = [
        ("a.jpg", jpeg(0)),
        ("a.json", json.dumps({"label": 5}).encode()),
        ("b.json", b'{"width": 3}'),
        ("b.jpeg", jpeg(1)),
        ("c.txt", b"no image"),
        ("d.seg.png", b"a mask"),  # the part is seg.png, not png
        ("d.JPG", jpeg(2)),
        (".hidden.jpg", jpeg(3)),
    ]
    report = convert("webdataset", str(write_tar(tmp_path / "x.tar", members)), tmp_path / "x.beton")
    reader = BetonReader(report.out)
    assert [reader.image_bytes(k).tobytes() for k in range(3)] == [jpeg(k) for k in range(3)]
    assert reader.labels.tolist() == [5, -1, -1]
    assert report.num_ignored == 1


def test_members_never_touch_the_file_system(tmp_path):
    path = tmp_path / "in" / "x.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for name in ("../../escape.jpg", str(tmp_path / "absolute.jpg")):
            member = tarfile.TarInfo(name)
            member.size = len(jpeg(0))
            tar.addfile(member, io.BytesIO(jpeg(0)))
        for name, kind in (("link.jpg", tarfile.SYMTYPE), ("hard.jpg", tarfile.LNKTYPE), ("dev.jpg", tarfile.CHRTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    before = set(tmp_path.rglob("*"))
    report = convert("webdataset", str(path), tmp_path / "in" / "x.beton")
    assert report.num_images == 2
    assert set(tmp_path.rglob("*")) - before == {
        report.out,
        *map(report.out.with_name, ("x.beton.json", "x.beton.hashes", "x.beton.rows")),
    }


def test_damaged_archives(tmp_path):
    whole = write_tar(tmp_path / "whole.tar", samples(0, 4)).read_bytes()
    compressed = write_tar(tmp_path / "whole.tar.gz", samples(0, 4), "w:gz").read_bytes()
    damaged = bytearray(whole)
    with tarfile.open(tmp_path / "whole.tar") as tar:
        offset = tar.getmembers()[4].offset
    damaged[offset : offset + 100] = b"x" * 100
    bad = tmp_path / "bad.tar"
    for content in (b"", b"hello", whole[:3000], whole[: offset + 100], bytes(damaged), compressed[:-500]):
        bad.write_bytes(content)
        with pytest.raises(DataError, match=r"bad\.tar: (not a whole tar|no images)") as caught:
            convert("webdataset", str(bad), tmp_path / "x.beton")
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("x.beton*"))


def test_bad_labels_are_one_line(tmp_path):
    for name, data in (("a.cls", b"cat"), ("a.cls", b"-5"), ("a.json", b"{"), ("a.json", b'{"label": "cat"}')):
        write_tar(tmp_path / "x.tar", [("a.jpg", jpeg(0)), (name, data)])
        with pytest.raises(DataError, match=r"x\.tar/a.*label"):
            convert("webdataset", str(tmp_path / "x.tar"), tmp_path / "x.beton")


def test_a_member_that_claims_gigabytes_is_not_read(tmp_path):
    path = tmp_path / "x.tar"
    member = tarfile.TarInfo("a.jpg")
    member.size = 3 << 30
    path.write_bytes(member.tobuf())
    with path.open("r+b") as file:
        os.truncate(file.fileno(), (3 << 30) + 4096)  # a hole
    with pytest.raises(DataError, match="a member of 3,221,225,472 bytes"):
        convert("webdataset", str(path), tmp_path / "x.beton")


def test_shards_of_archives_are_the_whole(tmp_path):
    for k in range(2):
        write_tar(tmp_path / f"{k}.tar", samples(5 * k, 5))
    reports = convert_shards("webdataset", str(tmp_path), tmp_path / "x.beton", num_shards=3)
    assert [report.out.name for report in reports] == [f"x-{k:05d}-of-00003.beton" for k in range(3)]
    assert [report.num_images for report in reports] == [3, 3, 4]
    found = [BetonReader(report.out).image_bytes(i).tobytes() for report in reports for i in range(report.num_images)]
    assert found == [jpeg(k) for k in range(10)]


def member(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, data: bytes = b"") -> bytes:
    """A member as it stands in an archive; its size may be invented."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size or len(data)
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE)


def refused(path: Path, content: bytes, reason: str) -> None:
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{path.name}: not a whole tar archive .*{reason}") as caught:
        convert("webdataset", str(path), path.with_name("x.beton"))
    assert str(caught.value).isprintable()
    assert not list(path.parent.glob("x.beton*"))


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_names_of_gigabytes(tmp_path, kind):
    for size in (3 << 30, -4096):
        refused(tmp_path / "x.tar", member("x", kind, size) + member("a.jpg", data=jpeg(0)), "a header of .* bytes")
        compressed = gzip.compress(member("x", kind, size) + member("a.jpg", data=jpeg(0)))
        refused(tmp_path / "x.tar.gz", compressed, "a header of .* bytes")


def test_a_size_below_zero_does_not_loop(tmp_path):
    record = b"14 size=-1536\n"  # back to this record's own header
    content = member("x", tarfile.XHDTYPE, data=record) + member("a.jpg", data=jpeg(0))
    refused(tmp_path / "x.tar", member("b.jpg", data=jpeg(1)) * 9 + content, "negative size")


def test_headers_that_only_announce_others(tmp_path):
    chain = member("x", tarfile.GNUTYPE_LONGNAME, data=b"name") * 2000
    refused(tmp_path / "x.tar", chain + member("a.jpg", data=jpeg(0)), "recursion")


def test_a_wrong_checksum_of_a_compressed_archive(tmp_path):
    whole = write_tar(tmp_path / "whole.tar.gz", samples(0, 4), "w:gz").read_bytes()
    refused(tmp_path / "x.tar.gz", whole[:-8] + b"xxxx" + whole[-4:], "CRC")
    refused(tmp_path / "x.tar.gz", whole[:-4] + b"xxxx", "length")
    refused(tmp_path / "x.tar.gz", whole[:-4], "ended before")


def test_an_archive_that_never_ends(tmp_path):
    zeros = gzip.compress(bytes(1 << 20)) * 100
    refused(tmp_path / "x.tar.gz", gzip.compress(member("a.jpg", data=jpeg(0))) + zeros, "bytes after its end")


def test_a_plain_archive_that_looks_compressed(tmp_path):
    write_tar(tmp_path / "x.tar", [("BZh9.jpg", jpeg(0)), ("a.jpg", jpeg(1))])
    assert convert("webdataset", str(tmp_path / "x.tar"), tmp_path / "x.beton").num_images == 2


def test_keys_that_steer_a_terminal(tmp_path):
    write_tar(tmp_path / "x.tar", [("a\n\x1b[2J\u202e.jpg", b"bad"), ("b.jpg", jpeg(0))])
    for options in ({}, {"on_error": "fail"}):
        with pytest.raises(DataError, match="not an image") as caught:
            convert("webdataset", str(tmp_path / "x.tar"), tmp_path / "x.beton", **options)
        assert str(caught.value).isprintable()
    convert("webdataset", str(tmp_path / "x.tar"), tmp_path / "x.beton", on_error="skip")
    (line,) = (tmp_path / "x.beton.errors.txt").read_text().splitlines()
    assert line.startswith(f"{tmp_path}/x.tar/a\\n\\x1b[2J\\u202e\tnot an image")


def sparse_members() -> dict[str, bytes]:
    """An image with a hole in each of tar's formats: GNU's own, and pax 0.0, 0.1 and 1.0."""
    image = member("a.jpg", data=jpeg(0))
    records = ("GNU.sparse.size=5000", "GNU.sparse.map=0,1", "GNU.sparse.major=1\n22 GNU.sparse.minor=0")
    pax = {record: member("x", tarfile.XHDTYPE, data=pax_record(record)) + image for record in records}
    return pax | {"type S": member("a.jpg", tarfile.GNUTYPE_SPARSE, data=jpeg(0))}


def pax_record(text: str) -> bytes:
    return b"%d %s\n" % (len(str(len(text) + 4)) + len(text.partition("\n")[0]) + 2, text.encode())


@pytest.mark.parametrize("kind", sparse_members())
def test_members_with_holes_are_refused_not_left_out(tmp_path, kind):
    content = member("b.jpg", data=jpeg(1)) + sparse_members()[kind]
    refused(tmp_path / "x.tar", content, "a sparse member; pack the images without --sparse")
    refused(tmp_path / "x.tar.gz", gzip.compress(content), "a sparse member; pack the images without --sparse")


def test_what_tar_writes_with_holes(tmp_path):
    with (tmp_path / "a.jpg").open("wb") as file:
        file.write(jpeg(0))
        file.truncate(1 << 20)
    for format_ in ("gnu", "posix"):
        command = ["tar", "--sparse", f"--format={format_}", "-C", tmp_path, "-cf", tmp_path / "x.tar", "a.jpg"]
        subprocess.run(command, check=True)
        refused(tmp_path / "x.tar", (tmp_path / "x.tar").read_bytes(), "a sparse member")


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress], ids=["gz", "bz2", "xz"])
def test_a_bomb_is_refused_before_it_is_whole(tmp_path, compress, monkeypatch):
    monkeypatch.setattr("pipelines.files.MAX_INFLATED_BYTES", 4 << 20)
    zeros = member("b.txt", data=bytes(16 << 20))
    (tmp_path / "x.tar").write_bytes(compress(member("a.jpg", data=jpeg(0)) + zeros + bytes(1024)))
    with pytest.raises(DataError, match=r"x\.tar: .* bytes of it become [45],.* or more, and at most 100 times"):
        convert("webdataset", str(tmp_path / "x.tar"), tmp_path / "x.beton")
    assert not list(tmp_path.glob("x.beton*"))


def test_global_headers_without_end(tmp_path):
    headers = [member("x", tarfile.XGLTYPE, data=pax_record(f"key{k:08}=1")) + member("a.txt") for k in range(1200)]
    refused(tmp_path / "x.tar", b"".join(headers) + member("a.jpg", data=jpeg(0)), "more than 1,000 global headers")
