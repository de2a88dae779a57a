"""The spectrum of a symmetric matrix given only matrix-vector products: Lanczos, and quadrature with Ritz values.

# P rows of the matrix H, m iterations; T [m, m] tridiagonal, T = Q^T H Q, Q [P, m] orthonormal, from the start q_1
# theta_j, s_j the eigenpairs of T: Ritz values; tau_j = s_1j^2 their weights

    H (Q s_j) - theta_j (Q s_j) = beta_m s_mj q_{m+1}            the residual of a Ritz pair
    q_1^T f(H) q_1 ~ sum_j tau_j f(theta_j)                      Gauss quadrature, exact for powers up to 2 m - 1

Golub and Welsch 1969; for Hessians of networks Ghorbani et al. 2019, arXiv:1901.10159, and Yao et al. 2020 (PyHessian),
arXiv:1912.07145. With random signs as q_1 times sqrt(P) the mean over starts of q_1^T f(H) q_1 is tr f(H)/P
(Hutchinson 1990).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

WIDTH = 1e-5**0.5  # std of a Ritz value's normal curve / range of the spectrum; PyHessian has a variance of 1e-5
NUM_POINTS = 2048  # grid points of a density: six per width
# Threshold for an exhausted space, in units of the dtype's epsilon times the largest number so far. Rounding leaves 1
# to 16 there (six random matrices of rank 3, fp32 and fp64); this may differ on another CPU.
_EXHAUSTED = 100


@dataclass(frozen=True, kw_only=True)
class Krylov:
    """The result of Lanczos from one start vector.

    Attributes:
        values: Ritz values theta, ascending, float64 [m].
        weights: tau, float64 [m], with sum 1.
        residuals: |beta_m s_mj|, the norms of the residuals, float64 [m]: an eigenvalue lies within this distance of
            each Ritz value.
        first_moment: q_1^T H q_1.
        basis: Q^T [m, P], with the start's dtype and device; None if it was not kept.
        vectors: s, float64 [m, m], one column per Ritz value.
    """

    values: np.ndarray
    weights: np.ndarray
    residuals: np.ndarray
    first_moment: float
    basis: Tensor | None
    vectors: np.ndarray

    def ritz_vector(self, index: int) -> Tensor:
        """The Ritz vector Q s_j, with norm 1: [P]."""
        assert self.basis is not None
        return torch.from_numpy(self.vectors[:, index]).to(self.basis) @ self.basis


def lanczos(
    product: Callable[[Tensor], Tensor], start: Tensor, num_iterations: int, *, keep_basis: bool = False
) -> Krylov:
    """Lanczos with full re-orthogonalisation: each new vector is made orthogonal to all before it, twice.

    It ends early if the Krylov space is exhausted; then its Ritz values are eigenvalues.

    Args:
        product: v [P] -> H v [P], H symmetric.
        start: [P], any length > 0, fp32 or fp64.
        num_iterations: m, >= 1; at most P iterations are run.
        keep_basis: Whether to keep the basis, which `Krylov.ritz_vector` needs.
    """
    num_iterations = min(num_iterations, len(start))
    basis = start.new_empty(num_iterations, len(start))
    basis[0] = start / start.norm()
    alphas: list[float] = []
    betas: list[float] = []
    for i in range(num_iterations):
        w = product(basis[i])
        alphas.append(float(w.double() @ basis[i].double()))
        for _ in range(2):  # a single pass leaves cancellation errors
            w = w - (basis[: i + 1] @ w) @ basis[: i + 1]
        betas.append(float(w.norm()))
        largest = max(map(abs, [*alphas, *betas]))
        if i + 1 == num_iterations or betas[-1] <= _EXHAUSTED * torch.finfo(start.dtype).eps * largest:
            break
        basis[i + 1] = w / w.norm()
    *inner, last = betas
    values, vectors = np.linalg.eigh(np.diag(alphas) + np.diag(inner, 1) + np.diag(inner, -1))
    return Krylov(
        values=values,
        weights=vectors[0] ** 2,
        residuals=np.abs(last * vectors[-1]),
        first_moment=alphas[0],
        basis=basis[: len(alphas)] if keep_basis else None,
        vectors=vectors,
    )


def random_signs(size: int, seed: int, number: int, like: Tensor) -> Tensor:
    """Start vector `number` of a seed: +-1 with equal probability, [size], with the dtype and device of `like`."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    return (2.0 * torch.randint(2, (size,), generator=generator) - 1).to(like)


@dataclass(frozen=True, kw_only=True)
class Density:
    """The density of a spectrum, a sum of normal curves at the Ritz values.

    Attributes:
        eigenvalues: Grid of eigenvalues, float64 [NUM_POINTS].
        density: Density of eigenvalues on the grid, with integral 1, float64 [NUM_POINTS].
        width: Standard deviation of the curves.
    """

    eigenvalues: np.ndarray
    density: np.ndarray
    width: float


def spectral_density(krylovs: Sequence[Krylov]) -> Density:
    """The mean over starts of sum_j tau_j N(theta_j, width^2)."""
    low, high = min(k.values[0] for k in krylovs), max(k.values[-1] for k in krylovs)
    width = WIDTH * (high - low) or 1e-12  # 1e-12 if all eigenvalues are equal
    grid = np.linspace(low - 5 * width, high + 5 * width, NUM_POINTS)
    density = sum((k.weights * np.exp(-0.5 * ((grid[:, None] - k.values) / width) ** 2)).sum(1) for k in krylovs) / (
        len(krylovs) * width * np.sqrt(2 * np.pi)
    )
    return Density(eigenvalues=grid, density=np.asarray(density), width=float(width))


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean of independent estimates and its standard error; None as the error of a single estimate."""
    error = None if len(values) < 2 else float(np.std(values, ddof=1) / np.sqrt(len(values)))
    return float(np.mean(values)), error
