"""MINC: non-contrastive mutual information, arXiv:2504.16667; the form here is [derived], not quoted from it.

# V views of B samples, T of them seen by the target; D projection; s the scale; u = z/|z| (see `norm`)
# phi = sqrt(s) u of the online network, phi' = sqrt(s) t of the target, another view of the same sample
# Lambda = E[phi' phi'^T], a running average over steps and ranks; sg(x): x without gradient

The spectral contrastive loss (HaoChen et al. 2021) has E_indep[(phi . phi')^2] = E[phi^T Lambda phi]: with target and
Lambda held fixed no two samples meet,

    l = -phi . sg(phi') + 1/2 phi^T sg(Lambda) phi,        -dl/dphi = phi' - Lambda phi,

half of the gradient of the spectral loss of the same value, and a step of power iteration. O(B D^2); ranks exchange one
D x D matrix.

| setting | form                                                                          | -l is at most        |
|---------|-------------------------------------------------------------------------------|----------------------|
| default | l                                                                             | (chi^2 + 1)/2        |
| `gha`   | tril(Lambda) for Lambda (Sanger's rule): single eigenfunctions, in order      | (no bound)           |
| `alpha` | -t_alpha(phi . phi') + 1/2 phi^T Lambda phi - 1/alpha                         | the alpha-divergence |

t_alpha(v) = (|sqrt(alpha/2) v|^(2 (alpha - 1)/alpha) - 1)/(alpha - 1), and log(v^2/2) at alpha = 1, whose divergence is
the mutual information in nats. At alpha = 2 v stands for |v|, and l is without the constant 1/2.

The minimum of l over all functions phi spans the eigenfunctions of the largest eigenvalues of the joint distribution of
two views, each scaled by the root of its eigenvalue [derived]. The rows of this minimum differ in norm in general, so
it is found only if `norm` allows them: rows of one norm ("unit") find it only where sum_k lambda_k f_k(x)^2 = s for
every x. The first eigenfunction is the constant one; a projector that ends with a batch norm cannot represent it.

| `norm` | phi                                                                                 |
|--------|-------------------------------------------------------------------------------------|
| "unit" | sqrt(s) z/|z|                                                                       |
| "clip" | z, shortened to the norm sqrt(s) if it is longer: the spectral loss's with mu = s    |
| "none" | z; s has no effect                                                                  |

With A = tril(Lambda), which is not symmetric, the gradient of phi^T A phi would be a different direction and converge
to a different subspace. Therefore phi . sg(A phi) is differentiated, whose gradient is A phi; the value keeps its 1/2.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fastssl.losses.base import Loss, LossConfig
from fastssl.losses.moments import MovingMoment, second_moment
from fastssl.losses.pairwise import stack_views
from fastssl.losses.view_pairs import ordered_pairs, unit_rows
from kernels.similarity.rows import widen
from pipelines.config_field import setting


@dataclass(frozen=True, kw_only=True)
class MincConfig(LossConfig):
    """Settings of `Minc`.

    Attributes:
        name: Selects this loss.
        scale: s, the squared norm of phi ("unit"), or its maximum ("clip"); 10 [second-hand].
        norm: How the rows are normalised, see the module.
        moment_momentum: beta of Lambda's average, in [0, 1); .8 [second-hand].
        target_momentum: Initial momentum of the target network, increased to 1 on a cosine; .996 [second-hand].
        gha: Use the lower triangle of Lambda (generalized Hebbian algorithm), which gives ordered eigenfunctions; only
            with alpha = 2.
        alpha: Order of the alpha-divergence, >= 1 [derived]; 2 is MINC.
        alpha_floor: For alpha != 2, |v| is clamped from below to this value, > 0, which bounds the slope of t_alpha.
    """

    takes_width: ClassVar[bool] = True
    has_moments: ClassVar[bool] = True
    needs_mean: ClassVar[bool] = True
    name: Literal["minc"] = "minc"
    scale: float = setting(10.0, "[1e-6, 1e6]")
    norm: Literal["unit", "clip", "none"] = "unit"
    moment_momentum: float = setting(0.8, "[0, 1)")
    target_momentum: float = setting(0.996, "[0, 1]")
    gha: bool = False
    alpha: float = setting(2.0, "[1, 100]")
    alpha_floor: float = setting(0.1, "[1e-12, 1e6]")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gha and self.alpha != 2:
            raise ValueError(f"loss.gha needs loss.alpha=2, got {self.alpha}")


class Minc(Loss[MincConfig]):
    """Mean of l over all ordered pairs of different views.

    Attributes:
        moment: Lambda/s, the moving average of the second moment of the target's rows t = phi'/sqrt(s).
    """

    configs = (MincConfig,)

    def __init__(self, config: MincConfig | None = None, *, projector_dim: int, **settings: Any) -> None:
        super().__init__(config, **settings)
        config = self.config
        self.moment = MovingMoment(projector_dim, config.moment_momentum)

    def forward(self, *z: Tensor, targets: Sequence[Tensor]) -> Tensor:
        """The loss of this rank's rows, normalised as `norm` says; see `Loss`.

        The targets and Lambda are constants in its gradient. In training mode Lambda is updated with the batch after it
        was used.
        """
        rows, s = stack_views(*z), self.config.scale
        with torch.autocast(rows.device.type, enabled=False):
            u, t = self._normalised(rows), self._normalised(torch.stack(list(targets)).detach())
            batch_moment = second_moment(t)
            moment = self.moment.corrected(batch_moment)
            if self.training:
                self.moment.update(batch_moment)
            repulsion = s * s * (self._gha_form(u, moment) if self.config.gha else (u * (u @ moment)).sum(-1) / 2)
            terms = [
                (repulsion[v] - self._attraction(s * (u[v] * t[w]).sum(-1))).mean()
                for v, w in ordered_pairs(len(u), len(t))
            ]
            return torch.stack(terms).mean()

    def _normalised(self, z: Tensor) -> Tensor:
        """phi/sqrt(s) of the rows z, fp32 (fp64 for fp64 rows)."""
        if self.config.norm == "unit":
            return unit_rows(z)
        longest, wide = math.sqrt(self.config.scale), widen(z)
        if self.config.norm == "none":
            return wide / longest
        return wide / torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp_min(longest)

    @staticmethod
    def _gha_form(u: Tensor, moment: Tensor) -> Tensor:
        """[V, B]: its value is u^T A u/2 with A = tril(moment), its gradient A u."""
        surrogate = (u * (u @ moment.tril().T).detach()).sum(-1)
        return surrogate - surrogate.detach() / 2

    def _attraction(self, v: Tensor) -> Tensor:
        """t_alpha(v) + 1/alpha, and v itself for alpha = 2."""
        alpha = self.config.alpha
        if alpha == 2:
            return v
        size = v.abs()
        size = size + (size.clamp_min(self.config.alpha_floor) - size).detach()  # below the floor: its slope
        if alpha == 1:
            return (size.square() / 2).log() + 1
        return ((math.sqrt(alpha / 2) * size) ** (2 * (alpha - 1) / alpha) - 1) / (alpha - 1) + 1 / alpha

    def bound_nats(self, value: float) -> float | None:
        """Lower bound in nats on the mutual information of two views for alpha = 1, provided that Lambda is current."""
        return -value if self.config.alpha == 1 else None
