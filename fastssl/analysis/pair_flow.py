"""The gradient of a pairwise loss in closed form: attraction and repulsion coefficients of every pair of projections.

# N samples in two views, rows x_i [2N, D] of view a, then of view b; p(i) the other view of row i; s_ik cosines
# Neg(i) the rows that i is compared with, n = |Neg(i)|: 2N - 2, or N - 1 if only views a and b are compared (cross)

    N dL/dx_i = -alpha_i x_p(i) + (1/n) sum_{k in Neg(i)} beta_ik x_k

alpha attracts the two views of a sample, beta_ik repels two samples (attracts if negative). Both are independent of N,
so that losses can be compared. x = u = z/|z| and dL/dz = (I - u u^T) (dL/du)/|z|; the spectral loss has its own x.

| loss                  | alpha                                 | beta                                     |
|-----------------------|---------------------------------------|------------------------------------------|
| mio `naive`           | (1 - sigma(s_p/tau_p))/tau_p          | sigma(s/tau_n)/tau_n                     |
| mio `softplus`        | 1/tau_p                               | sigma(s/tau_n)/tau_n                     |
| mio `quadratic`       | 1/tau_p                               | (1/2 + s/(4 tau_n))/tau_n                |
| mio `exp`, `jensen`   | 1/tau_p                               | e^{s/tau_n} c/tau_n                      |
| simclr                | (1 - e^{s_p/tau} c/(2N - 2))/tau      | e^{s/tau} c/tau                          |
| dcl; dclw             | 1/tau; w_i/tau                        | e^{s/tau} c/tau                          |
| siglip (cross)        | t sigma(-(t s_p + b))                 | (N - 1) t sigma(t s + b)                 |
| spectral (cross)      | 2/mu                                  | 2 s |x_i| |x_k|/mu                       |

c = (c_i + c_k)/2 with 1/c_i = 1 (`exp`), 1 + the mean of e^{s/tau_n} over all pairs (`jensen`) or over Neg(i) (with
per_anchor), the sum of e^{s/tau} over all k != i (simclr) or over Neg(i) (dcl, dclw), divided by 2N - 2. An
alignment weight adds 2 lambda/D to alpha. All formulas are [derived] here and tested against autograd; with the chain
rule through the network they are the paper's parameter gradient flow: for a last linear layer z = W h,
dL/dW = sum_i (dL/dz_i) h_i^T.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastssl.errors import ConfigError
from fastssl.losses import Dcl, Loss, Mio, NtXent, SigLip, Spectral
from kernels.partition_loss import DCLW_TEMPERATURE

Coefficient = Callable[[Tensor, Tensor], Tensor]


def _mean(x: Tensor, y: Tensor) -> Tensor:
    return (x + y) / 2


@dataclass(frozen=True, kw_only=True)
class PairFlow:
    """The closed form of one loss on one batch.

    Attributes:
        rows: x [2N, D].
        jacobian_scale: The factor of (I - u u^T) in dx/dz [2N]; 0: dx/dz is the identity.
        counted: Whether k is in Neg(i), bool [2N, 2N].
        scales: c_i [2N]; |x_i| for the spectral loss.
        of_pair: (c_i, c_k) -> c of the pair, elementwise.
        attraction: (s, c) -> alpha, elementwise.
        repulsion: (s, c) -> beta, elementwise.
    """

    rows: Tensor
    jacobian_scale: Tensor
    counted: Tensor
    scales: Tensor
    attraction: Coefficient
    repulsion: Coefficient
    of_pair: Coefficient = _mean

    @property
    def similarities(self) -> Tensor:
        """s [2N, 2N]."""
        u = F.normalize(self.rows, dim=1)
        return u @ u.T

    def alpha(self) -> Tensor:
        """alpha of every row [2N]."""
        partner = self._partner
        similarities = self.similarities.gather(1, partner[:, None])[:, 0]
        return self.attraction(similarities, self.of_pair(self.scales, self.scales[partner]))

    def beta(self) -> Tensor:
        """beta of every pair [2N, 2N], 0 for pairs that are not counted."""
        beta = self.repulsion(self.similarities, self.of_pair(self.scales[:, None], self.scales))
        return torch.where(self.counted, beta, 0.0)

    def over_similarity(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and beta at similarities s [n], with c set to the batch's geometric mean: [n] each."""
        typical = self.scales.log().mean().exp()
        scale = self.of_pair(typical, typical).expand_as(s)
        return self.attraction(s, scale), self.repulsion(s, scale)

    def gradient(self) -> Tensor:
        """dL/dz [2, N, D]."""
        num_samples, num_negatives = len(self.rows) // 2, self.counted.sum(1)[:, None]
        dx = self.beta() @ self.rows / num_negatives - self.alpha()[:, None] * self.rows[self._partner]
        u = F.normalize(self.rows, dim=1)
        projected = (dx - u * (u * dx).sum(1, keepdim=True)) * self.jacobian_scale[:, None]
        return (torch.where(self.jacobian_scale[:, None] > 0, projected, dx) / num_samples).unflatten(0, (2, -1))

    @property
    def _partner(self) -> Tensor:
        return torch.arange(len(self.rows), device=self.rows.device).roll(len(self.rows) // 2)


def pair_flow(loss: Loss, z: Tensor) -> PairFlow:
    """The closed form of a loss at projections z.

    Args:
        loss: The loss with its learned parameters, in z's dtype.
        z: [2, N, D], fp32 or fp64; detached inside.

    Raises:
        ConfigError: the loss has no closed form here.
    """
    z = z.detach()
    build = _BUILDERS.get(type(loss))
    if build is None:
        raise ConfigError(
            f"loss.name: {loss.config.name} has no closed-form gradient over pairs; these losses have one: "
            "mio, simclr, dcl, dclw, siglip, spectral"
        )
    with torch.no_grad():
        return build(loss, z)


def _unit_flow(
    z: Tensor, *, attraction: Coefficient, repulsion: Coefficient, scales: Tensor | None = None, cross: bool = False
) -> PairFlow:
    norm = torch.linalg.vector_norm(z.flatten(0, 1), dim=1)
    rows = z.flatten(0, 1) / norm[:, None]
    return PairFlow(
        rows=rows,
        jacobian_scale=1 / norm,
        counted=_counted(z, cross=cross),
        scales=torch.ones_like(norm) if scales is None else scales,
        attraction=attraction,
        repulsion=repulsion,
    )


def _counted(z: Tensor, *, cross: bool) -> Tensor:
    view, sample = torch.arange(2, device=z.device), torch.arange(z.shape[1], device=z.device)
    view, sample = view.repeat_interleave(len(sample)), sample.repeat(2)
    other_sample = sample[:, None] != sample
    return other_sample & (view[:, None] != view) if cross else other_sample


def _means_of_exp(z: Tensor, temperature: float, *, with_positive: bool = False) -> Tensor:
    """Sum of e^{s/tau} over Neg(i), or over all k != i, divided by |Neg(i)|: [2N]."""
    u = F.normalize(z.flatten(0, 1), dim=1)
    counted = _counted(z, cross=False)
    num_negatives = counted.sum(1)
    summed = ~torch.eye(len(u), dtype=torch.bool, device=z.device) if with_positive else counted
    return (torch.exp(u @ u.T / temperature) * summed).sum(1) / num_negatives


def _mio(loss: Mio, z: Tensor) -> PairFlow:
    config = loss.config
    tau_p, tau_n = config.temperature_positive, config.temperature_negative
    aligned = 2 * config.alignment_weight / z.shape[2]
    scales = None
    if config.negative == "jensen":
        means = _means_of_exp(z, tau_n)
        scales = 1 / (1 + (means if config.per_anchor else means.mean().expand_as(means)))

    def attraction(s: Tensor, _: Tensor) -> Tensor:
        share = torch.sigmoid(-s / tau_p) if config.negative == "naive" else torch.ones_like(s)
        return share / tau_p + aligned

    def repulsion(s: Tensor, c: Tensor) -> Tensor:
        if config.negative in ("naive", "softplus"):
            return torch.sigmoid(s / tau_n) / tau_n
        if config.negative == "quadratic":
            return (1 / 2 + s / (4 * tau_n)) / tau_n
        return torch.exp(s / tau_n) * c / tau_n

    return _unit_flow(z, scales=scales, attraction=attraction, repulsion=repulsion)


def _nt_xent(loss: NtXent, z: Tensor) -> PairFlow:
    tau, num_negatives = loss.config.temperature, 2 * z.shape[1] - 2
    return _unit_flow(
        z,
        scales=1 / _means_of_exp(z, tau, with_positive=True),
        attraction=lambda s, c: (1 - torch.exp(s / tau) * c / num_negatives) / tau,
        repulsion=lambda s, c: torch.exp(s / tau) * c / tau,
    )


def _dcl(loss: Dcl, z: Tensor) -> PairFlow:
    tau, positives = loss.config.temperature, F.cosine_similarity(z[0], z[1], dim=1)
    mean = torch.exp(positives / DCLW_TEMPERATURE).mean()

    def attraction(s: Tensor, _: Tensor) -> Tensor:
        weighted = loss.config.name == "dclw"
        return (2 - torch.exp(s / DCLW_TEMPERATURE) / mean if weighted else torch.ones_like(s)) / tau

    return _unit_flow(
        z,
        scales=1 / _means_of_exp(z, tau),
        attraction=attraction,
        repulsion=lambda s, c: torch.exp(s / tau) * c / tau,
    )


def _siglip(loss: SigLip, z: Tensor) -> PairFlow:
    t, b = float(loss.log_inv_temperature.detach().exp()), float(loss.bias.detach())
    num_negatives = z.shape[1] - 1
    return _unit_flow(
        z,
        cross=True,
        attraction=lambda s, _: t * torch.sigmoid(-(t * s + b)),
        repulsion=lambda s, _: num_negatives * t * torch.sigmoid(t * s + b),
    )


def _spectral(loss: Spectral, z: Tensor) -> PairFlow:
    """Rows longer than sqrt(mu) are rescaled to it; shorter rows and their gradients are unchanged."""
    mu, longest = loss.config.mu, math.sqrt(loss.config.mu)
    norm = torch.linalg.vector_norm(z.flatten(0, 1), dim=1)
    rows = z.flatten(0, 1) * (longest / norm.clamp_min(longest))[:, None]
    return PairFlow(
        rows=rows,
        jacobian_scale=torch.where(norm > longest, longest / norm, 0.0),
        counted=_counted(z, cross=True),
        scales=norm.clamp_max(longest),
        of_pair=torch.mul,
        attraction=lambda s, _: torch.full_like(s, 2 / mu),
        repulsion=lambda s, c: 2 * s * c / mu,
    )


_BUILDERS: dict[type, Callable[..., PairFlow]] = {
    Mio: _mio,
    NtXent: _nt_xent,
    Dcl: _dcl,
    SigLip: _siglip,
    Spectral: _spectral,
}
