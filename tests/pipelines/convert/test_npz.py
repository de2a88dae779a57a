"""Arrays of a .npz: read one image after the other, and only what the file can hold."""

import io
import tracemalloc
import zipfile

import numpy as np
import pytest

from pipelines.beton import BetonReader
from pipelines.convert import convert
from pipelines.convert.npz import npz_source
from pipelines.errors import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (7, 4, 5, 3), np.uint8)


def member(shape: tuple[int, ...], dtype: str = "|u1", data: bytes = b"", *, order: bool = False) -> bytes:
    """A member of a .npz that says it has this shape."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": order, "shape": shape})
    return file.getvalue() + data


def save(path, compression=zipfile.ZIP_STORED, **members):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return str(path)


@pytest.mark.parametrize("save_arrays", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_images_from_anywhere(tmp_path, save_arrays, order):
    save_arrays(tmp_path / "x.npz", x=np.asarray(PIXELS, order=order), y=np.arange(7, dtype=np.int16))
    source = npz_source(tmp_path / "x.npz")
    for start in range(7):
        for stop in range(start, 8):
            items = list(source.read(start, stop))
            assert [item.label for item in items] == list(range(start, stop))
            np.testing.assert_array_equal(np.array([i.image for i in items]).reshape(-1, 4, 5, 3), PIXELS[start:stop])


def test_a_compressed_array_larger_than_memory_is_read_in_bounded_memory(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive, archive.open("x.npy", "w") as file:
        file.write(member((64, 1024, 1024)))
        for _ in range(64):
            file.write(bytes(1 << 20))
    tracemalloc.start()
    assert sum(item.image.size for item in npz_source(tmp_path / "x.npz").read(0, 64)) == 64 << 20
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 20 << 20


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"x": member((10**12, 32, 32, 3))}, "bytes that are not in the file"),
        ({"x": member((10**9, 1, 1), data=b"12")}, "bytes that are not in the file"),
        ({"x": member((-1, 2, 2))}, "not a readable"),
        ({"x": b"hello"}, "not a readable"),
        ({"x": b"\x93NUMPY\x02\x00\xff\xff\xff\xff"}, "unusual format version"),
        ({"x": b"\x93NUMPY\x01\x00\xff\x0f" + b"(" * 4095}, "not a readable"),
        ({"x": member((1,), "|O", bytes(8))}, "array of objects"),
        ({"x": member((2, 3, 3), data=bytes(18)), "y": member((2,), "|O", bytes(16))}, "array of objects"),
        ({"x": member((2, 3, 3), data=bytes(18)), "y": member((3,), data=bytes(3))}, r"y must be integers \[2\]"),
        ({"x": member((2, 3, 3), "<f4", bytes(72))}, "x must be uint8"),
        ({"z\n\x1b[2J": b""}, r"it has: z\\n\\x1b\[2J"),
    ],
)
def test_arrays_that_are_none(tmp_path, members, reason):
    path = save(tmp_path / "x.npz", **members)
    with pytest.raises(DataError, match=rf"x\.npz: .*{reason}") as caught:
        convert("npz", path, tmp_path / "x.beton")
    assert str(caught.value).isprintable()
    assert {file.name for file in tmp_path.iterdir()} == {"x.npz"}


@pytest.mark.parametrize("how", ["encrypted", "unknown compression", "lzma", "checksum", "size"])
def test_members_that_cannot_be_read(tmp_path, how):
    path = save(
        tmp_path / "x.npz",
        zipfile.ZIP_LZMA if how == "lzma" else zipfile.ZIP_STORED,
        x=member(PIXELS.shape, data=PIXELS.tobytes()),
    )
    data = bytearray((tmp_path / "x.npz").read_bytes())
    for at, offset in ((0, 0), (data.rindex(b"PK\x01\x02"), 2)):  # the local header and that of the directory
        if how == "encrypted":
            data[at + 6 + offset] |= 1
        elif how == "unknown compression":
            data[at + 8 + offset] = 77
        elif how == "size":
            data[at + 22 + offset : at + 26 + offset] = (2_800_000_000).to_bytes(4, "little")
    if how == "checksum":
        data[300] ^= 1
    (tmp_path / "x.npz").write_bytes(data)
    with pytest.raises(DataError, match=r"x\.npz: not a readable \.npz"):
        convert("npz", path, tmp_path / "x.beton")
    assert {file.name for file in tmp_path.iterdir()} == {"x.npz"}


def test_too_many_images(tmp_path):
    """100 kB that say they are 100,000,001 images of one pixel, and are."""
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive, archive.open("x.npy", "w") as file:
        file.write(member((100_000_001, 1, 1)))
        for _ in range(100):
            file.write(bytes(1_000_000))
        file.write(b"\0")
    with pytest.raises(DataError, match="100,000,001 images; at most 100,000,000"):
        convert("npz", str(tmp_path / "x.npz"), tmp_path / "x.beton")


def test_wide_images(tmp_path):
    np.savez(tmp_path / "x.npz", x=np.zeros((1, 1, 70_000), np.uint8))
    with pytest.raises(DataError, match="a side of 70,000 px"):
        convert("npz", str(tmp_path / "x.npz"), tmp_path / "x.beton", on_error="fail")
    report = convert("npz", str(tmp_path / "x.npz"), tmp_path / "x.beton", max_px=100)
    assert BetonReader(report.out).sizes.tolist() == [[1, 100]]
