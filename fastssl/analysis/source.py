"""Input of the analyses: the objective of a run's checkpoint, and batches that are the same every time."""

# V views, B images of a batch

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path

import torch
from torch import Tensor

from fastssl.build_run import build_model
from fastssl.checkpoint.save_load import checkpoint_of, load_objective_state, load_weights, step_of
from fastssl.checkpoint.weights import put_weights
from fastssl.config import Config, check_built
from fastssl.errors import ConfigError
from fastssl.losses import build_loss
from fastssl.machine.private_api import BatchNormBase
from fastssl.models.objective import Objective
from fastssl.processes.launch import choose_device, num_threads_of
from fastssl.tracking.result_rows import Row, append_rows
from fastssl.tracking.run_folder import RunFolder
from pipelines.errors import one_line
from pipelines.loader import Loader, build_loader, open_train_images
from pipelines.shards.open_images import AnyImages

MAX_DEFAULT_BATCHES = 4


@dataclass(frozen=True, kw_only=True)
class BatchSettings:
    """Which batches to use.

    Attributes:
        num_images: Total number of images; None: four batches, or as many as the file has.
        batch_size: Images per batch, >= 2; None: the run's global batch size.
    """

    num_images: int | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 2:
            raise ConfigError(f"--batch-size must be >= 2, got {self.batch_size}: every loss compares different images")
        if self.num_images is not None and self.num_images < 1:
            raise ConfigError(f"--num-images must be >= 1, got {self.num_images}")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A checkpoint of a run, and the batches for its analysis.

    Attributes:
        folder: The run's folder.
        cfg: Its configuration, with the overrides.
        step: Step of the checkpoint.
        objective: Model, loss and target of the checkpoint, in training mode, see `hold_still`.
        batches: The views of each batch, V tensors [B, 3, H, W].
    """

    folder: RunFolder
    cfg: Config
    step: int
    objective: Objective
    batches: list[list[Tensor]]

    @property
    def num_images(self) -> int:
        """Total number of images in the batches."""
        return sum(len(batch[0]) for batch in self.batches)


@contextmanager
def full_fp32() -> Iterator[None]:
    """Convolutions in fp32 proper: by default torch lets a GPU round what they multiply to TF32's 10 bits.

    A training does not mind; the differences and residuals that an analysis reports would be those of the rounding.
    """
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def open_run(path: Path, overrides: Sequence[str]) -> tuple[RunFolder, Config]:
    """A run's folder and its configuration with `key=value` changes.

    Raises:
        ConfigError: the folder holds no run, or an override is invalid.
    """
    folder = RunFolder(path)
    cfg = folder.load_config(overrides)
    check_built(cfg, "model", "loss", "loader")
    return folder, cfg


def checkpoints_at(folder: RunFolder, steps: Sequence[int | None]) -> list[Path]:
    """The checkpoints of some steps, each once, from the earliest to the last.

    Args:
        folder: The run's folder.
        steps: The steps, at least one; None: the last.

    Raises:
        ConfigError: there is no such checkpoint.
    """
    option = "--steps" if len(steps) > 1 else "--step"
    found = {checkpoint_of(folder.checkpoints, step, option=option) for step in steps}
    return sorted(found, key=step_of)


def load_source(folder: RunFolder, cfg: Config, *, step: int | None, settings: BatchSettings) -> Source:
    """Rebuild the objective of a checkpoint and draw its batches, on the device of run.device.

    Raises:
        ConfigError: no such checkpoint, a checkpoint of another model or loss, or fewer images than requested.
        DataError: the file cannot be read.
    """
    checkpoint = checkpoint_of(folder.checkpoints, step)
    device = choose_device(cfg.run.device)
    torch.set_num_threads(num_threads_of(cfg.run))
    objective = load_objective(cfg, checkpoint).to(device)
    hold_still(objective)
    batches = draw_batches(cfg, settings, device)
    return Source(folder=folder, cfg=cfg, step=step_of(checkpoint), objective=objective, batches=batches)


def load_objective(cfg: Config, checkpoint: Path) -> Objective:
    """Model, loss and target of a checkpoint, on the CPU.

    Raises:
        ConfigError: it is of another model or loss, damaged, or in an older format that lacks the loss's state.
    """
    weights = load_weights(checkpoint)
    model = build_model(cfg, weights["image_px"])
    put_weights(weights, checkpoint, backbone=model.backbone, projector=model.projector)
    objective = Objective(model, build_loss(cfg.loss, cfg.model.projector_dim))
    try:
        if objective.target is not None or objective.loss.state_dict():
            objective.load_state_dict(load_objective_state(checkpoint))
    except RuntimeError as error:
        reason = one_line(error)[:200]
        raise ConfigError(f"{checkpoint} does not fit the loss of the configuration: {reason}") from None
    return objective


def make_folder(path: Path) -> Path:
    """Create a folder for results if it is missing, and return it.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / ".writable").touch()
        (path / ".writable").unlink()
    except OSError as error:
        raise ConfigError(f"--out: {path} cannot be written ({error.strerror})") from None
    return path


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """Write a CSV file, replacing an existing one."""
    path.unlink(missing_ok=True)
    append_rows(path, rows)


def hold_still(objective: Objective) -> None:
    """Set training mode without buffer updates: batch norm uses the batch's statistics and does not track them.

    A loss with a running moment (MINC, TiCo) uses but does not update it; its layers stay in training mode.
    """
    objective.train()
    for module in objective.modules():
        if isinstance(module, BatchNormBase):
            module.track_running_stats = False
    objective.loss.training = False


def draw_batches(cfg: Config, settings: BatchSettings, device: torch.device) -> list[list[Tensor]]:
    """The first batches of epoch 0, as in a single-process training with this seed, file and recipe.

    Raises:
        ConfigError: --num-images exceeds the file's images, or is not a multiple of the batch size.
        DataError: the file cannot be read.
    """
    reader = open_train_images(cfg.data)
    size = settings.batch_size or min(cfg.data.global_batch_size, reader.num_samples)
    num_images = settings.num_images or min(MAX_DEFAULT_BATCHES, max(1, reader.num_samples // size)) * size
    if num_images > reader.num_samples:
        option = "--num-images" if settings.num_images else "--batch-size"
        raise ConfigError(f"{option} is {num_images}, but {reader.path} holds {reader.num_samples} images: lower it")
    if num_images % size:
        raise ConfigError(f"--num-images is {num_images}, not a multiple of the {size} images of a batch: change it")
    with closing(_loader_of(cfg, reader, size, device)) as loader, closing(loader.epoch(0)) as batches:
        # cloned: the loader reuses its memory
        return [[view.clone() for view in batch.views] for batch in islice(batches, num_images // size)]


def stream_batches(cfg: Config, batch_size: int, device: torch.device) -> Generator[list[Tensor], None, None]:
    """Batches of a single-process training with this seed, file and recipe, epoch after epoch, without end.

    A batch is overwritten when the next one is drawn.

    Raises:
        ConfigError: the file has fewer images than a batch.
        DataError: the file cannot be read.
    """
    reader = open_train_images(cfg.data)
    if batch_size > reader.num_samples:
        raise ConfigError(f"a batch of {batch_size} images is more than {reader.path} holds: {reader.num_samples}")
    with closing(_loader_of(cfg, reader, batch_size, device)) as loader:
        for epoch in count():
            with closing(loader.epoch(epoch)) as batches:
                for batch in batches:
                    yield batch.views


def _loader_of(cfg: Config, reader: AnyImages, batch_size: int, device: torch.device) -> Loader:
    process = {"rank": 0, "world_size": 1, "device": device, "num_threads": num_threads_of(cfg.run)}
    data = replace(cfg.data, global_batch_size=batch_size)
    return build_loader(reader, data, cfg.views, seed=cfg.run.seed, **process)
