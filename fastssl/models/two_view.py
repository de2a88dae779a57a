"""The model of every two-view objective: one encoder, one projector, all views through both."""

# B local batch, H and W a view's height and width, F features, D projection

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fastssl.models.backbones import build_backbone, count_features
from fastssl.models.config import ModelConfig


class TwoViewModel(nn.Module):
    """Features and projections of several views of one batch.

    Attributes:
        backbone: Images [B, 3, H, W] -> features [B, F].
        projector: Features [B, F] -> projections [B, D].
        num_features: F.
        built_from: The model section; None: with a backbone that was given.
    """

    def __init__(self, cfg: ModelConfig, image_px: int, backbone: nn.Module | None = None) -> None:
        """Build backbone and projector with random weights.

        Args:
            cfg: The model section.
            image_px: Side of the training images in pixels.
            backbone: Images [B, 3, H, W] -> features [B, F], instead of the one that `cfg` names.

        The weights stay contiguous, as DeepSpeed's broadcast and ZeRO's flat buffers require; with channels-last images
        the convolutions still run in the channels-last layout.

        Raises:
            ValueError: see `build_backbone`.
        """
        super().__init__()
        self.built_from = cfg if backbone is None else None
        if backbone is None:
            self.backbone, self.num_features = build_backbone(cfg, image_px)
        else:
            self.backbone, self.num_features = backbone, count_features(backbone, type(backbone).__name__, image_px)
        self.projector = build_projector(self.num_features, cfg)

    def forward(self, views: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Encode all views.

        Consecutive views of equal size are concatenated and go through the backbone in ONE call, so batch-norm
        statistics are over all of them (as in SimCLR; Barlow Twins and BYOL call once per view). The projector is
        called on the same concatenation.

        Args:
            views: V tensors [B, 3, H, W], channels-last in memory.

        Returns:
            h, V tensors [B, F], and z, V tensors [B, D], in the order of the views.
        """
        h: list[Tensor] = []
        z: list[Tensor] = []
        for group in _equal_sized(views):
            h_group = self.backbone(torch.cat(group))
            h += h_group.chunk(len(group))
            z += self.projector(h_group).chunk(len(group))
        return h, z


def build_projector(num_features: int, cfg: ModelConfig) -> nn.Sequential:
    """Linear layers with batch norm and ReLU between them: F-512-BN-ReLU-128-BN by default.

    Layers before a batch norm have no bias, because the norm would subtract it again.
    """
    layers: list[nn.Module] = []
    widths = (num_features, *cfg.projector_hidden)
    for width_in, width_out in itertools.pairwise(widths):
        layers += [nn.Linear(width_in, width_out, bias=False), nn.BatchNorm1d(width_out), nn.ReLU(inplace=True)]
    layers.append(nn.Linear(widths[-1], cfg.projector_dim, bias=not cfg.projector_last_norm))
    if cfg.projector_last_norm:
        layers.append(nn.BatchNorm1d(cfg.projector_dim))
    return nn.Sequential(*layers)


def _equal_sized(views: list[Tensor]) -> Iterator[list[Tensor]]:
    for _, group in itertools.groupby(views, key=lambda view: view.shape):
        yield list(group)
