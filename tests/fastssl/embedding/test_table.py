"""The tables of features: what is written is read again, the pieces do not matter, nothing half-written is left."""

import json
import resource

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastssl.embedding import table as tables
from fastssl.embedding.table import Piece, check_out, open_table, read_table
from fastssl.errors import UserError
from pipelines.errors import DataError

NUM_ROWS, NUM_FEATURES = 50, 6
PATHS = [f"/photos/bild_ü{i:02}.jpg" for i in range(NUM_ROWS)]
BROKEN = {3: "empty file", 20: "a reason\nof two lines"}
ABOUT = {"model": "/runs/a/weights.pt", "fastssl": "0"}


@pytest.fixture(scope="module")
def features() -> np.ndarray:
    values = np.random.default_rng(0).standard_normal((NUM_ROWS, NUM_FEATURES)).astype(np.float32)
    values[list(BROKEN)] = np.nan
    return values


def write(out, features, size=NUM_ROWS):
    with open_table(out, num_rows=NUM_ROWS, num_features=NUM_FEATURES, about=ABOUT) as table:
        for first in range(0, NUM_ROWS, size):
            rows = range(first, min(first + size, NUM_ROWS))
            errors = [BROKEN.get(i) for i in rows]
            table.write(Piece([PATHS[i] for i in rows], [i % 3 - 1 for i in rows], errors, features[list(rows)]))
    return out


def test_a_parquet_table_is_what_was_written(tmp_path, features) -> None:
    out = write(tmp_path / "new" / "x.parquet", features)
    columns = pq.read_table(out)
    assert columns.schema.field("features").type == pa.list_(pa.float32(), NUM_FEATURES)
    assert columns.column_names == ["path", "features", "error", "label"]
    rows = columns.to_pylist()
    assert [row["path"] for row in rows] == PATHS
    assert [row["label"] for row in rows] == [None if i % 3 == 0 else i % 3 - 1 for i in range(NUM_ROWS)]
    assert {i: row["error"] for i, row in enumerate(rows) if row["error"] is not None} == BROKEN
    assert [i for i, row in enumerate(rows) if row["features"] is None] == list(BROKEN)
    whole = [i for i in range(NUM_ROWS) if i not in BROKEN]
    assert np.array_equal(np.array([rows[i]["features"] for i in whole], np.float32), features[whole])
    assert json.loads(columns.schema.metadata[b"fastssl"]) == ABOUT
    opened = read_table(out)
    assert (opened.num_rows, opened.num_features, opened.about) == (NUM_ROWS, NUM_FEATURES, ABOUT)
    assert opened.find(["no", PATHS[7], PATHS[9]]) == 7
    assert opened.find(["no"]) is None
    assert [row["path"] for row in opened.rows([9, 2, 9])] == [PATHS[9], PATHS[2], PATHS[9]]


@pytest.mark.parametrize("name", ["x.parquet", "x.npy"])
def test_the_file_does_not_depend_on_the_pieces(tmp_path, features, name, monkeypatch) -> None:
    monkeypatch.setattr(tables, "_MAX_ROWS", 8)
    files = [write(tmp_path / f"{size}" / name, features, size) for size in (1, 7, 8, 19, NUM_ROWS)]
    assert len({file.read_bytes() for file in files}) == 1
    if name == "x.parquet":
        metadata = pq.read_metadata(files[0])
        assert [metadata.row_group(k).num_rows for k in range(metadata.num_row_groups)] == [8] * 6 + [2]
        pieces = list(read_table(files[0]).features())
        assert np.array_equal(np.concatenate([rows for rows, _ in pieces]), np.flatnonzero(~np.isnan(features[:, 0])))
        assert np.array_equal(np.concatenate([values for _, values in pieces]), features[~np.isnan(features[:, 0])])


def test_an_array_has_its_paths_and_errors_next_to_it(tmp_path, features) -> None:
    out = write(tmp_path / "x.npy", features)
    array = np.load(out)
    assert array.dtype == np.float32
    assert np.array_equal(array, features, equal_nan=True)
    assert (tmp_path / "x.npy.paths.txt").read_text().splitlines() == PATHS
    lines = (tmp_path / "x.npy.errors.txt").read_text().splitlines()
    assert lines == [f"{PATHS[3]}\tempty file", f"{PATHS[20]}\ta reason\\nof two lines"]
    assert json.loads((tmp_path / "x.npy.json").read_text()) == ABOUT
    with open_table(out, num_rows=1, num_features=NUM_FEATURES, about=ABOUT) as table:
        table.write(Piece(["a"], [-1], [None], features[:1]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.npy", "x.npy.json", "x.npy.paths.txt"]
    assert np.load(out).shape == (1, NUM_FEATURES)


@pytest.mark.parametrize("name", ["x.parquet", "x.npy"])
def test_rows_are_written_as_they_come(tmp_path, name, monkeypatch) -> None:
    """Not at the end, so that the memory does not grow with the table."""
    monkeypatch.setattr(tables, "_MAX_ROWS", 8)
    rows = np.random.default_rng(0).standard_normal((10, 5000)).astype(np.float32)
    piece = Piece(["a"] * 10, [-1] * 10, [None] * 10, rows)
    with open_table(tmp_path / name, num_rows=100, num_features=5000, about=ABOUT) as table:
        for num_written in range(10, 101, 10):
            table.write(piece)
            assert (tmp_path / f".{name}.tmp").stat().st_size > 4 * 5000 * (num_written - 8)
    assert (tmp_path / name).stat().st_size > 4 * 5000 * 100


@pytest.mark.parametrize("name", ["x.parquet", "x.npy"])
def test_an_error_leaves_what_was_there(tmp_path, features, name) -> None:
    (tmp_path / name).write_text("before")
    unequal = Piece(PATHS[:2], [0, 0], [None, None], features[:2])._replace(errors=[None, None, None])
    with (
        pytest.raises(ValueError, match=r"shape|argument 2 is longer"),
        open_table(tmp_path / name, num_rows=NUM_ROWS, num_features=NUM_FEATURES, about=ABOUT) as table,
    ):
        table.write(unequal)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "before"


@pytest.mark.parametrize("name", ["x.parquet", "x.npy"])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, name) -> None:
    rows = np.zeros((20_000, 8), np.float32)
    piece = Piece(["a"] * len(rows), [-1] * len(rows), [None] * len(rows), rows)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with (
            pytest.raises(DataError, match=rf"{name}.*: cannot be written \(File too large"),
            open_table(tmp_path / name, num_rows=len(rows), num_features=8, about=ABOUT) as table,
        ):
            table.write(piece)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_not_utf_8_is_found_again(tmp_path) -> None:
    name = b"/photos/\xff.jpg".decode(errors="surrogateescape")
    with open_table(tmp_path / "x.parquet", num_rows=1, num_features=2, about=ABOUT) as table:
        table.write(Piece([name], [-1], [None], np.zeros((1, 2), np.float32)))
    assert read_table(tmp_path / "x.parquet").find([name]) == 0


def test_files_that_are_no_tables_are_named(tmp_path) -> None:
    vectors = pa.array([[1.0, 2.0]], pa.list_(pa.float32(), 2))
    plain = {"path": ["a"], "error": pa.array([None], pa.string()), "label": pa.array([1], pa.int64())}
    pq.write_table(pa.table(plain | {"features": vectors}), tmp_path / "other.parquet")
    about = {b"fastssl": b"[]"}
    pq.write_table(pa.table(plain | {"features": vectors}).replace_schema_metadata(about), tmp_path / "list.parquet")
    about = {b"fastssl": b"{}"}
    pq.write_table(pa.table(plain | {"features": ["b"]}).replace_schema_metadata(about), tmp_path / "text.parquet")
    pq.write_table(pa.table({"features": vectors}).replace_schema_metadata(about), tmp_path / "alone.parquet")
    (tmp_path / "damaged.parquet").write_bytes((tmp_path / "other.parquet").read_bytes()[:-9])
    (tmp_path / "x.npy").write_bytes(b"")
    for file in sorted(tmp_path.iterdir()):
        message = {"damaged.parquet": "not a readable parquet file", "x.npy": "an array without its paths"}
        with pytest.raises(DataError, match=message.get(file.name, "not a table of features")):
            read_table(file)
    with pytest.raises(DataError, match="no such file"):
        read_table(tmp_path / "none.parquet")


def test_a_file_that_must_not_be_written_is_refused_first(tmp_path) -> None:
    (tmp_path / "x.parquet").touch()
    (tmp_path / "y.npy").mkdir()
    for name, message in {"x.parquet": "exists already", "y.npy": "is a folder", "x.csv": "must end in"}.items():
        with pytest.raises(UserError, match=message):
            check_out(tmp_path / name, overwrite=False)
    check_out(tmp_path / "x.parquet", overwrite=True)
    check_out(tmp_path / "z.npy", overwrite=False)
