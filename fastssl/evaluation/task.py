"""Input and output of a protocol. The input contains no test labels, so that no choice can depend on them."""

# N training images, M test images, F features, C classes, R = min(5, C)

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastssl.evaluation.config import EvalConfig
from pipelines.progress import Progress
from pipelines.sampler import split_holdout

if TYPE_CHECKING:
    from fastssl.evaluation.images import Images

VALIDATION_FRACTION = 0.1
NUM_RANKED = 5


@dataclass(frozen=True, kw_only=True)
class Task:
    """One encoder and one data set.

    Attributes:
        cfg: The eval section.
        train_x: Features of the training part's plain views, float32 [N, F].
        train_y: Labels int64 [N] in [0, C).
        test_x: Features [M, F].
        num_classes: C.
        images: The images of the features; None if there are only features.
        device: Device on which classifiers are trained by SGD.
        encoder: Name of the encoder, for lines on the progress.
    """

    cfg: EvalConfig
    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    num_classes: int
    images: Images | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    encoder: str = ""

    def progress(self, what: str, num_images: int) -> Progress:
        """Progress of a protocol on stderr: the table is on stdout.

        Args:
            what: What is counted, such as the protocol's name.
            num_images: Number of images, each counted once for each classifier that learns from it or scores it.
        """
        return Progress(f"{self.encoder}: {what}".removeprefix(": "), num_images, file=sys.stderr, leave=False)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A protocol's result.

    Attributes:
        ranked: For each repetition, the R most likely classes of each test image, int64 [M, R], most likely first.
        chosen: The settings, including those chosen on the validation part; JSON values.
        repeated_over: What differs between the repetitions.
    """

    ranked: list[np.ndarray]
    chosen: dict[str, Any]
    repeated_over: str = "nothing"


def split_validation(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions for fitting and for validation, int64: a fixed, stratified tenth of the training part is held out.

    Args:
        labels: Labels of the training part, int64 [N].

    Raises:
        ValueError: fewer than 10 images, or fewer than two classes.
    """
    if len(labels) < 10:
        raise ValueError(f"choosing the settings needs at least 10 labelled training images, not {len(labels)}")
    if len(np.unique(labels)) < 2:
        raise ValueError("a classifier needs training images of at least two classes, not one")
    return split_holdout(len(labels), VALIDATION_FRACTION, labels)


def rank_classes(scores: np.ndarray) -> np.ndarray:
    """The R classes with the highest scores, int64 [M, R]; ties go to the lower class number.

    Args:
        scores: [M, C].
    """
    return np.argsort(-scores, axis=1, kind="stable")[:, :NUM_RANKED]
