"""Sizes in a parquet file, read before pyarrow allocates what they claim.

A file's footer states the sizes of its columns too, but nothing keeps them to the truth: what is allocated is what the
headers of the pages claim. Both are structures of Thrift's compact protocol.
Sources: parquet-format's parquet.thrift (PageHeader), thrift's doc/specs/thrift-compact-protocol.md.
"""

from collections.abc import Iterator
from typing import IO, Any, NamedTuple

MAX_DEPTH = 16  # of structures in structures; parquet's own reach 6
HEADER_BYTES = 1 << 14  # read at first; most headers of pages have less than a hundred
MAX_HEADER_BYTES = 16 << 20  # parquet's limit

_BOOLEANS, _BYTE, _INTEGERS, _DOUBLE, _BINARY, _LISTS, _MAP, _STRUCT = (1, 2), 3, (4, 5, 6), 7, 8, (9, 10), 11, 12


class Page(NamedTuple):
    """Sizes of a page.

    Attributes:
        num_bytes: Number of bytes once decompressed.
        in_file: Number of bytes in the file.
    """

    num_bytes: int
    in_file: int


def pages_of(file: IO[bytes], file_bytes: int, column: Any) -> Iterator[Page]:
    """Sizes of the pages of a column within a row group, its dictionary's included; up to a damaged one.

    Args:
        file: The parquet file; its position is moved.
        file_bytes: Size of the file.
        column: pyarrow's ColumnChunkMetaData.
    """
    at = column.data_page_offset
    if column.has_dictionary_page and 0 < column.dictionary_page_offset < at:
        at = column.dictionary_page_offset
    end = min(at + column.total_compressed_size, file_bytes)
    while 0 <= at < end:
        header, header_bytes = _page_header(file, at)
        num_bytes, in_file = header.get(2, -1), header.get(3, -1)
        if num_bytes < 0 or in_file < 0:
            return
        at += header_bytes
        yield Page(num_bytes, min(in_file, file_bytes - at))
        at += in_file


def count_structures(data: bytes, max_structures: int) -> int:
    """Number of structures within a structure; each takes hundreds of bytes in memory, but two in a file.

    Raises:
        ValueError: more than `max_structures`, or no structure of Thrift's.
    """
    reader = _Reader(data, max_structures)
    try:
        reader.read_structure(0)
    except IndexError:
        raise ValueError("metadata that end early") from None
    return reader.num_structures


def _page_header(file: IO[bytes], at: int) -> tuple[dict[int, int], int]:
    """The integers of a page's header by field, and its length; nothing if it cannot be read."""
    for num_bytes in (HEADER_BYTES, MAX_HEADER_BYTES):
        file.seek(at)
        reader = _Reader(file.read(num_bytes), MAX_HEADER_BYTES)
        try:
            return reader.read_structure(0), reader.at
        except IndexError:
            continue
        except ValueError:
            break
    return {}, 0


class _Reader:
    """Reads past values of Thrift's compact protocol.

    Attributes:
        at: Position in the data.
        num_structures: Number of structures met.
    """

    def __init__(self, data: bytes, max_structures: int) -> None:
        self.at = self.num_structures = 0
        self._data, self._max_structures = data, max_structures

    def read_structure(self, depth: int) -> dict[int, int]:
        """Read past a structure; returns its integers by field.

        Raises:
            IndexError: the data end before.
            ValueError: not a structure, or one that is too deep.
        """
        self.num_structures += 1
        if self.num_structures > self._max_structures:
            raise ValueError(f"metadata of more than {self._max_structures:,} structures; write several files")
        if depth > MAX_DEPTH:
            raise ValueError("metadata that are nested too deeply")
        integers: dict[int, int] = {}
        field = 0
        while head := self._byte():
            kind, step = head & 15, head >> 4
            field = field + step if step else self._integer()
            if kind in _INTEGERS:
                integers[field] = self._integer()
            elif kind not in _BOOLEANS:  # which are a part of their head
                self._skip(kind, depth)
        return integers

    def _skip(self, kind: int, depth: int) -> None:
        if kind in _INTEGERS:
            self._integer()
        elif kind == _BINARY:
            self.at += self._unsigned()
        elif kind == _STRUCT:
            self.read_structure(depth + 1)
        elif kind in _LISTS:
            head = self._byte()
            size = self._unsigned() if head >> 4 == 15 else head >> 4
            self._skip_all((head & 15,), size, depth)
        elif kind == _MAP:
            size = self._unsigned()
            kinds = self._byte() if size else 0
            self._skip_all((kinds >> 4, kinds & 15), size, depth)
        elif kind == _BYTE or kind in _BOOLEANS:
            self.at += 1
        elif kind == _DOUBLE:
            self.at += 8
        else:
            raise ValueError(f"metadata of an unknown type, {kind}")

    def _skip_all(self, kinds: tuple[int, ...], size: int, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise ValueError("metadata that are nested too deeply")
        for _ in range(size):
            for kind in kinds:
                self._skip(kind, depth + 1)
            if self.at > len(self._data):
                raise IndexError

    def _byte(self) -> int:
        self.at += 1
        return self._data[self.at - 1]

    def _unsigned(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("metadata with a number of more than 64 bits")

    def _integer(self) -> int:
        value = self._unsigned()
        return value >> 1 ^ -(value & 1)
