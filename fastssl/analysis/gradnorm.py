"""`fastssl gradnorm RUN`: the gradients of several losses at the weights of one run, their norms and variances.

# B images of a batch in two views, D projection; P parameters of the run's encoder and projector
# g_k [P] the gradient of a loss on batch k, K batches

All losses get the same projections z [2, B, D] of every batch. A target network has the run's own weights, so it gives
the same projections; a predictor has its initial weights; a moment (MINC, TiCo) is the running average over the batches
before, as in a training whose weights stand still.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fastssl.analysis.source import (
    full_fp32,
    hold_still,
    load_objective,
    make_folder,
    open_run,
    stream_batches,
    write_table,
)
from fastssl.checkpoint.save_load import checkpoint_of, step_of
from fastssl.config import load_config
from fastssl.errors import ConfigError, UserError
from fastssl.losses import LOSSES, Loss, LossConfig, NtXentConfig, build_loss
from fastssl.processes.launch import choose_device, num_threads_of
from fastssl.tracking.report import Report
from fastssl.tracking.result_rows import environment_columns
from pipelines.views import build_view_specs

NUM_FIRST_BATCHES = 20  # they start the moments and are not measured
REFERENCE = "simclr"  # with its default temperature, .5
SHOWN = {
    "loss": "loss",
    "batch_size": "batch",
    "projections_norm": "|g| projections",
    "relative_to_simclr": "/ simclr",
    "parameters_norm": "|g| parameters",
    "relative_variance": "variance / |g|^2",
    "cosine_to_first": "cosine to first",
}


class Network(Protocol):
    """Maps the views of a batch to features and projections, V tensors [B, F] and V tensors [B, D]."""

    def __call__(self, views: list[Tensor], /) -> tuple[list[Tensor], list[Tensor]]: ...


@dataclass(frozen=True, kw_only=True)
class GradientSize:
    """The gradients of one loss on K batches.

    Attributes:
        projections_norm: Mean over the batches of |dL/dz|, over all rows.
        mean: The mean gradient of the parameters over the batches, fp64 [P].
        variance: Trace of the covariance of g_k: sum_k |g_k - mean|^2 / (K - 1).
        num_batches: K.
    """

    projections_norm: float
    mean: Tensor
    variance: float
    num_batches: int

    @property
    def squared_norm(self) -> float:
        """|E g|^2, without the share of the variance in |mean|^2; it may be negative where K is small."""
        return float(self.mean @ self.mean) - self.variance / self.num_batches

    @property
    def relative_variance(self) -> float | None:
        """variance/|E g|^2, which does not change with the loss's scale; None if K is too small to tell."""
        return self.variance / self.squared_norm if self.squared_norm > 0 else None


class _Sums:
    """Running sums over the batches of one loss."""

    def __init__(self) -> None:
        self.norm = self.squares = 0.0
        self.gradient: Tensor | None = None
        self.count = 0

    def add(self, projections: Tensor, gradient: Tensor) -> None:
        wide = gradient.double()
        self.norm += float(projections.double().norm())
        self.squares += float(wide @ wide)
        self.gradient = wide if self.gradient is None else self.gradient + wide
        self.count += 1

    def result(self) -> GradientSize:
        if self.gradient is None or self.count < 2:
            raise ValueError(f"a variance needs two batches or more, got {self.count}")
        mean = self.gradient / self.count
        variance = (self.squares - self.count * float(mean @ mean)) / (self.count - 1)
        return GradientSize(
            projections_norm=self.norm / self.count, mean=mean, variance=max(variance, 0.0), num_batches=self.count
        )


def measure_gradients(
    network: Network,
    parameters: Sequence[Tensor],
    losses: Mapping[str, Loss],
    batches: Iterator[list[Tensor]],
    *,
    num_batches: int,
) -> dict[str, GradientSize]:
    """Measure the gradients of losses on the same batches.

    Args:
        network: Maps views to projections; its calls must not change buffers.
        parameters: Its parameters, those to take gradients of.
        losses: Losses by name, in training mode: their moments follow the batches.
        batches: The views of each batch; the first `NUM_FIRST_BATCHES` only start the moments.
        num_batches: K >= 2, the number of batches that are measured.
    """
    for views in islice(batches, NUM_FIRST_BATCHES):
        with torch.no_grad():
            z = torch.stack(network(views)[1])
            for loss in losses.values():
                _value(loss, z)
    sums = {name: _Sums() for name in losses}
    for views in islice(batches, num_batches):
        z = torch.stack(network(views)[1])
        for name, loss in losses.items():
            leaf = z.detach().requires_grad_()
            (slope,) = torch.autograd.grad(_value(loss, leaf), leaf)
            parts = torch.autograd.grad(z, parameters, slope, retain_graph=True, materialize_grads=True)
            sums[name].add(slope, torch.cat([part.flatten() for part in parts]))
    return {name: found.result() for name, found in sums.items()}


def _value(loss: Loss, z: Tensor) -> Tensor:
    return loss(*z) if loss.target_momentum is None else loss(*z, targets=list(z.detach()))


@full_fp32()
def gradnorm(
    path: Path,
    configs: Sequence[Path] = (),
    *,
    base: Sequence[Path] = (),
    overrides: Sequence[str] = (),
    step: int | None = None,
    batch_sizes: Sequence[int] = (),
    num_batches: int = 20,
    out: Path | None = None,
) -> Report:
    """Compare the gradients of losses at a checkpoint of a run; write gradnorm.csv.

    Args:
        path: The run's folder.
        configs: YAML files, of which the `loss:` section is used; a file's stem is its name in the table. Empty: every
            loss with its default settings.
        base: YAML files that are read before each of them.
        overrides: `key=value` changes of the run's configuration.
        step: Step of the checkpoint; None: the last.
        batch_sizes: Images per batch, each >= 2; empty: the run's global batch size.
        num_batches: Number of batches to measure, >= 2.
        out: Folder for gradnorm.csv; None: gradnorm/step_XXXXXXXX in the run.

    Returns:
        A table with a row for each loss and batch size, see docs/analysis.md.

    Raises:
        UserError: a bad number, or two losses of one name.
        ConfigError: no run or checkpoint, a bad configuration, or other than two views.
        DataError: a file cannot be read.
    """
    if num_batches < 2:
        raise UserError(f"--num-batches must be >= 2, got {num_batches}: a variance needs two")
    if wrong := [size for size in batch_sizes if size < 2]:
        raise UserError(f"--batch-sizes must be >= 2, got {wrong[0]}: every loss compares different images")
    names = [config.stem for config in configs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"two configurations are named {twice}, the name in the table: rename one")
    compared = {config.stem: load_config([*base, config], []).loss for config in configs}
    compared = compared or {name: config(name=name) for name, (config, _) in LOSSES.items()}
    folder, cfg = open_run(path, overrides)
    if (num_views := len(build_view_specs(cfg.views))) != 2:
        raise ConfigError(f"views.recipe: gradients are compared for two views, but {path} has {num_views}")
    checkpoint = checkpoint_of(folder.checkpoints, step)
    device = choose_device(cfg.run.device)
    torch.set_num_threads(num_threads_of(cfg.run))
    objective = load_objective(cfg, checkpoint).to(device)
    hold_still(objective)
    parameters = [p for p in objective.model.parameters() if p.requires_grad]
    target = make_folder(out or folder.gradnorm / checkpoint.name)
    rows: list[dict[str, Any]] = []
    for batch_size in batch_sizes or [cfg.data.global_batch_size]:
        losses = _build(compared, cfg.model.projector_dim, cfg.run.seed, device)
        with closing(stream_batches(cfg, batch_size, device)) as batches:
            found = measure_gradients(objective.model, parameters, losses, batches, num_batches=num_batches)
        rows += [{"step": step_of(checkpoint), "batch_size": batch_size} | row for row in table_rows(found)]
    environment = environment_columns(("torch", "numpy"))
    write_table(target / "gradnorm.csv", [row | {"seed": cfg.run.seed} | environment for row in rows])
    head = f"gradients of {len(compared)} losses at step {step_of(checkpoint)} of {path}, {num_batches} batches"
    file = target / "gradnorm.csv"
    return Report(values={"rows": rows, "file": file}, rows=rows, columns=SHOWN, head=head, foot=str(file))


def _build(compared: Mapping[str, LossConfig], width: int, seed: int, device: torch.device) -> dict[str, Loss]:
    """The losses, after the reference for the norms under the name ""; predictors are drawn with the run's seed."""
    losses: dict[str, Loss] = {}
    for name, config in {"": NtXentConfig(), **compared}.items():
        torch.manual_seed(seed)
        losses[name] = build_loss(config, width).to(device).train()
    return losses


def table_rows(found: Mapping[str, GradientSize]) -> list[dict[str, Any]]:
    """A row for each loss; the first entry, the reference, has none."""
    (_, reference), *compared = found.items()
    first = compared[0][1].mean
    return [
        {
            "loss": name,
            "num_batches": size.num_batches,
            "projections_norm": _short(size.projections_norm),
            f"relative_to_{REFERENCE}": _short(size.projections_norm / reference.projections_norm),
            "parameters_norm": _short(max(size.squared_norm, 0.0) ** 0.5),
            "variance": _short(size.variance),
            "relative_variance": None if size.relative_variance is None else _short(size.relative_variance),
            "cosine_to_first": _short(float(torch.nn.functional.cosine_similarity(size.mean, first, dim=0))),
        }
        for name, size in compared
    ]


def _short(value: float) -> float:
    return float(f"{value:.4g}")
