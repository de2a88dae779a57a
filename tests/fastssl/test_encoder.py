"""An encoder of a run in use: it gives the features that evaluation sees, from every kind of input."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import fastssl
from fastssl.errors import ConfigError
from fastssl.evaluation.features import encode_batches
from pipelines.beton import BetonReader, BetonWriter
from pipelines.convert import convert
from pipelines.errors import DataError
from pipelines.loader import build_eval_loader
from pipelines.transform import read_image
from tests.helpers.fault_server import FaultServer
from tests.helpers.runs import train_tiny_run
from tests.helpers.shards import write_pictures

NUM_IMAGES, SIZE_PX = 24, 40
WEIGHTS = "checkpoints/step_00000003/weights.pt"


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, SIZE_PX, SIZE_PX + 8, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def beton(images, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "images.beton"
    with BetonWriter(path, NUM_IMAGES) as writer:
        for number, image in enumerate(images):
            writer.write_raw(image, label=number % 3)
    return path


@pytest.fixture(scope="module")
def run(beton, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "a"
    train_tiny_run(beton, folder)
    return folder


def test_it_is_the_encoder_of_the_checkpoint(run) -> None:
    encoder = fastssl.load_encoder(run)
    checkpoint = run / "checkpoints" / "step_00000003"
    saved = torch.load(checkpoint / "weights.pt", weights_only=True)["backbone"]
    assert not encoder.training
    assert encoder.num_features == 8
    assert all(torch.equal(value, saved[name]) for name, value in encoder.backbone.state_dict().items())
    for path in (checkpoint, checkpoint / "weights.pt"):
        again = fastssl.load_encoder(path)
        assert all(torch.equal(value, saved[name]) for name, value in again.backbone.state_dict().items())


def test_all_kinds_of_input_give_what_evaluation_sees(run, beton, images, tmp_path) -> None:
    encoder = fastssl.load_encoder(run)
    loader = build_eval_loader(
        BetonReader(beton), encoder.views, local_batch_size=8, engine="resident", device=torch.device("cpu")
    )
    expected = torch.from_numpy(np.concatenate(list(encode_batches(encoder, loader))))
    loader.close()
    for number, image in enumerate(images):
        (tmp_path / "class").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / "class" / f"{number:03}.png")
    (tmp_path / "notes.txt").write_text("no image")
    views = torch.stack([encoder.transform(image) for image in images])
    pictures = [Image.fromarray(image) for image in images]
    for given in (beton, str(beton), tmp_path, images, torch.from_numpy(images), pictures, list(images), views):
        features = fastssl.embed(encoder, given, batch_size=8)
        assert features.dtype == torch.float32
        torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-6)
    assert expected.std(0).min() > 0  # the images differ


def test_a_folder_gives_the_features_of_its_converted_file(run, tmp_path, images) -> None:
    """Files are read as conversion reads them: transparency on white, 16 bits scaled, hidden ones left out, upright."""
    encoder, folder = fastssl.load_encoder(run), tmp_path / "photographs"
    folder.mkdir()
    picture = Image.fromarray(images[0])
    transparent = picture.convert("RGBA")
    transparent.putalpha(Image.fromarray(images[1, ..., 0]))
    transparent.save(folder / "transparent.png")
    Image.fromarray(images[0, ..., 0].astype(np.uint16) * 257).save(folder / "deep.png")
    picture.convert("L").save(folder / "grey.png")
    (folder / "._hidden.png").write_bytes(b"none")
    (folder / "table.pdf").write_bytes(b"none")
    converted = convert("folder", folder, tmp_path / "photographs.beton")
    assert converted.num_images == 3
    torch.testing.assert_close(
        fastssl.embed(encoder, folder), fastssl.embed(encoder, converted.out), rtol=1e-5, atol=1e-6
    )
    exif, turned = Image.Exif(), tmp_path / "turned.jpg"
    exif[0x0112] = 6  # to be turned clockwise
    picture.save(turned, exif=exif, quality=95)
    upright = encoder.transform(np.rot90(np.asarray(Image.open(turned)), -1))
    assert torch.equal(encoder.transform(Image.open(turned)), upright)
    assert torch.equal(encoder.transform(read_image(turned)), upright)


def test_the_transform_is_the_pixels_of_the_loader(run, beton, images) -> None:
    encoder = fastssl.load_encoder(run)
    loader = build_eval_loader(
        BetonReader(beton), encoder.views, local_batch_size=NUM_IMAGES, engine="resident", device=torch.device("cpu")
    )
    (batch,) = [batch.views[0].clone() for batch in loader]
    loader.close()
    assert torch.equal(torch.stack([encoder.transform(image) for image in images]), batch)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (torch.zeros(2, 4, 24, 24), ValueError, r"a float tensor must be \[images, 3, height, width\]"),
        (np.zeros((2, 24, 24, 3), np.float32), TypeError, "an image must be a PIL image or uint8"),
        ([np.zeros((24, 24), np.uint8)], TypeError, r"got uint8 \[24, 24\]"),
        (7, TypeError, "images must be a path"),
        ([], DataError, "there is no image"),
        (torch.zeros(0, 3, 24, 24), DataError, "there is no image"),
        ("no/such/folder", DataError, "is neither a folder nor a .beton file"),
    ],
)
def test_bad_images_are_named(run, given, error, message) -> None:
    with pytest.raises(error, match=message):
        fastssl.embed(fastssl.load_encoder(run), given)


def test_a_broken_image_file_is_named(run, tmp_path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 broken")
    with pytest.raises(DataError, match=r"broken.jpg cannot be read as an image"):
        fastssl.embed(fastssl.load_encoder(run), tmp_path)


def test_a_path_without_a_run_is_named(run, tmp_path) -> None:
    with pytest.raises(ConfigError, match="no weights at"):
        fastssl.load_encoder(tmp_path)
    with pytest.raises(ConfigError, match=r"another model .timm/resnet18. than this one: .*Conv2d"):
        fastssl.load_encoder(run, backbone=nn.Conv2d(3, 4, 1))


# -- a file on its own


def change(run: Path, file: Path, **parts) -> Path:
    """A copy of the run's weights.pt with other parts; None: without the part."""
    weights = torch.load(run / WEIGHTS, weights_only=True) | parts
    torch.save({name: value for name, value in weights.items() if value is not None}, file)
    return file


def test_a_copied_file_is_the_encoder_of_the_run(run, beton, tmp_path) -> None:
    copied = tmp_path / "encoder.pt"
    copied.write_bytes((run / WEIGHTS).read_bytes())
    encoder, expected = fastssl.load_encoder(copied), fastssl.load_encoder(run)
    assert repr(encoder.transform) == repr(expected.transform)
    assert encoder.transform.size_px == 24
    assert torch.equal(fastssl.embed(encoder, beton), fastssl.embed(expected, beton))


def test_the_pre_processing_is_the_file_s_own(run, images, tmp_path) -> None:
    saved = torch.load(run / WEIGHTS, weights_only=True)["preprocessing"]
    other = saved | {"size_px": 16, "crop_fraction": 0.5, "mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}
    transform = fastssl.load_encoder(change(run, tmp_path / "weights.pt", preprocessing=other)).transform
    crop = images[0][10:30, 14:34]  # the central 20 px of 40 x 48
    whole = fastssl.load_encoder(change(run, tmp_path / "weights.pt", preprocessing=other | {"crop_fraction": 1.0}))
    assert transform(images[0]).shape == (3, 16, 16)
    assert torch.equal(transform(images[0]), whole.transform(crop))
    assert 0 <= float(transform(images[0]).min()) < float(transform(images[0]).max()) <= 1


def test_an_older_file_loads_next_to_its_run(run, beton, tmp_path) -> None:
    folder = tmp_path / "b"
    (folder / "checkpoints/step_00000003").mkdir(parents=True)
    shutil.copy(run / "config.yaml", folder)
    older = change(run, folder / WEIGHTS, preprocessing=None, backbone_class=None)
    expected = fastssl.embed(fastssl.load_encoder(run), beton)
    for path in (folder, older.parent, older):
        assert torch.equal(fastssl.embed(fastssl.load_encoder(path), beton), expected)
    change(run, older, preprocessing=None, backbone_class=None, model={"backbone": "resnet50"})
    with pytest.raises(ConfigError, match=r"another model .resnet50. than this one: model.backbone is .* in the run"):
        fastssl.load_encoder(folder)
    (folder / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"there is no config\.yaml above .* does not hold its pre-processing"):
        fastssl.load_encoder(older)


def test_pre_trained_weights_are_not_fetched_again(run, tmp_path) -> None:
    """A run that began from a pre-trained model: its weights.pt has the weights, and the network may be gone."""
    model = torch.load(run / WEIGHTS, weights_only=True)["model"]
    overlay = {"file": str(tmp_path / "none.safetensors")}
    kwargs = model["backbone_kwargs"] | {"pretrained": True, "pretrained_cfg_overlay": overlay}
    file = change(run, tmp_path / "weights.pt", model=model | {"backbone_kwargs": kwargs})
    assert fastssl.load_encoder(file).num_features == 8


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"preprocessing": {"size_px": 24}}, "its pre-processing must have size_px"),
        ({"preprocessing": 3}, "its pre-processing must have size_px"),
        ({"model": {"backbone": "resnet18", "depth": 3}}, "unknown key model.depth"),
        ({"model": {"backbone": 3}}, "model.backbone must be"),
        ({"model": {"backbone": "resnet18"}}, "holds weights of another model .resnet18. than this one"),
        ({"model": {"backbone": "resnet0"}}, "no model named resnet0"),
        ({"backbone_class": "mine.Net"}, "was trained with mine.Net: pass such a module as backbone="),
        ({"backbone_class": 3}, "its backbone_class is 3"),
        ({"image_px": 1 << 20}, "is not a file of fastssl"),
        ({"backbone": None}, "is not a file of fastssl"),
    ],
)
def test_a_file_that_does_not_fit_is_one_line(run, tmp_path, parts, message) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        fastssl.load_encoder(change(run, tmp_path / "weights.pt", **parts))
    assert "\n" not in str(caught.value)


def test_files_of_other_programs_are_one_line(run, tmp_path) -> None:
    whole = (run / WEIGHTS).read_bytes()
    state = torch.load(run / WEIGHTS, weights_only=True)["backbone"]
    torch.save(state, tmp_path / "state.pth")
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "script.pt")
    for name, content in {"short.pt": whole[: len(whole) // 2], "text.pt": b"no weights", "empty.pt": b""}.items():
        (tmp_path / name).write_bytes(content)
    for file in sorted(tmp_path.iterdir()):
        with pytest.raises(ConfigError, match="not a file of fastssl") as caught:
            fastssl.load_encoder(file)
        assert "\n" not in str(caught.value)


def test_a_data_set_of_many_shards_by_folder_manifest_pattern_and_url(run, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("pipelines.beton.writer.PAGE_BYTES", 4096)
    folder = tmp_path / "set"
    write_pictures(folder, num=2, num_each=3)
    encoder = fastssl.load_encoder(run)
    files = sorted(folder.glob("*.beton"))
    expected = torch.cat([fastssl.embed(encoder, path, batch_size=4) for path in files])
    with FaultServer(folder) as server:
        for place in (folder, str(folder / "dataset.json"), f"{folder}/x-*.beton", server.url):
            assert torch.equal(fastssl.embed(encoder, place, batch_size=4), expected)
    (folder / "dataset.json").unlink()
    with pytest.raises(DataError, match="there is no image in"):  # a folder of images without any
        fastssl.embed(encoder, folder)
