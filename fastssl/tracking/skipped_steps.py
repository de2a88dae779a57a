"""Steps skipped because of a non-finite gradient: counted, logged with their images; too many end the run."""

import json
import math
from pathlib import Path

from torch import Tensor

from fastssl import collectives
from fastssl.errors import DivergedError
from fastssl.machine.files import sync_file
from fastssl.tracking.writers import drop_rows_after


class SkippedSteps:
    """The skipped steps of a run; every rank sees the same ones.

    Attributes:
        in_a_row: Number of consecutive skipped steps so far.
    """

    def __init__(self, path: Path, max_in_a_row: int) -> None:
        """Start with no skipped steps.

        Args:
            path: File with one JSON line per skipped step: step, loss, sample_ids of the global batch.
            max_in_a_row: Maximum number of consecutive skipped steps, >= 0.
        """
        self._path = path
        self._max_in_a_row = max_in_a_row
        self.in_a_row = 0

    def resume(self, step: int) -> None:
        """Resume from the checkpoint of a step: drop the lines after it."""
        if collectives.rank() == 0 and self._path.exists():
            drop_rows_after(self._path, step)

    def note(self, step: int, loss: float, sample_ids: Tensor) -> None:
        """Log a skipped step (all ranks call it).

        Args:
            step: Number of the step, starting at 1.
            loss: Mean over ranks.
            sample_ids: Sample ids of the local batch, int64 [B].

        Raises:
            DivergedError: Too many consecutive skipped steps.
        """
        self.in_a_row += 1
        all_ids = collectives.gather(sample_ids).flatten()
        if collectives.rank() == 0:
            row = {"step": step, "loss": str(loss), "sample_ids": sorted(all_ids.tolist())}
            with self._path.open("a") as file:
                file.write(json.dumps(row) + "\n")
                sync_file(file)
        if self.in_a_row > self._max_in_a_row:
            what = "the gradient is not finite" if math.isfinite(loss) else f"the loss is {loss}"
            raise DivergedError(
                f"{what} at step {step}, {self.in_a_row} steps in a row (train.max_skipped_steps is "
                f"{self._max_in_a_row}; {self._path} lists their images): start a new run from the last checkpoint "
                "(run.init_from) with a lower optim.base_lr or longer optim.warmup_epochs"
            )
