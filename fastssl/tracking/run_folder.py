"""The folder of a run: claimed once, never overwritten, with the files needed to understand the run later."""

import fcntl
import hashlib
import json
import os
import secrets
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from fastssl.config import Config, differing_keys, free_keys, load_config, read_tree, to_dict
from fastssl.errors import ConfigError
from fastssl.machine.environment import describe_environment
from fastssl.machine.files import replace_text
from fastssl.machine.yaml_text import dump_yaml
from pipelines.files import read_file

_WITHIN_RUN = 4  # a path, and folders above it: weights.pt lies in RUN/checkpoints/step_X/
_STATE_SECTIONS = ("model", "loss", "optim", "custom")  # which tensors there are, and what they mean
_LOCKS: dict[Path, IO[str]] = {}  # lock files held by trainings in this process


def run_above(path: str | Path) -> "RunFolder | None":
    """The run that a path lies in: its folder, a checkpoint's folder, or a file in either; None: there is none."""
    path = Path(path)
    for folder in [path, *path.absolute().parents][:_WITHIN_RUN]:
        if (folder / "config.yaml").is_file():
            return RunFolder(folder)
    return None


class RunFolder:
    """Paths of one run.

    Layout: config.yaml, run.json (the run's id), environment.json, metrics.jsonl, tensorboard/,
    checkpoints/step_XXXXXXXX/, views.png, curves.png, features/, eval.jsonl; trackers/, what run.trackers write;
    report.html of `fastssl report`; nonfinite.jsonl if steps were skipped; preempted, while a run ended by a signal
    waits to be resumed; lock, held by the first rank of a training; hessian/, gradflow/ and gradnorm/
    (docs/analysis.md), each with one folder per checkpoint.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.id_file = self.path / "run.json"
        self.environment = self.path / "environment.json"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.views = self.path / "views.png"
        self.curves = self.path / "curves.png"
        self.features = self.path / "features"
        self.evaluations = self.path / "eval.jsonl"
        self.trackers = self.path / "trackers"
        self.nonfinite = self.path / "nonfinite.jsonl"
        self.preempted = self.path / "preempted"
        self.lock_file = self.path / "lock"
        self.hessian = self.path / "hessian"
        self.gradflow = self.path / "gradflow"
        self.gradnorm = self.path / "gradnorm"

    def check_claim(self, cfg: Config) -> bool:
        """Whether to resume a run; refuses to overwrite one.

        Raises:
            ConfigError: the folder holds a run and run.resume is "never", the run was made with another config, or
                the folder cannot be written.
        """
        if not self.config.exists():
            self._check_fresh()
            return False
        if cfg.run.resume == "never":
            raise ConfigError(
                f"run.dir: {self.path} already contains a run: resume it with --set run.resume=auto, or choose another "
                "run.dir"
            )
        differences = differing_keys(to_dict(self.load_config()), to_dict(cfg), ignore=free_keys())
        # Runs of older versions have the default's old name: "auto" of their one file is "random".
        differences = [line for line in differences if line != "data.order: random -> auto"]
        if differences:
            raise ConfigError(
                f"run.dir: {self.path} was started with a different configuration: {'; '.join(differences)}; resume "
                "with the same one, or choose another run.dir"
            )
        return True

    def lock(self) -> str:
        """Lock the folder against other trainings until this process ends (rank 0).

        Returns:
            An identifier of this training, by which other ranks recognise the folder.
        Raises:
            ConfigError: another training holds the lock, or the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if held := _LOCKS.pop(self.lock_file.resolve(), None):
                held.close()  # left by a finished training in this process
            file = _LOCKS[self.lock_file.resolve()] = self.lock_file.open("a")
        except OSError as error:
            raise ConfigError(f"run.dir: {self.path} cannot be written ({error.strerror})") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = self.read_lock() or "another process"
            raise ConfigError(
                f"run.dir: {self.path} is in use by {who}: wait for it to end, or choose another run.dir"
            ) from None
        except OSError:  # the file system does not support locks
            pass
        mark = f"process {os.getpid()} on {socket.gethostname()} ({secrets.token_hex(8)})"
        file.truncate(0)
        file.write(mark)
        file.flush()
        return mark

    def read_lock(self) -> str | None:
        """The identifier written by the training that holds the lock; None: no lock file is visible."""
        try:
            return self.lock_file.read_text(errors="replace")
        except OSError:
            return None

    def check_micro_batches(self, cfg: Config) -> None:
        """Refuse to resume with another number of micro-batches than the run used; for a model with batch norm.

        Raises:
            ConfigError: the number of micro-batches differs.
        """
        saved, wanted = self.load_config().train.num_micro_batches, cfg.train.num_micro_batches
        if saved != wanted:
            raise ConfigError(
                f"train.num_micro_batches: {self.path} was started with {saved}, not {wanted}, and batch norm takes "
                f"its statistics from each micro-batch: resume with {saved}, or choose another run.dir"
            )

    def create(self, cfg: Config, world_size: int) -> None:
        """Write the resolved configuration, an id of the run and the environment (rank 0).

        Raises:
            ConfigError: the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            replace_text(self.id_file, json.dumps({"id": secrets.token_hex(8)}) + "\n")
            self.environment.write_text(json.dumps(describe_environment(world_size), indent=2) + "\n")
            replace_text(self.config, dump_yaml(to_dict(cfg)))  # last: its presence marks a run
        except OSError as error:
            raise ConfigError(f"run.dir: {self.path} cannot be written ({error.strerror})") from None

    def identity(self) -> dict[str, str] | None:
        """What the checkpoints of this run carry: its "id", and "config", a digest of what determines the state.

        The digest is of config.yaml as it was written: another version may fill in other defaults, but the file stays.

        Returns:
            None: there is no run here, or it is older than these ids.
        Raises:
            ConfigError: run.json is damaged.
        """
        if not self.id_file.is_file() or not self.config.is_file():
            return None
        try:
            run_id = json.loads(read_file(self.id_file, 1000))["id"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            run_id = None
        if not isinstance(run_id, str):
            raise ConfigError(f"{self.id_file} is damaged: restore it, or delete it and checkpoints are not compared")
        tree = read_tree(self.config)
        sections = json.dumps({name: tree.get(name) for name in _STATE_SECTIONS}, sort_keys=True, default=str)
        return {"id": run_id, "config": hashlib.sha256(sections.encode()).hexdigest()}

    def load_config(self, overrides: Sequence[str] = ()) -> Config:
        """The resolved configuration of the run, with `key=value` changes.

        Raises:
            ConfigError: the folder holds no run.
        """
        if not self.config.exists():
            raise ConfigError(f"{self.path} is not the folder of a run: it has no config.yaml")
        return load_config(self.config, overrides)

    def _check_fresh(self) -> None:
        """Check that there are no files of another run and that the folder can be created.

        Every rank checks, so that all of them stop.
        """
        if any(self.checkpoints.glob("step_*")):
            raise ConfigError(f"run.dir: {self.path} contains checkpoints but no config.yaml: choose another run.dir")
        existing = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise ConfigError(
                f"run.dir: {self.path} cannot be written ({existing} is a file or not writable): choose another"
            )
