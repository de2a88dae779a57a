"""The training step as one CUDA graph: a replay launches hundreds of kernels at the host cost of one launch.

`TrainStep.body` is captured. Batches are copied into static tensors; learning rate and momentum are also tensors.
DeepSpeed's engine is bypassed; docs/adr/0012-captured-step.md explains what that means for its hooks.
"""

import sys

import torch

from fastssl.config import Config
from fastssl.errors import ConfigError
from fastssl.machine.nvidia_gpu import is_out_of_memory
from fastssl.machine.private_api import foreach
from fastssl.step.train_step import StepResult, TrainStep
from pipelines.batch import Batch

# Plain steps before the capture: in these, libraries select their kernels, and Triton and torch.compile compile theirs,
# which cannot be captured. torch's own recipe uses three.
NUM_PLAIN_STEPS = 3


class CapturedStep:
    """Runs plain (eager) steps first, and replays a graph of the step from then on.

    The next step overwrites the results. A batch whose shape differs from the captured one takes a plain step.
    """

    def __init__(self, step: TrainStep, device: torch.device) -> None:
        """Set a separate stream for this thread, because a capture cannot run on the default stream.

        Args:
            step: Its update must be a `DeviceUpdate` with `is_alone`.
            device: The CUDA device.
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
            torch.OutOfMemoryError: the GPU's memory is full.
        """
        if self._num_plain < NUM_PLAIN_STEPS:
            self._num_plain += 1
        elif self._graph is None:
            self._try_to_capture(batch)
        if self._graph is None or self._has_other_shape(batch):
            return self._step.run(batch, learning_rate=learning_rate, target_momentum=target_momentum)
        foreach.copy_(self._views, batch.views)
        self._labels.copy_(batch.labels)
        self._sample_ids.copy_(batch.sample_ids)
        self._step.prepare(learning_rate, target_momentum)
        self._graph.replay()
        self._step.count()
        return self._result

    def _has_other_shape(self, batch: Batch) -> bool:
        """Whether a batch's shape differs from the graph's; reports this once."""
        if all(view.shape == captured.shape for view, captured in zip(batch.views, self._views, strict=True)):
            return False
        if not self._has_said:
            line = "fastssl: a batch with a different shape runs without the CUDA graph; said once"
            print(line, file=sys.stderr, flush=True)
        self._has_said = True
        return True

    def _try_to_capture(self, batch: Batch) -> None:
        """Capture, or end the run: torch never frees memory allocated in, and much of it after, an aborted capture."""
        try:
            self._capture(batch)
        except RuntimeError as error:  # an operator that cannot be captured, such as a custom one of the model
            cause = error.__context__ or error  # ending an aborted capture raises another error
            if is_out_of_memory(cause):  # a plain step of the batch would hardly fit either
                raise cause from None
            reason = next(iter(str(cause).splitlines()), type(cause).__name__)
            raise ConfigError(
                f"train.cuda_graph: the step cannot be captured as a CUDA graph ({reason}): set train.cuda_graph=false"
            ) from None

    def _capture(self, batch: Batch) -> None:
        """Record the step without running it."""
        self._views = [torch.empty_like(view) for view in batch.views]
        self._labels, self._sample_ids = torch.empty_like(batch.labels), torch.empty_like(batch.sample_ids)
        # Otherwise the captured backward would accumulate into the gradients of the previous step.
        self._step.forget_gradients()
        graph = torch.cuda.CUDAGraph()
        # The loader's threads may allocate meanwhile: their calls must not be captured.
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
            self._result = self._step.body(self._views, self._labels, self._sample_ids)
        self._graph = graph


def choose_step(cfg: Config, step: TrainStep, device: torch.device) -> TrainStep | CapturedStep:
    """The captured step if `train.cuda_graph` and the run allow it, else `step`.

    Raises:
        ConfigError: train.cuda_graph is true, and the run cannot be captured.
    """
    if cfg.train.cuda_graph is False:
        return step
    reason = why_not_captured(cfg, step, device)
    if reason is None:
        return CapturedStep(step, device)
    if cfg.train.cuda_graph is True:
        raise ConfigError(f"train.cuda_graph is true, but {reason}: set it to auto or false")
    if device.type == "cuda":
        print(f"fastssl: the step is not captured as a CUDA graph: {reason}", file=sys.stderr, flush=True)
    return step


def why_not_captured(cfg: Config, step: TrainStep, device: torch.device) -> str | None:
    """Reason why a run's step cannot be captured as a CUDA graph, as the end of a sentence; None: it can."""
    if device.type != "cuda":
        return "the run is not on a GPU"
    if cfg.train.zero_stage:
        return f"train.zero_stage is {cfg.train.zero_stage}, and ZeRO reads values on the host in every step"
    if cfg.train.precision == "fp16":
        return "train.precision is fp16, and the host updates its loss scale in every step"
    if cfg.train.num_micro_batches > 1 or cfg.model.activation_checkpointing:
        return "train.num_micro_batches or model.activation_checkpointing encodes images again in the backward pass"
    if cfg.ds:
        return "ds is set, and a captured step bypasses DeepSpeed's engine"
    if not step.is_direct:
        return "there are several processes, or optim.impl is not auto"
    return None
