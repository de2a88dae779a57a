"""Training throughput of fastssl and Lightly on one device: SimCLR with the same network, batch and images.

    python benchmarks/bench_training.py --cifar10 cifar10_train.beton --photographs photos.beton --out rows.csv

Each contestant trains in a process of its own on the same images, read from the same .beton file; they are measured in
turn. A round has two windows: with the contestant's own loader and augmentation, and on batches that stay on the device
("held"), which shows what the step alone would allow. Lightly's loop is the one of its documentation; the second form
has what users add for speed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import chain, count, cycle, islice
from pathlib import Path
from typing import Any, TextIO

if __name__ == "__main__":  # as a script, only benchmarks/ is on Python's path: add the repository root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch import nn

from fastssl.config import load_config
from fastssl.models.backbones import build_backbone
from fastssl.tracking.result_rows import append_rows, environment_columns, format_table
from fastssl.tracking.writers import StepTimer
from fastssl.trainer import start_alone
from pipelines.beton import JPG, BetonReader
from pipelines.errors import DataError, one_line

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "torchvision", "triton", "deepspeed", "ffcv", "numpy", "pillow", "lightly")
SHOWN = ("workload", "contestant", "img_per_s", "ratio_to_lightly", "held_img_per_s", "data_wait_fraction", "peak_mb")
SHOWN += ("note",)
FIGURES = {"img_per_s": 1, "held_img_per_s": 1, "data_wait_fraction": 4}  # of a round, and their digits
NUM_HELD_BATCHES = 2
NUM_WARM_UP = 12  # steps: they compile, and capture a CUDA graph
ENDLESS = ("run.resume=never", "train.num_epochs=1000000", "run.checkpoint_every_epochs=1000000", "eval.every_epochs=0")
PREFETCH_FACTOR = 2  # torch's default: batches that each worker of a DataLoader prepares ahead
START_S = 300.0  # for a process to start and compile


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is trained.

    Attributes:
        config: Files of our configuration.
        overrides: Its overrides.
        crop_px: Side of a view.
        hidden: Width of the projector's hidden layer.
        lightly: Arguments of Lightly's SimCLRTransform, as its documentation sets them for such images.
    """

    config: tuple[str, ...]
    overrides: tuple[str, ...]
    crop_px: int
    hidden: int
    lightly: dict[str, Any]


SAME = ("loss.temperature=0.5", "optim.name=sgd", "optim.momentum=0", "optim.warmup_epochs=0", "optim.base_lr=0.06")
WORKLOADS = {
    "cifar10": Workload(
        config=("configs/data/cifar10.yaml", "configs/loss/simclr_small.yaml"),
        overrides=("data.engine=resident", "data.global_batch_size=512", "views.recipe=simclr", *SAME),
        crop_px=32,
        hidden=512,
        lightly={"input_size": 32, "gaussian_blur": 0.0},
    ),
    "photographs": Workload(
        config=("configs/data/imagenet.yaml", "configs/loss/simclr_imagenet.yaml"),
        overrides=("data.global_batch_size=256", "data.holdout_fraction=0", "views.recipe=mocov2", *SAME),
        crop_px=224,
        hidden=2048,
        lightly={"input_size": 224},
    ),
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One contestant's measurement, as its process is told."""

    contestant: str
    workload: str
    beton: str
    seconds: float
    device: str
    overrides: list[str]


@dataclass(frozen=True, kw_only=True)
class Training:
    """A training that is ready for its first step.

    Attributes:
        fit: Takes one step on each batch.
        batches: The loader's batches, without end.
        hold: A copy of a batch that may be used again, on the device.
        batch_size: B, images.
        num_ahead: Batches that are ready before the first window: as many steps are taken before.
    """

    fit: Callable[[Iterable[Any]], None]
    batches: Iterator[Any]
    hold: Callable[[Any], Any]
    batch_size: int
    num_ahead: int


def start_fastssl(job: Job, *, compiled: bool) -> Training:
    """Our trainer, with its probe and its diagnostics; its step is captured in a CUDA graph where there is a GPU."""
    workload = WORKLOADS[job.workload]
    keys = (f"data.train={job.beton}", "data.test=null", f"run.device={job.device}", f"train.compile={compiled}")
    folder = tempfile.mkdtemp()
    overrides = [*workload.overrides, *keys, *ENDLESS, f"run.dir={folder}/run", *job.overrides]
    trainer = start_alone(load_config([ROOT / part for part in workload.config], overrides))
    trainer.epoch_stats.timer.start()
    return Training(
        fit=trainer.fit_batches,
        batches=chain.from_iterable(trainer.loader.epoch(epoch) for epoch in count()),
        hold=lambda batch: replace(batch, views=[view.clone() for view in batch.views]),
        batch_size=trainer.cfg.data.global_batch_size,
        num_ahead=trainer.cfg.data.prefetch_batches + 1,
    )


def start_lightly(job: Job, *, tuned: bool) -> Training:
    """The loop of Lightly's SimCLR example: its transform, head and loss, torch's DataLoader and SGD.

    `tuned` adds what users add for speed: bf16 autocast, channels-last, torch.compile, a fused optimizer, pinned memory
    and workers that stay. Both have a worker per core.
    """
    from lightly.loss import NTXentLoss  # pyright: ignore[reportMissingImports]
    from lightly.models.modules.heads import SimCLRProjectionHead  # pyright: ignore[reportMissingImports]
    from lightly.transforms import SimCLRTransform  # pyright: ignore[reportMissingImports]

    workload = WORKLOADS[job.workload]
    keys = [f"data.train={job.beton}", "data.test=null", "run.dir=unused", *workload.overrides, *job.overrides]
    cfg = load_config([ROOT / part for part in workload.config], keys)
    device, num_workers = torch.device(job.device), len(os.sched_getaffinity(0))
    torch.manual_seed(cfg.run.seed)
    backbone, num_features = build_backbone(cfg.model, workload.crop_px)
    head = SimCLRProjectionHead(num_features, workload.hidden, cfg.model.projector_dim)
    model: Any = nn.Sequential(backbone, head).to(device)
    form: dict[str, Any] = {}
    if tuned:
        torch.backends.cudnn.benchmark = True
        model = model.to(memory_format=torch.channels_last)
        form = {"memory_format": torch.channels_last, "non_blocking": True}
    criterion = NTXentLoss()  # its temperature is .5
    optimizer = torch.optim.SGD(model.parameters(), lr=cfg.optim.base_lr, fused=tuned)
    run = torch.compile(model) if tuned and device.type == "cuda" else model
    kept: dict[str, Any] = {"pin_memory": device.type == "cuda", "persistent_workers": True} if tuned else {}
    loader = torch.utils.data.DataLoader(
        Images(Path(job.beton), SimCLRTransform(**workload.lightly)),
        batch_size=cfg.data.global_batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=num_workers,
        prefetch_factor=PREFETCH_FACTOR,
        **kept,
    )

    def fit(batches: Iterable[Any]) -> None:
        total_loss = torch.zeros((), device=device)
        for views, _ in batches:
            x0, x1 = (view.to(device, **form) for view in views)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=tuned):
                loss = criterion(run(x0), run(x1))
            total_loss += loss.detach()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return Training(
        fit=fit,
        batches=chain.from_iterable(loader for _ in count()),
        hold=lambda batch: ([view.to(device, **form) for view in batch[0]], batch[1]),
        batch_size=cfg.data.global_batch_size,
        num_ahead=PREFETCH_FACTOR * num_workers,
    )


class Images(torch.utils.data.Dataset):
    """The images of a .beton file as Pillow images, as torchvision's data sets give them, after a transform."""

    def __init__(self, path: Path, transform: Callable[[Any], Any]) -> None:
        self._reader, self._transform = BetonReader(path), transform

    def __len__(self) -> int:
        return self._reader.num_samples

    def __getitem__(self, i: int) -> tuple[Any, int]:
        from PIL import Image

        if self._reader.modes[i] == JPG:
            image = Image.open(io.BytesIO(self._reader.image_bytes(i).tobytes())).convert("RGB")
        else:
            image = Image.fromarray(self._reader.decode(i))
        return self._transform(image), int(self._reader.labels[i])


CONTESTANTS: dict[str, Callable[[Job], Training]] = {
    "fastssl": lambda job: start_fastssl(job, compiled=True),
    "fastssl, not compiled": lambda job: start_fastssl(job, compiled=False),
    "Lightly, tuned": lambda job: start_lightly(job, tuned=True),
    "Lightly, as documented": lambda job: start_lightly(job, tuned=False),
}


# -- in a contestant's process


def measure(training: Training, job: Job) -> dict[str, float]:
    """One round: source images per second, of which two views each are trained on, on held batches and on new ones."""
    device = torch.device(job.device)
    held = [training.hold(batch) for batch in islice(training.batches, NUM_HELD_BATCHES)]
    of_held = timed(training, cycle(held), job.seconds / 2, device)
    training.fit(islice(training.batches, training.num_ahead))  # what was ready before the round
    own = timed(training, training.batches, job.seconds, device)
    return own | {"held_img_per_s": of_held["img_per_s"]}


def timed(training: Training, batches: Iterator[Any], seconds: float, device: torch.device) -> dict[str, float]:
    training.fit(islice(batches, 2))
    synchronize(device)
    timer = StepTimer()
    timer.start()
    training.fit(until(timer.waiting(batches, training.batch_size), time.perf_counter() + seconds))
    synchronize(device)
    return timer.read("step")


def until(batches: Iterator[Any], end_s: float) -> Generator[Any, None, None]:
    """The batches that are asked for before `end_s`, of time.perf_counter(); at least one."""
    yield next(batches)
    while time.perf_counter() < end_s:
        yield next(batches)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def serve(job: Job, answers: TextIO) -> None:
    """Start the training and answer each line of the input with a round's figures, as a line of JSON."""
    try:
        training = CONTESTANTS[job.contestant](job)
        training.fit(islice(training.batches, NUM_WARM_UP))
        peak = torch.cuda.max_memory_allocated() / 1e6 if job.device == "cuda" else None
        print(json.dumps({"peak_mb": peak and round(peak, 1)}), file=answers, flush=True)
        for _ in sys.stdin:
            print(json.dumps(measure(training, job)), file=answers, flush=True)
    except (ImportError, DataError, ValueError, RuntimeError) as error:
        print(json.dumps({"error": f"{type(error).__name__}: {one_line(error)[:300]}"}), file=answers, flush=True)
    os._exit(0)  # workers end with their parent; nothing of the run is kept


# -- in the main process


class Contestant:
    """A contestant's process, which waits whenever it is not asked."""

    def __init__(self, job: Job) -> None:
        command = [sys.executable, __file__, "--job", json.dumps(asdict(job))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.limit_s = START_S + 10 * job.seconds
        self.reason: str | None = None  # why there are no figures

    def ask(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            print(file=self._process.stdin, flush=True)

    def receive(self) -> dict[str, float]:
        """Wait for an answer; an empty one and a reason if none comes."""
        if self.reason:
            return {}
        timer = threading.Timer(self.limit_s, self._process.kill)
        timer.start()
        line = self._process.stdout.readline() if self._process.stdout else ""
        timer.cancel()
        answer: dict[str, Any] = (
            json.loads(line) if line else {"error": f"its process ended with code {self._process.wait()}"}
        )
        self.reason = answer.pop("error", None)
        return answer

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def compare(args: argparse.Namespace, workload: str, beton: Path) -> list[dict[str, Any]]:
    """One row per contestant; all start at once, then are asked in turn, round by round."""
    shared = {"workload": workload, "beton": str(beton.resolve()), "seconds": args.seconds}
    shared |= {"device": args.device, "overrides": args.set}
    found = {name: Contestant(Job(contestant=name, **shared)) for name in args.contestants}
    try:
        peaks = {name: contestant.receive().get("peak_mb") for name, contestant in found.items()}
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in found}
        for _ in range(args.rounds):
            for name, contestant in found.items():
                print(f"{workload}: {name}", file=sys.stderr, flush=True)
                contestant.ask()
                if figures := contestant.receive():
                    rounds[name].append(figures)
    finally:
        for contestant in found.values():
            contestant.close()
    rows = []
    for name, contestant in found.items():
        row: dict[str, Any] = {"workload": workload, "contestant": name}
        for key, digits in FIGURES.items():
            values = [figures[key] for figures in rounds[name]]
            row[key] = round(statistics.median(values), digits) if values else None
        note = f"not measured: {contestant.reason}" if contestant.reason else ""
        rows.append(row | {"peak_mb": peaks[name], "note": note})
    peers = [row["img_per_s"] for row in rows if row["contestant"].startswith("Lightly") and row["img_per_s"]]
    for row in rows:
        row["ratio_to_lightly"] = round(row["img_per_s"] / max(peers), 2) if peers and row["img_per_s"] else None
    return rows


def main() -> int:
    """Measure, print and record.

    Returns:
        Exit code: 0; 2 for bad input, after printing one line.
    """
    args = _parse()
    if args.job:
        # What libraries print goes to the errors: the answers alone are the output.
        answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        serve(Job(**json.loads(args.job)), answers)
    environment = environment_columns(PACKAGES)
    for workload in WORKLOADS:
        if not (beton := getattr(args, workload)):
            continue
        try:
            BetonReader(beton)
        except DataError as error:
            print(f"bench_training: error: {one_line(error)}", file=sys.stderr)
            return 2
        rows = compare(args, workload, beton)
        print(format_table(rows, SHOWN), flush=True)
        if args.out:
            fixed = {
                "device": args.device,
                "window_s": args.seconds,
                "num_rounds": args.rounds,
                "overrides": " ".join(args.set),
            }
            append_rows(args.out, [row | fixed | environment for row in rows])
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--cifar10", type=Path, metavar="X", help=".beton of CIFAR-10's training images")
    parser.add_argument("--photographs", type=Path, metavar="X", help=".beton of photographs")
    parser.add_argument("--contestants", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    parser.add_argument("--seconds", type=float, default=8.0, help="length of a window (default: 8)")
    parser.add_argument("--rounds", type=int, default=3, help="windows of each contestant, in turn (default: 3)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override a key")
    parser.add_argument("--out", type=Path, metavar="X.csv", help="file to append the rows to")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.job and not args.cifar10 and not args.photographs:
        parser.error("give --cifar10 or --photographs, or both")
    if args.seconds <= 0 or args.rounds < 1:
        parser.error("--seconds must be > 0 and --rounds >= 1")
    return args


if __name__ == "__main__":
    sys.exit(main())
