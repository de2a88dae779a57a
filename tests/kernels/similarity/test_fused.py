"""The fused kernels where there is no GPU: the cases of fused_cases.py in Triton's interpreter."""

import pytest

from tests.helpers.interpreter import run_cases

CASES = "tests/kernels/similarity/fused_cases.py"


def test_cases_in_the_interpreter() -> None:
    run_cases(CASES, "not slow")


@pytest.mark.slow
def test_more_cases_in_the_interpreter() -> None:
    run_cases(CASES, "slow")
