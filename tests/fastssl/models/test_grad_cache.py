"""Micro-batches give the gradient of the whole batch, whatever the objective, for a part of the memory.

The file is also the program of a rank: `python test_grad_cache.py RANK WORLD_SIZE FOLDER`.
"""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastssl import collectives
from fastssl.build_run import build_objective
from fastssl.config import build_config
from fastssl.errors import ConfigError
from fastssl.losses import LossConfig, MioConfig, build_loss
from fastssl.models.config import ModelConfig
from fastssl.models.grad_cache import encode_in_micro_batches, unchanged_buffers
from fastssl.models.objective import Objective
from fastssl.models.two_view import TwoViewModel
from tests.fastssl.losses.test_losses_dist import (
    LOSS_CONFIGS,
    build_encoder,
    differences,
    local_views,
    module_of_config,
)
from tests.helpers.live_memory import PeakBytes
from tests.helpers.processes import join_ranks, start_ranks

# A last norm of weight zero would leave out the blocks' branches.
NARROW = {"channels": [8, 8, 16, 16], "layers": [1, 1, 1, 1], "stem_type": "deep", "stem_width": 4}
TINY = NARROW | {"zero_init_last": False}


class Encoder(nn.Module):
    """Without batch norm, whose statistics would be of a micro-batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = build_encoder()

    def forward(self, views: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        z = [self.layers(view) for view in views]
        return z, z


def run_objective(config: LossConfig, num_micro_batches: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The second step's loss, and its gradients as an averaging engine ends up with them, with the buffers.

    The first step moves the target and the moments.
    """
    model = Encoder()
    objective = Objective(model, module_of_config(config), num_micro_batches=num_micro_batches).double()  # pyright: ignore[reportArgumentType]
    views = list(local_views()[:2])
    if objective.target is not None:
        with torch.no_grad():
            objective.target.layers[0].weight += 0.1
    objective([view.flip(1) for view in views])
    _, z, loss = objective(views)
    assert [x.shape for x in z] == [(len(views[0]), 5)] * 2
    loss.backward()
    found = {name: collectives.all_mean_(p.grad) for name, p in objective.named_parameters() if p.grad is not None}
    found |= {name: buffer.clone() for name, buffer in objective.named_buffers()}
    return collectives.all_mean_(loss.detach()), found


def run_all(num_micro_batches: int) -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
    return {name: run_objective(config, num_micro_batches) for name, config in LOSS_CONFIGS.items()}


@pytest.fixture(scope="module")
def whole_batch() -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
    return run_all(1)


@pytest.mark.parametrize("num_micro_batches", [2, 4])
def test_every_objective_has_the_gradient_of_the_whole_batch(num_micro_batches: int, whole_batch: dict) -> None:
    """To 1e-10, fp64; what the loss learns and remembers is in it, once."""
    assert differences(run_all(num_micro_batches), whole_batch) == []
    learned = {name for name, (_, found) in whole_batch.items() if any("loss." in key for key in found)}
    assert {"siglip", "minc", "byol", "linear_byol", "simsiam", "tico"} <= learned


@pytest.mark.dist
def test_so_it_has_on_two_ranks(whole_batch: dict, tmp_path: Path) -> None:
    for found in start_ranks(__file__, 2, tmp_path):
        for num_micro_batches in (2, 4):
            assert differences(found[num_micro_batches], whole_batch) == []


def build(num_micro_batches: int, **backbone_kwargs: object) -> Objective:
    torch.manual_seed(0)
    model = TwoViewModel(
        ModelConfig(
            backbone="timm/resnet18",
            stem="cifar",
            backbone_kwargs=TINY | backbone_kwargs,
            projector_hidden=(16,),
            projector_dim=8,
        ),
        image_px=16,
    )
    return Objective(model, build_loss(MioConfig()), num_micro_batches=num_micro_batches)


def images(*sizes_px: int, batch_size: int = 8) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(batch_size, 3, px, px).to(memory_format=torch.channels_last) for px in sizes_px]


def step(objective: Objective, views: list[Tensor]) -> dict[str, Tensor]:
    """Gradients and buffers after one step as the trainer takes it."""
    torch.manual_seed(2)
    _, _, loss = objective(views)
    with unchanged_buffers(objective.model):
        loss.backward()
    gradients = {f"gradient of {name}": p.grad for name, p in objective.named_parameters() if p.grad is not None}
    return gradients | {name: buffer.clone() for name, buffer in objective.named_buffers()}


def test_the_second_forward_pass_draws_the_same_random_numbers_and_leaves_no_trace(monkeypatch) -> None:
    """Against micro-batches whose activations are kept: stochastic depth and batch norm, views of two sizes."""
    views = images(16, 16, 8)
    found = step(build(2, drop_path_rate=0.5), views)
    kept = build(2, drop_path_rate=0.5)
    monkeypatch.setattr("fastssl.models.grad_cache.checkpoint", lambda model, views, **_: model(views))
    expected = step(kept, views)
    assert found.keys() == expected.keys()
    num_parts_and_sizes = 2 * 2
    assert found["model.backbone.bn1.num_batches_tracked"] == num_parts_and_sizes
    for name, value in expected.items():
        # The sum over micro-batches may be taken in another order.
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)
        if not name.startswith("gradient"):
            assert torch.equal(found[name], value), name
    other = build(2, drop_path_rate=0.5)
    torch.manual_seed(3)  # the draw matters
    assert not torch.equal(other(views)[2], kept(views)[2])


class OneWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False)

    def forward(self, views: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        z = [self.layer(view) for view in views]
        return z, z


def test_under_autocast_the_parts_gradients_are_summed_in_fp32() -> None:
    """256 and 1 are bf16 numbers, 257 is not: it would become 256 if the parts shared autocast's cast weights."""
    model = OneWeight()
    with torch.autocast("cpu", torch.bfloat16):
        _, z = encode_in_micro_batches(model, [torch.tensor([[256.0], [1.0]])], 2)
    assert z[0].dtype == torch.bfloat16
    z[0].float().sum().backward()
    assert model.layer.weight.grad is not None
    assert model.layer.weight.grad.item() == 257


def test_a_quarter_of_the_activations_is_held() -> None:
    views = images(32, 32, batch_size=16)

    def peak_bytes(num_micro_batches: int) -> int:
        objective = build(num_micro_batches)
        objective(views)[2].backward()  # gradients are there
        with PeakBytes() as memory:
            objective(views)[2].backward()
        return memory.peak

    whole, quarters = peak_bytes(1), peak_bytes(4)
    assert whole > 2e6
    assert quarters < 0.35 * whole


CONFIG = {
    "model": {"backbone": "timm/resnet18", "stem": "cifar", "backbone_kwargs": TINY},
    "data": {"train": "x.beton", "global_batch_size": 12},
}


def build_from(num_micro_batches: int, **model: object) -> tuple:
    train = {"num_micro_batches": num_micro_batches}
    cfg = build_config(CONFIG | {"train": train, "model": CONFIG["model"] | model})
    return cfg, build_objective(cfg, TwoViewModel(cfg.model, image_px=16), build_loss(cfg.loss))


def test_batch_norm_in_micro_batches_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    build_from(3)
    (line,) = capsys.readouterr().err.splitlines()
    for part in ("train.num_micro_batches=3", "batch norm", "parts of 4 images"):
        assert part in line
    build_from(1)
    without = CONFIG["model"] | {"backbone_kwargs": TINY | {"norm_layer": "groupnorm1"}}
    build_from(12, **without, projector_hidden=(), projector_last_norm=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("num_micro_batches", "message"),
    [
        (5, r"train.num_micro_batches is 5, which does not divide the local batch of 12 images"),
        (12, r"train.num_micro_batches is 12: micro-batches of one image leave batch norm without statistics"),
    ],
)
def test_micro_batches_that_cannot_be(num_micro_batches: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_from(num_micro_batches)


def test_one_micro_batch_is_the_straight_path(monkeypatch) -> None:
    _, objective = build_from(1)
    monkeypatch.setattr("fastssl.models.objective.encode_in_micro_batches", None)
    monkeypatch.setattr("fastssl.models.objective.unchanged_buffers", None)
    with objective.preserve_buffers():
        objective(images(16, 16))[2].backward()


if __name__ == "__main__":
    own_rank, world_size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    join_ranks(own_rank, world_size, folder)
    torch.save({num: run_all(num) for num in (2, 4)}, folder / f"rank{own_rank}.pt")
    torch.distributed.destroy_process_group()
