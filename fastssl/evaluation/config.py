"""The `eval:` section of a configuration; imports nothing heavy, so that the command line starts fast."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How an encoder is judged.

    Attributes:
        knn_k: Neighbours of the weighted kNN; the number of training images where that is smaller.
        knn_temperature: Of its weights exp(similarity / temperature).
        few_labels: Numbers of labels per class to be judged at, such as (5, 20); empty: none.
        num_draws: Random draws of the labelled images, averaged over.
        baselines: Also judge raw pixels and the untrained encoder.
        local_batch_size: Images in one forward pass of the extraction.
        probe_lr: Learning rate of the linear probe that learns beside the training.
    """

    knn_k: int = 200
    knn_temperature: float = 0.1
    few_labels: tuple[int, ...] = ()
    num_draws: int = 10
    baselines: bool = False
    local_batch_size: int = 256
    probe_lr: float = 0.1

    def __post_init__(self) -> None:
        for name in ("knn_k", "num_draws", "local_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1")
        for name in ("knn_temperature", "probe_lr"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be > 0")
        if any(num_labels < 1 for num_labels in self.few_labels):
            raise ValueError("few_labels must hold numbers >= 1")
