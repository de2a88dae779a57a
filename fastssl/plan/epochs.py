"""How many epochs: what the images want, and what the time allows."""

from dataclasses import dataclass
from datetime import timedelta

from fastssl.errors import UserError
from fastssl.evaluation.config import EvalConfig
from fastssl.plan.choices import Choice
from fastssl.plan.facts import Facts
from fastssl.plan.measure import StepCost

MIN_EPOCHS = 10  # where the time is not given, rather longer than fewer
# Of the training's time, the most that the default evaluation takes on a CPU.
EVALUATION_SHARE = EvalConfig().time_fraction
_WANTED_EPOCHS = ((2_000, 100), (50_000, 200), (500_000, 100))  # up to this many images, this many epochs
_WANTED_OF_MORE = 50
_DEFAULT_HOURS = {"cpu": 0.5, "cuda": 12.0}


@dataclass(frozen=True, kw_only=True)
class Length:
    """The length of a run.

    Attributes:
        num_epochs: Passes over the images.
        seconds: Expected duration of the training, from its start to its end.
        why: The reason for the number of epochs.
    """

    num_epochs: int
    seconds: float
    why: str


def choose_length(
    facts: Facts, cost: StepCost, batch_size: int, *, hours: float | None = None, num_epochs: int | None = None
) -> Length:
    """Take as many epochs as the images want and the time allows.

    Args:
        facts: The images.
        cost: Of one step, measured.
        batch_size: Images per step.
        hours: The time for training and evaluation together; None: half an hour on a CPU, 12 on a GPU, or what
            MIN_EPOCHS need.
        num_epochs: Given by the user, instead.

    Raises:
        UserError: `hours` is too short for one epoch.
    """
    epoch_s = facts.num_images // batch_size * cost.step_s
    if num_epochs is not None:
        return Length(num_epochs=num_epochs, seconds=cost.start_s + num_epochs * epoch_s, why="as given")
    share = 1 + EVALUATION_SHARE if facts.num_classes > 1 else 1.0
    given_s = (_DEFAULT_HOURS[facts.device] if hours is None else hours) * 3600
    fitting = int((given_s / share - cost.start_s) / epoch_s)
    if hours is not None and fitting < 1:
        needed = (cost.start_s + epoch_s) * share / 3600
        raise UserError(
            f"--hours {hours:g} is too short for one epoch of {facts.num_images:,} images: give at least "
            f"{max(needed * 1.05, 0.01):.2g}"
        )
    wanted = _wanted_epochs(facts.num_images)
    if wanted <= fitting:
        chosen, why = wanted, f"usual for {facts.num_images:,} images"
    elif hours is not None:
        chosen, why = fitting, f"as many as fit into {hours:g} hours; {wanted} are usual"
    else:
        chosen = max(fitting, min(MIN_EPOCHS, wanted))
        all_s = describe_time(wanted * epoch_s)
        why = f"{describe_time(chosen * epoch_s)}; {wanted} are usual, and take {all_s} (--hours)"
    return Length(num_epochs=chosen, seconds=cost.start_s + chosen * epoch_s, why=why)


def warmup_choice(num_epochs: int, recipe: str) -> Choice:
    """Epochs of warm-up: none in the recipe for small images, else a tenth of the run, at most 10."""
    if recipe == "mio_small":
        return Choice("optim.warmup_epochs", 0, "configs/loss/mio_small.yaml")
    return Choice("optim.warmup_epochs", min(10.0, num_epochs / 10), "a tenth of the run, 10 at most")


def describe_time(seconds: float) -> str:
    """A duration for people: "40 s", "12 min", "3 h 5 min", "2 days 4 h"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    span = timedelta(minutes=minutes)
    hours, rest = span.seconds // 3600, span.seconds // 60 % 60
    if span.days:
        return f"{span.days} day{'s' * (span.days > 1)} {hours} h"
    return f"{hours} h {rest} min" if rest else f"{hours} h"


def _wanted_epochs(num_images: int) -> int:
    return next((epochs for limit, epochs in _WANTED_EPOCHS if num_images <= limit), _WANTED_OF_MORE)
