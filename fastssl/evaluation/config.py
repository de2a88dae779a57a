"""The `eval:` section of a configuration; imports nothing heavy, so that the command line starts fast."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pipelines.config_field import Section, setting
from pipelines.view_spec import ViewSpec

ProtocolName = Literal["knn", "linear", "logistic", "few_label", "linear_augmented", "finetune"]
SearchName = Literal["auto", "full", "halving"]


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Section):
    """How an encoder is evaluated.

    If several values are given for a setting, one is chosen on images held out of the training part.

    Attributes:
        what: The protocols.
        knn_k: Number of neighbours of the weighted kNN, or several numbers to choose from, each bounded by the number
            of labelled training images; None: 200, and at most the mean number of images per class.
        knn_temperature: Temperature in the weights exp(similarity / temperature), or several to choose from.
        few_labels: Numbers of labels per class for the few-label evaluation, such as (5, 20); empty: none.
        num_draws: Number of random draws of the labelled images; results are averaged over them.
        num_seeds: Number of repetitions of linear, linear_augmented and finetune with different seeds; settings are
            chosen once.
        baselines: Also evaluate raw pixels and the untrained encoder; None: by the protocols that fit into
            time_fraction.
        time_fraction: The evaluation is kept within this fraction of the training's time, as estimated from sizes:
            protocols that do not fit are left out, and named; on a GPU, those that compute on the CPU and baselines. At
            least 20 s are allowed; 0: no limit.
        search: "full": `linear` and `logistic` try every setting of their grids to the end. "halving": most settings
            are dropped early, and the grid is widened where the best one is at its edge. "auto": as "full" where that
            takes a few seconds, but widened; as "halving" otherwise.
        local_batch_size: Images per forward pass of the feature extraction.
        feature_dtype: Dtype of the features cached in the run's folder.
        sgd_batch_size: Images per step in linear, linear_augmented and finetune.
        linear_lrs: Peak learning rates to choose from, for standardised features.
        linear_weight_decays: Weight decays to choose from.
        linear_epochs: Passes over the features; the epoch to stop at is also chosen.
        augmented_epochs: Passes of linear_augmented over the images.
        augment: Changes to the random views of linear_augmented and finetune, such as {"flip_p": 0}; the default is
            RandomResizedCrop's defaults and the flip.
        finetune_lrs: Peak learning rates to choose from.
        finetune_weight_decay: Not applied to biases and norm parameters.
        finetune_layer_decay: The learning rate of a layer is the classifier's times this value to the power of its
            distance from the classifier; 1: the same learning rate for all layers.
        finetune_epochs: Passes over the images; the epoch to stop at is also chosen.
        probe_lr: Learning rate of the online linear probe, trained alongside pre-training.
        every_epochs: During training, after every this many epochs and after the last, classify the held-out training
            images by kNN (the first of knn_k and knn_temperature), and keep the checkpoint of the best epoch; 0: never.
            Of larger data sets, 10,000 held-out images and 50,000 possible neighbours are used.
    """

    what: tuple[ProtocolName, ...] = ("knn", "linear", "logistic", "few_label")
    knn_k: int | tuple[int, ...] | None = setting(None, "[1, 1e7]", free=True)
    knn_temperature: float | tuple[float, ...] = setting(0.1, "[1e-4, 1e4]")
    few_labels: tuple[int, ...] = setting((), "[1, 1e7]")
    num_draws: int = setting(10, "[1, 1e4]")
    num_seeds: int = setting(1, "[1, 1e3]")
    baselines: bool | None = setting(None, free=True)
    time_fraction: float = setting(0.25, "[0, 1e6]", free=True)
    search: SearchName = setting("auto", free=True)
    local_batch_size: int = setting(256, "[1, 1e6]")
    feature_dtype: Literal["float32", "float16"] = "float32"
    sgd_batch_size: int = setting(256, "[1, 1e6]")
    linear_lrs: tuple[float, ...] = setting((3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0), "[1e-12, 3.4e38]")
    linear_weight_decays: tuple[float, ...] = setting((0.0, 1e-4, 1e-3, 1e-2, 1e-1), "[0, 100]")
    linear_epochs: int = setting(50, "[1, 1e6]")
    augmented_epochs: int = setting(30, "[1, 1e6]")
    augment: dict[str, Any] = field(default_factory=dict)
    finetune_lrs: tuple[float, ...] = setting((0.01, 0.03, 0.1), "[1e-12, 1e4]")
    finetune_weight_decay: float = setting(1e-4, "[0, 100]")
    finetune_layer_decay: float = setting(1.0, "(0, 1]")
    finetune_epochs: int = setting(10, "[1, 1e6]")
    probe_lr: float = setting(0.1, "[1e-12, 1e4]")
    every_epochs: int = setting(0, "[0, 1e6]", free=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("what", "knn_k", "knn_temperature", "linear_lrs", "linear_weight_decays", "finetune_lrs"):
            if not values_of(getattr(self, name)):
                raise ValueError(f"{name} must not be empty")
        if self.what == ("few_label",) and not self.few_labels:
            raise ValueError(
                "few_labels must list numbers of images per class, such as [5, 20], for the protocol few_label"
            )
        try:
            ViewSpec(**with_pairs(self.augment))
        except (ValueError, TypeError) as error:
            raise ValueError(f"augment: {error}") from None


def values_of(value: Any) -> Sequence[Any]:
    """Return one or several values as a sequence."""
    return value if isinstance(value, tuple | list) else (value,)


def with_pairs(fields: dict[str, Any]) -> dict[str, Any]:
    """Convert YAML's two-element lists to the tuples that ViewSpec expects."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
