"""Finds the bottleneck of data loading on a machine and what to change: a pure function of the measurements."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from pipelines.bench.stages import COPY

Bound = Literal["disk", "decode", "crop and resize", "augmentation", "copy to GPU", "nothing"]

_CEILING_REACHED = 0.9  # fraction of the synthetic engine's speed
_WORTH_A_CHANGE = 1.05  # speed-up that makes a change worthwhile
_WORTH_ANOTHER_ORDER = 1.5
_DEFAULT_ENGINE = "ffcv"


@dataclass(frozen=True, kw_only=True)
class Figures:
    """The measurements and their conditions.

    Attributes:
        engines_img_per_s: Speed of each measured engine, reading from memory; at least one.
        synthetic_img_per_s: Speed of the synthetic engine, the ceiling; None: not measured.
        disk_img_per_s: Speed of the disk in epoch order, without the page cache; None: not measured.
        disk_sequential_img_per_s: The same, read sequentially.
        stages_s: From `measure_stages`: seconds per image on one core (GPU seconds for COPY and, if COPY is there, the
            pixel op).
        num_threads: Number of threads in the measurement.
        num_cores: Number of cores available to this process.
        num_file_bytes: Size of the file.
        fits_in_memory: Whether the page cache can hold the file, so that only the first epoch reads the disk.
        image_px: Median of the images' longer sides.
        view_px: Side of the largest view.
        blurs: Whether the recipe uses blur.
    """

    engines_img_per_s: Mapping[str, float]
    synthetic_img_per_s: float | None
    disk_img_per_s: float | None
    disk_sequential_img_per_s: float | None
    stages_s: Mapping[str, float]
    num_threads: int
    num_cores: int
    num_file_bytes: int
    fits_in_memory: bool
    image_px: int
    view_px: int
    blurs: bool

    @property
    def fastest(self) -> str:
        """The fastest engine."""
        return max(self.engines_img_per_s, key=self.engines_img_per_s.__getitem__)

    @property
    def img_per_s(self) -> float:
        """The fastest engine's speed."""
        return self.engines_img_per_s[self.fastest]

    @property
    def has_gpu(self) -> bool:
        """Whether the batches go to a GPU."""
        return COPY in self.stages_s


def find_bound(figures: Figures) -> Bound:
    """Find the bottleneck of the fastest engine: among disk, cores, copy and GPU, the one with the fewest images/s.

    For the cores, the largest part of their time is returned; drawing the augmentation counts as augmentation.
    """
    f, stages_s = figures, figures.stages_s
    if f.disk_img_per_s is not None and _reads_disk(f) and f.disk_img_per_s < f.img_per_s:
        return "disk"
    if f.synthetic_img_per_s is not None and f.img_per_s >= _CEILING_REACHED * f.synthetic_img_per_s:
        return "nothing"
    on_cores_s: dict[Bound, float] = {
        "decode": 0.0 if f.fastest == "resident" else stages_s.get("decode", 0.0),
        "crop and resize": stages_s["crop and resize"],
        "augmentation": stages_s["draw"] + (0.0 if f.has_gpu else stages_s["pixel op"]),
    }
    times_s: dict[Bound, float] = {
        max(on_cores_s, key=on_cores_s.__getitem__): sum(on_cores_s.values()) / f.num_threads
    }
    if f.has_gpu:
        times_s |= {"copy to GPU": stages_s[COPY] if f.fastest in ("ffcv", "torch") else 0.0}
        times_s["augmentation"] = max(times_s.get("augmentation", 0.0), stages_s["pixel op"])
    return max(times_s, key=times_s.__getitem__)


def advice(figures: Figures) -> list[str]:
    """At most three sentences: the bottleneck of this machine, what to change, and further remarks."""
    bound = find_bound(figures)
    remedies = list(_remedies(figures, bound))
    change = f"To change that: {'; or '.join(remedies)}." if remedies else "No setting of the loader changes that."
    return [_what_bounds(figures, bound), change, *list(_what_else(figures, bound))[:1]]


def _reads_disk(f: Figures) -> bool:
    return not f.fits_in_memory and f.fastest != "resident"


def _what_bounds(f: Figures, bound: Bound) -> str:
    engine = f"engine {f.fastest} loads {f.img_per_s:,.0f} images a second"
    if bound == "disk":
        return (
            f"The disk bounds this machine: in an epoch's order it gives {f.disk_img_per_s:,.0f} images a second, "
            f"{engine} from memory, which is too small for the file ({f.num_file_bytes / 1e9:.1f} GB)."
        )
    ceiling = "" if f.synthetic_img_per_s is None else f" of {f.synthetic_img_per_s:,.0f} that the synthetic one makes"
    if bound == "nothing":
        return f"Nothing bounds this machine but the synthetic ceiling, which is reached: {engine}{ceiling}."
    names = {"decode": "Decoding", "crop and resize": "Crop and resize", "augmentation": "Augmentation"}
    return f"{names.get(bound, 'The copy to the GPU')} bounds this machine: {engine}{ceiling}{_share(f, bound)}."


def _share(f: Figures, bound: Bound) -> str:
    """The bottleneck's share of the cores' time per image, if the cores do this work."""
    if f.has_gpu or f.fastest != _DEFAULT_ENGINE:
        return ""
    parts = {"augmentation": ("draw", "pixel op")}.get(bound, (bound,))
    on_cores_s = sum(seconds for name, seconds in f.stages_s.items() if name != "loader")
    return f", and {sum(f.stages_s[part] for part in parts) / on_cores_s:.0%} of an image's time goes there"


def _remedies(f: Figures, bound: Bound) -> Iterator[str]:
    """Yield changes that would help, as configuration keys and commands."""
    wanted_px = 2 * f.view_px
    if bound in ("disk", "decode", "crop and resize") and f.image_px > wanted_px:
        yield f"smaller images (`fastssl convert --max-px {wanted_px}`; half of them have {f.image_px} px or more)"
    if bound == "disk":
        if (f.disk_sequential_img_per_s or 0.0) > _WORTH_ANOTHER_ORDER * (f.disk_img_per_s or 0.0):
            yield f"data.order=quasi_random (in sequence the disk gives {f.disk_sequential_img_per_s:,.0f})"
        yield "a faster disk"
        yield "more memory than the file is long"
    if bound in ("decode", "crop and resize") or (bound in ("augmentation", "nothing") and not f.has_gpu):
        yield _more_cores(f)
    if bound in ("decode", "crop and resize") and "dali" not in f.engines_img_per_s:
        yield "data.engine=dali" if f.has_gpu else "a GPU with data.engine=dali"
    if bound in ("augmentation", "nothing"):
        if f.blurs:
            yield "less blur (views.override={blur_p: 0.1})"
        if not f.has_gpu:
            yield "a GPU, where one kernel augments"
    if bound == "copy to GPU":
        yield "smaller or fewer views (views.size_px, views.recipe)"
        yield "data.engine=dali or resident, which cut the views on the GPU"


def _more_cores(f: Figures) -> str:
    if f.num_threads < f.num_cores:
        return f"more threads (data.num_workers={f.num_cores}, run.num_threads={f.num_cores})"
    return "more cores (data.num_workers=0 and run.num_threads=0 take all)"


def _what_else(f: Figures, bound: Bound) -> Iterator[str]:
    default = f.engines_img_per_s.get(_DEFAULT_ENGINE)
    if f.fastest != _DEFAULT_ENGINE and default is not None and f.img_per_s > _WORTH_A_CHANGE * default:
        yield f"data.engine={f.fastest} is {f.img_per_s / default:.1f} times as fast here as {_DEFAULT_ENGINE}."
    if f.disk_img_per_s is not None and f.disk_img_per_s < f.img_per_s and bound != "disk":
        yield (
            f"The first epoch waits for the disk, which gives {f.disk_img_per_s:,.0f} images a second in its order; "
            "later ones find the file in memory (data.cache=ram brings it there before)."
        )
