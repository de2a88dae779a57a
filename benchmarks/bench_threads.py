"""Training steps on a CPU with threads that spin or sleep while they wait, alone and next to busy programs.

python benchmarks/bench_threads.py --out benchmarks/results/threads.csv
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from fastssl.tracking.result_rows import Row, append_rows, environment_columns, format_table

# Six convolutions of 64 channels with batch norm, batch 64 at 32 px: forward, backward and SGD.
_STEPS = """
import sys, time
import torch
from torch import nn
seconds = float(sys.argv[2])
torch.set_num_threads(int(sys.argv[1]))
torch.manual_seed(0)
layers = []
for i in range(6):
    layers += [nn.Conv2d(64 if i else 3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
optimizer = torch.optim.SGD(model.parameters(), 0.1)
x, y = torch.randn(64, 3, 32, 32), torch.randint(0, 10, (64,))
num, start = -3, 0.0
while num < 0 or time.perf_counter() - start < seconds:
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    num += 1
    if num == 0:
        start = time.perf_counter()
print(64 * num / (time.perf_counter() - start))
"""
_WAITS = {"spinning": {}, "sleeping": {"OMP_WAIT_POLICY": "passive"}}
_SET_BY_US = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")


def main() -> None:
    """Measure in turn, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each window (default: 3)")
    parser.add_argument("--out", type=Path, metavar="X.csv")
    args = parser.parse_args()
    num_cores = len(os.sched_getaffinity(0))
    variants = [(1, "sleeping"), (num_cores, "spinning"), (num_cores, "sleeping")]
    rows: list[Row] = []
    for num_busy in (0, num_cores):
        rates: dict[tuple[int, str], list[float]] = {variant: [] for variant in variants}
        with busy_programs(num_busy):
            for _ in range(args.repetitions):
                for num_threads, wait in variants:
                    rates[num_threads, wait].append(img_per_s(num_threads, wait, args.seconds))
        for (num_threads, wait), found in rates.items():
            rows.append(
                {
                    "busy_programs": num_busy,
                    "num_threads": num_threads,
                    "threads_wait": wait,
                    "img_per_s_p50": round(float(np.median(found)), 1),
                    "img_per_s_min": round(min(found), 1),
                    "img_per_s_max": round(max(found), 1),
                    "repetitions": args.repetitions,
                    "window_s": args.seconds,
                }
            )
    print(format_table(rows, list(rows[0])))
    if args.out:
        environment = environment_columns(("torch",))
        append_rows(args.out, [row | environment for row in rows])


def img_per_s(num_threads: int, wait: str, seconds: float) -> float:
    """Images per second of training steps in a process of its own: OpenMP reads the variables once."""
    environment = {name: value for name, value in os.environ.items() if name not in _SET_BY_US} | _WAITS[wait]
    command = [sys.executable, "-c", _STEPS, str(num_threads), str(seconds)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return float(done.stdout)


@contextmanager
def busy_programs(num: int) -> Iterator[None]:
    """So many other programs that compute all the time."""
    programs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(num)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


if __name__ == "__main__":
    main()
