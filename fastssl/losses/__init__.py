"""The losses by their name in a configuration: each has one file, and one line in `CLASSES`."""

from typing import TYPE_CHECKING, Any, Union

from fastssl.losses.barlow_twins import BarlowTwins, BarlowTwinsConfig
from fastssl.losses.base import Loss, LossConfig
from fastssl.losses.byol import Byol, ByolConfig, LinearByolConfig
from fastssl.losses.dcl import Dcl, DclConfig, DclwConfig
from fastssl.losses.minc import Minc, MincConfig
from fastssl.losses.mio import Mio, MioConfig
from fastssl.losses.nt_xent import NtXent, NtXentConfig
from fastssl.losses.siglip import SigLip, SigLipConfig
from fastssl.losses.simsiam import SimSiam, SimSiamConfig
from fastssl.losses.spectral import Spectral, SpectralConfig
from fastssl.losses.tico import TiCo, TiCoConfig
from fastssl.losses.vicreg import VicReg, VicRegConfig

__all__ = [
    "CLASSES",
    "LOSSES",
    "AnyLossConfig",
    "BarlowTwins",
    "BarlowTwinsConfig",
    "Byol",
    "ByolConfig",
    "Dcl",
    "DclConfig",
    "DclwConfig",
    "LinearByolConfig",
    "Loss",
    "LossConfig",
    "Minc",
    "MincConfig",
    "Mio",
    "MioConfig",
    "NtXent",
    "NtXentConfig",
    "SigLip",
    "SigLipConfig",
    "SimSiam",
    "SimSiamConfig",
    "Spectral",
    "SpectralConfig",
    "TiCo",
    "TiCoConfig",
    "VicReg",
    "VicRegConfig",
    "build_loss",
]

CLASSES: tuple[type[Loss], ...] = (
    Mio,
    NtXent,
    Dcl,
    SigLip,
    Spectral,
    Minc,
    Byol,
    SimSiam,
    BarlowTwins,
    VicReg,
    TiCo,
)

# `loss.name` -> (settings class, loss class).
LOSSES: dict[str, tuple[type[LossConfig], type[Loss]]] = {
    config.__dataclass_fields__["name"].default: (config, loss) for loss in CLASSES for config in loss.configs
}

if TYPE_CHECKING:
    AnyLossConfig = LossConfig
else:
    AnyLossConfig = Union[tuple(config for config, _ in LOSSES.values())]  # noqa: UP007 - made from the table


def build_loss(config: LossConfig, projector_dim: int | None = None) -> Loss[Any]:
    """The loss module of a configuration; call it with the projections of each view [B, D].

    Args:
        config: The settings of one loss.
        projector_dim: D, for a loss with a predictor or a moment of this width.

    Raises:
        ValueError: `loss.name` is not one of LOSSES, or the loss needs `projector_dim` and it is None.
    """
    if config.name not in LOSSES:
        raise ValueError(f"loss.name: unknown {config.name!r}, known: {', '.join(LOSSES)}")
    build: Any = LOSSES[config.name][1]
    if not config.takes_width:
        return build(config)
    if projector_dim is None:
        raise ValueError(f"loss {config.name} needs the width of the projections, model.projector_dim")
    return build(config, projector_dim=projector_dim)
