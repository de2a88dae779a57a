"""Conversion: what passes unchanged, what is re-encoded, what is refused, and what a killed process leaves."""

import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.beton import JPG, RAW, BetonReader
from pipelines.convert import bounded_map, convert
from pipelines.convert.images import CorruptImageError, quiet_pillow, store_file
from pipelines.convert.sources import digits_source
from pipelines.errors import DataError

ORIENTATION = 0x112
GOLDEN_TEST_LABELS = [1, 2, 4, 5, 6, 9, 4, 7, 8, 9, 2, 7]
GOLDEN_TEST_SUM = 2480942  # over the digits' test images


def picture(height_px: int = 90, width_px: int = 120, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(60, 200, (3, 3, 3), np.uint8)
    return Image.fromarray(noise).resize((width_px, height_px), Image.Resampling.BILINEAR)


def save(image: Image.Image, path: Path, kind: str | None = None, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, kind, **options)
    return path


def converted(path: Path, **options) -> np.ndarray:
    """Pixels after the conversion of one file."""
    stored = store_file(str(path), max_px=options.pop("max_px", None), quality=95)
    if stored.how == "raw":
        return np.asarray(stored.data)
    assert isinstance(stored.data, bytes)
    pixels = np.asarray(Image.open(io.BytesIO(stored.data)).convert("RGB"))
    assert pixels.shape == (stored.height_px, stored.width_px, 3)
    return pixels


def mean_difference(a, b) -> float:
    return float(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).mean())


def make_folder(root: Path, num_per_class: int = 3) -> Path:
    for k, name in enumerate(("cat", "dog")):
        for i in range(num_per_class):
            save(picture(80 + i, 100, seed=10 * k + i), root / name / f"{i}.jpg", quality=90)
    return root


@pytest.mark.parametrize("case", ["plain", "grey", "progressive", "1x1", "wrong extension", "upright EXIF"])
def test_jpeg_passes_byte_identical(tmp_path, case):
    exif = Image.Exif()
    exif[ORIENTATION] = 1
    image = {"grey": picture().convert("L"), "1x1": picture(1, 1)}.get(case, picture())
    options = {"progressive": {"progressive": True}, "upright EXIF": {"exif": exif}}.get(case, {})
    path = save(image, tmp_path / ("x.png" if case == "wrong extension" else "x.jpg"), "JPEG", **options)
    stored = store_file(str(path), max_px=120, quality=95)
    assert stored.how == "passed"
    assert stored.data == path.read_bytes()
    assert (stored.height_px, stored.width_px) == image.size[::-1]


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_exif_rotation_is_undone(tmp_path, orientation, kind):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = save(picture(), tmp_path / "x", kind, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(path))
    assert store_file(str(path), max_px=None, quality=95).how == "encoded"
    pixels = converted(path)
    assert pixels.shape[:2] == expected.size[::-1]
    assert mean_difference(pixels, expected) < 2


def test_damaged_exif_leaves_the_image_alone(tmp_path):
    path = save(picture(), tmp_path / "x.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    with quiet_pillow():
        assert store_file(str(path), max_px=None, quality=95).data == path.read_bytes()


def test_cmyk_becomes_rgb(tmp_path):
    path = save(picture().convert("CMYK"), tmp_path / "x.jpg", quality=95)
    assert store_file(str(path), max_px=None, quality=95).how == "encoded"
    assert mean_difference(converted(path), picture()) < 3


def test_16_bit_png_is_scaled(tmp_path):
    levels = np.linspace(0, 65_535, 100 * 100).reshape(100, 100).astype(np.uint16)
    pixels = converted(save(Image.fromarray(levels), tmp_path / "x.png"))
    assert mean_difference(pixels[:, :, 0], np.round(levels / 257)) < 1
    small = converted(save(Image.fromarray(levels[::10, ::10]), tmp_path / "y.png"))
    np.testing.assert_array_equal(small[:, :, 1], np.round(levels[::10, ::10] / 257))


def test_small_lossless_images_stay_lossless(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    np.testing.assert_array_equal(converted(save(Image.fromarray(pixels), tmp_path / "x.png")), pixels)
    path = save(Image.fromarray(pixels[:1, :1]), tmp_path / "y.bmp")
    np.testing.assert_array_equal(converted(path), pixels[:1, :1])
    assert store_file(str(save(picture(64, 65), tmp_path / "z.png")), max_px=None, quality=95).how == "encoded"


def test_palette_and_grey_and_bilevel(tmp_path):
    for mode in ("P", "L", "1"):
        image = picture(32, 32).convert(mode)
        np.testing.assert_array_equal(converted(save(image, tmp_path / f"{mode}.png")), image.convert("RGB"))


def test_alpha_goes_onto_white(tmp_path):
    image = picture(16, 16).convert("RGBA")
    image.putalpha(Image.fromarray(np.repeat(np.uint8([[0, 255]]), 16, 0).repeat(8, 1)))
    pixels = converted(save(image, tmp_path / "x.png"))
    assert (pixels[:, :8] == 255).all()
    np.testing.assert_array_equal(pixels[:, 8:], np.asarray(picture(16, 16))[:, 8:])
    palette = Image.fromarray(np.zeros((4, 4), np.uint8), "L").convert("P")
    path = save(palette, tmp_path / "p.png", transparency=0)
    assert (converted(path) == 255).all()
    assert (converted(save(image.convert("LA"), tmp_path / "la.png"))[:, :8] == 255).all()


def test_max_px_bounds_the_longer_side(tmp_path):
    path = save(picture(90, 120), tmp_path / "x.jpg", quality=95)
    pixels = converted(path, max_px=60)
    assert pixels.shape == (45, 60, 3)
    assert mean_difference(pixels, picture().resize((60, 45), Image.Resampling.LANCZOS)) < 2
    assert converted(save(picture(1, 4000), tmp_path / "line.jpg"), max_px=60).shape == (1, 60, 3)


def test_corrupt_images_have_clear_reasons(tmp_path, monkeypatch):
    whole = save(picture(), tmp_path / "x.jpg").read_bytes()
    png = save(picture(), tmp_path / "x.png").read_bytes()
    cases = {
        b"": "empty file",
        b"hello": "not an image",
        whole[: len(whole) // 2]: "truncated",
        whole[:-2]: "truncated",
        whole[:30]: "not an image|truncated|cannot",
        png[:-40]: "truncated|broken",
        png[:60] + bytes(200) + png[260:]: ".",
    }
    for content, reason in cases.items():
        (tmp_path / "bad.jpg").write_bytes(content)
        with pytest.raises(CorruptImageError, match=f"(?i){reason}") as caught:
            store_file(str(tmp_path / "bad.jpg"), max_px=None, quality=95)
        assert "\n" not in str(caught.value)
    with pytest.raises(CorruptImageError, match="No such file"):
        store_file(str(tmp_path / "none.jpg"), max_px=None, quality=95)
    for limit in (10_000, 1_000):  # Pillow warns at the first, raises at the second
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with quiet_pillow(), pytest.raises(CorruptImageError, match=f"more than {limit:,} pixels.*decompression bombs"):
            store_file(str(tmp_path / "x.jpg"), max_px=None, quality=95)


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path):
    """20,000 x 20,000 pixels in a small file: 1.2 GB when decoded."""
    path = save(Image.new("1", (20_000, 20_000)), tmp_path / "bomb.png")
    jpeg = save(Image.new("L", (8, 8)), tmp_path / "bomb.jpg").read_bytes()
    frame = jpeg.index(b"\xff\xc0") + 5
    (tmp_path / "bomb.jpg").write_bytes(jpeg[:frame] + (20_000).to_bytes(2, "big") * 2 + jpeg[frame + 4 :])
    tracemalloc.start()
    for bomb in (path, tmp_path / "bomb.jpg"):
        with quiet_pillow(), pytest.raises(CorruptImageError, match="decompression bombs"):
            store_file(str(bomb), max_px=100, quality=95)
    assert tracemalloc.get_traced_memory()[1] < 100 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_picture_is_taken(tmp_path, kind):
    pictures = [Image.new("RGB", (70, 80), colour) for colour in ("red", "blue", "green")]
    options = {"lossless": True} if kind == "WEBP" else {}
    path = save(pictures[0], tmp_path / "x", kind, save_all=True, append_images=pictures[1:], **options)
    assert mean_difference(converted(path), pictures[0]) < 2


def test_damaged_jpegs_are_refused_as_the_run_time_refuses_them(tmp_path):
    """Pillow decodes these without a word; so would no engine."""
    whole = save(picture(200, 300), tmp_path / "x.jpg", quality=90).read_bytes()
    scan = whole.index(b"\xff\xda")
    damaged = [whole[:at] + bytes(60) + whole[at + 60 :] for at in range(scan + 100, len(whole) - 100, 150)]
    refused = [data for data in damaged if not decodes_at_run_time(data)]
    assert refused
    for data in damaged:
        Image.open(io.BytesIO(data)).load()
        if data not in refused:
            assert store_file(data, max_px=None, quality=95).data == data
    for data in refused:
        for max_px in (None, 50):  # nor are they encoded again
            with pytest.raises(CorruptImageError, match=r"^damaged JPEG \("):
                store_file(data, max_px=max_px, quality=95)


def decodes_at_run_time(data: bytes) -> bool:
    from pipelines.engines.turbojpeg import OK, JpegDecoder, decode_jpeg

    decoder = JpegDecoder()
    decoder.reserve(300 * 200 * 3)
    status = decode_jpeg(decoder.handle, np.frombuffer(data, np.uint8), 200, 300, decoder.pixels)
    whole = status == OK or decoder.is_harmless()
    decoder.close()
    return whole


def test_a_bad_image_does_not_spoil_the_next_one(tmp_path):
    """After an error in the headers TurboJPEG's decompressor is of no use."""
    whole = save(picture(), tmp_path / "x.jpg").read_bytes()
    for num_bytes in range(30, len(whole), 50):
        with pytest.raises(CorruptImageError):
            store_file(whole[:num_bytes], max_px=None, quality=95)
        assert store_file(whole, max_px=None, quality=95).data == whole


def test_stray_bytes_at_the_end_leave_a_jpeg_whole(tmp_path):
    data = save(picture(), tmp_path / "x.jpg").read_bytes()
    for stray in (data + b"stray bytes", data[:-2] + b"stray" + data[-2:]):
        assert store_file(stray, max_px=None, quality=95).data == stray


def test_float_pixels_and_endless_sides_are_refused(tmp_path):
    path = save(Image.fromarray(np.zeros((80, 80), np.float32)), tmp_path / "f.tif")
    with pytest.raises(CorruptImageError, match="floating-point"):
        store_file(str(path), max_px=None, quality=95)
    path = save(Image.new("L", (66_000, 1)), tmp_path / "w.png")
    with pytest.raises(CorruptImageError, match="66,000 px"):
        store_file(str(path), max_px=None, quality=95)


def test_folder_with_classes(tmp_path, capsys):
    root = make_folder(tmp_path / "data")
    (root / "cat" / "notes.txt").write_text("no image")
    (root / "cat" / "._0.jpg").write_bytes(b"macOS")
    save(picture(200, 20), root / "dog" / "deep" / "x.PNG")
    (root / "empty").mkdir()
    report = convert("folder", str(root), tmp_path / "new" / "x.beton")
    assert (report.num_images, report.num_passed, report.num_raw, report.num_ignored) == (7, 6, 1, 2)
    assert report.left_out == {".txt": 1, "hidden": 1}
    assert report.errors_path is None
    assert "1 sub-folder without images makes no class: empty" in capsys.readouterr().out
    reader = BetonReader(report.out)
    assert reader.class_names == ["cat", "dog"]
    assert reader.labels.tolist() == [0] * 3 + [1] * 4
    assert reader.modes.tolist() == [JPG] * 6 + [RAW]
    assert reader.image_bytes(0).tobytes() == (root / "cat" / "0.jpg").read_bytes()
    assert reader.sidecar["options"]["max_bad"] == 0.1
    assert reader.sidecar["class_counts"] == {"cat": 3, "dog": 4}
    convert("folder", str(root), tmp_path / "y.beton", labels="folders")
    assert BetonReader(tmp_path / "y.beton").sidecar["class_counts"] == {"cat": 3, "dog": 4, "empty": 0}


def test_flat_folder_is_unlabelled(tmp_path):
    for i in range(3):
        save(picture(seed=i), tmp_path / "flat" / f"{i}.jpg")
    reader = BetonReader(convert("folder", str(tmp_path / "flat"), tmp_path / "x.beton").out)
    assert reader.labels.tolist() == [-1, -1, -1]
    assert reader.class_names is None
    assert reader.sidecar["class_counts"] == {"unlabelled": 3}


def test_bad_folders(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        convert("folder", str(tmp_path / "none"), tmp_path / "x.beton")
    (tmp_path / "empty" / "a").mkdir(parents=True)
    with pytest.raises(DataError, match="no images"):
        convert("folder", str(tmp_path / "empty"), tmp_path / "x.beton")


def test_corrupt_image_fails_or_is_skipped(tmp_path, capsys):
    root = make_folder(tmp_path / "data")
    bad = root / "cat" / "1.jpg"
    bad.write_bytes(bad.read_bytes()[:500])
    (root / "dog" / "2.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"^.*cat/1\.jpg: .*[Tt]runcated.*--max-bad .*--on-error skip\)$"):
        convert("folder", str(root), tmp_path / "x.beton", on_error="fail")
    assert not list(tmp_path.glob("x.beton*"))
    report = convert("folder", str(root), tmp_path / "x.beton", on_error="skip")
    assert (report.num_images, report.num_skipped) == (4, 2)
    assert capsys.readouterr().out.startswith("2 of 6 images are corrupt")
    assert report.errors_path is not None
    lines = [line.split("\t") for line in report.errors_path.read_text().splitlines()]
    assert [line[0] for line in lines] == [str(bad), str(root / "dog" / "2.jpg")]
    assert lines[1][1] == "empty file"
    reader = BetonReader(report.out)
    assert reader.labels.tolist() == [0, 0, 1, 1]
    assert reader.image_bytes(1).tobytes() == (root / "cat" / "2.jpg").read_bytes()


def test_nothing_but_corrupt_images(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="all 1 images are corrupt"):
        convert("folder", str(tmp_path / "a"), tmp_path / "x.beton", on_error="skip")
    assert not (tmp_path / "x.beton").exists()


def test_options_are_checked(tmp_path):
    for options in (
        {"max_px": 0},
        {"max_px": 70_000},
        {"on_error": "x"},
        {"max_bad": 2},
        {"quality": 0},
        {"split": "val"},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            convert("digits", None, tmp_path / "x.beton", **options)
    with pytest.raises(ValueError, match="source kind must be"):
        convert("tar", "x", tmp_path / "x.beton")  # pyright: ignore
    with pytest.raises(ValueError, match="needs a path"):
        convert("folder", None, tmp_path / "x.beton")
    with pytest.raises(ValueError, match="split"):
        convert("folder", str(tmp_path), tmp_path / "x.beton", split="train")


def test_existing_output_and_unwritable_folder(tmp_path):
    convert("digits", None, tmp_path / "x.beton", split="test")
    with pytest.raises(DataError, match="exists already"):
        convert("digits", None, tmp_path / "x.beton")
    convert("digits", None, tmp_path / "x.beton", split="train", overwrite=True)
    assert BetonReader(tmp_path / "x.beton").num_samples == 1297
    with pytest.raises(DataError, match="cannot be written"):
        convert("digits", None, tmp_path / "x.beton" / "y.beton")


def test_digits(tmp_path):
    from sklearn.datasets import load_digits

    levels, digit = load_digits(return_X_y=True)
    reader = BetonReader(convert("digits", None, tmp_path / "x.beton").out)
    assert reader.num_samples == 1797
    np.testing.assert_array_equal(reader.labels, digit)
    np.testing.assert_array_equal(reader.decode(5)[:, :, 2], np.round(levels[5].reshape(8, 8) * 255 / 16))
    assert reader.decode(0).max() <= 255
    assert reader.class_names == [str(k) for k in range(10)]


def test_digits_split_is_fixed_stratified_and_disjoint():
    train, test, whole = (list(s.read(0, s.num_items)) for s in map(digits_source, ("train", "test", None)))
    assert (len(train), len(test)) == (1297, 500)
    share = np.bincount([item.label for item in whole]) * 500 / 1797
    assert np.abs(np.bincount([item.label for item in test]) - share).max() < 1
    rows = sorted(np.asarray(item.image).reshape(64).tolist() for item in train + test)
    assert rows == sorted(np.asarray(item.image).reshape(64).tolist() for item in whole)
    assert [item.label for item in test[:12]] == GOLDEN_TEST_LABELS
    assert sum(int(np.asarray(item.image).astype(np.int64).sum()) for item in test) == GOLDEN_TEST_SUM


def test_npz(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (5, 70, 72, 3), np.uint8)
    np.savez(tmp_path / "a.npz", x=x, y=np.arange(5), x_test=x[:2, :, :, 0])
    reader = BetonReader(convert("npz", str(tmp_path / "a.npz"), tmp_path / "x.beton").out)
    np.testing.assert_array_equal(np.stack([reader.decode(i) for i in range(5)]), x)
    assert reader.labels.tolist() == [0, 1, 2, 3, 4]
    assert reader.class_names is None
    reader = BetonReader(convert("npz", str(tmp_path / "a.npz"), tmp_path / "y.beton", split="test").out)
    np.testing.assert_array_equal(reader.decode(1), np.repeat(x[1, :, :, :1], 3, 2))
    assert reader.labels.tolist() == [-1, -1]
    report = convert("npz", str(tmp_path / "a.npz"), tmp_path / "z.beton", max_px=36)
    assert BetonReader(report.out).sizes.tolist() == [[35, 36]] * 5


def test_bad_npz(tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(DataError, match="no such file"):
        convert("npz", str(path), tmp_path / "x.beton")
    for content in (b"", b"hello", b"PK\x03\x04 broken"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"not a readable \.npz"):
            convert("npz", str(path), tmp_path / "x.beton")
    x = np.zeros((3, 4, 4), np.uint8)
    for arrays, reason in (
        ({"z": x}, "no array x in it; it has: z"),
        ({"x": x.astype(float)}, "x must be uint8"),
        ({"x": x[:0]}, "x must be uint8"),
        ({"x": x, "y": np.zeros(2, int)}, "y must be integers"),
        ({"x": x, "y": np.zeros(3)}, "y must be integers"),
        ({"x": x, "y": np.array([0, 1, -2])}, r"y must be in -1\.\."),
        ({"x": x, "y": np.array([0, 1, 10**11])}, r"y must be in -1\.\."),
        ({"x": np.array([None])}, "not a readable"),
    ):
        np.savez(path, **arrays)
        with pytest.raises(DataError, match=reason):
            convert("npz", str(path), tmp_path / "x.beton")


def test_killed_conversion_leaves_no_final_file(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8))
    first = save(noise, tmp_path / "data" / "a" / "0.png")
    for i in range(1, 1500):  # several seconds of encoding
        shutil.copy(first, first.with_name(f"{i}.png"))
    code = (
        "from pipelines.convert import convert; "
        f"convert('folder', {str(tmp_path / 'data')!r}, 'x.beton', labels='folders')"
    )
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment)
    deadline = time.monotonic() + 60
    while not any(p.stat().st_size > 8 << 20 for p in tmp_path.glob("x.beton.partial")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert [p.name for p in tmp_path.glob("x.beton*")] == ["x.beton.partial"]
    convert("digits", None, tmp_path / "x.beton")  # the name is free


def test_bounded_map_keeps_order_and_runs_little_ahead():
    started: list[int] = []
    lock = threading.Lock()

    def double(k: int) -> int:
        with lock:
            started.append(k)
        return 2 * k

    results = bounded_map(double, range(200), ThreadPoolExecutor(2), max_ahead=12)
    for k, result in enumerate(results):
        assert result == 2 * k
        assert len(started) <= k + 12
    assert len(started) == 200


def test_photographs(tmp_path):
    if "FASTSSL_TEST_DATA" not in os.environ:
        pytest.skip("FASTSSL_TEST_DATA is not set: no photographs")
    with tarfile.open(Path(os.environ["FASTSSL_TEST_DATA"]) / "imagenet-sample-500.tar") as tar:
        for member in tar:
            tar.extract(member, tmp_path / "data", set_attrs=False)
    report = convert("folder", str(tmp_path / "data" / "imagenet-sample"), tmp_path / "x.beton")
    assert report.num_images == report.num_passed == 500
    reader = BetonReader(report.out)
    sources = sorted((tmp_path / "data" / "imagenet-sample").iterdir())
    for i, path in enumerate(sources):
        assert reader.image_bytes(i).tobytes() == path.read_bytes()
    report = convert("folder", str(tmp_path / "data"), tmp_path / "small.beton", max_px=128, labels="folders")
    reader = BetonReader(report.out)
    assert reader.sizes.max() == 128
    assert reader.class_names == ["imagenet-sample"]
    for i in (0, 250):
        with Image.open(sources[i]) as image:
            expected = image.convert("RGB").resize(reader.sizes[i][::-1].tolist(), Image.Resampling.LANCZOS)
        assert mean_difference(reader.decode(i), expected) < 4
