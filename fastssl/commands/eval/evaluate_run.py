"""`fastssl eval RUN`: evaluate a checkpoint's encoder and the baselines on the run's data or on another data set."""

import json
import sys
import time
from collections.abc import Container, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastssl.checkpoint.checksums import sha256_of
from fastssl.checkpoint.save_load import checkpoint_of, load_weights, step_of
from fastssl.checkpoint.weights import put_weights
from fastssl.commands.eval.evaluation_plan import RAW_PIXELS, UNTRAINED, plan_evaluation
from fastssl.config import Config, check_built
from fastssl.errors import ConfigError
from fastssl.evaluation.config import ProtocolName
from fastssl.evaluation.feature_cache import cached_features, data_identity
from fastssl.evaluation.features import encode_batches
from fastssl.evaluation.images import Images, Part, build_plain_loader
from fastssl.evaluation.knn import bounded_k_line
from fastssl.evaluation.parts import choose_parts, duplicates_across
from fastssl.evaluation.protocols import PROTOCOLS, evaluate
from fastssl.evaluation.results import DETAILS, LEGEND, SHOWN, Line, append_line, table_row
from fastssl.evaluation.task import Task
from fastssl.machine.environment import describe_environment
from fastssl.models.backbones import build_backbone, without_pretraining
from fastssl.processes.launch import choose_device, num_threads_of
from fastssl.tracking import plots
from fastssl.tracking.report import Report
from fastssl.tracking.run_folder import RunFolder
from fastssl.tracking.writers import best_held_out, training_time
from pipelines.printable import printable
from pipelines.progress import Progress
from pipelines.remote.store import is_url
from pipelines.shards.open_images import AnyImages
from pipelines.views import build_eval_spec

TRAINED = "pre-trained encoder"  # name in the results


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """An encoder to evaluate.

    Attributes:
        name: Name in the results.
        module: Images -> features.
        identity: Identifies its features in the cache, JSON values; None: they are not cached.
        step: Step of its checkpoint; of baselines, that of the encoder they are compared with.
    """

    name: str
    module: nn.Module
    identity: dict[str, Any] | None
    step: int


def evaluate_run(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    what: Sequence[str] = (),
    on: str | Path | None = None,
    test: str | Path | None = None,
    step: int | None = None,
) -> Report:
    """Evaluate the last checkpoint of a run and the best one by held-out images, or the one of a step.

    Results are appended to eval.jsonl and returned as a table.

    Classifiers are trained on the labelled images of the training part and evaluated once on the test part; their
    settings are chosen on a validation part of the training part. See `choose_parts` for the two parts.

    Args:
        path: The run's folder.
        overrides: `key=value` changes of the run's configuration, such as eval.knn_k=10 or data.test=other.beton.
        what: Protocols, instead of eval.what.
        on: Another data set to evaluate on.
        test: The test file.
        step: Step of the checkpoint; None: the last one and, in a run with eval.every_epochs, the best one.

    Raises:
        ConfigError: no run, no such checkpoint, no labels, or settings that do not fit the data.
        DataError: a file cannot be read.
    """
    folder = RunFolder(path)
    cfg = folder.load_config([*overrides, *([f"eval.what={json.dumps(list(what))}"] if what else [])])
    check_built(cfg, "model")
    checkpoints = {TRAINED: checkpoint_of(folder.checkpoints, step)}
    best = best_held_out(folder.metrics)
    if step is None and best and best[0] != step_of(checkpoints[TRAINED]):
        try:
            checkpoints["best pre-trained encoder"] = checkpoint_of(
                folder.checkpoints, best[0], option="the best epoch"
            )
        except ConfigError as error:
            print(printable(f"fastssl: warning: {error}; it is not evaluated"), file=sys.stderr, flush=True)
    device = choose_device(cfg.run.device)
    torch.set_num_threads(num_threads_of(cfg.run))
    train, test_part, scored_on = choose_parts(cfg.data, on, test)
    _check_settings(cfg, train)
    trained = training_time(folder.metrics, cfg.data.global_batch_size)
    image_px = load_weights(checkpoints[TRAINED])["image_px"]
    plan = plan_evaluation(
        cfg,
        list(checkpoints),
        train,
        test_part,
        device,
        image_px=image_px,
        trained=trained,
        is_asked_for=bool(what),
    )
    found = duplicates_across(train, test_part)
    duplicates = f"{scored_on}{found}" if found else None

    about = {
        "scored_on": scored_on,
        "duplicates": duplicates,
        "on": str(train.reader.path if is_url(str(on)) else on) if on else None,
        "train": {"path": str(train.reader.path), "num_labelled": len(train.ids), **data_identity(train.reader)},
        "test": {"path": str(test_part.reader.path), "num_labelled": len(test_part.ids)}
        | data_identity(test_part.reader),
        "settings": asdict(cfg.eval),
        "overrides": list(overrides),
        "plan": plan.record,
        "environment": describe_environment(world_size=1),
    }
    bounded = bounded_k_line(cfg.eval, train.labels) if "knn" in cfg.eval.what else None
    for notice in filter(None, (duplicates, plan.duration, plan.left_out, bounded)):
        print(printable(f"fastssl: {notice}"), file=sys.stderr, flush=True)
    lines: list[Line] = []
    for encoder in _encoders(cfg, checkpoints, plan.protocols, image_px):
        for line in _judge(cfg, encoder, plan.protocols[encoder.name], train, test_part, device, folder.features):
            lines.append(line | {"checkpoint_step": encoder.step} | about)
            append_line(folder.evaluations, lines[-1])
    plots.draw_curves(folder)
    steps = {name: step_of(path) for name, path in checkpoints.items()}
    return Report(
        values={
            "scored_on": scored_on,
            "duplicates": duplicates,
            "checkpoint_steps": steps,
            "rows": lines,
            "left_out": plan.left_out,
        },
        rows=[table_row(line) for line in lines],
        columns=SHOWN,
        details=DETAILS,
        head=f"accuracy on {scored_on}; {', '.join(f'{name}: step {step}' for name, step in steps.items())}",
        foot="\n".join(filter(None, (LEGEND, duplicates, plan.left_out))),
    )


def _check_settings(cfg: Config, train: Part) -> None:
    for name in cfg.eval.what:
        try:
            PROTOCOLS[name].check(cfg.eval, train.labels)
        except ValueError as error:
            raise ConfigError(f"{name} on {train.reader.path}: {error}") from None


def _encoders(cfg: Config, checkpoints: dict[str, Path], wanted: Container[str], image_px: int) -> Iterator[Encoder]:
    """The wanted ones of the baselines, then of the checkpoints' encoders."""
    step = step_of(checkpoints[TRAINED])
    if RAW_PIXELS in wanted:
        yield Encoder(name=RAW_PIXELS, module=nn.Flatten(), identity=None, step=step)
    if UNTRAINED in wanted:
        torch.manual_seed(cfg.run.seed)  # the encoder as initialised by the run's seed (ignores run.init_from)
        untrained, _ = build_backbone(cfg.model, image_px)
        identity = {"untrained": asdict(cfg.model), "image_px": image_px, "seed": cfg.run.seed}
        yield Encoder(name=UNTRAINED, module=untrained, identity=identity, step=step)
    for name, checkpoint in checkpoints.items():
        if name not in wanted:
            continue
        step = step_of(checkpoint)
        backbone, _ = build_backbone(without_pretraining(cfg.model), image_px)
        put_weights(load_weights(checkpoint), checkpoint, backbone=backbone)
        identity = {"checkpoint_step": step, "weights_sha256": sha256_of(checkpoint / "weights.pt")}
        yield Encoder(name=name, module=backbone, identity=identity, step=step)


def _judge(
    cfg: Config,
    encoder: Encoder,
    protocols: Sequence[ProtocolName],
    train: Part,
    test: Part,
    device: torch.device,
    folder: Path,
) -> Iterator[Line]:
    module = encoder.module.to(device)
    train_x, test_x = (_features(cfg, encoder, part, device, folder) for part in (train, test))
    images = (
        Images(cfg.eval, cfg.data, cfg.views, module, train=train, test=test, device=device)
        if encoder.identity
        else None
    )
    num_classes = int(max(train.labels.max(), test.labels.max())) + 1
    task = Task(
        cfg=cfg.eval,
        train_x=train_x,
        train_y=train.labels,
        test_x=test_x,
        num_classes=num_classes,
        images=images,
        device=device,
        encoder=encoder.name,
    )
    started = time.perf_counter()
    try:
        for name, result in evaluate(task, test.labels, protocols):
            wall_s, started = time.perf_counter() - started, time.perf_counter()
            yield {"encoder": encoder.name, "identity": encoder.identity, "name": name, **result, "wall_s": wall_s}
    finally:
        if images:
            images.close()


def _features(cfg: Config, encoder: Encoder, part: Part, device: torch.device, folder: Path) -> np.ndarray:
    """Features of a part, float32 [n, F]."""

    def encode() -> Iterator[np.ndarray]:
        loader = build_plain_loader(cfg.eval, cfg.data, cfg.views, part.reader, device)
        what = f"{encoder.name}: features of {Path(part.reader.path).name}"
        with closing(loader), Progress(what, part.reader.num_samples, file=sys.stderr, leave=False) as progress:
            for features in encode_batches(encoder.module, loader):
                yield features
                progress.advance(len(features))

    if encoder.identity is None:
        features = np.concatenate(list(encode()))
    else:
        name = f"{encoder.name.split()[0]}_{Path(part.reader.path).stem}"
        key = _feature_key(cfg, encoder, part.reader, device)
        features = cached_features(folder, name, key, part.reader.num_samples, encode)
    if len(part.ids) < part.reader.num_samples:
        features = features[part.ids]
    return features.astype(np.float32, copy=False)


def _feature_key(cfg: Config, encoder: Encoder, reader: AnyImages, device: torch.device) -> dict[str, Any]:
    """Everything that features depend on (except batch size and thread count, which may change the last bits)."""
    view = asdict(build_eval_spec(cfg.views)) | {"mean": cfg.views.mean, "std": cfg.views.std}
    made_by = {"engine": cfg.data.engine, "device": device.type, "torch": torch.__version__}
    data = data_identity(reader)
    return {"encoder": encoder.identity, "data": data, "view": view, "dtype": cfg.eval.feature_dtype, **made_by}
