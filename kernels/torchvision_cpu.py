"""Imports torchvision in a way that also works with a CPU-only torch."""

import sys
from types import ModuleType

import torch

_nms_declaration: list[torch.library.Library] = []  # a Library undoes its registrations when it is garbage-collected


def import_torchvision() -> ModuleType:
    """Import torchvision, declaring the two operators that its C++ library lacks without CUDA.

    PyPI's torchvision wheel is built against CUDA. With a CPU-only torch its C++ library does not load, and the
    import fails with "operator torchvision::nms does not exist". Models, transforms and data sets work once
    the two operators are declared; ops.nms and io.decode_jpeg stay unavailable.

    Returns:
        The torchvision package.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for op in ("nms", "qnms"):
            library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _nms_declaration.append(library)
        import torchvision
    return torchvision
