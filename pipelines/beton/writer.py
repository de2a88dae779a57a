"""Writes .beton files that stock FFCV can read, without importing ffcv."""

import fcntl
import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import PIL

from pipelines.beton.format import (
    ALLOCATION,
    FFCV_VERSION,
    FIELD,
    HEADER,
    IMAGE_TYPE,
    INT_TYPE,
    JPG,
    MAX_LABEL,
    MAX_SIDE_PX,
    METADATA,
    PAGE_BYTES,
    RAW,
    SIDECAR_VERSION,
    checkpoint_path,
    hashes_path,
    partial_path,
    sidecar_path,
    summarise,
)
from pipelines.beton.sidecar import MAX_SIDECAR_BYTES
from pipelines.errors import DataError
from pipelines.shards.rows import MAX_IMAGE_BYTES, build_rows, row_crc32, row_head, rows_path

WRITE_BYTES = 1 << 20  # at a time: a call of the system takes longer than the copy of a small image

_VERSIONS = {"sidecar": SIDECAR_VERSION, "numpy": np.__version__, "pillow": PIL.__version__}


class BetonWriter:
    """Writes a .beton file, its sidecar and its rows, one image after the other; a context manager.

    The metadata precede the data, so space is reserved for them, and the unused part is a hole of zeros (readers use
    the header's number of samples). At least PAGE_BYTES are reserved: enough for 349,437 samples without a hint.
    A sample never crosses a page boundary. The page size doubles until a page holds the largest sample. Pages of one
    power of two nest in those of the next, so samples written earlier stay valid.
    The writer keeps 52 bytes per sample in memory and no images. The file appears under its final name only when it
    is complete, after its sidecar and its rows (`pipelines.shards.rows`). A killed process leaves `<name>.partial` and,
    after a checkpoint, `<name>.partial.npz`. Another writer can resume from these and writes the same file as an
    uninterrupted writer.

    Attributes:
        path: The file.
        num_samples: Number of samples written so far.
        note: The caller's note in the checkpoint that this writer resumed from; None: it did not resume.
    """

    def __init__(
        self,
        path: str | Path,
        num_samples_hint: int = 0,
        *,
        class_names: Sequence[str] | None = None,
        source: str = "",
        options: dict[str, Any] | None = None,
        overwrite: bool = False,
        resume: bool = False,
    ) -> None:
        """Set the options; entering the context opens the file.

        Args:
            path: The file to write.
            num_samples_hint: Upper bound on the number of samples.
            class_names: Names by label.
            source: Where the images come from, for the sidecar.
            options: Options of the conversion, for the sidecar; JSON values.
            overwrite: Replace an existing file.
            resume: Resume from the last checkpoint of a killed writer, if there is one. The other arguments must be
                the same.
        """
        self.path = Path(path)
        self.num_samples = 0
        self.note: dict[str, Any] | None = None
        self._about = {"source": source, "class_names": list(class_names) if class_names is not None else None}
        if 4 * len(json.dumps(self._about["class_names"])) > MAX_SIDECAR_BYTES:
            raise DataError(f"{path}: the names of its classes are too long for a sidecar; shorten them")
        self._options = options or {}
        self._overwrite = overwrite
        self._resume = resume
        self._metadata_start = HEADER.itemsize + 2 * FIELD.itemsize
        end = self._metadata_start + num_samples_hint * METADATA.itemsize
        self._data_start = self._position = -(-end // PAGE_BYTES) * PAGE_BYTES
        capacity = (self._data_start - self._metadata_start) // METADATA.itemsize
        self._page_bytes = PAGE_BYTES
        self._metadata = np.zeros(capacity, METADATA)
        self._data_bytes = np.zeros(capacity, np.uint64)
        self._hashes = np.zeros((capacity, 2), "<u8")
        self._crcs = np.zeros(capacity, "<u4")  # see `row_crc32`

    def __enter__(self) -> Self:
        """Open the temporary file.

        Raises:
            DataError: the file exists and `overwrite` is False, its folder does not exist, another process is writing
                it, or there is a checkpoint and both `resume` and `overwrite` are False.
        """
        if self.path.exists() and not self._overwrite:
            raise DataError(f"{self.path}: exists already; choose another name or pass --overwrite")
        if not self.path.parent.is_dir():
            raise DataError(f"{self.path.parent}: no such folder; create it first")
        self._partial = partial_path(self.path)
        self._checkpoint = checkpoint_path(self.path)
        self._new_checkpoint = self.path.with_name(f"{self._checkpoint.name}.new")
        self._file: BinaryIO = os.fdopen(os.open(self._partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b", WRITE_BYTES)
        try:
            self._begin()
        except BaseException:
            self._file.close()
            raise
        return self

    def _begin(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the process ends
        except BlockingIOError:
            raise DataError(f"{self._partial}: another process is writing it") from None
        self._new_checkpoint.unlink(missing_ok=True)  # left by a writer that was killed in `checkpoint`
        if self._checkpoint.exists() and self._resume:
            self._load_checkpoint()
        elif self._checkpoint.exists() and not self._overwrite:
            raise DataError(f"{self._partial}: left by a conversion that did not finish; pass --resume or --overwrite")
        else:
            self._checkpoint.unlink(missing_ok=True)
            self._file.truncate(0)
        self._file.seek(self._position)

    def checkpoint(self, note: dict[str, Any]) -> None:
        """Save the progress, so that a killed conversion can be resumed from here.

        Args:
            note: What the caller needs in order to resume; JSON values.
        """
        self._sync(self._file)
        place = {"num_samples": self.num_samples, "position": self._position, "page_bytes": self._page_bytes}
        about = json.dumps(place | {"data_start": self._data_start, "note": note}).encode()
        try:
            with self._new_checkpoint.open("wb") as file:
                np.savez(
                    file,
                    about=np.frombuffer(about, np.uint8),
                    metadata=self._metadata[: self.num_samples].view(np.uint8),  # plain bytes
                    data_bytes=self._data_bytes[: self.num_samples],
                    hashes=self._hashes[: self.num_samples],
                    crcs=self._crcs[: self.num_samples],
                )
                self._sync(file)
            self._new_checkpoint.replace(self._checkpoint)
        finally:
            self._new_checkpoint.unlink(missing_ok=True)  # there if the disk is full

    def _load_checkpoint(self) -> None:
        try:
            with np.load(self._checkpoint, allow_pickle=False) as found:
                about = json.loads(found["about"].tobytes())
                num, metadata = about["num_samples"], found["metadata"].view(METADATA)
                if about["data_start"] != self._data_start or not len(metadata) == num <= len(self._metadata):
                    raise ValueError("another number of samples")
                self._metadata[:num], self._data_bytes[:num] = metadata, found["data_bytes"]
                if "hashes" in found:  # not in checkpoints of older versions
                    self._hashes[:num] = found["hashes"]
                has_crcs = "crcs" in found  # nor these
                if has_crcs:
                    self._crcs[:num] = found["crcs"]
            self._position, self._page_bytes = about["position"], about["page_bytes"]
            self.num_samples, self.note = num, about["note"]
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{self._checkpoint}: does not fit ({error}); pass --overwrite to start again") from error
        if self._partial.stat().st_size < self._position:
            raise DataError(f"{self._partial}: shorter than at its checkpoint; pass --overwrite to start again")
        self._file.truncate(self._position)
        if not has_crcs:
            self._compute_crcs()

    def _compute_crcs(self) -> None:
        """Checksum the images that are in the file already."""
        metadata, data_bytes = self._metadata[: self.num_samples], self._data_bytes[: self.num_samples]
        images = zip(metadata.tolist(), data_bytes.tolist(), strict=True)
        for i, (((mode, width_px, height_px, ptr), label), num_bytes) in enumerate(images):
            head = row_head(ptr, num_bytes, height_px, width_px, label, is_raw=mode == RAW)
            self._file.seek(ptr)
            self._crcs[i] = row_crc32(head, self._file.read(num_bytes))

    def write_jpeg(
        self, data: bytes, *, height_px: int, width_px: int, label: int = -1, hashes: tuple[int, int] = (0, 0)
    ) -> None:
        """Append one image as the bytes of a JPEG file (8-bit, grey or three components).

        Args:
            data: The bytes.
            height_px: Height.
            width_px: Width.
            label: -1 = none.
            hashes: See `pipelines.convert.hashes.Hashes`; 0 = unknown.
        Raises:
            ValueError: no bytes, a side outside 1..65535 px, or no room left.
        """
        self._write(data, JPG, height_px, width_px, label, hashes)

    def write_raw(self, pixels: np.ndarray, *, label: int = -1, hashes: tuple[int, int] = (0, 0)) -> None:
        """Append one image as its pixels, uint8 RGB [H, W, 3].

        Raises:
            ValueError: another shape or dtype, a side outside 1..65535 px, or no room left.
        """
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise ValueError(f"pixels must be uint8 [H, W, 3], not {pixels.dtype} {list(pixels.shape)}")
        self._write(pixels.tobytes(), RAW, pixels.shape[0], pixels.shape[1], label, hashes)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Finish the file and rename it; after an exception, keep the partial file if there is a checkpoint.

        Raises:
            DataError: no sample was written.
        """
        try:
            with self._file:
                if error is None:
                    self._finish()
                    self._publish()
                    self._checkpoint.unlink(missing_ok=True)
        finally:
            if not self._checkpoint.exists():
                self._partial.unlink(missing_ok=True)

    def _write(
        self, data: bytes, mode: int, height_px: int, width_px: int, label: int, hashes: tuple[int, int]
    ) -> None:
        if not 1 <= min(height_px, width_px) <= max(height_px, width_px) <= MAX_SIDE_PX:
            raise ValueError(f"sides must be 1..{MAX_SIDE_PX} px, not {height_px}x{width_px}")
        if not 1 <= len(data) <= MAX_IMAGE_BYTES:
            raise ValueError(f"an image must take 1..{MAX_IMAGE_BYTES} bytes, not {len(data)}")
        if not -1 <= label <= MAX_LABEL:
            raise ValueError(f"a label must be in -1..{MAX_LABEL}, not {label}")
        if self.num_samples == len(self._metadata):
            raise ValueError(f"room for {self.num_samples} samples only; give a larger num_samples_hint")
        while len(data) > self._page_bytes:
            self._page_bytes *= 2
        if self._position % self._page_bytes + len(data) > self._page_bytes:
            self._position += -self._position % self._page_bytes
            self._file.seek(self._position)
        self._file.write(data)
        self._metadata[self.num_samples] = (mode, width_px, height_px, self._position), label
        self._data_bytes[self.num_samples] = len(data)
        self._hashes[self.num_samples] = hashes
        head = row_head(self._position, len(data), height_px, width_px, label, is_raw=mode == RAW)
        self._crcs[self.num_samples] = row_crc32(head, data)
        self._position += len(data)
        self.num_samples += 1

    def _finish(self) -> None:
        if not self.num_samples:
            raise DataError(f"{self.path}: no images to write; check the source")
        metadata = self._metadata[: self.num_samples]
        table = np.empty(self.num_samples, ALLOCATION)
        table["sample_id"] = np.arange(self.num_samples)
        table["ptr"], table["size"] = metadata["f0"]["data_ptr"], self._data_bytes[: self.num_samples]
        fields = np.zeros(2, FIELD)
        fields["type_id"] = IMAGE_TYPE, INT_TYPE
        fields["name"][:, :5] = np.frombuffer(b"imagelabel", np.uint8).reshape(2, 5)
        header = np.array((FFCV_VERSION, 2, self._page_bytes, self.num_samples, self._position), HEADER)
        self._file.seek(self._position)
        self._file.write(table.tobytes())
        self._file.seek(0)
        self._file.write(header.tobytes() + fields.tobytes() + metadata.tobytes())
        self._file.flush()

    def _publish(self) -> None:
        metadata = self._metadata[: self.num_samples]
        image = metadata["f0"]
        sizes = np.stack([image["height"], image["width"]], axis=1)
        about = self._about | summarise(sizes, image["mode"], metadata["f1"], self._about["class_names"])
        about |= {"versions": _VERSIONS} | {"options": self._options, "file_bytes": self._partial.stat().st_size}
        hashes, rows = self._hashes[: self.num_samples], self._rows().tobytes()
        about |= {"rows_crc32": zlib.crc32(rows), "rows_sha256": hashlib.sha256(rows).hexdigest()}
        with ThreadPoolExecutor(1) as other:
            on_disk = other.submit(os.fsync, self._file.fileno())
            about |= _count_duplicates(hashes)
            on_disk.result()
        sidecar, new_hashes = sidecar_path(self._partial), hashes_path(self._partial)
        new_rows = rows_path(self._partial)
        try:
            new_rows.write_bytes(rows)  # neither this nor the hashes are synced: the sidecar has their checksums
            new_rows.replace(rows_path(self.path))
            if hashes.any():
                with new_hashes.open("wb") as file:
                    file.write(hashes.tobytes())
                new_hashes.replace(hashes_path(self.path))
            else:
                hashes_path(self.path).unlink(missing_ok=True)
            with sidecar.open("wb") as file:
                text = json.dumps(about, indent=2, ensure_ascii=False) + "\n"
                file.write(text.encode(errors="backslashreplace"))  # lone surrogates, as JSON writes them
                self._sync(file)
            sidecar.replace(sidecar_path(self.path))
        finally:
            sidecar.unlink(missing_ok=True)
            new_hashes.unlink(missing_ok=True)
            new_rows.unlink(missing_ok=True)
        self._partial.replace(self.path)
        folder = os.open(self.path.parent, os.O_RDONLY)  # makes the renames survive a power failure as well
        os.fsync(folder)
        os.close(folder)

    def _rows(self) -> np.ndarray:
        """ROW [num_samples]."""
        metadata = self._metadata[: self.num_samples]
        image = metadata["f0"]
        rows = build_rows(
            ptr=image["data_ptr"],
            num_bytes=self._data_bytes[: self.num_samples],
            modes=image["mode"],
            sizes=np.stack([image["height"], image["width"]], axis=1),
            labels=metadata["f1"],
        )
        rows["crc32"] = self._crcs[: self.num_samples]
        return rows

    @staticmethod
    def _sync(file: BinaryIO) -> None:
        file.flush()
        os.fsync(file.fileno())


def _count_duplicates(hashes: np.ndarray) -> dict[str, Any]:
    """The sidecar's entries about hashes; none if no image has any."""
    if not hashes.any():
        return {}
    from pipelines.beton.duplicates import count_duplicates  # imports numba, which a reader does not need

    return {"duplicates": count_duplicates(hashes), "hashes_crc32": zlib.crc32(hashes.tobytes())}
