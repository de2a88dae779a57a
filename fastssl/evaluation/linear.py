"""A linear classifier by SGD on features of plain views, with a sweep over learning rate and weight decay."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fastssl.evaluation.linear_heads import sweep
from fastssl.evaluation.task import Outcome, Task
from pipelines.sampler import epoch_order


def linear(task: Task) -> dict[str, Outcome]:
    """See `sweep`; each image has one view, the plain one."""

    features = torch.from_numpy(task.train_x).to(task.device)  # on the CPU no copy is made

    def batches(positions: np.ndarray, seed: int, epoch: int) -> tuple[int, Iterator[tuple[Tensor, np.ndarray]]]:
        # Batches of nearly one size: no image is left out, and no small last batch is a noisy step.
        order = epoch_order(positions, seed, epoch)
        pieces = np.array_split(order, -(-len(order) // task.cfg.sgd_batch_size))
        return len(pieces), ((features[torch.from_numpy(rows).to(task.device)], rows) for rows in pieces)

    return {"linear": sweep(task, batches, task.cfg.linear_epochs)}
