"""The interface of a loss, as the trainer uses it. docs/adding_a_loss.md walks through an example."""

# B local batch, D projection, V views, T <= V views that a target network sees

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor, nn

from pipelines.config_field import Section


@dataclass(frozen=True, kw_only=True)
class LossConfig(Section):
    """Settings of a loss: the `loss:` section of a configuration.

    A subclass is a frozen, keyword-only dataclass whose `name` is a Literal with a default; `setting` declares the
    interval of each number (`pipelines.config_field`).

    Attributes:
        name: Selects the loss in a configuration.
        max_views: Maximum number of views that the loss accepts, >= 2.
        takes_width: Whether the loss's constructor needs the width of the projections, D.
        has_moments: Whether the loss stores a D x D matrix, which limits D.
        needs_mean: Whether the mean of the projections carries information for the loss, which a batch norm at the end
            of the projector removes.
    """

    name: str
    max_views: ClassVar[float] = math.inf
    takes_width: ClassVar[bool] = False
    has_moments: ClassVar[bool] = False
    needs_mean: ClassVar[bool] = False


ConfigT = TypeVar("ConfigT", bound=LossConfig)


class Loss(nn.Module, Generic[ConfigT]):
    """Maps the projections of each view to a scalar whose mean over ranks is the loss of the global batch.

    A subclass has `forward(self, *z, targets=...)`. z are V projections [B, D] of one floating dtype, row i of every
    view from the same image; `targets`, T tensors [B, D] without gradient, are passed where `target_momentum` is not
    None. It returns a 0-dim tensor, fp32 (fp64 for fp64 inputs). It raises a ValueError if shapes or dtypes differ, or
    the global batch has fewer than two samples. Its parameters are trained with the model; its buffers are saved with
    it.

    Attributes:
        configs: The configurations that select this loss, the default one first.
        config: Its settings.
    """

    configs: ClassVar[tuple[type[LossConfig], ...]] = ()
    config: ConfigT

    def __init__(self, config: ConfigT | None = None, **settings: Any) -> None:
        """Create the loss from a configuration, or from settings passed to the default configuration.

        Raises:
            TypeError: Both are given, or a setting is unknown.
            ValueError: A setting has an invalid value.
        """
        super().__init__()
        if config is not None and settings:
            raise TypeError(f"{type(self).__name__} takes a config or settings, not both")
        self.config = self.configs[0](**settings) if config is None else config  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def target_momentum(self) -> float | None:
        """Initial momentum of the target network's moving average, a setting; None: the loss needs no target."""
        return getattr(self.config, "target_momentum", None)

    def bound_nats(self, value: float) -> float | None:
        """Lower bound in nats on the mutual information of two views implied by a mean loss; None: no bound."""
        del value
        return None


class ModuleLoss(Loss[LossConfig]):
    """Wraps any module as a loss: it is called with the projections of each view [B, D] and returns a scalar."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(LossConfig(name=type(module).__name__))
        self.module = module

    def forward(self, *z: Tensor) -> Tensor:
        """Call the module on z."""
        return self.module(*z)
