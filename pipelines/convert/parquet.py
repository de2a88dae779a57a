"""Parquet files as written by Hugging Face's `datasets`: a column of images and, optionally, one of labels."""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import IO, Any

from pipelines.convert.parquet_sizes import Column, check_footer, columns_of, pages_of
from pipelines.convert.remote_source import NUM_THREADS, SourcePath, name_of, open_source
from pipelines.convert.source import MAX_LABEL, Item, Source, checked_label, fingerprint
from pipelines.errors import DataError, one_line
from pipelines.files import check_inflation

ROWS_AT_ONCE = 64  # rows decoded from a row group at a time
ROWS_BYTES = 64 << 20  # fewer rows at a time, if all of them could be the same long entry of a dictionary
READ_BYTES = 1 << 20  # of a column at a time; without this, pyarrow reads a row group's column as a whole
# Of a file's metadata. Each structure in them takes up to 1.3 kB in memory; small ones cannot hold many.
MAX_FOOTER_BYTES = 64 << 20
MAX_STRUCTURES = 500_000
SMALL_FOOTER_BYTES = 1 << 20


def parquet_source(files: list[SourcePath], image_column: str | None, label_column: str | None) -> Source:
    """Rows of parquet files that share one schema.

    The images are binary, or structs with a binary field `bytes`. A path stored with the bytes is not read: files that
    a parquet file refers to are not opened.

    Args:
        files: The files, in order.
        image_column: None: the only column that can contain images, or the one named image or img.
        label_column: A column of integers; None: `label`, if there is such a column.
    Raises:
        DataError: unreadable file, different schemas, no such columns, or columns to choose from.
    """
    with open_parquet(files[0]) as first:
        schema = first.schema_arrow
    image_column = _image_column(schema, image_column, files[0])
    label_column = _label_column(schema, label_column, files[0])
    columns = [image_column] + ([label_column] if label_column else [])
    counts = _counts(files, columns, schema)
    if not sum(counts):
        raise DataError(f"{files[0]}: no rows")

    def read(start: int, stop: int) -> Iterator[Item]:
        first_row = 0
        for path, num_rows in zip(files, counts, strict=True):
            if first_row < stop and start < first_row + num_rows:
                skip = max(start - first_row, 0)
                rows = _read_file(path, image_column, label_column, skip)
                yield from islice(rows, min(stop - first_row, num_rows) - skip)
            first_row += num_rows

    def pick(numbers: Iterator[int]) -> Iterator[Item]:
        raise DataError(
            f"{files[0]}: parquet files cannot be read in random order: shuffle the rows where the files are written, "
            "or save the images in a folder or in plain .tar files, or leave --shuffle out"
        )

    return Source(
        name=name_of(files[0]) + (f" and {len(files) - 1} more" if len(files) > 1 else ""),
        num_items=sum(counts),
        read=read,
        pick=pick,
        fingerprint=fingerprint(files, json.dumps(columns).encode()),
        class_names=_class_names(schema, label_column),
    )


def _read_file(path: SourcePath, image_column: str, label_column: str | None, start: int) -> Iterator[Item]:
    """Yield the rows from `start` on; row groups before it are not read."""
    row = 0
    with open_parquet(path) as file, open_source(path, is_sparse=True) as own:
        leaves = _leaves(file.schema_arrow, image_column, label_column)
        for group, columns in enumerate(columns_of(_footer(own))):
            num_rows = file.metadata.row_group(group).num_rows
            if row + num_rows <= start:
                row += num_rows
                continue
            at_once = _rows_at_once(path, own, [column for column in columns if column.path in leaves])
            for batch in file.iter_batches(at_once, row_groups=[group], columns=leaves, use_threads=False):
                first = row
                for values in batch.slice(max(start - row, 0)).to_pylist():
                    where = f"{path}, row {max(row, start)}"
                    label = checked_label(values[label_column] if label_column else None, where)
                    yield Item(where, _image_bytes(values[image_column]), label)
                    row = max(row, start) + 1
                row = max(row, first + len(batch))


def _leaves(schema: Any, image_column: str, label_column: str | None) -> list[str]:
    """The columns to read, without what is stored next to an image's bytes."""
    import pyarrow.types as kinds

    is_struct = kinds.is_struct(schema.field(image_column).type)
    return [f"{image_column}.bytes" if is_struct else image_column] + ([label_column] if label_column else [])


def _rows_at_once(path: SourcePath, file: IO[bytes], columns: list[Column]) -> int:
    """Number of rows of a row group to decode at a time, so that a small file cannot fill the memory.

    A row has at most the bytes of one page: all rows could be the longest entry of a dictionary, or, in the encoding
    DELTA_BYTE_ARRAY, begin like the longest row.

    Raises:
        DataError: see `check_inflation`.
    """
    longest_bytes = 1
    for column in columns:
        num_bytes = in_file = 0
        for page in pages_of(file, column):
            num_bytes, in_file = num_bytes + page.num_bytes, in_file + page.in_file
            check_inflation(str(path), page.in_file, page.num_bytes)
            longest_bytes = max(longest_bytes, page.num_bytes)
        check_inflation(str(path), in_file, num_bytes)
    return min(ROWS_AT_ONCE, max(ROWS_BYTES // longest_bytes, 1))


def _image_bytes(value: Any) -> bytes:
    """Bytes of an image; empty if there is none, which is then reported as an empty file."""
    found = value.get("bytes") if isinstance(value, dict) else value
    return found or b""


@contextmanager
def open_parquet(path: SourcePath) -> Iterator[Any]:
    """An open `pyarrow.parquet.ParquetFile`.

    Raises:
        DataError: the file cannot be read, also in the `with` block.
    """
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError("parquet needs pyarrow: pip install pyarrow") from error
    try:
        _check_footer(path)
        with (
            _pyarrow_file(path) as file,
            pq.ParquetFile(file, buffer_size=READ_BYTES, pre_buffer=False) as opened,
        ):
            yield opened
    except DataError:
        raise
    except Exception as error:  # of many types: damaged data and damaged names of columns
        message = f"{path}: not a readable parquet file ({one_line(error)}); copy it again"
        raise DataError(message) from error


def _pyarrow_file(path: SourcePath) -> Any:
    """A file that pyarrow reads; a local one without Python in between."""
    import pyarrow as pa

    if isinstance(path, str):
        return pa.OSFile(os.fsencode(path))  # bytes, because pyarrow refuses names that are not UTF-8
    return pa.PythonFile(open_source(path), mode="r")


def _check_footer(path: SourcePath) -> None:
    with open_source(path, is_sparse=True) as file:
        footer = _footer(file)
    if len(footer) > SMALL_FOOTER_BYTES:
        check_footer(footer, MAX_STRUCTURES)


def _footer(file: IO[bytes]) -> bytes:
    """A file's metadata; empty if there are none, which pyarrow will name."""
    end = max(file.seek(0, os.SEEK_END) - 8, 0)
    file.seek(end)
    num_bytes = int.from_bytes(file.read(4), "little")
    if file.read(4) != b"PAR1" or num_bytes > end:
        return b""
    if num_bytes > MAX_FOOTER_BYTES:
        raise ValueError(f"{num_bytes:,} bytes of metadata; at most {MAX_FOOTER_BYTES:,} are read")
    file.seek(end - num_bytes)
    return file.read(num_bytes)


def _counts(files: list[SourcePath], columns: list[str], schema: Any) -> list[int]:
    """Number of rows of each file, from the footers."""
    if all(isinstance(path, str) for path in files):
        return [_count(path, columns, schema) for path in files]
    with ThreadPoolExecutor(NUM_THREADS) as threads:  # which wait for the server
        return list(threads.map(lambda path: _count(path, columns, schema), files))


def _count(path: SourcePath, columns: list[str], schema: Any) -> int:
    with open_parquet(path) as file:
        for column in columns:
            if file.schema_arrow.names.count(column) > 1:
                raise DataError(f"{path}: column {column} is there more than once; rename one of them")
            index = file.schema_arrow.get_field_index(column)
            if index < 0 or file.schema_arrow.field(index).type != schema.field(column).type:
                raise DataError(f"{path}: column {column} is missing or of another type than in the first file")
        return file.metadata.num_rows


def _image_column(schema: Any, wanted: str | None, path: SourcePath) -> str:
    found = [field.name for field in schema if _holds_images(field.type)]
    if wanted is not None:
        if wanted not in found:
            raise DataError(f"{path}: image_column {wanted!r} is none of images; those that can be: {', '.join(found)}")
        return wanted
    usual = [name for name in ("image", "img") if name in found]
    if usual or len(found) == 1:
        return (usual or found)[0]
    raise DataError(f"{path}: choose --image-column; those that can be: {', '.join(found) or 'none'}")


def _holds_images(kind: Any) -> bool:
    import pyarrow.types as kinds

    if kinds.is_struct(kind):
        within = [kind.field(k) for k in range(kind.num_fields) if kind.field(k).name == "bytes"]
        return len(within) == 1 and _is_binary(within[0].type)
    return _is_binary(kind)


def _is_binary(kind: Any) -> bool:
    import pyarrow.types as kinds

    return kinds.is_binary(kind) or kinds.is_large_binary(kind)


def _label_column(schema: Any, wanted: str | None, path: SourcePath) -> str | None:
    import pyarrow.types as kinds

    integers = [field.name for field in schema if kinds.is_integer(field.type)]
    name = wanted or "label"
    if wanted is None and name not in schema.names:
        # Such as CIFAR-100's fine_label and coarse_label
        usual = [column for column in integers if column.endswith(("label", "labels"))]
        if len(usual) > 1:
            raise DataError(f"{path}: choose --label-column; those that can be: {', '.join(usual)}")
        return None
    if name not in integers:
        raise DataError(f"{path}: label_column {name!r} must be a column of integers")
    return name


def _class_names(schema: Any, label_column: str | None) -> list[str] | None:
    """Names of a ClassLabel from the schema's metadata; None if there are none."""
    try:
        about = json.loads((schema.metadata or {})[b"huggingface"])
        names = about["info"]["features"][label_column]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    is_list = isinstance(names, list) and len(names) <= MAX_LABEL + 1
    return names if is_list and all(isinstance(name, str) for name in names) else None
