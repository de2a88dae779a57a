"""`fastssl hessian RUN ...`: the eigenvalues of the loss's Hessian at checkpoints of one or several runs."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastssl.analysis.curvature import LossHessian, held_fixed, rebuild_loss, twice_differentiable
from fastssl.analysis.lanczos import (
    Density,
    Krylov,
    lanczos,
    mean_and_error,
    random_signs,
    spectral_density,
)
from fastssl.analysis.source import (
    BatchSettings,
    Source,
    checkpoints_at,
    full_fp32,
    hold_still,
    load_source,
    make_folder,
    open_run,
    write_table,
)
from fastssl.checkpoint.save_load import step_of
from fastssl.config import Config
from fastssl.errors import ConfigError
from fastssl.machine.environment import describe_environment
from fastssl.machine.files import replace_text
from fastssl.tracking.report import Report
from fastssl.tracking.result_rows import Value, environment_columns, rounded

TOLERANCE = 1e-3  # converged if residual norm / |largest eigenvalue| is below this
SHOWN = {
    name: name.replace("_", " ")
    for name in (
        "run", "loss", "step", "value", "largest", "smallest", "negative_share", "trace", "trace_error",
        "largest_over_trace", "smallest_over_largest", "num_converged", "held_fixed",
    )
}  # fmt: skip
DETAILS = (
    "negative_share", "trace_error", "num_converged", "held_fixed", "largest_over_trace", "smallest_over_largest",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class HessianSettings:
    """Accuracy settings of the spectrum.

    Attributes:
        num_probes: Number of random start vectors, for the density and the trace, >= 1.
        num_iterations: Hessian-vector products per start, >= 1.
        top_k: Number of largest eigenvalues to report, in [1, num_iterations].
        seed: Seed of the start vectors.
        batches: Which batches to use.
    """

    num_probes: int = 4
    num_iterations: int = 64
    top_k: int = 5
    seed: int = 0
    batches: BatchSettings = field(default_factory=BatchSettings)

    def __post_init__(self) -> None:
        for option, number in (("--num-probes", self.num_probes), ("--num-iterations", self.num_iterations)):
            if number < 1:
                raise ConfigError(f"{option} must be >= 1, got {number}")
        if not 1 <= self.top_k <= self.num_iterations:
            raise ConfigError(f"--top-k must be in [1, {self.num_iterations}] (--num-iterations), got {self.top_k}")
        if self.seed < 0:
            raise ConfigError(f"--seed must be >= 0, got {self.seed}")


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """Estimates of a Hessian's eigenvalues.

    Attributes:
        krylovs: The Lanczos result of each start, without its basis.
        eigenvalues: The largest eigenvalues, descending, float64 [k], from the first start.
        residuals: |H v - lambda v| of each with its Ritz vector v of norm 1, measured by one more product: an
            eigenvalue of H lies within this distance. float64 [k].
        smallest: The smallest Ritz value of the first start, and its residual as computed by Lanczos.
        trace: Hutchinson's estimate over the starts, and its standard error (None for a single start).
    """

    krylovs: list[Krylov]
    eigenvalues: np.ndarray
    residuals: np.ndarray
    smallest: tuple[float, float]
    trace: tuple[float, float | None]

    @property
    def is_converged(self) -> np.ndarray:
        """Which of the largest eigenvalues are within TOLERANCE, bool [k]."""
        return self.residuals <= TOLERANCE * np.abs(self.eigenvalues).max()

    @property
    def largest_over_trace(self) -> float | None:
        """Largest eigenvalue / trace estimate, dimensionless; None if the trace is 0."""
        return _ratio(float(self.eigenvalues[0]), self.trace[0])

    @property
    def smallest_over_largest(self) -> float | None:
        """|smallest eigenvalue| / largest eigenvalue, dimensionless; None if the largest is 0."""
        return _ratio(abs(self.smallest[0]), float(self.eigenvalues[0]))


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator else None


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What a plot of densities shows of one checkpoint.

    Attributes:
        label: Its name in the legend.
        density: The density.
        eigenvalues: The largest eigenvalues [k].
        run: Number of its run, which has a colour.
        shade: Strength of the colour, in (0, 1].
    """

    label: str
    density: Density
    eigenvalues: np.ndarray
    run: int = 0
    shade: float = 1.0


def find_spectrum(
    product: Callable[[Tensor], Tensor], like: Tensor, settings: HessianSettings, say: Callable[[str], None] = print
) -> Spectrum:
    """Density, largest eigenvalues and trace of a symmetric matrix from num_probes * num_iterations + top_k products.

    Args:
        product: v [P] -> H v [P].
        like: [P], a tensor with the size, dtype and device of the vectors.
        settings: Numbers of probes, iterations and eigenvalues.
        say: Called with progress messages.

    Raises:
        ConfigError: the matrix has fewer eigenvalues than top_k.
    """
    if settings.top_k > len(like):
        raise ConfigError(f"--top-k is {settings.top_k}, but the model has only {len(like)} parameters")
    krylovs: list[Krylov] = []
    top: tuple[np.ndarray, np.ndarray] = (np.empty(0), np.empty(0))
    for number in range(settings.num_probes):
        start = random_signs(len(like), settings.seed, number, like)
        found = lanczos(product, start, settings.num_iterations, keep_basis=number == 0)
        if number == 0:
            top = _measured(product, found, settings.top_k)
        krylovs.append(replace(found, basis=None))
        largest = found.values[-1]
        say(f"  probe {number + 1} of {settings.num_probes}: {len(found.values)} products, up to {largest:.4g}")
    return Spectrum(
        krylovs=krylovs,
        eigenvalues=top[0],
        residuals=top[1],
        smallest=(float(krylovs[0].values[0]), float(krylovs[0].residuals[0])),
        trace=mean_and_error([len(like) * krylov.first_moment for krylov in krylovs]),
    )


def _measured(product: Callable[[Tensor], Tensor], krylov: Krylov, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """The top_k largest Ritz values (fewer if the Krylov space is smaller), and the norms of their residuals."""
    indices = range(len(krylov.values) - 1, max(len(krylov.values) - top_k, 0) - 1, -1)
    values = krylov.values[list(indices)]
    vectors = [krylov.ritz_vector(index) for index in indices]
    residuals = [float((product(v) - value * v).norm()) for v, value in zip(vectors, values, strict=True)]
    return values, np.asarray(residuals)


@full_fp32()
def hessian_of_runs(
    runs: Sequence[Path],
    overrides: Sequence[str] = (),
    *,
    steps: Sequence[int | None] = (None,),
    settings: HessianSettings,
    out: Path | None = None,
    say: Callable[[str], None] = print,
) -> Report:
    """Compute the Hessian's spectrum at checkpoints of every run, and write tables and a plot.

    Args:
        runs: Folders of runs.
        overrides: `key=value` changes of their configurations.
        steps: Steps of the checkpoints of each run; None: its last.
        settings: Accuracy settings.
        out: Folder for the results; None: hessian/step_XXXXXXXX in the run. With several checkpoints, the folder for
            the common table and plot; None: hessian/compared in the first run.
        say: Called with progress messages.

    Returns:
        A table with one row per checkpoint.

    Raises:
        ConfigError: no run or checkpoint, or settings that do not fit it, or a loss without a Hessian.
        DataError: a file cannot be read.
    """
    if len(set(runs)) < len(runs):
        raise ConfigError(f"the run {max(runs, key=runs.count)} is given twice")
    opened = [(path, *open_run(path, overrides)) for path in runs]
    for _, _, cfg in opened:  # check everything before the long computation
        twice_differentiable(cfg)
    checkpoints = [checkpoints_at(folder, steps) for _, folder, _ in opened]
    if sum(map(len, checkpoints)) == 1:
        compared, targets = None, [[make_folder(out or opened[0][1].hessian / checkpoints[0][0].name)]]
    else:
        compared = make_folder(out or opened[0][1].hessian / "compared")
        runs_found = zip(opened, checkpoints, strict=True)
        targets = [[make_folder(folder.hessian / at.name) for at in found] for (_, folder, _), found in runs_found]
    rows: list[dict[str, Value]] = []
    curves: list[Curve] = []
    for number, (path, folder, cfg) in enumerate(opened):
        for order, (checkpoint, target) in enumerate(zip(checkpoints[number], targets[number], strict=True), 1):
            step, shade = step_of(checkpoint), order / len(targets[number])
            say(f"{path}, step {step}")
            source = load_source(folder, twice_differentiable(cfg), step=step, settings=settings.batches)
            row, curve = _analyse(source, cfg, settings, target, say)
            rows.append({"run": str(path)} | row | {"seed": cfg.run.seed})
            curves.append(replace(curve, label=f"{path}, step {step}", run=number, shade=shade))
    if compared:
        environment = environment_columns(("torch", "numpy"))
        write_table(compared / "spectra.csv", [row | environment for row in rows])
        draw_densities(curves, compared / "density.png")
    folder = compared or targets[0][0]
    shown = [rounded(row, 4) for row in rows]
    return Report(values={"rows": rows, "folder": folder}, rows=shown, columns=SHOWN, details=DETAILS, foot=str(folder))


def _analyse(
    source: Source, cfg: Config, settings: HessianSettings, out: Path, say: Callable[[str], None]
) -> tuple[dict[str, Value], Curve]:
    """Analyse one checkpoint: return its row and its curve, and write its files to `out`."""
    hessian = LossHessian(source.objective, source.batches, cfg.run.seed)
    value, gradient = hessian.loss_and_gradient()
    if not torch.isfinite(gradient).all():
        raise ConfigError(f"{source.folder.path}: the gradient at step {source.step} is not finite")
    spectrum = find_spectrum(hessian.product, gradient, settings, say)
    density = spectral_density(spectrum.krylovs)
    row: dict[str, Value] = {
        "loss": cfg.loss.name,
        "step": source.step,
        "num_parameters": hessian.size,
        "num_images": source.num_images,
        "batch_size": len(source.batches[0][0]),
        "value": value,
        "gradient_norm": float(gradient.norm()),
        "largest": float(spectrum.eigenvalues[0]),
        "smallest": spectrum.smallest[0],
        "negative_share": negative_share(spectrum.krylovs, density.width),
        "trace": spectrum.trace[0],
        "trace_error": spectrum.trace[1],
        "largest_over_trace": spectrum.largest_over_trace,
        "smallest_over_largest": spectrum.smallest_over_largest,
        "num_converged": int(spectrum.is_converged.sum()),
        "held_fixed": held_fixed(cfg.loss),
    }
    about: dict[str, Any] = {
        **row,
        "smallest_residual": spectrum.smallest[1],
        "tolerance": TOLERANCE,
        "density_width": density.width,
        "moments": density_moments(spectrum.krylovs),
        "gradient_difference": _difference_of_gradients(source, cfg, gradient),
        "settings": asdict(settings),
        "environment": describe_environment(world_size=1),
    }
    _write_spectrum(out, spectrum, density)
    curve = Curve(label=str(source.folder.path), density=density, eigenvalues=spectrum.eigenvalues)
    draw_densities([curve], out / "density.png")
    replace_text(out / "summary.json", json.dumps(about, indent=2) + "\n")
    return row, curve


def negative_share(krylovs: Sequence[Krylov], width: float) -> float:
    """The fraction of eigenvalues below -width, which excludes those that are 0 up to rounding."""
    return float(np.mean([krylov.weights[krylov.values < -width].sum() for krylov in krylovs]))


def density_moments(krylovs: Sequence[Krylov]) -> list[float]:
    """Estimates of tr(H^k)/P for k = 1 to 4, without the smoothing of the plotted density."""
    return [float(np.mean([krylov.weights @ krylov.values**k for krylov in krylovs])) for k in range(1, 5)]


def _difference_of_gradients(source: Source, cfg: Config, gradient: Tensor) -> float:
    """|g - g'|/|g'|: g is the gradient that is differentiated again, g' that of the run's own kernels."""
    source.objective.loss = rebuild_loss(source.objective.loss, cfg.loss, cfg.model.projector_dim)
    hold_still(source.objective)
    _, trained = LossHessian(source.objective, source.batches, cfg.run.seed).loss_and_gradient()
    return float((gradient - trained).norm() / trained.norm())


def _write_spectrum(out: Path, spectrum: Spectrum, density: Density) -> None:
    write_table(
        out / "density.csv",
        [{"eigenvalue": x, "density": y} for x, y in zip(density.eigenvalues, density.density, strict=True)],
    )
    write_table(
        out / "ritz_values.csv",
        [
            {"probe": number, "ritz_value": value, "weight": weight, "residual": residual}
            for number, krylov in enumerate(spectrum.krylovs)
            for value, weight, residual in zip(krylov.values, krylov.weights, krylov.residuals, strict=True)
        ],
    )
    found = zip(spectrum.eigenvalues, spectrum.residuals, spectrum.is_converged, strict=True)
    write_table(
        out / "eigenvalues.csv",
        [
            {"rank": rank, "eigenvalue": value, "residual": residual, "is_converged": int(converged)}
            for rank, (value, residual, converged) in enumerate(found, 1)
        ],
    )


def draw_densities(curves: Sequence[Curve], path: Path) -> None:
    """Plot densities over the eigenvalue, log over symlog, with the largest eigenvalues as ticks below.

    Args:
        curves: One for each checkpoint.
        path: The PNG file.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.2), layout="constrained")
    peak = max(float(curve.density.density.max()) for curve in curves)
    for curve in curves:
        color = color_of(curve)
        axis.plot(curve.density.eigenvalues, curve.density.density, color=color, linewidth=1.2, label=curve.label)
        axis.plot(curve.eigenvalues, np.full(len(curve.eigenvalues), 3e-9 * peak), "|", color=color, markersize=10)
    axis.set_xscale("symlog", linthresh=min(3 * curve.density.width for curve in curves))
    axis.set_yscale("log")
    axis.set_ylim(1e-9 * peak, 3 * peak)
    axis.set_xlabel("eigenvalue of the Hessian")
    axis.set_ylabel("density")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def color_of(curve: Curve) -> tuple[float, ...]:
    """The run's colour, mixed with white where the shade is less than 1; the palest keeps a quarter of it."""
    from matplotlib.colors import to_rgb

    strength = 0.25 + 0.75 * curve.shade
    return tuple(1 - strength * (1 - channel) for channel in to_rgb(f"C{curve.run % 10}"))
