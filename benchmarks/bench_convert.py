"""Images per second from a folder of images to a .beton file: ours, FFCV's DatasetWriter, and decoding alone.

python benchmarks/bench_convert.py photographs/ --out benchmarks/results/convert.csv
"""

import argparse
import contextlib
import io
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # as a script, only benchmarks/ is on Python's path: add the repository root
    sys.path[0] = str(ROOT)

PACKAGES = ("ffcv", "numpy", "pillow", "torch", "opencv-python-headless")
COLUMNS = (
    "provider", "num_images", "img_per_s_p50", "img_per_s_min", "img_per_s_max", "ratio_to_ffcv", "ratio_to_decoding",
    "file_bytes",
)  # fmt: skip
TARGET_RATIO = 5.0


def files_of(folder: str) -> list[tuple[str, int]]:
    """Path and label of each image, as `fastssl convert` finds them."""
    from pipelines.convert.sources import SourceOptions, build_source

    source = build_source("folder", folder, SourceOptions())
    return [(str(item.image), item.label) for item in source.read(0, source.num_items)]


class PillowFolder:
    """A folder of images as FFCV's examples pass it to DatasetWriter: decoded by Pillow in the worker processes."""

    def __init__(self, folder: str) -> None:
        self._items = files_of(folder)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, i: int) -> tuple:
        from PIL import Image

        path, label = self._items[i]
        with Image.open(path, formats=("JPEG", "PNG")) as image:
            return image.convert("RGB"), label


def ours(folder: str, out: Path, num_workers: int) -> None:
    """Check JPEG files and keep their bytes, encode others as JPEG, with one thread per available core."""
    from pipelines.convert import convert

    convert("folder", folder, out, overwrite=True)


def ffcv_writer(folder: str, out: Path, num_workers: int) -> None:
    """Decode each file with Pillow and encode it again as JPEG at FFCV's own quality, in `num_workers` processes."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    fields = {"image": RGBImageField(write_mode="jpg"), "label": IntField()}
    images = PillowFolder(folder)
    # Its workers take chunks of at most 100: as many for each.
    num_chunks = num_workers * math.ceil(len(images) / (100 * num_workers))
    writer = DatasetWriter(str(out), fields, num_workers=num_workers)
    with contextlib.redirect_stderr(io.StringIO()):  # hides its progress bar
        writer.from_indexed_dataset(images, chunksize=math.ceil(len(images) / num_chunks))


def decoding(folder: str, out: Path, num_workers: int) -> None:
    """Read and decode each file as ours reads it, with one thread per core; nothing is written."""
    from pipelines.convert import bounded_map
    from pipelines.convert.images import read_upright

    paths = [path for path, _ in files_of(folder)]
    tasks = [paths[first : first + 8] for first in range(0, len(paths), 8)]

    def read(task: list[str]) -> int:
        return sum(len(read_upright(path)) for path in task)

    sum(bounded_map(read, tasks, ThreadPoolExecutor(num_workers), max_ahead=2 * num_workers))


PROVIDERS: dict[str, tuple[str, Callable[[str, Path, int], None]]] = {
    "ours": ("fastssl convert", ours),
    "ffcv": ("FFCV DatasetWriter, jpg", ffcv_writer),
    "decoding": ("decoding alone", decoding),
}


def measure(folder: str, *, num_workers: int, num_repetitions: int) -> list[dict]:
    """Convert the folder with each provider in alternation, after one untimed conversion each.

    Both write to one folder. Our time includes the checksums, the hashes and fsync; FFCV's writer has none of them.

    Args:
        folder: Images, flat or in class folders.
        num_workers: Number of processes of FFCV's writer and of cores of this process.
        num_repetitions: Number of timed conversions of each provider.
    Returns:
        One row per provider: COLUMNS, num_workers and repetitions.
    """
    from fastssl.tracking.result_rows import spread
    from pipelines.beton import BetonReader

    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:num_workers])
    rates: dict[str, list[float]] = {key: [] for key in PROVIDERS}
    found: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as place:
        for repetition in range(num_repetitions + 1):
            for key, (name, write) in PROVIDERS.items():
                out = Path(place) / f"{key}.beton"
                started_s = time.perf_counter()
                write(folder, out, num_workers)
                wall_s = time.perf_counter() - started_s
                if out.exists():
                    num_images, num_bytes = BetonReader(out).num_samples, out.stat().st_size
                else:
                    num_images, num_bytes = found["ours"]["num_images"], 0
                found[key] = {"provider": name, "num_images": num_images, "file_bytes": num_bytes}
                if repetition:
                    rates[key].append(num_images / wall_s)
    rows = []
    for key in PROVIDERS:
        rate = spread(rates[key])
        ratios = {
            f"ratio_to_{other}": round(rate["p50"] / spread(rates[other])["p50"], 2) for other in list(PROVIDERS)[1:]
        }
        speeds = {f"img_per_s_{name}": round(value, 1) for name, value in rate.items()}
        settings = {"num_workers": num_workers, "repetitions": num_repetitions}
        rows.append(found[key] | speeds | ratios | settings)
    return rows


def verdict(rows: list[dict]) -> str:
    """State the target and whether the first row reaches it."""
    ratio = rows[0]["ratio_to_ffcv"]
    reached = "PASS" if ratio >= TARGET_RATIO else "MISS"
    return f"beside FFCV's DatasetWriter: {ratio:.1f}, target >= {TARGET_RATIO:.0f}: {reached}"


def main() -> None:
    from fastssl.tracking.result_rows import append_rows, environment_columns, format_table
    from pipelines.errors import DataError

    args = _parse()
    try:
        rows = measure(str(args.folder), num_workers=args.num_workers, num_repetitions=args.num_repetitions)
    except DataError as error:
        print(f"bench_convert: error: {error}", file=sys.stderr)
        sys.exit(2)
    print(format_table(rows, COLUMNS))
    print(verdict(rows))
    if args.out:
        append_rows(args.out, [row | environment_columns(PACKAGES) for row in rows])


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="images")
    parser.add_argument("--num-workers", type=int, default=2, help="cores; FFCV's writer gets as many processes")
    parser.add_argument("--num-repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path, help="CSV file to append the rows to")
    args = parser.parse_args()
    if args.num_workers < 1 or args.num_repetitions < 1:
        parser.error("--num-workers and --num-repetitions must be at least 1")
    return args


if __name__ == "__main__":
    main()
