"""A CUDA graph emulated on the CPU: the operators of one call, replayed on the same memory without Python.

A function that is called again also runs its Python code again. A number that a graph would freeze (a learning rate, a
schedule, "is this the first step") then stays correct, and no test finds the error. A tape freezes such numbers too.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


class Tape(TorchDispatchMode):
    """`with tape: function()` runs the function and records it; `replay()` runs what was recorded again.

    Unlike a CUDA capture, the recording runs the function. Random operators draw new numbers in a replay, as on a GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        # Lists are copied, because their owners change them; tensors are kept alive, like the memory of a graph.
        recorded_args, recorded_kwargs = tree_map(_detached, (args, kwargs or {}))
        self._calls.append((func, recorded_args, recorded_kwargs, [_detached(x) for x in _tensors(outputs)]))
        return outputs

    @torch.no_grad()
    def replay(self) -> None:
        """Run every operator again on the tensors of the recording."""
        for func, args, kwargs, outputs in self._calls:
            for kept, new in zip(outputs, _tensors(func(*args, **kwargs)), strict=True):
                if kept.data_ptr() != new.data_ptr():  # if equal, it was written in place or is a view
                    kept.copy_(new)

    def __len__(self) -> int:
        return len(self._calls)


def _detached(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]
