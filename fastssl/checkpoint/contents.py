"""Whether what a checkpoint holds can be the state of this run; checked before it changes anything.

Checksums find damage. This finds what was written whole but belongs elsewhere: torch would broadcast a tensor of one
element into a weight, and go on.
"""

from collections.abc import Mapping
from typing import Any

from torch import Size, Tensor

from fastssl.checkpoint.tensor_file import DamagedError, is_state
from fastssl.machine.private_api import COUNTERS


def check_contents(state: Any, own: Any, engine: Any, *, step: int, total_steps: int) -> None:
    """Compare a checkpoint with the engine that it is to be restored into.

    Args:
        state: Content of state.pt.
        own: Content of a rank_R.pt.
        engine: DeepSpeed's engine.
        step: Step in the checkpoint's name.
        total_steps: Optimizer steps of the whole run.
    Raises:
        DamagedError: they do not fit; the message says what, without the file's name.
        KeyError, TypeError, AttributeError, IndexError: a part is missing or something else.
    """
    if type(state["step"]) is not int or state["step"] != step or not 0 <= step <= total_steps:
        raise DamagedError(f"its step is {state['step']!r:.40}, in a checkpoint of step {step} of {total_steps}")
    shared = state["engine"]
    parameters = {name: value.shape for name, value in engine.module.named_parameters()}
    saved = engine.module.state_dict().keys()
    buffers = {name: value.shape for name, value in engine.module.named_buffers() if name in saved}
    _check_tensors(shared["parameters"], parameters, "parameter")
    _check_tensors(shared["buffers"], buffers, "buffer")
    own_buffers = own["buffers"]
    _check_tensors(own_buffers, {name: shape for name, shape in buffers.items() if name in own_buffers}, "buffer")
    if shared["optimizer"].keys() - parameters.keys():
        raise DamagedError("it has the optimizer's state of other parameters")
    for name, values in shared["optimizer"].items():
        for key, value in values.items():
            if isinstance(value, Tensor) and value.shape not in (parameters[name], Size([]), Size([1])):
                raise DamagedError(f"the optimizer's {key} of {name} has shape {list(value.shape)}")
    counters = shared["counters"]
    if counters.keys() != set(COUNTERS) or any(type(value) is not int or value < 0 for value in counters.values()):
        raise DamagedError("its counters are not counts")


def _check_tensors(values: Any, shapes: Mapping[str, Size], kind: str) -> None:
    if not is_state(values) or values.keys() != shapes.keys():
        raise DamagedError(f"it has other {kind}s than the model")
    for name, shape in shapes.items():
        if values[name].shape != shape:
            raise DamagedError(f"{kind} {name} has shape {list(values[name].shape)}, the model's has {list(shape)}")
