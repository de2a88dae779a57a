"""Compiled networks: one graph, the same gradients, the same names."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastssl.build_run import build_objective
from fastssl.config import build_config
from fastssl.errors import ConfigError
from fastssl.losses import build_loss
from fastssl.models.grad_cache import unchanged_buffers
from fastssl.models.objective import Objective
from fastssl.models.sync_batch_norm import SyncBatchNorm
from fastssl.models.two_view import TwoViewModel

TINY = {"channels": [8, 8, 16, 16], "layers": [1, 1, 1, 1], "zero_init_last": False}
MODEL = {"backbone": "timm/resnet18", "stem": "cifar", "backbone_kwargs": TINY, "projector_hidden": [16]}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def build(*, loss: str = "mio", batch_norm: str = "per_rank", **train: object) -> Objective:
    data = {"train": "x.beton", "global_batch_size": 8}
    cfg = build_config(
        {"model": MODEL | {"batch_norm": batch_norm}, "data": data, "train": train, "loss": {"name": loss}}
    )
    torch.manual_seed(0)
    model = TwoViewModel(cfg.model, image_px=16)
    return build_objective(cfg, model, build_loss(cfg.loss, cfg.model.projector_dim))


def images() -> list[Tensor]:
    torch.manual_seed(1)
    return list(torch.randn(2, 8, 3, 16, 16))


def step(objective: Objective) -> dict[str, Tensor]:
    _, _, loss = objective(images())
    with unchanged_buffers(objective.model):
        loss.backward()
    return {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}


@pytest.mark.slow
def test_encoder_and_projector_are_one_graph() -> None:
    model = build().model
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    (_, z), (_, expected) = compiled(images()), model(images())
    torch.testing.assert_close(z, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "num_micro_batches"), [("minc", 1), ("mio", 2)], ids=["with a target", "in micro-batches"]
)
def test_gradients_are_the_same_but_for_rounding(loss: str, num_micro_batches: int) -> None:
    plain = build(loss=loss, num_micro_batches=num_micro_batches)
    compiled = build(loss=loss, num_micro_batches=num_micro_batches, compile=True)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    expected, found = step(plain), step(compiled)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1  # it was compiled
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(dict(compiled.named_buffers())[name], buffer, rtol=1e-4, atol=1e-5)


def test_collectives_of_batch_norms_stay_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    excluded: list[SyncBatchNorm] = []
    monkeypatch.setattr(SyncBatchNorm, "exclude_from_compilation", lambda norm: excluded.append(norm))
    model = build(batch_norm="sync", compile=True).model
    assert excluded == [module for module in model.modules() if isinstance(module, SyncBatchNorm)] != []


def test_without_a_compiler_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/no/such/compiler")
    with pytest.raises(ConfigError, match=r"train.compile: there is no C\+\+ compiler /no/such/compiler"):
        build(compile=True)
