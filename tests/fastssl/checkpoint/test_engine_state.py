"""DeepSpeed's state out and in again, unpartitioned: bit for bit, whatever the ZeRO stage and the world size.

The file is also the program of a rank: `python test_engine_state.py save|load RANK WORLD_SIZE FOLDER`. One start of the
ranks goes through every optimizer and every two stages.
"""

import os
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastssl.checkpoint.engine_state import collect_engine_state, restore_engine_state
from tests.helpers.group_counts import AdamByGroup
from tests.helpers.processes import run_ranks

STAGES = {
    "zero0": {"stage": 0},
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "offload": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
}
OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01),
    "adam by group": lambda groups: AdamByGroup(groups, lr=0.01),
}
GLOBAL_BATCH_SIZE = 12


class Toy(nn.Module):
    """Odd sizes, so that pieces end inside of parameters and are padded; a frozen part; buffers that differ by rank."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.norm = nn.BatchNorm1d(7)
        self.last = nn.Linear(7, 3)
        self.scale = nn.Parameter(torch.ones(1))
        self.target = nn.Linear(2, 2).requires_grad_(False)
        self.register_buffer("moment", torch.full((2, 2), 0.3))
        self.register_buffer("derived", torch.ones(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.last(self.norm(self.first(x)).relu()) * self.scale).square().mean()


def build_engine(stage: str, optimizer: str, world_size: int) -> Any:
    import deepspeed

    torch.manual_seed(0)
    model = Toy()
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1]}, {"params": [p for p in trained if p.ndim <= 1]}]
    config = {
        "train_batch_size": GLOBAL_BATCH_SIZE,
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH_SIZE // world_size,
        "zero_optimization": STAGES[stage],
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**12,
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=OPTIMIZERS[optimizer](groups), config=config, dist_init_required=False
    )
    return engine


def take_step(engine: Any, step: int, rank: int, world_size: int) -> None:
    x = torch.randn(GLOBAL_BATCH_SIZE, 5, generator=torch.Generator().manual_seed(step))
    engine.backward(engine(x.chunk(world_size)[rank]))
    engine.step()


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


def save(rank: int, world_size: int, folder: Path) -> None:
    """Save after three steps, under every stage; restore under every stage; go on beside the engine that was saved."""
    for optimizer, stage in product(OPTIMIZERS, STAGES):
        engine = build_engine(stage, optimizer, world_size)
        start, _ = collect_engine_state(engine)
        for step in range(3):
            take_step(engine, step, rank, world_size)
        shared, own = collect_engine_state(engine)
        assert set(own) == {"norm.running_mean", "norm.running_var"}
        assert "derived" not in shared["buffers"]
        if rank == 0:
            assert not any(start["optimizer"].values())
            assert "group_steps" not in start
            assert shared.get("group_steps") == ([3, 3] if optimizer == "adam by group" else None)
            assert shared["optimizer"].keys() == {n for n, p in engine.module.named_parameters() if p.requires_grad}
            assert not torch.equal(start["parameters"]["scale"], shared["parameters"]["scale"])
            torch.save(shared, folder / f"{optimizer}_{stage}.pt")
        torch.distributed.barrier()
        shared = torch.load(folder / f"{optimizer}_{stage}.pt", weights_only=True)
        again = build_engine(stage, optimizer, world_size)
        restore_engine_state(again, shared, own)
        take_step(engine, 3, rank, world_size)
        take_step(again, 3, rank, world_size)
        unbroken, own = collect_engine_state(engine)
        resumed, own_resumed = collect_engine_state(again)
        assert same(unbroken, resumed), (optimizer, stage)
        assert same(own, own_resumed), (optimizer, stage)
    load(rank, world_size, folder)


def load(rank: int, world_size: int, folder: Path) -> None:
    """What was saved in a world of two, under every stage, comes out of any engine of this world as it was."""
    for optimizer, stage, source in product(OPTIMIZERS, STAGES, STAGES):
        shared = torch.load(folder / f"{optimizer}_{source}.pt", weights_only=True)
        engine = build_engine(stage, optimizer, world_size)
        restore_engine_state(engine, shared, {})
        found, own = collect_engine_state(engine)
        assert own == {}  # all ranks took the mean
        if rank == 0:
            assert same(found, shared), (optimizer, source, stage)
        take_step(engine, 3, rank, world_size)
        assert int(engine.global_steps) == 4


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(__file__, 2, folder, "save")
    return folder


@pytest.mark.dist
def test_restored_it_goes_on_bit_for_bit_and_every_stage_reads_every_other(saved):
    assert len(list(saved.glob("*.pt"))) == len(OPTIMIZERS) * len(STAGES)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("world_size", [1, 3])
def test_a_world_of_another_size_holds_the_same(world_size, saved):
    run_ranks(__file__, world_size, saved, "load")


if __name__ == "__main__":
    from fastssl.config import RunConfig
    from fastssl.processes.launch import start_process

    start_process(RunConfig(device="cpu", num_threads=1))
    {"save": save, "load": load}[sys.argv[4]](int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    sys.stdout.flush()
    os._exit(0)  # without the seconds of taking the process group down
