"""The configuration of a run: defaults < YAML < `--set key=value`, checked strictly, written out resolved.

Each section is a frozen dataclass owned by the module that uses it. Unknown keys fail and name the nearest
known ones; every message carries the dotted key.
"""

import dataclasses
import functools
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from fastssl.errors import ConfigError
from fastssl.evaluation.config import EvalConfig
from fastssl.losses import AnyLossConfig, MioConfig
from fastssl.losses.moments import check_moment_width
from fastssl.machine.yaml_text import MAX_DEPTH, parse_yaml, read_yaml
from fastssl.models.config import ModelConfig
from fastssl.optim.config import OptimConfig
from pipelines.config_field import Section, setting, shown
from pipelines.errors import did_you_mean
from pipelines.loader import DataConfig
from pipelines.path_names import why_no_path
from pipelines.views import ViewsConfig, build_view_specs


@dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    """Where a run is stored and how it starts.

    Attributes:
        dir: The run's folder.
        seed: Seed of the weights, the sample order and the views.
        device: "auto" uses a GPU if one is available.
        resume: "never" refuses a folder that already holds a run; "auto" resumes from its last complete checkpoint.
        init_from: A run's folder or a weights.pt to initialise the weights from (nothing else is loaded).
        checkpoint_every_minutes: Save at the first epoch end after this time since the last save, or mid-epoch if no
            epoch has ended within 1.25 times this time. 0: choose the interval automatically as 100 times the duration
            of the last save, so that saves cost at most 1% of the time, capped at 30 minutes; the first save is at the
            end of the first epoch, or after 10 minutes. See `fastssl.checkpoint.schedule`.
        checkpoint_every_steps: Save every this many steps instead; 0: not by steps.
        checkpoint_every_epochs: Save every this many epochs instead; None: not by epochs. Every run also saves at its
            end.
        keep_every_epochs: Save every this many epochs and never delete that checkpoint; 0: keep the last two only.
        log_every_steps: Number of steps per row of metrics.jsonl.
        trackers: Where the rows of metrics.jsonl go as well, besides TensorBoard's files: "wandb" (Weights & Biases),
            "mlflow" (`fastssl.tracking.trackers`). A resumed run may change them: a tracker gets all rows of the run.
        diagnose_every_epochs: Number of epochs between two checks of the representation, including the collapse check
            (`fastssl.tracking.representation`). On an H200 it takes, together with a checkpoint, .3 s for a ResNet-18
            (the epochs after one in benchmarks/results/cifar10_gpu_curve.csv).
        num_threads: CPU threads per process; 0: the machine's cores divided by its number of processes. The number
            changes results by rounding. Next to other busy programs see `fastssl.machine.thread_waiting`.
        peak_tflops: Peak TFLOP/s of a device at train.precision, for the utilisation in metrics.jsonl; None: use the
            built-in value of known GPUs (`fastssl.tracking.throughput`).
        rendezvous_timeout_s: How long to wait at the start for all processes to join.
        peer_timeout_s: A host that cannot be reached for this long counts as lost, and the run ends
            (`fastssl.processes.watchdog`).
        collective_timeout_s: How long a process may keep the others waiting during the run, for example in a slow save
            or while compiling.
    """

    dir: str = setting("runs/default", free=True)
    seed: int = setting(0, "[0, 9223372036854775807]")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", free=True)
    resume: Literal["never", "auto"] = setting("never", free=True)
    init_from: str | None = None
    checkpoint_every_minutes: float = setting(0.0, "[0, 1e6]", free=True)
    checkpoint_every_steps: int = setting(0, "[0, 1e9]", free=True)
    checkpoint_every_epochs: int | None = setting(None, "[1, 1e6]", free=True)
    keep_every_epochs: int = setting(0, "[0, 1e6]", free=True)
    log_every_steps: int = setting(10, "[1, 1e9]", free=True)
    trackers: tuple[Literal["wandb", "mlflow"], ...] = setting((), free=True)
    diagnose_every_epochs: int = setting(1, "[1, 1e6]", free=True)
    num_threads: int = setting(0, "[0, 1024]", free=True)
    peak_tflops: float | None = setting(None, "[1e-3, 1e6]", free=True)
    rendezvous_timeout_s: int = setting(300, "[1, 86400]", free=True)
    peer_timeout_s: int = setting(20, "[1, 86400]", free=True)
    collective_timeout_s: int = setting(1800, "[1, 86400]", free=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.dir:
            raise ValueError("dir must name a folder")
        for name in ("dir", "init_from"):
            if reason := why_no_path(getattr(self, name) or ""):
                raise ValueError(f"{name}: {reason}")
        if len(set(self.trackers)) < len(self.trackers):
            raise ValueError("trackers must name each tracker once")
        if self.checkpoint_every_minutes and (self.checkpoint_every_steps or self.checkpoint_every_epochs):
            raise ValueError(
                "checkpoint_every_minutes cannot be set together with checkpoint_every_steps or "
                "checkpoint_every_epochs: set these to 0 and null, or leave it out"
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """How the training steps are computed.

    Attributes:
        num_epochs: Passes over the training images.
        precision: "bf16" and "fp16" are torch's autocast under DeepSpeed: weights, statistics and the loss stay in
            fp32. fp16 uses dynamic loss scaling; a step that overflows is skipped.
        zero_stage: DeepSpeed's ZeRO stage: 1 partitions the optimizer state over the processes, 2 the gradients too.
        offload_optimizer: Keep the optimizer state and run the optimizer step on the CPU; needs ZeRO 1 or 2.
        grad_clip_norm: Global gradient norm to clip to; 0: no clipping.
        max_skipped_steps: A step with a non-finite gradient is skipped, and its images are recorded in
            nonfinite.jsonl; more than this many consecutive skipped steps end the run.
        on_collapse: What to do when the representation has collapsed for two epochs
            (`fastssl.tracking.representation`).
        num_micro_batches: Number of parts the local batch is split into; the activations of one part are held at a
            time. The loss is that of the whole batch, and each part is encoded twice (`fastssl.models.grad_cache`).
            1: no splitting.
        compile: Compile encoder and projector with torch.compile.
        cuda_graph: Capture the whole step as a CUDA graph (`fastssl.step.cuda_graph`), which helps when small batches
            leave the GPU waiting for the host. "auto": whenever possible; true: refuse a run that cannot be captured.
    """

    num_epochs: int = setting(200, "[1, 1e6]")
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    zero_stage: int = setting(0, "[0, 3]", free=True)
    offload_optimizer: bool = setting(False, free=True)
    grad_clip_norm: float = setting(0.0, "[0, 1e6]")
    max_skipped_steps: int = setting(5, "[0, 1e6]", free=True)
    on_collapse: Literal["warn", "stop"] = setting("warn", free=True)
    num_micro_batches: int = setting(1, "[1, 65536]", free=True)
    compile: bool = setting(False, free=True)
    cuda_graph: Literal["auto"] | bool = setting("auto", free=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.zero_stage == 3:
            raise ValueError(
                "zero_stage must be 0, 1 or 2: 3 also spreads the weights, which a target's moving average and the "
                "checkpoint read whole, layer by layer; 2 already spreads all but the weights"
            )
        if self.offload_optimizer and not self.zero_stage:
            raise ValueError("offload_optimizer needs train.zero_stage 1 or 2: it is ZeRO's state that is moved")


@dataclass(frozen=True, kw_only=True)
class Config:
    """The complete configuration of a run.

    Attributes:
        ds: Passed to DeepSpeed unchanged (`fastssl.step.deepspeed_config` lists the allowed keys).
        custom: Written by `fastssl.trainer.Trainer`: the classes of a model, loss or loader that was passed to it from
            Python instead of being built from the sections above.
    """

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: Annotated[AnyLossConfig, Field(discriminator="name")] = field(default_factory=MioConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    ds: dict[str, Any] = field(default_factory=dict)
    custom: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.optim.impl == "apex" and self.optim.name == "lamb" and self.train.zero_stage > 0:
            raise ValueError(
                "train.zero_stage must be 0 with optim.impl=apex and optim.name=lamb: apex takes ZeRO's flat pieces "
                "for layers; optim.impl=auto knows better"
            )
        if self.optim.impl == "apex" and self.train.offload_optimizer:
            raise ValueError("train.offload_optimizer must be false with optim.impl=apex: its kernels are the GPU's")
        if self.optim.warmup_epochs >= self.train.num_epochs:
            raise ValueError(
                f"optim.warmup_epochs ({self.optim.warmup_epochs:g}) must be less than train.num_epochs "
                f"({self.train.num_epochs}): the learning rate would never reach its peak"
            )
        if self.data.global_batch_size < 2:
            raise ValueError("data.global_batch_size must be >= 2: every loss needs at least two images")
        if self.loss.has_moments:
            check_moment_width(self.model.projector_dim, self.loss.name)
        num_views, most = len(build_view_specs(self.views)), self.loss.max_views
        if not 2 <= num_views <= most:
            wanted = "two views" if most == 2 else "at least two views"
            raise ValueError(
                f"views.recipe must have {wanted} for loss {self.loss.name}, {self.views.recipe} has {num_views}"
            )


def load_config(path: str | Path | Sequence[str | Path], overrides: Mapping[str, Any] | Sequence[str] = ()) -> Config:
    """Read one or more YAML files, apply `key.sub=value` overrides and check everything.

    Args:
        path: A file, or several: a key of a later file replaces that of an earlier one, and a section with another
            `name` (another loss or optimizer) replaces the whole section.
        overrides: Dotted keys and their values, or `key=value` strings as for `--set`.

    Raises:
        ConfigError: no such file, no YAML mapping, unknown key or bad value; the message names it.
    """
    paths = [path] if isinstance(path, (str, Path)) else path
    tree: dict[str, Any] = {}
    for each in paths:
        tree = _merged(tree, read_tree(Path(each)))
    return build_config(with_overrides(tree, as_overrides(overrides)))


def with_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply `key.sub=value` overrides to a nested mapping, in place, and return it.

    Raises:
        ConfigError: a malformed override, or a path through a non-section.
    """
    for override in overrides:
        _apply_override(tree, override)
    return tree


def check_built(cfg: Config, *parts: str) -> None:
    """Refuse a run whose parts cannot be rebuilt from its configuration.

    Args:
        cfg: The run's configuration.
        parts: Which of "model", "loss" and "loader" are needed.

    Raises:
        ConfigError: One of them was passed in from Python.
    """
    if own := [f"{name} {cfg.custom[name]}" for name in parts if name in cfg.custom]:
        raise ConfigError(
            f"{cfg.run.dir} was trained with the {' and the '.join(own)}, given from Python: a command cannot build it"
        )


def as_overrides(changes: Mapping[str, Any] | Sequence[str]) -> Sequence[str]:
    """Dotted keys and values as `key=value` strings; strings are returned as they are."""
    if isinstance(changes, str):
        raise ConfigError(f"overrides must be a mapping or a list of key=value, not the text {changes!r}")
    if not isinstance(changes, Mapping):
        return changes
    return [f"{key}={_json(value, str(key))}" for key, value in changes.items()]


def _json(value: Any, name: str) -> str:
    try:
        return json.dumps(value, default=_plain, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{name}: not a value of a configuration ({error})") from None


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if not hasattr(value, "item"):
        raise TypeError(f"type {type(value).__name__}")
    return value.item()  # a number of numpy or torch


def build_config(tree: Mapping[str, Any]) -> Config:
    """Check a nested mapping and build the Config from it.

    Raises:
        ConfigError: unknown key or bad value; the message names it.
    """
    tree = dict(tree)
    if isinstance(tree.get("loss"), Mapping):
        tree["loss"] = {"name": MioConfig().name, **tree["loss"]}
    if isinstance(tree.get("views"), Mapping):
        tree["views"] = _with_recipe_file(tree["views"])
    try:  # strictly: no "10" or true for 10; as JSON, in which a list is also a tuple, and a mapping a section
        return _adapter().validate_json(_json(tree, "the configuration"), strict=True)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None


def to_dict(cfg: Config) -> dict[str, Any]:
    """The resolved configuration as plain YAML values."""
    return _adapter().dump_python(cfg, mode="json")


def differing_keys(old: Mapping[str, Any], new: Mapping[str, Any], ignore: Sequence[str] = ()) -> list[str]:
    """Lines "key: old -> new" for each dotted key in which two resolved configurations differ."""
    a, b = dict(flatten(old)), dict(flatten(new))
    keys = [key for key in sorted(a.keys() | b.keys()) if key not in ignore]
    return [f"{key}: {a.get(key)} -> {b.get(key)}" for key in keys if a.get(key) != b.get(key)]


_DEFAULT_NAMES = {"loss": MioConfig().name, "optim": OptimConfig().name}


def _merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two trees; on conflict, the second one wins."""
    tree = dict(first)
    for key, value in second.items():
        old = tree.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            name = old.get("name", _DEFAULT_NAMES.get(key))
            value = _merged(old, value) if value.get("name", name) == name else value
        tree[key] = value
    return tree


def free_keys() -> tuple[str, ...]:
    """Dotted keys that may change when a run is resumed, see `pipelines.config_field.setting`."""
    return tuple(
        f"{section.name}.{field.name}"
        for section in dataclasses.fields(Config)
        for field in _fields_of(section)
        if field.metadata.get("free")
    )


def _fields_of(section: dataclasses.Field) -> tuple[dataclasses.Field, ...]:
    default = section.default_factory() if callable(section.default_factory) else None
    return dataclasses.fields(default) if dataclasses.is_dataclass(default) else ()


def read_tree(path: Path) -> dict[str, Any]:
    """The mapping of sections in a YAML file.

    Raises:
        ConfigError: the file cannot be read, or is something else.
    """
    if reason := why_no_path(path):
        raise ConfigError(f"cannot read the config {str(path)!r:.300}: {reason}")
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of sections such as data: and model:")
    return tree


def _with_recipe_file(views: Mapping[str, Any]) -> Mapping[str, Any]:
    """The section with the content of a recipe file inlined, so that the resolved config does not depend on it."""
    recipe = views.get("recipe")
    path = Path(recipe if isinstance(recipe, str) else "")
    if path.suffix not in (".yaml", ".yml"):
        return views
    tree = read_tree(path)
    specs = tree.get("views")
    if set(tree) != {"views"} or not isinstance(specs, list) or not all(isinstance(spec, dict) for spec in specs):
        raise ConfigError(f"views.recipe: {path} must hold `views:` and under it a list, the fields of each view")
    return {**views, "recipe": path.stem, "specs": specs}


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    *sections, leaf = key.split(".")
    if not separator or not all([*sections, leaf]):
        raise ConfigError(f"--set wants key=value, such as loss.temperature=0.2, not {shown(override)}")
    if not key.isprintable() or len(sections) > MAX_DEPTH:
        raise ConfigError(f"--set {shown(key)}: no such key")
    value = parse_yaml(text, f"--set {key[:80]}")
    for section in sections:
        if not isinstance(tree.setdefault(section, {}), dict):
            raise ConfigError(f"--set {key[:80]}: {section} is not a section")
        tree = tree[section]
    tree[leaf] = value


@functools.cache
def _adapter() -> TypeAdapter[Config]:
    for cls in _dataclasses_of(Config):
        cls.__pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)  # pyright: ignore[reportAttributeAccessIssue]
    return TypeAdapter(Config)


def _dataclasses_of(annotation: Any) -> Iterator[type]:
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        yield annotation
        for hint in typing.get_type_hints(annotation).values():
            yield from _dataclasses_of(hint)
    elif typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for option in typing.get_args(annotation):
            yield from _dataclasses_of(option)


def _explain(error: ValidationError) -> str:
    first, *others = error.errors(include_url=False)
    tags = {tag for cls in typing.get_args(AnyLossConfig) for tag in _names(cls)}
    path = [str(part) for part in first["loc"]]
    if first["type"] == "unexpected_keyword_argument":
        loc = [*(part for part in path[:-1] if part not in tags), path[-1]]
        return f"unknown key {'.'.join(loc)[:200]}{_nearest(loc, path)}"
    key = ".".join(part for part in path if part not in tags and not _is_branch(part)) or "the configuration"
    if first["type"] == "union_tag_invalid":
        tag = str(first.get("ctx", {}).get("tag"))
        return f"{key}.name must be one of {', '.join(sorted(tags))}, not {shown(tag)}{did_you_mean(tag, tags)}"
    if first["type"] == "value_error":
        message = str(first.get("ctx", {}).get("error"))  # our own, from a __post_init__: it names the field
        return message if not path or message.startswith(key) else f"{key}.{message}"
    wanted = [first["msg"]]
    if _is_branch(path[-1] if path else ""):  # a union: what each of its members wants
        wanted += [each["msg"] for each in others if each["loc"][:-1] == first["loc"][:-1]]
    rule = " or ".join(dict.fromkeys(message.removeprefix("Input should be ") for message in wanted))
    choices = re.findall(r"'([^']*)'", first.get("ctx", {}).get("expected", ""))  # of a Literal, as pydantic lists them
    return f"{key} must be {rule}, not {shown(first['input'])}{did_you_mean(str(first['input']), choices)}"


def _is_branch(part: str) -> bool:
    """Whether a part of pydantic's location is the member of a union, such as `int` or `tuple[int, ...]`."""
    return part in ("int", "float", "bool") or not part.replace("_", "").isalnum()


def _names(loss_config: type) -> tuple[str, ...]:
    return typing.get_args(typing.get_type_hints(loss_config)["name"])


def _nearest(loc: list[str], tagged: list[str]) -> str:
    known = _known_keys(loc[:-1], tagged)
    return did_you_mean(loc[-1], known) or f"; known here: {', '.join(known)}"


def _known_keys(section: list[str], tagged: list[str]) -> list[str]:
    level: list[type] = [Config]
    for name in section:
        level = [cls for parent in level for cls in _direct(typing.get_type_hints(parent).get(name))]
    if len(level) > 1:  # a union: only the member selected by `name`
        level = [cls for cls in level if set(_names(cls)) & set(tagged)]
    return sorted({f.name for cls in level for f in dataclasses.fields(cls)})


def _direct(annotation: Any) -> list[type]:
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        return [annotation]
    return [option for option in typing.get_args(annotation) if isinstance(option, type)]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested mappings; an empty mapping is a value."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
