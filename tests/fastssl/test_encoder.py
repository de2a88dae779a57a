"""An encoder of a run in use: it gives the features that evaluation sees, from every kind of input."""

import os
import subprocess
import sys

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
from tests.helpers.processes import ROOT

NUM_IMAGES, SIZE_PX = 24, 40


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
    config = folder.parent / "tiny.yaml"
    config.write_text(
        f"""
data: {{train: {beton}, engine: resident, global_batch_size: 8}}
views: {{recipe: simsiam_small, size_px: 24}}
model: {{backbone: timm/resnet18, backbone_kwargs: {{channels: [4, 4, 8, 8], layers: [1, 1, 1, 1]}}}}
optim: {{warmup_epochs: 0}}
train: {{num_epochs: 1}}
"""
    )
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    code = f"import fastssl; run = fastssl.train({str(config)!r}, {{'run.dir': {str(folder)!r}}}); print(run.path)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(folder)
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
    (tmp_path / "weights.pt").write_bytes((run / "checkpoints/step_00000003/weights.pt").read_bytes())
    with pytest.raises(ConfigError, match=r"there is no config\.yaml above"):
        fastssl.load_encoder(tmp_path / "weights.pt")
    with pytest.raises(ConfigError, match="holds weights of another model"):
        fastssl.load_encoder(run, backbone=nn.Conv2d(3, 4, 1))
