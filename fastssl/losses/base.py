"""The contract of a loss: what the trainer asks of it. docs/adding_a_loss.md walks through an example."""

# B local batch, D projection, V views, T <= V views that a target network sees

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Settings of a loss: a section `loss:` of a configuration.

    A subclass is a frozen, keyword-only dataclass whose `name` is a Literal with a default, and checks its values in
    `__post_init__` (a ValueError that names the dotted key).

    Attributes:
        name: Selects the loss in a configuration.
        max_views: Views that the loss can take, >= 2.
        takes_width: Whether the loss is built with the width of the projections, D.
        has_moments: Whether it holds a D x D matrix, which limits D.
    """

    name: str
    max_views: ClassVar[float] = math.inf
    takes_width: ClassVar[bool] = False
    has_moments: ClassVar[bool] = False


ConfigT = TypeVar("ConfigT", bound=LossConfig)


class Loss(nn.Module, Generic[ConfigT]):
    """Projections of each view to a scalar whose mean over ranks is the loss of the global batch.

    A subclass has `forward(self, *z, targets=...)`: z are V tensors [B, D] of any floating dtype, row i of all views
    from the same image; `targets`, T tensors [B, D] without gradient, are passed where `target_momentum` is not None.
    Its parameters are trained with the model; its buffers are saved with it.

    Attributes:
        configs: The configurations that select this loss, the default one first.
        config: Its settings.
    """

    configs: ClassVar[tuple[type[LossConfig], ...]] = ()
    config: ConfigT

    def __init__(self, config: ConfigT | None = None, **settings: Any) -> None:
        """Take a configuration, or the settings of the default one.

        Raises:
            TypeError: Both are given, or a setting is unknown.
            ValueError: A setting has a value that the loss does not take.
        """
        super().__init__()
        if config is not None and settings:
            raise TypeError(f"{type(self).__name__} takes a config or settings, not both")
        self.config = self.configs[0](**settings) if config is None else config  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def target_momentum(self) -> float | None:
        """Momentum of the target network's moving average at the first step; None: the loss needs no target."""
        return None

    def bound_nats(self, value: float) -> float | None:
        """The lower bound in nats that a mean loss puts on the mutual information of two views; None: it puts none."""
        del value
        return None


class ModuleLoss(Loss[LossConfig]):
    """Any module as a loss: it is called with the projections of each view [B, D] and returns a scalar."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(LossConfig(name=type(module).__name__))
        self.module = module

    def forward(self, *z: Tensor) -> Tensor:
        """What the module makes of z."""
        return self.module(*z)
