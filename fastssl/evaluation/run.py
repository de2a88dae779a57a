"""`fastssl eval RUN`: the last checkpoint's encoder against the baselines, on the run's own data."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastssl import report
from fastssl.checkpoint import last_checkpoint, load_weights, step_of
from fastssl.config import Config
from fastssl.errors import ConfigError
from fastssl.evaluation import evaluate_arrays, format_table
from fastssl.evaluation.features import extract_features
from fastssl.evaluation.labels import check_test_data, num_labelled_classes
from fastssl.launch import choose_device, num_threads_of
from fastssl.models.backbones import build_backbone
from fastssl.run_folder import RunFolder, replace_text
from pipelines.beton import BetonReader
from pipelines.loader import build_eval_loader
from pipelines.sampler import split_holdout

Split = tuple[np.ndarray, np.ndarray]  # features [N, F] float32, labels [N] int64


def evaluate_run(path: str | Path, overrides: Sequence[str] = ()) -> str:
    """Evaluate a run's last checkpoint, write eval.json and return a table.

    With `data.test` the classifiers learn from all labelled training images and are read once on the test
    images; their settings were chosen on a part of the training images. Without it, they learn from the training
    images that are not held out and the held-out ones are scored.

    Args:
        path: The run's folder.
        overrides: `key=value` changes of the run's configuration, such as eval.knn_k=10 or data.test=other.beton.

    Raises:
        ConfigError: no run, no checkpoint, or no labels.
    """
    folder = RunFolder(path)
    cfg = folder.load_config(overrides)
    checkpoint = last_checkpoint(folder.checkpoints)
    if checkpoint is None:
        raise ConfigError(f"{folder.path} has no checkpoint yet")
    device = choose_device(cfg.run.device)
    torch.set_num_threads(num_threads_of(cfg.run))
    weights = load_weights(checkpoint)
    image_px = weights["image_px"]

    _check_data(cfg)
    results: dict[str, dict[str, Any]] = {}
    if cfg.eval.baselines:
        results["raw pixels"] = _evaluate(cfg, nn.Flatten(), device)
        results["untrained encoder"] = _evaluate(cfg, _untrained(cfg, image_px), device)
    backbone, _ = build_backbone(cfg.model, image_px)
    backbone.load_state_dict(weights["backbone"])
    results["pre-trained encoder"] = _evaluate(cfg, backbone, device)

    scored_on = "test" if cfg.data.test else "held-out part of train"
    document = {"checkpoint_step": step_of(checkpoint), "scored_on": scored_on, "results": results}
    replace_text(folder.evaluation, json.dumps(document, indent=2) + "\n")
    report.draw_curves(folder)
    return f"accuracy on {scored_on}, step {step_of(checkpoint)}\n{format_table(results)}"


def _check_data(cfg: Config) -> None:
    train = BetonReader(cfg.data.train)
    if num_labelled_classes(train) < 2:
        raise ConfigError(f"{cfg.data.train} holds fewer than two labelled classes: there is nothing to evaluate")
    if not cfg.data.test and round(train.num_samples * cfg.data.holdout_fraction) == 0:
        raise ConfigError("data.test is not set and data.holdout_fraction holds out no image: nothing to be judged by")
    check_test_data(cfg, train)


def _untrained(cfg: Config, image_px: int) -> nn.Module:
    """The encoder as the run's seed made it (run.init_from is not taken)."""
    torch.manual_seed(cfg.run.seed)
    return build_backbone(cfg.model, image_px)[0]


def _evaluate(cfg: Config, encoder: nn.Module, device: torch.device) -> dict[str, Any]:
    encoder = encoder.to(device)
    train = _features(cfg, BetonReader(cfg.data.train), encoder, device)
    if cfg.data.test:
        test = _features(cfg, BetonReader(cfg.data.test), encoder, device)
    else:
        train, test = _split(train, cfg.data.holdout_fraction)
    try:
        return evaluate_arrays(*_labelled(train), *_labelled(test), cfg.eval)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _features(cfg: Config, reader: BetonReader, encoder: nn.Module, device: torch.device) -> Split:
    loader = build_eval_loader(
        reader,
        cfg.views,
        local_batch_size=cfg.eval.local_batch_size,
        engine=cfg.data.engine,
        device=device,
        num_workers=cfg.data.num_workers,
    )
    try:
        return extract_features(encoder, loader)
    finally:
        loader.close()


def _split(data: Split, holdout_fraction: float) -> tuple[Split, Split]:
    features, labels = data
    fit_ids, holdout_ids = split_holdout(len(labels), holdout_fraction, labels)
    return (features[fit_ids], labels[fit_ids]), (features[holdout_ids], labels[holdout_ids])


def _labelled(data: Split) -> Split:
    features, labels = data
    return features[labels >= 0], labels[labels >= 0]
