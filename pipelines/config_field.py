"""Metadata of single configuration fields."""

from dataclasses import field
from typing import Any


def free(default: Any) -> Any:
    """A field whose value may change when a run is resumed.

    Changing it does not change the course of the training: the images, their order, the views and the step sizes stay
    the same. If it changes how numbers are computed (a device, a ZeRO stage, parts of a batch, a compiler), the last
    bits of results may differ, and so may random numbers drawn by the model itself, such as those of dropout.
    """
    return field(default=default, metadata={"free": True})
