"""The trainer: built once, then one straight path for a batch."""

# B local batch, F backbone features, D projection

import math
from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from fastssl import collectives
from fastssl.build_run import build_model, build_objective, check_apex, load_initial_weights
from fastssl.checkpoint.save_load import (
    drop_incomplete,
    last_checkpoint,
    load_checkpoint,
    plain_weights,
    prune,
    save_checkpoint,
)
from fastssl.checkpoint.schedule import CheckpointRule
from fastssl.config import Config
from fastssl.errors import ConfigError, Preempted
from fastssl.evaluation.labels import check_test_data, num_labelled_classes
from fastssl.evaluation.probe import OnlineProbe
from fastssl.files import replace_text
from fastssl.losses import build_loss
from fastssl.models.sync_batch_norm import has_batch_norm
from fastssl.optim import build_optimizer
from fastssl.optim.layerwise import bind_partitions
from fastssl.optim.schedules import learning_rate
from fastssl.processes.consistency import check_same_config, check_shared_folder
from fastssl.processes.launch import end_process, num_threads_of, start_process
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
from pipelines.batch import Batch
from pipelines.beton import BetonReader
from pipelines.loader import build_loader, open_train_reader
from pipelines.sampler import split_holdout
from pipelines.views import build_view_specs


class Trainer:
    """One run: builds everything from the config; `fit` takes it to its last epoch.

    Raises (on construction):
        ConfigError, pipelines.errors.DataError: what the user must mend, in one line.
    """

    def __init__(self, cfg: Config, watchdog: Watchdog | None = None, stop_request: StopRequest | None = None) -> None:
        check_apex(cfg)
        self.cfg = cfg
        self.step = 0
        self.folder = RunFolder(cfg.run.dir)
        resuming = self.folder.check_claim(cfg)  # before the others are waited for, and below as the first rank sees it
        self.device = start_process(cfg.run)
        if watchdog:
            watchdog.watch(cfg.run, lambda: self.step)
        reader = open_train_reader(cfg.data)
        self.data_identity = [reader.num_samples, len(reader.mmap)]  # a resumed run must find the same file
        check_same_config(cfg, self.data_identity)
        resuming = collectives.broadcast_object(resuming)
        self.loader = build_loader(
            reader,
            cfg.data,
            cfg.views,
            seed=cfg.run.seed,
            rank=collectives.rank(),
            world_size=collectives.world_size(),
            device=self.device,
            num_threads=num_threads_of(cfg.run),
        )
        self.steps_per_epoch = len(self.loader)
        self.total_steps = self.steps_per_epoch * cfg.train.num_epochs
        view_specs = build_view_specs(cfg.views)
        self.image_px = view_specs[0].size_px
        view_shapes = [(3, spec.size_px, spec.size_px) for spec in view_specs]

        check_test_data(cfg.data.test, reader)
        self.model = build_model(cfg, self.image_px)
        if resuming and has_batch_norm(self.model):
            self.folder.check_micro_batches(cfg)
        if cfg.run.init_from and not last_checkpoint(self.folder.checkpoints):
            load_initial_weights(self.model, cfg.run.init_from)
        self.loss = build_loss(cfg.loss, cfg.model.projector_dim)
        self.objective = build_objective(cfg, self.model, self.loss).to(self.device)
        self.probe = self._build_probe(reader)
        num_flops = flops_per_image(self.objective, view_shapes)
        self.engine, self.optimizer = self._build_engine()
        self.reports = LateReports(self.device)
        self.skipped = SkippedSteps(self.folder.nonfinite, cfg.train.max_skipped_steps)
        self.stop_request = stop_request or StopRequest()
        self.must_stop = False  # what all ranks agreed on
        self.checkpoint_rule = CheckpointRule(
            cfg.run, steps_per_epoch=self.steps_per_epoch, total_steps=self.total_steps
        )
        self.checkpoint_due = False
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
            self.device,
            steps_per_epoch=self.steps_per_epoch,
            num_views=len(view_specs),
            flops_per_image=num_flops,
            bound_nats=self.loss.bound_nats,
            counts=OnlineProbe.COUNTS if self.probe else (),
        )
        self.update_step = TrainStep(
            cfg,
            self.engine,
            self.objective,
            probe=self.probe,
            is_holdout=self.is_holdout if self.probe else None,
            sums=self.epoch_stats.sums,
        )
        self.train_step = choose_step(cfg, self.update_step, self.device)
        self._claim_folder(resuming)
        self.stop_request.listen_to_sigterm()

    def fit(self) -> None:
        """Train to the last epoch, from the checkpoint's position where the run was resumed."""
        if self.step == self.total_steps:
            self._say(f"{self.folder.path} is complete: {self.step} steps")
        self.epoch_stats.timer.start()
        for epoch in range(self.step // self.steps_per_epoch, self.cfg.train.num_epochs):
            self.fit_batches(self.loader.epoch(epoch, first_batch=self.step % self.steps_per_epoch))
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
                self.epoch_stats.end_epoch(self.step, len(self.loader.bad_samples.reasons))
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

    def save(self) -> None:
        """Save a checkpoint of this step (all ranks)."""
        self.read_reports(keep=0)
        self.epoch_stats.sync()
        weights = plain_weights(self.model, asdict(self.cfg.model), self.image_px)
        state: dict[str, Any] = {
            "data_identity": self.data_identity,
            "collapsed_since": self.epoch_stats.collapsed_since,
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
        )
        if collectives.rank() == 0:
            prune(self.folder.checkpoints, keep_every_steps=self.cfg.run.keep_every_epochs * self.steps_per_epoch)

    def _restore(self) -> None:
        state = load_checkpoint(self.folder.checkpoints, self.engine, seed=self.cfg.run.seed)
        if state is None:
            return
        if state["data_identity"] != self.data_identity:
            raise ConfigError(
                f"data.train: {self.cfg.data.train} holds [images, bytes] {self.data_identity}, but the run was made "
                f"on {state['data_identity']}: resume with the same file, or start another run"
            )
        self.step = state["step"]
        self.epoch_stats.restore(state["sums"], state["collapsed_since"], state["world_size"])
        self.update_step.update.load_state_dict(state["loss_scale"])
        self.update_step.update.bind()
        if self.probe:
            self.probe.load_state_dict(state["probe"])

    def _build_engine(self) -> tuple[Any, Any]:
        import deepspeed

        optimizer = build_optimizer(self.objective, self.cfg.optim)
        config = build_ds_config(self.cfg, world_size=collectives.world_size())
        try:
            engine, optimizer, _, _ = deepspeed.initialize(
                model=self.objective, optimizer=optimizer, config=config, dist_init_required=False
            )
        except ValidationError as error:  # the only part that is not ours is what `ds` adds
            first = error.errors(include_url=False)[0]
            raise ConfigError(f"ds: DeepSpeed's {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        bind_partitions(optimizer)
        if collectives.world_size() == 1 and self.cfg.train.zero_stage == 0:
            engine.enable_backward_allreduce = False  # it copies every gradient twice to average it with no other
        if self.device.type == "cuda" and self.cfg.train.zero_stage == 0:
            # As the images are: or each convolution turns its weights around, forward and backward. ZeRO's flat buffers
            # and DeepSpeed's broadcast at the start want them contiguous.
            self.objective.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        return engine, optimizer

    def _build_probe(self, reader: BetonReader) -> OnlineProbe | None:
        """A linear probe where at least two classes are labelled; it learns from all but the held-out images."""
        if num_labelled_classes(reader) < 2:
            return None
        num_classes = int(reader.labels.max()) + 1
        _, holdout_ids = split_holdout(reader.num_samples, self.cfg.data.holdout_fraction, reader.labels)
        is_holdout = np.zeros(reader.num_samples, dtype=bool)
        is_holdout[holdout_ids] = True
        self.is_holdout = torch.from_numpy(is_holdout).to(self.device)
        return OnlineProbe(self.model.num_features, num_classes, self.cfg.eval).to(self.device)

    def _claim_folder(self, resuming: bool) -> None:
        check_shared_folder(self.folder, collectives.run_on_first_rank(self.folder.lock))
        if collectives.rank() == 0:
            if resuming:
                drop_incomplete(self.folder.checkpoints)
                self.folder.preempted.unlink(missing_ok=True)
            else:
                self.folder.create(self.cfg, collectives.world_size())
        collectives.barrier()
        if resuming:
            self._restore()
            self.skipped.resume(self.step)
        self._say(self._headline())
        self.epoch_stats.open(self.folder, self.step)

    def _leave(self) -> None:
        """End the training at a checkpoint, as a signal asked (all ranks).

        Raises:
            Preempted: Always.
        """
        how = f"{self.folder.path} goes on after step {self.step} of {self.total_steps} with --set run.resume=auto"
        self.epoch_stats.close()
        if collectives.rank() == 0:
            replace_text(self.folder.preempted, f"{how}\n")
        collectives.barrier()
        raise Preempted(f"asked to stop ({self.stop_request.name or 'another rank was'}): {how}")

    def _headline(self) -> str:
        num_parameters = sum(parameter.numel() for parameter in self.model.backbone.parameters())
        start = f", resumed at step {self.step}" if self.step else ""
        return (
            f"{self.cfg.loss.name} on {self.loader.num_samples:,} images, {self.cfg.model.backbone} "
            f"({num_parameters / 1e6:.2f} M parameters), global batch {self.cfg.data.global_batch_size} on "
            f"{collectives.world_size()} x {self.device.type}, {self.cfg.train.num_epochs} epochs of "
            f"{self.steps_per_epoch} steps{start} -> {self.folder.path}"
        )

    def _say(self, line: str) -> None:
        if collectives.rank() == 0:
            print(line, flush=True)


def train(cfg: Config, stop_request: StopRequest | None = None) -> None:
    """Run one training to its end.

    Args:
        cfg: Its configuration.
        stop_request: What has remembered signals until now.
    Raises:
        PeerLostError: another process of the run is lost.
    """
    with Watchdog() as watchdog:
        Trainer(cfg, watchdog, stop_request).fit()
    end_process()
