"""The losses by the name that stands in a config: one file and one line here for each."""

from collections.abc import Callable

from fastssl.losses.barlow_twins import BarlowTwins, BarlowTwinsConfig
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
    "LOSSES",
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

LossConfig = (
    MioConfig
    | NtXentConfig
    | DclConfig
    | DclwConfig
    | SigLipConfig
    | SpectralConfig
    | MincConfig
    | ByolConfig
    | LinearByolConfig
    | SimSiamConfig
    | BarlowTwinsConfig
    | VicRegConfig
    | TiCoConfig
)

Loss = Mio | NtXent | Dcl | SigLip | Spectral | Minc | Byol | SimSiam | BarlowTwins | VicReg | TiCo

LOSSES: dict[str, tuple[type, Callable[..., Loss]]] = {
    "mio": (MioConfig, Mio),
    "simclr": (NtXentConfig, NtXent),
    "dcl": (DclConfig, Dcl),
    "dclw": (DclwConfig, Dcl),
    "siglip": (SigLipConfig, SigLip),
    "spectral": (SpectralConfig, Spectral),
    "minc": (MincConfig, Minc),
    "byol": (ByolConfig, Byol),
    "linear_byol": (LinearByolConfig, Byol),
    "simsiam": (SimSiamConfig, SimSiam),
    "barlow_twins": (BarlowTwinsConfig, BarlowTwins),
    "vicreg": (VicRegConfig, VicReg),
    "tico": (TiCoConfig, TiCo),
}


def build_loss(config: LossConfig, projector_dim: int | None = None) -> Loss:
    """The loss module of a config; call it with the projections of each view [B, D].

    A loss whose config has a `target_momentum` also wants `targets`, the target network's projections, see
    `fastssl.models.objective`.

    Args:
        config: Of one loss.
        projector_dim: D, for a loss that holds something of this width: a predictor or a moment.

    Raises:
        ValueError: `loss.name` is not one of LOSSES, or the loss needs the width.
    """
    if config.name not in LOSSES:
        raise ValueError(f"loss.name: unknown {config.name!r}, known: {', '.join(LOSSES)}")
    build = LOSSES[config.name][1]
    if not getattr(config, "takes_width", False):
        return build(config)
    if projector_dim is None:
        raise ValueError(f"loss {config.name} needs the width of the projections, model.projector_dim")
    return build(config, projector_dim)
