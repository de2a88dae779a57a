"""Batch norm over ranks is plain batch norm on the concatenated batch: outputs, gradients, running statistics.

The file is also the program of a rank: `python test_sync_batch_norm.py RANK WORLD_SIZE FOLDER`.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastssl import collectives
from fastssl.losses import ByolConfig, LossConfig, MioConfig, build_loss
from fastssl.models.config import ModelConfig
from fastssl.models.objective import Objective
from fastssl.models.sync_batch_norm import SyncBatchNorm, exclude_from_compilation, synchronize_batch_norms
from fastssl.models.two_view import TwoViewModel
from fastssl.optim import OptimConfig, build_optimizer
from tests.helpers.processes import join_ranks, start_ranks

C = 3
STEPS = 2  # running statistics move twice
# name -> the plain norm, shape of the global batch, dtype, mean of the inputs
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], torch.dtype, float]] = {
    "images": (lambda: nn.BatchNorm2d(C), (8, C, 5, 4), torch.float64, 1.0),
    "rows": (lambda: nn.BatchNorm1d(C), (8, C), torch.float64, 1.0),
    "sequences": (lambda: nn.BatchNorm1d(C), (8, C, 7), torch.float64, 1.0),
    "no affine": (lambda: nn.BatchNorm2d(C, affine=False), (8, C, 2, 2), torch.float64, 1.0),
    "cumulative": (lambda: nn.BatchNorm1d(C, momentum=None), (8, C), torch.float64, 1.0),
    "untracked": (lambda: nn.BatchNorm1d(C, track_running_stats=False), (8, C), torch.float64, 1.0),
    "unequal": (lambda: nn.BatchNorm2d(C), (11, C, 5, 4), torch.float64, 1.0),
    "bf16": (lambda: nn.BatchNorm2d(C), (8, C, 5, 4), torch.bfloat16, 1.0),
    "fp16": (lambda: nn.BatchNorm2d(C), (8, C, 5, 4), torch.float16, 1.0),
    "fp32 far from zero": (lambda: nn.BatchNorm2d(C), (8, C, 5, 4), torch.float32, 3000.0),
}


def build_norm(name: str) -> nn.Module:
    build, _, dtype, _ = CASES[name]
    norm = build().to(torch.float64 if dtype == torch.float64 else torch.float32)
    if norm.weight is not None:
        with torch.no_grad():
            norm.weight.copy_(torch.tensor([0.5, -1.0, 2.0]))
            norm.bias.copy_(torch.tensor([0.0, 1.0, -3.0]))
    return norm


def global_batch(name: str, step: int) -> tuple[Tensor, Tensor]:
    """Inputs and gradients of the outputs, in the case's dtype; channels have scales of their own."""
    _, shape, dtype, mean = CASES[name]
    torch.manual_seed(step)
    x, gy = torch.randn(2, *shape, dtype=torch.float64)
    scales = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64).view(-1, *[1] * (len(shape) - 2))
    return (mean + scales * x).to(dtype), gy.to(dtype)


def run_norm(norm: nn.Module, name: str, *, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Of this rank's rows: outputs and gradients of inputs; of all ranks: sums of gradients, and what is remembered."""
    found: dict[str, Tensor] = {}
    for step in range(STEPS):
        x, gy = (local_rows(value.to(dtype or value.dtype)) for value in global_batch(name, step))
        if x.ndim == 4:
            x = x.to(memory_format=torch.channels_last)
        x.requires_grad_()
        norm.zero_grad()
        y = norm(x)
        y.backward(gy)
        assert x.grad is not None
        assert y.dtype == x.grad.dtype == x.dtype
        assert x.ndim < 4 or y.is_contiguous(memory_format=torch.channels_last)
        found |= {f"{step} y": y.detach(), f"{step} gradient of x": x.grad}
    for key, parameter in norm.named_parameters():
        assert parameter.grad is not None
        found[f"gradient of {key}"] = collectives.EXCHANGE.sum_(parameter.grad)
    return found | dict(norm.named_buffers())


def local_rows(x: Tensor) -> Tensor:
    """This rank's part; where they are not equal, the last rank has fewer."""
    return x.tensor_split([-(-len(x) // collectives.world_size()) * r for r in range(1, collectives.world_size())])[
        collectives.rank()
    ]


TINY = {"channels": [8, 8, 16, 16], "layers": [1, 1, 1, 1], "zero_init_last": False}
MODEL = ModelConfig(
    backbone="timm/resnet18", stem="cifar", backbone_kwargs=TINY, projector_hidden=(16,), projector_dim=8
)
TRAININGS: dict[str, LossConfig] = {"mio": MioConfig(), "byol": ByolConfig(predictor_hidden=8, target_momentum=0.9)}


def train(config: LossConfig, *, sync: bool) -> dict[str, Tensor]:
    """All that a few steps leave behind; gradients are averaged over ranks, as the engine does it. fp64."""
    torch.manual_seed(0)
    model, loss = TwoViewModel(MODEL, image_px=16), build_loss(config, 8)
    if sync:
        synchronize_batch_norms(nn.ModuleList([model, loss]))
    objective = Objective(model, loss).double()
    optimizer = build_optimizer(objective, OptimConfig(base_lr=0.05))
    for step in range(3):
        views = torch.randn(2, 8, 3, 16, 16, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.zero_grad()
        objective([local_rows(view) for view in views])[2].backward()
        for parameter in objective.parameters():
            if parameter.grad is not None:
                collectives.all_mean_(parameter.grad)
        optimizer.step()
        if (momentum := objective.target_momentum(step, 10)) is not None:
            objective.follow(torch.tensor(1 - momentum))
    return {name: value.clone() for name, value in objective.state_dict().items()}


def run_rank(rank: int, world_size: int, folder: Path) -> None:
    join_ranks(rank, world_size, folder)
    norms = {}
    for name in CASES:
        norm = build_norm(name)
        synchronize_batch_norms(norm)
        norms[name] = run_norm(norm, name)
    trainings = {name: train(config, sync=True) for name, config in TRAININGS.items()} if world_size == 2 else {}
    torch.save((norms, trainings), folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


def joined(ranks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Of all ranks together; what must be the same on each is seen to be."""
    found = {}
    for name, value in ranks[0].items():
        if name.endswith((" y", " gradient of x")):
            found[name] = torch.cat([rank[name] for rank in ranks])
        else:
            assert all(torch.equal(rank[name], value) for rank in ranks), name
            found[name] = value
    return found


@pytest.mark.dist
@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_together_are_one_batch(world_size: int, tmp_path: Path) -> None:
    ranks = start_ranks(__file__, world_size, tmp_path)
    for name, (_, _, dtype, _) in CASES.items():
        found = joined([norms[name] for norms, _ in ranks])
        exact = run_norm(build_norm(name).double(), name, dtype=torch.float64)
        assert found.keys() == exact.keys()
        if dtype == torch.float64:
            for key, value in exact.items():
                torch.testing.assert_close(found[key], value, rtol=1e-12, atol=1e-12, msg=f"{name}: {key}")
        else:
            assert_as_near_as_one_process(found, run_norm(build_norm(name), name), exact, name)
    for name in TRAININGS if world_size == 2 else ():
        of_ranks, of_one = joined([trainings[name] for _, trainings in ranks]), train(TRAININGS[name], sync=False)
        assert of_ranks.keys() == of_one.keys()
        for key, value in of_one.items():
            torch.testing.assert_close(of_ranks[key], value, rtol=1e-9, atol=1e-9, msg=f"{name}: {key}")


def assert_as_near_as_one_process(
    found: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor], name: str
) -> None:
    """To fp64, in norm; 1e-6 is fp32's rounding of a sum taken in another order."""
    for key, value in exact.items():
        error, plain_error = (float((x[key].double() - value).norm() / value.double().norm()) for x in (found, plain))
        assert error <= 1.05 * plain_error + 1e-6, f"{name}: {key}: {error:.2e} for {plain_error:.2e}"


def test_in_eval_mode_it_is_plain_batch_norm() -> None:
    plain, sync = build_norm("images").eval(), build_norm("images").eval()
    synchronize_batch_norms(sync)
    assert type(sync) is SyncBatchNorm
    found, expected = run_norm(sync, "images"), run_norm(plain, "images")
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("name", CASES)
def test_alone_it_is_as_near_to_fp64_as_plain_batch_norm(name: str) -> None:
    sync, exact = build_norm(name), run_norm(build_norm(name).double(), name, dtype=torch.float64)
    synchronize_batch_norms(sync)
    found = run_norm(sync, name)
    assert found.keys() == exact.keys()
    assert_as_near_as_one_process(found, run_norm(build_norm(name), name), exact, name)


def test_alone_it_is_as_exact_channels_last_as_several_ranks_are() -> None:
    """torch's own is off by 3.5e-4 and 5.0e-6 here, so that one process would be another training than two."""
    torch.manual_seed(0)
    x, gy = (torch.randn(32, 16, 16, 16).to(memory_format=torch.channels_last) for _ in range(2))
    x += 300

    def relative_errors(norm: nn.Module) -> list[float]:
        found = outputs_and_gradients(norm, x, gy)
        exact = outputs_and_gradients(nn.BatchNorm2d(16).double(), x.double(), gy.double())
        return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]

    for own, plain, most in zip(
        relative_errors(SyncBatchNorm(16)), relative_errors(nn.BatchNorm2d(16)), (3e-5, 5e-7), strict=True
    ):
        assert own < most < plain / 5


def outputs_and_gradients(norm: nn.Module, x: Tensor, gy: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = norm(x)
    y.backward(gy)
    assert x.grad is not None
    return y.detach(), x.grad


def test_one_value_of_a_channel_has_no_statistics() -> None:
    for shape in ((1, 3), (1, 3, 1, 1)):
        with pytest.raises(ValueError, match="more than one value per channel"):
            SyncBatchNorm(3)(torch.randn(shape))
        assert SyncBatchNorm(3).eval()(torch.randn(shape)).shape == shape


@pytest.mark.parametrize("name", ["resnet18", "timm/mobilenetv3_small_050"])
def test_it_stands_where_the_plain_one_stood(name: str) -> None:
    """Also where timm's norm holds the activation."""
    torch.manual_seed(0)
    model = TwoViewModel(ModelConfig(backbone=name), image_px=32).eval()
    names, images = list(model.state_dict()), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = model([images])[1][0]
        synchronize_batch_norms(model)
        after = model([images])[1][0]
    assert torch.equal(before, after)
    assert list(model.state_dict()) == names
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert {type(norm) for norm in norms} == {SyncBatchNorm}


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # the compiler reads it of every tensor
def test_its_collectives_are_not_traced() -> None:
    norm, x = SyncBatchNorm(3), torch.randn(4, 3)
    expected = norm(x)
    exclude_from_compilation(nn.Sequential(norm))
    with pytest.raises(Exception, match=r"torch\.compiler\.disable"):
        torch.compile(norm, backend="eager", fullgraph=True)(x)
    assert torch.equal(torch.compile(norm, backend="eager")(x), expected)


def test_a_norm_that_does_more_is_refused() -> None:
    class Shifted(nn.BatchNorm1d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1

    with pytest.raises(ValueError, match=r"model.batch_norm=sync does not support .*Shifted"):
        synchronize_batch_norms(nn.Sequential(Shifted(3)))


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
