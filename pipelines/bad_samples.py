"""Handling of samples found damaged during training: each is replaced by another, and too many end the run."""

import sys
import threading
from pathlib import Path

import numpy as np

from pipelines.errors import DataError
from pipelines.printable import printable
from pipelines.samples import ImageSet, Samples

_MAX_LINES = 20  # printed to stderr; later ones are only counted


class BadSamples:
    """The damaged samples that a process has found in one file.

    A bad sample is replaced by the next sample of the file, and this one, if it is bad too, by the next after it. The
    replacement uses the same draw, with the crop box rescaled to its size. A sample may be bad for some crop boxes
    only, so which samples were found bad before has no influence. The views therefore do not depend on batches, workers
    or ranks.

    Attributes:
        reasons: Why each sample is bad, by sample id, in the order of discovery.
    """

    def __init__(self, path: Path | str, num_samples: int, max_fraction: float) -> None:
        """Start with no bad samples.

        Args:
            path: The file, or the data set of several.
            num_samples: Number of its samples.
            max_fraction: Fraction of the samples that may be bad, in [0, 1].
        """
        self.reasons: dict[int, str] = {}
        self._path, self._num_samples, self._max_fraction = path, num_samples, max_fraction
        self._lock = threading.Lock()

    def replace(self, sample_id: int, reason: str) -> int:
        """Record a bad sample and return the id of its replacement, which may be bad itself. Thread-safe.

        Raises:
            DataError: too many samples are bad.
        """
        with self._lock:
            is_new = sample_id not in self.reasons
            self.reasons[sample_id] = reason
            num_bad = len(self.reasons)
            if num_bad > self._max_fraction * self._num_samples or num_bad == self._num_samples:
                raise DataError(
                    f"{self._path}: image {sample_id} {reason}; so {num_bad} of {self._num_samples} are bad, more than "
                    f"data.max_bad_fraction={self._max_fraction:g} allows: convert again (`fastssl verify` finds all)"
                )
        substitute = (sample_id + 1) % self._num_samples
        if is_new and num_bad <= _MAX_LINES:
            line = f"fastssl: warning: {self._path}: image {sample_id} {reason}; image {substitute} takes its place"
            print(printable(line), file=sys.stderr, flush=True)
        return substitute


class Substitutes:
    """Replacements of bad samples, for engines that find the bad samples before a batch is made."""

    def __init__(self, bad_samples: BadSamples, images: ImageSet) -> None:
        """Start with no replacements.

        Args:
            bad_samples: Records the bad samples and chooses their replacements.
            images: The data set.
        """
        self._bad_samples, self._images = bad_samples, images
        self._in_place_of: dict[int, int] = {}

    def add(self, reasons: dict[int, str]) -> list[int]:
        """Add bad samples (id -> reason) and return the ids of their replacements, which may be bad themselves.

        Raises:
            DataError: too many samples are bad.
        """
        for i in sorted(reasons):
            self._in_place_of[i] = self._bad_samples.replace(i, reasons[i])
        for i, good in self._in_place_of.items():
            while good in self._in_place_of:
                good = self._in_place_of[good]
            self._in_place_of[i] = good
        return sorted({self._in_place_of[i] for i in reasons})

    def put_in(self, samples: Samples, params: np.ndarray) -> tuple[Samples, np.ndarray]:
        """Replace the bad samples of a batch; returns its samples [B] and draw [B, V]."""
        rows = np.flatnonzero(np.isin(samples.ids, list(self._in_place_of)))
        if not len(rows):
            return samples, params
        good = self._images.samples(np.array([self._in_place_of[i] for i in samples.ids[rows].tolist()]))
        params = params.copy()
        boxes = params["crop_box"]
        for row, from_size, to_size in zip(rows.tolist(), samples.sizes[rows], good.sizes, strict=True):
            boxes[row] = move_boxes(boxes[row], from_size, to_size)
        return samples.with_rows(rows, good), params


def move_boxes(boxes: np.ndarray, from_size: np.ndarray, to_size: np.ndarray) -> np.ndarray:
    """Rescale crop boxes from one image size to another, in whole pixels, with sides of at least one pixel.

    Args:
        boxes: top, left, height, width, int32 [..., 4].
        from_size: Height and width of the image the boxes were drawn for, [2].
        to_size: Height and width of the other image, [2].
    """
    moved = boxes.astype(np.int64) * np.tile(to_size, 2) // np.tile(from_size, 2)
    moved[..., 2:] = np.maximum(moved[..., 2:], 1)
    return moved.astype(boxes.dtype)
