"""What a person's folder of photographs may hold: all of it is read, or named with the reason."""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.beton import BetonReader, inspect
from pipelines.convert import convert, infer_kind
from pipelines.convert.content import format_of
from pipelines.errors import DataError

try:
    import pillow_heif  # pyright: ignore[reportMissingImports]
except ImportError:
    pillow_heif = None

HEIC_HEAD = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40)


def picture(seed: int, height_px: int = 60, width_px: int = 80) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(levels).resize((width_px, height_px), Image.Resampling.BILINEAR)


def save(path: Path, seed: int, kind: str = "JPEG", **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed).save(path, kind, **options)
    return path


def noise(folder: Path) -> None:
    """40 JPEG files of about 90 kB, 3.6 MB in all."""
    folder.mkdir()
    for k in range(40):
        levels = np.random.default_rng(k).integers(0, 256, (250, 250, 3), np.uint8)
        Image.fromarray(levels).save(folder / f"{k:02d}.jpg", quality=95)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """40 readable images of two classes, in odd forms, and much else."""
    folder = tmp_path / "photos"
    for k in range(15):
        save(folder / "Bäume" / f"{k}.jpg", k)
        save(folder / "Häuser" / "alt" / f"{k} ü.png", 100 + k, "PNG")
    for k in range(5):
        save(folder / "Bäume" / f"{k}.avif", 200 + k, "AVIF", quality=90)
    save(folder / "Bäume" / "no_suffix", 300)
    save(folder / "Bäume" / "scan.dat", 301, "TIFF")
    save(folder / "Häuser" / "really a png.jpg", 302, "PNG")
    save(folder / "Häuser" / "UPPER.JPG", 303)
    Image.new("RGB", (1, 1)).save(folder / "Häuser" / "tiny.png")
    (folder / "Bäume" / "broken.jpg").write_bytes((folder / "Bäume" / "0.jpg").read_bytes()[:300])
    (folder / "Bäume" / "empty.jpg").write_bytes(b"")
    (folder / "Häuser" / "page.jpg").write_bytes(b"<!DOCTYPE html><html>404</html>")
    for k in range(21):
        (folder / "Bäume" / f"{k}.heic").write_bytes(HEIC_HEAD)
    (folder / "Bäume" / "notes.txt").write_text("x")
    (folder / "Bäume" / "README").write_text("x")
    (folder / "Bäume" / "none").write_bytes(b"")
    (folder / "Bäume" / "camera.nef").write_bytes((folder / "Bäume" / "scan.dat").read_bytes())
    (folder / ".thumbs").mkdir()
    (folder / "empty").mkdir()
    (folder / "Bäume" / "loop").symlink_to(folder)
    os.link(folder / "Bäume" / "0.jpg", folder / "Bäume" / "again.jpg")
    os.mkfifo(folder / "Bäume" / "pipe.jpg")
    return folder


@pytest.mark.skipif(pillow_heif is not None, reason="pillow-heif is installed: HEIC is read")
def test_a_folder_of_everything(photos, tmp_path, capsys):
    report = convert(None, str(photos), tmp_path / "x.beton")
    out = capsys.readouterr().out
    reader = BetonReader(report.out)
    assert reader.class_names == ["Bäume", "Häuser"]
    assert reader.labels.tolist() == [0] * 22 + [1] * 18
    assert report.num_skipped == 3
    assert report.left_out == {
        ".heic": 21,
        ".txt": 1,
        ".nef": 1,
        "empty": 1,
        "without extension: text": 1,
        "hidden folder": 1,
        "further name": 2,
        "socket, pipe or device": 1,
    }
    for part in (
        "1 sub-folder without images makes no class: empty",
        "26 files were left out: 21 .heic (pip install pillow-heif), 1 ",
        "1 .nef (export them as JPEG or TIFF)",
        "2 further names (links)",
        "1 sockets, pipes or devices",
        "3 of 43 images are corrupt and were left out: 1 truncated JPEG",
        "1 empty file (empty.jpg)",
        "1 not an image but a web page (",
    ):
        assert part in out
    assert report.errors_path is not None
    assert report.left_out_path is not None
    assert len(report.errors_path.read_text().splitlines()) == 3
    left_out = dict(line.split("\t") for line in report.left_out_path.read_text().splitlines())
    assert len(left_out) == 29
    assert left_out[str(photos / "Bäume" / "loop")] == "further name"
    assert left_out[str(photos / "Bäume" / "README")] == "without extension: text"


def test_avif_is_read_by_its_content(tmp_path):
    images = tmp_path / "images"
    for name in ("a.avif", "b.jpg", "c"):
        save(images / name, 1, "AVIF", quality=95)
    report = convert("folder", str(images), tmp_path / "x.beton")
    reader = BetonReader(report.out)
    assert reader.num_samples == 3
    difference = np.abs(reader.decode(2).astype(int) - np.asarray(picture(1)).astype(int))
    assert difference.mean() < 4
    assert (report.num_copies, report.num_similar) == (2, 0)


@pytest.mark.skipif(pillow_heif is None, reason="pillow-heif is not installed")
def test_heic_is_read_upright(tmp_path):
    pillow_heif.register_heif_opener()
    exif = Image.Exif()
    exif[0x112] = 6
    (tmp_path / "images").mkdir()
    for name in ("a.heic", "b.jpg"):
        picture(1).save(tmp_path / "images" / name, "HEIF", quality=95, exif=exif.tobytes())
    reader = BetonReader(convert("folder", str(tmp_path / "images"), tmp_path / "x.beton").out)
    assert reader.sizes.tolist() == [[80, 60]] * 2
    difference = np.abs(reader.decode(0).astype(int) - np.asarray(picture(1).rotate(-90, expand=True)).astype(int))
    assert difference.mean() < 5


@pytest.mark.skipif(pillow_heif is not None, reason="pillow-heif is installed")
def test_heic_with_the_name_of_a_jpeg_says_what_to_install(tmp_path):
    save(tmp_path / "images" / "a.jpg", 1)
    (tmp_path / "images" / "b.jpg").write_bytes(HEIC_HEAD)
    with pytest.raises(DataError, match=r"b\.jpg: HEIC: pip install pillow-heif"):
        convert("folder", str(tmp_path / "images"), tmp_path / "x.beton", on_error="fail")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "AVIF"])
def test_formats_are_told_by_their_first_bytes(tmp_path, kind):
    assert format_of(save(tmp_path / "x", 1, kind).read_bytes()) == kind


def test_what_is_no_image_is_named():
    for data, name in (
        (b"%PDF-1.4", "a PDF"),
        (b"\n<HTML>", "a web page"),
        (b"BM is how this text begins, not a bitmap", "text"),
        (b"\0\0\0\x18ftypisom....", "a video"),
        (HEIC_HEAD, "HEIF"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf", "AVIF"),
        (b"version https://git-lfs.github.com/spec/v1", "a Git LFS pointer: run git lfs pull"),
        (b"\0\1\2\3", None),
        (b"", None),
    ):
        assert format_of(data) == name


def test_a_folder_without_images_says_what_is_there(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    with pytest.raises(DataError, match=r"no images in it \(looked for [^)]*\)$"):
        convert("folder", str(folder), tmp_path / "x.beton")
    for k in range(3):
        (folder / f"{k}.txt").write_text("x")
    (folder / "x.parquet").write_bytes(b"PAR1")
    (folder / "y").write_bytes(b"%PDF")
    reason = r"there are instead: 3 \.txt, 1 \.parquet \(--from parquet reads it\), 1 without extension: a PDF$"
    with pytest.raises(DataError, match=reason):
        convert("folder", str(folder), tmp_path / "x.beton")
    assert not list(tmp_path.glob("x.beton*"))


def test_sub_folders_that_are_no_labels(tmp_path, capsys):
    one, each, splits, mixed = (tmp_path / name for name in ("one", "each", "splits", "mixed"))
    for k in range(4):
        save(one / "all" / f"{k}.jpg", k)
        save(each / str(k) / "x.jpg", k)
        save(splits / ("train", "val")[k % 2] / f"{k}.jpg", k)
        save(mixed / "ab"[k % 2] / f"{k}.jpg", k)
    save(mixed / "stray.jpg", 5)
    for folder, part in (
        (one, "all images are in one sub-folder, all, which is no label, so none is written; --labels"),
        (each, "each of 4 sub-folders holds one image, which is no label"),
        (splits, "sub-folders named train, val are splits, not labels"),
    ):
        report = convert("folder", str(folder), tmp_path / "x.beton", overwrite=True)
        assert part in capsys.readouterr().out
        assert set(BetonReader(report.out).labels) == {-1}
        assert BetonReader(report.out).class_names is None
        report = convert("folder", str(folder), tmp_path / "x.beton", overwrite=True, labels="folders")
        assert min(BetonReader(report.out).labels) == 0
        assert part not in capsys.readouterr().out
    report = convert("folder", str(mixed), tmp_path / "x.beton", overwrite=True)
    assert BetonReader(report.out).labels.tolist() == [0, 0, 1, 1, -1]
    assert "1 image lies in no sub-folder and gets no label" in capsys.readouterr().out
    report = convert("folder", str(mixed), tmp_path / "x.beton", overwrite=True, labels="none")
    assert set(BetonReader(report.out).labels) == {-1}


def test_too_many_bad_images_end_a_conversion_which_goes_on_with_more_allowed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("pipelines.convert.CHECKPOINT_EVERY_S", 0.0)
    folder = tmp_path / "images"
    for k in range(40):
        save(folder / f"{k:02d}.jpg", k)
        if k % 4 == 3:
            (folder / f"{k:02d}.jpg").write_bytes(b"text" if k % 8 == 3 else b"")
    reason = (
        r"5 of the first 20 images are corrupt, more than --max-bad 0\.1 of all 40: 3 not an image but text \([^)]*\) "
        r"\(03\.jpg, 11\.jpg, 19\.jpg\), 2 empty file \(07\.jpg, 15\.jpg\); see .*x\.beton\.errors\.txt, and repeat "
        r"the command with a larger --max-bad \(of convert: with --resume\)$"
    )
    with pytest.raises(DataError, match=reason):
        convert("folder", str(folder), tmp_path / "x.beton")
    assert len((tmp_path / "x.beton.errors.txt").read_text().splitlines()) == 5
    assert not (tmp_path / "x.beton").exists()
    with pytest.raises(DataError, match=r"more than --max-bad 0\.2 of"):
        convert("folder", str(folder), tmp_path / "x.beton", resume=True, max_bad=0.2)
    report = convert("folder", str(folder), tmp_path / "x.beton", resume=True, max_bad=0.25)
    assert (report.num_images, report.num_skipped) == (30, 10)
    assert "5 not an image but text" in capsys.readouterr().out
    whole = convert("folder", str(folder), tmp_path / "y.beton", on_error="skip")
    assert report.out.read_bytes() == whole.out.read_bytes()
    assert (tmp_path / "x.beton.hashes").read_bytes() == (tmp_path / "y.beton.hashes").read_bytes()
    with pytest.raises(ValueError, match="exclude each other"):
        convert("folder", str(folder), tmp_path / "z.beton", on_error="skip", max_bad=0.5)


def test_a_small_conversion_with_too_many_bad_images_leaves_only_their_list(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="1 of the first 1 images are corrupt"):
        convert("folder", str(tmp_path / "images"), tmp_path / "x.beton")
    assert [path.name for path in tmp_path.glob("x.beton*")] == ["x.beton.errors.txt"]


def test_one_image(tmp_path):
    save(tmp_path / "images" / "a.jpg", 1)
    assert convert(None, str(tmp_path / "images"), tmp_path / "x.beton").num_images == 1


def test_a_file_that_cannot_grow_leaves_no_half_written_one(tmp_path):
    folder = tmp_path / "images"
    noise(folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((8 << 20) + 400_000, limits[1]))
    try:
        with pytest.raises(DataError, match=r"x\.beton.*: cannot be written \(File too large\)"):
            convert("folder", str(folder), tmp_path / "x.beton")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.glob("x.beton*"))


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_in_mid_way_is_resumed_after_space_is_freed(tmp_path, monkeypatch):
    folder, disk = tmp_path / "images", tmp_path / "disk"
    noise(folder)
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this container may not mount")
    try:
        (disk / "other").write_bytes(bytes(2 << 20))
        monkeypatch.setattr("pipelines.convert.CHECKPOINT_EVERY_S", 0.0)
        with pytest.raises(DataError, match=r"No space left on device\); free space, then .* --resume"):
            convert("folder", str(folder), disk / "x.beton")
        assert not (disk / "x.beton").exists()
        (disk / "other").unlink()
        report = convert("folder", str(folder), disk / "x.beton", resume=True)
        shutil.copy(report.out, tmp_path / "copy.beton")
    finally:
        subprocess.run(["umount", disk], check=True)
    whole = convert("folder", str(folder), tmp_path / "whole.beton").out
    assert (tmp_path / "copy.beton").read_bytes() == whole.read_bytes()


def test_several_folders_become_one_data_set(tmp_path, capsys):
    for place, names in (("a", ("cat", "dog")), ("b", ("ant", "dog"))):
        for name in names:
            for k in range(2):
                save(tmp_path / place / name / f"{k}.jpg", hash((place, name)) % 1000 + k)
    save(tmp_path / "flat" / "x.jpg", 7)
    os.link(tmp_path / "a" / "cat" / "0.jpg", tmp_path / "flat" / "copy.jpg")
    sources = [str(tmp_path / name) for name in ("a", "b", "flat")]
    report = convert(None, sources, tmp_path / "x.beton")
    reader = BetonReader(report.out)
    assert reader.class_names == ["ant", "cat", "dog"]
    assert reader.labels.tolist() == [1, 1, 2, 2, 0, 0, 2, 2, -1]
    out = capsys.readouterr().out
    assert "without names of classes:" in out
    assert "1 further names (links)" in out
    assert reader.sidecar["source"] == " and ".join(str(Path(source).resolve()) for source in sources)
    again = convert(None, sources, tmp_path / "x.beton", resume=True)  # finished already
    assert (again.num_images, again.num_raw) == (9, 0)
    with pytest.raises(DataError, match=r"a/cat: all its images are in the sources before it"):
        convert(None, [sources[0], f"{sources[0]}/cat"], tmp_path / "y.beton")


def test_sources_whose_labels_have_no_names(tmp_path):
    for k in range(4):
        save(tmp_path / "a" / "xy"[k % 2] / f"{k}.jpg", k)
    np.savez(tmp_path / "n.npz", x=np.zeros((2, 8, 8), np.uint8), y=np.arange(2))
    np.savez(tmp_path / "m.npz", x=np.ones((2, 8, 8), np.uint8), y=np.arange(2))
    arrays = [str(tmp_path / name) for name in ("n.npz", "m.npz")]
    assert BetonReader(convert(None, arrays, tmp_path / "x.beton").out).labels.tolist() == [0, 1, 0, 1]
    with pytest.raises(DataError, match=r"n\.npz, image 0: label 0 has no name"):
        convert(None, [str(tmp_path / "a"), arrays[0]], tmp_path / "y.beton")
    assert not list(tmp_path.glob("y.beton*"))


def test_kinds_are_inferred(tmp_path):
    save(tmp_path / "images" / "deep" / "a.jpg", 1)
    for path in ("tars/a.tar", "tables/a.parquet", "both/a.tar", "both/b/c.jpg", "list.csv", "a.npz", "x.beton"):
        (tmp_path / path).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / path).write_bytes(b"x")
    (tmp_path / "table").write_bytes(b"PAR1....")
    (tmp_path / "arrays").write_bytes(b"PK\x03\x04....")
    (tmp_path / "archive").write_bytes(bytes(257) + b"ustar" + bytes(250))
    for name, kind in (
        ("images", "folder"),
        ("tars", "webdataset"),
        ("tables", "parquet"),
        ("tars/*.tar", "webdataset"),
        ("tars/*", "webdataset"),
        ("x-{000..003}.tar", "webdataset"),
        ("list.csv", "csv"),
        ("a.npz", "npz"),
        ("table", "parquet"),
        ("arrays", "npz"),
        ("archive", "webdataset"),
    ):
        assert infer_kind(str(tmp_path / name)) == kind
    for name, part in (
        ("both", "holds images and tar archives; choose --from folder or --from webdataset"),
        ("x.beton", "is a .beton file already"),
        ("images/deep/a.jpg", "is one file; give the folder"),
        ("CIFAR10", "such as CIFAR10, needs --from torchvision"),
    ):
        with pytest.raises(DataError, match=part):
            infer_kind(str(tmp_path / name))
    with pytest.raises(DataError, match="--from digits"):
        infer_kind(None)


def test_an_older_checkpoint_and_file_without_hashes(tmp_path):
    save(tmp_path / "images" / "a.jpg", 1)
    report = convert("folder", str(tmp_path / "images"), tmp_path / "x.beton")
    assert BetonReader(report.out).hashes is not None
    assert inspect(report.out)["duplicates"] == {"copies": 0, "similar": 0}
    hashes = report.out.with_name("x.beton.hashes")
    stored = hashes.read_bytes()
    for content in (stored[:-1], bytes(16), stored + b"x"):
        hashes.write_bytes(content)
        assert BetonReader(report.out).hashes is None
    hashes.unlink()
    assert BetonReader(report.out).hashes is None


def test_several_sources_on_the_command_line(tmp_path, in_process):
    for k in range(4):
        save(tmp_path / "a" / "xy"[k % 2] / f"{k}.jpg", k)
        save(tmp_path / "b" / "yz"[k % 2] / f"{k}.jpg", 10 + k)
    out = tmp_path / "x.beton"
    done = in_process("convert", tmp_path / "a", tmp_path / "b", out, "--max-px", "64")
    assert done.returncode == 0, done.stderr
    assert "8 images in" in done.stdout
    assert BetonReader(out).class_names == ["x", "y", "z"]
    assert BetonReader(out).labels.tolist() == [0, 0, 1, 1, 1, 1, 2, 2]
