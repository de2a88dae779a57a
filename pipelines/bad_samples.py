"""What happens to samples that turn out damaged while training: another takes the place, and too many end the run."""

import sys
import threading
from pathlib import Path

import numpy as np

from pipelines.errors import DataError

_MAX_LINES = 20  # on stderr; what comes after is only counted


class BadSamples:
    """The damaged samples that a process has met in one file.

    The next sample of the file that is not known to be bad takes the place, with the same draw: the box moved to its
    size. So the views stay the same whatever the batches, workers and ranks.

    Attributes:
        reasons: By sample id, in the order of discovery.
    """

    def __init__(self, path: Path, num_samples: int, max_fraction: float) -> None:
        """Know no bad ones yet.

        Args:
            path: The file.
            num_samples: Its samples.
            max_fraction: Share of them that may be bad, in [0, 1].
        """
        self.reasons: dict[int, str] = {}
        self._path, self._num_samples, self._max_fraction = path, num_samples, max_fraction
        self._lock = threading.Lock()

    def replace(self, sample_id: int, reason: str) -> int:
        """Count a bad sample; returns the one that takes its place. From any thread.

        Raises:
            DataError: that is one too many.
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
            while substitute in self.reasons:
                substitute = (substitute + 1) % self._num_samples
        if is_new and num_bad <= _MAX_LINES:
            line = f"fastssl: warning: {self._path}: image {sample_id} {reason}; image {substitute} takes its place"
            print(line, file=sys.stderr, flush=True)
        return substitute


class Substitutes:
    """The good samples that take the places of bad ones, where these are known before a batch is made."""

    def __init__(self, bad_samples: BadSamples, sizes: np.ndarray) -> None:
        """Know none yet.

        Args:
            bad_samples: Told of bad ones; says which sample takes a place.
            sizes: Heights and widths of all samples, int32 [N, 2].
        """
        self._bad_samples, self._sizes = bad_samples, sizes
        self._in_place_of: dict[int, int] = {}

    def add(self, reasons: dict[int, str]) -> list[int]:
        """Take up bad samples, by id and why; returns those that take their places, which may be bad themselves.

        Raises:
            DataError: there are too many.
        """
        # From the end: what takes a place is then good already, but where the search began again at the file's start.
        for i in sorted(reasons, reverse=True):
            self._in_place_of[i] = self._bad_samples.replace(i, reasons[i])
        for i, good in self._in_place_of.items():
            while good in self._in_place_of:
                good = self._in_place_of[good]
            self._in_place_of[i] = good
        return sorted({self._in_place_of[i] for i in reasons})

    def put_in(self, ids: np.ndarray, params: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A batch's sample ids [B] and draw [B, V], both of what takes a bad one's place where one is bad."""
        rows = np.flatnonzero(np.isin(ids, list(self._in_place_of)))
        if not len(rows):
            return ids, params
        bad, ids, params = ids, ids.copy(), params.copy()
        for row in rows.tolist():
            ids[row] = self._in_place_of[int(bad[row])]
            boxes = params["crop_box"][row]
            params["crop_box"][row] = move_boxes(boxes, self._sizes[bad[row]], self._sizes[ids[row]])
        return ids, params


def move_boxes(boxes: np.ndarray, from_size: np.ndarray, to_size: np.ndarray) -> np.ndarray:
    """Crop boxes of one image on another: the same share of its height and width, in whole pixels, at least one.

    Args:
        boxes: top, left, height, width, int32 [..., 4].
        from_size: Height and width that they were drawn for, [2].
        to_size: Those of the other image, [2].
    """
    moved = boxes.astype(np.int64) * np.tile(to_size, 2) // np.tile(from_size, 2)
    moved[..., 2:] = np.maximum(moved[..., 2:], 1)
    return moved.astype(boxes.dtype)
