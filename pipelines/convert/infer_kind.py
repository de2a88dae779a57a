"""Infers the kind of a source from what is there."""

import os
from glob import glob
from pathlib import Path

from pipelines.convert.content import has_image_extension
from pipelines.convert.remote_source import find_objects, open_source, shown_url
from pipelines.convert.sources import BRACE_RANGE, PARQUET_SUFFIXES, TAR_SUFFIXES, SourceKind, expand_braces
from pipelines.errors import DataError
from pipelines.files import open_regular
from pipelines.remote import is_url

_SUFFIXES: tuple[tuple[tuple[str, ...], SourceKind], ...] = (
    ((".csv",), "csv"),
    ((".npz",), "npz"),
    (PARQUET_SUFFIXES, "parquet"),
    (TAR_SUFFIXES, "webdataset"),
)
_TAR_MAGIC_AT = 257
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ")
_NAMES = "a name of torchvision's, such as CIFAR10, needs --from torchvision"


def infer_kind(src: str | os.PathLike[str] | None) -> SourceKind:
    """The kind of a source: a folder of images, a table (.csv), tar archives, parquet files or arrays (.npz).

    A folder is "webdataset" or "parquet" if it holds such files and no images, else "folder". The extension of a file
    or pattern decides; a file with another one is opened. Data sets with a name, "torchvision" and "digits", cannot be
    inferred.

    Args:
        src: The folder, file or file pattern, or its URL: only of tar archives or parquet files.
    Raises:
        DataError: nothing is there, it is a .beton file already, it is of no known kind, or it could be read in more
            than one way; the line names the choice.
    """
    if src is None:
        raise DataError("--from is missing: without SRC there is only --from digits")
    text = os.fspath(src)
    if is_url(text):
        return _kind_of_url(text)
    if os.path.isdir(text):
        return _kind_of_folder(text)
    kind: SourceKind | None = next((kind for suffixes, kind in _SUFFIXES if text.lower().endswith(suffixes)), None)
    if os.path.exists(text):
        return kind if kind and not _is_beton(text) else _kind_of_file(text)
    if kind and BRACE_RANGE.search(text):
        return kind
    if found := sorted(glob(text)):
        return kind or infer_kind(found[0])
    raise DataError(f"{text}: no such file or folder; {_NAMES}")


def _kind_of_url(url: str) -> SourceKind:
    suffixes = TAR_SUFFIXES + PARQUET_SUFFIXES
    path = shown_url(url).lower()
    for kind, own in (("webdataset", TAR_SUFFIXES), ("parquet", PARQUET_SUFFIXES)):
        if path.endswith(own):
            return kind  # pyright: ignore[reportReturnType]
    found, _ = find_objects(url, suffixes, expand_braces)
    kinds = {"parquet" if one.path.lower().endswith(PARQUET_SUFFIXES) else "webdataset" for one in found}
    if len(kinds) > 1:
        raise DataError(f"{shown_url(url)}: holds tar archives and parquet files; choose --from webdataset or parquet")
    if found[0].path.lower().endswith(suffixes):
        return "webdataset" if "webdataset" in kinds else "parquet"
    with open_source(found[0], is_sparse=True) as file:
        return _kind_of_head(file.read(512), str(found[0]))


def _kind_of_folder(folder: str) -> SourceKind:
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror})") from error
    has_tars, has_tables = (
        any(name.endswith(suffixes) and not name.startswith(".") for name in names)
        for suffixes in (TAR_SUFFIXES, PARQUET_SUFFIXES)
    )
    if not has_tars and not has_tables:
        return "folder"
    held = {"images": _holds_images(folder), "tar archives": has_tars, "parquet files": has_tables}
    if sum(held.values()) > 1:
        what = " and ".join(name for name, is_there in held.items() if is_there)
        choice = " or ".join(
            f"--from {kind}"
            for kind, is_there in zip(("folder", "webdataset", "parquet"), held.values(), strict=True)
            if is_there
        )
        raise DataError(f"{folder}: holds {what}; choose {choice}")
    return "webdataset" if has_tars else "parquet"


def _holds_images(folder: str) -> bool:
    """Whether there is a file with the extension of an image in the folder or below it; links are not followed."""
    return any(
        has_image_extension(name) and not name.startswith(".") for _, _, names in os.walk(folder) for name in names
    )


def _kind_of_file(path: str) -> SourceKind:
    try:
        with open_regular(path) as file:
            head = file.read(512)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    return _kind_of_head(head, path)


def _kind_of_head(head: bytes, path: str) -> SourceKind:
    """By the first bytes of a file without a telling extension."""
    if _is_beton(path):
        raise DataError(f"{path}: is a .beton file already; there is nothing to convert")
    if head[:4] == b"PAR1":
        return "parquet"
    if head[_TAR_MAGIC_AT : _TAR_MAGIC_AT + 5] == b"ustar" or head.startswith(_COMPRESSED):
        return "webdataset"
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return "npz"
    if has_image_extension(path):
        raise DataError(f"{path}: is one file; give the folder that it lies in")
    raise DataError(f"{path}: not a source of images (a folder, or a .csv, .tar, .parquet or .npz file)")


def _is_beton(path: str) -> bool:
    return Path(path).suffix.lower() == ".beton"
