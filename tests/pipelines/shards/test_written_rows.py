"""The rows that `BetonWriter` writes next to a .beton."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest

from pipelines.beton import JPG, RAW, BetonReader, BetonWriter
from pipelines.shards.rows import MAX_IMAGE_BYTES, ROW, is_intact, modes_of, num_bytes_of, rows_path

SIZES_PX = ((3, 5), (40, 7), (1, 1), (3, 5), (65_535, 1), (9, 9))


def write(writer: BetonWriter, numbers: range) -> None:
    """Images of some sizes and both modes, with and without labels."""
    for i in numbers:
        height, width = SIZES_PX[i]
        if i % 3:
            writer.write_jpeg(bytes([i]) * (20 + i), height_px=height, width_px=width, label=i - 1)
        else:
            writer.write_raw(np.full((height, width, 3), i, np.uint8), label=i - 1)


def rows_of(path: Path) -> np.ndarray:
    return np.frombuffer(rows_path(path).read_bytes(), ROW)


def interrupt(path: Path, num: int) -> None:
    """Leave the checkpoint of a writer that ended after `num` images."""
    try:
        with BetonWriter(path) as writer:
            write(writer, range(num))
            writer.checkpoint({})
            write(writer, range(num, num + 1))
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        return


def test_rows_describe_the_file(tmp_path):
    with BetonWriter(tmp_path / "x.beton") as writer:
        write(writer, range(6))
    reader, rows = BetonReader(tmp_path / "x.beton"), rows_of(tmp_path / "x.beton")
    assert rows["ptr"].tolist() == reader.data_ptr.tolist()
    assert num_bytes_of(rows).tolist() == reader.data_bytes.tolist()
    assert modes_of(rows).tolist() == [RAW, JPG, JPG, RAW, JPG, JPG]
    assert np.stack([rows["height"], rows["width"]], 1).tolist() == [list(size) for size in SIZES_PX]
    assert rows["label"].tolist() == [-1, 0, 1, 2, 3, 4]
    for i in range(6):
        image = reader.image_bytes(i).tobytes()
        assert rows["crc32"][i] == zlib.crc32(image + rows[i].tobytes()[:20])
        assert is_intact(rows[i : i + 1].data, reader.image_bytes(i).data)
    assert reader.sidecar["rows_crc32"] == zlib.crc32(rows.tobytes())


def test_an_overwritten_file_has_new_rows(tmp_path):
    for numbers in (range(6), range(2)):
        with BetonWriter(tmp_path / "x.beton", overwrite=True) as writer:
            write(writer, numbers)
        assert len(rows_of(tmp_path / "x.beton")) == len(numbers)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.beton", "x.beton.json", "x.beton.rows"]


@pytest.mark.parametrize("is_old", [False, True], ids=["", "of an older version"])
def test_a_resumed_writer_writes_the_same_rows(tmp_path, is_old):
    """A checkpoint of an older version has no checksums: the images are read again."""
    with BetonWriter(tmp_path / "whole.beton") as writer:
        write(writer, range(6))
    path, checkpoint = tmp_path / "x.beton", tmp_path / "x.beton.partial.npz"
    interrupt(path, 4)
    with np.load(checkpoint) as found:
        kept = dict(found)
    assert kept["crcs"].tolist() == rows_of(tmp_path / "whole.beton")["crc32"][:4].tolist()
    if is_old:
        del kept["crcs"]
        np.savez(checkpoint, **kept)
    with BetonWriter(path, resume=True) as writer:
        assert writer.num_samples == 4
        write(writer, range(4, 6))
    assert path.read_bytes() == (tmp_path / "whole.beton").read_bytes()
    assert rows_path(path).read_bytes() == rows_path(tmp_path / "whole.beton").read_bytes()
    sidecars = [json.loads(Path(f"{each}.json").read_text()) for each in (path, tmp_path / "whole.beton")]
    assert sidecars[0] == sidecars[1]


def test_an_image_that_no_row_can_describe(tmp_path):
    class Huge(bytes):
        def __len__(self) -> int:
            return MAX_IMAGE_BYTES + 1

    with BetonWriter(tmp_path / "x.beton") as writer:
        with pytest.raises(ValueError, match=r"must take 1\.\.2147483647 bytes, not 2147483648"):
            writer.write_jpeg(Huge(), height_px=1, width_px=1)
        write(writer, range(1))
