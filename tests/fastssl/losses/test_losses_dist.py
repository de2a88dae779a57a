"""One process, 2 and 4 gloo ranks on one global batch give the same loss and the same parameter gradients.

The file is also the program of a rank: `python test_losses_dist.py RANK WORLD_SIZE FOLDER`. One start of the ranks
runs every loss. fp64 and no BatchNorm, so that nothing but the losses can differ.
"""

import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastssl import collectives
from fastssl.losses import (
    BarlowTwinsConfig,
    ByolConfig,
    DclConfig,
    DclwConfig,
    LinearByolConfig,
    LossConfig,
    MincConfig,
    MioConfig,
    NtXentConfig,
    SigLipConfig,
    SimSiamConfig,
    SpectralConfig,
    TiCoConfig,
    VicRegConfig,
    build_loss,
)
from kernels.gram_loss import quadratic_loss, spectral_loss
from kernels.pair_loss import pair_loss
from kernels.partition_loss import partition_loss
from kernels.similarity import chunked
from tests.helpers.processes import join_ranks, start_ranks

GLOBAL_BATCH_SIZE = 16
WIDTH = 5
LOSS_CONFIGS = {
    "naive": MioConfig(negative="naive", alignment_weight=1.0),
    "exp": MioConfig(negative="exp", temperature_positive=0.4, temperature_negative=0.2),
    "exp_reference": MioConfig(negative="exp", impl="reference"),
    "jensen": MioConfig(negative="jensen"),
    "jensen_per_anchor": MioConfig(negative="jensen", per_anchor=True, alignment_weight=0.5),
    "quadratic": MioConfig(negative="quadratic", temperature_positive=0.3),
    "softplus": MioConfig(negative="softplus"),
    "simclr": NtXentConfig(temperature=0.2),
    "simclr_reference": NtXentConfig(temperature=0.2, impl="reference"),
    "dcl": DclConfig(temperature=0.2),
    "dclw": DclwConfig(temperature=0.2),
    "siglip": SigLipConfig(initial_inv_temperature=4.0, initial_bias=-1.0),
    "siglip_reference": SigLipConfig(initial_inv_temperature=4.0, initial_bias=-1.0, impl="reference"),
    "spectral": SpectralConfig(mu=0.3),
    "minc": MincConfig(),
    "minc_gha": MincConfig(gha=True),
    "minc_kl": MincConfig(alpha=1.0),
    "byol": ByolConfig(predictor_hidden=7),
    "linear_byol": LinearByolConfig(),
    "simsiam": SimSiamConfig(predictor_hidden=7),
    "barlow_twins": BarlowTwinsConfig(redundancy_weight=0.1),
    "vicreg": VicRegConfig(),
    "tico": TiCoConfig(),
}


class Learned(nn.Module):
    """A function of the kernels with a temperature and a bias that are learned."""

    def __init__(self, function: Callable[..., Tensor], settings: dict) -> None:
        super().__init__()
        self.function, self.settings = function, settings
        self.log_inv_temperature = nn.Parameter(torch.tensor(math.log(4.0), dtype=torch.float64))
        self.bias = nn.Parameter(torch.tensor(-0.5, dtype=torch.float64))

    def forward(self, z: Tensor, groups: Tensor) -> Tensor:
        """z [V, B, D], groups [B]."""
        settings = dict(self.settings)
        if settings.pop("grouped", False):
            settings["groups"] = groups
        if self.function in (pair_loss, partition_loss):
            settings["inv_temperature"] = self.log_inv_temperature.exp()
        if self.function is pair_loss:
            settings["bias"] = self.bias
        return self.function(z, exchange=collectives.EXCHANGE, **settings)


# name -> number of views, function, settings; groups of samples span the ranks.
KERNEL_CASES: dict[str, tuple[int, Callable[..., Tensor], dict]] = {
    **{
        f"pair {negatives} {topology}{' groups' * grouped}": (
            2,
            pair_loss,
            {"negatives": negatives, "positives": "softplus", "topology": topology, "grouped": grouped},
        )
        for negatives in ("exp", "jensen", "softplus", "square")
        for topology in ("self", "cross")
        for grouped in (False, True)
    },
    "pair unbalanced groups": (2, pair_loss, {"negatives": "softplus", "balanced": False, "grouped": True}),
    "pair three views groups": (3, pair_loss, {"negatives": "jensen", "grouped": True}),
    "nt_xent groups": (2, partition_loss, {"grouped": True}),
    "nt_xent three views": (3, partition_loss, {"grouped": True}),
    "clip": (2, partition_loss, {"topology": "cross"}),
    "clip groups": (2, partition_loss, {"topology": "cross", "grouped": True}),
    "clip reference": (2, partition_loss, {"topology": "cross", "impl": "reference"}),
    "dclw groups": (2, partition_loss, {"form": "dclw", "grouped": True}),
    "dcl three views": (3, partition_loss, {"form": "dcl"}),
    "spectral self three views": (3, spectral_loss, {"topology": "self", "mu": 0.3}),
    "quadratic cross": (2, quadratic_loss, {"topology": "cross", "inv_temperature": 3.0}),
}


def build_encoder(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, WIDTH)).double()


def local_views() -> Tensor:
    """This rank's samples of three views [3, B, 6] that are the same for every world size."""
    views = torch.randn(3, GLOBAL_BATCH_SIZE, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return views.chunk(collectives.world_size(), dim=1)[collectives.rank()]


def local_groups() -> Tensor:
    """Sample i belongs to group i % 6: with every sample of a group on another of 4 ranks, and on both of 2."""
    return (torch.arange(GLOBAL_BATCH_SIZE) % 6).chunk(collectives.world_size())[collectives.rank()]


def loss_of_config(config: LossConfig) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    loss = module_of_config(config)
    return loss, lambda z: call(loss, z[0], z[1])


def module_of_config(config: LossConfig) -> nn.Module:
    """The loss without batch norm, whose statistics are of one process."""
    torch.manual_seed(2)
    loss = build_loss(config, WIDTH).double()
    for parent in list(loss.modules()):
        for name, module in parent.named_children():
            if isinstance(module, nn.BatchNorm1d):
                setattr(parent, name, nn.Identity())
    return loss


def call(loss: nn.Module, *z: Tensor) -> Tensor:
    """A loss with a target network is called twice: what it remembers of the first batch goes into the second value."""
    if not hasattr(loss.config, "target_momentum"):
        return loss(*z)
    target = build_encoder(seed=1)
    with torch.no_grad():
        targets = [target(view) for view in local_views()[:2]]
        loss(*z, targets=[view.flip(1) for view in targets])
    return loss(*z, targets=targets)


def loss_of_kernel(num_views: int, function: Callable, settings: dict) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    loss = Learned(function, settings)
    return loss, lambda z: loss(z[:num_views], local_groups())


def loss_and_grads(loss: nn.Module, value_of: Callable[[Tensor], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss, and the gradients of encoder and loss as an averaging engine ends up with them."""
    encoder = build_encoder()
    value = value_of(torch.stack([encoder(view) for view in local_views()]))
    parameters = dict(encoder.named_parameters()) | {f"loss.{name}": p for name, p in loss.named_parameters()}
    grads = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    found = {name: grad for name, grad in zip(parameters, grads, strict=True) if grad is not None}
    return collectives.all_mean_(value.detach()), {name: collectives.all_mean_(grad) for name, grad in found.items()}


def run_losses() -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
    losses = {name: loss_of_config(config) for name, config in LOSS_CONFIGS.items()}
    losses |= {name: loss_of_kernel(*case) for name, case in KERNEL_CASES.items()}
    return {name: loss_and_grads(*loss) for name, loss in losses.items()}


def run_collectives() -> dict[str, object]:
    """What each collective gives on this rank, from inputs that depend on the rank only."""
    x = torch.full((2, 1), float(collectives.rank()), requires_grad=True)
    strided = torch.arange(6.0).reshape(2, 3).T * (collectives.rank() + 1)
    mean = collectives.global_mean(x)
    collectives.barrier()
    pieces = [piece.flatten().tolist() for piece in collectives.EXCHANGE.blocks(x)]
    return {
        "strided_blocks": [piece.tolist() for piece in collectives.EXCHANGE.blocks(strided)],
        "global_mean": mean.flatten().tolist(),
        "global_mean_grad": torch.autograd.grad(mean.sum(), x)[0].flatten().tolist(),
        "x_after": x.flatten().tolist(),
        "all_mean": collectives.all_mean_(strided)[1, 0].item(),
        "own_block": pieces[0],
        "other_blocks": [x for piece in pieces[1:] for x in piece],
        "at_most_two_pieces": len(pieces) <= 3,
        "sum": collectives.EXCHANGE.sum_(torch.ones(1)).item(),
    }


class Both(nn.Module):
    """Encoder and loss as one module, for DistributedDataParallel."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.encoder, self.loss = build_encoder(), loss

    def forward(self, views: Tensor) -> Tensor:
        return call(self.loss, *(self.encoder(view) for view in views))


def run_ddp() -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
    """Loss and gradients as torch's DistributedDataParallel leaves them."""
    found = {}
    for name, config in LOSS_CONFIGS.items():
        module = Both(module_of_config(config))
        parallel = nn.parallel.DistributedDataParallel(module)
        value = parallel(local_views()[:2])
        value.backward()
        grads = {key.removeprefix("encoder."): p.grad for key, p in module.named_parameters() if p.grad is not None}
        found[name] = (collectives.all_mean_(value.detach()), grads)
    return found


def run_unequal() -> dict[str, str]:
    """What losses say where a rank has one sample less than the others."""
    found = {}
    z = torch.randn(2, 5 - (collectives.rank() == 1), 3)
    for name in ("exp", "simclr", "spectral"):
        try:
            build_loss(LOSS_CONFIGS[name])(*z)
        except ValueError as error:
            found[name] = str(error)
    return found


def run_rank(rank: int, world_size: int, folder: Path) -> None:
    join_ranks(rank, world_size, folder)
    chunked.TILE_ROWS["cpu"] = 3  # one process takes tiles of another size: nothing may depend on it
    torch.save((run_losses(), run_collectives(), run_ddp(), run_unequal()), folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def one_process() -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
    return run_losses()


def differences(found: dict, expected: dict) -> list[str]:
    """What a rank has other than one process: the loss beyond 1e-12, or a parameter's gradient beyond 1e-10.

    A gradient that is zero but for rounding, as of the last bias under a loss that centres, must be so on the rank too.
    """
    wrong = []
    for name, (value, grads) in expected.items():
        rank_value, rank_grads = found[name]
        if not abs(rank_value - value) <= 1e-12 * abs(value):
            wrong.append(f"{name}: loss {rank_value} for {value}")
        assert rank_grads.keys() == grads.keys()
        rounding = 1e-14 * max(float(grad.norm()) for grad in grads.values())
        wrong += [
            f"{name}: gradient of {parameter}"
            for parameter, grad in grads.items()
            if not (rank_grads[parameter] - grad).norm() <= max(1e-10 * float(grad.norm()), rounding)
        ]
    return wrong


@pytest.mark.dist
@pytest.mark.parametrize(
    "world_size", [2, pytest.param(4, marks=pytest.mark.slow)]
)  # one test: it alone starts these ranks, also where workers share tests
def test_ranks_give_loss_and_gradients_of_one_process(world_size: int, one_process: dict, tmp_path: Path) -> None:
    results = start_ranks(__file__, world_size, tmp_path)
    for rank, (losses, exchanged, under_ddp, unequal) in enumerate(results):
        assert losses.keys() == one_process.keys()
        assert differences(losses, one_process) == []
        assert differences(under_ddp, {name: one_process[name] for name in LOSS_CONFIGS}) == []
        assert exchanged == expected_collectives(rank, world_size)
        shapes = ["[2, 4, 3]" if other == 1 else "[2, 5, 3]" for other in range(world_size)]
        message = f"z must have one shape on every rank, got {', '.join(shapes)}"
        assert unequal == dict.fromkeys(("exp", "simclr", "spectral"), message)


def test_what_losses_learn_has_a_gradient(one_process: dict) -> None:
    """That the test above compares something."""
    for name, learned in {
        "siglip": {"loss.log_inv_temperature", "loss.bias"},
        "pair exp self": {"loss.log_inv_temperature", "loss.bias"},
        "clip": {"loss.log_inv_temperature"},
        "simclr": set(),
    }.items():
        _, grads = one_process[name]
        assert {parameter for parameter in grads if parameter.startswith("loss.")} == learned
        assert all(grad.norm() > 1e-4 for grad in grads.values())


@pytest.mark.parametrize(
    ("name", "without"),
    [("pair exp self groups", "pair exp self"), ("pair exp cross groups", "pair exp cross"), ("clip groups", "clip")],
)
def test_groups_change_the_loss(name: str, without: str, one_process: dict) -> None:
    assert abs(one_process[name][0] - one_process[without][0]) > 1e-3


def expected_collectives(rank: int, world_size: int) -> dict[str, object]:
    """What `run_collectives` must have given."""
    mean = (world_size - 1) / 2

    def of_rank(r: int) -> Tensor:
        return torch.arange(6.0).reshape(2, 3).T * (r + 1)

    before = torch.cat([torch.empty(0, 2), *(of_rank(r) for r in range(rank))])
    after = torch.cat([torch.empty(0, 2), *(of_rank(r) for r in range(rank + 1, world_size))])
    return {
        "strided_blocks": [piece.tolist() for piece in (of_rank(rank), before, after) if len(piece)],
        "global_mean": [mean, mean],
        "global_mean_grad": [1.0, 1.0],
        "x_after": [float(rank)] * 2,
        "all_mean": mean + 1,
        "own_block": [float(rank)] * 2,
        "other_blocks": [float(r) for r in range(world_size) for _ in range(2) if r != rank],
        "at_most_two_pieces": True,
        "sum": world_size,
    }


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
