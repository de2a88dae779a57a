"""Detects, on the CPU, what would make a step wait for a GPU: values read on the host, and copies of host data.

| detected in             | what                                                                             |
|-------------------------|----------------------------------------------------------------------------------|
| dispatched operators    | item(), bool(), float(), also from C++; nonzero, masks as indices, torch.tensor() |
| called tensor functions | cpu(), tolist(), numpy(), to("cpu"): on a CPU tensor these reach no operator      |

Operations inside a Triton or numba kernel are not detected.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_READS = {
    "aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero", "aten::masked_select",
    "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::allclose",
}  # fmt: skip
_COPIES = {"aten::lift_fresh"}  # from torch.tensor(numbers) and from indices that are Python lists
_METHODS = {"cpu", "tolist", "numpy", "__array__"}


class HostReadError(RuntimeError):
    """A value was read on the host."""


class _Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in _READS or name in _COPIES:
            raise HostReadError(name)
        indices = args[1] if name.startswith("aten::index") and len(args) > 1 else ()
        if isinstance(indices, list | tuple) and any(_is_mask(x) for x in indices):
            raise HostReadError(f"{name} by a mask")
        return func(*args, **(kwargs or {}))


class _Called(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        is_to_cpu = name == "to" and "cpu" in [x for x in (*args[1:], *kwargs.values()) if isinstance(x, str)]
        if name in _METHODS or is_to_cpu:
            raise HostReadError(f"Tensor.{name}")
        return func(*args, **kwargs)


def _is_mask(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8)


@contextlib.contextmanager
def no_host_reads() -> Iterator[None]:
    """Within this context, an operation that would wait for a GPU raises HostReadError."""
    with _Called(), _Dispatched():
        yield
