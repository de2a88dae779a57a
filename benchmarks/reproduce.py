"""Reproduce a row of a table from the images: convert, train, choose a checkpoint, evaluate it on the test images.

    python benchmarks/reproduce.py --row cifar10-mio-exp --data data --out runs/reproduce

The images are a copy of the data set in its usual layout: CIFAR-10, CIFAR-100 and STL-10 as torchvision reads them,
tiny-imagenet-200, ImageNet's train/ and val/ with a folder for each class. benchmarks/README.md has more.

Of the kept checkpoints, the one with the best weighted kNN on held-out training images is chosen. Then the last one and
the chosen one are evaluated on the test images, once each, with kNN and a linear classifier. After a kill, the same
command continues and does not repeat finished parts.

OUT contains results.csv, with a row for every accuracy; data/, the converted images; and ROW_EPOCHSep_seedSEED/, the
run, which includes curve.csv, with a row for every epoch, and curve.png.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from math import gcd
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np

if __name__ == "__main__":  # as a script, only benchmarks/ is on Python's path: add the repository root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from fastssl.config import Config, load_config
from fastssl.errors import ConfigError, UserError
from fastssl.tracking.result_rows import Row, append_rows, environment_columns, format_table
from fastssl.tracking.run_folder import RunFolder
from fastssl.tracking.writers import read_rows
from pipelines.beton import BetonReader
from pipelines.convert import convert
from pipelines.convert.sources import read_class_list
from pipelines.errors import DataError

ROOT = Path(__file__).resolve().parent.parent
# Data set -> its recipe: which of the files in configs/loss. Decoded images of the small sets fit into memory.
SETS = {
    "cifar10": "small",
    "cifar100": "small",
    "stl10": "small",
    "tiny_imagenet": "small",
    "imagenet100": "imagenet",
    "imagenet": "imagenet",
}
LOSSES: dict[str, tuple[str, tuple[str, ...]]] = {
    "mio-exp": ("mio", ()),
    "mio-jensen": ("mio", ("loss.negative=jensen",)),
    "simclr": ("simclr", ()),
    "minc": ("minc", ()),
    "spectral": ("spectral", ()),
}
# The name of a row -> the files of its configuration, and its overrides.
ROWS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    f"{images}-{name}": ((f"data/{images}.yaml", f"loss/{loss}_{recipe}.yaml"), changes)
    for images, recipe in SETS.items()
    for name, (loss, changes) in LOSSES.items()
} | {
    "cifar10-mio-exp-b512": (("mio_resnet18_cifar10_200ep_b512.yaml",), ()),
    "cifar10-mio-jensen-b512": (("mio_resnet18_cifar10_200ep_b512.yaml",), ("loss.negative=jensen",)),
    "cifar10-simclr-b512": (("simclr_resnet18_cifar10_200ep_b512.yaml",), ()),
    "cifar10-minc-b512": (("data/cifar10.yaml", "loss/minc_small.yaml"), ("data.global_batch_size=512",)),
    "cifar10-spectral-b512": (("data/cifar10.yaml", "loss/spectral_small.yaml"), ("data.global_batch_size=512",)),
}
# CIFAR's data sets: torchvision's name and folder.
CIFAR = {"cifar10": ("CIFAR10", "cifar-10-batches-py"), "cifar100": ("CIFAR100", "cifar-100-python")}
NUM_CLASSES_IMAGENET100 = 100
IMAGENET_MAX_PX = 512
# Keys that are set by an option of this program.
TAKEN = {
    "run.dir": "--out",
    "run.seed": "--seed",
    "run.device": "--device",
    "run.resume": "the same command",
    "run.keep_every_epochs": "--keep-every",
    "train.num_epochs": "--epochs",
    "data.train": "--data",
    "data.test": "--data",
}
PACKAGES = ("torch", "torchvision", "triton", "deepspeed", "ffcv", "numpy")
HELD_OUT, TEST = "held-out training images", "test images"
CHECKPOINT_EVERY_EPOCHS = 10  # a kill loses at most this many epochs
MIN_IMAGES = 300  # 30 of them are held out, and 200 can be neighbours
SHOWN = ("row", "seed", "epochs", "metric", "percent", "scored_on", "checkpoint", "checkpoint_step")

Split = Literal["train", "test"]
Line = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Job:
    """The row to reproduce, and its settings.

    Attributes:
        row: The name in ROWS.
        config: The files of the configuration.
        cfg: The configuration of the run, with all overrides.
        overrides: The overrides that the training is started with.
        data: Folder of the images.
        classes: imagenet100: the file with the names of its classes, one a line; None: all folders.
        out: Folder of the results.
        keep_every: A checkpoint is kept and evaluated every `keep_every` epochs.
        limit: Use only the first `limit` images of each file; 0: all.
        device: Device of the run and its evaluation.
    """

    row: str
    config: list[Path]
    cfg: Config
    overrides: list[str]
    data: Path
    classes: Path | None
    out: Path
    keep_every: int
    limit: int
    device: str

    @property
    def images(self) -> str:
        """The data set, a key of SETS."""
        return self.row.partition("-")[0]

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.cfg.run.dir)

    @property
    def steps_per_epoch(self) -> int:
        return BetonReader(self.cfg.data.train).num_samples // self.cfg.data.global_batch_size

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.cfg.train.num_epochs


def main(argv: Sequence[str] | None = None) -> int:
    """Reproduce one row and print its table; for bad input, print one line to stderr and return 2."""
    try:
        print(reproduce(build_job(parse(argv))), flush=True)
    except (UserError, DataError) as error:
        print(f"reproduce: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 2
    return 0


def reproduce(job: Job) -> str:
    """Run the unfinished parts and return the table of the row's accuracies."""
    with _alone(job.out):
        prepare(job, "train")
        prepare(job, "test")
    train(job)
    steps = kept_steps(job)
    for num_left, step in zip(reversed(range(len(steps))), steps, strict=True):
        if (seconds := judge(job, step, HELD_OUT, ["knn"], "kept")) and num_left:
            _say(f"checkpoints to judge: {num_left}, left {timedelta(seconds=round(num_left * seconds))}")
    write_curve(job)
    best = best_step(job, steps)
    for name, step in (("last", steps[-1]), ("best", best)):
        judge(job, step, TEST, ["knn", "linear"], name)
    shutil.rmtree(job.folder.features, ignore_errors=True)  # 120 MB per checkpoint
    return f"{format_table(_rows_of(job), SHOWN)}\n{job.out / 'results.csv'}, {job.folder.path}"


def prepare(job: Job, split: Split) -> None:
    """Make the .beton file of a split from the images in job.data, unless it exists.

    Raises:
        DataError: If no images of the split are found, or if the file holds other classes than those of job.classes.
    """
    out = Path(job.cfg.data.train if split == "train" else str(job.cfg.data.test))
    if out.exists():
        if job.classes and BetonReader(out).class_names != read_class_list(job.classes):
            raise DataError(f"{out} holds other classes than {job.classes}: give another --out")
        return
    _say(f"converting the {split} images in {job.data} -> {out}")
    out.parent.mkdir(parents=True, exist_ok=True)
    if job.images in CIFAR:
        _convert_arrays(out, *load_cifar(job.data, split, job.limit, job.images))
    elif job.images == "stl10":
        if not (job.data / "stl10_binary").is_dir():
            raise DataError(f"--data {job.data} holds no STL-10: torchvision's folder stl10_binary")
        name = "train+unlabeled" if split == "train" else "test"
        convert("torchvision", "STL10", out, root=str(job.data), split=name, on_error="fail", resume=True)
    elif job.images == "tiny_imagenet":
        _convert_tiny_imagenet(job.data, split, out)
    else:
        _convert_imagenet(job, split, out)


def _convert_arrays(out: Path, x: np.ndarray, y: np.ndarray) -> None:
    arrays = out.with_suffix(".npz")
    np.savez(arrays, x=x, y=y)
    try:
        convert("npz", str(arrays), out, overwrite=True)
    finally:
        arrays.unlink()


def _convert_tiny_imagenet(data: Path, split: Split, out: Path) -> None:
    """Convert train/, or val/, where val_annotations.txt has a line `image<TAB>class<TAB>box` for each image."""
    folder = next((place for place in (data, data / "tiny-imagenet-200") if (place / "val").is_dir()), None)
    if folder is None:
        raise DataError(f"--data {data} holds no Tiny-ImageNet: tiny-imagenet-200 with train/ and val/")
    if split == "train":
        convert("folder", str(folder / "train"), out, labels="folders", on_error="fail", resume=True)
        return
    annotations = folder / "val" / "val_annotations.txt"
    try:
        lines = [line.split("\t") for line in annotations.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{annotations}: cannot be read ({error})") from error
    if any(len(line) < 2 for line in lines):
        raise DataError(f"{annotations}: must have lines of image<TAB>class<TAB>box")
    images = (folder / "val" / "images").absolute()
    table = out.with_suffix(".csv")
    table.unlink(missing_ok=True)
    append_rows(table, [{"path": str(images / line[0]), "label": line[1]} for line in lines])
    try:
        convert("csv", str(table), out, on_error="fail", overwrite=True)
    finally:
        table.unlink()


def _convert_imagenet(job: Job, split: Split, out: Path) -> None:
    folder = job.data / ("train" if split == "train" else "val")
    num_classes = sum(path.is_dir() for path in folder.iterdir()) if folder.is_dir() else 0
    if not num_classes:
        raise DataError(f"--data {job.data} holds no ImageNet: {folder.name}/ with a sub-folder for each class")
    if job.images == "imagenet100" and not job.classes and num_classes > NUM_CLASSES_IMAGENET100:
        raise DataError(f"{folder} has {num_classes} classes: name the {NUM_CLASSES_IMAGENET100} with --classes FILE")
    classes = job.classes and str(job.classes)
    options = {"max_px": IMAGENET_MAX_PX, "classes": classes, "labels": "folders", "on_error": "fail"}
    convert("folder", str(folder), out, **options, resume=True)


def load_cifar(data: Path, split: Split, limit: int = 0, images: str = "cifar10") -> tuple[np.ndarray, np.ndarray]:
    """Load the first `limit` images (0: all) uint8 [N, 32, 32, 3] and labels int64 [N].

    The first existing source is used: IMAGES_SPLIT.beton; IMAGES_SPLIT.npz with arrays x and y; of CIFAR-10, WebP
    strips SPLIT_*.webp of vertically stacked images with labels.npz (arrays y_train and y_test), in `data` or in
    cifar10/; the folder that torchvision reads.

    Args:
        data: Folder of the images.
        split: train or test.
        limit: Number of images.
        images: cifar10 or cifar100.
    Raises:
        DataError: If there is no source, or if it cannot be read.
    """
    wanted = slice(limit or None)
    name, folder_name = CIFAR[images]
    if (beton := data / f"{images}_{split}.beton").exists():
        reader = BetonReader(beton)
        ids = range(reader.num_samples)[wanted]
        return np.stack([reader.decode(i) for i in ids]), reader.labels[wanted]
    if (arrays := data / f"{images}_{split}.npz").exists():
        with np.load(arrays) as found:
            return found["x"][wanted], found["y"][wanted]
    for folder in (data, data / "cifar10") if images == "cifar10" else ():
        if (folder / "labels.npz").exists() and (strips := sorted(folder.glob(f"{split}_*.webp"))):
            return _read_strips(strips, limit), np.load(folder / "labels.npz")[f"y_{split}"][wanted].astype(np.int64)
    if (data / folder_name).exists():
        from pipelines.torchvision_operators import declare_torchvision_operators

        declare_torchvision_operators()
        from torchvision import datasets

        found = getattr(datasets, name)(str(data), train=split == "train")
        return found.data[wanted], np.asarray(found.targets[wanted])
    strips = f"{split}_*.webp with labels.npz, " if images == "cifar10" else ""
    raise DataError(
        f"--data {data} holds no CIFAR-{name.removeprefix('CIFAR')} {split} images: {images}_{split}.beton, "
        f"{images}_{split}.npz (x, y), {strips}or torchvision's {folder_name}"
    )


def train(job: Job) -> None:
    """Train to the last epoch in a child process, which ends with this process.

    Raises:
        ConfigError: If the folder contains a run with another configuration.
        UserError: If the training did not finish; its own message is printed above.
    """
    job.folder.check_claim(job.cfg)
    from fastssl.checkpoint.save_load import last_checkpoint, step_of

    last = last_checkpoint(job.folder.checkpoints)
    if last and step_of(last) == job.total_steps:
        return
    start = [sys.executable, str(ROOT / "fastssl/train.py"), "--cfg", *map(str, job.config), "--set"]
    start += job.overrides
    # A kill of this process also kills the training, which would otherwise keep the run folder locked.
    child = subprocess.Popen(start, preexec_fn=lambda: ctypes.CDLL(None).prctl(1, signal.SIGKILL))
    before = signal.signal(signal.SIGTERM, lambda *_: child.terminate())  # the child saves a checkpoint
    code = child.wait()
    signal.signal(signal.SIGTERM, before)
    if code:
        raise UserError(f"{job.folder.path}: the training ended with exit code {code}; its message is above")
    if job.folder.preempted.exists():
        raise UserError(f"{job.folder.path}: a signal ended the training; the same command resumes it")


def kept_steps(job: Job) -> list[int]:
    """The steps of the checkpoints to choose from: every `keep_every` epochs, and the last."""
    every = job.keep_every * job.steps_per_epoch
    return [*range(every, job.total_steps, every), job.total_steps]


def best_step(job: Job, steps: Sequence[int]) -> int:
    """The step with the best kNN on held-out training images; the latest one if several are equal."""
    accuracy = {step: _judged(job, step, HELD_OUT)["knn"]["top1"] for step in steps}
    return max(steps, key=lambda step: (accuracy[step], step))


def judge(job: Job, step: int, scored_on: str, protocols: Sequence[str], checkpoint: str) -> float:
    """Evaluate a checkpoint if needed, and add its rows to results.csv if they are missing.

    Returns:
        Seconds of the evaluation; 0 if the checkpoint was evaluated before.
    """
    from fastssl.commands.eval.evaluate_run import evaluate_run

    started = time.perf_counter()
    if missing := [name for name in protocols if name not in _judged(job, step, scored_on)]:
        overrides = ["eval.baselines=false", "eval.search=full", f"run.device={job.device}"]
        if scored_on == HELD_OUT:
            overrides.append("data.test=null")
        if job.device == "cuda" and SETS[job.images] == "small":
            overrides.append("eval.local_batch_size=1000")
        evaluate_run(job.folder.path, overrides, what=missing, step=step)
    seconds = time.perf_counter() - started if missing else 0.0
    lines = _judged(job, step, scored_on)
    if missing:
        found = ", ".join(f"{name} {100 * lines[name]['top1']:.2f}%" for name in protocols)
        _say(f"{checkpoint} checkpoint, step {step}: {found} on {scored_on} ({seconds:.1f} s)")
    with _alone(job.out):
        known = [(row["scored_on"], row["checkpoint"], row["metric"]) for row in _rows_of(job, step)]
        rows = [_row(job, lines[name], scored_on, checkpoint) for name in protocols]
        rows = [row for row in rows if (row["scored_on"], row["checkpoint"], row["metric"]) not in known]
        if rows:
            environment = environment_columns(PACKAGES)
            append_rows(job.out / "results.csv", [{**row, **environment} for row in rows])
    return seconds


def write_curve(job: Job) -> None:
    """Write RUN/curve.csv, with a row for every epoch."""
    knn = {step: _judged(job, step, HELD_OUT)["knn"]["top1"] for step in kept_steps(job)}
    path = job.folder.path / "curve.csv"
    path.unlink(missing_ok=True)
    rows = [
        {"epoch": row["epoch"] + 1, "step": row["step"]}
        | {name: row.get(name) for name in ("loss", "online_top1", "img_per_s", "memory_bytes")}
        | {"held_out_knn_top1": knn.get(row["step"])}
        for row in _epoch_rows(job)
    ]
    append_rows(path, rows)
    draw_curve(path, f"{job.row}, seed {job.cfg.run.seed}")


def draw_curve(path: Path, title: str) -> None:
    """Plot the accuracies of a curve.csv over the epochs, as a .png with the same name."""
    import csv

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    figure, axis = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    epochs = [int(row["epoch"]) for row in rows]
    axis.plot(epochs, [100 * float(row["online_top1"]) for row in rows], label="online linear probe, held-out images")
    judged = [(int(row["epoch"]), 100 * float(row["held_out_knn_top1"])) for row in rows if row["held_out_knn_top1"]]
    axis.plot(*zip(*judged, strict=True), "o", label="weighted kNN, held-out images")
    axis.set(xlabel="epoch", ylabel="top-1 in %", title=title)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path.with_suffix(".png"), dpi=110)
    pyplot.close(figure)


def _row(job: Job, line: Line, scored_on: str, checkpoint: str) -> Row:
    """A row from a line of eval.jsonl and the cost of the training.

    The seconds are those of the epochs, from the first batch to the last, without the start and without work that
    was lost to a kill.
    """
    epochs = _epoch_rows(job)
    rates = [row["img_per_s"] for row in epochs]
    num_images = job.steps_per_epoch * job.cfg.data.global_batch_size
    name = f"knn_k{line['chosen']['k']}" if line["name"] == "knn" else line["name"]
    return {
        "row": job.row,
        "seed": job.cfg.run.seed,
        "epochs": job.cfg.train.num_epochs,
        "metric": f"{name}_top1",
        "percent": f"{100 * line['top1']:.2f}",
        "scored_on": scored_on,
        "num_scored": line["num_test_images"],
        "checkpoint": checkpoint,
        "checkpoint_step": line["checkpoint_step"],
        "chosen": json.dumps(line["chosen"]),
        "train_seconds": round(sum(num_images / rate for rate in rates), 1),
        "img_per_s_p50": round(float(np.median(rates)), 1),
        "peak_memory_bytes": max(row["memory_bytes"] for row in epochs),
        "precision": job.cfg.train.precision,
        "device": job.device,
        "run": job.folder.path.name,
    }


def _rows_of(job: Job, step: int | None = None) -> list[Row]:
    """The rows of the run in results.csv, for one checkpoint or for all."""
    import csv

    path = job.out / "results.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["run"] == job.folder.path.name]
    return [row for row in rows if step is None or row["checkpoint_step"] == str(step)]


def _judged(job: Job, step: int, scored_on: str) -> dict[str, Line]:
    """The lines of eval.jsonl by protocol."""
    return {
        line["name"]: line
        for line in read_rows(job.folder.evaluations)
        if line["checkpoint_step"] == step
        and line["on"] is None
        and (line["test"]["path"] == line["train"]["path"]) == (scored_on == HELD_OUT)
    }


def _epoch_rows(job: Job) -> list[dict[str, Any]]:
    return [row for row in read_rows(job.folder.metrics) if row.get("kind") == "epoch"]


def _read_strips(strips: Sequence[Path], limit: int) -> np.ndarray:
    from PIL import Image

    images: list[np.ndarray] = []
    for strip in strips:
        if limit and sum(map(len, images)) >= limit:
            break
        with Image.open(strip) as image:
            images.append(np.asarray(image.convert("RGB")).reshape(-1, 32, 32, 3))
    return np.concatenate(images)[: limit or None]


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Allow only one at a time of the processes that share the folder."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build_job(args: argparse.Namespace) -> Job:
    import torch

    if args.row not in ROWS:
        raise UserError(f"--row must be one of {', '.join(ROWS)}, not {args.row}")
    images = args.row.partition("-")[0]
    if args.classes and images != "imagenet100":
        raise UserError("--classes is for the rows of imagenet100")
    if args.limit and images not in CIFAR:
        raise UserError(f"--limit is for the rows of {' and '.join(CIFAR)}")
    if (args.epochs is not None and args.epochs < 1) or args.keep_every < 1:
        raise UserError("--epochs and --keep-every must be >= 1")
    if args.seed < 0:
        raise UserError("--seed must be >= 0")
    if args.limit and args.limit < MIN_IMAGES:
        raise UserError(f"--limit must be at least {MIN_IMAGES}")
    if not args.data.is_dir():
        raise UserError(f"--data {args.data} is no folder")
    for key in (override.partition("=")[0] for override in args.set):
        if key in TAKEN:
            raise UserError(f"--set {key}: {TAKEN[key]} sets it")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, but torch finds no GPU")
    device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    names, changes = ROWS[args.row]
    config = [ROOT / "configs" / name for name in names]
    fast = ["train.precision=bf16", "train.compile=true"] if device == "cuda" else ["train.precision=fp32"]
    limited = f"_first{args.limit}" if args.limit else ""
    of_row = load_config(config, [*changes, "run.dir=unused"])
    epochs = args.epochs or of_row.train.num_epochs
    overrides = [
        *changes,
        *(["data.engine=resident"] if SETS[images] == "small" else []),
        *fast,
        f"run.checkpoint_every_epochs={gcd(args.keep_every, CHECKPOINT_EVERY_EPOCHS)}",
        "run.diagnose_every_epochs=10",
        *args.set,
        f"run.dir={args.out / f'{args.row}_{epochs}ep_seed{args.seed}{limited}'}",
        "run.resume=auto",
        f"run.seed={args.seed}",
        f"run.device={device}",
        f"run.keep_every_epochs={args.keep_every}",
        f"train.num_epochs={epochs}",
        f"data.train={_beton(args, of_row.data.train)}",
        f"data.test={_beton(args, str(of_row.data.test))}",
    ]
    cfg = load_config(config, overrides)
    if args.limit and args.limit < cfg.data.global_batch_size:
        raise UserError(f"--limit must be at least {cfg.data.global_batch_size}, a batch")
    return Job(
        row=args.row,
        config=config,
        cfg=cfg,
        overrides=overrides,
        data=args.data,
        classes=args.classes,
        out=args.out,
        keep_every=args.keep_every,
        limit=args.limit,
        device=device,
    )


def _beton(args: argparse.Namespace, path: str) -> Path:
    """The .beton file of this name in --data if it exists and all its images are used; otherwise a file in --out."""
    found = args.data / Path(path).name
    if found.exists() and not args.limit:
        return found
    return args.out / "data" / f"{found.stem}{f'_first{args.limit}' if args.limit else ''}.beton"


def _say(line: str) -> None:
    print(f"reproduce: {line}", flush=True)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", required=True, metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--epochs", type=int, help="the cosine is over these (default: those of the row)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the images (default: data)")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="imagenet100: its classes, a name a line")
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce"), help="default: runs/reproduce")
    parser.add_argument("--keep-every", type=int, default=20, metavar="K", help="epochs (default: 20)")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="CIFAR: the first N images of each file only")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override a key")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
