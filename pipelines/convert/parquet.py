"""Parquet files as written by Hugging Face's `datasets`: a column of images and, optionally, one of labels."""

import json
import os
from collections.abc import Iterator
from typing import Any

from pipelines.convert.source import Item, Source, checked_label, fingerprint
from pipelines.errors import DataError

ROWS_AT_ONCE = 64  # rows decoded from a row group at a time


def parquet_source(files: list[str], image_column: str | None, label_column: str | None) -> Source:
    """Rows of parquet files that share one schema.

    The images are binary, or structs with a binary field `bytes`. A path stored with the bytes is only used as the
    image's name: files that a parquet file refers to are not opened.

    Args:
        files: The files, in order.
        image_column: None: the only column that can contain images, or the one named image or img.
        label_column: A column of integers; None: `label`, if there is such a column.
    Raises:
        DataError: unreadable file, different schemas, or no such columns.
    """
    first = _open(files[0])
    schema = first.schema_arrow
    image_column = _image_column(schema, image_column, files[0])
    label_column = _label_column(schema, label_column, files[0])
    columns = [image_column] + ([label_column] if label_column else [])
    counts = [_count(path, columns, schema) for path in files]
    if not sum(counts):
        raise DataError(f"{files[0]}: no rows")

    def read(start: int, stop: int) -> Iterator[Item]:
        first_row = 0
        for path, num_rows in zip(files, counts, strict=True):
            if first_row < stop and start < first_row + num_rows:
                rows = _read_file(path, image_column, label_column, max(start - first_row, 0))
                for _ in range(max(start, first_row), min(stop, first_row + num_rows)):
                    yield next(rows)
            first_row += num_rows

    return Source(
        name=os.path.abspath(files[0]) + (f" and {len(files) - 1} more" if len(files) > 1 else ""),
        num_items=sum(counts),
        read=read,
        fingerprint=fingerprint(files, json.dumps(columns).encode()),
        class_names=_class_names(schema, label_column),
    )


def _read_file(path: str, image_column: str, label_column: str | None, start: int) -> Iterator[Item]:
    """Yield the rows from `start` on; row groups before it are not read."""
    import pyarrow as pa

    columns = [image_column] + ([label_column] if label_column else [])
    file = _open(path)
    row = 0
    try:
        for group in range(file.num_row_groups):
            num_rows = file.metadata.row_group(group).num_rows
            if row + num_rows <= start:
                row += num_rows
                continue
            for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=columns, use_threads=False):
                first = row
                for values in batch.slice(max(start - row, 0)).to_pylist():
                    where = f"{path}, row {max(row, start)}"
                    label = checked_label(values[label_column] if label_column else None, where)
                    yield Item(where, _image_bytes(values[image_column]), label)
                    row = max(row, start) + 1
                row = max(row, first + len(batch))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: damaged at row {row} ({error}); copy it again") from error
    finally:
        file.close()


def _image_bytes(value: Any) -> bytes:
    """Bytes of an image; empty if there is none, which is then reported as an empty file."""
    found = value.get("bytes") if isinstance(value, dict) else value
    return found or b""


def _open(path: str) -> Any:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError("parquet needs pyarrow: pip install pyarrow") from error
    try:
        return pq.ParquetFile(path, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file ({error})") from error


def _count(path: str, columns: list[str], schema: Any) -> int:
    file = _open(path)
    try:
        for column in columns:
            index = file.schema_arrow.get_field_index(column)
            if index < 0 or file.schema_arrow.field(index).type != schema.field(column).type:
                raise DataError(f"{path}: column {column} is missing or of another type than in the first file")
        return file.metadata.num_rows
    finally:
        file.close()


def _image_column(schema: Any, wanted: str | None, path: str) -> str:
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
        names = [kind.field(k).name for k in range(kind.num_fields)]
        return "bytes" in names and _holds_images(kind.field("bytes").type)
    return kinds.is_binary(kind) or kinds.is_large_binary(kind)


def _label_column(schema: Any, wanted: str | None, path: str) -> str | None:
    import pyarrow.types as kinds

    name = wanted or "label"
    index = schema.get_field_index(name)
    if index < 0 and wanted is None:
        return None
    if index < 0 or not kinds.is_integer(schema.field(index).type):
        raise DataError(f"{path}: label_column {name!r} must be a column of integers")
    return name


def _class_names(schema: Any, label_column: str | None) -> list[str] | None:
    """Names of a ClassLabel from the schema's metadata; None if there are none."""
    try:
        about = json.loads((schema.metadata or {})[b"huggingface"])
        names = about["info"]["features"][label_column]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None
