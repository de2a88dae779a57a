"""One process, 2 and 4 gloo ranks on one global batch give the same loss and the same parameter gradients.

The file is also the program of a rank: `python test_losses_dist.py RANK WORLD_SIZE FOLDER`. One start of the ranks
runs every loss. fp64 and no BatchNorm, so that nothing but the losses can differ.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastssl import dist
from fastssl.losses import MioConfig, NtXentConfig, build_loss

GLOBAL_BATCH_SIZE = 16
LOSS_CONFIGS = {
    "naive": MioConfig(negative="naive", alignment_weight=1.0),
    "exp": MioConfig(negative="exp", temperature_positive=0.4, temperature_negative=0.2),
    "exp_reference": MioConfig(negative="exp", impl="reference"),
    "jensen": MioConfig(negative="jensen"),
    "jensen_per_anchor": MioConfig(negative="jensen", per_anchor=True),
    "quadratic": MioConfig(negative="quadratic"),
    "softplus": MioConfig(negative="softplus"),
    "simclr": NtXentConfig(temperature=0.2),
}


def build_encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 5)).double()


def local_views() -> tuple[Tensor, Tensor]:
    """This rank's samples of two views [16, 6] that are the same for every world size."""
    views = torch.randn(2, GLOBAL_BATCH_SIZE, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    view_a, view_b = views.chunk(dist.world_size(), dim=1)[dist.rank()]
    return view_a, view_b


def loss_and_grads(config: MioConfig | NtXentConfig) -> tuple[Tensor, list[Tensor]]:
    """Loss and parameter gradients as an averaging engine ends up with them."""
    encoder, (view_a, view_b) = build_encoder(), local_views()
    value = build_loss(config)(encoder(view_a), encoder(view_b))
    grads = torch.autograd.grad(value, list(encoder.parameters()))
    return dist.all_mean_(value.detach()), [dist.all_mean_(grad) for grad in grads]


def run_losses() -> dict[str, tuple[Tensor, list[Tensor]]]:
    return {name: loss_and_grads(config) for name, config in LOSS_CONFIGS.items()}


def run_collectives() -> dict[str, object]:
    """What each collective gives on this rank, from inputs that depend on the rank only."""
    x = torch.full((2, 1), float(dist.rank()), requires_grad=True)
    strided = torch.arange(6.0).reshape(2, 3).T * (dist.rank() + 1)
    mean = dist.global_mean(x)
    dist.barrier()
    return {
        "gathered": dist.gather_rows(x).flatten().tolist(),
        "gathered_strided": dist.gather_rows(strided)[:3].tolist() == (strided / (dist.rank() + 1)).tolist(),
        "global_mean": mean.flatten().tolist(),
        "global_mean_grad": torch.autograd.grad(mean.sum(), x)[0].flatten().tolist(),
        "x_after": x.flatten().tolist(),
        "all_mean": dist.all_mean_(strided)[1, 0].item(),
    }


def run_rank(rank: int, world_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    torch.save((run_losses(), run_collectives()), folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def rank_results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[tuple]:
    """(losses, collectives) of each of `param` ranks, run in processes of their own."""
    folder, world_size = tmp_path_factory.mktemp("ranks"), request.param
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__]
    ranks = [
        subprocess.Popen([*command, str(rank), str(world_size), str(folder)], env=environment)
        for rank in range(world_size)
    ]
    try:
        assert [process.wait(timeout=120) for process in ranks] == [0] * world_size
    finally:
        for process in ranks:
            process.kill()
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(world_size)]


@pytest.fixture(scope="module")
def one_process() -> dict[str, tuple[Tensor, list[Tensor]]]:
    return run_losses()


@pytest.mark.dist
@pytest.mark.parametrize("name", LOSS_CONFIGS)
def test_ranks_give_the_gradients_of_one_process(name: str, rank_results: list[tuple], one_process: dict) -> None:
    value, grads = one_process[name]
    for losses, _ in rank_results:
        rank_value, rank_grads = losses[name]
        assert abs(rank_value - value) <= 1e-12 * abs(value)
        for ours, expected in zip(rank_grads, grads, strict=True):
            assert (ours - expected).norm() <= 1e-10 * expected.norm()


@pytest.mark.dist
def test_collectives(rank_results: list[tuple]) -> None:
    world_size = len(rank_results)
    mean = (world_size - 1) / 2
    for rank, (_, collectives) in enumerate(rank_results):
        assert collectives == {
            "gathered": [float(r) for r in range(world_size) for _ in range(2)],
            "gathered_strided": True,
            "global_mean": [mean, mean],
            "global_mean_grad": [1.0, 1.0],
            "x_after": [float(rank)] * 2,
            "all_mean": mean + 1,
        }


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
