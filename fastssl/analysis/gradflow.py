"""`fastssl gradflow RUN`: a loss's closed-form gradient against autograd, and its attraction and repulsion per pair."""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from fastssl.analysis.curvature import rebuild_loss, with_impl
from fastssl.analysis.pair_flow import PairFlow, pair_flow
from fastssl.analysis.source import (
    BatchSettings,
    Source,
    checkpoints_at,
    full_fp32,
    load_source,
    make_folder,
    open_run,
    write_table,
)
from fastssl.checkpoint.save_load import step_of
from fastssl.errors import ConfigError
from fastssl.losses import (
    DclConfig,
    DclwConfig,
    Loss,
    LossConfig,
    MioConfig,
    NtXentConfig,
    SigLipConfig,
    SpectralConfig,
    build_loss,
)
from fastssl.losses.mio import Negative
from fastssl.machine.environment import describe_environment
from fastssl.machine.files import replace_text
from fastssl.tracking.report import Report
from fastssl.tracking.result_rows import environment_columns, rounded

GRID = torch.linspace(-1, 1, 41, dtype=torch.float64)  # similarities, .05 apart
SHOWN = {
    "gradient": "gradient",
    "max_relative_difference": "max relative difference",
    "mean_relative_difference": "mean",
}
SERIES = {
    name: name.replace("_", " ")
    for name in (
        "step", "attraction", "repulsion", "positive_similarity", "negative_similarity", "projections_max_difference",
        "parameters_difference",
    )
}  # fmt: skip
DETAILS = ("projections_max_difference", "parameters_difference")


@dataclass(frozen=True, kw_only=True)
class Differences:
    """Differences between the closed-form gradient and autograd, relative to autograd.

    Attributes:
        rows: |difference|/|gradient| of dL/dz for every row, in fp64 from the same projections.
        parameters: The same for the gradient of each parameter tensor of the network, in fp32, relative to the norm of
            the whole gradient: the closed-form dL/dz backpropagated through the network, against the run's own loss.
        whole: |difference|/|gradient| over all parameters of the network.
    """

    rows: np.ndarray
    parameters: np.ndarray
    whole: float


@full_fp32()
def gradflow(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    steps: Sequence[int | None] = (None,),
    settings: BatchSettings,
    out: Path | None = None,
) -> Report:
    """Compare closed form and autograd at checkpoints, and write all objectives' coefficients over similarity.

    Args:
        path: The run's folder.
        overrides: `key=value` changes of its configuration.
        steps: Steps of the checkpoints; None: the last.
        settings: Which batches to use.
        out: Folder for the results; None: gradflow/step_XXXXXXXX in the run. With several checkpoints, the folder for
            their common table and plot; None: gradflow/compared in the run.

    Returns:
        A table: the maximum and the mean relative difference of the gradients of projections and parameters. With
        several checkpoints, a row for each, see `mean_flow`.

    Raises:
        ConfigError: no run or checkpoint, settings that do not fit it, more than two views, or a loss without a closed
            form.
        DataError: a file cannot be read.
    """
    folder, cfg = open_run(path, overrides)
    pair_flow(build_loss(cfg.loss, cfg.model.projector_dim), torch.eye(4).view(2, 2, 4))  # may raise ConfigError
    checkpoints = checkpoints_at(folder, steps)
    if len(checkpoints) == 1:
        out = make_folder(out or folder.gradflow / checkpoints[0].name)
        source = load_source(folder, cfg, step=step_of(checkpoints[0]), settings=settings)
        found, _ = _analyse(source, out)
        head = f"{_label(cfg.loss)} at step {source.step}: closed form against autograd"
        summary = _summary(found)
        values = {"loss": _label(cfg.loss), "step": source.step, "rows": summary, "folder": out}
        return Report(values=values, rows=[rounded(row, 3) for row in summary], columns=SHOWN, head=head, foot=str(out))
    out = make_folder(out or folder.gradflow / "compared")
    targets = [make_folder(folder.gradflow / checkpoint.name) for checkpoint in checkpoints]
    rows: list[dict[str, Any]] = []
    for target in targets:
        source = load_source(folder, cfg, step=step_of(target), settings=settings)
        found, flow = _analyse(source, target)
        differences = {"projections_max_difference": float(found.rows.max()), "parameters_difference": found.whole}
        about = {"loss": _label(cfg.loss), "step": source.step, "num_images": source.num_images}
        rows.append(about | flow | differences)
    environment = {"seed": cfg.run.seed} | environment_columns(("torch", "numpy"))
    write_table(out / "flow.csv", [row | environment for row in rows])
    draw_flow(rows, out / "flow.png")
    return Report(
        values={"loss": _label(cfg.loss), "rows": rows, "folder": out},
        rows=[rounded(row, 4) for row in rows],
        columns=SERIES,
        details=DETAILS,
        head=f"{_label(cfg.loss)}: means over the pairs of the first batch",
        foot=str(out),
    )


def _analyse(source: Source, out: Path) -> tuple[Differences, dict[str, float]]:
    """Analyse one checkpoint: return its differences and `mean_flow`, and write its files to `out`."""
    if len(source.batches[0]) != 2:
        num_views = len(source.batches[0])
        raise ConfigError(f"views.recipe: the closed form is for two views, but {source.folder.path} has {num_views}")
    found = compare_gradients(source)
    flow = mean_flow(source.objective.loss, _project(source, 0).double())
    rows = _coefficients(source)
    write_table(out / "coefficients.csv", rows)
    draw_coefficients(rows, out / "coefficients.png")
    summary = {
        "loss": source.cfg.loss.name,
        "step": source.step,
        "num_images": source.num_images,
        "batch_size": len(source.batches[0][0]),
        "gradients": _summary(found),
        "flow": flow,
        "environment": describe_environment(world_size=1),
    }
    replace_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    return found, flow


def mean_flow(loss: Loss, z: Tensor) -> dict[str, float]:
    """Means over the pairs of a batch: alpha and similarity of positive pairs, beta and similarity of negative pairs.

    Args:
        loss: The run's loss, with its learned state.
        z: Projections [2, N, D].
    """
    flow = pair_flow(loss, z)
    similarities = flow.similarities
    return {
        "attraction": float(flow.alpha().mean()),
        "repulsion": float(flow.beta()[flow.counted].mean()),
        "positive_similarity": float(similarities.diagonal(z.shape[1]).mean()),
        "negative_similarity": float(similarities[flow.counted].mean()),
    }


def compare_gradients(source: Source) -> Differences:
    """Compare closed form and autograd on every batch; the parameters' gradients on the first batch only."""
    projections = [_project(source, number) for number in range(len(source.batches))]
    rows = [row_differences(source.objective.loss, source.cfg.loss, z) for z in projections]
    parameters, whole = _parameter_differences(source)
    return Differences(rows=torch.cat(rows).numpy(), parameters=parameters.numpy(), whole=whole)


def row_differences(loss: Loss, config: LossConfig, z: Tensor) -> Tensor:
    """|closed form - autograd|/|autograd| of dL/dz for every row, in fp64: [2N].

    Args:
        loss: The run's loss, with its learned state.
        config: Its settings; fp64 uses separate kernels.
        z: Projections [2, N, D].
    """
    wide = rebuild_loss(loss, with_impl(config, "chunked"), z.shape[2]).double()
    z = z.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(wide(*z), z)
    difference = pair_flow(wide, z).gradient() - expected
    return (difference.norm(dim=2) / expected.norm(dim=2)).flatten().cpu()


def _parameter_differences(source: Source) -> tuple[Tensor, float]:
    """Relative differences for each parameter tensor, and for all together, on the first batch."""
    network = [p for p in source.objective.model.parameters() if p.requires_grad]
    z = torch.stack(source.objective.model(source.batches[0])[1])
    closed = pair_flow(source.objective.loss, z.double()).gradient().to(z)
    ours = torch.autograd.grad(z, network, closed, retain_graph=True, materialize_grads=True)
    expected = torch.autograd.grad(source.objective.loss(*z), network, materialize_grads=True)
    norm = torch.stack([x.double().norm() for x in expected]).norm()
    differences = torch.stack([(x - y).double().norm() for x, y in zip(ours, expected, strict=True)]) / norm
    return differences.cpu(), float(differences.norm())


@torch.no_grad()
def _project(source: Source, number: int) -> Tensor:
    """z [2, N, D] of a batch."""
    return torch.stack(source.objective.model(source.batches[number])[1])


def _summary(found: Differences) -> list[dict[str, Any]]:
    return [
        {
            "gradient": "projections, a row, fp64",
            "max_relative_difference": float(found.rows.max()),
            "mean_relative_difference": float(found.rows.mean()),
        },
        {
            "gradient": "parameters, a tensor of all, fp32",
            "max_relative_difference": float(found.parameters.max()),
            "mean_relative_difference": float(found.parameters.mean()),
        },
        {
            "gradient": "parameters, all together, fp32",
            "max_relative_difference": found.whole,
            "mean_relative_difference": None,
        },
    ]


def compared_objectives(config: LossConfig) -> dict[str, LossConfig]:
    """The run's own loss, then all others with a closed form, at the run's temperature if both have one."""
    own: float = getattr(config, "temperature_positive", getattr(config, "temperature", MioConfig.temperature_positive))
    negative: float = getattr(config, "temperature_negative", own)
    mio = partial(MioConfig, temperature_positive=own, temperature_negative=negative)
    forms: list[LossConfig] = [mio(negative=form) for form in get_args(Negative)]
    forms += [mio(negative="jensen", per_anchor=True)]
    forms += [NtXentConfig(temperature=own), DclConfig(temperature=own), DclwConfig(temperature=own)]
    forms += [SigLipConfig(), SpectralConfig()]
    return {_label(config): config} | {_label(form): form for form in forms if _label(form) != _label(config)}


def _label(config: LossConfig) -> str:
    if not isinstance(config, MioConfig):
        return config.name
    return f"mio {config.negative}{' per anchor' if config.per_anchor else ''}"


def _coefficients(source: Source) -> list[dict[str, Any]]:
    """Rows of objective, similarity, its alpha and beta, and the number of the run's pairs near it (first batch)."""
    z = _project(source, 0).double().cpu()
    counts = _count_pairs(z)
    rows: list[dict[str, Any]] = []
    for label, config in compared_objectives(source.cfg.loss).items():
        is_own = label == _label(source.cfg.loss)
        loss = copy.deepcopy(source.objective.loss).cpu() if is_own else build_loss(config)
        attraction, repulsion = pair_flow(loss, z).over_similarity(GRID)
        for similarity, alpha, beta, count in zip(GRID, attraction, repulsion, counts, strict=True):
            rows.append(
                {"objective": label, "of_this_run": int(is_own), "similarity": round(float(similarity), 4)}
                | {"attraction": float(alpha), "repulsion": float(beta)}
                | {"num_positive_pairs": int(count[0]), "num_negative_pairs": int(count[1])}
            )
    return rows


def _count_pairs(z: Tensor) -> Tensor:
    """Numbers of positive and negative pairs (each counted once) nearest to every point of GRID: int [41, 2]."""
    flow: PairFlow = pair_flow(build_loss(MioConfig()), z)
    s, num_samples = flow.similarities, z.shape[1]
    positive = s.diagonal(num_samples)
    negative = s[flow.counted & torch.ones_like(flow.counted).triu()]
    nearest = [((x.clamp(-1, 1) + 1) / 0.05).round().long().bincount(minlength=len(GRID)) for x in (positive, negative)]
    return torch.stack(nearest, 1)


def draw_coefficients(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot alpha and beta over similarity, one line per objective, the run's thick; its pairs as a shaded histogram.

    Args:
        rows: The rows of `coefficients.csv`.
        path: The PNG file.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(13, 4.6), layout="constrained")
    panels = (("attraction", "num_positive_pairs", "positive"), ("repulsion", "num_negative_pairs", "negative"))
    for axis, (key, count, pairs) in zip(axes, panels, strict=True):
        labels = list(dict.fromkeys(row["objective"] for row in rows))
        for number, label in enumerate(labels):
            points = [row for row in rows if row["objective"] == label]
            width, style = (3.0 if points[0]["of_this_run"] else 1.2), "-" if number < 10 else "--"
            x, y = [row["similarity"] for row in points], [row[key] for row in points]
            axis.plot(x, y, style, color=f"C{number % 10}", linewidth=width, label=label)
        axis.set_yscale("symlog", linthresh=0.1)
        axis.set_title(f"{key} of {pairs} pairs; shade: this run's pairs", fontsize=10)
        axis.set_xlabel("cosine similarity")
        axis.grid(alpha=0.3)
        shade = axis.twinx()
        own = [row for row in rows if row["objective"] == labels[0]]
        shade.bar([row["similarity"] for row in own], [row[count] for row in own], width=0.05, color="0.5", alpha=0.25)
        shade.set_yticks([])
    axes[0].set_ylabel("alpha")
    axes[1].set_ylabel("beta")
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_flow(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot mean alpha and beta, and the mean similarities of the pairs, over the steps of a series.

    Args:
        rows: The rows of `flow.csv`.
        path: The PNG file.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    panels = (("attraction", "repulsion"), ("positive_similarity", "negative_similarity"))
    for axis, names in zip(axes, panels, strict=True):
        for name in names:
            axis.plot([row["step"] for row in rows], [row[name] for row in rows], "o-", label=name.replace("_", " "))
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0].set_ylabel("alpha and beta, mean over the pairs")
    axes[1].set_ylabel("cosine similarity, mean over the pairs")
    figure.savefig(path, dpi=120)
    plt.close(figure)
