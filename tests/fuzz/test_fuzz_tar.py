"""Damaged and invented tar archives."""

import bz2
import gzip
import io
import lzma
import tarfile

import numpy as np
import pytest
from PIL import Image

from tests.helpers.fuzz import cases, mutate_bytes, num_cases
from tests.helpers.fuzz_convert import convert_or_refuse

pytestmark = pytest.mark.timeout(300 + num_cases() // 2)

COMPRESS = (bytes, gzip.compress, bz2.compress, lzma.compress)
TYPES = b"\001234567gxLKSDXz"
SIZES = (0, 1, 511, 512, -1, -512, -1536, 1 << 20, 3 << 30, 1 << 62)
RECORDS = (
    *("size=-1536", "size=99999999999", "path=" + "x/" * 3000, "path=\x1b[2J\n", "GNU.sparse.map=0,1"),
    *("GNU.sparse.major=1\n22 GNU.sparse.minor=0", "hdrcharset=BINARY", "mtime=x", "path=\0"),
)


def png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((4, 5, 3), 7, np.uint8)).save(file, "PNG")
    return file.getvalue()


def member(name: str, data: bytes, kind: bytes = tarfile.REGTYPE, size: int | None = None) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(data) if size is None else size
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE)


def samples() -> list[bytes]:
    return [member(f"a/{k}.{part}", data) for k in range(3) for part, data in (("png", png()), ("cls", b"1"))]


def test_bytes(tmp_path):
    plain = b"".join(samples()) + bytes(1024)
    for case in cases("tar bytes", fraction=0.35):
        compress = COMPRESS[int(case.rng.integers(4))]
        data = compress(plain)
        data = mutate_bytes(data, case.rng) if case.rng.integers(2) else compress(mutate_bytes(plain, case.rng))
        (tmp_path / "x.tar").write_bytes(data)
        convert_or_refuse(case, "webdataset", tmp_path / "x.tar")


def test_headers(tmp_path):
    """Headers of odd types, sizes and records, with the right checksums."""
    for case in cases("tar headers", fraction=0.4):
        rng, parts = case.rng, samples()
        for _ in range(int(rng.integers(1, 4))):
            at = int(rng.integers(len(parts) + 1))
            record = RECORDS[int(rng.integers(len(RECORDS)))].encode()
            length = len(record) + 1 + len(str(len(record) + 4))
            data = (b"%d " % (length + 1) + record + b"\n") if rng.integers(2) else rng.bytes(int(rng.integers(600)))
            kind = TYPES[k : k + 1] if (k := int(rng.integers(len(TYPES)))) else tarfile.XHDTYPE
            size = None if rng.integers(2) else SIZES[int(rng.integers(len(SIZES)))]
            parts.insert(at, member("x\n\x1b[2J.png", data, kind, size) * int(rng.choice([1, 1, 3, 1200])))
        data = COMPRESS[int(rng.integers(2))](b"".join(parts))
        (tmp_path / "x.tar").write_bytes(data)
        convert_or_refuse(case, "webdataset", tmp_path / "x.tar")


def test_bombs(tmp_path, monkeypatch):
    """Streams that follow one another, some of which become a thousand times their size."""
    monkeypatch.setattr("pipelines.files.MAX_INFLATED_BYTES", 1 << 20)
    zeros = [[compress(bytes(size)) for size in (1024, 3 << 20)] for compress in COMPRESS]
    for case in cases("tar bombs", fraction=0.05):
        rng, kind = case.rng, int(case.rng.integers(1, 4))
        parts = [COMPRESS[kind](part) for part in samples()]
        for _ in range(int(rng.integers(1, 3))):
            size = SIZES[int(rng.integers(len(SIZES)))]
            header = COMPRESS[kind](member("b.txt", b"", size=size)) if rng.integers(2) else b""
            parts.insert(int(rng.integers(len(parts) + 1)), header + zeros[kind][int(rng.integers(2))])
        (tmp_path / "x.tar").write_bytes(b"".join(parts))
        convert_or_refuse(case, "webdataset", tmp_path / "x.tar")


@pytest.mark.parametrize("part", ["cls", "json"])
def test_labels(tmp_path, part):
    whole = {"cls": b"12", "json": b'{"label": 12, "caption": ["a", {"b": 1}]}'}[part]
    for case in cases(f"tar labels {part}", fraction=0.1):
        data = member("a.png", png()) + member(f"a.{part}", mutate_bytes(whole, case.rng))
        (tmp_path / "x.tar").write_bytes(data)
        convert_or_refuse(case, "webdataset", tmp_path / "x.tar")
