"""`fastssl bench`: measures on the user's own file and machine."""

import sys
from collections.abc import Sequence
from pathlib import Path

from fastssl.commands.device_option import choose_device_option
from fastssl.config import build_config
from fastssl.errors import ConfigError
from fastssl.tracking.report import Report
from fastssl.tracking.result_rows import append_rows, environment_columns
from pipelines.bench.loader import Row, bench_loader
from pipelines.bench.streams import Job
from pipelines.loader import cores_per_process
from pipelines.shards.describe import short_name

SHOWN = {
    "measured": "measured",
    "img_per_s_p50": "img/s",
    "img_per_s_min": "min",
    "img_per_s_max": "max",
    "us_per_image": "us per image",
    "mb_per_s": "MB/s",
    "busy_elsewhere_fraction": "busy elsewhere",
    "note": "note",
}
DETAILS = ("us_per_image", "mb_per_s", "img_per_s_min", "img_per_s_max", "busy_elsewhere_fraction")
_PACKAGES = ("torch", "ffcv", "nvidia-dali-cuda130", "numba", "numpy", "pillow")


def bench_loader_on(
    beton: str,
    *,
    recipe: str,
    size_px: int | None,
    engines: Sequence[str],
    batch_size: int,
    num_threads: int | None,
    seconds: float,
    device: str,
    out: Path | None,
) -> Report:
    """Measure the engines on a .beton file, and find the machine's bottleneck; append rows to `out` if given.

    Args:
        beton: The .beton file, or a data set of many: its folder, manifest, pattern or URL.
        recipe: Name of a recipe, or a .yaml file with one.
        size_px: Side of every view; None: the recipe's.
        engines: Names of engines.
        batch_size: Images per batch.
        num_threads: Number of cores to use; None: all cores available to this process.
        seconds: Length of a timing window.
        device: "auto", "cpu" or "cuda".
        out: CSV file.
    Returns:
        A table of the measurements, and the bottleneck in words.
    Raises:
        ConfigError: a bad recipe or device, or `out` cannot be written.
        DataError: a bad file, engine, batch or number of threads.
    """
    data = {"train": beton, "global_batch_size": batch_size}
    cfg = build_config({"data": data, "views": {"recipe": recipe, "size_px": size_px}, "run": {"device": device}})
    job = Job(
        beton=beton,
        views=cfg.views,
        batch_size=batch_size,
        num_threads=cores_per_process() if num_threads is None else num_threads,
        seed=cfg.run.seed,
        device=str(choose_device_option(cfg.run.device)),
    )
    environment = environment_columns(_PACKAGES) if out else {}  # before the run, so that it has the measured commit
    report = bench_loader(job, engines, window_s=seconds, say=_say)
    rows = [_rounded(row) for row in report.rows]
    if report.warning:
        _say(f"warning: {report.warning}")
    own = {"beton": short_name(beton), "recipe": cfg.views.recipe, "size_px": size_px, "batch_size": batch_size}
    own |= {"num_threads": job.num_threads, "device": job.device, "window_s": seconds, "seed": job.seed}
    if out:
        try:
            append_rows(out, [row | own | environment for row in rows])
        except (OSError, ValueError) as error:
            raise ConfigError(f"--out: {out} cannot be written ({error})") from None
    return Report(
        values={"rows": report.rows, "advice": " ".join(report.sentences), "warning": report.warning, "settings": own},
        rows=rows,
        columns=SHOWN,
        details=DETAILS,
        foot=f"\n{' '.join(report.sentences)}",
    )


def _rounded(row: Row) -> Row:
    num_decimals = {"busy_elsewhere_fraction": 3}
    return {
        name: round(value, num_decimals.get(name, 1)) if isinstance(value, float) else value
        for name, value in row.items()
    }


def _say(message: str) -> None:
    print(f"fastssl bench: {message}", file=sys.stderr, flush=True)
