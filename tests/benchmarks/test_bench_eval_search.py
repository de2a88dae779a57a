"""The short searches of `linear` and `logistic` are as good as the whole ones, on three data sets."""

import os
from pathlib import Path

import pytest

from benchmarks.bench_eval_search import Arrays, characters, cifar_convolutions, cifar_pixels, compare, digits


def check(arrays: Arrays) -> None:
    """The accuracy of the short search is that of the whole one, within the standard error."""
    for row in compare("x", arrays):
        assert float(row["halving_percent"]) >= float(row["full_percent"]) - float(row["standard_error"]), row  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
def test_digits() -> None:
    check(digits())


@pytest.mark.slow
def test_a_hundred_classes_of_few_images() -> None:
    check(characters())


@pytest.mark.slow
@pytest.mark.parametrize("load", [cifar_pixels, cifar_convolutions])
@pytest.mark.skipif("FASTSSL_TEST_DATA" not in os.environ, reason="FASTSSL_TEST_DATA names no folder with cifar10/")
def test_cifar10(load) -> None:
    check(load(Path(os.environ["FASTSSL_TEST_DATA"]) / "cifar10"))
