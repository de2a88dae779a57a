"""A linear classifier trained by SGD on features of plain views, with a sweep over learning rate and weight decay."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fastssl.evaluation.cost import Sizes, linear_search
from fastssl.evaluation.linear_heads import sweep
from fastssl.evaluation.task import Outcome, Task
from pipelines.sampler import epoch_order


def linear(task: Task) -> dict[str, Outcome]:
    """See `sweep`; each image has a single, plain view. Which candidates are trained for how long: eval.search."""

    features = torch.from_numpy(task.train_x).to(task.device)  # no copy on the CPU

    def batches(positions: np.ndarray, seed: int, epoch: int) -> tuple[int, Iterator[tuple[Tensor, np.ndarray]]]:
        # Batches of nearly equal size: no image is dropped, and there is no noisy step on a small last batch.
        order = epoch_order(positions, seed, epoch)
        pieces = np.array_split(order, -(-len(order) // task.cfg.sgd_batch_size))
        return len(pieces), ((features[torch.from_numpy(rows).to(task.device)], rows) for rows in pieces)

    search = linear_search(task.cfg, Sizes.of_task(task))
    return {"linear": sweep(task, batches, task.cfg.linear_epochs, name="linear", search=search)}
