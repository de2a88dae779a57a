"""Fine-tuning: the whole encoder and a linear classifier are trained on the labels for a few epochs."""

# B batch size, F features, C classes, E epochs

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastssl.evaluation.config import EvalConfig
from fastssl.evaluation.features import eval_mode
from fastssl.evaluation.images import Images
from fastssl.evaluation.linear_heads import MOMENTUM, cosine
from fastssl.evaluation.task import Outcome, Task, rank_classes, split_validation
from pipelines.progress import Progress


def finetune(task: Task) -> dict[str, Outcome]:
    """Choose learning rate and epoch on the validation part, then train from the start on the whole training part.

    SGD with momentum, cosine schedule, random crops and flips. Ties go to the later epoch and the smaller learning
    rate.
    """
    images, cfg = task.images, task.cfg
    assert images is not None
    with task.progress("finetune", cfg.num_seeds * cfg.finetune_epochs * len(task.train_y)) as progress:
        return _finetune(task, images, progress)


def _finetune(task: Task, images: Images, progress: Progress) -> dict[str, Outcome]:
    cfg, num_images = task.cfg, len(task.train_y)
    lr, epoch, validation_top1 = _choose(task, images, progress)
    progress.extend(-cfg.num_seeds * (cfg.finetune_epochs - epoch - 1) * num_images)
    chosen: dict[str, Any] = {"lr": lr, "epoch": epoch + 1, "num_epochs": cfg.finetune_epochs}
    chosen |= {"layer_decay": cfg.finetune_layer_decay, "weight_decay": cfg.finetune_weight_decay}
    chosen["validation_top1"] = validation_top1

    ranked = []
    for seed in range(cfg.num_seeds):
        learning = _learn(task, images, np.arange(num_images), lr, seed, progress)
        model = next(itertools.islice(learning, epoch, None))
        ranked.append(rank_classes(_logits(model, images.plain_test())))
    return {"finetune": Outcome(ranked=ranked, chosen=chosen, repeated_over="seeds")}


def _choose(task: Task, images: Images, progress: Progress) -> tuple[float, int, float]:
    """The best learning rate on the validation part, its best epoch (0-based), and the accuracy there."""
    lrs = task.cfg.finetune_lrs
    fit, validation = split_validation(task.train_y)
    top1 = np.empty((task.cfg.finetune_epochs, len(lrs)))
    progress.extend(top1.size * len(fit))
    for index, lr in enumerate(lrs):
        for epoch, model in enumerate(_learn(task, images, fit, lr, 0, progress)):
            logits = _logits(model, images.plain_train(validation))
            hits = (logits.argmax(1) == task.train_y[validation]) & np.isfinite(logits).all(1)  # none if it diverged
            top1[epoch, index] = hits.mean()
    epoch, index = max(np.ndindex(*top1.shape), key=lambda at: (top1[at], at[0], -lrs[at[1]]))
    return lrs[index], epoch, float(top1[epoch, index])


def parameter_groups(model: nn.Sequential, lr: float, cfg: EvalConfig) -> list[dict[str, Any]]:
    """Groups of the optimizer: learning rates by layer; no weight decay on biases and norm parameters.

    The classifier has the learning rate `lr`, the layer before it eval.finetune_layer_decay times that, and so on
    (as in Bao et al. 2021 (BEiT), arXiv:2106.08254). Layers are the encoder's direct children with parameters, or the
    blocks of a child that is a sequence. Parameters of the encoder itself, such as a class token, belong to the first
    layer.

    Args:
        model: Encoder and classifier.
        lr: Peak learning rate of the classifier.
        cfg: The eval section.
    """
    encoder, classifier = model
    layers = [list(layer.parameters()) for layer in _layers(encoder)]
    known = {id(parameter) for layer in layers for parameter in layer}
    layers[0] += [parameter for parameter in encoder.parameters() if id(parameter) not in known]
    layers.append(list(classifier.parameters()))
    return [
        {"params": chosen, "lr": lr * cfg.finetune_layer_decay ** (len(layers) - 1 - depth), "weight_decay": decay}
        for depth, layer in enumerate(layers)
        for chosen, decay in (
            ([p for p in layer if p.ndim > 1], cfg.finetune_weight_decay),
            ([p for p in layer if p.ndim <= 1], 0.0),
        )
        if chosen
    ]


def _layers(encoder: nn.Module) -> list[nn.Module]:
    found: list[nn.Module] = []
    for child in encoder.children():
        found += child.children() if isinstance(child, nn.Sequential | nn.ModuleList) else [child]
    return [layer for layer in found if any(True for _ in layer.parameters())] or [encoder]


def _learn(
    task: Task, images: Images, positions: np.ndarray, lr: float, seed: int, progress: Progress
) -> Iterator[nn.Module]:
    """Yield the model after each epoch; the classifier is initialised to zero."""
    cfg = task.cfg
    torch.manual_seed(seed)  # for dropout
    classifier = nn.Linear(task.train_x.shape[1], task.num_classes, device=task.device)
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    model = nn.Sequential(copy.deepcopy(images.encoder), classifier).train()
    optimizer = torch.optim.SGD(parameter_groups(model, lr, cfg), momentum=MOMENTUM)
    peaks = [group["lr"] for group in optimizer.param_groups]
    labels = torch.from_numpy(task.train_y).to(task.device)
    for epoch in range(cfg.finetune_epochs):
        num_batches, batches = images.augmented(positions, seed, epoch)
        for number, (view, rows) in enumerate(batches):
            if len(rows) < 2:  # batch norm needs more than one image
                continue
            factor = cosine(epoch * num_batches + number, cfg.finetune_epochs * num_batches)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            optimizer.zero_grad(set_to_none=True)
            cross_entropy(model(view).float(), labels[torch.from_numpy(rows).to(task.device)]).backward()
            optimizer.step()
            progress.advance(len(rows))
        yield model


def _logits(model: nn.Module, views: Iterator[Tensor]) -> np.ndarray:
    """Logits [M, C] of plain views."""
    with eval_mode(model), torch.inference_mode():
        return np.concatenate([model(view).float().cpu().numpy() for view in views])
