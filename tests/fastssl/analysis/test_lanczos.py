"""Lanczos and its quadrature on matrices whose eigenvalues are known."""

import numpy as np
import pytest
import torch
from torch import Tensor

from fastssl.analysis.lanczos import lanczos, mean_and_error, random_signs, spectral_density

SIZE = 40


def symmetric(eigenvalues: np.ndarray, seed: int = 0) -> Tensor:
    """A matrix with these eigenvalues and random eigenvectors, fp64."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), generator=generator).double())
    return basis * torch.from_numpy(eigenvalues) @ basis.T


SPREAD = np.concatenate([np.linspace(-0.3, 0.1, SIZE - 3), [0.5, 0.8, 1.0]])


def krylov_of(matrix: Tensor, num_iterations: int, seed: int = 0):
    start = random_signs(len(matrix), seed, 0, matrix)
    return start, lanczos(lambda v: matrix @ v, start, num_iterations, keep_basis=True)


def test_all_iterations_find_every_eigenvalue() -> None:
    _, found = krylov_of(symmetric(SPREAD), SIZE)
    np.testing.assert_allclose(found.values, SPREAD, atol=1e-12)
    assert found.basis is not None
    torch.testing.assert_close(found.basis @ found.basis.T, torch.eye(SIZE).double(), rtol=0, atol=1e-13)


def test_the_quadrature_is_exact_for_powers_below_twice_the_iterations() -> None:
    matrix, num_iterations = symmetric(SPREAD), 6
    start, found = krylov_of(matrix, num_iterations)
    q = power = start / start.norm()
    for k in range(2 * num_iterations):
        np.testing.assert_allclose(found.weights @ found.values**k, float(q @ power), atol=1e-14)
        power = matrix @ power
    assert abs(found.weights @ found.values ** (2 * num_iterations) - float(q @ power)) > 1e-8
    assert found.first_moment == pytest.approx(float(q @ (matrix @ q)), abs=1e-14)


def test_residuals_are_those_of_the_ritz_vectors_and_bound_the_error() -> None:
    matrix = symmetric(SPREAD)
    _, found = krylov_of(matrix, 12)
    for index, (value, residual) in enumerate(zip(found.values, found.residuals, strict=True)):
        vector = found.ritz_vector(index)
        assert float((matrix @ vector - value * vector).norm()) == pytest.approx(residual, abs=1e-14)
        assert np.abs(SPREAD - value).min() <= residual + 1e-14
    assert found.residuals[-1] < 1e-4 < found.residuals[0]  # the outlier has converged, the bulk has not


def test_it_ends_where_the_krylov_space_does() -> None:
    low_rank = np.zeros(SIZE)
    low_rank[:3] = 1.0, 2.0, -3.0
    for dtype, atol in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
        _, found = krylov_of(symmetric(low_rank).to(dtype), 20)
        assert len(found.values) == 4
        np.testing.assert_allclose(found.values, [-3, 0, 1, 2], atol=atol)


def test_fp32_keeps_the_basis_orthonormal() -> None:
    """Without re-orthogonalisation it is lost as soon as the first Ritz value converges (Paige 1971)."""
    steep = np.concatenate([np.linspace(0, 1e-3, 197), [1.0, 10.0, 100.0]])
    _, found = krylov_of(symmetric(steep).float(), 60)
    assert found.basis is not None
    torch.testing.assert_close(found.basis @ found.basis.T, torch.eye(len(found.basis)), rtol=0, atol=1e-6)
    np.testing.assert_allclose(found.values[-3:], [1, 10, 100], rtol=2e-5)


def test_the_density_has_integral_one_and_the_means_of_the_ritz_values() -> None:
    matrix = symmetric(SPREAD)
    krylovs = [lanczos(lambda v: matrix @ v, random_signs(SIZE, 0, number, matrix), 8) for number in range(3)]
    found = spectral_density(krylovs)
    step = found.eigenvalues[1] - found.eigenvalues[0]
    assert found.density.sum() * step == pytest.approx(1, abs=1e-5)
    mean = np.mean([krylov.weights @ krylov.values for krylov in krylovs])
    assert (found.density @ found.eigenvalues) * step == pytest.approx(mean, abs=1e-5)
    assert found.eigenvalues[found.density > found.density.max() / 1e6].min() >= -0.3 - 6 * found.width


def test_a_standard_error_needs_two_estimates() -> None:
    assert mean_and_error([3.0]) == (3.0, None)
    mean, error = mean_and_error([1.0, 3.0])
    assert (mean, error) == (2.0, pytest.approx(1.0))


def test_starts_are_signs_and_differ() -> None:
    like = torch.empty(0, dtype=torch.float64)
    first, second = random_signs(1000, 0, 0, like), random_signs(1000, 0, 1, like)
    assert torch.equal(first.abs(), torch.ones(1000).double())
    assert torch.equal(first, random_signs(1000, 0, 0, like))
    assert abs(float(first.mean())) < 5 / 1000**0.5
    assert abs(float((first * second).mean())) < 5 / 1000**0.5
