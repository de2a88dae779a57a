"""From a configuration to what a run is made of: model, loss, batches, probe; and the objective of model and loss."""

import math
import os
import shutil
import sys
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from fastssl import collectives
from fastssl.checkpoint.save_load import last_checkpoint, load_weights
from fastssl.checkpoint.weights import put_weights
from fastssl.config import Config
from fastssl.errors import ConfigError
from fastssl.evaluation.held_out import HeldOutKnn
from fastssl.evaluation.labels import check_same_classes, max_label, num_labelled_classes
from fastssl.evaluation.probe import OnlineProbe
from fastssl.losses import Loss, build_loss
from fastssl.machine.nvidia_gpu import has_gpu
from fastssl.models.activation_checkpointing import checkpoint_activations
from fastssl.models.objective import Objective
from fastssl.models.sync_batch_norm import exclude_from_compilation, has_batch_norm, synchronize_batch_norms
from fastssl.models.two_view import TwoViewModel
from fastssl.optim.nvidia_apex import apex_layer_norm, put_layer_norms, why_no_apex
from fastssl.processes.consistency import check_same_config
from fastssl.processes.launch import num_threads_of
from fastssl.tracking.run_folder import RunFolder
from pipelines.batch import BatchSource
from pipelines.beton import Identity
from pipelines.hold_out import holdout_table
from pipelines.iterable_loader import Batches, IterableLoader
from pipelines.loader import Loader, build_loader, open_train_images, remote_line
from pipelines.shards.open_images import AnyImages, open_images
from pipelines.views import build_view_specs


@dataclass(frozen=True, kw_only=True)
class RunParts:
    """What `fastssl.trainer.Trainer` takes.

    Attributes:
        model: Images to features and projections.
        loss: Projections to a scalar.
        loader: Gives this rank's batches.
        probe: Learns during the training; None: the images have fewer than two labels.
        is_holdout: bool [M]: entry (sample id modulo M) says whether the probe must not learn from a sample; None
            without a probe.
        held_out: Judges the encoder during training; None: eval.every_epochs is 0.
        test_identity: Identity of data.test; None: there is no test file.
    """

    model: TwoViewModel
    loss: Loss
    loader: BatchSource
    probe: OnlineProbe | None
    is_holdout: Tensor | None
    held_out: HeldOutKnn | None
    test_identity: Identity | None


def build_run(cfg: Config, device: torch.device) -> RunParts:
    """Build all parts of a run (all ranks call it, in a process group).

    Raises:
        ConfigError, DataError: What the user must change, in one line.
    """
    reader = open_train_images(cfg.data)
    test_reader = open_images(cfg.data.test) if cfg.data.test else None
    test_identity = test_reader and test_reader.identity
    check_same_config(cfg, {"data.train": reader.identity} | ({"data.test": test_identity} if test_identity else {}))
    loader = build_loader(
        reader,
        cfg.data,
        cfg.views,
        seed=cfg.run.seed,
        rank=collectives.rank(),
        world_size=collectives.world_size(),
        device=device,
        num_threads=num_threads_of(cfg.run),
    )
    line = remote_line(reader, cfg.data, loader, collectives.world_size())
    if line and collectives.rank() == 0:
        print(f"fastssl: {line}", file=sys.stderr, flush=True)
    if test_reader:
        check_same_classes(reader, test_reader, "data.test")
    model = build_model(cfg, loader.view_shapes[0][-1])
    if cfg.run.init_from and not last_checkpoint(RunFolder(cfg.run.dir).checkpoints):
        load_initial_weights(model, cfg.run.init_from)
    loss = build_loss(cfg.loss, cfg.model.projector_dim)
    probe, is_holdout = _build_probe(cfg, reader, model.num_features)
    held_out = HeldOutKnn(cfg.eval, cfg.data, cfg.views, reader, device) if cfg.eval.every_epochs else None
    return RunParts(
        model=model,
        loss=loss,
        loader=loader,
        probe=probe,
        is_holdout=is_holdout,
        held_out=held_out,
        test_identity=test_identity,
    )


def _build_probe(cfg: Config, reader: AnyImages, num_features: int) -> tuple[OnlineProbe | None, Tensor | None]:
    """A linear probe where at least two classes are labelled; it learns from all but the held-out images."""
    if num_labelled_classes(reader) < 2:
        return None, None
    num_classes = max_label(reader) + 1
    is_holdout = torch.from_numpy(holdout_table(reader, cfg.data.holdout_fraction))
    return OnlineProbe(num_features, num_classes, cfg.eval), is_holdout


def build_model(cfg: Config, image_px: int) -> TwoViewModel:
    """The model at its seeded start.

    Raises:
        ConfigError: there is no such model, or no layer norm in it for `model.layer_norm=apex`.
    """
    torch.manual_seed(cfg.run.seed)
    try:
        model = TwoViewModel(cfg.model, image_px)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if cfg.model.layer_norm == "apex" and not put_layer_norms(model, apex_layer_norm()):
        raise ConfigError(f"model.layer_norm=apex: {cfg.model.backbone} has no layer norm that apex's could replace")
    return model


def load_initial_weights(model: TwoViewModel, path: str) -> None:
    """Load backbone and projector from `run.init_from`.

    Raises:
        ConfigError: they do not fit the model.
    """
    put_weights(load_weights(path), f"run.init_from: {path}", backbone=model.backbone, projector=model.projector)


def as_batch_source(cfg: Config, loader: BatchSource | Batches, loss: nn.Module, device: torch.device) -> BatchSource:
    """The source of batches that a loader of the user's own gives (all ranks call it).

    Raises:
        ConfigError: its batches do not fit the configuration or the loss, or differ between ranks.
    """
    if isinstance(loader, Loader) or hasattr(loader, "view_shapes"):
        return cast("BatchSource", loader)
    world_size = collectives.world_size()
    source = IterableLoader(cast("Batches", loader), device=device, world_size=world_size)
    check_same_config(cfg, {"loader": source.identity})
    num_views, most = len(source.view_shapes), loss.config.max_views if isinstance(loss, Loss) else math.inf
    if num_views > most:
        raise ConfigError(f"loader: its batches have {num_views} views, loss {cfg.loss.name} takes {most:g}")
    size_px = build_view_specs(cfg.views)[0].size_px
    if source.view_shapes[0][1:] != (size_px, size_px):
        height_px, width_px = source.view_shapes[0][1:]
        raise ConfigError(
            f"views.size_px is {size_px}, but the loader's first view is {height_px}x{width_px} px: set it to "
            "that, as evaluation and load_encoder prepare images of this size"
        )
    num_images = source.local_batch_size * world_size
    if num_images != cfg.data.global_batch_size:
        raise ConfigError(
            f"data.global_batch_size is {cfg.data.global_batch_size}, but the loader's batches hold "
            f"{source.local_batch_size} images on each of {world_size} processes: set it to {num_images}"
        )
    return source


def as_two_view(cfg: Config, model: nn.Module, image_px: int) -> TwoViewModel:
    """The model, or a user's own encoder with the projector of the model section.

    Raises:
        ConfigError: the encoder does not take the images, or does not give one feature vector for each.
    """
    if isinstance(model, TwoViewModel):
        return model
    torch.manual_seed(cfg.run.seed)  # of the projector
    try:
        return TwoViewModel(cfg.model, image_px, backbone=model)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def build_objective(cfg: Config, model: TwoViewModel, loss: Loss) -> Objective:
    """The objective that the configuration describes; model and loss are changed in place (all ranks call it).

    Raises:
        ConfigError: the batch, the backbone or the machine do not allow what the config asks for.
    """
    try:
        if cfg.model.batch_norm == "sync":
            synchronize_batch_norms(nn.ModuleList([model, loss]))
        if cfg.model.activation_checkpointing:
            checkpoint_activations(model.backbone, cfg.model.backbone)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    objective = Objective(
        model,
        loss,
        num_micro_batches=cfg.train.num_micro_batches,
        checkpoints_activations=cfg.model.activation_checkpointing,
    )
    _check_micro_batches(cfg, objective)
    _check_mean(loss, model)
    if cfg.train.compile:
        _compile(objective)
    return objective


def _compile(objective: Objective) -> None:
    """Compile the networks in place, names stay; a loss exchanges between ranks and has kernels of its own."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise ConfigError(f"train.compile: there is no C++ compiler {compiler}: install one, or name it in CXX")
    for network in (objective.model, objective.target):
        if network is not None:
            exclude_from_compilation(network)
            network.compile(dynamic=False)


def _check_mean(loss: Loss, model: TwoViewModel) -> None:
    """Warn where the projector removes the mean that the loss is to find."""
    if loss.config.needs_mean and has_batch_norm(model.projector[-1]) and collectives.rank() == 0:
        print(
            f"fastssl: warning: the batch norm at the end of the projector removes the constant function, which loss "
            f"{loss.config.name} is to find too: set model.projector_last_norm=false",
            file=sys.stderr,
            flush=True,
        )


def _check_micro_batches(cfg: Config, objective: Objective) -> None:
    num_parts, local_batch_size = cfg.train.num_micro_batches, cfg.data.global_batch_size // collectives.world_size()
    if local_batch_size % num_parts:
        raise ConfigError(
            f"train.num_micro_batches is {num_parts}, which does not divide the local batch of {local_batch_size} "
            f"images (data.global_batch_size {cfg.data.global_batch_size} on {collectives.world_size()} processes)"
        )
    if num_parts == 1 or not has_batch_norm(objective.model):
        return
    if local_batch_size == num_parts:
        raise ConfigError(
            f"train.num_micro_batches is {num_parts}: micro-batches of one image leave batch norm without statistics; "
            f"lower it, or raise data.global_batch_size"
        )
    if collectives.rank() == 0:
        print(
            f"fastssl: warning: train.num_micro_batches={num_parts}: batch norm takes its statistics from parts of "
            f"{local_batch_size // num_parts} images, so this is not the training of the whole batch at once",
            file=sys.stderr,
            flush=True,
        )


def check_apex(cfg: Config) -> None:
    """Refuse a configuration that asks for apex on a machine that cannot serve it.

    Raises:
        ConfigError: apex is not there, is another project, lacks its CUDA extensions, or there is no GPU.
    """
    if refusal := why_refused(cfg):
        raise ConfigError(f"{refusal}; or leave the key out for torch's own")


def why_refused(cfg: Config) -> str | None:
    """Why this machine cannot serve a configuration that asks for apex, in one line; None: it can, or need not."""
    asked = {"optim.impl": cfg.optim.impl, "model.layer_norm": cfg.model.layer_norm}
    keys = [f"{key}=apex" for key, impl in asked.items() if impl == "apex"]
    if not keys:
        return None
    reason = why_no_apex()
    if reason is None and (cfg.run.device == "cpu" or not has_gpu()):
        reason = "its kernels need a GPU"
    return reason and f"{' and '.join(keys)}: {reason}"
