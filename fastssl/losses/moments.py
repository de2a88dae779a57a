"""Second moments (D x D) of projections over the global batch, and their running average; no pairs of samples.

# V views of B samples on this rank, N samples over all ranks, D projection
"""

import torch
from torch import Tensor, nn

from fastssl import collectives
from kernels.similarity.rows import widen

MAX_WIDTH = 16384  # 1 GiB of fp32 for one D x D moment


def check_moment_width(width: int, loss_name: str) -> None:
    """Refuse a D whose D x D moment would not fit in memory; the ValueError names `model.projector_dim`."""
    if width > MAX_WIDTH:
        raise ValueError(
            f"model.projector_dim: {width} is too wide for loss {loss_name}, which keeps moments of {width} x {width}, "
            f"{4 * width**2 / 1e9:.1f} GB each; at most {MAX_WIDTH} is supported"
        )


def center(z: Tensor) -> Tensor:
    """z [V, B, D] minus each view's mean over the global batch, in fp32 (fp64 for fp64 rows).

    With several ranks the mean has no gradient: to first order, sums of products of centred rows do not depend on it,
    so the gradient of `covariances` of these rows is still exact. To second order they do depend on it; with a single
    process, the only case in which Hessians are computed, the mean keeps its gradient.
    """
    wide = widen(z)
    mean = wide.mean(1, keepdim=True)
    return wide - (collectives.all_mean_(mean.detach()) if collectives.world_size() > 1 else mean)


def covariances(x: Tensor, y: Tensor) -> Tensor:
    """Mean of x_i y_i^T over the global batch, [V, D, D], for centred x and y [V, B, D]; divided by N, not N - 1.

    The result is the same on every rank, and so is a loss computed from it: see `fastssl.collectives.global_mean` for
    the gradient.
    """
    return collectives.EXCHANGE.mean(x.mT @ y / x.shape[1])


class MovingMoment(nn.Module):
    """The exponential moving average of E[u u^T] over the rows of each step's global batch, kept in fp32.

    In bf16 small updates would be rounded away, see `fastssl.models.ema.Ema`.

    Attributes:
        average: beta * average + (1 - beta) * moment of the batch, starting at 0; [D, D].
        weight: 1 - beta^(number of updates), the sum of the average's weights; shape [1], as DeepSpeed cannot broadcast
            0-dim tensors.
    """

    average: Tensor
    weight: Tensor

    def __init__(self, width: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("average", torch.zeros(width, width))
        self.register_buffer("weight", torch.zeros(1))

    @torch.no_grad()
    def corrected(self, batch_moment: Tensor) -> Tensor:
        """The average with bias correction for its start at 0 (Kingma and Ba 2015, arXiv:1412.6980, section 3).

        Before the first update, where the correction is 0/0, this is the batch's own moment.
        """
        has_seen = self.weight > 0
        average = self.average / torch.where(has_seen, self.weight, 1.0)
        return torch.where(has_seen, average.to(batch_moment), batch_moment)

    @torch.no_grad()
    def update(self, batch_moment: Tensor) -> None:
        """Add the moment of one step's batch to the average."""
        self.average.lerp_(batch_moment.to(self.average), 1 - self.momentum)
        self.weight.lerp_(torch.ones_like(self.weight), 1 - self.momentum)


def variances(x: Tensor) -> Tensor:
    """The diagonals of `covariances(x, x)`, [V, D]."""
    return collectives.EXCHANGE.mean(x.square().mean(1))


def second_moment(u: Tensor) -> Tensor:
    """Mean of u_i u_i^T over all rows [V, B, D] of the global batch, [D, D], with the gradient of `global_mean`."""
    rows = u.flatten(0, 1)
    return collectives.EXCHANGE.mean(rows.T @ rows / len(rows))
