"""The losses by the name that stands in a config: one file and one line here for each."""

from collections.abc import Callable

from fastssl.losses.dcl import Dcl, DclConfig, DclwConfig
from fastssl.losses.mio import Mio, MioConfig
from fastssl.losses.nt_xent import NtXent, NtXentConfig
from fastssl.losses.siglip import SigLip, SigLipConfig
from fastssl.losses.spectral import Spectral, SpectralConfig

__all__ = [
    "LOSSES",
    "Dcl",
    "DclConfig",
    "DclwConfig",
    "Loss",
    "LossConfig",
    "Mio",
    "MioConfig",
    "NtXent",
    "NtXentConfig",
    "SigLip",
    "SigLipConfig",
    "Spectral",
    "SpectralConfig",
    "build_loss",
]

LossConfig = MioConfig | NtXentConfig | DclConfig | DclwConfig | SigLipConfig | SpectralConfig

Loss = Mio | NtXent | Dcl | SigLip | Spectral

LOSSES: dict[str, tuple[type, Callable[..., Loss]]] = {
    "mio": (MioConfig, Mio),
    "simclr": (NtXentConfig, NtXent),
    "dcl": (DclConfig, Dcl),
    "dclw": (DclwConfig, Dcl),
    "siglip": (SigLipConfig, SigLip),
    "spectral": (SpectralConfig, Spectral),
}


def build_loss(config: LossConfig) -> Loss:
    """The loss module of a config; call it with the projections of each view [B, D].

    Raises:
        ValueError: `loss.name` is not one of LOSSES.
    """
    if config.name not in LOSSES:
        raise ValueError(f"loss.name: unknown {config.name!r}, known: {', '.join(LOSSES)}")
    return LOSSES[config.name][1](config)
