"""The files with features: a parquet table, or a .npy array with text files next to it; written piece by piece."""

# N images, n of a piece, F features

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastssl.errors import UserError
from fastssl.machine.files import sync_file
from pipelines.convert.parquet import open_parquet
from pipelines.errors import DataError
from pipelines.printable import printable

SUFFIXES = (".parquet", ".npy")
_KEY = b"fastssl"  # of the metadata of a parquet table
_MAX_ROWS, _MAX_GROUP_BYTES = 8192, 64 << 20  # of a row group: bounds the memory of writers and readers
_MAX_NAME_CHARS = 8192


class Piece(NamedTuple):
    """Consecutive rows.

    Attributes:
        paths: n names of images.
        labels: n labels; -1 = none.
        errors: n reasons why an image has no features; None: it has.
        features: float32 [n, F]; NaN where there is an error.
    """

    paths: list[str]
    labels: list[int]
    errors: list[str | None]
    features: np.ndarray


class TableWriter(Protocol):
    """Takes the rows of a table in their order."""

    def write(self, piece: Piece) -> None:
        """Add rows."""
        ...


def check_out(out: Path, *, overwrite: bool) -> None:
    """Refuse a file that must not, or cannot, be written, before the work.

    Raises:
        UserError: another suffix, or it exists already.
    """
    if out.suffix not in SUFFIXES:
        raise UserError(f"--out must end in {' or '.join(SUFFIXES)}, not {str(out.name)!r:.100}")
    if out.is_dir():
        raise UserError(f"--out: {out} is a folder")
    if out.exists() and not overwrite:
        raise UserError(f"--out: {out} exists already; pass --overwrite to replace it")


@contextmanager
def open_table(out: Path, *, num_rows: int, num_features: int, about: Mapping[str, Any]) -> Iterator[TableWriter]:
    """Write a table under temporary names, which become its own when the block ends; after an error nothing is left.

    Args:
        out: X.parquet: the columns path, features (fixed-size list of F float32, null with an error), error and label
            (null = none), and `about` in the metadata. X.npy: float32 [N, F], NaN with an error; next to it
            X.npy.paths.txt, a path per line, X.npy.errors.txt with `path<TAB>reason` of the images without features (if
            there are any) and X.npy.json with `about`.
        num_rows: N.
        num_features: F.
        about: Where the features come from, JSON values.

    Raises:
        DataError: a file cannot be written.
    """
    files = [out] if out.suffix == ".parquet" else [*(out.with_name(f"{out.name}{end}") for end in _NPY_ENDS), out]
    partial = [file.with_name(f".{file.name}.tmp") for file in files]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.suffix == ".parquet":
            with partial[0].open("wb") as file, _Parquet(file, num_features, about) as writer:
                yield writer
        else:
            with _Npy(partial, num_rows, num_features, about) as writer:
                yield writer
        for temporary, file in zip(partial, files, strict=True):
            if temporary.exists():
                os.replace(temporary, file)
            else:
                file.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"{error.filename or out}: cannot be written ({error.strerror or error})") from None
    finally:
        for temporary in partial:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


class _Parquet:
    """Collects pieces to row groups; their sizes do not depend on the sizes of the pieces."""

    def __init__(self, file: IO[bytes], num_features: int, about: Mapping[str, Any]) -> None:
        self._file, self._num_features = file, num_features
        self._rows_at_once = max(1, min(_MAX_ROWS, _MAX_GROUP_BYTES // (4 * num_features)))
        self._schema = pa.schema(
            [
                pa.field("path", pa.string(), nullable=False),
                pa.field("features", pa.list_(pa.float32(), num_features)),
                pa.field("error", pa.string()),
                pa.field("label", pa.int64()),
            ],
            metadata={_KEY: json.dumps(about, sort_keys=True).encode()},
        )
        self._waiting: list[Any] = []

    def __enter__(self) -> "_Parquet":
        plain = {"compression": "none", "use_dictionary": False, "write_statistics": False}  # features do not compress
        self._writer = pq.ParquetWriter(self._file, self._schema, **plain)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: object) -> None:
        if error is None:
            self._flush(1)
            self._writer.close()
            sync_file(self._file)
            return
        with suppress(Exception):  # what the writer says of the file that is thrown away
            self._writer.close()

    def write(self, piece: Piece) -> None:
        has_none = np.array([reason is not None for reason in piece.errors])
        values = pa.array(np.where(has_none[:, None], np.float32(0), piece.features).reshape(-1))
        features = pa.FixedSizeListArray.from_arrays(values, self._num_features, mask=pa.array(has_none))
        columns = [
            pa.array([_utf8(path) for path in piece.paths], pa.string()),
            features,
            pa.array([reason and _utf8(reason) for reason in piece.errors], pa.string()),
            pa.array([None if label < 0 else label for label in piece.labels], pa.int64()),
        ]
        self._waiting.append(pa.Table.from_arrays(columns, schema=self._schema))
        self._flush(self._rows_at_once)

    def _flush(self, at_least: int) -> None:
        while sum(map(len, self._waiting)) >= at_least:
            rows = pa.concat_tables(self._waiting)
            self._writer.write_table(rows.slice(0, self._rows_at_once), row_group_size=self._rows_at_once)
            self._waiting = [rows.slice(self._rows_at_once)] if len(rows) > self._rows_at_once else []


_NPY_ENDS = (".json", ".paths.txt", ".errors.txt")


class _Npy:
    def __init__(self, partial: Sequence[Path], num_rows: int, num_features: int, about: Mapping[str, Any]) -> None:
        self._about_path, self._paths_path, self._errors_path, self._array_path = partial
        self._shape, self._about = (num_rows, num_features), about

    def __enter__(self) -> "_Npy":
        self._about_path.write_text(json.dumps(self._about, sort_keys=True, indent=2), encoding="utf-8")
        self._array = self._array_path.open("wb")
        self._paths = self._paths_path.open("w", encoding="utf-8")
        self._errors = self._errors_path.open("w", encoding="utf-8")
        header = {"descr": "<f4", "fortran_order": False, "shape": self._shape}
        np.lib.format.write_array_header_1_0(self._array, header)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: object) -> None:
        for file in (self._array, self._paths, self._errors):
            with file:
                if error is None:
                    sync_file(file)
        if error is None and not self._errors_path.stat().st_size:
            self._errors_path.unlink()

    def write(self, piece: Piece) -> None:
        self._array.write(np.ascontiguousarray(piece.features, "<f4").data)
        for path, reason in zip(piece.paths, piece.errors, strict=True):
            name = printable(path, _MAX_NAME_CHARS)
            self._paths.write(f"{name}\n")
            if reason is not None:
                self._errors.write(f"{name}\t{printable(reason)}\n")


def _utf8(text: str) -> str:
    """A name of a file that is not UTF-8 with its bytes as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


@dataclass(frozen=True, kw_only=True)
class Table:
    """An X.parquet of `fastssl embed`.

    Attributes:
        path: The file.
        about: Its metadata.
        num_rows: N, with images that could not be read.
        num_features: F.
    """

    path: Path
    about: Mapping[str, Any]
    num_rows: int
    num_features: int

    def find(self, names: Sequence[str]) -> int | None:
        """The first row whose path is one of `names`."""
        wanted = set(map(_utf8, names))
        for first, (paths,) in self._pieces(["path"]):
            for row, path in enumerate(paths.to_pylist(), first):
                if path in wanted:
                    return row
        return None

    def rows(self, wanted: Sequence[int]) -> list[dict[str, Any]]:
        """The columns path, error and label of some rows, in the order of `wanted`."""
        found: dict[int, dict[str, Any]] = {}
        for first, columns in self._pieces(["path", "error", "label"]):
            for row in set(wanted):
                if first <= row < first + len(columns[0]):
                    values = (column[row - first].as_py() for column in columns)
                    found[row] = dict(zip(("path", "error", "label"), values, strict=True))
        return [found[row] for row in wanted]

    def features(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the rows int64 [n] that have features, and these, float32 [n, F], piece by piece."""
        for first, (column,) in self._pieces(["features"]):
            rows = np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))
            values = column.flatten().to_numpy(zero_copy_only=False).reshape(len(rows), self.num_features)
            yield rows + first, values

    def _pieces(self, columns: list[str]) -> Iterator[tuple[int, list[Any]]]:
        first = 0
        with open_parquet(str(self.path)) as file:
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(_MAX_ROWS, row_groups=[group], columns=columns, use_threads=False):
                    yield first, [batch.column(name) for name in columns]
                    first += len(batch)


def read_table(path: str | Path) -> Table:
    """Open a table.

    Raises:
        DataError: it cannot be read, or is no table of `fastssl embed`.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file; `fastssl embed` writes a table of features")
    if path.suffix == ".npy":
        raise DataError(f"{path}: an array without its paths; `fastssl embed --out X.parquet` writes a table")
    with open_parquet(str(path)) as file:
        schema, num_rows = file.schema_arrow, file.metadata.num_rows
    foreign = DataError(f"{path}: not a table of features; `fastssl embed` writes one")
    try:
        about = json.loads((schema.metadata or {})[_KEY])
        kind = schema.field("features").type
    except (KeyError, ValueError, RecursionError):
        raise foreign from None
    names = ("path", "error", "label")
    types = [schema.field(name).type if schema.names.count(name) == 1 else None for name in names]
    is_vector = pa.types.is_fixed_size_list(kind) and kind.value_type == pa.float32() and kind.list_size > 0
    if not isinstance(about, dict) or not is_vector or types != [pa.string(), pa.string(), pa.int64()]:
        raise foreign
    return Table(path=path, about=about, num_rows=num_rows, num_features=kind.list_size)
