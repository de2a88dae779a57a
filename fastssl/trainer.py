"""A run from its start to its end, and one straight path for a batch."""

# B local batch, F backbone features, D projection

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from fastssl import collectives
from fastssl.build_run import as_batch_source, as_two_view, build_objective, build_run, check_apex
from fastssl.checkpoint.save_load import (
    drop_incomplete,
    load_checkpoint,
    plain_weights,
    prune,
    save_checkpoint,
)
from fastssl.checkpoint.schedule import CheckpointRule
from fastssl.config import Config, load_config
from fastssl.errors import ConfigError, Preempted
from fastssl.evaluation.held_out import HeldOutKnn
from fastssl.evaluation.probe import OnlineProbe
from fastssl.losses import CLASSES as LOSS_CLASSES
from fastssl.losses import Loss
from fastssl.losses.base import ModuleLoss
from fastssl.machine.files import replace_text
from fastssl.machine.private_api import check_engine, disable_gradient_averaging
from fastssl.models.sync_batch_norm import has_batch_norm
from fastssl.models.two_view import TwoViewModel
from fastssl.optim import build_optimizer
from fastssl.optim.layerwise import bind_partitions
from fastssl.optim.schedules import learning_rate
from fastssl.processes.consistency import check_same_data, check_shared_folder, compare_blur_dtype
from fastssl.processes.launch import Process, start_process, started_process
from fastssl.processes.preemption import StopRequest
from fastssl.processes.watchdog import Watchdog
from fastssl.step.cuda_graph import choose_step
from fastssl.step.deepspeed_config import build_ds_config
from fastssl.step.late_reports import LateReports
from fastssl.step.train_step import TrainStep
from fastssl.tracking import plots
from fastssl.tracking.epoch_stats import EpochStats
from fastssl.tracking.run_folder import RunFolder
from fastssl.tracking.skipped_steps import SkippedSteps
from fastssl.tracking.throughput import flops_per_image
from fastssl.tracking.trackers import check_installed
from fastssl.tracking.writers import best_held_out
from pipelines.batch import Batch, BatchSource
from pipelines.beton import Identity
from pipelines.errors import DataChangedError
from pipelines.iterable_loader import Batches
from pipelines.loader import Loader
from pipelines.preprocessing import describe_preprocessing
from pipelines.printable import printable


class Trainer:
    """Trains an encoder with a loss on the batches of a loader.

        Trainer(load_config("configs/demo.yaml"), model=my_encoder, loss=my_loss, loader=my_batches).train()

    `train` runs all steps of a training in order. The constructor only stores its arguments.

    Attributes:
        cfg: The configuration; `custom` names the parts that were passed in instead of built from it.
        model: Images to features and projections, from `prepare` on.
        step: Optimizer steps taken.
        folder: Of the run.
    """

    def __init__(
        self,
        cfg: Config,
        *,
        model: nn.Module,
        loss: nn.Module,
        loader: BatchSource | Batches,
        probe: OnlineProbe | None = None,
        is_holdout: Tensor | None = None,
        held_out: HeldOutKnn | None = None,
        test_identity: Identity | None = None,
    ) -> None:
        """Take the parts of a run; nothing is started, opened, moved or written.

        Args:
            cfg: Where the run is kept and how it is trained; `fastssl.build_run.build_run` makes the parts of it.
            model: A `TwoViewModel`, or an encoder, images [B, 3, H, W] -> features [B, F], which gets the projector of
                the model section.
            loss: A `fastssl.losses.Loss`, or a module that is called with the projections of each view [B, D].
            loader: A `BatchSource`, or a DataLoader or another iterable as `IterableLoader` takes it.
            probe: Learns during the training.
            is_holdout: bool [M]: entry (sample id modulo M) says whether the probe must not learn from a sample.
            held_out: Judges the encoder every `eval.every_epochs`.
            test_identity: Identity of data.test, which must be the same in a resumed run.
        """
        is_built = {
            "model": isinstance(model, TwoViewModel) and model.built_from == cfg.model,
            "loss": type(loss) in LOSS_CLASSES,
            "loader": type(loader) is Loader,
        }
        parts = {"model": model, "loss": loss, "loader": loader}
        own = {name: type(part) for name, part in parts.items() if not is_built[name]}
        custom = {name: f"{cls.__module__}.{cls.__qualname__}" for name, cls in own.items()}
        self.cfg = replace(cfg, custom=custom, loss=loss.config if is_built["loss"] else cfg.loss)
        self.probe, self.is_holdout, self.held_out, self.test_identity = probe, is_holdout, held_out, test_identity
        self.folder = RunFolder(cfg.run.dir)
        self.step, self._has_started = 0, False
        self.must_stop = self.checkpoint_due = False  # what all ranks agreed on
        self._given = (model, loss, loader)

    def train(self, stop_request: StopRequest | None = None) -> RunFolder:
        """All of a run: start the process, then `run`.

        Args:
            stop_request: What has remembered signals until now.

        Returns:
            The folder of the run.

        Raises:
            ConfigError, DataError: What the user must change, in one line.
            DivergedError: The loss is not finite any more, or the representation has collapsed.
            Preempted: A signal ended the training, with a checkpoint.
            PeerLostError: Another process of the run is lost.
        """
        self.folder.check_claim(self.cfg)  # before the other processes are waited for
        with started_process(self.cfg.run) as process, _listening(stop_request) as request:
            self.run(process, request)
        return self.folder

    def run(self, process: Process, stop_request: StopRequest) -> None:
        """A run in a process that is started."""
        self.start(process, stop_request)
        self.fit()

    def start(self, process: Process, stop_request: StopRequest) -> None:
        """Everything before the first step (all ranks): build, lock the folder, restore, listen to signals."""
        if self._has_started:
            raise ConfigError("this trainer has trained already: build another one")
        self._has_started = True
        self._check_custom()
        process.watchdog.step = lambda: self.step
        is_resumed = collectives.broadcast_object(self.folder.check_claim(self.cfg))
        self.prepare(process.device)
        self.lock_folder(is_resumed)
        if is_resumed:
            self.restore()
        self._say(self._headline())
        self.epoch_stats.open(self.folder, self.step)
        self.best = collectives.run_on_first_rank(lambda: best_held_out(self.folder.metrics))
        self.stop_request = stop_request
        stop_request.listen_to_sigterm()

    def prepare(self, device: torch.device) -> None:
        """Bring the parts to the device and build what trains them (all ranks call it, in a process group)."""
        cfg, (model, loss, loader) = self.cfg, self._given
        self.device = device
        self.loader = as_batch_source(cfg, loader, loss, device)
        self.steps_per_epoch = len(self.loader)
        self.total_steps = self.steps_per_epoch * cfg.train.num_epochs
        view_shapes = self.loader.view_shapes
        self.image_px = view_shapes[0][-1]
        self.model = as_two_view(cfg, model, self.image_px)
        self.loss = loss if isinstance(loss, Loss) else ModuleLoss(loss)
        self.objective = build_objective(cfg, self.model, self.loss).to(device)
        if self.probe is not None and self.is_holdout is not None:
            self.probe, self.is_holdout = self.probe.to(device), self.is_holdout.to(device)
        num_flops = flops_per_image(self.objective, view_shapes)
        self.engine, self.optimizer = self._build_engine()
        self.reports = LateReports(device)
        self.skipped = SkippedSteps(self.folder.nonfinite, cfg.train.max_skipped_steps)
        self.checkpoint_rule = CheckpointRule(
            cfg.run, steps_per_epoch=self.steps_per_epoch, total_steps=self.total_steps
        )
        torch.manual_seed(cfg.run.seed + collectives.rank())  # all weights are made; dropout differs from rank to rank
        self.learning_rate = partial(
            learning_rate,
            base_lr=cfg.optim.base_lr,
            global_batch_size=cfg.data.global_batch_size,
            warmup_steps=round(cfg.optim.warmup_epochs * self.steps_per_epoch),
            total_steps=self.total_steps,
            final_fraction=cfg.optim.final_lr_fraction,
            steps_per_change=self.steps_per_epoch if cfg.optim.schedule == "epoch" else 1,
        )
        self.epoch_stats = EpochStats(
            cfg,
            device,
            steps_per_epoch=self.steps_per_epoch,
            num_views=len(view_shapes),
            flops_per_image=num_flops,
            bound_nats=self.loss.bound_nats,
            counts=OnlineProbe.COUNTS if self.probe else (),
        )
        self.update_step = TrainStep(
            cfg,
            self.engine,
            self.objective,
            probe=self.probe,
            is_holdout=self.is_holdout,
            sums=self.epoch_stats.sums,
        )
        self.train_step = choose_step(cfg, self.update_step, device)

    def fit(self) -> None:
        """Train to the last epoch, from the checkpoint's position where the run was resumed."""
        if self.step == self.total_steps:
            self._say(f"{self.folder.path} is complete: {self.step} steps")
        self.epoch_stats.timer.start()
        for epoch in range(self.step // self.steps_per_epoch, self.cfg.train.num_epochs):
            try:
                self.fit_batches(self.loader.epoch(epoch, first_batch=self.step % self.steps_per_epoch))
            except DataChangedError:
                self._save_before_change()
                raise
        self.loader.close()
        self.epoch_stats.close()
        if collectives.rank() == 0:
            plots.draw_curves(self.folder)
        collectives.barrier()

    def fit_batches(self, batches: Iterable[Batch]) -> None:
        """Take one step on each batch, and write the rows and the checkpoints that fall due."""
        self.engine.train()
        for batch in self.epoch_stats.timer.waiting(batches, self.cfg.data.global_batch_size):
            if self.step == 0 and collectives.rank() == 0:
                plots.draw_views(batch, self.cfg.views, self.folder.views)
            with self.epoch_stats.communication_measured(self.step):
                self.take_step(batch)
            is_epoch_end = self.step % self.steps_per_epoch == 0
            self.checkpoint_due |= self.checkpoint_rule.is_due_at(self.step)
            self.read_reports(keep=0 if is_epoch_end or self.checkpoint_due else 1)
            if is_epoch_end:
                retries = getattr(self.loader, "remote_retries", None)  # a user's own loader may lack it
                self.epoch_stats.end_epoch(self.step, self.loader.bad_sample_ids, retries)
                if not self.must_stop:
                    self.judge_held_out()
            self.checkpoint_due |= self.must_stop
            if self.checkpoint_due:
                self.read_reports(keep=0)
            # While steps are skipped the run may be diverging: the last good checkpoint stays the last.
            is_sound = not self.skipped.in_a_row or self.step == self.total_steps
            if self.checkpoint_due and is_sound:
                with self.checkpoint_rule.measured_save():
                    self.save()
                self.checkpoint_due = False
                if self.must_stop and self.step < self.total_steps:
                    self._leave()
        self.read_reports(keep=0)

    def take_step(self, batch: Batch) -> None:
        """Launch one optimizer step; what it reports is read later.

        Args:
            batch: The local batch, on the device.
        """
        learning_rate = self.learning_rate(self.step)
        target_momentum = self.objective.target_momentum(self.step, self.total_steps)
        is_searching = self.update_step.update.is_searching
        result = self.train_step.run(batch, learning_rate=learning_rate, target_momentum=target_momentum)
        self.step += 1
        self.reports.add(
            result,
            step=self.step,
            wants_stop=self.stop_request.name is not None,
            wants_save=collectives.rank() == 0 and self.checkpoint_rule.is_due_by_clock(self.step),
            is_searching=is_searching and self.update_step.update.is_searching,
            sample_ids=batch.sample_ids,
            settings={
                "learning_rate": learning_rate,
                **self.update_step.update.metrics(),
                **self.epoch_stats.speed_of_steps(self.step),
            },
        )
        self.epoch_stats.add_to_window(result, self.step)
        self.epoch_stats.advance()
        if collectives.world_size() == 1:
            self.must_stop |= self.stop_request.name is not None

    def read_reports(self, *, keep: int) -> None:
        """Act on what all steps but the last `keep` have reported.

        Raises:
            DivergedError: too many steps in a row were skipped.
        """
        for done in self.reports.read(keep=keep):
            self.epoch_stats.write_step(done)
            self.must_stop |= done.must_stop
            self.checkpoint_due |= done.must_save
            if done.taken:
                self.skipped.in_a_row = 0
            elif not (done.is_searching and math.isfinite(done.loss)):
                self.skipped.note(done.step, done.loss, done.sample_ids)

    def judge_held_out(self) -> None:
        """At the end of an epoch for which it is due: the accuracy on held-out images; the best is to be saved."""
        every = self.cfg.eval.every_epochs * self.steps_per_epoch
        if self.held_out is None or (self.step % every and self.step != self.total_steps):
            return
        top1 = self.held_out.top1(self.model.backbone)
        self.epoch_stats.write_held_out(self.step, top1)
        if not self.skipped.in_a_row and (self.best is None or top1 > self.best[1]):
            self.best = (self.step, top1)
            self.checkpoint_due = True

    def save(self) -> None:
        """Save a checkpoint of this step (all ranks)."""
        self.read_reports(keep=0)
        self.epoch_stats.sync()
        weights = plain_weights(
            self.model,
            asdict(self.cfg.model),
            self.image_px,
            preprocessing=describe_preprocessing(self.cfg.views),
            backbone_class=self.cfg.custom.get("model"),
        )
        state: dict[str, Any] = {
            "data_identity": self._data_identity(),
            "collapsed_since": self.epoch_stats.collapsed_since,
            "bad_samples": self.epoch_stats.all_bad_samples(self.loader.bad_sample_ids),
            "blur_dtype": self._blur_dtype(),
        }
        state["loss_scale"] = self.update_step.update.state_dict()
        if self.probe:
            state["probe"] = self.probe.state_dict()
        save_checkpoint(
            self.folder.checkpoints,
            self.engine,
            step=self.step,
            state=state,
            sums=self.epoch_stats.state(),
            weights=weights,
            run=self.identity,
        )
        if collectives.rank() == 0:
            keep_every_steps = self.cfg.run.keep_every_epochs * self.steps_per_epoch
            keep_step = self.best and self.best[0]
            prune(self.folder.checkpoints, keep_every_steps=keep_every_steps, keep_step=keep_step)

    def restore(self) -> None:
        """Resume from the last whole checkpoint, or start from step 0 without one (all ranks)."""
        load_checkpoint(
            self.folder.checkpoints,
            self.engine,
            seed=self.cfg.run.seed,
            total_steps=self.total_steps,
            check=self._check_data,
            take_up=self._take_up,
        )
        self.skipped.resume(self.step)

    def _check_data(self, state: dict[str, Any]) -> None:
        found, saved = self._data_identity(), state["data_identity"]
        if isinstance(saved, list):  # of an older version
            saved = {next(iter(found)): saved}
        warnings = [
            check_same_data(self.cfg, found, saved),
            compare_blur_dtype(self._blur_dtype(), state.get("blur_dtype")),
        ]
        for warning in filter(None, warnings):
            if collectives.rank() == 0:
                print(printable(f"fastssl: warning: {warning}"), file=sys.stderr, flush=True)

    def _blur_dtype(self) -> str | None:
        """Arithmetic of the blur of this CPU's pixel op; None if the run does not use it."""
        if self.device.type != "cpu" or not isinstance(self.loader, Loader):
            return None
        from kernels.augment.cpu import BLUR_DTYPE

        return BLUR_DTYPE

    def _take_up(self, state: dict[str, Any]) -> None:
        self.epoch_stats.restore(
            state["sums"], state["collapsed_since"], state["world_size"], bad_samples=state.get("bad_samples", ())
        )
        self.update_step.update.load_state_dict(state["loss_scale"])
        self.update_step.update.bind()
        if self.probe:
            self.probe.load_state_dict(state["probe"])
        self.step = state["step"]

    def _build_engine(self) -> tuple[Any, Any]:
        import deepspeed
        from deepspeed.runtime.config import DeepSpeedConfigError

        optimizer = build_optimizer(self.objective, self.cfg.optim)
        config = build_ds_config(self.cfg, world_size=collectives.world_size())
        try:
            engine, optimizer, _, _ = deepspeed.initialize(
                model=self.objective, optimizer=optimizer, config=config, dist_init_required=False
            )
        except ValidationError as error:  # the only part that is not ours is what `ds` adds
            first = error.errors(include_url=False)[0]
            raise ConfigError(f"ds: DeepSpeed's {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        except DeepSpeedConfigError as error:
            raise ConfigError(f"ds: DeepSpeed: {error}") from None
        check_engine(engine)
        bind_partitions(optimizer)
        if collectives.world_size() == 1 and self.cfg.train.zero_stage == 0:
            disable_gradient_averaging(engine)
        if self.device.type == "cuda" and self.cfg.train.zero_stage == 0:
            # As the images are: or each convolution turns its weights around, forward and backward. ZeRO's flat buffers
            # and DeepSpeed's broadcast at the start want them contiguous.
            self.objective.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        return engine, optimizer

    def _check_custom(self) -> None:
        """Refuse keys that are for parts which are built from the configuration."""
        check_apex(self.cfg)
        check_installed(self.cfg.run.trackers)
        if "model" in self.cfg.custom and self.cfg.run.init_from:
            raise ConfigError(
                "run.init_from is for a model that is built from the configuration: load your own weights"
            )
        if "model" in self.cfg.custom and self.cfg.model.layer_norm != "torch":
            raise ConfigError("model.layer_norm is for a model that is built from the configuration: change your own")
        if self.probe is not None and self.is_holdout is None:
            raise ConfigError("a probe needs is_holdout: which samples it must not learn from")
        if bool(self.cfg.eval.every_epochs) != (self.held_out is not None):
            raise ConfigError("eval.every_epochs needs held_out, as `build_run` makes it, and the other way round")

    def lock_folder(self, is_resumed: bool) -> None:
        """Keep other trainings out of the folder, and make it ready (all ranks)."""
        if is_resumed and has_batch_norm(self.model):
            self.folder.check_micro_batches(self.cfg)
        check_shared_folder(self.folder, collectives.run_on_first_rank(self.folder.lock))
        if collectives.rank() == 0:
            if is_resumed:
                drop_incomplete(self.folder.checkpoints)
                self.folder.preempted.unlink(missing_ok=True)
            else:
                self.folder.create(self.cfg, collectives.world_size())
        # Read once: config.yaml may be edited while the run goes on.
        self.identity = collectives.run_on_first_rank(self.folder.identity)

    def _data_identity(self) -> dict[str, Identity]:
        """Identities by configuration key; "loader" for a loader of the user's own."""
        if "loader" in self.cfg.custom:
            return {"loader": self.loader.identity}
        test = {"data.test": self.test_identity} if self.test_identity else {}
        return {"data.train": self.loader.identity, **test}

    def _save_before_change(self) -> None:
        """Save the steps that were taken before the data changed: no batch of them has changed data.

        Several processes notice at different steps, so they keep the last checkpoint instead.
        """
        if collectives.world_size() > 1 or self.step == 0:
            return
        self.read_reports(keep=0)
        if not self.skipped.in_a_row:
            self.save()

    def _leave(self) -> None:
        """End the training at a checkpoint, as a signal asked (all ranks).

        Raises:
            Preempted: Always.
        """
        how = f"{self.folder.path} goes on after step {self.step} of {self.total_steps} with --set run.resume=auto"
        if collectives.rank() == 0:
            replace_text(self.folder.preempted, f"{how}\n")
        self.epoch_stats.close("preempted")
        collectives.barrier()
        raise Preempted(f"asked to stop ({self.stop_request.name or 'another rank was'}): {how}")

    def _headline(self) -> str:
        num_parameters = sum(parameter.numel() for parameter in self.model.backbone.parameters())
        start = f", resumed at step {self.step}" if self.step else ""
        return (
            f"{self.loss.config.name} on {self.loader.num_samples:,} images, {self._model_name()} "
            f"({num_parameters / 1e6:.2f} M parameters), global batch {self.cfg.data.global_batch_size} on "
            f"{collectives.world_size()} x {self.device.type}, {self.cfg.train.num_epochs} epochs of "
            f"{self.steps_per_epoch} steps{start} -> {self.folder.path}"
        )

    def _model_name(self) -> str:
        return type(self.model.backbone).__name__ if "model" in self.cfg.custom else self.cfg.model.backbone

    def _say(self, line: str) -> None:
        if collectives.rank() == 0:
            print(printable(line), flush=True)


def train(
    cfg: Config | str | Path,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    *,
    stop_request: StopRequest | None = None,
) -> RunFolder:
    """Run one training to its end: what `fastssl train` does.

        run = fastssl.train("configs/demo.yaml", {"run.dir": "runs/a"})

    Args:
        cfg: A configuration, or the path of a YAML file.
        overrides: Dotted keys and their values, or strings `key=value` as `--set` takes them; with a path only.
        stop_request: What has remembered signals until now.

    Returns:
        The folder of the finished run.

    Raises:
        ConfigError, DataError: What the user must change, in one line.
        DivergedError, Preempted, PeerLostError: See `Trainer.train`.
    """
    if isinstance(cfg, (str, Path)):
        cfg = load_config(cfg, overrides)
    elif overrides:
        raise ConfigError("overrides are for the path of a configuration: change the Config with dataclasses.replace")
    check_apex(cfg)
    check_installed(cfg.run.trackers)
    build_ds_config(cfg, world_size=1)  # refuses what `ds` must not hold
    folder = RunFolder(cfg.run.dir)
    folder.check_claim(cfg)  # before the other processes are waited for
    with started_process(cfg.run) as process, _listening(stop_request) as request:
        Trainer(cfg, **vars(build_run(cfg, process.device))).run(process, request)
    return folder


def _listening(stop_request: StopRequest | None) -> AbstractContextManager[StopRequest]:
    """The caller's, which goes on to listen, or one of our own until the end of the block."""
    return StopRequest() if stop_request is None else nullcontext(stop_request)


def start_alone(cfg: Config) -> Trainer:
    """A trainer before its first step, in this process and without a watchdog: for what takes steps one by one."""
    process = Process(start_process(cfg.run), Watchdog())
    trainer = Trainer(cfg, **vars(build_run(cfg, process.device)))
    trainer.start(process, StopRequest())
    return trainer
