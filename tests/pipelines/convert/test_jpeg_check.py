"""The check of JPEGs without decoding: what it calls clean, libjpeg decodes without a warning, to the same pixels."""

import io
import os
import random
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.convert import convert, images
from pipelines.engines import jpeg_check
from pipelines.engines.jpeg_check import JpegChecker, why_no_jpeg_check
from pipelines.engines.turbojpeg import OK, JpegDecoder, decode_jpeg, decode_small_jpeg
from tests.pipelines.engines.test_jpeg_region import encode, noisy

_440, _411 = 4, 5  # TurboJPEG's TJSAMP_440 and TJSAMP_411; Pillow writes the others
SOI, EOI = b"\xff\xd8", b"\xff\xd9"
ADOBE = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0"  # its last byte, the transform, is to follow
PLAIN: dict[str, dict | int] = {
    "444": {"subsampling": 0},
    "422": {"subsampling": 1},
    "420": {"subsampling": 2},
    "440": _440,
    "grey": {},
    "optimised tables": {"optimize": True},
    "restart markers": {"restart_marker_blocks": 3},
    "many restart markers": {"restart_marker_blocks": 1, "subsampling": 2},
    "restart markers, grey": {"restart_marker_blocks": 2},
    "EXIF, ICC and comment": {"exif": b"Exif\0\0" + bytes(90), "icc_profile": bytes(range(200)), "comment": b"text"},
}
OTHER: dict[str, dict | int] = {"progressive": {"progressive": True}, "411": _411}
MAX_WHOLE_PX = 20_000  # of a larger image, every coefficient is read, but only 1/8 of its size is decoded
SIZES = [(1, 1), (5, 9), (16, 16), (17, 33), (64, 97), (130, 75)]


def make(kind: str, height_px: int, width_px: int, quality: int = 85, seed: int = 0) -> bytes:
    pixels = noisy(height_px, width_px, seed)
    return encode(pixels[..., 0] if "grey" in kind else pixels, (PLAIN | OTHER)[kind], quality)


class Judge:
    """Compares the check with libjpeg."""

    def __init__(self) -> None:
        self._checker, self._decoder = JpegChecker(), JpegDecoder()

    def is_clean(self, data: bytes, height_px: int, width_px: int) -> bool:
        """The verdict; if it is clean, libjpeg has decoded the file without a warning, to the same pixels."""
        shape = -(-height_px // 8), -(-width_px // 8), 3
        small, array = np.full(shape, 7, np.uint8), np.frombuffer(data, np.uint8)
        if not self._checker.is_clean(array, height_px, width_px, small):
            assert (small == 7).all()
            return False
        self._decoder.reserve(height_px * width_px * 3)
        pixels, handle = self._decoder.pixels, self._decoder.handle
        if height_px * width_px < MAX_WHOLE_PX:
            assert decode_jpeg(handle, array, height_px, width_px, pixels) == OK, self._decoder.last_message()
        assert decode_small_jpeg(handle, array, height_px, width_px, 8, pixels) == OK, self._decoder.last_message()
        if min(height_px, width_px) > 4:  # below, TurboJPEG takes another scale that gives this size
            np.testing.assert_array_equal(pixels[: small.size].reshape(shape), small)
        return True

    def close(self) -> None:
        self._decoder.close()


@pytest.fixture
def judge() -> Iterator[Judge]:
    judge = Judge()
    yield judge
    judge.close()


@pytest.fixture(scope="module")
def photographs() -> dict[str, bytes]:
    """The 500 photographs if they are there, else some made ones."""
    archive = Path(os.environ.get("FASTSSL_TEST_DATA", "")) / "imagenet-sample-500.tar"
    if not archive.is_file():
        return {f"{kind} {k}": make(kind, 260 + k, 300 - k, seed=k) for k, kind in enumerate(PLAIN)}
    found = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            file = tar.extractfile(member)
            if file is not None:
                found[member.name] = file.read()
    return found


def size_of(data: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(data)) as image:
        return image.height, image.width


def segments(data: bytes | bytearray) -> list[tuple[int, int, int]]:
    """(start, end, marker) of each segment of the headers."""
    found, at = [], 2
    while not found or found[-1][2] != 0xDA:
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        found.append((at, end, data[at + 1]))
        at = end
    return found


def segment(data: bytes | bytearray, marker: int) -> tuple[int, int]:
    return next((start, end) for start, end, found in segments(data) if found == marker)


def test_it_is_compiled():
    assert why_no_jpeg_check() is None


def test_photographs_are_clean(photographs, judge):
    verdicts = Counter(judge.is_clean(data, *size_of(data)) for data in photographs.values())
    assert verdicts[True] >= 0.98 * len(photographs)


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_files_are_clean(kind, judge):
    for height_px, width_px in SIZES:
        for quality in (1, 30, 75, 95, 100):
            if "EXIF" in kind and height_px * width_px < 1000:
                continue  # Pillow cannot write these
            data = make(kind, height_px, width_px, quality)
            assert judge.is_clean(data, height_px, width_px), (kind, height_px, width_px, quality)


@pytest.mark.parametrize("kind", OTHER)
def test_others_are_left_to_libjpeg(kind, judge):
    assert not judge.is_clean(make(kind, 64, 96), 64, 96)


def test_of_the_headers_only_plain_ones_are_clean(judge):
    data = make("420", 64, 96)
    jfif, frame, scan = (segment(data, marker)[0] for marker in (0xE0, 0xC0, 0xDA))
    tables = segment(data, 0xDB)
    assert judge.is_clean(data, 64, 96)
    assert not judge.is_clean(data, 96, 64)

    def changed(at: int, *values: int) -> bytes:
        return data[:at] + bytes(values) + data[at + len(values) :]

    clean = {
        "padding": data[:frame] + b"\xff\xff" + data[frame:-2] + b"\xff\xff" + EOI,
        "extended": changed(frame + 1, 0xC1),
        "stray bytes after the end": data + b"stray \xff\xd8 bytes",
        "Adobe, YCbCr": SOI + ADOBE + b"\1" + data[2:],
        "no JFIF": data[:jfif] + data[segment(data, 0xE0)[1] :],
        "16-bit quantisation": data[: tables[0]] + widened(data[slice(*tables)]) + data[tables[1] :],
        "restart interval 0": data[:frame] + b"\xff\xdd\0\4\0\0" + data[frame:],
    }
    other = {
        "Adobe, RGB": SOI + ADOBE + b"\0" + data[2:],
        "Adobe, unknown": SOI + ADOBE + b"\5" + data[2:],
        "JFIF 2": changed(jfif + 9, 2),
        "progressive": changed(frame + 1, 0xC2),
        "arithmetic": changed(frame + 1, 0xC9),
        "12 bits": changed(frame + 4, 12),
        "two frames": data[:frame] + data[slice(*segment(data, 0xC0))] + data[frame:],
        "no frame": data[:frame] + data[segment(data, 0xC0)[1] :],
        "4:1:1": changed(frame + 11, 0x41),
        "double chroma": changed(frame + 14, 0x22),
        "equal components": changed(frame + 13, data[frame + 10]),
        "RGB components": changed(frame + 10, 0x52).replace(b"\2\x11\1\3\x11\1", b"G\x11\1B\x11\1"),
        "other spectral selection": changed(scan + 11, 1, 63),
        "approximation": changed(scan + 13, 1),
        "restart interval without markers": data[:frame] + b"\xff\xdd\0\4\0\1" + data[frame:],
        "no quantisation table": data[: tables[0]] + data[tables[1] :],
        "no end": data[:-2],
        "two scans": data[:-2] + data[scan:],
        "a comment before the end": data[:-2] + b"\xff\xfe\0\2" + EOI,
        "stray bytes before the end": data[:-2] + b"stray" + EOI,
        "no image": SOI + EOI,
    }
    for name, file in clean.items():
        assert judge.is_clean(file, 64, 96), name
    for name, file in other.items():
        assert not judge.is_clean(file, 64, 96), name
    start, end = segment(data, 0xC4)
    for at in range(start + 5, start + 21):  # more codes than there are
        assert not judge.is_clean(changed(at, 0xFF), 64, 96)
    for at in range(start + 21, end):  # symbols that do not exist
        assert not judge.is_clean(changed(at, 0xFF), 64, 96)
    for cut in range(len(data)):
        assert not judge.is_clean(data[:cut], 64, 96)


def widened(tables: bytes) -> bytes:
    """Quantisation tables in 16 bits."""
    body, wide = tables[4:], b""
    for at in range(0, len(body), 65):
        wide += bytes([body[at] | 0x10]) + b"".join(bytes([0, step]) for step in body[at + 1 : at + 65])
    return tables[:2] + (len(wide) + 2).to_bytes(2, "big") + wide


def flip(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 3))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def flip_in_headers(data: bytearray, rng: random.Random) -> None:
    data[rng.randrange(segments(data)[-1][1])] ^= 1 << rng.randrange(8)


def cut(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data)) :]


def insert(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    data[at:at] = rng.randbytes(rng.randrange(1, 4))


def delete(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    del data[at : at + rng.randrange(1, 4)]


def put_marker(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data) - 1)
    data[at : at + 2] = bytes([0xFF, rng.choice((0, 0xD0 + rng.randrange(8), 0xD8, 0xD9, 0xDA, 0xC4, 0xFE, 0xFF))])


def change_restarts(data: bytearray, rng: random.Random) -> None:
    scan = segments(data)[-1][1]
    places = [at + 1 for at in range(scan, len(data) - 1) if data[at] == 0xFF and 0xD0 <= data[at + 1] <= 0xD7]
    if len(places) < 2:
        put_marker(data, rng)
    else:
        a, b = rng.sample(places, 2)
        data[a], data[b] = data[b], data[a]


def change_tables(data: bytearray, rng: random.Random) -> None:
    start, end, _ = rng.choice([found for found in segments(data) if found[2] in (0xC4, 0xDB)])
    data[rng.randrange(start + 4, end)] = rng.choice((0, 1, 2, 255, rng.randrange(256)))


def change_frame_or_scan(data: bytearray, rng: random.Random) -> None:
    start, end = segment(data, rng.choice((0xC0, 0xDA)))
    data[rng.randrange(start + 1, end)] = rng.choice((0, 1, 0x11, 0x12, 0x21, 0x22, rng.randrange(256)))


def add_restart_interval(data: bytearray, rng: random.Random) -> None:
    start, _ = segment(data, 0xC0)
    data[start:start] = bytes([0xFF, 0xDD, 0, 4, 0, rng.randrange(5)])


def change_order(data: bytearray, rng: random.Random) -> None:
    (a, b, _), (c, d, _) = sorted(rng.sample(segments(data), 2))
    data[a:d] = data[c:d] + data[b:c] + data[a:b]


def change_end(data: bytearray, rng: random.Random) -> None:
    scan = segments(data)[-1][0]
    data[-2:] = rng.choice((b"", b"\xff", b"\0" + EOI, b"\xff" + EOI, b"\xff\xd0" + EOI, bytes(data[scan:])))


MUTATIONS: list[Callable[[bytearray, random.Random], None]] = [
    flip, flip_in_headers, cut, insert, delete, put_marker, change_restarts, change_tables, change_frame_or_scan,
    add_restart_interval, change_order, change_end,
]  # fmt: skip


def test_what_is_clean_after_damage_is_decoded_without_a_warning(judge):
    rng, verdicts = random.Random(0), Counter()
    for seed, kind in enumerate(list(PLAIN) * 5):
        height_px, width_px = rng.randrange(30, 100), rng.randrange(40, 100)
        data = make(kind, height_px, width_px, rng.choice((20, 75, 95)), seed)
        assert judge.is_clean(data, height_px, width_px)
        for mutate in MUTATIONS * 10:
            damaged = bytearray(data)
            mutate(damaged, rng)
            if damaged != data:
                verdicts[judge.is_clean(bytes(damaged), height_px, width_px)] += 1
    assert verdicts.total() > 5000
    assert min(verdicts.values()) > 0.15 * verdicts.total()


def test_damage_to_photographs_is_found(photographs, judge):
    rng = random.Random(0)
    for data in random.Random(1).sample(sorted(photographs.values()), min(len(photographs), 40)):
        size = size_of(data)
        for mutate in MUTATIONS:
            damaged = bytearray(data)
            mutate(damaged, rng)
            judge.is_clean(bytes(damaged), *size)


def test_tables_of_an_image_are_not_used_for_the_next(judge):
    first, second = make("optimised tables", 64, 96, 95, 1), make("optimised tables", 64, 96, 20, 2)
    start, end = segment(second, 0xC4)
    for _ in range(2):
        assert judge.is_clean(first, 64, 96)
        assert not judge.is_clean(second[:start] + second[end:], 64, 96)
        assert judge.is_clean(second, 64, 96)


def test_threads_come_to_the_same_verdicts(photographs):
    files = sorted(photographs.values())[:40]
    files = files + [data[: len(data) // 2] for data in files]
    sizes = [size_of(data) for data in files]

    def verdicts(order: int) -> list[tuple[bool, bytes]]:
        checker, found = JpegChecker(), []
        for data, (height_px, width_px) in list(zip(files, sizes, strict=True))[::order]:
            small = np.zeros((-(-height_px // 8), -(-width_px // 8), 3), np.uint8)
            found.append((checker.is_clean(np.frombuffer(data, np.uint8), height_px, width_px, small), small.tobytes()))
        return found[::order]

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(verdicts, [1, -1] * 4))
    assert all(result == results[0] for result in results)
    assert sum(is_clean for is_clean, _ in results[0]) >= 0.9 * len(files) / 2


def test_a_conversion_gives_the_same_files_without_it(photographs, tmp_path, monkeypatch):
    folder = tmp_path / "images"
    folder.mkdir()
    for k, name in enumerate(sorted(photographs)[:: max(len(photographs) // 40, 1)]):
        (folder / f"{k}.jpg").write_bytes(photographs[name])
    (folder / "damaged.jpg").write_bytes(photographs[min(photographs)][:-200])
    (folder / "progressive.jpg").write_bytes(make("progressive", 300, 260))
    checked = Counter()
    is_clean = JpegChecker.is_clean

    def count(checker: JpegChecker, *arguments) -> bool:
        verdict = is_clean(checker, *arguments)
        checked[verdict] += 1
        return verdict

    monkeypatch.setattr(JpegChecker, "is_clean", count)
    convert("folder", str(folder), tmp_path / "a" / "x.beton", max_bad=0.2)
    assert checked[True] > checked[False] > 0
    num_checked = checked.total()
    monkeypatch.setattr(images, "why_no_jpeg_check", lambda: "it was not compiled")
    convert("folder", str(folder), tmp_path / "b" / "x.beton", max_bad=0.2)
    assert checked.total() == num_checked
    for name in ("x.beton", "x.beton.hashes", "x.beton.errors.txt"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_a_large_workspace_is_freed():
    data, small = make("420", 64, 96), np.zeros((8, 12, 3), np.uint8)
    checker = JpegChecker()
    padded = np.frombuffer(data + bytes(jpeg_check.MAX_KEPT_BYTES), np.uint8)
    assert checker.is_clean(padded, 64, 96, small)
    assert len(checker._workspace) == 0
    assert checker.is_clean(np.frombuffer(data, np.uint8), 64, 96, small)
    assert 0 < len(checker._workspace) < 1 << 20


def test_it_is_not_used_without_its_library_or_with_that_of_another_source(tmp_path, monkeypatch):
    for path in jpeg_check.SOURCE.parent.glob("*jpeg_check*"):
        if path.suffix != ".py":
            shutil.copy(path, tmp_path)
    monkeypatch.setattr(jpeg_check, "SOURCE", tmp_path / jpeg_check.SOURCE.name)
    monkeypatch.setattr(jpeg_check, "_library", jpeg_check._library.__wrapped__)
    look = why_no_jpeg_check.__wrapped__
    assert look() is None
    with jpeg_check.SOURCE.open("a") as file:
        file.write("/* changed */\n")
    assert "another version of jpeg_check.c" in (look() or "")
    (library,) = tmp_path.glob("*.so")
    library.unlink()
    assert look() == "it was not compiled: the installation found no C compiler"


def test_the_sides_do_not_overflow():
    data, small = np.frombuffer(make("420", 64, 96), np.uint8), np.zeros(3, np.uint8)
    for height_px, width_px in ((0, 96), (64, 0), (65_535, 1), (1, 65_535)):
        assert not JpegChecker().is_clean(data, height_px, width_px, small)
