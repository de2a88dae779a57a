"""Our losses against numbers that other projects' own code gave on the same inputs (stored_losses.json).

Where conventions could differ, they do not, or the conversion is exact:

| ours       | theirs                                                                                            |
|------------|---------------------------------------------------------------------------------------------------|
| `simclr`   | Lightly NTXentLoss: the mean over both views' rows, negatives of both views, as ours               |
| `dcl`      | Lightly DCLLoss: log-sum over both views without the sample itself, 2N - 2 terms, as ours          |
| `dclw`     | Lightly DCLWLoss: sigma .5; the softmax of the weights runs over the N samples, as ours            |
| `siglip`   | open_clip SigLipLoss takes unit rows, t and b themselves; ours normalises and learns log t         |
| `clip`     | open_clip ClipLoss takes unit rows; it is our NT-Xent of `cross` topology                          |
| `spectral` | function D: rows of norm sqrt(mu) and more are shortened to it; mean over i != j, as ours          |
| `barlow_twins` | Lightly BarlowTwinsLoss on one process: biased variance, + 1e-5, as ours                       |
| `vicreg`   | Lightly VICRegLoss on one process: covariance by N - 1, half of both variances, as ours            |
| `tico`     | Lightly TiCoLoss has one direction; the rows of both views as one batch are our two directions      |
| `byol`     | Lightly NegativeCosineSimilarity n: 2 - 2 cos = 2 + 2 n, both directions; no predictor here         |
| `simsiam`  | the mean of n over both directions; no predictor here                                              |
| `mio`      | MIOLoss takes the mean over negatives apart, and mean((u_a - u_b)^2) over rows and width, as ours  |
"""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.make_stored_losses import DTYPES, SHAPES, WITH_TARGETS, TwoViewLoss, draw_inputs, measure
from fastssl.losses import LOSSES, SigLipConfig, build_loss
from fastssl.losses.siglip import SigLip
from kernels.partition_loss import partition_loss

STORED = json.loads((Path(__file__).parent / "stored_losses.json").read_text())
TOLERANCE = {"float64": 1e-12, "float32": 1e-6}


def with_targets(loss: nn.Module, z_a: Tensor, z_b: Tensor, targets: tuple[Tensor, ...]) -> Tensor:
    loss(*targets, targets=targets)  # a first batch, which TiCo remembers
    return loss(z_a, z_b, targets=targets)


def our_loss(name: str, settings: dict, width: int) -> TwoViewLoss:
    if name == "clip":
        return lambda z_a, z_b: partition_loss(torch.stack([z_a, z_b]), topology="cross", **settings)
    loss = build_loss(LOSSES[name][0](**settings), width).double()
    if hasattr(loss, "predictor"):
        loss.predictor = nn.Identity()
    if name in WITH_TARGETS:
        return lambda z_a, z_b, *targets: with_targets(loss, z_a, z_b, targets)
    if isinstance(loss, SigLip):  # parameters are made in fp32, which has no log 3
        loss.log_inv_temperature.data.fill_(math.log(settings["initial_inv_temperature"]))
    return loss


def label(entry: dict) -> str:
    settings = "-".join(f"{value}" for value in entry["settings"].values())
    return f"{entry['loss']}-{settings}-seed{entry['seed']}-{entry['dtype']}"


@pytest.mark.parametrize("seed", SHAPES)
def test_inputs_are_those_of_the_stored_numbers(seed: int) -> None:
    assert STORED["shapes"][str(seed)] == list(SHAPES[seed])
    sums = [float(x.sum()) for x in draw_inputs(seed)]
    assert sums == pytest.approx(STORED["input_sums"][str(seed)], rel=1e-12), "NumPy's stream of this seed is another"


@pytest.mark.parametrize("entry", STORED["losses"], ids=label)
def test_value_and_derivative_are_those_of_the_other_project(entry: dict) -> None:
    loss = our_loss(entry["loss"], entry["settings"], SHAPES[entry["seed"]][2])
    ours = measure(loss, entry["seed"], entry["dtype"], with_targets=entry["loss"] in WITH_TARGETS)
    stored = {key: entry[key] for key in ("value", "derivative")}
    tolerance = TOLERANCE[entry["dtype"]]
    assert ours["value"] == pytest.approx(stored["value"], rel=tolerance, abs=tolerance)
    assert ours["derivative"] == pytest.approx(stored["derivative"], rel=tolerance, abs=tolerance)


def test_every_other_project_is_there_and_says_where_it_is_from() -> None:
    found = {(entry["loss"], entry["dtype"], entry["seed"]) for entry in STORED["losses"]}
    names = (
        "simclr",
        "dcl",
        "dclw",
        "siglip",
        "clip",
        "spectral",
        "mio",
        "barlow_twins",
        "vicreg",
        "tico",
        "byol",
        "simsiam",
    )
    assert found == {(name, dtype, seed) for name in names for dtype in DTYPES for seed in SHAPES}
    assert all(any(c.isdigit() for c in entry["source"]) for entry in STORED["losses"])  # a version or a commit


def test_the_inputs_tell_conventions_apart() -> None:
    """DCL over one view's negatives alone, or with the positive, would be another number by far."""
    z = torch.from_numpy(draw_inputs(0)[0])
    both, one = (partition_loss(z, form="dcl", inv_temperature=2.0, topology=x) for x in ("self", "cross"))
    assert abs(both - one) > 0.1
    norms = z.norm(dim=2).square()
    for mu in {entry["settings"]["mu"] for entry in STORED["losses"] if entry["loss"] == "spectral"}:
        assert (norms > mu).any()
    assert (norms < 5.0).any()


def test_siglip_normalises_what_open_clip_wants_normalised() -> None:
    z_a, z_b = torch.from_numpy(draw_inputs(0)[0])
    loss = build_loss(SigLipConfig())
    first: Tensor = loss(z_a, z_b)
    assert torch.allclose(first, loss(3 * z_a, 0.5 * z_b), rtol=1e-14)
