"""What is built from a configuration, and the warnings about it."""

import pytest
import torch
from torch import nn

from fastssl.build_run import build_objective
from fastssl.config import build_config
from fastssl.losses import build_loss
from fastssl.models.two_view import TwoViewModel


class Features(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3))


@pytest.mark.parametrize(
    ("loss", "model", "warns"),
    [
        ("minc", {}, True),
        ("minc", {"batch_norm": "sync"}, True),
        ("spectral", {}, True),
        ("minc", {"projector_last_norm": False}, False),
        ("mio", {}, False),
    ],
)
def test_a_last_batch_norm_is_warned_of_where_the_loss_needs_the_mean(loss, model, warns, capsys):
    cfg = build_config({"loss": {"name": loss}, "model": model})
    parts = TwoViewModel(cfg.model, 8, backbone=Features())
    build_objective(cfg, parts, build_loss(cfg.loss, cfg.model.projector_dim))
    start = "fastssl: warning: the batch norm at the end of the projector removes the constant function"
    assert capsys.readouterr().err.startswith(start) == warns
