"""`fastssl bench`: measures on the user's own file and machine."""

import sys
from collections.abc import Sequence
from pathlib import Path

from fastssl.config import build_config
from fastssl.errors import ConfigError
from fastssl.processes.launch import choose_device
from fastssl.tracking.result_rows import append_rows, environment_columns, format_table
from pipelines.bench.loader import bench_loader
from pipelines.bench.streams import Job
from pipelines.loader import cores_per_process

_PACKAGES = ("torch", "ffcv", "nvidia-dali-cuda130", "numba", "numpy", "pillow")


def bench_loader_on(
    beton: Path,
    *,
    recipe: str,
    size_px: int | None,
    engines: Sequence[str],
    batch_size: int,
    num_threads: int | None,
    seconds: float,
    device: str,
    out: Path | None,
) -> None:
    """Measure the engines on a .beton file, print a table and the machine's bottleneck; append rows to `out` if given.

    Args:
        beton: The .beton file.
        recipe: Name of a recipe, or a .yaml file with one.
        size_px: Side of every view; None: the recipe's.
        engines: Names of engines.
        batch_size: Images per batch.
        num_threads: Number of cores to use; None: all cores available to this process.
        seconds: Length of a timing window.
        device: "auto", "cpu" or "cuda".
        out: CSV file.
    Raises:
        ConfigError: a bad recipe or device, or `out` cannot be written.
        DataError: a bad file, engine, batch or number of threads.
    """
    data = {"train": str(beton), "global_batch_size": batch_size}
    cfg = build_config({"data": data, "views": {"recipe": recipe, "size_px": size_px}, "run": {"device": device}})
    job = Job(
        beton=str(beton),
        views=cfg.views,
        batch_size=batch_size,
        num_threads=cores_per_process() if num_threads is None else num_threads,
        seed=cfg.run.seed,
        device=_choose_device(cfg.run.device),
    )
    environment = environment_columns(_PACKAGES) if out else {}  # before the run, so that it has the measured commit
    report = bench_loader(job, engines, window_s=seconds, say=_say)
    print(format_table(report.rows, list(report.rows[0])))
    print(f"\n{' '.join(report.sentences)}")
    if report.warning:
        _say(f"warning: {report.warning}")
    if out:
        own = {"beton": beton.name, "recipe": cfg.views.recipe, "size_px": size_px, "batch_size": batch_size}
        own |= {"num_threads": job.num_threads, "device": job.device, "window_s": seconds, "seed": job.seed}
        try:
            append_rows(out, [row | own | environment for row in report.rows])
        except (OSError, ValueError) as error:
            raise ConfigError(f"--out: {out} cannot be written ({error})") from None


def _choose_device(wanted: str) -> str:
    try:
        return str(choose_device(wanted))
    except ConfigError as error:
        message = str(error).replace("--set run.device=", "--device ")
        raise ConfigError(message.replace("run.device", "--device")) from None


def _say(message: str) -> None:
    print(f"fastssl bench: {message}", file=sys.stderr, flush=True)
