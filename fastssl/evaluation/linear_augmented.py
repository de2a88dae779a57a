"""The papers' linear evaluation: frozen encoder, random crops and flips, SGD with a cosine schedule."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fastssl.evaluation.features import eval_mode
from fastssl.evaluation.linear_heads import sweep
from fastssl.evaluation.task import Outcome, Task


def linear_augmented(task: Task) -> dict[str, Outcome]:
    """See `sweep`; each epoch encodes every training image in a new random view.

    All candidates are trained for all epochs, since the encoding is what takes time.

    The protocol of Chen et al. 2020 (SimCLR), arXiv:2002.05709, except that all candidates are trained on the same
    encodings, and features are standardised with the statistics of the training part's plain views.
    """
    images = task.images
    assert images is not None

    def batches(positions: np.ndarray, seed: int, epoch: int) -> tuple[int, Iterator[tuple[Tensor, np.ndarray]]]:
        num_batches, found = images.augmented(positions, seed, epoch)
        return num_batches, ((encode(view), rows) for view, rows in found if len(rows))

    def encode(view: Tensor) -> Tensor:
        with torch.inference_mode():
            return images.encoder(view).float()

    with eval_mode(images.encoder):
        return {"linear_augmented": sweep(task, batches, task.cfg.augmented_epochs, name="linear_augmented")}
