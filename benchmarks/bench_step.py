"""Whole training steps: fastssl's Trainer under DeepSpeed and a bare PyTorch loop, with and without the real loader.

    python benchmarks/bench_step.py --cfg configs/X.yaml --set data.train=X.beton run.num_threads=2

Windows of steps alternate between the contestants, round by round, so that noise affects all alike; ratios are computed
within a round. The batches are "held" (made in advance, in memory), "synthetic" (from the synthetic engine: draw and
pixel op, no decoding) or from the engine of the config. On a machine without a GPU, network and loader share the cores:
the slowdown from synthetic to real batches is a loader stall only to the extent that it exceeds the loader's share of
the CPU.
"""

# B local batch size

import argparse
import contextlib
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, cycle, islice
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # as a script, only benchmarks/ is on Python's path: add the repository root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch import Tensor

from fastssl.build_run import build_model
from fastssl.config import Config, load_config
from fastssl.losses import build_loss
from fastssl.models.objective import Objective
from fastssl.optim import build_optimizer
from fastssl.processes.launch import num_threads_of
from fastssl.tracking.result_rows import append_rows, environment_columns, format_table, spread
from fastssl.tracking.writers import StepTimer
from fastssl.trainer import Trainer, start_alone
from pipelines.batch import Batch
from pipelines.loader import Loader, build_loader, cores_per_process, open_train_images

PACKAGES = ("torch", "torchvision", "deepspeed", "ffcv", "numba", "numpy")
NUM_HELD_BATCHES = 4  # more than one, so that no batch stays in the CPU's caches
# A benchmark saves nothing and never reaches its last step.
OVERRIDES = ("run.resume=never", "train.num_epochs=1000000", "run.checkpoint_every_epochs=1000000")
INNER_PARTS = ("loss", "averaging of gradients")  # parts of "forward" and of "backward"
SHOWN = ("loop", "probe", "batches", "img_per_s_p50", "ratio_to_bare_p50", "ratio_to_synthetic_p50")
SHOWN += ("data_wait_fraction", "cpu_ms_per_image")

FitBatches = Callable[[Iterable[Batch]], None]
Source = Callable[[], Generator[Batch, None, None]]


class BareLoop:
    """The same training in plain PyTorch: no DeepSpeed, no probe, no metrics except the loss."""

    def __init__(self, cfg: Config, trainer: Trainer) -> None:
        """Build model, loss and optimizer as the trainer does, with the same initial weights."""
        model, loss = build_model(cfg, trainer.image_px), build_loss(cfg.loss, cfg.model.projector_dim)
        self.objective = Objective(model, loss).to(trainer.device)
        self.optimizer = build_optimizer(self.objective, cfg.optim)
        self.learning_rate, self.total_steps = trainer.learning_rate, trainer.total_steps
        self.log_every_steps = cfg.run.log_every_steps
        self.grad_clip_norm = cfg.train.grad_clip_norm
        is_bf16 = cfg.train.precision == "bf16"
        self.autocast = torch.autocast(trainer.device.type, dtype=torch.bfloat16, enabled=is_bf16)
        self.step = 0
        self.last_loss = float("nan")

    def fit_batches(self, batches: Iterable[Batch]) -> None:
        """Take one step on each batch."""
        self.objective.train()
        for batch in batches:
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate(self.step)
            with self.autocast:
                *_, loss = self.objective(batch.views)
            self.backward(loss)
            self.update()
            if (momentum := self.objective.target_momentum(self.step, self.total_steps)) is not None:
                self.objective.follow(torch.full((), 1 - momentum, device=loss.device))
            self.step += 1
            if self.step % self.log_every_steps == 0:
                self.last_loss = loss.item()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def update(self) -> None:
        if self.grad_clip_norm:
            torch.nn.utils.clip_grad_norm_(self.objective.parameters(), self.grad_clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One way to run steps.

    Attributes:
        loop: "bare", "trainer" or "none" (the loader alone).
        probe: Whether the trainer's linear probe is trained too.
        batches: "held", "synthetic" or the name of the engine.
        fit_batches: Function that takes a step on each batch.
        source: Function that starts an endless iterator of batches.
    """

    loop: str
    probe: bool
    batches: str
    fit_batches: FitBatches
    source: Source


@dataclass(frozen=True, kw_only=True)
class Window:
    """A number of consecutive timed steps."""

    img_per_s: float
    data_wait_fraction: float
    cpu_ms_per_image: float


class Bench:
    """Everything that is built once: one Trainer, one bare loop, the loaders and some batches held in memory."""

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.trainer = start_alone(cfg)
        self.probe = self.trainer.probe
        self.bare = BareLoop(cfg, self.trainer)
        self.loaders = {cfg.data.engine: self.trainer.loader, "synthetic": self._build_loader("synthetic")}
        held = list(islice(endless(self.trainer.loader), NUM_HELD_BATCHES))
        self.held = [replace(batch, views=[view.clone() for view in batch.views]) for batch in held]

    def contestants(self, *, held_only: bool) -> list[Contestant]:
        """The contestants that are compared, and the loaders alone, in the order of a round."""
        engine = self.cfg.data.engine
        has_probe = self.probe is not None
        held = [self._contestant("bare", "held"), self._contestant("trainer", "held")]
        held += [self._contestant("trainer", "held", probe=True)] if has_probe else []
        if held_only:
            return held
        return [
            *held,
            self._contestant("trainer", "synthetic", probe=has_probe),
            self._contestant("bare", engine),
            self._contestant("trainer", engine, probe=has_probe),
            self._contestant("none", "synthetic"),
            self._contestant("none", engine),
        ]

    def close(self) -> None:
        for loader in self.loaders.values():
            loader.close()
        self.trainer.epoch_stats.close()

    def fit_trainer(self, batches: Iterable[Batch], *, probe: bool) -> None:
        """Run the trainer's own loop over the batches, with or without its probe."""
        self.trainer.update_step.probe = self.probe if probe else None
        self.trainer.epoch_stats.timer.start()
        self.trainer.fit_batches(batches)

    def _contestant(self, loop: str, batches: str, *, probe: bool = False) -> Contestant:
        fits: dict[str, FitBatches] = {
            "bare": self.bare.fit_batches,
            "trainer": lambda batches: self.fit_trainer(batches, probe=probe),
            "none": drain,
        }
        source = (lambda: forever(self.held)) if batches == "held" else (lambda: endless(self.loaders[batches]))
        return Contestant(loop=loop, probe=probe, batches=batches, fit_batches=fits[loop], source=source)

    def _build_loader(self, engine: str) -> Loader:
        data = replace(self.cfg.data, engine=engine)
        settings = {"seed": self.cfg.run.seed, "rank": 0, "world_size": 1, "device": self.trainer.device}
        num_threads = num_threads_of(self.cfg.run)
        return build_loader(open_train_images(data), data, self.cfg.views, num_threads=num_threads, **settings)


def endless(loader: Loader) -> Generator[Batch, None, None]:
    """The batches of one epoch after the other, without end."""
    for epoch in count():
        yield from loader.epoch(epoch)


def forever(batches: Sequence[Batch]) -> Generator[Batch, None, None]:
    yield from cycle(batches)


def drain(batches: Iterable[Batch]) -> None:
    for _ in batches:
        pass


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(contestant: Contestant, *, cfg: Config, num_warmup: int, num_steps: int, device: torch.device) -> Window:
    """Time `num_steps` steps after `num_warmup` steps, which fill the loader's queue as in a long run."""
    num_images = num_steps * cfg.data.global_batch_size
    with contextlib.closing(contestant.source()) as batches:
        contestant.fit_batches(islice(batches, num_warmup))
        synchronize(device)
        timer, cpu_s = StepTimer(), time.process_time()
        timer.start()
        contestant.fit_batches(timer.waiting(islice(batches, num_steps), cfg.data.global_batch_size))
        synchronize(device)
        read = timer.read("step")
        cpu_ms_per_image = (time.process_time() - cpu_s) * 1e3 / num_images
    return Window(**read, cpu_ms_per_image=cpu_ms_per_image)


def run_rounds(
    bench: Bench, contestants: Sequence[Contestant], *, num_rounds: int, num_warmup: int, num_steps: int
) -> dict[Contestant, list[Window]]:
    """The windows of each contestant, one per round."""
    found: dict[Contestant, list[Window]] = {contestant: [] for contestant in contestants}
    settings = {"cfg": bench.cfg, "num_warmup": num_warmup, "num_steps": num_steps, "device": bench.trainer.device}
    for _ in range(num_rounds):
        for contestant, windows in found.items():
            windows.append(measure(contestant, **settings))
    return found


def build_rows(cfg: Config, found: dict[Contestant, list[Window]], *, device: str, num_steps: int) -> list[dict]:
    """One row per contestant; ratios are the median, minimum and maximum over the rounds, None if there is no ratio."""
    speeds = {(c.loop, c.probe, c.batches): [w.img_per_s for w in windows] for c, windows in found.items()}
    rows = []
    for contestant, windows in found.items():
        loop, probe, batches = key = contestant.loop, contestant.probe, contestant.batches
        is_measured = loop == "trainer"
        bare = speeds["bare", False, batches] if is_measured and batches != "synthetic" else None
        is_real = is_measured and batches not in ("held", "synthetic")
        synthetic = speeds["trainer", probe, "synthetic"] if is_real else None
        rows.append(
            {
                "loop": loop,
                "probe": "yes" if probe else "no",
                "batches": batches,
                "backbone": cfg.model.backbone,
                "stem": cfg.model.stem,
                "recipe": cfg.views.recipe,
                "size_px": cfg.views.size_px,
                "global_batch_size": cfg.data.global_batch_size,
                "precision": cfg.train.precision,
                "device": device,
                "num_threads": num_threads_of(cfg.run),
                "num_workers": cfg.data.num_workers or cores_per_process(),
                "num_windows": len(windows),
                "num_steps": num_steps,
                **_spread("img_per_s", speeds[key], digits=1),
                **_ratios("ratio_to_bare", speeds[key], bare),
                **_ratios("ratio_to_synthetic", speeds[key], synthetic),
                "data_wait_fraction": _median([w.data_wait_fraction for w in windows], digits=4),
                "cpu_ms_per_image": _median([w.cpu_ms_per_image for w in windows], digits=3),
                "seed": cfg.run.seed,
            }
        )
    return rows


def _spread(name: str, values: Sequence[float], *, digits: int) -> dict[str, float | None]:
    return {f"{name}_{key}": round(value, digits) for key, value in spread(values).items()}


def _median(values: Sequence[float], *, digits: int) -> float:
    return round(spread(values)["p50"], digits)


def _ratios(name: str, own: Sequence[float], others: Sequence[float] | None) -> dict[str, float | None]:
    if others is None:
        return {f"{name}_{key}": None for key in ("p50", "min", "max")}
    return _spread(name, [a / b for a, b in zip(own, others, strict=True)], digits=4)


def shared_cpu(rows: Sequence[dict[str, Any]], engine: str) -> str:
    """One line: the loss in throughput that sharing the cores alone would cause, and the loss with the real loader."""
    by_name = {(row["loop"], row["batches"]): row for row in rows}  # the row of the trainer with the probe comes last
    real, synthetic = by_name["none", engine], by_name["none", "synthetic"]
    extra_cpu_ms = real["cpu_ms_per_image"] - synthetic["cpu_ms_per_image"]
    step_cpu_ms = by_name["trainer", "synthetic"]["cpu_ms_per_image"]
    lost = 1 - by_name["trainer", engine]["ratio_to_synthetic_p50"]
    return (
        f"{engine} takes {extra_cpu_ms:.2f} ms of CPU an image more than synthetic, whose whole step takes "
        f"{step_cpu_ms:.2f}: where the network keeps every core busy, sharing them alone loses "
        f"{extra_cpu_ms / (extra_cpu_ms + step_cpu_ms):.1%}; lost: {lost:.1%}"
    )


def breakdown(bench: Bench, *, num_rounds: int, num_warmup: int, num_steps: int) -> list[dict[str, Any]]:
    """Milliseconds per step of each part, in the bare loop and in the trainer, on held batches.

    The device is synchronized before and after each part, so the sum may exceed the step time of `run_rounds`.
    """
    spent: dict[str, dict[str, float]] = {"bare": defaultdict(float), "trainer": defaultdict(float)}
    for _ in range(num_rounds):
        for name, fit in (("bare", bench.bare.fit_batches), ("trainer", _probed(bench))):
            fit(islice(forever(bench.held), num_warmup))
            with _timed_parts(_parts(bench)[name], spent[name], bench.trainer.device):
                started = time.perf_counter()
                fit(islice(forever(bench.held), num_steps))
                spent[name]["whole step"] += time.perf_counter() - started
    for parts in spent.values():
        own = sum(seconds for part, seconds in parts.items() if part not in ("whole step", *INNER_PARTS))
        parts["the rest"] = parts["whole step"] - own
    num_timed = num_rounds * num_steps
    order = [*dict.fromkeys([*spent["trainer"], *spent["bare"]])]
    return [
        {"part": part} | {f"{name}_ms": round(spent[name][part] * 1e3 / num_timed, 3) for name in spent}
        for part in sorted(order, key=lambda part: part == "whole step")
    ]


def _probed(bench: Bench) -> FitBatches:
    return lambda batches: bench.fit_trainer(batches, probe=bench.probe is not None)


def _parts(bench: Bench) -> dict[str, dict[str, tuple[Any, str]]]:
    """The methods that are timed; INNER_PARTS are parts of others."""
    bare, trainer = bench.bare, bench.trainer
    of_bare = {
        "forward": (bare.objective, "forward"),
        "loss": (bare.objective.loss, "forward"),
        "backward": (bare, "backward"),
        "optimizer": (bare, "update"),
    }
    of_trainer = {
        "forward": (trainer.update_step, "forward"),
        "loss": (trainer.loss, "forward"),
        "backward": (trainer.update_step.update, "backward"),
        "averaging of gradients": (trainer.engine, "allreduce_gradients"),
        "optimizer": (trainer.update_step.update, "step"),
        "metrics row": (trainer.epoch_stats.metrics, "step_row"),
        "progress bar": (trainer.epoch_stats.metrics, "advance"),
    }
    return {"bare": of_bare, "trainer": of_trainer | ({"probe": (bench.probe, "step")} if bench.probe else {})}


@contextlib.contextmanager
def _timed_parts(parts: dict[str, tuple[Any, str]], spent: dict[str, float], device: torch.device) -> Iterator[None]:
    for part, (owner, method) in parts.items():
        setattr(owner, method, _timed(getattr(owner, method), part, spent, device))
    try:
        yield
    finally:
        for owner, method in parts.values():
            delattr(owner, method)  # restores the method of the class


def _timed(call: Callable[..., Any], part: str, spent: dict[str, float], device: torch.device) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        synchronize(device)
        started = time.perf_counter()
        result = call(*args, **kwargs)
        synchronize(device)
        spent[part] += time.perf_counter() - started
        return result

    return timed


def main() -> None:
    args = _parse()
    with tempfile.TemporaryDirectory() as folder:
        cfg = load_config(args.cfg, [*args.set, *OVERRIDES, f"run.dir={folder}/run"])
        log_every_steps = min(cfg.run.log_every_steps, args.num_steps)  # a row of metrics in every window
        cfg = replace(cfg, run=replace(cfg.run, log_every_steps=log_every_steps))
        bench = Bench(cfg)
        steps = {"num_warmup": args.num_warmup, "num_steps": args.num_steps}
        contestants = bench.contestants(held_only=args.held_only)
        found = run_rounds(bench, contestants, num_rounds=args.num_rounds, **steps)
        rows = build_rows(cfg, found, device=bench.trainer.device.type, num_steps=args.num_steps)
        print(format_table(rows, SHOWN))
        if not args.held_only:
            print(shared_cpu(rows, cfg.data.engine))
        parts = breakdown(bench, num_rounds=args.num_rounds, **steps)
        print(format_table(parts, list(parts[0])))
        bench.close()
    if args.out:
        environment = environment_columns(PACKAGES)
        append_rows(args.out, [row | environment for row in rows])


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--cfg", required=True, nargs="+", type=Path, help="YAML file, or files, of a run")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override a key")
    parser.add_argument("--num-rounds", type=int, default=5, help="windows of each contestant")
    parser.add_argument("--num-warmup", type=int, default=5, help="steps before each window; more than are prefetched")
    parser.add_argument("--num-steps", type=int, default=10, help="steps of a window")
    parser.add_argument("--held-only", action="store_true", help="the trainer's own overhead alone: no loaders")
    parser.add_argument("--out", type=Path, help="CSV file to append the rows to")
    return parser.parse_args()


if __name__ == "__main__":
    main()
