"""The settings of a run that fit its images and its machine, each with the reason."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastssl.plan.facts import Facts
from fastssl.plan.initial_weights import IMAGENET_MEAN, IMAGENET_STD, InitialWeights

MIN_IMAGES = 2
FEW_IMAGES = 10_000  # fewer: say what to expect
VERY_FEW_IMAGES = 1_000
_MANY_IMAGES = 100_000  # enough for a ResNet-50
_SMALL_PX = 96  # up to this size, the recipe for small images
_RESIDENT_SHARE = 0.25  # of a GPU's memory, for the decoded images


@dataclass(frozen=True)
class Choice:
    """One setting.

    Attributes:
        key: Dotted key of the configuration.
        value: Its value.
        why: The reason, for the user.
    """

    key: str
    value: Any
    why: str


def choose(
    facts: Facts, *, backbone: str | None = None, weights: InitialWeights | None = None, size_px: int | None = None
) -> list[Choice]:
    """All settings but the number of epochs, which `fastssl.plan.epochs.choose_length` takes from the measured time.

    Nothing here is tuned: the recipes are those of `configs/loss/mio_small.yaml` (images of up to 96 px) and
    `configs/mio_resnet18_folder_100ep.yaml` (photographs at 224 px).

    Args:
        facts: At least MIN_IMAGES images.
        backbone: Given by the user; None: it is chosen.
        weights: Initial weights; None: random ones.
        size_px: Side of the views, given by the user; None: it is chosen.
    """
    size = [Choice("views.size_px", size_px, "as given")] if size_px else _choose_size(facts, weights)
    chosen_px = size[0].value
    return [
        *size,
        *_choose_model(facts, chosen_px, backbone, weights),
        *_choose_recipe(facts, chosen_px, weights),
        *_choose_machine(facts),
    ]


def _choose_size(facts: Facts, weights: InitialWeights | None) -> list[Choice]:
    short_px = facts.short_side_px
    if weights and weights.size_px:
        return [Choice("views.size_px", weights.size_px, "the model of the initial weights takes no other")]
    for limit_px, size_px in ((48, 32), (80, 64)):
        if short_px <= limit_px:
            return [
                Choice("views.size_px", size_px, f"half of the images are at most {short_px} px on their shorter side")
            ]
    if facts.device == "cpu" and weights:
        return [Choice("views.size_px", 128, "no GPU: 224 px, which most weights were trained with, takes longer")]
    if facts.device == "cpu":
        return [Choice("views.size_px", 64, "no GPU: a view of 224 px has 12 times as many pixels")]
    if short_px <= 160:
        return [
            Choice("views.size_px", _SMALL_PX, f"half of the images are at most {short_px} px on their shorter side")
        ]
    return [
        Choice("views.size_px", 224, "photographs on a GPU"),
        Choice("views.eval_crop_fraction", 0.875, "the usual centre crop at 224 px"),
    ]


def _choose_model(facts: Facts, size_px: int, backbone: str | None, weights: InitialWeights | None) -> list[Choice]:
    if weights:
        why = "as the initial weights need it"
        chosen = [Choice("run.init_from", weights.path, "--init")]
        chosen += [Choice(f"model.{key}", value, why) for key, value in weights.model.items()]
        if weights.mean != IMAGENET_MEAN or weights.std != IMAGENET_STD:
            chosen += [Choice("views.mean", list(weights.mean), why), Choice("views.std", list(weights.std), why)]
        return chosen
    if backbone is not None:
        return [Choice("model.backbone", backbone, "as given")]
    if facts.device == "cuda" and facts.num_images >= _MANY_IMAGES and size_px > _SMALL_PX:
        return [
            Choice("model.backbone", "resnet50", f"{_MANY_IMAGES:,} images or more, on a GPU"),
            Choice("model.projector_hidden", [2048], "as wide as the features"),
        ]
    why = "without a GPU, a small network" if facts.device == "cpu" else f"fewer than {_MANY_IMAGES:,} images"
    chosen = [Choice("model.backbone", "resnet18", why)]
    if size_px == 32:
        chosen.append(Choice("model.stem", "cifar", "the usual first layer for images of 32 px"))
    elif facts.device == "cuda" and size_px <= _SMALL_PX:
        chosen.append(Choice("model.stem", "no_pool", f"keeps more resolution at {size_px} px"))
    return chosen


def _choose_recipe(facts: Facts, size_px: int, weights: InitialWeights | None) -> list[Choice]:
    batch = _batch_size(facts)
    chosen = [
        Choice("data.global_batch_size", batch, _why_batch(facts, batch)),
        Choice("loss.name", "mio", "binary contrastive loss, arXiv:2111.12664"),
    ]
    if size_px <= _SMALL_PX:
        small = {"base_lr": 0.4, "momentum": 0.0, "weight_decay": 5e-4, "decay_all": True, "schedule": "epoch"}
        recipe, why = "mio_small", f"crop, flip, colour: the recipe for images of up to {_SMALL_PX} px"
        optim, source = small, "configs/loss/mio_small.yaml"
    else:
        recipe, why = "byol", "crop, flip, colour, blur, solarise: the recipe for photographs"
        optim = {"base_lr": 0.2, "momentum": 0.9, "weight_decay": 1e-4}
        source = "configs/mio_resnet18_folder_100ep.yaml"
    chosen.append(Choice("views.recipe", recipe, why))
    for key, value in optim.items():
        is_slower = weights is not None and key == "base_lr"
        chosen.append(
            Choice(f"optim.{key}", value / 10, "a tenth of the recipe's, for the sake of the initial weights")
            if is_slower
            else Choice(f"optim.{key}", value, source)
        )
    return chosen


def _batch_size(facts: Facts) -> int:
    """A power of two that leaves four batches per epoch, where there are images enough; a multiple of the processes."""
    most = 128 if facts.device == "cpu" else 256 * facts.num_processes
    batch = 2
    while batch * 2 <= most and batch * 2 * 4 <= facts.num_images:
        batch *= 2
    return -(-batch // facts.num_processes) * facts.num_processes


def _why_batch(facts: Facts, batch: int) -> str:
    if batch * 8 > facts.num_images:
        return f"at least four steps per pass over {facts.num_images:,} images"
    return "enough negatives on a CPU" if facts.device == "cpu" else "256 images per GPU"


def _choose_machine(facts: Facts) -> list[Choice]:
    chosen = [
        Choice("train.precision", "bf16", "fast on GPUs, and as wide a range as fp32")
        if facts.device == "cuda"
        else Choice("train.precision", "fp32", "CPUs gain little from bf16"),
        _choose_engine(facts),
    ]
    if facts.device == "cpu" and facts.num_free_cores < facts.num_cores and facts.num_processes == 1:
        why = f"other programs use {facts.num_cores - facts.num_free_cores} of {facts.num_cores} cores"
        chosen.append(Choice("run.num_threads", facts.num_free_cores, why))
    if facts.is_sharded:
        chosen.append(Choice("data.order", "lanes", "shards are read block by block"))
    elif facts.file_bytes > facts.memory_bytes * 0.7:
        chosen.append(Choice("data.order", "quasi_random", "the file is larger than the free memory"))
    return chosen


def _choose_engine(facts: Facts) -> Choice:
    if facts.device == "cpu":
        return Choice("data.engine", "ffcv", "decodes on the CPU")
    if facts.is_one_size and not facts.is_sharded and facts.decoded_bytes < facts.gpu_memory_bytes * _RESIDENT_SHARE:
        return Choice("data.engine", "resident", "the decoded images fit into the GPU's memory")
    if facts.has_dali:
        return Choice("data.engine", "dali", "decodes on the GPU")
    return Choice("data.engine", "ffcv", "decodes on the CPU; with nvidia-dali installed, the GPU would")


def with_batch_size(choices: Sequence[Choice], batch: int, why: str) -> list[Choice]:
    """The choices with another batch size."""
    key = "data.global_batch_size"
    return [replace(each, value=batch, why=why) if each.key == key else each for each in choices]


def expectation(facts: Facts, *, has_initial_weights: bool) -> str | None:
    """What to expect of few images, honestly; None: there are enough."""
    if facts.num_images >= FEW_IMAGES or has_initial_weights:
        return None
    if facts.num_images < VERY_FEW_IMAGES:
        return (
            f"{facts.num_images:,} images are too few to learn general features from scratch: expect little more than "
            "an untrained network gives. --init torchvision starts from ImageNet weights instead"
        )
    return (
        f"{facts.num_images:,} images are few: expect features that fit these images, not images in general. --init "
        "torchvision starts from ImageNet weights instead"
    )


def as_yaml(choices: Iterable[Choice], header: Sequence[str]) -> str:
    """The choices as a YAML file to start from, each with its reason as a comment.

    Args:
        choices: Keys of the form section.key.
        header: Comment lines at the top.
    """
    sections: dict[str, list[str]] = {}
    for each in choices:
        section, _, key = each.key.partition(".")
        line = f"  {key}: {json.dumps(each.value, ensure_ascii=False)}"
        why = " ".join(each.why.split())
        sections.setdefault(section, []).append(f"{line}  # {why}" if why else line)
    blocks = [f"{section}:\n" + "\n".join(lines) for section, lines in sections.items()]
    return "\n".join([*(f"# {line}" for line in header), *blocks]) + "\n"
