"""Seconds from `build_loader` to the first batch, with an empty and a filled numba cache, each in a new process.

python benchmarks/bench_startup.py photographs.beton --recipe byol
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # as a script, only benchmarks/ is on Python's path: add the repository root
    sys.path[0] = str(ROOT)

PACKAGES = ("torch", "ffcv", "numba", "numpy")
CACHES = ("empty", "filled")


def measure_startup(beton: Path, recipe: str, *, global_batch_size: int, cache_folder: Path | None) -> dict[str, Any]:
    """Start a process that makes one batch, and return its times in seconds.

    Args:
        beton: The training file.
        recipe: A key of `pipelines.views.RECIPES`.
        global_batch_size: Number of images of the batch.
        cache_folder: Folder of numba's cache; None: the default folder.
    Returns:
        import_s (torch and the pipelines), build_loader_s, first_batch_s, start_s (the sum
        of the last two), start_cpu_s (CPU time of start_s), compile_s (numba's share of start_s), and compiled, which
        has the seconds of each compiled function.
    Raises:
        RuntimeError: If the process failed; the message has its stderr.
    """
    settings = [str(beton), recipe, str(global_batch_size)]
    code = "import sys; from benchmarks.bench_startup import make_one_batch as f; f(*sys.argv[1:])"
    environment = os.environ | ({"NUMBA_CACHE_DIR": str(cache_folder)} if cache_folder else {})
    command = [sys.executable, "-c", code, *settings]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def make_one_batch(beton: str, recipe: str, global_batch_size: str) -> None:
    """Make the first batch of a run in this process and print `measure_startup`'s dictionary as JSON."""
    started = time.perf_counter()
    import torch
    from numba.core import event

    from pipelines.loader import DataConfig, build_loader, cores_per_process, open_train_images
    from pipelines.views import ViewsConfig

    cfg = DataConfig(train=beton, global_batch_size=int(global_batch_size))
    process = {"rank": 0, "world_size": 1, "device": torch.device("cpu"), "num_threads": cores_per_process()}
    reader = open_train_images(cfg)
    imported, imported_cpu_s = time.perf_counter(), time.process_time()
    with event.install_recorder("numba:compile") as recorder:
        loader = build_loader(reader, cfg, ViewsConfig(recipe=recipe), seed=0, **process)
        built = time.perf_counter()
        next(loader.epoch(0))
        first, cpu_s = time.perf_counter(), time.process_time() - imported_cpu_s
    compiled = compile_times(recorder.buffer)
    loader.close()
    found = {
        "import_s": imported - started,
        "build_loader_s": built - imported,
        "first_batch_s": first - built,
        "start_s": first - imported,
        "start_cpu_s": cpu_s,
        "compile_s": sum(compiled.values()),
        "compiled": compiled,
    }
    print(json.dumps(found))


def compile_times(events: list[tuple[float, Any]]) -> dict[str, float]:
    """Seconds of each outermost compilation by function name; these include the compilation of its callees."""
    seconds: dict[str, float] = {}
    starts: list[float] = []
    for when, event in events:  # events of two threads do not overlap: numba's compiler takes a lock
        if event.is_start:
            starts.append(when)
            continue
        duration = when - starts.pop()
        if not starts:
            name = event.data["dispatcher"].py_func.__name__
            seconds[name] = seconds.get(name, 0.0) + duration
    return seconds


def main() -> None:
    from fastssl.tracking.result_rows import append_rows, environment_columns, format_table

    args = _parse()
    rows = []
    for _ in range(args.num_repetitions):
        with tempfile.TemporaryDirectory() as folder:
            for cache in CACHES:
                found = measure_startup(
                    args.beton, args.recipe, global_batch_size=args.global_batch_size, cache_folder=Path(folder)
                )
                compiled = "; ".join(f"{name} {seconds:.1f}" for name, seconds in found.pop("compiled").items())
                settings = {"recipe": args.recipe, "global_batch_size": args.global_batch_size, "numba_cache": cache}
                rows.append(settings | {k: round(v, 2) for k, v in found.items()} | {"compiled_s": compiled})
    print(format_table(rows, list(rows[0])))
    if args.out:
        append_rows(args.out, [row | environment_columns(PACKAGES) for row in rows])


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("beton", type=Path, metavar="X.beton")
    parser.add_argument("--recipe", required=True, help="the views' recipe")
    parser.add_argument("--global-batch-size", type=int, default=64)
    parser.add_argument("--num-repetitions", type=int, default=3)
    parser.add_argument("--out", type=Path, help="CSV file to append the rows to")
    return parser.parse_args()


if __name__ == "__main__":
    main()
