"""Unit rows and the way back: torch's normalize and its gradient, also of rows of no length."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.similarity.rows import finish, normalize, view_pairs
from tests.helpers.pairs import random_rows

ONE = torch.ones((), dtype=torch.float64)


def test_view_pairs_are_in_lexical_order() -> None:
    assert view_pairs(3) == [(0, 1), (0, 2), (1, 2)]


@pytest.mark.parametrize("num_views", [1, 2, 3])
def test_normalize(num_views: int) -> None:
    z = random_rows(num_views, 5, 4)
    rows, u = normalize(z, ONE), F.normalize(z, dim=2)
    torch.testing.assert_close(rows.u, u, rtol=1e-14, atol=0)
    torch.testing.assert_close(rows.inv_norm, 1 / z.norm(dim=2), rtol=1e-14, atol=0)
    expected = [float(u[v, i] @ u[w, i]) for v, w in view_pairs(num_views) for i in range(5)]
    assert rows.positives.shape == (len(view_pairs(num_views)), 5)
    assert rows.positives.flatten().tolist() == pytest.approx(expected, rel=1e-13)


def test_finish_is_the_gradient_through_the_normalisation() -> None:
    """Of pull_scale <u, pulls> + <positives, their gradients>, with pulls as constants."""
    z = random_rows(3, 5, 4).requires_grad_()
    generator = torch.Generator().manual_seed(3)
    pulls = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64)
    grads = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    scale = torch.tensor(0.7, dtype=torch.float64)
    u = F.normalize(z, dim=2)
    value = scale * (u * pulls).sum()
    value = value + sum((grads[p] * (u[v] * u[w]).sum(1)).sum() for p, (v, w) in enumerate(view_pairs(3)))
    (expected,) = torch.autograd.grad(value, z)
    inv_norm = normalize(z.detach(), ONE).inv_norm
    dz, dots = finish(z.detach(), inv_norm, pulls, scale, grads)
    torch.testing.assert_close(dz, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(dots, (u.detach() * pulls).sum(2), rtol=1e-13, atol=1e-13)


def test_rows_of_no_length_are_treated_as_torch_does() -> None:
    z = random_rows(2, 4, 3)
    z[0, 1] = 0
    leaf = z.clone().requires_grad_()
    u: Tensor = F.normalize(leaf, dim=2)
    grads = torch.ones(1, 4, dtype=torch.float64)
    (expected,) = torch.autograd.grad((u[0] * u[1]).sum(), leaf)
    rows = normalize(z, ONE)
    assert rows.u[0, 1].tolist() == [0, 0, 0]
    torch.testing.assert_close(finish(z, rows.inv_norm, torch.zeros_like(z), ONE, grads)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_low_precision_is_widened_and_the_gradient_narrowed(dtype: torch.dtype) -> None:
    z = random_rows(2, 4, 3).to(dtype)
    rows = normalize(z, ONE)
    assert rows.u.dtype == rows.inv_norm.dtype == rows.positives.dtype == torch.float32
    torch.testing.assert_close(rows.u, F.normalize(z.float(), dim=2))
    dz, _ = finish(z, rows.inv_norm, torch.zeros(2, 4, 3), torch.ones(()), torch.ones(1, 4))
    assert dz.dtype == dtype


def test_autocast_does_not_reach_them() -> None:
    z = random_rows(2, 4, 16).float()
    pulls, grads, one = random_rows(2, 4, 16, seed=1).float(), torch.ones(1, 4), torch.ones(())
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            rows = normalize(z, one)
            found.append((*rows, *finish(z, rows.inv_norm, pulls, one, grads)))
    for plain, autocast in zip(*found, strict=True):
        assert torch.equal(plain, autocast)
