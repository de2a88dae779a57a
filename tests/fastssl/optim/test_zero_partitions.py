"""Under ZeRO 1 and 2 LARS and LAMB take the steps of the optimizer that sees whole layers, on 1, 2 and 4 gloo ranks.

The file is also the program of a rank: `python test_zero_partitions.py RANK WORLD_SIZE FOLDER all|quick`. One start of
the ranks runs every case, or the quick ones. The reference is the same optimizer on a copy of the model that nobody
partitions (test_layerwise.py holds it to timm's), given the gradients that the engine ended up with: what ZeRO's
reduction rounds (bf16 under autocast) cannot hide what the optimizer does.
"""

import copy
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastssl import collectives
from fastssl.config import RunConfig, build_config
from fastssl.optim import OptimConfig, build_optimizer
from fastssl.optim.layerwise import bind_partitions
from fastssl.processes.launch import start_process
from fastssl.step.deepspeed_config import build_ds_config
from tests.helpers.processes import start_ranks

NUM_STEPS = 5
SETTINGS = {
    "lars": OptimConfig(name="lars", base_lr=2.0, momentum=0.9, weight_decay=0.01, lars_trust_coefficient=0.02),
    "lamb": OptimConfig(name="lamb", base_lr=0.02, betas=(0.8, 0.95), weight_decay=0.01),
}
STATE = {"lars": ("momentum_buffer",), "lamb": ("exp_avg", "exp_avg_sq")}


@dataclass(frozen=True)
class Case:
    name: str
    precision: str
    zero_stage: int
    offload: bool = False
    tiny: bool = False
    round_robin: bool = False  # layers lie in another order than the model has them

    def __str__(self) -> str:
        extra = " offload" * self.offload + " tiny" * self.tiny + " round_robin" * self.round_robin
        return f"{self.name} {self.precision} zero{self.zero_stage}{extra}"


# fp32 before bf16: DeepSpeed remembers for good that a process has used autocast.
CASES = [
    Case(name, precision, zero_stage, offload)
    for precision, name in itertools.product(("fp32", "bf16"), SETTINGS)
    for zero_stage, offload in ((0, False), (1, False), (2, False), (1, True), (2, True))
]
CASES = [
    Case("lars", "fp32", 1, tiny=True),
    Case("lamb", "fp32", 2, tiny=True),
    Case("lars", "fp32", 2, round_robin=True),
    *CASES,
]
QUICK_CASES = [case for case in CASES if case.precision == "fp32" and not case.offload]


class Network(nn.Module):
    """135 + 35 + 21 = 191 weights, a prime that no number of ranks divides, and 18 numbers that are not adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.layers += nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3, bias=False))
        self.scale = nn.Parameter(torch.ones(1))
        self.frozen = nn.Linear(3, 3, bias=False).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, 6, 6] to a loss."""
        return (self.frozen(self.layers(x)) * self.scale - x.mean((2, 3))).square().mean()


class TinyNetwork(nn.Module):
    """One weight: all ranks but the first hold padding alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, 6, 6] to a loss."""
        x = x.flatten(1)[:, :1]
        return (self.layer(x) - 3 * x).square().mean()


def build_network(case: Case) -> nn.Module:
    torch.manual_seed(3)
    return TinyNetwork() if case.tiny else Network()


def build_engine(case: Case, model: nn.Module) -> Any:
    import deepspeed

    train = {"precision": case.precision, "zero_stage": case.zero_stage, "offload_optimizer": case.offload}
    ds = {"zero_optimization": {"round_robin_gradients": case.round_robin}}
    cfg = build_config({"train": train, "data": {"global_batch_size": 8}, "ds": ds})
    ds_config = build_ds_config(cfg, world_size=collectives.world_size())
    optimizer = build_optimizer(model, SETTINGS[case.name])
    return deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config, dist_init_required=False)[0]


def batch(step: int) -> Tensor:
    """This rank's images."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(8, 3, 6, 6, generator=generator) * 2.0 ** (-step)  # each step's gradients have another size
    return images.chunk(collectives.world_size())[collectives.rank()]


def run_case(case: Case) -> dict[str, Any]:
    """Train engine and reference side by side.

    Returns:
        "error": largest distance between a parameter, or a parameter's state, and the reference's, relative to the
        reference's length; "moved": how far the weights went, likewise; "weights"; "spans": what this rank holds of
        the adapted layers.
    """
    from deepspeed.utils import safe_get_full_grad, safe_get_full_optimizer_state

    model = build_network(case)
    reference = copy.deepcopy(model)
    start = copy.deepcopy(model)
    engine = build_engine(case, model)
    bind_partitions(engine.optimizer)
    whole = build_optimizer(reference, SETTINGS[case.name])
    errors = []
    for step in range(NUM_STEPS):
        lr = SETTINGS[case.name].base_lr * (1 - step / NUM_STEPS)
        for group in [*engine.optimizer.param_groups, *whole.param_groups]:
            group["lr"] = lr
        engine.backward(engine(batch(step)))
        if case.round_robin:  # DeepSpeed's own map of fragments is wrong then: stage 0 alone can judge
            engine.step()
            continue
        for p, q in trained(model, reference):
            q.grad = safe_get_full_grad(p).reshape(q.shape).clone()
        engine.step()
        whole.step()
        errors += [distance(p, q) for p, q in trained(model, reference)]
    if case.zero_stage and not case.round_robin:
        engine.optimizer._hp_optimizer_states_linked = False  # DeepSpeed looked when the first group alone had a state
        engine.optimizer._lazy_init_hp_params_optimizer_state()
        for name in STATE[case.name]:
            errors += [
                distance(safe_get_full_optimizer_state(p, name), whole.state[q][name])
                for p, q in trained(model, reference)
            ]
    client = engine.optimizer.optimizer if case.zero_stage else engine.optimizer
    flats = [group["params"][0] for group in client.param_groups]
    return {
        "error": max(errors, default=0.0),
        "moved": min(distance(p, q) for p, q in trained(start, model) if p.ndim > 1),
        "weights": {name: p.detach().clone() for name, p in model.named_parameters()},
        "spans": client._partitions[flats[0]].spans if case.zero_stage else (),
        "flat_lengths": [flat.numel() for flat in flats],
        "state": {name: tuple(x.shape) for name, x in client.state[flats[0]].items()},
    }


def trained(model: nn.Module, other: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    return [(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True) if p.requires_grad]


def distance(x: Tensor, reference: Tensor) -> float:
    return float((x.detach() - reference.detach()).norm() / reference.detach().norm())


def run_unbound() -> str:
    """What a step says where nobody told the optimizer what is in ZeRO's partitions."""
    engine = build_engine(Case("lars", "fp32", 1), build_network(CASES[-1]))
    engine.backward(engine(batch(0)))
    try:
        engine.step()
    except RuntimeError as error:
        return str(error)
    return "no error"


def run_rank(rank: int, world_size: int, folder: Path, cases: list[Case]) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    start_process(RunConfig(device="cpu", num_threads=1))
    unbound = run_unbound()
    torch.save(({str(case): run_case(case) for case in cases}, unbound), folder / f"rank{rank}.pt")
    collectives.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.dist
@pytest.mark.parametrize(
    ("world_size", "cases"),
    [(2, "quick"), *(pytest.param(n, "all", marks=pytest.mark.slow) for n in (1, 2, 4))],
)
def test_steps_are_those_of_the_whole_layers(world_size, cases, tmp_path):
    ranks = start_ranks(__file__, world_size, tmp_path, cases)
    assert_steps_of_whole_layers(ranks, CASES if cases == "all" else QUICK_CASES)


def assert_steps_of_whole_layers(ranks: list[tuple[dict[str, dict[str, Any]], str]], cases: list[Case]) -> None:
    assert [unbound for _, unbound in ranks] == [ranks[0][1]] * len(ranks)
    assert "bind_partitions" in ranks[0][1]
    found = ranks[0][0]
    assert list(found) == [str(case) for case in cases]
    for name, result in found.items():
        for rank, _ in ranks:
            assert rank[name]["error"] < 1e-6, name  # some spacings of fp32
            for key, weights in result["weights"].items():
                assert torch.equal(rank[name]["weights"][key], weights), (name, key)
        assert result["moved"] > 1e-2, name
        assert_same_as_stage_0(name, len(ranks), found)
        if "zero0" not in name:
            assert_cut(name, [rank[name] for rank, _ in ranks])


def assert_same_as_stage_0(name: str, world_size: int, found: dict[str, dict[str, Any]]) -> None:
    """The engine's own stage 0 ends at the same weights.

    Under autocast ZeRO rounds each rank's gradient and each of their W - 1 sums to bf16: half a spacing, 2^-9, at most.
    """
    words = name.split()
    if "tiny" in words:
        return
    tolerance = {"fp32": 1e-6, "bf16": world_size * 2**-9}[words[1]]
    stage_0 = found[f"{words[0]} {words[1]} zero0"]["weights"]
    for key, weights in stage_0.items():
        assert distance(found[name]["weights"][key], weights) < tolerance, (name, key)


def assert_cut(name: str, ranks: list[dict[str, Any]]) -> None:
    """The case is the hard one: partitions end within layers, the last in padding; the state is as long as they are."""
    num_weights = 1 if "tiny" in name else 191
    lengths = [length for rank in ranks for _, length in rank["spans"]]
    assert sum(lengths) == num_weights
    assert sum(rank["flat_lengths"][0] for rank in ranks) > num_weights
    if "tiny" in name:
        assert all(rank["spans"] == () for rank in ranks[1:])
    elif len(ranks) > 1:
        assert len(lengths) > 3
    optimizer = name.split()[0]
    step = {} if optimizer == "lars" else {"step": ()}
    for rank in ranks:
        assert rank["state"] == dict.fromkeys(STATE[optimizer], (rank["flat_lengths"][0],)) | step


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), CASES if sys.argv[4] == "all" else QUICK_CASES)
