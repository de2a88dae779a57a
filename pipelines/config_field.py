"""What is said of single fields of a configuration."""

from dataclasses import field
from typing import Any


def free(default: Any) -> Any:
    """A field in which a resumed run may differ from the run that it goes on with.

    It changes no event of the training: the images, the order, the views and the sizes of steps stay. Where it changes
    how numbers are computed (a device, a ZeRO stage, parts of a batch, a compiler), last bits may differ, and random
    numbers that the model itself draws, such as dropout's.
    """
    return field(default=default, metadata={"free": True})
