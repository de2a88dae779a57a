"""Conversions in a random order: the same images, mixed over the shards, whatever the source."""

import gzip
import io
import json
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import pipelines.convert
from pipelines.beton import BetonReader
from pipelines.convert import convert, convert_shards
from pipelines.convert.npz import npz_source
from pipelines.convert.shuffle import shuffled
from pipelines.convert.source import Source
from pipelines.convert.sources import SourceOptions, build_source, join_sources
from pipelines.convert.webdataset import webdataset_source
from pipelines.errors import DataError
from pipelines.order.keyed import sample_at
from tests.helpers.image_folders import write_image_folder

PIXELS = np.random.default_rng(0).integers(0, 256, (23, 6, 5, 3), np.uint8)


def png(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 5, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, first: int, num: int, **options) -> Path:
    """Samples with labels, some without an image, other members between them, and names that need extra headers."""
    with tarfile.open(path, "w", **options) as tar:

        def add(name: str, data: bytes) -> None:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))

        for k in range(first, first + num):
            folder = "long-" * 40 if k % 3 else "ä"
            add(f"{folder}/{k}.cls", b"%d" % (k % 5))
            add("no-dot", b"between")
            add(f"{folder}/{k}.png", png(k))
            add(f"{folder}/{k}.other.png", b"not the image")
            add(f"{folder}/{k}-text.txt", b"no image")
    return path


def folder_of(tmp_path: Path) -> Source:
    return build_source("folder", str(write_image_folder(tmp_path / "images", 23)), SourceOptions())


def csv_of(tmp_path: Path) -> Source:
    rows = "".join(f"{k}.png,{'xy'[k % 2]}\n" for k in range(23))
    (tmp_path / "list.csv").write_text(f"path,label\n{rows}")
    return build_source("csv", str(tmp_path / "list.csv"), SourceOptions())


def npz_of(tmp_path: Path) -> Source:
    np.savez(tmp_path / "x.npz", x=PIXELS, y=np.arange(23))
    return npz_source(tmp_path / "x.npz")


def column_major_npz_of(tmp_path: Path) -> Source:
    np.savez_compressed(tmp_path / "x.npz", x=np.asfortranarray(PIXELS))
    return npz_source(tmp_path / "x.npz")


def tars_of(tmp_path: Path, **options) -> Source:
    archives = [str(write_tar(tmp_path / f"{k}.tar", 8 * k, 8, **options)) for k in range(3)]
    return webdataset_source(archives)


def gnu_tars_of(tmp_path: Path) -> Source:
    return tars_of(tmp_path, format=tarfile.GNU_FORMAT)


def pax_tars_of(tmp_path: Path) -> Source:
    return tars_of(tmp_path, format=tarfile.PAX_FORMAT, pax_headers={"comment": "global"})


def digits_of(_: Path) -> Source:
    return build_source("digits", None, SourceOptions(split="test"))


def joined_of(tmp_path: Path) -> Source:
    np.savez(tmp_path / "y.npz", x=PIXELS)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    rows = [folder_of(tmp_path / "a"), npz_source(tmp_path / "y.npz"), csv_of(tmp_path / "b")]
    return join_sources(rows)


def seen(items) -> list[tuple[str, bytes | str, int]]:
    return [(x.name, x.image.tobytes() if isinstance(x.image, np.ndarray) else x.image, x.label) for x in items]


@pytest.mark.parametrize(
    "build", [folder_of, csv_of, npz_of, column_major_npz_of, gnu_tars_of, pax_tars_of, digits_of, joined_of]
)
def test_every_source_gives_its_items_in_any_order(tmp_path, monkeypatch, build):
    monkeypatch.setattr("pipelines.convert.webdataset.MAX_OPEN_ARCHIVES", 2)
    monkeypatch.setattr("pipelines.convert.shuffle._NUM_AT_ONCE", 7)
    source = build(tmp_path)
    in_order = seen(source.read(0, source.num_items))
    assert len(set(in_order)) == source.num_items
    numbers = [*range(source.num_items - 1, -1, -1), 0, 3, 3, source.num_items - 1]
    assert seen(source.pick(iter(numbers))) == [in_order[k] for k in numbers]
    mixed = shuffled(source, 5)
    order = sample_at(np.arange(source.num_items), source.num_items, 5, (1 << 32) - 1)
    expected = [in_order[k] for k in order]
    assert expected != in_order
    assert seen(mixed.read(0, source.num_items)) == expected
    assert seen(mixed.read(4, 15)) == expected[4:15]
    assert (mixed.num_items, mixed.class_names) == (source.num_items, source.class_names)


def test_golden(tmp_path):
    """What changes this order ends every conversion that is to be resumed."""
    names = [item.name for item in shuffled(npz_of(tmp_path), 7).read(0, 8)]
    assert [int(name.rsplit(maxsplit=1)[1]) for name in names] == [8, 15, 2, 19, 3, 12, 21, 13]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_image_folder(tmp_path_factory.mktemp("shuffle") / "images", 240)


def stored(path: Path) -> list[bytes]:
    reader = BetonReader(path)
    return [reader.image_bytes(k).tobytes() for k in range(reader.num_samples)]


def test_a_shuffled_file_has_the_same_images_in_another_order(images, tmp_path):
    def run(name: str, **options) -> Path:
        return convert("folder", str(images), tmp_path / name, **options).out

    straight = run("straight.beton")
    a, again, b = run("a.beton", shuffle=1), run("again.beton", shuffle=1), run("b.beton", shuffle=2)
    assert a.read_bytes() == again.read_bytes()
    assert len(stored(a)) == 240 - 5  # five are corrupt
    assert sorted(stored(a)) == sorted(stored(straight)) == sorted(stored(b))
    assert stored(a) != stored(straight)
    assert stored(a) != stored(b)
    labels = BetonReader(a).labels
    # The classes of the straight file are one block each; here they change about every second time.
    assert np.count_nonzero(np.diff(BetonReader(straight).labels)) == 1
    assert 85 < np.count_nonzero(np.diff(labels)) < 150  # 117 expected, standard deviation 7.6
    options = [json.loads(Path(f"{path}.json").read_text())["options"] for path in (straight, a)]
    assert "shuffle" not in options[0]
    assert options[1]["shuffle"] == 1


def test_shards_are_ranges_of_the_shuffled_whole(images, tmp_path):
    whole = convert("folder", str(images), tmp_path / "whole.beton", shuffle=3)
    for shard in (2, 0, 1):  # tasks of their own, in any order
        convert_shards("folder", str(images), tmp_path / "x.beton", num_shards=3, shard=shard, shuffle=3)
    parts = [tmp_path / f"x-{k:05d}-of-00003.beton" for k in range(3)]
    assert [image for part in parts for image in stored(part)] == stored(whole.out)
    for part in parts:
        assert 25 < np.count_nonzero(BetonReader(part).labels) < 55  # of about 80, in two classes


def test_an_interrupted_conversion_is_resumed_with_its_seed_alone(images, tmp_path, monkeypatch):
    whole = convert("folder", str(images), tmp_path / "whole.beton", shuffle=3)
    out, num_written, write = tmp_path / "x.beton", 0, pipelines.convert._write

    def interrupted(*arguments) -> None:
        nonlocal num_written
        num_written += 1
        if num_written == 100:
            raise KeyboardInterrupt
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("pipelines.convert.CHECKPOINT_EVERY_S", 0)
        patch.setattr("pipelines.convert._write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert("folder", str(images), out, shuffle=3)
    for seed in (4, None):
        with pytest.raises(DataError, match="of another source or other options"):
            convert("folder", str(images), out, resume=True, shuffle=seed)
    num_read = []
    monkeypatch.setattr("pipelines.convert._write", lambda *args: (num_read.append(1), write(*args)))
    convert("folder", str(images), out, resume=True, shuffle=3)
    assert out.read_bytes() == whole.out.read_bytes()
    assert 0 < len(num_read) < 240 - 90  # continued, not begun again
    with pytest.raises(DataError, match="exists already, of another source or other options"):
        convert("folder", str(images), out, resume=True, shuffle=4)


def write_parquet(path: Path) -> str:
    pq.write_table(pa.table({"image": pa.array([png(k) for k in range(4)], pa.binary())}), path)
    return str(path)


def write_tar_gz(path: Path) -> str:
    path.write_bytes(gzip.compress(write_tar(path.with_suffix(".x"), 0, 3).read_bytes()))
    return str(path)


def write_compressed_npz(path: Path) -> str:
    np.savez_compressed(path, x=PIXELS)
    return str(path)


@pytest.mark.parametrize(
    ("kind", "write", "name", "advice"),
    [
        ("parquet", write_parquet, "x.parquet", "shuffle the rows where the files are written, or save the images in"),
        ("webdataset", write_tar_gz, "x.tar.gz", "decompress it to a plain .tar"),
        ("npz", write_compressed_npz, "x.npz", "write it with numpy.savez"),
    ],
)
def test_what_can_only_be_read_in_order_is_refused(tmp_path, in_process, kind, write, name, advice):
    path = write(tmp_path / name)
    done = in_process("convert", "--from", kind, path, tmp_path / "out.beton", "--shuffle", 0)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"fastssl: error: {path}: ")
    assert "in random order" in line
    assert advice in line
    assert not list(tmp_path.glob("out.beton*"))
    assert in_process("convert", "--from", kind, path, tmp_path / "out.beton").returncode == 0
    with pytest.raises(DataError, match="in random order"):  # also where it is one of several
        convert(None, [str(write_image_folder(tmp_path / "images", 4)), path], tmp_path / "both.beton", shuffle=0)


def test_a_damaged_array_is_found(tmp_path):
    source = npz_of(tmp_path)
    path = tmp_path / "x.npz"
    content = bytearray(path.read_bytes())
    place = content.index(PIXELS[11].tobytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"not a readable \.npz"):
        list(source.pick(iter([0])))


def test_an_array_lies_where_its_local_header_says(tmp_path):
    """Its extra field may be longer than the directory's, as `allowZip64` writes it."""
    array = io.BytesIO()
    np.lib.format.write_array(array, PIXELS)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("note.txt", "before")
        with archive.open("x.npy", "w", force_zip64=True) as member:
            member.write(array.getvalue())
    (item,) = npz_source(tmp_path / "x.npz").pick(iter([9]))
    np.testing.assert_array_equal(item.image, PIXELS[9])


def test_an_archive_that_changes_is_one_line(tmp_path):
    source = gnu_tars_of(tmp_path)
    items = source.pick(iter([0, 9, 1]))
    next(items)
    os.truncate(tmp_path / "1.tar", 512 * 9)
    with pytest.raises(DataError, match=r"1\.tar: not a whole tar archive"):
        next(items)
    with pytest.raises(DataError, match=r"1\.tar"):
        source.pick(iter([0]))
    write_tar(tmp_path / "1.tar", 8, 5)
    with pytest.raises(DataError, match=r"1\.tar: changed while it was read"):
        source.pick(iter([0]))


def test_bad_seeds(images, tmp_path, in_process):
    for seed in (-1, 1 << 64):
        done = in_process("convert", images, tmp_path / "x.beton", "--shuffle", seed)
        assert done.returncode == 2
        assert "shuffle must be a seed in 0..2**64-1" in done.stderr
