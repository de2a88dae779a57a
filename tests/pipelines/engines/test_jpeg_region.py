"""Decoding only what the views show: the same pixels as a full decoding, and a rule for damage that boxes decide."""

import ctypes
import io
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.bad_samples import BadSamples
from pipelines.beton import BetonReader, BetonWriter
from pipelines.engines import build_engine, decode_crop, jpeg_region
from pipelines.engines.jpeg_region import MESSAGE_BYTES, decode_jpeg_region, why_no_region_decoder
from pipelines.engines.turbojpeg import OK, UNREADABLE, WRONG_SIZE, JpegDecoder, decode_jpeg, load_library
from pipelines.views import RECIPES, ViewSpec, draw, size_groups
from tests.helpers.plans import draw_of, plan_batches
from tests.helpers.processes import ROOT, environment

CPU = torch.device("cpu")
_440, _411 = 4, 5  # TurboJPEG's TJSAMP_440 and TJSAMP_411; Pillow writes the others
KINDS = {
    "444": {"subsampling": 0},
    "422": {"subsampling": 1},
    "420": {"subsampling": 2},
    "440": _440,
    "411": _411,
    "grey": {},
    "progressive": {"progressive": True},
    "a restart marker a row": {"restart_marker_rows": 1},
    "a restart marker every 3 blocks": {"subsampling": 2, "restart_marker_blocks": 3},
}
SIZES = [(1, 1), (3, 200), (200, 3), (16, 17), (64, 96), (97, 131)]


def noisy(height_px: int, width_px: int, seed: int = 0) -> np.ndarray:
    """Colours and noise: neighbours differ, so that a pixel of another place or of wrong neighbours is noticed."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width_px, height_px), Image.Resampling.BICUBIC), np.float64)
    return np.clip(smooth + rng.normal(0, 40, smooth.shape), 0, 255).astype(np.uint8)


def encode(pixels: np.ndarray, options: dict | int, quality: int = 90) -> bytes:
    if isinstance(options, dict):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=quality, **options)
        return file.getvalue()
    library, (height_px, width_px, _) = load_library(), pixels.shape
    library.tjInitCompress.restype = ctypes.c_void_p
    handle, data, size = ctypes.c_void_p(library.tjInitCompress()), ctypes.c_void_p(), ctypes.c_ulong()
    source = np.ascontiguousarray(pixels).ctypes.data_as(ctypes.c_void_p)
    status = library.tjCompress2(
        handle, source, width_px, 0, height_px, 0, ctypes.byref(data), ctypes.byref(size), options, quality, 0
    )
    assert status == 0
    encoded = ctypes.string_at(data, size.value)
    library.tjFree(data)
    library.tjDestroy(handle)
    return encoded


def encode_kind(kind: str, height_px: int, width_px: int) -> np.ndarray:
    pixels = noisy(height_px, width_px)
    return np.frombuffer(encode(pixels[..., 0] if kind == "grey" else pixels, KINDS[kind]), np.uint8)


def decode_whole(data: np.ndarray, height_px: int, width_px: int) -> tuple[int, str, np.ndarray]:
    """(status, message, pixels) of `decode_jpeg`."""
    decoder = JpegDecoder()
    pixels = np.zeros(height_px * width_px * 3, np.uint8)
    status = decode_jpeg(decoder.handle, data, height_px, width_px, pixels)
    message = "" if status == OK else decoder.last_message()
    decoder.close()
    return status, message, pixels.reshape(height_px, width_px, 3)


def decode_box(data: np.ndarray, height_px: int, width_px: int, box: tuple[int, ...]) -> tuple[int, str, np.ndarray]:
    """(status, message, pixels) of `decode_jpeg_region`; the pixels were random before."""
    pixels = np.random.default_rng(1).integers(0, 256, height_px * width_px * 3).astype(np.uint8)
    message = np.full(MESSAGE_BYTES, 88, np.uint8)
    status = decode_jpeg_region(data, height_px, width_px, *box, pixels, message)
    return status, message.tobytes().partition(b"\0")[0].decode(), pixels.reshape(height_px, width_px, 3)


def boxes_of(height_px: int, width_px: int) -> list[tuple[int, int, int, int]]:
    """(top, left, bottom, right): the whole, boxes at each edge and corner, single pixels, random ones."""
    rng = np.random.default_rng(2)

    def spans(length: int) -> list[tuple[int, int]]:
        middle = length // 2
        several = [(0, length), (0, 1), (length - 1, length), (middle, middle + 1), (0, middle), (middle, length)]
        return sorted({(a, b) for a, b in [*several, (length // 3, 2 * length // 3)] if a < b})

    boxes = [(top, left, bottom, right) for (top, bottom), (left, right) in product(spans(height_px), spans(width_px))]
    for _ in range(40):
        top, left = int(rng.integers(height_px)), int(rng.integers(width_px))
        boxes.append((top, left, int(rng.integers(top, height_px)) + 1, int(rng.integers(left, width_px)) + 1))
    return boxes


def without_rows_from(row: int, data: bytes, height_px: int, width_px: int) -> bytes:
    """A baseline JPEG with a restart marker a row of blocks of 8, cut short some bytes after the rows from `row` begin.

    libjpeg reads some bytes ahead.
    """
    markers = [i for i in range(len(data) - 1) if data[i] == 0xFF and 0xD0 <= data[i + 1] <= 0xD7]
    assert len(markers) == -(-height_px // 8) - 1
    return data[: markers[row // 8 - 1] + 20]


@pytest.fixture(autouse=True)
def is_compiled():
    """Also loads the library."""
    assert why_no_region_decoder() is None


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("kind", KINDS)
def test_a_box_has_the_pixels_of_a_full_decoding(kind, size):
    data = encode_kind(kind, *size)
    status, _, whole = decode_whole(data, *size)
    assert status == OK
    for box in boxes_of(*size):
        top, left, bottom, right = box
        status, message, pixels = decode_box(data, *size, box)
        assert (status, message) == (OK, ""), box
        np.testing.assert_array_equal(pixels[top:bottom, left:right], whole[top:bottom, left:right], err_msg=str(box))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_below_the_box_is_decoded_and_little_next_to_it(kind):
    data = encode_kind(kind, 97, 131)
    _, _, before = decode_box(data[:0], 97, 131, (0, 0, 1, 1))
    _, _, pixels = decode_box(data, 97, 131, (40, 50, 60, 70))
    np.testing.assert_array_equal(pixels[60:], before[60:])
    if kind != "progressive":
        np.testing.assert_array_equal(pixels[:40], before[:40])
        np.testing.assert_array_equal(pixels[:, 75:], before[:, 75:])
        np.testing.assert_array_equal(pixels[:, :16], before[:, :16])


def test_a_progressive_jpeg_that_omits_coefficients_has_the_same_pixels():
    """libjpeg estimates them from the blocks around, of which a box at its edge has fewer."""
    data = encode_kind("progressive", 97, 131).tobytes()
    scans = [i for i in range(len(data) - 1) if data[i : i + 2] == b"\xff\xda"]
    assert len(scans) > 5
    for scan in scans[1:]:
        first_scans = np.frombuffer(data[:scan] + b"\xff\xd9", np.uint8)
        status, _, whole = decode_whole(first_scans, 97, 131)
        assert status == OK
        for box in boxes_of(97, 131)[-40:]:
            top, left, bottom, right = box
            status, _, pixels = decode_box(first_scans, 97, 131, box)
            assert status == OK
            np.testing.assert_array_equal(pixels[top:bottom, left:right], whole[top:bottom, left:right])


def test_a_file_cut_short_is_good_above_the_cut():
    data = encode(noisy(96, 128), {"subsampling": 0, "restart_marker_rows": 1})
    whole = decode_whole(np.frombuffer(data, np.uint8), 96, 128)[2]
    cut = np.frombuffer(without_rows_from(48, data, 96, 128), np.uint8)
    assert decode_whole(cut, 96, 128)[0] == UNREADABLE
    for box in [(0, 0, 48, 128), (47, 5, 48, 6), (10, 100, 40, 128)]:
        status, _, pixels = decode_box(cut, 96, 128, box)
        assert status == OK
        top, left, bottom, right = box
        np.testing.assert_array_equal(pixels[top:bottom, left:right], whole[top:bottom, left:right])
    for box in [(0, 0, 49, 128), (48, 5, 49, 6), (0, 0, 96, 128), (95, 127, 96, 128)]:
        status, message, _ = decode_box(cut, 96, 128, box)
        assert (status, message) == (UNREADABLE, "Premature end of JPEG file")


@pytest.mark.parametrize("junk", [b"\xff\xc4\x12\xff\xd0" * 40, b"\0" * 400])
def test_garbage_in_the_middle_is_bad_below_it_and_not_above(junk):
    data = encode(noisy(96, 128), {"subsampling": 0, "restart_marker_rows": 1})
    at = len(without_rows_from(48, data, 96, 128)) + 40
    damaged = np.frombuffer(data[:at] + junk + data[at + len(junk) :], np.uint8)
    assert decode_whole(damaged, 96, 128)[0] == UNREADABLE
    assert decode_box(damaged, 96, 128, (0, 0, 48, 128))[0] == OK
    for box in [(0, 0, 96, 128), (90, 0, 91, 1), (48, 0, 64, 128)]:  # also of rows that are skipped
        assert decode_box(damaged, 96, 128, box)[0] == UNREADABLE


def damaged_files() -> dict[str, bytes]:
    rng = np.random.default_rng(3)
    plain, progressive = (encode(noisy(90, 120), options) for options in ({}, {"progressive": True}))
    tables = plain.index(b"\xff\xdb")
    after = tables + 2 + int.from_bytes(plain[tables + 2 : tables + 4], "big")
    last_scan = progressive[progressive.rindex(b"\xff\xda") : -2]
    files = {
        "whole": plain,
        "empty": b"",
        "two bytes": plain[:2],
        "no tables": plain[:tables] + plain[after:],
        "zeros": b"\0" * 5000,
        "no end marker": plain[:-2],
        "bytes before the end marker": plain[:-2] + b"\x12\x34\x56" + plain[-2:],
        "bytes after the end marker": plain + b"\x12\x34\x56",
        "unknown JFIF revision": plain[:11] + b"\xc7" + plain[12:],
        "progressive, cut short": progressive[: len(progressive) // 2],
        "600 scans": progressive[:-2] + last_scan * 600 + progressive[-2:],
        "CMYK": b"",
    }
    file = io.BytesIO()
    Image.new("CMYK", (120, 90)).save(file, "JPEG")
    files["CMYK"] = file.getvalue()
    for k in range(200):
        data = bytearray(plain if k % 3 else progressive)
        for place in rng.integers(0, len(data), rng.integers(1, 4)):
            data[place] = rng.integers(256)
        files[f"flipped {k}"] = bytes(data)
    return files


def test_of_the_whole_image_verdict_message_and_pixels_are_those_of_a_full_decoding():
    verdicts = {}
    for name, data in damaged_files().items():
        stored = np.frombuffer(data, np.uint8)
        status, message, whole = decode_whole(stored, 90, 120)
        found = decode_box(stored, 90, 120, (0, 0, 90, 120))
        assert found[0] == status, name
        if status == OK:
            np.testing.assert_array_equal(found[2], whole, err_msg=name)
        elif status == UNREADABLE and name not in ("empty", "two bytes"):  # TurboJPEG reads their header more leniently
            assert found[1] == message, name
        verdicts[name] = status
    assert set(verdicts.values()) == {OK, UNREADABLE, WRONG_SIZE}
    assert verdicts["whole"] == OK
    assert verdicts["600 scans"] == UNREADABLE


def test_damage_to_the_tables_of_one_image_does_not_reach_the_next():
    files = damaged_files()
    assert decode_box(np.frombuffer(files["whole"], np.uint8), 90, 120, (0, 0, 9, 9))[0] == OK
    assert decode_box(np.frombuffer(files["no tables"], np.uint8), 90, 120, (0, 0, 9, 9))[0] == UNREADABLE


# Engines

SPECS = (*RECIPES["byol"], *[ViewSpec(size_px=64, crop_scale=(0.05, 0.2))] * 2)


def write(path: Path, files: list[bytes]) -> BetonReader:
    with BetonWriter(path, len(files)) as writer:
        for i, data in enumerate(files):
            width_px, height_px = Image.open(io.BytesIO(data)).size
            writer.write_jpeg(data, height_px=height_px, width_px=width_px, label=i)
    return BetonReader(path)


def large_files(num: int) -> list[bytes]:
    """JPEGs of more than `REGION_MIN_BYTES`, of every kind."""
    kinds, files = list(KINDS), []
    for i in range(num):
        pixels, kind = noisy(200 + 7 * i % 41, 260 - 5 * i % 37, seed=i), kinds[i % len(kinds)]
        files.append(encode(pixels[..., 0] if kind == "grey" else pixels, KINDS[kind]))
    assert min(map(len, files)) >= decode_crop.REGION_MIN_BYTES
    return files


def epoch_of(images: BetonReader, ids, *, batch_size: int = 8, num_workers: int = 2, bad_samples=None, specs=None):
    """(views of each size, sample ids) of one pass over `ids`."""
    specs = specs or SPECS
    engine = build_engine(
        "ffcv", images, num_workers=num_workers, prefetch_batches=1, bad_samples=bad_samples, device=CPU
    )
    plans = plan_batches(draw_of(specs), np.asarray(ids), images, batch_size)
    views, found = [], []
    for raw in engine.batches(plans, batch_size, size_groups(specs)):
        views.append([view.copy() for view in raw.views])
        found.append(raw.sample_ids.copy())
    engine.close()
    return [np.concatenate(group) for group in zip(*views, strict=True)], np.concatenate(found)


def decode_in_full(monkeypatch) -> None:
    monkeypatch.setattr(decode_crop, "why_no_region_decoder", lambda: "not compiled")


def test_views_are_bit_equal_to_those_of_full_decodings(tmp_path, monkeypatch):
    images = write(tmp_path / "x.beton", large_files(18))
    ids = np.arange(18).repeat(4)
    views, _ = epoch_of(images, ids)
    decode_in_full(monkeypatch)
    expected, _ = epoch_of(images, ids)
    for ours, theirs in zip(views, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


ONE_VIEW = (ViewSpec(size_px=32, crop_scale=(0.05, 0.3)),)


def some_cut_short(num: int) -> list[bytes]:
    """Files of one size, three of four cut short at row 128."""
    whole = [encode(noisy(192, 256, seed=i), {"subsampling": 0, "restart_marker_rows": 1}) for i in range(num)]
    files = [data if i % 4 == 0 else without_rows_from(128, data, 192, 256) for i, data in enumerate(whole)]
    assert min(map(len, files)) >= decode_crop.REGION_MIN_BYTES
    return files


def test_boxes_alone_decide_which_samples_are_bad(tmp_path, monkeypatch):
    """Not the batch, the number of threads, the order, or what was found bad before."""
    images = write(tmp_path / "cut.beton", some_cut_short(16))
    ids = np.arange(16)
    boxes = draw(ONE_VIEW, 7, 3, ids, images.sizes)["crop_box"][:, 0]
    ends = boxes[:, 0] + boxes[:, 2]
    expected = ids.copy()
    for i in ids:  # all have the same size, so that a replacement has the same box
        while expected[i] % 4 and ends[i] > 128:
            expected[i] = (expected[i] + 1) % 16
    assert ((ids % 4 > 0) & (expected == ids)).sum() >= 3  # cut short, and good
    assert (expected != ids).sum() >= 3
    bad = sorted({k % 16 for i in ids for k in range(i, i + (expected[i] - i) % 16)})
    known = BadSamples(images.path, 16, 0.9)
    for i in range(1, 16, 2):
        known.replace(i, "was bad for another box")
    views = []
    for options in ({}, {"batch_size": 3}, {"num_workers": 1}, {"batch_size": 16}, {"bad_samples": known}):
        bad_samples = options.pop("bad_samples", BadSamples(images.path, 16, 0.9))
        at_once, found = epoch_of(images, ids, specs=ONE_VIEW, bad_samples=bad_samples, **options)
        np.testing.assert_array_equal(found, expected)
        assert bad_samples is known or sorted(bad_samples.reasons) == bad
        views.append(at_once[0])
    for other in views[1:]:
        np.testing.assert_array_equal(other, views[0])
    bad_samples = BadSamples(images.path, 16, 0.9)
    reversed_views, found = epoch_of(images, ids[::-1].copy(), specs=ONE_VIEW, bad_samples=bad_samples)
    np.testing.assert_array_equal(found[::-1], expected)
    np.testing.assert_array_equal(reversed_views[0][::-1], views[0])
    decode_in_full(monkeypatch)
    _, found = epoch_of(images, ids, specs=ONE_VIEW, bad_samples=BadSamples(images.path, 16, 0.9))
    np.testing.assert_array_equal(found, (ids + 3) // 4 * 4 % 16)  # none that is cut short


def test_small_files_are_decoded_in_full(tmp_path):
    cut = [encode(noisy(48, 64), {}), encode(noisy(48, 64), {})]
    path = tmp_path / "small.beton"
    with BetonWriter(path, 2) as writer:
        for data in (cut[0], cut[1][: len(cut[1]) * 3 // 4]):
            writer.write_jpeg(data, height_px=48, width_px=64)
    images = BetonReader(path)
    bad_samples = BadSamples(path, 2, 0.6)
    top_row = draw(ONE_VIEW, 7, 3, np.arange(2), images.sizes)
    top_row["crop_box"][:] = (0, 0, 1, 64)
    engine = build_engine("ffcv", images, num_workers=1, prefetch_batches=1, bad_samples=bad_samples, device=CPU)
    plans = plan_batches(lambda ids, sizes: top_row[: len(ids)], np.arange(2), images, 2)
    (raw,) = engine.batches(plans, 2, size_groups(ONE_VIEW))
    assert raw.sample_ids.tolist() == [0, 0]
    engine.close()


def test_the_reason_is_libjpegs(tmp_path):
    images = write(tmp_path / "cut.beton", some_cut_short(4))
    bad_samples = BadSamples(images.path, 4, 0.9)
    epoch_of(images, np.arange(4).repeat(4), bad_samples=bad_samples)
    assert set(bad_samples.reasons.values()) == {"cannot be decoded (Premature end of JPEG file)"}


def test_a_warning_that_affects_no_pixel_is_no_error(tmp_path):
    files = large_files(9)
    stray = [data[:-2] + b"\x12\x34\x56" + data[-2:] for data in files]
    views, ids = epoch_of(write(tmp_path / "stray.beton", stray), np.arange(9))
    expected, _ = epoch_of(write(tmp_path / "x.beton", files), np.arange(9))
    np.testing.assert_array_equal(ids, np.arange(9))
    for ours, theirs in zip(views, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


# The compiled library


@pytest.fixture
def installed_elsewhere(tmp_path, monkeypatch) -> Path:
    """A copy of the source and its library, which `why_no_region_decoder` looks at."""
    for path in jpeg_region.SOURCE.parent.glob("*jpeg_region*"):
        if path.suffix != ".py":
            shutil.copy(path, tmp_path)
    monkeypatch.setattr(jpeg_region, "SOURCE", tmp_path / jpeg_region.SOURCE.name)
    return tmp_path


def test_it_is_not_used_without_a_library(installed_elsewhere):
    look = why_no_region_decoder.__wrapped__
    (library,) = installed_elsewhere.glob("*.so")
    away = library.rename(library.with_suffix(".away"))
    assert "not compiled" in look()
    library.write_bytes(b"no library")
    assert "cannot be loaded" in look()
    away.replace(library)
    assert look() is None


def test_it_is_not_used_if_compiled_from_another_source(installed_elsewhere):
    with jpeg_region.SOURCE.open("a") as file:
        file.write("/* changed */\n")
    assert "another version of jpeg_region.c" in why_no_region_decoder.__wrapped__()


def test_a_changed_c_file_is_another_kernel(installed_elsewhere):
    def key() -> tuple:
        kernel = decode_crop._kernel.__wrapped__(True, True)
        return kernel._cache._index_key((), kernel.targetctx.codegen())

    before = key()
    assert key() == before
    with jpeg_region.SOURCE.open("a") as file:
        file.write("/* changed */\n")
    assert key() != before


def test_it_says_nothing_and_lives_on(tmp_path):
    """No output, and no exit, whatever the bytes are."""
    code = (
        "import numpy as np\n"
        "from pipelines.engines.jpeg_region import decode_jpeg_region, why_no_region_decoder\n"
        "assert why_no_region_decoder() is None\n"
        "pixels, message = np.zeros(48, np.uint8), np.zeros(200, np.uint8)\n"
        "for data in (b'', b'\\xff\\xd8', b'\\xff\\xd8\\xff\\xc0' + b'\\0' * 99):\n"
        "    data = np.frombuffer(data, np.uint8)\n"
        "    assert decode_jpeg_region(data, 4, 4, 0, 0, 4, 4, pixels, message) == 1\n"
        "    assert message[0]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
