"""The manifest of a data set of many shards: which files there are, what they hold, and the identity of the whole."""

# S shards

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any, NoReturn

import numpy as np

from pipelines.beton.format import ALLOCATION, JPG, MAX_LABEL, MAX_SIDE_PX, RAW
from pipelines.beton.identity import Identity
from pipelines.beton.sidecar import MAX_CLASSES
from pipelines.errors import DataError
from pipelines.path_names import why_no_path

MANIFEST_NAME = "dataset.json"
MANIFEST_VERSION = 1
MAX_MANIFEST_BYTES = 64 << 20  # the names of the classes take at most half of it
MAX_SHARDS = 99_999
MAX_SUM = 1 << 62  # of images or bytes: sums and products with small numbers stay within an int64
MAX_ETAG_CHARS = 1024
# Parsing needs up to 64 bytes for each list, dictionary or value, and these may take 2 bytes in the file. A manifest of
# MAX_SHARDS shards and MAX_CLASSES classes, whose names have three commas and one bracket each, is within the limits.
_MAX_COUNTS = {b"{": 1 << 21, b"[": 1 << 21, b",": 1 << 23}
_KEYS = {"version", "digest", "class_names", "label_counts", "shards"}


@dataclass(frozen=True)
class Shard:
    """One .beton file of a data set.

    Attributes:
        name: The file's name relative to the manifest, with `/` between folders; see `why_no_name`.
        num_images: Number of images, >= 1.
        num_bytes: Size of the file.
        image_bytes: Sum of the stored images' bytes.
        num_raw: Number of images stored as raw pixels.
        rows_sha256: Checksum of its rows file, in hex; the rows hold a checksum of each image.
        etag: The object store's version of the file; None: a local file.
        one_size_px: (height, width), if all images have one size.
    """

    name: str
    num_images: int
    num_bytes: int
    image_bytes: int
    num_raw: int
    rows_sha256: str
    etag: str | None = None
    one_size_px: tuple[int, int] | None = None


@dataclass(frozen=True)
class Manifest:
    """A data set: its images are those of the shards, one shard after the other.

    Attributes:
        shards: At least one; the names differ.
        class_names: Names by label, of all shards; None: unknown.
        label_counts: Number of images by label; images without a label do not count.
    """

    shards: tuple[Shard, ...]
    class_names: list[str] | None
    label_counts: list[int]

    @cached_property
    def num_images(self) -> int:
        """Number of images of all shards, N."""
        return sum(shard.num_images for shard in self.shards)

    @cached_property
    def image_bytes(self) -> int:
        """Sum of the stored images' bytes."""
        return sum(shard.image_bytes for shard in self.shards)

    @cached_property
    def num_bytes(self) -> int:
        """Size of all files."""
        return sum(shard.num_bytes for shard in self.shards)

    @cached_property
    def starts(self) -> np.ndarray:
        """int64 [S + 1], index of each shard's first image among all; the last is N."""
        return np.cumsum([0] + [shard.num_images for shard in self.shards], dtype=np.int64)

    @property
    def modes(self) -> tuple[int, ...]:
        """The modes that occur: `JPG`, `RAW` or both."""
        num_raw = sum(shard.num_raw for shard in self.shards)
        return (JPG,) * (num_raw < self.num_images) + (RAW,) * (num_raw > 0)

    @property
    def one_size_px(self) -> tuple[int, int] | None:
        """(height, width), if all images have one size."""
        sizes = {shard.one_size_px for shard in self.shards}
        return sizes.pop() if len(sizes) == 1 else None

    @cached_property
    def digest(self) -> str:
        """sha256 in hex of the class names and of each shard's number of images, size and rows.

        Names of files and versions of objects are left out: a copy elsewhere is the same data set.
        """
        shards = [[shard.num_images, shard.num_bytes, shard.rows_sha256] for shard in self.shards]
        return hashlib.sha256(json.dumps([self.class_names, shards]).encode()).hexdigest()

    @property
    def identity(self) -> Identity:
        """Number of images, number of bytes, and 64 bits of `digest`, for resumed trainings; see `identity_of`."""
        return [self.num_images, self.num_bytes, int(self.digest[:8], 16), int(self.digest[8:16], 16)]

    @classmethod
    def from_json(cls, text: bytes, where: str) -> "Manifest":
        """Parse a manifest.

        Args:
            text: UTF-8 JSON, at most `MAX_MANIFEST_BYTES`.
            where: Its path or URL, for messages.
        Raises:
            DataError: not a manifest, of another version, beyond a limit, or contradicting itself.
        """
        return _Parser(where).manifest(text)

    def to_json(self) -> bytes:
        """The manifest as UTF-8 JSON: the same bytes for the same data set, with a line for each shard."""
        head = {
            "version": MANIFEST_VERSION,
            "digest": self.digest,
            "class_names": self.class_names,
            "label_counts": self.label_counts,
        }
        lines = [f"{json.dumps(key)}: {_to_json(value)}," for key, value in head.items()]
        shards = ",\n".join(_to_json(asdict(shard)) for shard in self.shards)
        text = "\n".join(["{", *lines, f'"shards": [\n{shards}\n]', "}\n"])
        return text.encode(errors="backslashreplace")  # lone surrogates, as JSON writes them


def why_no_name(name: str) -> str | None:
    """Why a shard cannot have this name, in words; None: it can.

    Names are relative, lead nowhere else (no `..`, no `/` at the start) and end in `.beton`.
    """
    if {"", ".", ".."} & set(name.split("/")):
        return "it leads outside the data set"
    if not name.endswith(".beton"):
        return "it does not end in .beton"
    return why_no_path(name)


def _to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


class _Parser:
    """Checks each part of a manifest; whatever is wrong is one line."""

    def __init__(self, where: str) -> None:
        self._where = where

    def manifest(self, text: bytes) -> Manifest:
        """See `Manifest.from_json`."""
        found = self._load(text)
        if not isinstance(found, dict):
            self._fail("it is no JSON object")
        if found.get("version") != MANIFEST_VERSION or type(found.get("version")) is not int:
            self._fail(f"its version is {_shown(found.get('version'))}, and this fastssl reads {MANIFEST_VERSION}")
        self._check_keys(found, _KEYS, "it")
        manifest = Manifest(
            shards=self._shards(found["shards"]),
            class_names=self._class_names(found["class_names"]),
            label_counts=self._label_counts(found["label_counts"]),
        )
        for what, total in (
            ("images", manifest.num_images),
            ("bytes", manifest.num_bytes),
            ("bytes of images", manifest.image_bytes),
        ):
            if total > MAX_SUM:
                self._fail(f"its shards have {total} {what} together; at most 2**62 are read")
        if sum(manifest.label_counts) > manifest.num_images:
            self._fail("it counts more labels than images")
        if found["digest"] != manifest.digest:
            self._fail("its digest is not that of its entries: it was edited, or is damaged")
        return manifest

    def _load(self, text: bytes) -> Any:
        if len(text) > MAX_MANIFEST_BYTES:
            self._fail(f"{len(text):,} bytes; at most {MAX_MANIFEST_BYTES:,} are read")
        if any(text.count(char) > most for char, most in _MAX_COUNTS.items()):
            self._fail("it has more entries than any data set has")
        try:
            return json.loads(text.decode(), object_pairs_hook=_without_twins, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            self._fail("it is no JSON text")

    def _shards(self, found: Any) -> tuple[Shard, ...]:
        if not isinstance(found, list) or not 1 <= len(found) <= MAX_SHARDS:
            self._fail(f"its shards must be a list of 1 to {MAX_SHARDS:,}")
        shards = tuple(self._shard(entry, k) for k, entry in enumerate(found))
        met: set[str] = set()
        for shard in shards:
            if shard.name in met:
                self._fail(f"it lists {shard.name} twice")
            met.add(shard.name)
        return shards

    def _shard(self, entry: Any, k: int) -> Shard:
        if not isinstance(entry, dict):
            self._fail(f"its shard {k} is no JSON object")
        self._check_keys(entry, _SHARD_KEYS, f"its shard {k}")
        for key, (is_good, what) in _SHARD_RULES.items():
            if not is_good(entry[key]):
                self._fail(f"{key} of its shard {k} must be {what}, not {_shown(entry[key])}")
        if reason := why_no_name(entry["name"]):
            self._fail(f"its shard {k} has the name {_shown(entry['name'])}: {reason}")
        shard = Shard(**entry)
        if shard.one_size_px is not None:
            shard = replace(shard, one_size_px=tuple(shard.one_size_px))
        if shard.num_raw > shard.num_images or shard.num_images * ALLOCATION.itemsize > shard.num_bytes:
            self._fail(f"the numbers of its shard {k} contradict each other")
        return shard

    def _class_names(self, found: Any) -> list[str] | None:
        if found is not None and not (_is_list(found, MAX_CLASSES) and all(isinstance(name, str) for name in found)):
            self._fail(f"its class_names must be null or a list of at most {MAX_CLASSES:,} texts")
        return found

    def _label_counts(self, found: Any) -> list[int]:
        is_good = _is_number(0)
        if not (_is_list(found, MAX_LABEL + 1) and all(map(is_good, found))):
            self._fail(f"its label_counts must be a list of at most {MAX_LABEL + 1:,} numbers, 0 or more")
        return found

    def _check_keys(self, found: dict[str, Any], known: set[str], what: str) -> None:
        if missing := sorted(known - found.keys()):
            self._fail(f"{what} lacks {', '.join(missing)}")
        if unknown := sorted(found.keys() - known):
            self._fail(f"{what} has an unknown key, {_shown(unknown[0])}")

    def _fail(self, reason: str) -> NoReturn:
        raise DataError(f"{self._where}: not a manifest ({reason}); write it again with `fastssl manifest`") from None


def _is_list(found: Any, most: int) -> bool:
    return isinstance(found, list) and len(found) <= most


def _is_number(least: int) -> Callable[[Any], bool]:
    return lambda found: type(found) is int and least <= found <= MAX_SUM


def _is_hex(found: Any) -> bool:
    return isinstance(found, str) and re.fullmatch("[0-9a-f]{64}", found) is not None


def _is_etag(found: Any) -> bool:
    return found is None or (isinstance(found, str) and found.isprintable() and 0 < len(found) <= MAX_ETAG_CHARS)


def _is_size(found: Any) -> bool:
    is_pair = isinstance(found, list) and len(found) == 2
    return found is None or (is_pair and all(type(side) is int and 1 <= side <= MAX_SIDE_PX for side in found))


# Whether an entry of a shard is as it must be, and what that is.
_SHARD_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "name": (lambda found: isinstance(found, str), "a text"),
    "num_images": (_is_number(1), "a number from 1 on"),
    "num_bytes": (_is_number(1), "a number from 1 on"),
    "image_bytes": (_is_number(1), "a number from 1 on"),
    "num_raw": (_is_number(0), "a number from 0 on"),
    "rows_sha256": (_is_hex, "64 digits of 0-9a-f"),
    "etag": (_is_etag, "null or a short text"),
    "one_size_px": (_is_size, "null or height and width in px"),
}
_SHARD_KEYS = {field.name for field in fields(Shard)}


def _without_twins(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)  # NaN and Infinity are not JSON


def _shown(value: Any) -> str:
    """A value from outside as a short text, whatever it is."""
    return f"{value!r:.80}" if isinstance(value, str | int | float | None) else type(value).__name__
