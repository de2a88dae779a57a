"""The range of the exponentials: numbers that are refused, and the shift that keeps sums within fp32."""

import math

import pytest
import torch

from kernels.similarity.exponent import (
    MAX_EXP_INV_TEMPERATURE,
    check_inv_temperature,
    exp_shift,
    is_narrow,
    log_of_sum,
    scalar,
)


@pytest.mark.parametrize("t", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("of_exp", [False, True])
def test_numbers_that_are_no_temperature_are_refused(t: float, of_exp: bool) -> None:
    with pytest.raises(ValueError, match="inv_temperature must be finite and > 0"):
        check_inv_temperature(t, of_exp=of_exp)


def test_the_largest_number_is_that_of_temperature_one_sixtieth() -> None:
    check_inv_temperature(60.0, of_exp=True)
    check_inv_temperature(61.0, of_exp=False)
    check_inv_temperature(torch.tensor(100.0), of_exp=True)  # tensors are not looked at
    with pytest.raises(ValueError, match=r"inv_temperature must be <= 60 for exp, got 60\.1"):
        check_inv_temperature(60.1, of_exp=True)


@pytest.mark.parametrize("t", [0.5, 10.0, MAX_EXP_INV_TEMPERATURE])
def test_shifted_terms_are_normal_numbers_and_their_sums_finite(t: float) -> None:
    shift = exp_shift(torch.tensor(t))
    least, largest = (torch.exp(t * torch.tensor(s) + shift) for s in (-1.0, 1.0))
    assert least >= torch.finfo(torch.float32).tiny
    assert (largest * 1e7).isfinite()


def test_the_shift_has_no_gradient() -> None:
    assert not exp_shift(torch.tensor(3.0, requires_grad=True)).requires_grad


def test_narrow_exponentials_fit_fp16() -> None:
    assert is_narrow(9.0)
    for logit in (-9.0, 9.0):
        assert torch.finfo(torch.float16).smallest_normal <= math.exp(logit) <= torch.finfo(torch.float16).max
    assert not is_narrow(9.1)
    assert not is_narrow(torch.tensor(1.0))  # its value is not looked at


def test_log_of_a_sum_that_vanished_is_finite_with_a_finite_gradient() -> None:
    sums = torch.tensor([0.0, 1.0], requires_grad=True)
    logs = log_of_sum(sums)
    logs.sum().backward()
    assert logs.isfinite().all()
    assert logs[1] == 0
    assert sums.grad is not None
    assert sums.grad.tolist() == [0.0, 1.0]


def test_scalars_take_the_dtype_of_the_sums_and_keep_their_graph() -> None:
    learned = torch.tensor([2.0], requires_grad=True)
    for dtype, expected in ((torch.float16, torch.float32), (torch.float64, torch.float64)):
        z = torch.zeros(1, dtype=dtype)
        assert scalar(0.5, z).dtype == scalar(learned, z).dtype == expected
        assert scalar(learned, z).shape == ()
    (3 * scalar(learned, torch.zeros(1, dtype=torch.float64))).backward()
    assert learned.grad is not None
    assert learned.grad.item() == 3
