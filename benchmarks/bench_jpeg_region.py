"""CPU time of decoding only what the views show, compared with decoding whole JPEGs; in alternation, on one core."""

from __future__ import annotations

import argparse
import os
import sys
import time
from contextlib import closing
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from fastssl.tracking.result_rows import Value, append_rows, environment_columns, format_table
from pipelines.bench.streams import Job, JpegSamples, build_job_loader, in_order
from pipelines.beton import JPG
from pipelines.engines.jpeg_region import why_no_region_decoder
from pipelines.shards.open_images import open_images
from pipelines.views import ViewsConfig, build_view_specs, draw

_WHOLE, _SEEN = "whole", "seen"
_NUM_BATCHES = 8
_RESULTS = Path(__file__).resolve().parent / "results"


def measure(job: Job, num_repetitions: int) -> dict[str, dict[str, list[float]]]:
    """CPU seconds per image of "decode" and of the "loader", both ways, one value a repetition.

    Args:
        job: A file of JPEGs, and what is loaded from it; one thread is used.
        num_repetitions: Timed repetitions; one untimed one before them compiles. The order of the two ways alternates.
    """
    images, order = in_order(job, open_images(job.beton))
    if images.stored_modes != (JPG,):
        raise ValueError("the images are not stored as JPEG")
    if reason := why_no_region_decoder():
        raise ValueError(reason)
    first_batch = order.num_batches - _NUM_BATCHES
    with closing(order.epoch(0, first_batch, 0, 1)) as epoch:
        samples = [group.samples for group in epoch.groups()]
    specs = build_view_specs(job.views)
    boxes = [draw(specs, job.seed, 0, each.ids, each.sizes)["crop_box"] for each in samples]
    num_images, jpegs = sum(map(len, samples)), JpegSamples()
    seen_loader = build_job_loader(job, engine="ffcv")
    with mock.patch("pipelines.engines.decode_crop.why_no_region_decoder", return_value="not used"):
        whole_loader = build_job_loader(job, engine="ffcv")

    def decode(way: str) -> None:
        for each, drawn in zip(samples, boxes, strict=True):
            jpegs.decode(each, drawn if way == _SEEN else None)

    def load(way: str) -> None:
        loader = seen_loader if way == _SEEN else whole_loader
        for _ in loader.epoch(0, first_batch=first_batch):
            pass

    spent_s = {name: {_WHOLE: [], _SEEN: []} for name in ("decode", "loader")}
    for repetition in range(num_repetitions + 1):
        for name, work in (("decode", decode), ("loader", load)):
            for way in (_WHOLE, _SEEN) if repetition % 2 else (_SEEN, _WHOLE):
                start_s = time.process_time()
                work(way)
                if repetition:
                    spent_s[name][way].append((time.process_time() - start_s) / num_images)
    seen_loader.close()
    whole_loader.close()
    return spent_s


def main(argv: list[str] | None = None) -> int:
    """Measure, print and record.

    Returns:
        Exit code: 0; 2 for bad input, after printing one line.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("beton", metavar="X", help=".beton of JPEGs")
    parser.add_argument("--recipe", default="byol", help="views (default: byol)")
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=_RESULTS / "jpeg_region.csv", help="CSV to append to")
    args = parser.parse_args(argv)
    environment = environment_columns(["torch", "numba", "numpy"])
    job = Job(beton=args.beton, views=ViewsConfig(recipe=args.recipe), batch_size=64, num_threads=1, seed=args.seed)
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[:1])
    try:
        measured = measure(job, args.repetitions)
    except ValueError as error:  # also DataError
        print(f"bench_jpeg_region: error: {error}", file=sys.stderr)
        return 2
    finally:
        os.sched_setaffinity(0, cores)
    rows: list[dict[str, Value]] = []
    for name, by_way in measured.items():
        whole, seen = np.array(by_way[_WHOLE]), np.array(by_way[_SEEN])
        ratios = whole / seen
        rows.append(
            {
                "measured": name,
                "whole_cpu_us_p50": round(1e6 * float(np.median(whole)), 1),
                "seen_cpu_us_p50": round(1e6 * float(np.median(seen)), 1),
                "whole_cpu_us_min": round(1e6 * float(whole.min()), 1),
                "seen_cpu_us_min": round(1e6 * float(seen.min()), 1),
                "speedup_p50": round(float(np.median(ratios)), 3),
                "speedup_min": round(float(ratios.min()), 3),
                "speedup_max": round(float(ratios.max()), 3),
                "recipe": args.recipe,
                "repetitions": args.repetitions,
                "seed": args.seed,
            }
        )
    append_rows(args.out, [row | environment for row in rows])
    print(format_table(rows, list(rows[0])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
