"""Sizes in a parquet file, read before pyarrow allocates what they claim.

A file's footer states the sizes of its columns too, but nothing keeps them to the truth: what is allocated is what the
headers of the pages claim. Both are structures of Thrift's compact protocol. They are not taken from pyarrow's
`ColumnChunkMetaData`: if a footer contradicts itself, making one aborts the process.
Sources: parquet-format's parquet.thrift, thrift's doc/specs/thrift-compact-protocol.md.
"""

import os
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

MAX_DEPTH = 16  # of structures in structures; parquet's own reach 6
HEADER_BYTES = 1 << 14  # read at first; most headers of pages have less than a hundred
MAX_HEADER_BYTES = 16 << 20  # parquet's limit

_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)


class Column(NamedTuple):
    """Where a column of a row group is in the file.

    Attributes:
        path: Names in the schema, joined by dots.
        start: Offset of its first page, the dictionary's if it has one.
        num_bytes: Number of bytes of its pages, with their headers.
    """

    path: str
    start: int
    num_bytes: int


class Page(NamedTuple):
    """Sizes of a page.

    Attributes:
        num_bytes: Number of bytes once decompressed.
        in_file: Number of bytes in the file.
    """

    num_bytes: int
    in_file: int


def columns_of(footer: bytes) -> Iterator[list[Column]]:
    """The columns of each row group.

    Raises:
        ValueError: the footer is damaged.
    """
    reader = _Reader(footer)
    for field, kind in reader.fields():
        if (field, kind) != (4, _LIST):  # FileMetaData.row_groups
            reader.skip(kind)
            continue
        for element in reader.elements():
            if element != _STRUCT:
                raise ValueError("metadata with row groups of another type")
            chunks = reader.structure().get((1, _LIST), [])
            yield [_column(chunk) for chunk in chunks if isinstance(chunk, dict)]
        return


def pages_of(file: IO[bytes], column: Column) -> Iterator[Page]:
    """Sizes of the pages of a column, its dictionary's included; up to a damaged one.

    Args:
        file: The parquet file; its position is moved.
        column: From `columns_of`.
    """
    file_bytes = file.seek(0, os.SEEK_END)
    at, end = column.start, min(column.start + column.num_bytes, file_bytes)
    while 0 <= at < end:
        header, header_bytes = _page_header(file, at)
        num_bytes, in_file = (header.get((field, _I32), -1) for field in (2, 3))
        if num_bytes < 0 or in_file < 0:
            return
        at += header_bytes
        yield Page(num_bytes, max(min(in_file, file_bytes - at), 0))
        at += in_file


def check_footer(footer: bytes, max_structures: int) -> None:
    """Count the structures of a footer: each takes hundreds of bytes in memory, but two in a file.

    Raises:
        ValueError: more than `max_structures`, or a damaged footer.
    """
    reader = _Reader(footer, max_structures)
    for _, kind in reader.fields():
        reader.skip(kind)


def _column(chunk: dict[tuple[int, int], Any]) -> Column:
    about = chunk.get((3, _STRUCT), {})  # ColumnChunk.meta_data
    names = [name.decode(errors="replace") for name in about.get((3, _LIST), []) if isinstance(name, bytes)]
    num_bytes, start, dictionary_start = (about.get((field, _I64), 0) for field in (7, 9, 11))
    return Column(".".join(names), dictionary_start if 0 < dictionary_start < start else start, num_bytes)


def _page_header(file: IO[bytes], at: int) -> tuple[dict[tuple[int, int], Any], int]:
    """A page's header and its length; nothing if it cannot be read."""
    for num_bytes in (HEADER_BYTES, MAX_HEADER_BYTES):
        file.seek(at)
        data = file.read(num_bytes)
        try:
            reader = _Reader(data)
            return reader.structure(), reader.at
        except ValueError:
            if len(data) < num_bytes:
                break
    return {}, 0


class _Reader:
    """Reads a structure of Thrift's compact protocol; damaged data are a ValueError.

    Attributes:
        at: Position in the data.
    """

    def __init__(self, data: bytes, max_structures: int | None = None) -> None:
        self.at = self._num_structures = self._depth = 0
        self._data, self._max_structures = data, max_structures

    def fields(self) -> Iterator[tuple[int, int]]:
        """Number and type of each field; its value must be read or skipped before the next."""
        self._enter()
        field = 0
        while head := self._byte():
            field = field + (head >> 4) if head >> 4 else self._integer()
            yield field, head & 15
        self._depth -= 1

    def elements(self) -> Iterator[int]:
        """The type of each element of a list; it must be read or skipped before the next."""
        head = self._byte()
        size = self._unsigned() if head >> 4 == 15 else head >> 4
        for _ in range(size):
            if self.at >= len(self._data):
                raise ValueError("metadata that end early")
            yield head & 15

    def structure(self) -> dict[tuple[int, int], Any]:
        """The values by number and type: as in parquet's own reader, a field of another type is another field."""
        return {(field, kind): self._value(kind) for field, kind in self.fields()}

    def skip(self, kind: int) -> None:
        """Read past a field's value."""
        if kind == _STRUCT:
            for _, inner in self.fields():
                self.skip(inner)
        elif kind in (_LIST, _SET):
            for element in self.elements():
                self._skip_element(element)
        elif kind == _MAP:
            size = self._unsigned()
            kinds = self._byte() if size else 0
            for _ in range(size):
                self._skip_element(kinds >> 4)
                self._skip_element(kinds & 15)
        elif kind not in (_TRUE, _FALSE):  # which are a part of the field's head
            self._skip_element(kind)

    def _skip_element(self, kind: int) -> None:
        if kind in (_TRUE, _FALSE, _BYTE):
            self._byte()
        elif kind in (_I16, _I32, _I64):
            self._integer()
        elif kind in (_DOUBLE, _BINARY):
            self._bytes(8 if kind == _DOUBLE else self._unsigned())
        elif kind in (_LIST, _SET, _MAP, _STRUCT):
            self._depth += 1
            self.skip(kind)
            self._depth -= 1
        else:
            raise ValueError(f"metadata of an unknown type, {kind}")

    def _value(self, kind: int) -> Any:
        """An integer, bytes, a structure or a list of these; None for what is not needed."""
        if kind in (_I16, _I32, _I64):
            return self._integer()
        if kind == _BINARY:
            return self._bytes(self._unsigned())
        if kind == _STRUCT:
            return self.structure()
        if kind == _LIST:
            return [self._value(element) for element in self._deeper_elements()]
        self.skip(kind)
        return None

    def _deeper_elements(self) -> Iterator[int]:
        self._enter(is_structure=False)
        for element in self.elements():
            if element in (_TRUE, _FALSE):
                self._byte()
            else:
                yield element
        self._depth -= 1

    def _enter(self, *, is_structure: bool = True) -> None:
        self._depth += 1
        self._num_structures += is_structure
        if self._depth > MAX_DEPTH:
            raise ValueError("metadata that are nested too deeply")
        if self._max_structures is not None and self._num_structures > self._max_structures:
            raise ValueError(f"metadata of more than {self._max_structures:,} structures; write several files")

    def _byte(self) -> int:
        if self.at >= len(self._data):
            raise ValueError("metadata that end early")
        self.at += 1
        return self._data[self.at - 1]

    def _bytes(self, num_bytes: int) -> bytes:
        if num_bytes > len(self._data) - self.at:
            raise ValueError("metadata that end early")
        self.at += num_bytes
        return self._data[self.at - num_bytes : self.at]

    def _unsigned(self) -> int:
        value = shift = 0
        while shift <= 63:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
        raise ValueError("metadata with a number of more than 64 bits")

    def _integer(self) -> int:
        value = self._unsigned()
        return value >> 1 ^ -(value & 1)
