"""Run the losses of other projects on fixed inputs, for tests/fastssl/losses/test_stored_losses.py.

    python -m venv peers && peers/bin/pip install lightly open_clip_torch
    git clone https://github.com/miossl/miossl && git clone https://github.com/jhaochenz96/spectral_contrastive_learning
    peers/bin/python benchmarks/make_stored_losses.py --miossl miossl --spectral spectral_contrastive_learning

Use a separate environment, because nothing else here needs these packages. Each number is the output of the other
project's own code; none of that code is copied here.
"""

# N samples, D width; z [2, N, D] for two views, direction [2, N, D], targets [2, N, D] from a target network

import argparse
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

if __name__ == "__main__":  # as a script, only benchmarks/ is on Python's path: add the repository root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipelines.torchvision_operators import declare_torchvision_operators

OUT = Path(__file__).resolve().parent.parent / "tests/fastssl/losses/stored_losses.json"
SHAPES = {0: (2, 6, 5), 1: (2, 9, 4)}  # seed -> [views, N, D]
DTYPES = ("float64", "float32")
WITH_TARGETS = ("byol", "tico")  # these losses take z_a, z_b, target_a, target_b

TwoViewLoss = Callable[..., Tensor]
# The name of our loss, our settings, the other project's settings, its loss, its source.
Peer = tuple[str, dict[str, Any], dict[str, Any], TwoViewLoss, str]


def draw_inputs(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """z and a direction for the directional derivative, [2, N, D] each, fp64, from NumPy's PCG64."""
    first, second = np.random.Generator(np.random.PCG64(seed)).standard_normal((2, *SHAPES[seed]))
    return first, second


def draw_targets(seed: int) -> np.ndarray:
    """The output of a target network for both views, [2, N, D], fp64."""
    return np.random.Generator(np.random.PCG64(1000 + seed)).standard_normal(SHAPES[seed])


def measure(loss: TwoViewLoss, seed: int, dtype: str, *, with_targets: bool = False) -> dict[str, float]:
    """The value and its derivative along the direction."""
    drawn = (*draw_inputs(seed), draw_targets(seed))
    z, direction, targets = (torch.from_numpy(x).to(getattr(torch, dtype)) for x in drawn)
    z.requires_grad_()
    value = loss(z[0], z[1], *(targets if with_targets else ()))
    (grad,) = torch.autograd.grad(value, z)
    return {"value": value.item(), "derivative": (grad.double() * direction.double()).sum().item()}


def lightly_peers() -> Iterator[Peer]:
    """NT-Xent, DCL and DCLW; all three sum the negatives of a row over both views, as we do."""
    from lightly.loss import DCLLoss, DCLWLoss, NTXentLoss

    version = f"lightly {importlib.metadata.version('lightly')}"
    losses = {"simclr": NTXentLoss, "dcl": DCLLoss, "dclw": DCLWLoss}
    for name, loss_type in losses.items():
        for temperature in (0.5, 0.1):
            settings = {"temperature": temperature}
            yield name, settings, settings, loss_type(**settings), f"{version}, {loss_type.__name__}"


def lightly_moment_peers() -> Iterator[Peer]:
    """Barlow Twins and VICReg in one process; TiCo in one direction, with the rows of both views in one call."""
    from lightly.loss import BarlowTwinsLoss, TiCoLoss, VICRegLoss

    version = f"lightly {importlib.metadata.version('lightly')}"
    for weight in (0.0051, 0.5):
        theirs = {"lambda_param": weight}
        yield (
            "barlow_twins",
            {"redundancy_weight": weight},
            theirs,
            BarlowTwinsLoss(**theirs),
            f"{version}, BarlowTwinsLoss",
        )
    for weights in ((25.0, 25.0, 1.0), (2.0, 5.0, 10.0)):
        ours = dict(zip(("invariance_weight", "variance_weight", "covariance_weight"), weights, strict=True))
        theirs = dict(zip(("lambda_param", "mu_param", "nu_param"), weights, strict=True))
        yield "vicreg", ours, theirs, VICRegLoss(**theirs), f"{version}, VICRegLoss"
    for beta, rho in ((0.9, 8.0), (0.5, 2.0)):
        theirs = {"beta": beta, "rho": rho}

        def tico(a: Tensor, b: Tensor, t_a: Tensor, t_b: Tensor, theirs: dict[str, float] = theirs) -> Tensor:
            loss, targets = TiCoLoss(**theirs), torch.cat([t_b, t_a])
            loss(torch.cat([t_a, t_b]), targets)  # a first batch, which updates C
            return loss(torch.cat([a, b]), targets)

        yield "tico", {"moment_momentum": beta, "covariance_weight": rho}, theirs, tico, f"{version}, TiCoLoss"


def lightly_cosine_peers() -> Iterator[Peer]:
    """BYOL and SimSiam from the negative cosine, without a predictor; BYOL's 2 - 2 cos is written out."""
    from lightly.loss import NegativeCosineSimilarity

    source = f"lightly {importlib.metadata.version('lightly')}, NegativeCosineSimilarity"
    negative = NegativeCosineSimilarity()
    yield "byol", {}, {}, lambda a, b, t_a, t_b: 2 + 2 * negative(a, t_b) + 2 + 2 * negative(b, t_a), source
    yield "simsiam", {}, {}, lambda a, b: (negative(a, b.detach()) + negative(b, a.detach())) / 2, source


def open_clip_peers() -> Iterator[Peer]:
    """SigLIP and CLIP, which take unit rows; logit_scale is the inverse temperature."""
    from open_clip.loss import ClipLoss, SigLipLoss

    version = f"open_clip_torch {importlib.metadata.version('open_clip_torch')}"
    for scale, bias in ((10.0, -10.0), (3.0, -1.0)):
        theirs = {"logit_scale": scale, "logit_bias": bias}
        ours = {"initial_inv_temperature": scale, "initial_bias": bias}
        yield "siglip", ours, theirs, _of_unit_rows(SigLipLoss(), theirs), f"{version}, SigLipLoss"
    for scale in (10.0, 2.0):
        theirs = {"logit_scale": scale}
        yield "clip", {"inv_temperature": scale}, theirs, _of_unit_rows(ClipLoss(), theirs), f"{version}, ClipLoss"


def _of_unit_rows(loss: Callable[..., Tensor], settings: dict[str, float]) -> TwoViewLoss:
    """Pass the settings as tensors, as in training, where both are learned."""

    def of_views(z_a: Tensor, z_b: Tensor) -> Tensor:
        scalars = {name: torch.tensor(x, dtype=z_a.dtype) for name, x in settings.items()}
        return loss(F.normalize(z_a, dim=1), F.normalize(z_b, dim=1), **scalars)

    return of_views


def spectral_peers(checkout: Path) -> Iterator[Peer]:
    """The spectral contrastive loss of HaoChen et al., function D of models/spectral.py."""
    module, source = _load(checkout, "models/spectral.py")
    for mu in (1.0, 5.0):
        settings = {"mu": mu}
        yield "spectral", settings, settings, lambda a, b, mu=mu: module.D(a, b, mu=mu)[0], f"{source}, D"


def mio_peers(checkout: Path) -> Iterator[Peer]:
    """The naive form of MIO, MIOLoss of miossl/losses.py, which is constructed for one batch size."""
    module, source = _load(checkout, "miossl/losses.py")
    for tau_p, tau_n, weight in ((0.5, 0.5, 1.0), (0.5, 0.5, 0.0), (0.2, 0.4, 1.0)):
        theirs = {"p_temperature": tau_p, "n_temperature": tau_n, "lambda_loss": weight}
        ours = {"temperature_positive": tau_p, "temperature_negative": tau_n, "alignment_weight": weight}
        yield (
            "mio",
            {"negative": "naive", **ours},
            theirs,
            lambda a, b, theirs=theirs: module.MIOLoss(len(a), **theirs)(a, b),
            f"{source}, MIOLoss",
        )


def _load(checkout: Path, file: str) -> tuple[ModuleType, str]:
    """A module of a cloned repository, and its source."""
    spec = importlib.util.spec_from_file_location(Path(file).stem, checkout / file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    git = ["git", "-C", str(checkout), "rev-parse", "--short=10", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    return module, f"{checkout.resolve().name} {commit}, {file}"


def main() -> None:
    """Write the file of stored losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--miossl", type=Path, required=True, help="a clone of miossl/miossl")
    parser.add_argument("--spectral", type=Path, required=True, help="a clone of spectral_contrastive_learning")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    declare_torchvision_operators()
    warnings.filterwarnings("ignore", message="To copy construct from a tensor")  # from lightly's DCLW
    peers = [
        *lightly_peers(),
        *lightly_moment_peers(),
        *lightly_cosine_peers(),
        *open_clip_peers(),
        *spectral_peers(arguments.spectral),
        *mio_peers(arguments.miossl),
    ]
    entries = [
        {"loss": name, "settings": ours, "source": source, "source_settings": theirs, "seed": seed, "dtype": dtype}
        | measure(loss, seed, dtype, with_targets=name in WITH_TARGETS)
        for name, ours, theirs, loss, source in peers
        for seed in SHAPES
        for dtype in DTYPES
    ]
    # A seed gives the same numbers only while NumPy keeps the stream: the sums reveal a change.
    sums = {str(seed): [float(x.sum()) for x in draw_inputs(seed)] for seed in SHAPES}
    text = ",\n".join("  " + json.dumps(entry) for entry in entries)
    header = {"torch": torch.__version__, "numpy": np.__version__, "shapes": SHAPES, "input_sums": sums}
    arguments.out.write_text(
        f'{{"made_by": "benchmarks/make_stored_losses.py",\n{json.dumps(header)[1:-1]},\n"losses": [\n{text}\n]}}\n'
    )
    print(f"{len(entries)} numbers -> {arguments.out}")


if __name__ == "__main__":
    main()
