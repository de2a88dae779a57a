"""`fastssl embed` and `fastssl neighbours`: every source, the features of `fastssl.embed`, one or more processes."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import fastssl
from fastssl.embedding.images import open_images
from fastssl.embedding.table import read_table
from fastssl.errors import UserError
from pipelines.convert import convert
from pipelines.convert.images import CorruptImageError
from pipelines.errors import DataError
from pipelines.shards.rows import ROW
from tests.helpers.fault_server import FaultServer
from tests.helpers.processes import environment, start_command
from tests.helpers.runs import train_tiny_run, write_tiny_weights
from tests.helpers.shards import write_pictures

BROKEN = {"garden/broken.jpg": "JPEG", "garden/deep/empty.png": "empty file"}
NUM_IMAGES = 22


def picture(seed: int, size=(40, 48)) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(levels).resize(size, Image.Resampling.BILINEAR)


def encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=92)
    return file.getvalue()


def whole_folder(folder: Path) -> Path:
    """JPEGs, a PNG, an upright and a turned picture, nested folders and umlauts."""
    for name in ("garden/deep", "häuser"):
        (folder / name).mkdir(parents=True)
    for i in range(NUM_IMAGES - 3):
        path = folder / ("garden", "garden/deep", "häuser")[i % 3] / f"bild_ü{i:02}.jpg"
        path.write_bytes(encoded(picture(i, (40 + i, 48))))
    picture(50).convert("RGBA").save(folder / "garden/half.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    picture(51).save(folder / "häuser/turned.jpg", exif=exif, quality=95)
    Image.fromarray(np.asarray(picture(51).rotate(-90, expand=True))).save(folder / "häuser/upright.png")
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return whole_folder(tmp_path_factory.mktemp("photographs"))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """The same with two broken files."""
    folder = whole_folder(tmp_path_factory.mktemp("photographs"))
    (folder / "garden/broken.jpg").write_bytes(encoded(picture(9))[:400])
    (folder / "garden/deep/empty.png").touch()
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return write_tiny_weights(tmp_path_factory.mktemp("model") / "weights.pt")


def features_of(table: Path) -> np.ndarray:
    rows = pq.read_table(table)["features"].to_pylist()
    return np.array([row for row in rows if row is not None], np.float32)


def by_api(weights: Path, images, batch_size: int) -> np.ndarray:
    return fastssl.embed(fastssl.load_encoder(weights), images, batch_size=batch_size).numpy()


def assert_done(done) -> None:
    """Exit code 0; on stderr at most what was left out and the progress, which a slow machine shows."""
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if " img/s  left " not in line and "left out" not in line] == []


# -- one process


@pytest.mark.parametrize("batch_size", [1, 5, 256])
def test_a_folder_has_the_features_of_the_api(in_process, whole, weights, tmp_path, batch_size) -> None:
    out = tmp_path / "x.parquet"
    done = in_process("embed", whole, "--model", weights, "--out", out, "--batch-size", batch_size, "--device", "cpu")
    assert_done(done)
    assert done.stdout.startswith(f"{out}: 22 images, 8 features each, 0 broken, in ")
    features = features_of(out)
    assert np.array_equal(features, by_api(weights, whole, batch_size))
    rows = pq.read_table(out, columns=["path", "label"]).to_pylist()
    assert sorted(row["path"] for row in rows) == sorted(map(str, [*whole.rglob("*.jpg"), *whole.rglob("*.png")]))
    assert all(row["label"] == (0 if "/garden/" in row["path"] else 1) for row in rows)
    by_name = {Path(row["path"]).name: vector for row, vector in zip(rows, features, strict=True)}
    assert np.abs(by_name["turned.jpg"] - by_name["upright.png"]).max() < 0.1 * features.std()


def test_broken_images_are_rows_with_a_reason(in_process, photographs, whole, weights, tmp_path) -> None:
    out = tmp_path / "x.parquet"
    done = in_process("embed", photographs, "--model", weights, "--out", out, "--device", "cpu", "--batch-size", 7)
    assert_done(done)
    assert "24 images, 8 features each, 2 broken" in done.stdout
    rows = pq.read_table(out).to_pylist()
    found = {os.path.relpath(row["path"], photographs): row["error"] for row in rows if row["error"] is not None}
    assert found.keys() == BROKEN.keys()
    assert all(BROKEN[name] in reason for name, reason in found.items())
    assert all((row["features"] is None) == (row["error"] is not None) for row in rows)
    assert [f"broken: {photographs / name}: {reason}" in done.stdout for name, reason in found.items()] == [True, True]
    np.testing.assert_allclose(features_of(out), by_api(weights, whole, 7), atol=1e-6)


def test_an_array_has_nan_for_a_broken_image(in_process, photographs, weights, tmp_path) -> None:
    for name in ("x.npy", "x.parquet"):
        done = in_process("embed", photographs, "--model", weights, "--out", tmp_path / name, "--device", "cpu")
        assert_done(done)
    array, rows = np.load(tmp_path / "x.npy"), pq.read_table(tmp_path / "x.parquet").to_pylist()
    is_broken = np.array([row["error"] is not None for row in rows])
    assert (array.dtype, array.shape) == (np.float32, (24, 8))
    assert np.array_equal(np.isnan(array).all(1), is_broken)
    assert np.array_equal(array[~is_broken], features_of(tmp_path / "x.parquet"))
    assert (tmp_path / "x.npy.paths.txt").read_text().splitlines() == [row["path"] for row in rows]
    broken = [f"{row['path']}\t{row['error']}" for row in rows if row["error"]]
    assert (tmp_path / "x.npy.errors.txt").read_text().splitlines() == broken
    about = json.loads((tmp_path / "x.npy.json").read_text())
    assert about == read_table(tmp_path / "x.parquet").about


def test_the_table_says_where_it_comes_from(in_process, whole, weights, tmp_path) -> None:
    import hashlib

    out = tmp_path / "x.parquet"
    assert in_process("embed", whole, "--model", weights, "--out", out, "--device", "cpu").returncode == 0
    about = read_table(out).about
    assert about["model"] == str(weights)
    assert about["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert about["preprocessing"]["size_px"] == 24
    assert about["fastssl"] == fastssl.__version__
    assert about["class_names"] == ["garden", "häuser"]
    assert about["source"] == {"kind": "folder", "src": str(whole), "options": {}}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """The same 12 JPEGs, one of them broken where the source allows it, as files of every kind."""
    folder = tmp_path_factory.mktemp("sources")
    jpegs = [encoded(picture(i)) for i in range(12)]
    (folder / "flat").mkdir()
    for i, jpeg in enumerate(jpegs):
        (folder / f"flat/{i:02}.jpg").write_bytes(jpeg)
    convert("folder", folder / "flat", folder / "x.beton")
    jpegs[5] = jpegs[5][:300]
    (folder / "flat/05.jpg").write_bytes(jpegs[5])
    rows = [{"bytes": jpeg, "path": f"{i}.jpg"} for i, jpeg in enumerate(jpegs)]
    (folder / "tables").mkdir()
    for k in range(2):
        part = slice(6 * k, 6 * k + 6)
        table = pa.table({"image": rows[part], "label": [i % 3 for i in range(12)][part]})
        pq.write_table(table, folder / f"tables/{k}.parquet", row_group_size=2)
    (folder / "tars").mkdir()
    for k in range(2):
        with tarfile.open(folder / f"tars/{k}.tar", "w") as tar:
            for i in range(6 * k, 6 * k + 6):
                for name, data in ((f"{i:02}.jpg", jpegs[i]), (f"{i:02}.cls", str(i % 3).encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    (folder / "x.csv").write_text("path,label\n" + "".join(f"flat/{i:02}.jpg,{i % 3}\n" for i in range(12)))
    return {name: folder / name for name in ("flat", "x.beton", "tables", "tars", "x.csv")}


@pytest.mark.parametrize(
    ("name", "kind", "third"),
    [
        ("flat", "folder", "flat/02.jpg"),
        ("x.beton", "beton", "x.beton, image 2"),
        ("tables", "parquet", "tables/0.parquet, row 2"),
        ("tars", "webdataset", "tars/0.tar/02"),
        ("x.csv", "csv", "flat/02.jpg"),
    ],
)
def test_every_source_has_the_same_features(in_process, sources, weights, tmp_path, name, kind, third) -> None:
    src, out = sources[name], tmp_path / "x.parquet"
    assert open_images(str(src)).origin["kind"] == kind
    done = in_process("embed", src, "--model", weights, "--out", out, "--device", "cpu", "--batch-size", 4)
    assert_done(done)
    rows = pq.read_table(out).to_pylist()
    assert rows[2]["path"] == str(src.parent / third)
    if kind not in ("folder", "beton"):
        assert [row["label"] for row in rows] == [i % 3 for i in range(12)]
    else:
        assert {row["label"] for row in rows} == {None}
    broken = [5] if kind != "beton" else []
    assert [i for i, row in enumerate(rows) if row["error"] is not None] == broken
    if kind == "beton":
        assert np.array_equal(features_of(out), by_api(weights, src, 4))
    expected = by_api(weights, sources["x.beton"], 4)
    np.testing.assert_allclose(features_of(out), np.delete(expected, broken, 0), atol=1e-6)
    # the neighbours' pictures come from within the file
    grid = tmp_path / "grid.png"
    done = in_process("neighbours", out, rows[0]["path"], "-k", 3, "--out", grid)
    assert_done(done)
    with Image.open(grid) as drawn:
        colours = {colour: num for num, colour in drawn.convert("RGB").getcolors(1 << 20)}
    assert colours.get((211, 211, 211), 0) < 100  # of the missing ones' grey, some in the letters


def test_an_array_of_images_and_digits(in_process, weights, tmp_path) -> None:
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).integers(0, 256, (5, 20, 20), np.uint8), y=np.arange(5))
    for arguments, num in (((tmp_path / "x.npz",), 5), (("digits", "--from", "digits", "--split", "test"), 500)):
        done = in_process("embed", *arguments, "--model", weights, "--out", tmp_path / f"{num}.parquet")
        assert_done(done)
        assert pq.read_metadata(tmp_path / f"{num}.parquet").num_rows == num
    grey = np.load(tmp_path / "x.npz")["x"]
    expected = by_api(weights, np.repeat(grey[..., None], 3, 3), 256)
    assert np.array_equal(features_of(tmp_path / "5.parquet"), expected)


def bad_tar(folder: Path) -> Path:
    with tarfile.open(folder / "x.tar", "w") as tar:
        info = tarfile.TarInfo("a.jpg")
        info.size = len(encoded(picture(0)))
        tar.addfile(info, io.BytesIO(encoded(picture(0))))
    (folder / "x.tar").write_bytes((folder / "x.tar").read_bytes()[:900])
    return folder / "x.tar"


@pytest.mark.parametrize(
    ("build", "arguments", "message"),
    [
        (lambda folder: folder / "none", [], "no such file or folder"),
        (lambda folder: folder, [], "no images in it"),
        (bad_tar, [], "not a whole tar archive"),
        (lambda folder: whole_folder(folder / "a"), ["--batch-size", "0"], "--batch-size must be >= 1"),
        (
            lambda folder: whole_folder(folder / "a"),
            ["--split", "test"],
            "split: not an option of a source of kind",
        ),
        (lambda folder: whole_folder(folder / "a"), ["--from", "beton"], "no such file"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(in_process, weights, tmp_path, build, arguments, message) -> None:
    (tmp_path / "in").mkdir()
    out = tmp_path / "new" / "x.parquet"
    done = in_process("embed", build(tmp_path / "in"), "--model", weights, "--out", out, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.rglob("*x.parquet*"))


def test_as_json(in_process, weights, tmp_path) -> None:
    out = tmp_path / "x.npy"
    (tmp_path / "in").mkdir()
    picture(1).save(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "b.jpg").write_bytes(b"none")
    done = in_process("embed", tmp_path / "in", "--model", weights, "--out", out, "--device", "cpu", "--json")
    assert done.returncode == 0
    found = json.loads(done.stdout)
    assert (found["out"], found["num_images"], found["num_broken"], found["device"]) == (str(out), 2, 1, "cpu")
    assert found["num_features"] == np.load(out).shape[1]
    [[path, reason]] = found["examples"]
    assert path.endswith("b.jpg")
    assert reason


def test_images_that_are_all_broken_are_an_error(in_process, weights, tmp_path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"none")
    done = in_process("embed", tmp_path, "--model", weights, "--out", tmp_path / "x.npy")
    assert done.returncode == 2
    assert "all 1 images are broken" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.jpg"]


def test_an_existing_table_is_kept(in_process, whole, weights, tmp_path) -> None:
    out = tmp_path / "x.parquet"
    out.write_text("before")
    done = in_process("embed", whole, "--model", weights, "--out", out)
    assert done.returncode == 2
    assert "exists already; pass --overwrite" in done.stderr
    assert out.read_text() == "before"
    assert in_process("embed", whole, "--model", weights, "--out", out, "--overwrite").returncode == 0
    assert read_table(out).num_rows == NUM_IMAGES


def test_a_source_of_unknown_kind_is_named(tmp_path, whole) -> None:
    (tmp_path / "x.zip").touch()
    with pytest.raises(DataError, match=r"not a source of images"):
        open_images(str(tmp_path / "x.zip"))
    with pytest.raises(UserError, match="--from must be one of beton"):
        open_images(str(whole), "zip")


# -- several processes


def ranks(arguments, log: Path, num_ranks: int = 2) -> list[int | None]:
    processes = start_command(list(map(str, arguments)), num_ranks=num_ranks, log=log)
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


@pytest.mark.dist
@pytest.mark.slow
def test_a_trained_run_on_two_processes_of_torchrun(command, in_process, photographs, whole, tmp_path) -> None:
    """As a user goes it; the file is that of one process."""
    convert("folder", whole, tmp_path / "x.beton")
    run = tmp_path / "run"
    train_tiny_run(tmp_path / "x.beton", run)
    arguments = ["embed", photographs, "--model", run, "--device", "cpu", "--batch-size", 3, "--out"]
    one = in_process(*arguments, tmp_path / "one.parquet")
    assert_done(one)
    launcher = Path(environment()["PATH"].split(os.pathsep)[0]) / "torchrun"
    launch = (launcher, "--standalone", "--nproc-per-node", 2, "-m", "fastssl.cli")
    two = command(*launch, *arguments, tmp_path / "two.parquet")
    assert two.returncode == 0, two.stderr
    assert two.stdout.splitlines()[1:-1] == one.stdout.splitlines()[1:-1]
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()
    np.testing.assert_allclose(features_of(tmp_path / "two.parquet"), by_api(run, whole, 3), atol=1e-6)


@pytest.mark.dist
@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("tars", "tables")), "x.beton"]
)
def test_the_file_is_the_same_on_any_number_of_processes(in_process, sources, weights, tmp_path, name) -> None:
    arguments = ["embed", sources[name], "--model", weights, "--device", "cpu", "--batch-size", 1, "--out"]
    assert in_process(*arguments, tmp_path / "1.parquet").returncode == 0
    log = tmp_path / "log"
    assert ranks([*arguments, tmp_path / "3.parquet"], log, num_ranks=3) == [0, 0, 0], log.read_text()
    assert (tmp_path / "1.parquet").read_bytes() == (tmp_path / "3.parquet").read_bytes()
    assert log.read_text().count("3.parquet: 12 images") == 1


@pytest.mark.dist
def test_an_error_of_one_process_ends_all(weights, tmp_path) -> None:
    """A label that is none, among the images of the second process."""
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for i in range(4):
            for name, data in ((f"{i}.jpg", encoded(picture(i))), (f"{i}.cls", b"none" if i == 3 else b"0")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    log = tmp_path / "log"
    arguments = ["embed", tmp_path / "x.tar", "--model", weights, "--batch-size", 1, "--device", "cpu", "--out"]
    assert ranks([*arguments, tmp_path / "out" / "x.parquet"], log) == [2, 2]
    lines = [line for line in log.read_text().splitlines() if " img/s  left " not in line]
    assert len(lines) == 2
    assert all("x.tar/3.cls: not a label" in line for line in lines)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.dist
def test_a_folder_that_cannot_be_made_ends_all_processes(whole, weights, tmp_path) -> None:
    (tmp_path / "file").touch()
    arguments = ["embed", whole, "--model", weights, "--device", "cpu", "--out", tmp_path / "file" / "x.npy"]
    assert ranks(arguments, tmp_path / "log") == [2, 2]
    lines = [line for line in (tmp_path / "log").read_text().splitlines() if "error" in line]
    assert len(lines) == 2
    assert all("cannot be written" in line for line in lines)


# -- neighbours


def test_neighbours_of_a_row_and_of_a_new_image(in_process, whole, weights, tmp_path) -> None:
    table, new = tmp_path / "x.parquet", tmp_path / "neu_ü.jpg"
    assert in_process("embed", whole, "--model", weights, "--out", table, "--device", "cpu").returncode == 0
    turned = whole / "häuser/turned.jpg"
    new.write_bytes(turned.read_bytes())
    answers = {}
    for image in (turned, new):
        done = in_process("neighbours", table, image, "-k", "4", "--json")
        assert_done(done)
        answers[image] = json.loads(done.stdout)
    of_row, of_new = answers[turned]["neighbours"], answers[new]["neighbours"]
    assert answers[turned]["query"] == str(turned)
    assert answers[new]["row"] is None
    assert of_row[0]["path"].endswith("upright.png")
    assert [of_new[0]["path"], of_new[0]["similarity"]] == [str(turned), pytest.approx(1, abs=1e-5)]
    assert [each["path"] for each in of_new[1:]] == [each["path"] for each in of_row[:3]]
    assert [each.path for each in fastssl.neighbours(table, turned, k=4)] == [each["path"] for each in of_row]
    done = in_process("neighbours", table, os.path.relpath(turned), "-k", "4", "--out", tmp_path / "grid.png")
    lines = done.stdout.splitlines()
    assert lines[:2] == [f"{turned} (in the table); similarity: centred", "rank  similarity  path"]
    assert [line.split(maxsplit=2)[2] for line in lines[2:6]] == [each["path"] for each in of_row]
    assert Image.open(tmp_path / "grid.png").size == (3 * 162, 2 * 176)


def test_a_model_that_is_gone_or_another_is_named(in_process, whole, tmp_path) -> None:
    weights, table, new = write_tiny_weights(tmp_path / "weights.pt"), tmp_path / "x.parquet", tmp_path / "new.png"
    picture(99).save(new)
    assert in_process("embed", whole, "--model", weights, "--out", table, "--device", "cpu").returncode == 0
    moved = weights.rename(tmp_path / "moved.pt")
    done = in_process("neighbours", table, new)
    assert done.returncode == 2
    assert "its model is gone: no weights at" in done.stderr
    assert in_process("neighbours", table, new, "--model", moved).returncode == 0
    other = write_tiny_weights(tmp_path / "weights.pt", seed=1)
    for arguments in ((), ("--model", other)):
        done = in_process("neighbours", table, new, *arguments)
        assert done.returncode == 2
        assert "has other weights than those" in done.stderr
    (tmp_path / "broken.png").write_bytes(b"none")
    done = in_process("neighbours", table, tmp_path / "broken.png", "--model", moved)
    assert done.returncode == 2
    assert "broken.png cannot be read as an image" in done.stderr


def test_names_from_outside_cannot_write_to_the_terminal(in_process, weights, tmp_path) -> None:
    (tmp_path / "in").mkdir()
    for i, name in enumerate(("a.png", "b\x1b[31m\n.png", "c.png")):
        picture(i).save(tmp_path / "in" / name)
    (tmp_path / "in" / "d\x1b.png").touch()
    table = tmp_path / "x.parquet"
    done = in_process("embed", tmp_path / "in", "--model", weights, "--out", table, "--device", "cpu")
    assert r"d\x1b.png: empty file" in done.stdout
    found = in_process("neighbours", table, tmp_path / "in" / "a.png")
    assert r"b\x1b[31m\n.png" in found.stdout
    assert "\x1b" not in done.stdout + found.stdout
    assert "\\u001b" in in_process("neighbours", table, tmp_path / "in" / "a.png", "--json").stdout


def test_features_that_are_not_finite_are_broken_rows(whole, weights, tmp_path) -> None:
    content = torch.load(weights, weights_only=True)
    next(iter(content["backbone"].values())).fill_(float("nan"))
    torch.save(content, tmp_path / "nan.pt")
    with pytest.raises(DataError, match="its features are not finite"):
        fastssl.embed_to_file(whole, tmp_path / "nan.pt", tmp_path / "x.parquet")


def test_the_function_writes_the_table_of_the_command(in_process, photographs, weights, tmp_path) -> None:
    report = fastssl.embed_to_file(photographs, weights, tmp_path / "a.parquet", batch_size=5)
    assert (report.num_images, report.num_broken, report.num_features) == (24, 2, 8)
    arguments = (photographs, "--model", weights, "--out", tmp_path / "b.parquet", "--batch-size", 5)
    assert_done(in_process("embed", *arguments, "--device", "cpu"))
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_a_data_set_of_many_shards_is_listed_like_its_files(tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.beton.writer.PAGE_BYTES", 4096)
    folder = tmp_path / "set"
    write_pictures(folder, num=3, num_each=4)
    single = [open_images(str(path)) for path in sorted(folder.glob("*.beton"))]
    expected = [entry for images in single for entry in images.entries(0, 4)]
    with FaultServer(folder) as server:
        for place in (str(folder), f"{folder}/dataset.json", f"{folder}/*.beton", server.url):
            images = open_images(place)
            assert (images.origin["kind"], images.num_images, images.class_names) == ("shards", 12, ["cat", "dog"])
            found = list(images.entries(3, 11))
            assert [entry.path for entry in found] == [f"{images.name}, image {i}" for i in range(3, 11)]
            for entry, other in zip(found, expected[3:11], strict=True):
                assert entry.label == other.label
                np.testing.assert_array_equal(entry.read(), other.read())
        assert images.name == images.origin["src"] == server.url
        start = int(np.fromfile(folder / "x-00001-of-00003.beton.rows", ROW)["ptr"][1])
        with (folder / "x-00001-of-00003.beton").open("r+b") as file:
            file.seek(start + 100)
            file.write(bytes(8))
        [whole_one, damaged] = open_images(server.url).entries(4, 6)
        whole_one.read()
        with pytest.raises(CorruptImageError, match="checksum"):
            damaged.read()
    with pytest.raises(UserError, match="one file"):
        open_images(str(folder / "x-00001-of-00003.beton"), "shards")
