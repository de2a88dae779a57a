"""From the content of a weights.pt to a model: the one place where its tensors are put into modules."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fastssl.errors import ConfigError
from pipelines.errors import one_line


def put_weights(
    weights: Mapping[str, Any], path: str | Path, *, backbone: nn.Module, projector: nn.Module | None = None
) -> None:
    """Load the backbone, and the projector if one is given, strictly.

    Args:
        weights: From `fastssl.checkpoint.save_load.load_weights`.
        path: Where they were read, for the message.
        backbone: The module that gets the backbone's weights.
        projector: The module that gets the projector's.

    Raises:
        ConfigError: Names or shapes are those of another model.
    """
    try:
        backbone.load_state_dict(weights["backbone"])
        if projector is not None and weights["projector"]:  # weights of another program have none
            projector.load_state_dict(weights["projector"])
    except RuntimeError as error:
        raise other_model(weights, path, one_line(error)) from None


def other_model(weights: Mapping[str, Any], path: str | Path, reason: str) -> ConfigError:
    """The error for weights that do not fit a model.

    Args:
        weights: From `fastssl.checkpoint.save_load.load_weights`.
        path: Where they were read.
        reason: What differs.
    """
    name = weights.get("backbone_class") or weights["model"].get("backbone", "an unknown backbone")
    return ConfigError(f"{path} holds weights of another model ({name!s:.100}) than this one: {reason[:200]}")
