"""The operators of `kernels` as functions, with the negatives of all ranks; the losses are built from them.

    loss = fastssl.functional.pair_loss(torch.stack([z_a, z_b]), negatives="exp", inv_temperature=5.0)

Each operator exchanges rows over the default process group, if one is initialised. Its mean over ranks is the loss of
the global batch, and averaging parameter gradients over ranks, as DistributedDataParallel does, gives that loss's
gradient.
"""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

from torch import Tensor

from fastssl.collectives import EXCHANGE
from kernels.gram_loss import quadratic_loss as _quadratic_loss
from kernels.gram_loss import spectral_loss as _spectral_loss
from kernels.pair_loss import pair_loss as _pair_loss
from kernels.partition_loss import partition_loss as _partition_loss

__all__ = ["pair_loss", "partition_loss", "quadratic_loss", "spectral_loss"]

P = ParamSpec("P")


def _over_all_ranks(operator: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """The operator with this process group's exchange, unless another one is given."""

    @wraps(operator)
    def call(*args: P.args, **settings: P.kwargs) -> Tensor:
        settings.setdefault("exchange", EXCHANGE)
        return operator(*args, **settings)

    shown = inspect.signature(operator)
    parameters = [x.replace(default=EXCHANGE) if x.name == "exchange" else x for x in shown.parameters.values()]
    call.__signature__ = shown.replace(parameters=parameters)  # pyright: ignore[reportAttributeAccessIssue]
    return call


pair_loss = _over_all_ranks(_pair_loss)
partition_loss = _over_all_ranks(_partition_loss)
quadratic_loss = _over_all_ranks(_quadratic_loss)
spectral_loss = _over_all_ranks(_spectral_loss)
