"""The model card of an exported encoder: what it was trained on, how, and how well it does; in Markdown."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fastssl
from fastssl.config import Config, to_dict
from fastssl.encoder import Encoder
from fastssl.machine.yaml_text import dump_yaml
from fastssl.models.config import ModelConfig
from fastssl.tracking.json_lines import read_rows
from fastssl.tracking.run_folder import RunFolder, run_above
from pipelines.errors import DataError
from pipelines.files import read_file
from pipelines.loader import open_train_images
from pipelines.printable import printable
from pipelines.remote.store import is_url
from pipelines.shards.describe import short_name

_TO_FILL_IN = "to fill in"
_RESULT = ("encoder", "name", "top1", "interval95_test_images")  # keys of a line of eval.jsonl that is a result


def model_card(
    path: str | Path, encoder: Encoder, model: ModelConfig, preprocessing: Mapping[str, Any], *, how_to_load: str
) -> str:
    """The card's text. Of paths it has the names of files alone: it is written to be published.

    Args:
        path: What was exported; parts of the run that it belongs to are left out where there is none.
        encoder: The encoder.
        model: Its model section.
        preprocessing: From `pipelines.preprocessing.describe_preprocessing`.
        how_to_load: Lines of Python.
    """
    run = run_above(path)
    cfg = run.load_config() if run else None
    size_px, num_features = preprocessing["size_px"], encoder.num_features
    num_parameters = sum(parameter.numel() for parameter in encoder.parameters()) / 1e6
    lines = [
        "---",
        f"license: other  # {_TO_FILL_IN}",
        "tags: [feature-extraction, self-supervised-learning, fastssl]",
        "---",
        "",
        f"# {_title(run, model)}",
        "",
        f"An image encoder, pre-trained without labels by fastssl {fastssl.__version__}: {_text(model.backbone)}, "
        f"{num_parameters:.1f} M parameters, {num_features} features of images at {size_px} px.",
        "",
        "## Use",
        "",
        "```python",
        how_to_load,
        "```",
        "",
        *_how_to_prepare(preprocessing),
        "",
        "## Accuracy",
        "",
        *(_accuracy(run) if run else ["Not known: the weights were exported without their run."]),
        "",
        "## Training",
        "",
        *(_training(cfg, run) if cfg and run else ["Not known: the weights were exported without their run."]),
        "",
        "## Limits, intended use, licence",
        "",
        f"- Licence of the weights, and rights to the images: {_TO_FILL_IN}.",
        f"- Intended use, and what the model must not be used for: {_TO_FILL_IN}.",
        "- Features reflect the images of the training; nothing was measured beyond the table above.",
    ]
    return "\n".join(lines) + "\n"


def _how_to_prepare(preprocessing: Mapping[str, Any]) -> list[str]:
    mean, std = (", ".join(f"{value:g}" for value in preprocessing[key]) for key in ("mean", "std"))
    size_px = preprocessing["size_px"]
    return [
        "Images are prepared as `preprocessing.json` says:",
        "",
        "1. upright, by the EXIF orientation; RGB, transparency on white;",
        f"2. a centred square of {preprocessing['crop_fraction']:g} of the shorter side, rounded to pixels;",
        f"3. resized to {size_px} x {size_px} px, bilinear, antialiased (Pillow's BILINEAR, torch's interpolate with "
        "antialias=True);",
        f"4. divided by 255; then, per channel, minus the mean ({mean}) and divided by the standard deviation ({std}).",
    ]


def _title(run: RunFolder | None, model: ModelConfig) -> str:
    name = run.path.resolve().name if run else "encoder"
    return _text(f"{name}: {model.backbone}")


def _accuracy(run: RunFolder) -> list[str]:
    rows = [row for row in read_rows(run.evaluations, *_RESULT) if _has_numbers(row)]
    if not rows:
        return ["Not evaluated."]
    last = {(str(row["encoder"]), str(row["name"]), str(row.get("scored_on"))): row for row in rows}
    table = ["| encoder | protocol | top-1 in % | 95% interval, test images | images |", "|---|---|---|---|---|"]
    for (encoder, protocol, _), row in last.items():
        low, high = (100 * value for value in row["interval95_test_images"])
        table.append(
            f"| {_text(encoder)} | {_text(protocol)} | {100 * row['top1']:.1f} | {low:.1f} to {high:.1f} | "
            f"{_text(_scored_on(row))} |"
        )
    return table


def _has_numbers(row: Mapping[str, Any]) -> bool:
    """Whether a row's accuracies are numbers: somebody may have edited the file."""
    interval = row["interval95_test_images"]
    if not isinstance(interval, list) or len(interval) != 2:
        return False
    return all(type(value) in (int, float) and math.isfinite(value) for value in (row["top1"], *interval))


def _scored_on(row: Mapping[str, Any]) -> str:
    """Which images a row is of, with the name of their file."""
    text, test = str(row.get("scored_on", "")), row.get("test")
    path = test.get("path") if isinstance(test, dict) else None
    if isinstance(path, str) and path:
        text = text.replace(path, Path(path).name)
    return re.sub(r"\S*/(?=\S)", "", text)  # of a path that is written in another way


def _training(cfg: Config, run: RunFolder) -> list[str]:
    environment = _environment(run)
    packages, gpus = environment.get("packages"), environment.get("gpus")
    versions = [f"{name} {each}" for name, each in packages.items() if each] if isinstance(packages, dict) else []
    on_cpu = f"{environment.get('cpu')}, {environment.get('num_cpus')} cores"
    hardware = ", ".join(map(str, gpus)) if isinstance(gpus, list) and gpus else on_cpu
    initial = f"from {_text(Path(cfg.run.init_from).name)}" if cfg.run.init_from else "random"
    return [
        f"- Images: {_images(cfg)}",
        f"- Loss: {cfg.loss.name}; optimizer: {cfg.optim.name}; {cfg.train.num_epochs} epochs, batch "
        f"{cfg.data.global_batch_size}, {cfg.train.precision}",
        f"- Hardware: {_text(environment.get('world_size', 1))} process(es), {_text(hardware)}",
        f"- Versions: {_text(', '.join(versions))}",
        f"- Commit: {_text(environment.get('commit') or 'not known')}",
        f"- Initial weights: {initial}",
        "",
        "<details><summary>Configuration</summary>",
        "",
        "```yaml",
        printable_yaml(cfg),
        "```",
        "",
        "</details>",
    ]


def printable_yaml(cfg: Config) -> str:
    """The configuration as YAML that cannot end the block that it stands in; of paths, the names of files."""
    tree = to_dict(cfg)
    plain = _names_only(tree)
    plain["model"]["backbone"] = tree["model"]["backbone"]  # a name that may have a slash, timm/resnet18
    return dump_yaml(plain).replace("```", "'''").rstrip()


def _names_only(value: Any) -> Any:
    """A value of a configuration, with the last part of each text that is a path."""
    if isinstance(value, dict):
        return {key: _names_only(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_names_only(each) for each in value]
    return _name(value) if isinstance(value, str) and "/" in value else value


def _name(path: str) -> str:
    """The last part of a path, or of a URL, which may hold a password."""
    return short_name(path) if is_url(path) else Path(path).name


def _images(cfg: Config) -> str:
    try:
        reader = open_train_images(cfg.data)
    except DataError:
        return f"{_text(_name(cfg.data.train_name))}, which is not there any more"
    classes = f", {len(reader.class_names)} classes (labels were not used)" if reader.class_names else ""
    return f"{reader.num_samples:,} from {_text(_name(cfg.data.train_name))}{classes}"


def _environment(run: RunFolder) -> dict[str, Any]:
    """What was noted of the machine; empty: nothing, or it is damaged."""
    try:
        found = json.loads(read_file(run.environment))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _text(value: Any) -> str:
    """A value as Markdown that is text and nothing else."""
    plain = printable(str(value))
    for character in "\\`*_[]<>|#":
        plain = plain.replace(character, f"\\{character}")
    return plain
