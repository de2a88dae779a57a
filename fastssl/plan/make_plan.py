"""The settings of a run on a file of images: chosen, measured, and written as a configuration to start from."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from fastssl.config import load_config
from fastssl.errors import UserError
from fastssl.machine.files import replace_text
from fastssl.plan.choices import MIN_IMAGES, Choice, as_yaml, choose, expectation, with_batch_size
from fastssl.plan.epochs import Length, choose_length, describe_time, warmup_choice
from fastssl.plan.facts import Facts, read_facts
from fastssl.plan.initial_weights import prepare_initial_weights
from fastssl.plan.measure import OutOfMemoryError, StepCost, measure

_BATCH, _EPOCHS, _WARMUP = "data.global_batch_size", "train.num_epochs", "optim.warmup_epochs"
_EPOCHS_WHILE_MEASURING = 1_000_000  # the schedule does not come to its end
_COMPILE = "train.compile"
_COMPILE_ABOVE_S = 600  # shorter runs gain less than compiling and measuring take
_LEAST_SAVED = 0.03
_LONG_S = 12 * 3600  # a run's end is told with its date


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run before its start.

    Attributes:
        facts: The images and the machine.
        choices: All settings, in the order of the file.
        cost: Of one step, measured.
        length: Of the run.
        path: The configuration.
    """

    facts: Facts
    choices: Sequence[Choice]
    cost: StepCost
    length: Length
    path: Path

    def lines(self) -> list[str]:
        """What the user is told: each choice with its reason, then the time."""
        shown = [(each.key, str(each.value), each.why) for each in self.choices if each.why]
        widths = [max(len(row[column]) for row in shown) for column in (0, 1)]
        batch, num_images = value_of(self.choices, _BATCH), self.facts.num_images
        cost, seconds = self.cost, self.length.seconds
        end = datetime.now() + timedelta(seconds=seconds)
        return [
            *(f"  {key:{widths[0]}}  {value:{widths[1]}}  {why}" for key, value, why in shown),
            f"measured: {cost.step_s:.2g} s for a step of {batch} images, {batch / cost.step_s:,.0f} images/s, "
            f"{cost.memory_bytes / 1e9:.1f} GB of memory",
            f"time: about {describe_time(seconds)} for {self.length.num_epochs} epochs of "
            f"{num_images // batch:,} steps, "
            f"until {end:{'%d %B %H:%M' if seconds > _LONG_S else '%H:%M'}}",
            f"settings: {self.path}",
        ]


def make_plan(
    paths: Mapping[str, str],
    out: Path,
    *,
    given: Mapping[str, Any],
    hours: float | None = None,
    init: str | None = None,
    num_processes: int | None = None,
    say: Callable[[str], None] = print,
) -> Plan:
    """Choose the settings of a run, measure a few steps of it, and write its configuration.

    Args:
        paths: "run.dir", "data.train" and perhaps "data.test".
        out: The YAML file to write; initial weights are stored next to it.
        given: Settings of the user, by dotted key; they replace the choices.
        hours: See `choose_length`.
        init: See `prepare_initial_weights`; None: random weights.
        num_processes: See `read_facts`.
        say: Prints a line.

    Raises:
        UserError, DataError: What the user must change, in one line.
    """
    facts = read_facts(paths["data.train"], device=given.get("run.device", "auto"), num_processes=num_processes)
    if facts.num_images < MIN_IMAGES:
        raise UserError(f"{paths['data.train']} holds one image: a training needs at least {MIN_IMAGES}")
    say(_describe(facts))
    if note := expectation(facts, has_initial_weights=init is not None):
        say(f"note: {note}")
    backbone, weights = given.get("model.backbone"), None
    if init is not None:
        default = "resnet50" if facts.device == "cuda" else "resnet18"
        weights = prepare_initial_weights(init, out.with_name("init.pt"), backbone=backbone or default)
    chosen = [
        *(Choice(key, value, "") for key, value in paths.items()),
        *_with_given(choose(facts, backbone=backbone, weights=weights, size_px=given.get("views.size_px")), given),
    ]
    chosen, cost = _measured(chosen, facts, given, out, say)

    def length_at(cost: StepCost) -> Length:
        return choose_length(facts, cost, value_of(chosen, _BATCH), hours=hours, num_epochs=given.get(_EPOCHS))

    length = length_at(cost)
    if facts.device == "cuda" and _COMPILE not in given and length.seconds > _COMPILE_ABOVE_S:
        chosen, cost = _compiled_if_faster(chosen, cost, facts, out, say)
        length = length_at(cost)
    last = [
        Choice(_EPOCHS, length.num_epochs, length.why),
        warmup_choice(length.num_epochs, value_of(chosen, "views.recipe")),
    ]
    chosen = [*(each for each in chosen if each.key not in (_EPOCHS, _WARMUP)), *_with_given(last, given, only=True)]
    _write(chosen, out)
    load_config(out)
    return Plan(facts=facts, choices=chosen, cost=cost, length=length, path=out)


def value_of(choices: Sequence[Choice], key: str) -> Any:
    """The value that was chosen for a key."""
    return next(each.value for each in choices if each.key == key)


def _measured(
    choices: list[Choice], facts: Facts, given: Mapping[str, Any], out: Path, say: Callable[[str], None]
) -> tuple[list[Choice], StepCost]:
    """The choices, with a smaller batch where memory demands it, and the cost of a step."""
    while True:
        batch = value_of(choices, _BATCH)
        say(f"measuring some steps of {batch} images")
        try:
            return choices, _cost_of(choices, facts, out)
        except OutOfMemoryError:
            if batch < 4 * facts.num_processes or _BATCH in given:
                raise UserError(
                    f"a step of {batch} images needs more memory than there is: choose a smaller model.backbone, "
                    f"views.size_px or {_BATCH} with --set"
                ) from None
            smaller = batch // 2 // facts.num_processes * facts.num_processes
            choices = with_batch_size(choices, smaller, f"{batch} images need more memory than there is")


def _compiled_if_faster(
    choices: list[Choice], plain: StepCost, facts: Facts, out: Path, say: Callable[[str], None]
) -> tuple[list[Choice], StepCost]:
    """The choices with torch.compile if its steps are measured to be faster, and their cost."""
    say("measuring some steps with train.compile")
    try:
        compiled = _cost_of([*choices, Choice(_COMPILE, True, "")], facts, out)
    except OutOfMemoryError:
        say("not compiled: that needs more memory than there is")
        return choices, plain
    except UserError as error:
        say(f"not compiled: {error}")
        return choices, plain
    saved = 1 - compiled.step_s / plain.step_s
    if saved < _LEAST_SAVED:
        say(f"not compiled: a step would take {compiled.step_s / plain.step_s:.0%} of its time")
        return choices, plain
    return [*choices, Choice(_COMPILE, True, f"a step takes {saved:.0%} less time")], compiled


def _cost_of(choices: Sequence[Choice], facts: Facts, out: Path) -> StepCost:
    """What a step costs with these settings; see `measure` for its errors."""
    draft = out.with_name(f".{out.stem}.measured.yaml")
    settings = [each for each in choices if each.key not in (_EPOCHS, _WARMUP)]
    try:
        _write([*settings, Choice(_EPOCHS, _EPOCHS_WHILE_MEASURING, ""), Choice(_WARMUP, 0, "")], draft)
        load_config(draft)
        return measure(draft, facts.num_processes)
    finally:
        draft.unlink(missing_ok=True)


def _with_given(choices: Sequence[Choice], given: Mapping[str, Any], *, only: bool = False) -> list[Choice]:
    """The choices, with the user's settings in their place, and the user's other settings after them."""
    known = {each.key for each in choices}
    replaced = [Choice(each.key, given[each.key], "--set") if each.key in given else each for each in choices]
    others = [] if only else [Choice(key, value, "--set") for key, value in given.items() if key not in known]
    return replaced + others


def _write(choices: Sequence[Choice], path: Path) -> None:
    header = (
        f"fastssl train --cfg {path}",
        "Chosen by fastssl for these images and this machine; nothing is tuned on them.",
    )
    replace_text(path, as_yaml(choices, header))


def _describe(facts: Facts) -> str:
    labels = f"{facts.num_classes} classes" if facts.num_classes else "no labels"
    where = "on the CPU" if facts.device == "cpu" else f"on {facts.num_processes} GPU{'s' * (facts.num_processes > 1)}"
    size = f"half of them at most {facts.short_side_px:,} px on the shorter side"
    return f"{facts.num_images:,} images, {size}; {labels}; {where}"
