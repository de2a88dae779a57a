"""The forms of a loss over pairs that `bench_loss.py` compares: each takes z [2, B, D] and returns a scalar.

# n = 2B rows (`siglip`: B rows against B rows), D width, tau = .2
"""

import importlib
import math
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kernels.pair_loss import pair_loss
from kernels.partition_loss import partition_loss
from kernels.similarity import Impl
from pipelines.torchvision_operators import declare_torchvision_operators

LossOf = Callable[[Tensor], Tensor]

INV_TEMPERATURE = 5.0
SIGLIP_BIAS = -10.0
CHUNK_ROWS = 1024  # rows of a strip in the checkpointed form

LOSSES = ("softplus", "exp", "nt_xent", "siglip")


class NotInstalledError(Exception):
    """A peer is not installed or does not support this loss or device; the message says which."""


def build(provider: str, loss: str, *, device: str) -> LossOf:
    """Build the loss of a provider.

    Args:
        provider: A name of PROVIDERS.
        loss: One of LOSSES.
        device: "cpu" or "cuda".

    Raises:
        NotInstalledError: If it cannot be built; the message has the reason.
    """
    return PROVIDERS[provider](loss, device)


# -- ours


def _ours(impl: Impl, loss: str, device: str) -> LossOf:
    if impl == "fused" and device == "cpu":
        raise NotInstalledError("the fused kernels need a GPU")
    if loss == "nt_xent":
        return partial(partition_loss, inv_temperature=INV_TEMPERATURE, impl=impl)
    if loss == "siglip":
        settings = {"negatives": "softplus", "positives": "softplus", "bias": SIGLIP_BIAS, "balanced": False}
        return partial(pair_loss, topology="cross", inv_temperature=INV_TEMPERATURE, impl=impl, **settings)
    positives = "softplus" if loss == "softplus" else "linear"
    return partial(pair_loss, negatives=loss, positives=positives, inv_temperature=INV_TEMPERATURE, impl=impl)


# -- the whole matrix, as in most code


def _eager(loss: str, device: str) -> LossOf:
    del device
    return partial(_whole_matrix, loss, torch.float32)


def _eager_bf16(loss: str, device: str) -> LossOf:
    if device == "cpu":
        raise NotInstalledError("its products in bf16 are a GPU's")
    return partial(_whole_matrix, loss, torch.bfloat16)


def _whole_matrix(loss: str, products: torch.dtype, z: Tensor) -> Tensor:
    """Normalise the rows and compute the loss from the logits in fp32; `products` is the dtype of the products."""
    u = F.normalize(z.float(), dim=2).to(products)
    if loss == "siglip":
        return _siglip(u[0], u[1], torch.eye(z.shape[1], device=z.device))
    u = u.flatten(0, 1)
    logits = INV_TEMPERATURE * (u @ u.T).float()
    own, partner = _own_and_partner(len(u), z.device)
    if loss == "nt_xent":
        return F.cross_entropy(logits.masked_fill(own, -math.inf), partner)
    positives = logits.gather(1, partner[:, None])
    negatives = logits.masked_fill(own.scatter(1, partner[:, None], True), -math.inf)
    count = len(u) * (len(u) - 2)
    if loss == "exp":
        return negatives.exp().sum() / count - positives.mean()
    return F.softplus(negatives).sum() / count + F.softplus(-positives).mean()


def _siglip(u_a: Tensor, u_b: Tensor, is_pair: Tensor) -> Tensor:
    logits = INV_TEMPERATURE * (u_a @ u_b.T).float() + SIGLIP_BIAS
    return -F.logsigmoid((2 * is_pair - 1) * logits).sum() / len(u_a)


def _own_and_partner(num_rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    index = torch.arange(num_rows, device=device)
    return index[:, None] == index, (index + num_rows // 2) % num_rows


def _compiled(loss: str, device: str) -> LossOf:
    return _compile(_eager(loss, device))


def _compiled_bf16(loss: str, device: str) -> LossOf:
    return _compile(_eager_bf16(loss, device))


def _compile(loss_of: LossOf) -> LossOf:
    """Compile for one shape only: by default, torch changes to dynamic shapes, and to eager after eight recompilations.

    All compiled forms share a function; `torch._dynamo.reset` before each cell keeps them below that limit.
    """
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(loss_of, dynamic=False)


# -- strips of rows, recomputed in the backward pass, as in open_clip's chunked SigLIP and other memory-saving code


def _checkpointed(loss: str, device: str) -> LossOf:
    del device
    return partial(_strips, loss)


def _strips(loss: str, z: Tensor) -> Tensor:
    u = F.normalize(z.float(), dim=2)
    rows, columns = (u[0], u[1]) if loss == "siglip" else (u.flatten(0, 1), u.flatten(0, 1))
    parts = [
        checkpoint(_strip, loss, rows[start : start + CHUNK_ROWS], columns, start, use_reentrant=False)
        for start in range(0, len(rows), CHUNK_ROWS)
    ]
    return torch.stack(parts).sum()  # pyright: ignore[reportArgumentType]


def _strip(loss: str, rows: Tensor, columns: Tensor, start: int) -> Tensor:
    """The contribution of rows start, start + 1, ... to the loss."""
    n, index = len(columns), torch.arange(start, start + len(rows), device=rows.device)
    logits = INV_TEMPERATURE * (rows @ columns.T)
    if loss == "siglip":
        is_pair = (index[:, None] == torch.arange(n, device=rows.device)).float()
        return -F.logsigmoid((2 * is_pair - 1) * (logits + SIGLIP_BIAS)).sum() / n
    partner = (index + n // 2) % n
    own = logits.scatter(1, index[:, None], -math.inf)
    if loss == "nt_xent":
        return F.cross_entropy(own, partner, reduction="sum") / n
    positives, negatives = logits.gather(1, partner[:, None]), own.scatter(1, partner[:, None], -math.inf)
    if loss == "exp":
        return negatives.exp().sum() / (n * (n - 2)) - positives.sum() / n
    return F.softplus(negatives).sum() / (n * (n - 2)) + F.softplus(-positives).sum() / n


# -- peers


def _lightly(loss: str, device: str) -> LossOf:
    del device
    if loss != "nt_xent":
        raise NotInstalledError("its NTXentLoss has no such form")
    declare_torchvision_operators()  # lightly imports torchvision
    module = _import("lightly.loss.ntx_ent_loss").NTXentLoss(temperature=1 / INV_TEMPERATURE)
    return lambda z: module(z[0], z[1])


def _siglip_kernel(loss: str, device: str) -> LossOf:
    if loss != "siglip" or device == "cpu":
        raise NotInstalledError("it computes SigLIP's loss on a GPU")
    fused = _import("siglip_kernel").siglip_loss
    t, b = (torch.tensor(x, device=device) for x in (INV_TEMPERATURE, SIGLIP_BIAS))
    return lambda z: fused(F.normalize(z[0], dim=1), F.normalize(z[1], dim=1), t, b)


@cache
def _import(name: str):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise NotInstalledError(f"{error}") from None


PROVIDERS: dict[str, Callable[[str, str], LossOf]] = {
    "fastssl fused": partial(_ours, "fused"),
    "fastssl chunked": partial(_ours, "chunked"),
    "eager": _eager,
    "eager bf16": _eager_bf16,
    "torch.compile": _compiled,
    "torch.compile bf16": _compiled_bf16,
    "strips + checkpoint": _checkpointed,
    "Lightly": _lightly,
    "siglip-kernel": _siglip_kernel,
}

# The dtype of the operands of a provider's products; sums are fp32. fp32 is IEEE fp32: torch's default is not TF32.
PRODUCTS = dict.fromkeys(PROVIDERS, "float32")
PRODUCTS |= {"fastssl fused": "float16", "eager bf16": "bfloat16", "torch.compile bf16": "bfloat16"}
PRODUCTS |= {"Lightly": "as z", "siglip-kernel": "as z"}
