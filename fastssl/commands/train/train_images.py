"""`fastssl train FOLDER`: from images to an encoder in use, without a configuration."""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fastssl
from fastssl.checkpoint.save_load import last_checkpoint, step_of
from fastssl.commands.eval.evaluate_run import TRAINED, evaluate_run
from fastssl.config import build_config, load_config, with_overrides
from fastssl.errors import ConfigError, Preempted, UserError
from fastssl.evaluation.labels import num_labelled_classes
from fastssl.evaluation.protocols import outcome_names
from fastssl.machine.files import replace_bytes, replace_text
from fastssl.machine.nvidia_gpu import release_memory
from fastssl.plan.facts import count_processes
from fastssl.plan.make_plan import make_plan
from fastssl.processes.children import launch_command, signals_passed_on
from fastssl.processes.preemption import StopRequest
from fastssl.tracking.json_lines import read_rows
from fastssl.tracking.run_folder import RunFolder
from fastssl.tracking.trackers import check_installed
from fastssl.trainer import train
from pipelines.convert import ConvertReport, SourceKind, convert
from pipelines.convert.infer_kind import infer_kind
from pipelines.errors import DataError, SourceChangedError
from pipelines.files import read_file
from pipelines.loader import open_train_images
from pipelines.printable import printable
from pipelines.remote.store import is_url
from pipelines.shards.describe import short_name
from pipelines.shards.open_images import names_dataset

MAX_PX = 512  # of the longer side of a stored image: decoding larger ones takes time, and views have at most 224 px
_SOURCES_FILE, _SETTINGS_FILE, _ENCODER_FILE = "sources.json", "start.yaml", "encoder.pt"


def train_images(
    sources: str | Path | Sequence[str | Path],
    *,
    run: str | Path | None = None,
    kind: SourceKind | None = None,
    test: str | None = None,
    hours: float | None = None,
    init: str | None = None,
    max_bad: float | None = None,
    overrides: Sequence[str] = (),
    num_processes: int | None = None,
    dry_run: bool = False,
    stop_request: StopRequest | None = None,
) -> RunFolder:
    """Convert images, choose the settings, measure, train, evaluate where there are labels, and keep the encoder.

    The same call resumes what was interrupted: a conversion, or a training from its last checkpoint.

    Args:
        sources: A folder of images, another source of `fastssl convert`, or several; one .beton
            file, or one data set of many, is used as it is.
        run: The run's folder; None: runs/ and the name of the first source.
        kind: The kind of the sources; None: inferred.
        test: A source of test images, with the same classes.
        hours: Time for training and evaluation; None: see `fastssl.plan.epochs.choose_length`.
        init: Initial weights, see `fastssl.plan.initial_weights.prepare_initial_weights`; None: random ones.
        max_bad: See `pipelines.convert.convert`.
        overrides: `key=value` settings, which replace the choices.
        num_processes: Processes of the training; None: one per GPU, or one on the CPU.
        dry_run: Stop before the training.
        stop_request: What has remembered signals until now.

    Returns:
        The run's folder.

    Raises:
        UserError, DataError: What the user must change, in one line.
        DivergedError, Preempted, PeerLostError: See `fastssl.trainer.train`.
    """
    if hours is not None and not 0 < hours < 1e6:
        raise UserError(f"--hours must be a positive number of hours, not {hours:g}")
    asked = with_overrides({}, ["optim.warmup_epochs=0", *overrides])
    check_installed(build_config(asked).run.trackers)  # refuses bad settings before any work
    names = [str(each) for each in ([sources] if isinstance(sources, (str, Path)) else sources)]
    sections = with_overrides({}, overrides)
    given = {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}
    folder = RunFolder(given.pop("run.dir", None) or run or _default_folder(names))
    settings = folder.path / _SETTINGS_FILE
    is_same = _is_claimed(folder, names, test)
    if folder.config.exists():
        _say(f"{folder.path} has started already: its settings stay as they are; --run NAME starts another run")
        cfg = folder.load_config()
        num_processes = num_processes or count_processes(cfg.run.device)
    else:
        for each in (*names, *([test] if test else [])):
            if kind is None and not _is_converted(each):
                infer_kind(each)  # refuses what is no source before anything is written
        _claim(folder, names, test)
        converter = _Converter(folder, kind, max_bad, is_same=is_same)
        paths = {"run.dir": str(folder.path), "data.train": converter.converted(names, "train")}
        if test:
            paths["data.test"] = converter.converted([test], "test")
        plan = make_plan(paths, settings, given=given, hours=hours, init=init, num_processes=num_processes, say=_say)
        for line in plan.lines():
            _say(line)
        num_processes = plan.facts.num_processes
    if dry_run:
        _say(f"next: fastssl train --cfg {settings}")
        return folder
    if stop_request is not None and stop_request.name:
        raise Preempted("asked to stop before the training: the same command continues")
    _train(settings, num_processes, stop_request)
    _keep_encoder(folder)
    _evaluate(folder)
    table = f"{folder.path}.parquet"
    _say(f"next: fastssl embed {names[0]} --model {folder.path} --out {table}")
    _say(f"      fastssl neighbours {table} IMAGE --out neighbours.png")
    return folder


def _default_folder(sources: Sequence[str]) -> Path:
    if names_dataset(sources[0]):
        return Path("runs") / short_name(sources[0])
    path = Path(os.path.abspath(sources[0]))
    name = path.stem if path.is_file() else path.name
    if not name:
        raise UserError(f"{sources[0]} has no name to call the run by: name its folder with --run")
    return Path("runs") / name


def _is_claimed(folder: RunFolder, sources: Sequence[str], test: str | None) -> bool:
    """Whether the folder is one of these sources, by the note in it.

    Raises:
        UserError: the folder holds a run on something else.
    """
    note = folder.path / _SOURCES_FILE
    try:
        is_same = json.loads(read_file(note)) == _about(sources, test)
    except (OSError, ValueError):
        is_same = False
    if folder.config.exists() and not is_same:
        raise UserError(f"{folder.path} holds a run on other images ({note}): choose another folder with --run")
    return is_same


def _claim(folder: RunFolder, sources: Sequence[str], test: str | None) -> None:
    """Note in the run's folder what it is made from.

    Raises:
        UserError: it cannot be written.
    """
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        replace_text(folder.path / _SOURCES_FILE, json.dumps(_about(sources, test), indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{folder.path} cannot be written ({error.strerror}): choose another one with --run") from None


def _about(sources: Sequence[str], test: str | None) -> dict[str, Any]:
    return {"sources": [_absolute(source) for source in sources], "test": test and _absolute(test)}


def _absolute(source: str) -> str:
    return source if is_url(source) else os.path.abspath(source)


def _is_converted(source: str) -> bool:
    """Whether it is a .beton file or a data set of many."""
    return source.lower().endswith(".beton") or names_dataset(source)


@dataclass(frozen=True)
class _Converter:
    """Converts sources into the folder of a run that has not started."""

    folder: RunFolder
    kind: SourceKind | None
    max_bad: float | None
    is_same: bool  # what is there is of the same sources: a conversion is resumed

    def converted(self, sources: Sequence[str], name: str) -> str:
        """The .beton file of some sources: converted into the run's folder, or what was given, if it is converted.

        Images that were added, removed or changed since an earlier conversion start it again.
        """
        if len(sources) == 1 and _is_converted(sources[0]) and (self.kind is None or is_url(sources[0])):
            return sources[0] if is_url(sources[0]) else str(Path(sources[0]))
        out = self.folder.path / "data" / f"{name}.beton"
        _say(f"converting {', '.join(sources)} to {out}")
        try:
            report = self._convert(sources, out, resume=self.is_same)
        except SourceChangedError:
            _say("the images have changed since they were converted: converting them again")
            report = self._convert(sources, out, resume=False)
        except ValueError as error:
            if isinstance(error, DataError):
                raise
            raise UserError(str(error)) from None
        _say(f"{out}: {report.num_images:,} images in {report.wall_s:.0f} s")
        return str(out)

    def _convert(self, sources: Sequence[str], out: Path, *, resume: bool) -> ConvertReport:
        return convert(
            self.kind, sources, out, max_px=MAX_PX, max_bad=self.max_bad, resume=resume, overwrite=not resume
        )


def _train(settings: Path, num_processes: int, stop_request: StopRequest | None) -> None:
    if num_processes == 1:
        train(load_config(settings, ["run.resume=auto"]), stop_request=stop_request)
        release_memory()  # for the evaluation, whose decoder allocates its own
        return
    folder = RunFolder(load_config(settings).run.dir)
    folder.preempted.unlink(missing_ok=True)  # of an earlier start
    script = str(Path(fastssl.__file__).with_name("train.py"))
    program = [script, "--cfg", str(settings), "--set", "run.resume=auto"]
    with signals_passed_on() as child:
        code = child.start(launch_command(num_processes, program)).wait()
    if folder.preempted.exists():
        raise Preempted("asked to stop: the same command resumes the training")
    if code:
        raise UserError(f"the training in {num_processes} processes ended with exit code {code}: see above")


def _evaluate(folder: RunFolder) -> None:
    """Print the accuracy where there are labels; an evaluation that is there already is not repeated."""
    if num_labelled_classes(open_train_images(folder.load_config().data)) < 2:
        _say("no labels, so no accuracy: look at neighbours instead")
        return
    if _is_evaluated(folder):
        _say(f"evaluated already: {folder.evaluations}")
        return
    try:
        print(evaluate_run(folder.path).text(shutil.get_terminal_size().columns), flush=True)
    except ConfigError as error:
        _say(f"no accuracy: {error}")


def _is_evaluated(folder: RunFolder) -> bool:
    """Whether the last checkpoint has all results of the default evaluation: its rows come one by one."""
    cfg, checkpoint = folder.load_config(), last_checkpoint(folder.checkpoints)
    rows = read_rows(folder.evaluations, "encoder", "name", "checkpoint_step")
    step = checkpoint and step_of(checkpoint)
    found = {row["name"] for row in rows if row["encoder"] == TRAINED and row["checkpoint_step"] == step}
    plans = [row["plan"] for row in rows if isinstance(row.get("plan"), dict)]
    left_out = {tuple(each) for plan in plans for each in plan.get("left_out", ()) if isinstance(each, list)}
    return outcome_names(cfg.eval) <= found | {name for encoder, name in left_out if encoder == TRAINED}


def _keep_encoder(folder: RunFolder) -> None:
    """Copy the weights of the last checkpoint to a place of their own."""
    checkpoint = last_checkpoint(folder.checkpoints)
    if checkpoint is None:
        raise ConfigError(f"{folder.path} has no checkpoint")
    out = folder.path / _ENCODER_FILE
    replace_bytes(out, (checkpoint / "weights.pt").read_bytes())
    _say(f"encoder: {out}")


def _say(line: str) -> None:
    print(printable(line), flush=True)
