"""Damaged and invented .npz files."""

import io
import zipfile

import numpy as np
import pytest

from tests.helpers.fuzz import ODD_VALUES, cases, mutate_bytes, num_cases
from tests.helpers.fuzz_convert import convert_or_refuse

pytestmark = pytest.mark.timeout(300 + num_cases() // 2)

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 4, 5, 3), np.uint8)
LABELS = np.arange(6)
ODD_SHAPES = ((), (6,), (-6, 4, 5, 3), (6, 4, 5, 4), (2**62, 4, 5, 3), (6, 0, 5, 3), (360, 1, 1), (1, 1, 360))
ODD = (*ODD_VALUES, *ODD_SHAPES, "|O", "<U1", "<f8", [("a", "|O")])


def saved(rng: np.random.Generator) -> bytes:
    file = io.BytesIO()
    save = np.savez if rng.integers(2) else np.savez_compressed
    save(file, x=PIXELS if rng.integers(3) else np.asfortranarray(PIXELS), y=LABELS)
    return file.getvalue()


def test_bytes(tmp_path):
    for case in cases("npz bytes", fraction=0.5):
        path = tmp_path / "x.npz"
        path.write_bytes(mutate_bytes(saved(case.rng), case.rng))
        reader = convert_or_refuse(case, "npz", path)
        if reader is not None and reader.num_samples == 6:
            # what a checksum covers is right; a label or a shape may have been changed with its header
            assert reader.sizes.prod(axis=1).sum() == 6 * 4 * 5


def test_headers(tmp_path):
    """Members whose headers say something else than what follows; their checksums are right."""
    for case in cases("npz headers", fraction=0.5):
        rng = case.rng
        header = {"descr": "|u1", "fortran_order": False, "shape": PIXELS.shape}
        key = list(header)[int(rng.integers(3))]
        header[key] = ODD[int(rng.integers(len(ODD)))]
        text = f"{header!r}\n".encode()
        if rng.integers(4) == 0:
            text = mutate_bytes(text, rng)[:60_000]
        magic = b"\x93NUMPY" + bytes([int(rng.choice([1, 1, 1, 2, 3, 9])), 0])
        length = len(text) if rng.integers(4) else int(rng.integers(1 << 16))
        data = magic + length.to_bytes(2, "little") + text + PIXELS.tobytes()
        path = tmp_path / "x.npz"
        with zipfile.ZipFile(path, "w", int(rng.choice([0, 8, 12, 14]))) as archive:
            archive.writestr("x.npy", data)
            if rng.integers(2):
                archive.writestr("y.npy", data if rng.integers(2) else b"")
        convert_or_refuse(case, "npz", path)
