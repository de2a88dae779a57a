"""The criterion of the fused kernels: error against fp64 at most torch's, with the same fp16 operands and fp32 sums.

# V views of B samples, D width; Q blocks of columns; m = V B
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.similarity import Implementation, Kind, Side, Term, fused, reference
from tests.helpers import rounded

# Allowed in addition to the errors that both have (rounding of the operands, sums of the tensor cores): fp32 sums in
# another order, and 2^-22 for each special function.
TOLERANCE = 2e-5
ACCUMULATORS = ("sums", "slopes", "pulls")

Form = Literal["fused", "torch", "exact"]
FORMS: dict[Form, tuple[Implementation, torch.dtype]] = {
    "fused": (fused, torch.float32),
    "torch": (rounded, torch.float32),
    "exact": (reference, torch.float64),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A test case. Rows are blocks own .. own + V of the columns, or, if `own` is None, V blocks of other samples.

    e^b is a power of two, so that a kernel that omits it from its slopes still rounds the same digits.
    """

    kind: Kind
    t: float = 5.0
    log2_exp_b: int = 0
    num_views: int = 2
    num_blocks: int = 2
    num_samples: int = 17
    width: int = 48
    own: int | None = 0
    symmetric: bool = False
    clustered: bool = False
    wide_range: bool = True
    weight: float | None = None  # the magnitude of the weights
    groups: bool = False
    wanted: tuple[str, ...] = ACCUMULATORS
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def term(self, dtype: torch.dtype) -> Term:
        t, b = (torch.tensor(x, dtype=dtype, device=self.device) for x in (self.t, self.log2_exp_b * math.log(2)))
        return Term(kind=self.kind, inv_temperature=t, bias=b, wide_range=self.wide_range)


class Inputs(NamedTuple):
    row_z: Tensor
    column_z: Tensor
    row_groups: Tensor
    column_groups: Tensor
    row_weights: Tensor
    column_weights: Tensor


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    shape = (case.num_blocks + (0 if case.own is not None else case.num_views), case.num_samples)
    z = torch.randn(*shape, case.width, generator=generator, dtype=torch.float64)
    if case.clustered:  # eight tight clusters, like trained projections: many similarities are near 1
        centers = F.normalize(torch.randn(8, case.width, generator=generator, dtype=torch.float64), dim=1)
        z = centers[torch.randint(0, 8, shape, generator=generator)] + 0.1 * F.normalize(z, dim=2)
    z = (3 * z).to(case.dtype).to(case.device)
    groups = torch.randint(0, 5, shape, generator=generator).to(case.device)
    weights = torch.rand(*shape, generator=generator).mul(case.weight or 1.0).to(case.device)
    if case.own is None:
        cuts = slice(0, case.num_views), slice(case.num_views, None)
    else:
        cuts = slice(case.own, case.own + case.num_views), slice(None)
    return Inputs(z[cuts[0]], z[cuts[1]], groups[cuts[0]], groups[cuts[1]], weights[cuts[0]], weights[cuts[1]])


def make_sides(case: Case, inputs: Inputs, row_u: Tensor, column_u: Tensor, dtype: torch.dtype) -> tuple[Side, Side]:
    """The two sides with accumulators of zeros; the same object twice if the case is symmetric."""

    def side(u: Tensor, groups: Tensor, weights: Tensor) -> Side:
        shapes = {"sums": u.shape[:2], "slopes": u.shape[:2], "pulls": (*u.shape[:2], case.width)}
        return Side(
            u=u,
            groups=groups if case.groups else None,
            weights=weights.to(dtype) if case.weight is not None else None,
            **{name: torch.zeros(shapes[name], dtype=dtype, device=u.device) for name in case.wanted},
        )

    columns = side(column_u, inputs.column_groups, inputs.column_weights)
    return columns if case.symmetric else side(row_u, inputs.row_groups, inputs.row_weights), columns


def run(form: Form, case: Case, inputs: Inputs) -> tuple[Side, Side]:
    """The two sides with the accumulators of a form; `exact` in fp64, the others in fp32."""
    module, dtype = FORMS[form]
    term = case.term(dtype)
    z = [z.double() if form == "exact" else z for z in (inputs.row_z, inputs.column_z)]
    u = [module.normalize(x, term.inv_temperature).u for x in z]
    sides = make_sides(case, inputs, *u, dtype)
    module.accumulate(*sides, term, case.own)
    return sides


def exact_slope_lengths(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """sum |f'| of the rows and of the columns: the size of the terms of the slopes, which cancel for `square`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "_slope", lambda logits, kind, slope=reference._slope: slope(logits, kind).abs())
        rows, columns = run("exact", case, inputs)
    assert rows.slopes is not None
    assert columns.slopes is not None
    return rows.slopes, columns.slopes


def worst_row_error(actual: Tensor, exact: Tensor, length: Tensor | None = None) -> float:
    """The largest error of a row relative to its length, or to 1 % of the rms length if its sum cancels.

    Args:
        length: The length of each row, for sums that do not show the size of their terms: two computations with the
            same operands differ by the last places of the terms in fp32, which may be any multiple of a sum that
            cancels.
    """
    actual, exact = (x.double().reshape(*x.shape[:2], -1) for x in (actual, exact))
    error = (actual - exact).norm(dim=2)
    length = exact.norm(dim=2) if length is None else length
    floor = 0.01 * length.square().mean().sqrt()
    return float((error / length.maximum(floor).clamp_min(1e-300)).max())


def assert_three_way(case: Case, seed: int = 0) -> None:
    inputs = make_inputs(case, seed)
    exact = run("exact", case, inputs)
    lengths: dict[str, tuple[Tensor, Tensor]] = {}
    if case.kind == "square" and "slopes" in case.wanted:
        lengths["slopes"] = exact_slope_lengths(case, inputs)

    def errors(form: Form) -> dict[str, float]:
        sides = zip(("rows", "columns"), run(form, case, inputs), exact, strict=True)
        return {
            f"{name} of {which}": worst_row_error(
                getattr(side, name), getattr(expected, name), lengths[name][i] if name in lengths else None
            )
            for i, (which, side, expected) in enumerate(sides)
            for name in case.wanted
        }

    assert_no_further(errors("fused"), lambda: errors("torch"), str(case))


def assert_no_further(ours: dict[str, float], torchs: Callable[[], dict[str, float]], what: str) -> None:
    """Assert that our errors are at most those of `rounded`; its ties are examined only if they may decide."""
    allowed = torchs()
    if any(error > allowed[name] + TOLERANCE for name, error in ours.items()):
        allowed = rounded.largest_errors(torchs)
    print(what, {name: f"{error:.1e} / {allowed[name]:.1e}" for name, error in ours.items()})  # shown by pytest -rP
    for name, error in ours.items():
        assert error <= allowed[name] + TOLERANCE, f"{name}: {error:.2e} off fp64, torch {allowed[name]:.2e} ({what})"
