"""Engines: each decodes, crops and resizes as drawn by `draw`, and nothing else; all produce the same views."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, get_args

import numpy as np

from pipelines.bad_samples import BadSamples
from pipelines.samples import ImageSet, Samples

if TYPE_CHECKING:
    import torch

    from pipelines.batch import RawBatch

EngineName = Literal["ffcv", "dali", "resident", "torch", "synthetic"]
# (size_px, indices of the views of that size), one per size: `views.size_groups`
Groups = list[tuple[int, list[int]]]


@dataclass(frozen=True)
class BatchPlan:
    """What one batch consists of.

    Attributes:
        samples: Its B samples.
        params: The draw for these samples, structured `kernels.augment.VIEW_PARAMS` [B, V].
    """

    samples: Samples
    params: np.ndarray


class Engine(Protocol):
    """Turns samples into batches of uint8 views. Only one iteration can run: a new one ends the previous one."""

    def batches(
        self, plans: Iterator[BatchPlan], local_batch_size: int, groups: Groups
    ) -> Generator[RawBatch, None, None]:
        """Yield one batch per plan, in the given order.

        A batch's arrays may be overwritten when the next batch is requested or another iteration begins: copy them to
        keep them.
        Closing the generator, or leaving its loop, stops the work.

        Args:
            plans: Taken one by one, as far ahead as the engine works, before it reads the samples; always by one
                thread at a time.
            local_batch_size: B of every plan; the last one may be smaller.
            groups: The views of each output size; together they contain every view of the draw once.
        Raises:
            DataError: a sample cannot be decoded; the message names the file and the sample.
        """
        ...

    def close(self) -> None:
        """Stop the threads. The engine cannot be used afterwards; a second call does nothing."""
        ...


def build_engine(
    name: str,
    images: ImageSet,
    *,
    num_workers: int,
    prefetch_batches: int,
    device: torch.device,
    bad_samples: BadSamples | None = None,
) -> Engine:
    """Build an engine for one data set.

    Args:
        name: One of `EngineName`.
        images: The data set, open.
        num_workers: Decoding threads, >= 1 (ffcv, resident).
        prefetch_batches: Batches made ahead of the consumer, >= 1 (ffcv, resident).
        device: Where the batches go.
        bad_samples: Records samples that cannot be decoded (unused by torch, which raises instead); None: no sample may
            be bad.
    Raises:
        ValueError: unknown name.
        DataError: the engine does not support this data set or device.
    """
    ahead = {"num_workers": num_workers, "prefetch_batches": prefetch_batches}
    bad_samples = bad_samples or BadSamples(images.path, images.num_samples, 0.0)
    if name == "ffcv":
        from pipelines.engines.ffcv import FfcvEngine

        return FfcvEngine(images, **ahead, bad_samples=bad_samples)
    if name == "dali":
        from pipelines.engines.dali import DaliEngine

        return DaliEngine(images, **ahead, device=device, bad_samples=bad_samples)
    if name == "resident":
        from pipelines.engines.resident import ResidentEngine

        return ResidentEngine(images, **ahead, device=device, bad_samples=bad_samples)
    if name == "torch":
        from pipelines.engines.torch import TorchEngine

        return TorchEngine(images)
    if name == "synthetic":
        from pipelines.engines.synthetic import SyntheticEngine

        return SyntheticEngine()
    raise ValueError(f"engine must be one of {', '.join(get_args(EngineName))}, got {name!r}")
