"""Small data sets of several shards, and a store that counts what is read."""

import io
import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.beton import BetonReader, BetonWriter
from pipelines.remote import RemoteStore
from pipelines.samples import RAW
from pipelines.shards.build import write_manifest
from pipelines.shards.store import LocalInfo, LocalStore

NUM_IMAGES = 6  # of each shard


def write_shard(path: Path, seed: int, class_names: list[str] | None = None, num: int = NUM_IMAGES) -> None:
    """Images of several sizes and both modes; labels 0, 1, 2, and none for the last image."""
    rng = np.random.default_rng(seed)
    with BetonWriter(path, class_names=class_names, overwrite=True) as writer:
        for i in range(num):
            label = -1 if i == num - 1 else i % 3
            if i % 2:
                writer.write_jpeg(rng.bytes(500 + i), height_px=8 + i, width_px=9, label=label)
            else:
                writer.write_raw(rng.integers(0, 256, (8 + i, 9, 3), np.uint8), label=label)


def write_shards(folder: Path, num: int = 3, class_names: list[str] | None = None) -> list[Path]:
    """x-00000-of-0000N.beton and so on."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"x-{k:05d}-of-{num:05d}.beton" for k in range(num)]
    for k, path in enumerate(paths):
        write_shard(path, k, class_names)
    return paths


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


class CountingStore(LocalStore):
    """A folder as an object store shows it: with versions, which must match.

    Attributes:
        ranges: (name, start, stop) of each range that was read.
        puts: Names of the files that were written.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.ranges: list[tuple[str, int, int]] = []
        self.puts: list[str] = []
        self._lock = threading.Lock()

    @property
    def shown(self) -> str:
        return "s3://bucket/set/"

    def list(self, suffix: str = "") -> list[LocalInfo]:
        return [LocalInfo(info.path, info.num_bytes, f'"{info.path}"') for info in super().list(suffix)]

    def get(self, path: str, start: int, stop: int, etag: str | None = None) -> bytes:
        assert etag == f'"{path}"'
        with self._lock:
            self.ranges.append((path, start, stop))
        return super().get(path, start, stop)

    def put(self, path: str, data: bytes, *, create_only: bool = False) -> bool:
        self.puts.append(path)
        return super().put(path, data, create_only=create_only)


IMAGES_OF_SHARDS = (203, 7, 305)  # no multiple of a block


def write_image_shards(folder: Path, whole: Path | None = None) -> Path:
    """Three shards of 515 images that decode, with a manifest: a quarter JPEGs, of several sizes, labelled by turns.

    Args:
        folder: For the shards and the manifest.
        whole: One .beton with the same images.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng, number = np.random.default_rng(0), 0
    with BetonWriter(whole or folder / "whole", overwrite=True) as all_images:
        for shard, num in enumerate(IMAGES_OF_SHARDS):
            with BetonWriter(folder / f"x-{shard:05d}-of-00003.beton", num) as writer:
                for _ in range(num):
                    _write_image((writer, all_images), rng, number)
                    number += 1
    if whole is None:
        for path in folder.glob("whole*"):
            path.unlink()
    write_manifest(LocalStore(folder))
    return folder


def _write_image(writers: tuple[BetonWriter, ...], rng: np.random.Generator, number: int) -> None:
    coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    width_px, height_px = 40 + number % 5, 48
    image = coarse.resize((width_px, height_px), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    for writer in writers:
        if number % 4 == 0:
            writer.write_jpeg(file.getvalue(), height_px=height_px, width_px=width_px, label=number % 3)
        else:
            writer.write_raw(np.asarray(image), label=number % 3)


def split(whole: Path, folder: Path, num: int = 3) -> Path:
    """The images of one .beton as a data set of shards that are not of one size."""
    folder.mkdir(parents=True, exist_ok=True)
    reader = BetonReader(whole)
    bounds = np.linspace(0, reader.num_samples**0.5, num + 1) ** 2
    for shard, (first, stop) in enumerate(pairwise(bounds.round().astype(int).tolist())):
        samples = reader.samples(np.arange(first, stop))
        with BetonWriter(folder / f"x-{shard:05d}-of-{num:05d}.beton", class_names=reader.class_names) as writer:
            for i, (height_px, width_px) in enumerate(samples.sizes.tolist()):
                label, stored = int(samples.labels[i]), samples.image_bytes(i)
                if samples.modes[i] == RAW:
                    writer.write_raw(stored.reshape(height_px, width_px, 3), label=label)
                else:
                    writer.write_jpeg(stored.tobytes(), height_px=height_px, width_px=width_px, label=label)
    write_manifest(LocalStore(folder))
    return folder


def write_pictures(folder: Path, num: int = 3, num_each: int = 8, px: int = 40) -> None:
    """Shards of JPEGs that can be decoded, of two classes, and their manifest."""
    folder.mkdir(exist_ok=True)
    for k in range(num):
        with BetonWriter(folder / f"x-{k:05d}-of-{num:05d}.beton", class_names=["cat", "dog"]) as writer:
            for i in range(num_each):
                writer.write_jpeg(picture(k * num_each + i, px), height_px=px, width_px=px + 4, label=i % 2)
    write_manifest(LocalStore(folder))


def picture(seed: int, px: int) -> bytes:
    """A JPEG of `px` rows and four columns more."""
    pixels = np.random.default_rng(seed).integers(60, 200, (3, 3, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((px + 4, px), Image.Resampling.BILINEAR).save(file, "JPEG")
    return file.getvalue()


def put_all(folder: Path, url: str) -> None:
    """Copy the files of a folder to object storage."""
    with RemoteStore(url) as store:
        for path in sorted(folder.iterdir()):
            store.put(path.name, path)
