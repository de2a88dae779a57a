"""All engines give the same views in the same order; an error in a decoding thread reaches the consumer."""

import importlib.util
import io
import os
import sys
import tarfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from pipelines.bad_samples import BadSamples
from pipelines.beton import BetonReader, BetonWriter
from pipelines.engines import build_engine as build_engine_on
from pipelines.engines.turbojpeg import OK, JpegDecoder, decode_jpeg, load_library
from pipelines.errors import DataError
from pipelines.views import RECIPES, ViewSpec, draw, size_groups
from tests.helpers.plans import draw_of, plan_batches

# Decoding agrees with Pillow exactly here: both are libjpeg-turbo's accurate DCT. Another build may differ by 1.
MAX_DECODE_DIFFERENCE_LEVELS = 1
# Resampling alone differs by at most 1 level (test_resample.py), where float32 sums are rounded to either side.
MAX_VIEW_DIFFERENCE_LEVELS = 1
MEAN_VIEW_DIFFERENCE_LEVELS = 0.002
# DALI's resampler: decoded pixels are the same to the level, and so are views that are not resized.
DALI_MAX_DIFFERENCE_LEVELS = 16
DALI_MEAN_DIFFERENCE_LEVELS = 0.025
DALI_SHARE_BEYOND_ONE_LEVEL = 0.003


def build_engine(name: str, images: BetonReader, device: torch.device = torch.device("cpu"), **options):  # noqa: B008
    engine = build_engine_on(name, images, device=device, **options)
    engine.images = images  # `start` takes the samples from there
    return engine


all_engines = pytest.mark.parametrize("name", ["ffcv", "resident", "dali"])

SPECS = (ViewSpec(size_px=64, crop_scale=(0.08, 1.0)), ViewSpec(size_px=64), ViewSpec(size_px=24))


def encode(pixels: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90, **options)
    return file.getvalue()


def make_photograph(rng: np.random.Generator, height_px: int, width_px: int) -> np.ndarray:
    coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width_px, height_px), Image.Resampling.BICUBIC), np.float64)
    return np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)


def make_jpegs(num: int) -> list[bytes]:
    """Photograph-like JPEGs of uneven odd sizes: 4:2:0, 4:4:4, 4:2:2, progressive and grey."""
    rng = np.random.default_rng(0)
    kinds = [{"subsampling": 2}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}, {}]
    files = []
    for i in range(num):
        pixels = make_photograph(rng, *rng.integers(50, 260, 2).tolist())
        files.append(encode(pixels[..., 0] if i % 5 == 4 else pixels, **kinds[i % 5]))
    return files


def write_jpegs(path: Path, files: list[bytes], sizes: dict[int, tuple[int, int]] | None = None) -> BetonReader:
    """Write JPEGs, labelled 0, 1, 2, ...; `sizes` overrides the (height, width) that is recorded."""
    with BetonWriter(path, len(files)) as writer:
        for i, data in enumerate(files):
            width_px, height_px = Image.open(io.BytesIO(data)).size
            height_px, width_px = (sizes or {}).get(i, (height_px, width_px))
            writer.write_jpeg(data, height_px=height_px, width_px=width_px, label=i)
    return BetonReader(path)


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory) -> BetonReader:
    return write_jpegs(tmp_path_factory.mktemp("jpegs") / "jpegs.beton", make_jpegs(30))


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> BetonReader:
    from sklearn.datasets import load_digits

    path = tmp_path_factory.mktemp("digits") / "digits.beton"
    images, labels = load_digits(return_X_y=True)
    with BetonWriter(path, 64) as writer:
        for pixels, label in zip(images[:64].reshape(-1, 8, 8, 1), labels[:64], strict=True):
            writer.write_raw(np.repeat(np.round(pixels * 255 / 16).astype(np.uint8), 3, axis=2), label=int(label))
    return BetonReader(path)


@pytest.fixture(params=["ffcv", "resident", "dali"])
def engine(jpegs, request):
    engine = build_engine(request.param, jpegs, num_workers=2, prefetch_batches=2)
    yield engine
    engine.close()


def start(engine, ids, specs=SPECS, local_batch_size=8, draw_batch=None):
    plans = plan_batches(draw_batch or draw_of(specs), np.asarray(ids), engine.images, local_batch_size)
    return engine.batches(plans, local_batch_size, size_groups(specs))


def iterate(engine, ids, specs=SPECS, local_batch_size=8, draw_batch=None):
    """Copies of all batches: an engine may overwrite a batch once the next is asked for."""
    for raw in start(engine, ids, specs, local_batch_size, draw_batch):
        yield [view.copy() for view in raw.views], raw


def assert_same_views(reader: BetonReader, specs, name="ffcv") -> None:
    ids = np.random.default_rng(1).permutation(reader.num_samples)
    engine = build_engine(name, reader, num_workers=2, prefetch_batches=2)
    reference = build_engine("torch", reader, num_workers=1, prefetch_batches=1)
    pairs = zip(iterate(engine, ids, specs), iterate(reference, ids, specs), strict=True)
    differences = []
    for (views, raw), (expected, expected_raw) in pairs:
        np.testing.assert_array_equal(raw.sample_ids, expected_raw.sample_ids)
        np.testing.assert_array_equal(raw.params, expected_raw.params)
        np.testing.assert_array_equal(raw.labels, reader.labels[raw.sample_ids])
        for ours, theirs in zip(views, expected, strict=True):
            assert ours.shape == theirs.shape
            differences.append(np.abs(ours.astype(np.int16) - theirs).reshape(-1))
    engine.close()
    difference = np.concatenate(differences)
    if name == "dali":
        assert difference.max() <= DALI_MAX_DIFFERENCE_LEVELS
        assert difference.mean() <= DALI_MEAN_DIFFERENCE_LEVELS
        assert (difference > 1).mean() <= DALI_SHARE_BEYOND_ONE_LEVEL
        return
    assert difference.max() <= MAX_VIEW_DIFFERENCE_LEVELS
    assert difference.mean() <= MEAN_VIEW_DIFFERENCE_LEVELS


def test_an_unknown_engine_lists_the_known(jpegs):
    with pytest.raises(ValueError, match="ffcv, dali, resident, torch, synthetic"):
        build_engine("dalli", jpegs, num_workers=1, prefetch_batches=1)


@all_engines
@pytest.mark.parametrize("recipe", ["digits", "mio_small"])
def test_views_equal_torchs_on_digits(digits, recipe, name):
    assert_same_views(digits, RECIPES[recipe], name)


@all_engines
def test_views_equal_torchs_on_jpegs_with_two_output_sizes(jpegs, name):
    assert_same_views(jpegs, SPECS, name)


@pytest.fixture(scope="module")
def imagenet_sample(tmp_path_factory) -> BetonReader:
    folder = os.environ.get("FASTSSL_TEST_DATA")
    archive = Path(folder or "") / "imagenet-sample-500.tar"
    if not folder or not archive.is_file():
        pytest.skip("set FASTSSL_TEST_DATA to the folder of imagenet-sample-500.tar")
    with tarfile.open(archive) as tar:
        files = [tar.extractfile(member) for member in tar if member.name.lower().endswith((".jpg", ".jpeg"))]
        data = [file.read() for file in files[::8] if file]
    data = [file for file in data if Image.open(io.BytesIO(file)).mode in ("RGB", "L")]
    return write_jpegs(tmp_path_factory.mktemp("imagenet") / "imagenet.beton", data)


@pytest.mark.parametrize("name", ["ffcv", "dali"])
def test_views_of_raw_and_jpeg_samples_equal_torchs(tmp_path, name):
    rng, files = np.random.default_rng(2), make_jpegs(12)
    path = tmp_path / "mixed.beton"
    with BetonWriter(path, 2 * len(files)) as writer:
        for i, data in enumerate(files):
            width_px, height_px = Image.open(io.BytesIO(data)).size
            writer.write_jpeg(data, height_px=height_px, width_px=width_px, label=i)
            writer.write_raw(make_photograph(rng, 50 + i, 80 - i), label=i)
    assert_same_views(BetonReader(path), SPECS, name)


def test_dali_decodes_as_the_others_do(jpegs):
    """Whole images at their own size: nothing is resampled."""
    rng = np.random.default_rng(3)
    kinds = [{"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}, {"progressive": True}]
    files = [encode(make_photograph(rng, 64, 64), **kind) for kind in kinds]
    files.append(encode(make_photograph(rng, 64, 64)[..., 0]))
    reader = write_jpegs(jpegs.path.with_name("whole.beton"), files)
    engine = build_engine("dali", reader, num_workers=1, prefetch_batches=1)
    ((views,), raw) = next(iterate(engine, np.arange(5), (ViewSpec(size_px=64, crop=False, flip_p=0.0),)))
    for view, i in zip(views[:, 0], raw.sample_ids, strict=True):
        np.testing.assert_array_equal(view, reader.decode(i))
    engine.close()


@all_engines
def test_views_equal_torchs_on_photographs(imagenet_sample, name):
    assert_same_views(imagenet_sample, RECIPES["byol"], name)


def assert_decodes_like_pillow(reader: BetonReader) -> None:
    decoder = JpegDecoder()
    for i in range(reader.num_samples):
        height_px, width_px = reader.sizes[i].tolist()
        decoder.reserve(height_px * width_px * 3)
        assert decode_jpeg(decoder.handle, reader.image_bytes(i), height_px, width_px, decoder.pixels) == OK
        pixels = decoder.pixels[: height_px * width_px * 3].reshape(height_px, width_px, 3)
        assert np.abs(pixels.astype(int) - reader.decode(i)).max() <= MAX_DECODE_DIFFERENCE_LEVELS
    decoder.close()


def test_decoding_equals_pillow_on_jpegs(jpegs):
    assert_decodes_like_pillow(jpegs)


def test_decoding_equals_pillow_on_photographs(imagenet_sample):
    assert_decodes_like_pillow(imagenet_sample)


@pytest.mark.parametrize("name", ["ffcv", "dali", "resident", "torch", "synthetic"])
def test_order_labels_and_the_short_last_batch(jpegs, name):
    engine = build_engine(name, jpegs, num_workers=2, prefetch_batches=2)
    ids = np.array([5, 3, 3, 29, 0, 11, 17])
    raws = [raw for _, raw in iterate(engine, ids, local_batch_size=3)]
    assert [len(raw.labels) for raw in raws] == [3, 3, 1]
    assert [[view.shape for view in raw.views] for raw in raws[1:]] == [
        [(3, 2, 64, 64, 3), (3, 1, 24, 24, 3)],
        [(1, 2, 64, 64, 3), (1, 1, 24, 24, 3)],
    ]
    np.testing.assert_array_equal(np.concatenate([raw.sample_ids for raw in raws]), ids)
    np.testing.assert_array_equal(np.concatenate([raw.labels for raw in raws]), ids)
    np.testing.assert_array_equal(raws[0].params, draw(SPECS, 7, 3, ids[:3], jpegs.sizes[ids[:3]]))
    assert list(iterate(engine, np.empty(0, np.int64))) == []
    engine.close()


@all_engines
def test_views_do_not_depend_on_batch_size_or_workers(jpegs, name):
    ids = np.arange(30)
    one_worker = build_engine(name, jpegs, num_workers=1, prefetch_batches=1)
    two_workers = build_engine(name, jpegs, num_workers=2, prefetch_batches=2)
    alone = np.concatenate([views[0] for views, _ in iterate(one_worker, ids, local_batch_size=1)])
    together = np.concatenate([views[0] for views, _ in iterate(two_workers, ids, local_batch_size=16)])
    np.testing.assert_array_equal(alone, together)
    one_worker.close()
    two_workers.close()


def test_a_batch_stays_as_it_is_until_the_next_is_asked_for(engine):
    ids = np.arange(30)
    expected = [views for views, _ in iterate(engine, ids, local_batch_size=2)]
    batches = start(engine, ids, local_batch_size=2)
    for raw, views in zip(batches, expected, strict=True):
        if raw.sample_ids[0] < 12:
            time.sleep(0.15)  # the engine fills all its slots meanwhile
        for array, kept in zip(raw.views, views, strict=True):
            np.testing.assert_array_equal(array, kept)


def damage(data: bytes, kind: str) -> bytes:
    middle = len(data) // 2
    tables = data.index(b"\xff\xdb")  # of quantization
    after = tables + 2 + int.from_bytes(data[tables + 2 : tables + 4], "big")
    return {
        "no tables": data[:tables] + data[after:],
        "no header": b"\0" * len(data),
        "cut short": data[:middle],
        "zeroed": data[:middle] + b"\0" * (len(data) - middle),
        "overwritten": data[:middle] + b"\xff\xd0\x12\xff\xc4" * 40 + data[middle + 200 :],
    }[kind]


@pytest.mark.parametrize("kind", ["no header", "no tables", "cut short", "zeroed", "overwritten"])
def test_a_damaged_jpeg_is_named(tmp_path, kind):
    files = make_jpegs(20)
    path = tmp_path / "damaged.beton"
    sizes = {13: Image.open(io.BytesIO(files[13])).size[::-1]}
    with BetonWriter(path, len(files)) as writer:
        for i, data in enumerate(files):
            width_px, height_px = Image.open(io.BytesIO(data)).size
            height_px, width_px = sizes.get(i, (height_px, width_px))
            writer.write_jpeg(damage(data, kind) if i == 13 else data, height_px=height_px, width_px=width_px)
    engine = build_engine("ffcv", BetonReader(path), num_workers=2, prefetch_batches=2)
    batches = iterate(engine, np.arange(20), local_batch_size=4)
    assert [len(next(batches)[1].labels) for _ in range(3)] == [4, 4, 4]
    with pytest.raises(DataError, match=r"damaged\.beton: image 13 cannot be decoded"):
        next(batches)
    good = np.array([0, 1, 14, 19])
    assert [len(raw.labels) for _, raw in iterate(engine, good)] == [4]  # the engine lives on
    engine.close()


def test_a_jpeg_that_only_dali_refuses_is_named(tmp_path):
    """libjpeg skips the bytes between two segments, and warns first of the unknown revision, which harms no pixel."""
    files = make_jpegs(3)
    tables = files[1].index(b"\xff\xdb")
    files[1] = files[1][:11] + b"\xc7" + files[1][12:tables] + b"\x12\x34" + files[1][tables:]
    reader = write_jpegs(tmp_path / "odd.beton", files)
    engine = build_engine("dali", reader, num_workers=1, prefetch_batches=1)
    with pytest.raises(DataError, match=r"odd\.beton: image 1 cannot be decoded by DALI, though"):
        list(iterate(engine, np.arange(3)))
    engine.close()


def write_damaged(path: Path, files: list[bytes], kinds: dict[int, str]) -> BetonReader:
    """JPEGs as `write_jpegs` writes them, some of them damaged."""
    with BetonWriter(path, len(files)) as writer:
        for i, data in enumerate(files):
            height_px, width_px = Image.open(io.BytesIO(data)).size[::-1]
            stored = damage(data, kinds[i]) if i in kinds else data
            writer.write_jpeg(stored, height_px=height_px, width_px=width_px, label=i)
    return BetonReader(path)


@all_engines
def test_the_next_good_sample_takes_a_bad_ones_place(tmp_path, capsys, name):
    """The same whatever the batch, and the same as if the good one had been asked for with the bad one's draw."""
    files = make_jpegs(12)
    reader = write_damaged(
        tmp_path / "damaged.beton", files, {4: "zeroed", 7: "no header", 8: "cut short", 11: "overwritten"}
    )
    sound = write_jpegs(tmp_path / "sound.beton", files)
    in_place_of = {4: 5, 7: 9, 8: 9, 11: 0}
    expected_ids = np.array([in_place_of.get(i, i) for i in range(12)])

    def draw_moved(ids, sizes):
        """What the substitutes are asked for: the bad ones' draws, boxes moved to the substitutes' sizes."""
        rows = draw(SPECS, 7, 3, np.arange(12), sound.sizes)
        for i, good in in_place_of.items():
            height_px, width_px = sound.sizes[i].tolist()
            to_height_px, to_width_px = sound.sizes[good].tolist()
            for box in rows["crop_box"][i]:
                top, left, height, width = box.tolist()
                box[:] = (
                    top * to_height_px // height_px, left * to_width_px // width_px,
                    max(1, height * to_height_px // height_px), max(1, width * to_width_px // width_px),
                )  # fmt: skip
        return rows

    reference = build_engine("torch", sound, num_workers=1, prefetch_batches=1)
    ((expected, _),) = iterate(reference, expected_ids, local_batch_size=12, draw_batch=draw_moved)
    for local_batch_size in (12, 5):
        bad_samples = BadSamples(reader.path, 12, 0.4)
        engine = build_engine(name, reader, num_workers=2, prefetch_batches=2, bad_samples=bad_samples)
        batches = list(iterate(engine, np.arange(12), local_batch_size=local_batch_size))
        engine.close()
        np.testing.assert_array_equal(np.concatenate([raw.sample_ids for _, raw in batches]), expected_ids)
        np.testing.assert_array_equal(np.concatenate([raw.labels for _, raw in batches]), expected_ids)
        for group in (0, 1):
            ours = np.concatenate([views[group] for views, _ in batches])
            limit = DALI_MAX_DIFFERENCE_LEVELS if name == "dali" else MAX_VIEW_DIFFERENCE_LEVELS
            assert np.abs(ours.astype(int) - expected[group]).max() <= limit
        assert sorted(bad_samples.reasons) == [4, 7, 8, 11]
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 4
        assert all("fastssl: warning: " in line and "takes its place" in line for line in lines)


@all_engines
def test_too_many_bad_samples_end_the_iteration(tmp_path, name):
    reader = write_damaged(tmp_path / "damaged.beton", make_jpegs(20), {3: "zeroed", 9: "zeroed", 15: "zeroed"})

    def run(max_fraction: float) -> int:
        bad_samples = BadSamples(reader.path, 20, max_fraction)
        engine = build_engine(name, reader, num_workers=2, prefetch_batches=2, bad_samples=bad_samples)
        try:
            for _ in range(3):  # the same ones again are not more
                list(iterate(engine, np.arange(20), local_batch_size=4))
        finally:
            engine.close()
        return len(bad_samples.reasons)

    assert run(0.15) == 3
    with pytest.raises(DataError, match=r"3 of 20 are bad, more than data\.max_bad_fraction=0\.14 allows"):
        run(0.14)


def test_nothing_but_bad_samples(tmp_path):
    reader = write_damaged(tmp_path / "damaged.beton", make_jpegs(3), dict.fromkeys(range(3), "no header"))
    bad_samples = BadSamples(reader.path, 3, 1.0)
    engine = build_engine("ffcv", reader, num_workers=1, prefetch_batches=1, bad_samples=bad_samples)
    with pytest.raises(DataError, match="so 3 of 3 are bad"):
        list(iterate(engine, np.arange(3)))
    engine.close()


def test_a_jpeg_that_dali_refuses_is_named(tmp_path):
    files = make_jpegs(12)
    height_px, width_px = Image.open(io.BytesIO(files[5])).size[::-1]
    path = tmp_path / "damaged.beton"
    with BetonWriter(path, len(files)) as writer:
        for i, data in enumerate(files):
            height_px, width_px = Image.open(io.BytesIO(data)).size[::-1]
            writer.write_jpeg(damage(data, "no header") if i == 5 else data, height_px=height_px, width_px=width_px)
    engine = build_engine("dali", BetonReader(path), num_workers=2, prefetch_batches=2)
    with pytest.raises(DataError, match=r"damaged\.beton: image 5 cannot be decoded"):
        list(iterate(engine, np.arange(12), local_batch_size=4))
    good = np.array([0, 1, 7, 11])
    assert [len(raw.labels) for _, raw in iterate(engine, good)] == [4]  # the engine lives on
    engine.close()


def test_dali_that_is_left_early_starts_again(jpegs):
    engine = build_engine("dali", jpegs, num_workers=2, prefetch_batches=3)
    whole = [views for views, _ in iterate(engine, np.arange(30), local_batch_size=4)]
    for num_taken in (1, 3):
        for (views, _), expected in zip(iterate(engine, np.arange(30), local_batch_size=4), whole[:num_taken]):  # noqa: B905
            np.testing.assert_array_equal(views[0], expected[0])
    left_open = iterate(engine, np.arange(30), local_batch_size=4)
    next(left_open)
    again = [views for views, _ in iterate(engine, np.arange(30), local_batch_size=4)]
    for views, expected in zip(again, whole, strict=True):
        np.testing.assert_array_equal(views[1], expected[1])
    with pytest.raises(RuntimeError, match="ended by another one"):
        next(left_open)
    engine.close()


def test_dali_looks_for_damage_ahead_of_use(jpegs, monkeypatch):
    from pipelines.engines import dali

    checked = []
    check_jpeg = dali.check_jpeg
    monkeypatch.setattr(dali, "check_jpeg", lambda *arguments: checked.append(0) or check_jpeg(*arguments))
    engine = build_engine("dali", jpegs, num_workers=2, prefetch_batches=2)
    batches = iterate(engine, np.arange(30), local_batch_size=2)
    next(batches)
    deadline_s = time.monotonic() + 20
    while len(checked) < 30 and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert len(checked) == 30
    assert len(list(batches)) == 14
    assert len(list(iterate(engine, np.arange(30)))) == 4
    assert len(checked) == 30  # once
    engine.close()


def test_without_dali_its_engine_says_what_to_install(jpegs, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.delitem(sys.modules, "pipelines.engines.dali", raising=False)
    with pytest.raises(DataError, match="engine dali needs NVIDIA DALI: pip install nvidia-dali-cuda130"):
        build_engine("dali", jpegs, num_workers=1, prefetch_batches=1)


@all_engines
def test_without_ffcv_its_jpegs_are_refused_in_one_line(jpegs, name, monkeypatch):
    load_library.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(DataError, match=r"^decoding JPEGs needs FFCV: pip install --no-deps ffcv==1\.0\.2$"):
        build_engine(name, jpegs, num_workers=1, prefetch_batches=1)


@pytest.mark.parametrize("kind", ["no header", "zeroed"])
def test_a_damaged_jpeg_is_named_before_it_becomes_resident(tmp_path, kind):
    files = make_jpegs(300)
    sizes = {i: Image.open(io.BytesIO(files[i])).size[::-1] for i in (290, 299)}
    files[290], files[299] = damage(files[290], kind), files[299][:-2] + b"\x12\x34\x56" + files[299][-2:]
    path = tmp_path / "damaged.beton"
    with BetonWriter(path, len(files)) as writer:
        for i, data in enumerate(files):
            height_px, width_px = sizes.get(i) or Image.open(io.BytesIO(data)).size[::-1]
            writer.write_jpeg(data, height_px=height_px, width_px=width_px)
    with pytest.raises(DataError, match=r"damaged\.beton: image 290 cannot be decoded"):
        build_engine("resident", BetonReader(path), num_workers=2, prefetch_batches=2)


def test_images_that_do_not_fit_into_memory_are_refused_before_they_are_decoded(jpegs, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10_000))
    with pytest.raises(DataError, match=r"engine resident needs 0\.0 GB of memory .* 0\.0 GB are free"):
        build_engine("resident", jpegs, num_workers=1, prefetch_batches=1)


def test_images_that_do_not_fit_on_the_gpu_are_refused_before_they_are_decoded(jpegs, monkeypatch):
    num_bytes = int(jpegs.sizes.prod(1, dtype=np.int64).sum()) * 3
    free_bytes = num_bytes - 1
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_bytes, 80_000_000_000))
    monkeypatch.setattr("pipelines.engines.resident._decode_all", lambda *_: pytest.fail("decoded"))
    with pytest.raises(
        DataError, match=r"jpegs.*: engine resident needs .* GB of memory of the GPU .* take another en"
    ):
        build_engine("resident", jpegs, num_workers=1, prefetch_batches=1, device=torch.device("cuda"))


def test_a_jpeg_of_another_size_is_named(tmp_path):
    reader = write_jpegs(tmp_path / "resized.beton", make_jpegs(6), sizes={2: (64, 64)})
    with pytest.raises(DataError, match=r"resized\.beton: image 2 is not 64x64 as recorded"):
        build_engine("resident", reader, num_workers=2, prefetch_batches=2)
    engine = build_engine("ffcv", reader, num_workers=2, prefetch_batches=2)
    with pytest.raises(DataError, match=r"resized\.beton: image 2 is not 64x64 as recorded"):
        list(iterate(engine, np.arange(6)))
    engine.close()


def test_a_warning_that_leaves_the_image_whole_is_no_error(tmp_path):
    """Stray bytes before the end marker: libjpeg warns, Pillow does not mind."""
    files = make_jpegs(5)
    files[3] = files[3][:-2] + b"\x12\x34\x56" + files[3][-2:]
    reader = write_jpegs(tmp_path / "stray.beton", files)
    for name in ("ffcv", "resident"):
        assert_same_views(reader, SPECS, name)


def test_a_box_outside_the_image_is_refused(engine):
    def draw_outside(ids, sizes):
        params = draw(SPECS, 0, 0, ids, sizes)
        params["crop_box"][1, 1] = (0, 1, *sizes[1])
        return params

    with pytest.raises(DataError, match=r"image 1 was given a crop box outside"):
        list(iterate(engine, np.arange(8), draw_batch=draw_outside))


@all_engines
def test_an_engine_lives_on_after_an_exception_in_the_draw(jpegs, name):
    def fail(ids, sizes):
        if 20 in ids:
            raise KeyError("draw failed")
        return draw(SPECS, 7, 3, ids, sizes)

    engine = build_engine(name, jpegs, num_workers=2, prefetch_batches=2)
    with pytest.raises(KeyError, match="draw failed"):
        list(iterate(engine, np.arange(30), draw_batch=fail))
    assert [raw.sample_ids[0] for _, raw in iterate(engine, np.arange(30))] == [0, 8, 16, 24]
    engine.close()


@pytest.fixture(params=["ffcv", "resident"])
def slow(jpegs, request, monkeypatch):
    """An engine with one thread, whose tasks take at least 0.1 s each, and the futures of all its tasks."""
    engine = build_engine(request.param, jpegs, num_workers=1, prefetch_batches=2)
    decoder = engine._decoder if request.param == "ffcv" else engine._on_cpu._decoder
    tasks, submit, decode_range = [], decoder._pool.submit, decoder._decode_range
    monkeypatch.setattr(decoder, "_decode_range", lambda *args: (time.sleep(0.1), decode_range(*args)))
    monkeypatch.setattr(decoder._pool, "submit", lambda *args: tasks.append(submit(*args)) or tasks[-1])
    yield engine, tasks
    engine.close()


def test_leaving_the_loop_stops_the_work(slow):
    engine, tasks = slow

    def begin():
        tasks.clear()
        batches = start(engine, np.arange(30), local_batch_size=2)
        next(batches)
        assert [task.done() for task in tasks] == [True, False, False]
        return batches

    def assert_stopped():
        assert all(task.done() for task in tasks)
        assert tasks[2].cancelled()

    begin().close()
    assert_stopped()
    tasks.clear()
    for _ in start(engine, np.arange(30), local_batch_size=2):
        break
    assert_stopped()
    abandoned = begin()
    assert len(list(iterate(engine, np.arange(30)))) == 4  # a new iteration ends the one before
    assert_stopped()
    with pytest.raises(RuntimeError, match="ended by another one"):
        next(abandoned)
    left_open = begin()
    engine.close()
    assert_stopped()
    with pytest.raises(RuntimeError, match="ended by another one"):
        next(left_open)
    engine.close()


def test_closing_leaves_no_thread(jpegs):
    num_threads = threading.active_count()
    engine = build_engine("ffcv", jpegs, num_workers=2, prefetch_batches=2)
    next(start(engine, np.arange(30), local_batch_size=2))
    assert threading.active_count() > num_threads
    engine.close()
    assert threading.active_count() == num_threads


def test_a_consumer_in_another_thread_does_not_wait_for_a_closed_engine(slow):
    engine, _ = slow

    def consume():
        with suppress(Exception):
            list(iterate(engine, np.arange(30)))

    consumer = threading.Thread(target=consume)
    consumer.start()
    time.sleep(0.02)
    engine.close()
    consumer.join(10)
    assert not consumer.is_alive()


def test_work_ahead_is_bounded(jpegs):
    planned, engine = [], build_engine("ffcv", jpegs, num_workers=2, prefetch_batches=3)

    def draw_batch(ids, sizes):
        planned.append(ids)
        return draw(SPECS, 7, 3, ids, sizes)

    for number, _ in enumerate(iterate(engine, np.arange(30), local_batch_size=2, draw_batch=draw_batch), 1):
        if number < 5:
            time.sleep(0.1)  # time enough to go too far
        assert number <= len(planned) <= number + 3
    engine.close()


def test_a_batch_whose_draw_fails_comes_after_those_before_it(jpegs):
    def fail(ids, sizes):
        if 20 in ids:
            raise KeyError("draw failed")
        return draw(SPECS, 7, 3, ids, sizes)

    engine = build_engine("ffcv", jpegs, num_workers=2, prefetch_batches=3)
    batches = iterate(engine, np.arange(30), local_batch_size=4, draw_batch=fail)
    assert [next(batches)[1].sample_ids[0] for _ in range(5)] == [0, 4, 8, 12, 16]
    with pytest.raises(KeyError, match="draw failed"):
        next(batches)
    engine.close()


def resident_bytes() -> int:
    num_pages = int(Path("/proc/self/statm").read_text().split()[1])
    return num_pages * os.sysconf("SC_PAGE_SIZE")


def test_epochs_grow_neither_memory_nor_threads(engine):
    specs = (ViewSpec(size_px=224), ViewSpec(size_px=224))
    output_bytes = 4 * 15 * 2 * 224 * 224 * 3  # of one epoch's slots
    seen = []
    for _ in range(20):
        for _ in start(engine, np.arange(30), specs, local_batch_size=15):
            pass
        seen.append((threading.active_count(), resident_bytes()))
    assert seen[-1][0] == seen[0][0]
    # Which slots are touched varies, so the peak of the first epochs counts; 15 epochs that leaked would be 15.
    most_at_first = max(resident for _, resident in seen[:5])
    assert seen[-1][1] - most_at_first < 2 * output_bytes
