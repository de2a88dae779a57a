"""Makes `import torchvision` work with a CPU-only torch, whichever build of torchvision is installed."""

import functools
from importlib.machinery import PathFinder
from importlib.util import find_spec

import torch


@functools.cache
def declare_torchvision_operators() -> torch.library.Library | None:
    """Declare two operators of torchvision's C++ library where it cannot be loaded; call before importing torchvision.

    PyPI's torchvision wheel is built against CUDA. With a CPU-only torch its C++ library does not load, and the
    import fails with "operator torchvision::nms does not exist". Models, transforms and data sets work once
    the two operators are declared; ops.nms and io.decode_jpeg stay unavailable.

    Returns:
        The declaration, which the cache keeps: a Library undoes its registrations when it is garbage-collected. None:
        nothing had to be declared, or torchvision is not installed.
    """
    torchvision = find_spec("torchvision")
    if torchvision is None:
        return None
    extension = PathFinder.find_spec("_C", torchvision.submodule_search_locations)  # as torchvision looks for it
    if extension is not None and extension.origin is not None:
        try:
            torch.ops.load_library(extension.origin)
            return None
        except OSError:  # it needs CUDA's libraries
            pass
    library = torch.library.Library("torchvision", "FRAGMENT")
    for op in ("nms", "qnms"):
        library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library
