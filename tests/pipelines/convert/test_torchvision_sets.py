"""torchvision's data sets by name, on tiny ones in their formats on disk."""

import contextlib
import pickle
import socket
import time
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

from pipelines.beton import BetonReader
from pipelines.convert import convert
from pipelines.errors import DataError

CLASSES = ["plane", "car"]


def pixels(num: int) -> np.ndarray:
    return np.random.default_rng(num).integers(0, 256, (num, 3, 32, 32), np.uint8)


@pytest.fixture
def cifar10(tmp_path, monkeypatch) -> Path:
    """CIFAR-10's layout with 3 and 2 images. torchvision compares MD5 sums with the published ones: here, not."""
    folder = tmp_path / datasets.CIFAR10.base_folder
    folder.mkdir()
    for name, num in (("data_batch_1", 3), ("test_batch", 2)):
        batch = {"data": pixels(num).reshape(num, -1), "labels": [k % 2 for k in range(num)]}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": CLASSES}))
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [("data_batch_1", None)])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [("test_batch", None)])
    monkeypatch.setitem(datasets.CIFAR10.meta, "md5", None)
    return tmp_path


@pytest.mark.parametrize(("split", "num"), [("train", 3), ("test", 2), (None, 3)])
def test_arrays_stay_lossless(cifar10, split, num):
    report = convert("torchvision", "CIFAR10", cifar10 / "x.beton", root=str(cifar10), split=split)
    reader = BetonReader(report.out)
    assert report.num_raw == num
    np.testing.assert_array_equal(np.stack([reader.decode(k) for k in range(num)]), pixels(num).transpose(0, 2, 3, 1))
    assert reader.labels.tolist() == [k % 2 for k in range(num)]
    assert reader.class_names == CLASSES


def test_files_keep_their_bytes(tmp_path):
    files = []
    for k in range(4):
        files.append(tmp_path / "data" / CLASSES[k % 2] / f"{k}.jpg")
        files[-1].parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(1)[0].transpose(1, 2, 0)).resize((90, 80)).save(files[-1])
    report = convert("torchvision", "ImageFolder", tmp_path / "x.beton", root=str(tmp_path / "data"))
    reader = BetonReader(report.out)
    assert report.num_passed == 4
    assert reader.class_names == sorted(CLASSES)
    for k, path in enumerate([files[1], files[3], files[0], files[2]]):
        assert reader.image_bytes(k).tobytes() == path.read_bytes()
    assert reader.labels.tolist() == [0, 0, 1, 1]


def test_decoded_images_are_encoded_and_may_be_unlabelled(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.STL10, "_check_integrity", lambda self: True)  # MD5 sums of the real files
    folder = tmp_path / datasets.STL10.base_folder
    folder.mkdir()
    images = np.repeat(np.array([40, 200], np.uint8), 3 * 96 * 96)
    (folder / "unlabeled_X.bin").write_bytes(images.tobytes())
    (folder / "class_names.txt").write_text("\n".join(CLASSES))
    report = convert("torchvision", "STL10", tmp_path / "x.beton", root=str(tmp_path), split="unlabeled")
    reader = BetonReader(report.out)
    assert report.num_encoded == 2
    assert reader.labels.tolist() == [-1, -1]
    assert [int(reader.decode(k)[50, 50, 1]) for k in range(2)] == [40, 200]


def test_bad_names_splits_and_folders(cifar10):
    def refused(reason, name, error=ValueError, **options):
        with pytest.raises(error, match=reason) as caught:
            convert("torchvision", name, cifar10 / "x.beton", **options)
        assert "\n" not in str(caught.value)

    root = str(cifar10)
    refused("root: torchvision needs", "CIFAR10")
    for name in ("CIFAR11", "VisionDataset.x", "utils", "__name__"):
        refused("has no data set", name, root=root)
    refused("split: CIFAR10 has train and test, not 'val'", "CIFAR10", root=root, split="val")
    refused("split: ImageFolder has none", "ImageFolder", root=root, split="train")
    refused("download: torchvision cannot download ImageFolder", "ImageFolder", root=root, download=True)
    refused("torchvision CIFAR100 in .*not found", "CIFAR100", DataError, root=root)
    refused("torchvision STL10 in .*(split|Unknown)", "STL10", DataError, root=root, split="nope")


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.0 200 OK\r\nContent-Length: 1000000\r\n\r\nsome"])
def test_a_server_that_falls_silent_is_one_line(tmp_path, monkeypatch, answer):
    """Whether it says nothing at all, or stops within the file."""
    monkeypatch.setattr("pipelines.downloads.MAX_SILENCE_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        Thread(target=answer_and_wait, args=(server, answer), daemon=True).start()
        monkeypatch.setattr(datasets.CIFAR10, "url", f"http://127.0.0.1:{server.getsockname()[1]}/x.tar.gz")
        start_s = time.monotonic()
        with pytest.raises(
            DataError, match=r"torchvision CIFAR10 in .*: no answer for 0\.3 s; check the net"
        ) as caught:
            convert("torchvision", "CIFAR10", tmp_path / "x.beton", root=str(tmp_path), download=True)
        assert time.monotonic() - start_s < 10
        server.shutdown(socket.SHUT_RDWR)  # ends the thread
    assert "\n" not in str(caught.value)
    assert socket.getdefaulttimeout() is None
    assert not list(tmp_path.glob("x.beton*"))


def answer_and_wait(server: socket.socket, answer: bytes) -> None:
    connections = []
    with contextlib.suppress(OSError):  # the server is shut down
        while True:
            connections.append(server.accept()[0])
            connections[-1].sendall(answer)
    for connection in connections:
        connection.close()
