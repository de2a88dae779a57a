"""The page's plots as figures of Plotly: data, without the colours of the page's two themes."""

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastssl.report.gather import Gathered
from fastssl.report.pictures import Pictures, covariance_eigenvalues
from fastssl.tracking.representation import effective_rank

# Of runs and classes; readable on white and on black.
COLOURS = ("#3b82d6", "#e0702d", "#2fa36b", "#c4549f", "#8b70d8", "#a98a1f", "#22a2b5", "#d9534f", "#7f8c99", "#a0673d")
_DASHES = ("solid", "dash", "dot")
_MAX_POINTS = 2000  # of a curve
_MAX_COLUMNS = 200  # of a picture of histograms
_MAX_LEGEND = 20  # classes of a map that the legend names

# Kind of row (None: of steps, or of epochs where there are none), key, title, what it is, whether the axis begins at 0.
_CURVES = {
    "Training": (
        (None, "loss", "Loss", "", False),
        ("held_out", "knn_top1", "kNN accuracy", "top-1 on held-out images", False),
        ("epoch", "online_top1", "Probe accuracy", "linear classifier, top-1 on held-out images", False),
        (None, "grad_norm", "Gradient norm", "", True),
        (None, "learning_rate", "Learning rate", "", True),
        ("epoch", "skipped_steps", "Skipped steps", "of each epoch, for a gradient that is not finite", True),
    ),
    "Speed": (
        (None, "img_per_s", "Images per second", "source images", True),
        (None, "data_wait_fraction", "Data wait", "share of the time that steps wait for images", True),
        (None, "memory_bytes", "Memory", "bytes, largest so far: of the GPU, or of the process", True),
        ("epoch", "model_flop_utilisation", "Utilisation", "of the device's peak FLOP/s", True),
    ),
    "Representation": (
        ("epoch", "rankme_z", "RankMe of projections", "directions in use; 1: a line", True),
        ("epoch", "rankme_h", "RankMe of features", "directions in use; 1: a line", True),
        ("epoch", "lidar_z", "LiDAR of projections", "directions that tell images apart", True),
        ("epoch", "alpha_h", "Power law of the features", "exponent α of the covariance's eigenvalues", False),
        ("epoch", "std_z", "Spread of projections", "1: over the whole sphere; below 0.1: collapsed", True),
        ("epoch", "alignment_z", "Alignment", "mean squared distance of two views of an image; lower: closer", False),
        ("epoch", "uniformity_z", "Uniformity", "lower: more evenly spread", False),
        ("epoch", "similarity_gap", "Similarity gap", "views of one image minus those of two images", False),
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One plot.

    Attributes:
        title, note: Plain text above it.
        data, layout: Plotly's, JSON values; texts in them are escaped.
        sheet: Of a map: number of the sheet whose thumbnails its points show.
        is_tall: Whether it is higher than others.
    """

    title: str
    note: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    sheet: int | None = None
    is_tall: bool = False


def colour(number: int) -> str:
    """Of a run or class."""
    return COLOURS[number % len(COLOURS)]


def dash(number: int) -> str:
    """Style of a run's lines: runs of the same colour differ in it."""
    return _DASHES[number // len(COLOURS) % len(_DASHES)]


def draw_curves(runs: Sequence[Gathered]) -> dict[str, list[Figure]]:
    """The curves over the step, by section; what no run has is left out."""
    return {
        section: [figure for curve in curves if (figure := _curve(runs, *curve))] for section, curves in _CURVES.items()
    }


def draw_similarities(runs: Sequence[Gathered]) -> list[Figure]:
    """Histograms of the similarities of two views, after the last epoch that has them and over the training."""
    kinds = {"positive": "two views of one image", "negative": "views of two images"}
    last: list[dict[str, Any]] = []
    over_time: list[Figure] = []
    for number, run in enumerate(runs):
        for kind, words in kinds.items():
            steps, shares = _histograms(run, f"{kind}_counts")
            if not len(steps):
                continue
            middles = _middles(shares.shape[1])
            name = html.escape(words if len(runs) == 1 else f"{run.name}: {words}")
            line = {"color": colour(number), "dash": "solid" if kind == "positive" else "dot", "shape": "hvh"}
            hover = f"similarity %{{x:.2f}}: %{{y:.1%}} of the pairs<extra>{name}</extra>"
            last.append(_line(middles, shares[-1], name=name, line=line, hovertemplate=hover))
            heat = {
                "type": "heatmap", "x": _plain(steps), "y": _plain(middles), "z": _plain(np.sqrt(shares.T)),
                "customdata": _plain(shares.T), "colorscale": "Viridis", "showscale": False,
                "hovertemplate": "step %{x}, similarity %{y:.2f}: %{customdata:.1%} of the pairs<extra></extra>",
            }  # fmt: skip
            title = f"{words[0].upper()}{words[1:]}" + (f": {run.name}" if len(runs) > 1 else "")
            layout = {"xaxis": {"title": {"text": "step"}}, "yaxis": {"title": {"text": "similarity"}}}
            over_time.append(
                Figure(title=title, note="over the training; lighter: more pairs", data=[heat], layout=layout)
            )
    if not last:
        return []
    layout = {
        "xaxis": {"title": {"text": "cosine similarity of projections"}, "range": [-1, 1]},
        "yaxis": {"title": {"text": "share of the pairs"}, "tickformat": ".0%", "rangemode": "tozero"},
        "showlegend": True,
    }
    note = "at the last diagnosed epoch; a loss that tells images apart pulls the two histograms apart"
    return [Figure(title="Similarities", note=note, data=last, layout=layout), *over_time]


def draw_eigenvalues(runs: Sequence[Gathered], pictures: Sequence[Pictures | None]) -> Figure | None:
    """Eigenvalues of the covariance of each run's features, both axes logarithmic."""
    data = []
    for number, (run, found) in enumerate(zip(runs, pictures, strict=True)):
        if found is None:
            continue
        values = covariance_eigenvalues(found.features)
        values = values[values > 1e-9 * values[0]] if len(values) else values
        name = html.escape(run.name)
        hover = f"eigenvalue %{{x}}: %{{y:.3g}} of the variance<extra>{name}</extra>"
        line = {"color": colour(number), "dash": dash(number)}
        data.append(_line(np.arange(1, len(values) + 1), values, name=name, line=line, hovertemplate=hover))
    if not data:
        return None
    layout = {
        "xaxis": {"type": "log", "title": {"text": "rank"}, "dtick": 1},
        "yaxis": {"type": "log", "title": {"text": "share of the variance"}, "exponentformat": "power", "dtick": 1},
        "showlegend": len(runs) > 1,
    }
    note = "covariance of the features of the images below; a steep end means unused directions"
    return Figure(title="Eigenspectrum", note=note, data=data, layout=layout, is_tall=True)


def draw_map(run: Gathered, found: Pictures, sheet: int, several: bool) -> Figure:
    """The features on a plane, coloured by class; customdata of a point: number of its thumbnail, and its words."""
    classes = np.unique(found.labels)
    data = []
    for number, label in enumerate(classes):
        at = np.flatnonzero(found.labels == label)
        name = found.album.class_name(int(label)) or "no label"
        about = [[int(i), f"{name}, image {found.album.ids[i]}"] for i in at]
        data.append({
            "type": "scatter", "mode": "markers", "name": html.escape(name[:40]), "customdata": about,
            "x": _plain(found.place[at, 0]), "y": _plain(found.place[at, 1]), "hoverinfo": "none",
            "marker": {"size": 5, "opacity": 0.8, "color": _of_class(number, len(classes))},
        })  # fmt: skip
    axis = {"showticklabels": False, "showgrid": False, "zeroline": False, "ticks": ""}
    layout = {
        "xaxis": axis, "yaxis": axis | {"scaleanchor": "x"}, "hovermode": "closest", "hoverdistance": 20,
        "showlegend": 1 < len(classes) <= _MAX_LEGEND, "legend": {"itemsizing": "constant"},
    }  # fmt: skip
    title = f"Map by {found.projection}" + (f": {run.name}" if several else "")
    note = f"{len(found.labels):,} images after step {found.step:,}; the pointer shows the image"
    return Figure(title=title, note=note, data=data, layout=layout, sheet=sheet, is_tall=True)


def draw_hessian(runs: Sequence[Gathered]) -> Figure | None:
    """Densities of the eigenvalues of the loss's Hessian, of all checkpoints that `fastssl hessian` analysed."""
    data = []
    for number, run in enumerate(runs):
        for order, spectrum in enumerate(run.spectra, 1):
            name = html.escape(f"{run.name}, {spectrum.step}" if len(runs) > 1 else spectrum.step)
            line = {"color": colour(number), "dash": dash(number)}
            hover = f"eigenvalue %{{x:.4g}}: density %{{y:.3g}}<extra>{name}</extra>"
            shade = 0.3 + 0.7 * order / len(run.spectra)
            positive = np.maximum(spectrum.density, 1e-9 * spectrum.density.max())
            data.append(_line(spectrum.eigenvalues, positive, name=name, line=line, hovertemplate=hover, opacity=shade))
    if not data:
        return None
    layout = {
        "xaxis": {"title": {"text": "eigenvalue"}},
        "yaxis": {"type": "log", "title": {"text": "density"}, "exponentformat": "power", "dtick": 2},
        "showlegend": len(data) > 1,
    }
    return Figure(title="Density of the Hessian's eigenvalues", note="fastssl hessian", data=data, layout=layout)


def feature_rank(found: Pictures) -> float:
    """RankMe of the centred features: exp of the entropy of their singular values."""
    import torch

    return float(effective_rank(torch.from_numpy(covariance_eigenvalues(found.features)).sqrt()))


def _curve(runs: Sequence[Gathered], kind: str | None, key: str, title: str, note: str, from_0: bool) -> Figure | None:
    data = []
    for number, run in enumerate(runs):
        points = thinned(_points(run, kind, key) or (_points(run, "epoch", key) if kind is None else []))
        if not points:
            continue
        x, y = zip(*points, strict=True)
        name = html.escape(run.name)
        line = {"color": colour(number), "width": 1.6, "dash": dash(number)}
        hover = f"step %{{x:,}}: %{{y:.4~g}}<extra>{name if len(runs) > 1 else ''}</extra>"
        mode = "lines+markers" if len(points) < 30 else "lines"
        data.append(_line(x, y, name=name, line=line, hovertemplate=hover, mode=mode, marker={"size": 4}))
    if not data or all(value == 0 for trace in data for value in trace["y"]):
        return None
    is_share = key in ("knn_top1", "online_top1", "data_wait_fraction", "model_flop_utilisation")
    y_axis = {"rangemode": "tozero" if from_0 else "normal"} | ({"tickformat": ".0%"} if is_share else {})
    if is_share:
        for trace in data:
            trace["hovertemplate"] = trace["hovertemplate"].replace(".4~g", ".1%")
    layout = {"xaxis": {"title": {"text": "step"}}, "yaxis": y_axis}
    return Figure(title=title, note=note, data=data, layout=layout)


def _points(run: Gathered, kind: str | None, key: str) -> list[tuple[int, float]]:
    return [(row["step"], row[key]) for row in run.of_kind(kind) if is_number(row.get(key))]


def _histograms(run: Gathered, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps int64 [E] and shares of the bins float64 [E, bins] of the diagnosed epochs."""
    found = []
    for row in run.of_kind("epoch"):
        counts = row.get(key)
        if isinstance(counts, list) and len(counts) > 1 and all(map(is_number, counts)) and sum(counts) > 0:
            found.append((row["step"], np.asarray(counts, np.float64)))
    found = thinned([pair for pair in found if len(pair[1]) == len(found[-1][1])], _MAX_COLUMNS)
    if not found:
        return np.empty(0, np.int64), np.empty((0, 0))
    counts = np.stack([pair[1] for pair in found]).clip(0)
    return np.array([pair[0] for pair in found]), counts / counts.sum(1, keepdims=True)


def thinned(points: Sequence[Any], most: int = _MAX_POINTS) -> list[Any]:
    """At most so many of the points, evenly spaced, with the first and the last."""
    if len(points) <= most:
        return list(points)
    return [points[i] for i in np.linspace(0, len(points) - 1, most).astype(int)]


def is_number(value: Any) -> bool:
    """Whether a value of a JSON file can be drawn."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _line(x: Any, y: Any, **options: Any) -> dict[str, Any]:
    return {"type": "scatter", "mode": "lines", "x": _plain(x), "y": _plain(y)} | options


def _middles(num_bins: int) -> np.ndarray:
    edges = np.linspace(-1, 1, num_bins + 1)
    return (edges[1:] + edges[:-1]) / 2


def _of_class(number: int, num_classes: int) -> str:
    return colour(number) if num_classes <= len(COLOURS) else f"hsl({360 * number / num_classes:.0f},60%,52%)"


def _plain(values: Any) -> Any:
    """Numbers with five digits, which is more than a screen shows; whole numbers as they are."""
    array = np.asarray(values)
    if array.ndim > 1:
        return [_plain(row) for row in array]
    short: Callable[[Any], Any] = int if array.dtype.kind in "iu" else lambda value: float(f"{value:.5g}")
    return [short(value) for value in array.tolist()]
