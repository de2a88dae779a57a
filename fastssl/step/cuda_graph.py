"""The training step as one CUDA graph: a replay launches some hundred kernels for the host's price of one.

What is captured is `TrainStep.body`. Batches are copied into tensors that stay, learning rate and momentum lie in
tensors. DeepSpeed's engine is passed by, docs/adr/0012-captured-step.md says what that means for its hooks.
"""

# pyright: reportPrivateImportUsage=false

import sys

import torch

from fastssl.config import Config
from fastssl.errors import ConfigError
from fastssl.step.train_step import StepResult, TrainStep
from pipelines.batch import Batch

# Plain steps before the capture: libraries choose their kernels and Triton and torch.compile compile theirs, which a
# capture cannot hold. torch's own recipe takes three.
NUM_PLAIN_STEPS = 3


class CapturedStep:
    """Takes plain steps first, and replays a graph of the step from then on.

    Its results are overwritten by the next step. A batch of another shape than the captured one takes a plain step.
    """

    def __init__(self, step: TrainStep, device: torch.device) -> None:
        """Give this thread a stream of its own: a capture cannot be on the default one.

        Args:
            step: With a `DeviceUpdate` that is alone.
            device: CUDA.
        """
        self._step = step
        self._num_plain = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._has_said = False
        torch.cuda.synchronize(device)
        torch.cuda.set_stream(torch.cuda.Stream(device))

    def run(self, batch: Batch, *, learning_rate: float, target_momentum: float | None) -> StepResult:
        """One step; see `TrainStep.run`.

        Raises:
            ConfigError: an operator of the step cannot be captured.
        """
        if self._num_plain < NUM_PLAIN_STEPS:
            self._num_plain += 1
        elif self._graph is None:
            self._try_to_capture(batch)
        if self._graph is None or self._has_other_shape(batch):
            return self._step.run(batch, learning_rate=learning_rate, target_momentum=target_momentum)
        torch._foreach_copy_(self._views, batch.views)
        self._labels.copy_(batch.labels)
        self._sample_ids.copy_(batch.sample_ids)
        self._step.prepare(learning_rate, target_momentum)
        self._graph.replay()
        self._step.count()
        return self._result

    def _has_other_shape(self, batch: Batch) -> bool:
        """Whether a batch does not fit the graph; says so once."""
        if all(view.shape == captured.shape for view, captured in zip(batch.views, self._views, strict=True)):
            return False
        if not self._has_said:
            line = "fastssl: a batch of another shape is taken by a plain step, not by the CUDA graph"
            print(line, file=sys.stderr, flush=True)
        self._has_said = True
        return True

    def _try_to_capture(self, batch: Batch) -> None:
        """Capture, or end the run: torch keeps what a capture that CUDA broke off has allocated, and much after it."""
        try:
            self._capture(batch)
        except RuntimeError as error:  # an operator that a graph cannot hold, such as one of the model's own
            cause = error.__context__ or error  # the end of a broken capture raises another error
            reason = next(iter(str(cause).splitlines()), type(cause).__name__)
            raise ConfigError(
                f"train.cuda_graph: the step cannot be captured as a CUDA graph ({reason}): set it to false"
            ) from None

    def _capture(self, batch: Batch) -> None:
        """Record the step; it is not run by this."""
        self._views = [torch.empty_like(view) for view in batch.views]
        self._labels, self._sample_ids = torch.empty_like(batch.labels), torch.empty_like(batch.sample_ids)
        # Left as they are, gradients of the body would be added to those of the step before.
        self._step.forget_gradients()
        graph = torch.cuda.CUDAGraph()
        # The loader's threads may allocate meanwhile: their calls are no part of the capture.
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
            self._result = self._step.body(self._views, self._labels, self._sample_ids)
        self._graph = graph


def choose_step(cfg: Config, step: TrainStep, device: torch.device) -> TrainStep | CapturedStep:
    """The captured step where `train.cuda_graph` and the run allow it.

    Raises:
        ConfigError: train.cuda_graph is true, and the run cannot be captured.
    """
    if cfg.train.cuda_graph is False:
        return step
    reason = why_not_captured(cfg, step, device)
    if reason is None:
        return CapturedStep(step, device)
    if cfg.train.cuda_graph is True:
        raise ConfigError(f"train.cuda_graph is true, but {reason}: set it to auto")
    if device.type == "cuda":
        print(f"fastssl: the step is not captured as a CUDA graph: {reason}", file=sys.stderr, flush=True)
    return step


def why_not_captured(cfg: Config, step: TrainStep, device: torch.device) -> str | None:
    """Why a run's step cannot be a CUDA graph, as the end of a sentence; None: it can."""
    if device.type != "cuda":
        return "the run is not on a GPU"
    if cfg.train.zero_stage:
        return f"train.zero_stage is {cfg.train.zero_stage}, whose engine reads values in each step"
    if cfg.train.precision == "fp16":
        return "train.precision is fp16, whose loss scale the host keeps"
    if cfg.train.num_micro_batches > 1 or cfg.model.activation_checkpointing:
        return "parts of the batch are encoded again in the backward pass"
    if cfg.ds:
        return "ds is set, and DeepSpeed's engine would be passed by"
    if not step.is_direct:
        return "there are several processes, or optim.impl is not auto"
    return None
