"""The criterion of tests/helpers/three_way.py for whole losses: the value and the gradients of all learned inputs.

# V views of B samples, D width; t inverse temperature, b bias
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.gram_loss import chunked as gram_chunked
from kernels.gram_loss import quadratic_loss, spectral_loss
from kernels.pair_loss import pair_loss
from kernels.partition_loss import partition_loss
from kernels.similarity import chunked
from tests.helpers import rounded
from tests.helpers.pairs import ROWS
from tests.helpers.three_way import Form, assert_no_further, worst_row_error

LN_2 = math.log(2)
LOSSES: dict[str, Callable[..., Tensor]] = {
    "pair": pair_loss,
    "partition": partition_loss,
    "spectral": spectral_loss,
    "quadratic": quadratic_loss,
}


def exact_shift(n: int) -> float:
    """An inverse temperature whose shift e^{40 - t} is 2^n, so that it does not change the digits of the slopes."""
    return 40 - n * LN_2


@dataclass(frozen=True, kw_only=True)
class LossCase:
    """A loss with its settings, its input rows, and its learned parameters."""

    loss: Literal["pair", "partition", "spectral", "quadratic"]
    settings: dict[str, Any] = field(default_factory=dict)
    learned: dict[str, float] = field(default_factory=dict)  # inv_temperature, bias
    num_views: int = 2
    num_samples: int = 17
    width: int = 24
    rows: str = "clustered"
    groups: bool = False
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        choices = [str(x) if isinstance(x, str) else f"{k}{x:.3g}" for k, x in (self.settings | self.learned).items()]
        shape = f"{self.num_views}x{self.num_samples}x{self.width}"
        kind = [*(["groups"] if self.groups else []), str(self.dtype).removeprefix("torch.")]
        return "-".join([self.loss, *choices, self.rows, shape, *kind])

    def make_z(self, device: str) -> Tensor:
        z = ROWS[self.rows](self.num_views, self.num_samples, self.width)
        return z.to(self.dtype).to(device)

    def compute(self, z: Tensor, learned: dict[str, Tensor], impl: str) -> Tensor:
        groups = {"groups": torch.arange(len(z[0]), device=z.device) % 5} if self.groups else {}
        return LOSSES[self.loss](z, impl=impl, **self.settings, **learned, **groups)


def run_loss(case: LossCase, form: Form, device: str, z: Tensor | None = None) -> dict[str, Tensor]:
    """The value and the gradients: `value` [], `z` [V, B, D], and, if learned, `inv_temperature` [] and `bias` []."""
    dtype = torch.float64 if form == "exact" else torch.float32
    z = case.make_z(device) if z is None else z
    z = (z.double() if form == "exact" else z).detach().requires_grad_()
    # Rounded to fp32 first, like a model's parameters, so that every form uses the same number.
    learned = {name: torch.tensor(x, device=device).to(dtype).requires_grad_() for name, x in case.learned.items()}
    impl = {"fused": "fused", "torch": "chunked", "exact": "reference"}[form]
    with torch_with_rounded_operands() if form == "torch" else contextlib.nullcontext():
        value = case.compute(z, learned, impl)
        grads = torch.autograd.grad(value, [z, *learned.values()])
    return {"value": value.detach()} | dict(zip(["z", *learned], grads, strict=True))


@contextlib.contextmanager
def torch_with_rounded_operands() -> Iterator[None]:
    """Let `chunked` compute with the operands of the fused kernels: fp16, and TF32 in Gram losses."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("normalize", "accumulate"):
            patch.setattr(chunked, name, getattr(rounded, name))
        patch.setattr(gram_chunked, "add_rows", add_rows_of_rounded_operands)
        yield


def add_rows_of_rounded_operands(
    x: Tensor, view: int, own: list[int], first: Tensor, second: Tensor, c1: float, c2: float, pulls: Tensor | None
) -> Tensor:
    """`add_rows` of kernels/gram_loss/chunked.py, with the factors of its product rounded to TF32."""
    rows = x[view]
    product = to_tf32(rows) @ to_tf32(second)
    sums = (rows * (c2 * product + c1 * first)).sum(1)
    pulled = 2 * c2 * product + c1 * first
    for other in (x[w] for w in own):
        s = (rows * other).sum(1)
        sums = sums - (c1 * s + c2 * s.square())
        pulled = pulled - (c1 + 2 * c2 * s)[:, None] * other
    if pulls is not None:
        pulls.copy_(pulled)
    return sums


def to_tf32(x: Tensor) -> Tensor:
    """Round to TF32: fp32 with 10 bits after the leading one."""
    mantissa, exponent = torch.frexp(x.double())
    return torch.ldexp((mantissa * 2**11).round() / 2**11, exponent).float()


def errors(case: LossCase, actual: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """The relative errors of the worst row of dz and of each scalar.

    dL/dt is the difference between a mean similarity of positives and one of negatives. A loss with a linear positive
    term is t times such a difference. If the two parts cancel, the error is relative to the size of the positive part.
    """
    z = case.make_z("cpu").double()
    positive = float(F.cosine_similarity(z[0], z[1]).mean().abs())
    t = {**case.settings, **case.learned}.get("inv_temperature", 1.0)
    is_linear = case.settings.get("positives") == "linear" or case.settings.get("form") in ("dcl", "dclw")
    floors = {"inv_temperature": positive} | ({"value": t * positive} if is_linear else {})

    def error(name: str, x: Tensor) -> float:
        if x.ndim == 3:
            return worst_row_error(x, exact[name])
        return float((x.double() - exact[name]).abs() / exact[name].abs().clamp_min(floors.get(name, 1e-300)))

    return {name: error(name, x) for name, x in actual.items()}


def assert_loss_three_way(case: LossCase, device: str) -> None:
    exact = run_loss(case, "exact", device)
    ours = errors(case, run_loss(case, "fused", device), exact)
    assert_no_further(ours, lambda: errors(case, run_loss(case, "torch", device), exact), str(case))
