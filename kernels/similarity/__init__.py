"""Sums of a function of the similarity over all pairs of a batch, and their gradients, without the matrix of pairs.

# W ranks; V views of B samples on each; D width; a block: the B rows of one view on one rank; Q blocks of columns
# rows u [V, B, D], columns [Q, B, D], unit rows;  s_ik = u_i . u_k;  l_ik = t s_ik + b the logit
# t the inverse temperature, b the bias, both dimensionless

Every loss over pairs here consists of three steps, and an implementation is a module with these three functions:

    normalize    u_i = z_i / |z_i|, and the similarities of the positive pairs, in full precision
    accumulate   for the pairs (i, k) of two sides that are not excluded, add to the accumulators of each side:
                     sums_i   += f(l_ik)
                     slopes_i += f'(l_ik)
                     pulls_i  += f'(l_ik) u_k            f' times (g_i + g_k) if the sides have weights g
    finish       dz from the pulls and from the gradients of the positive similarities

| kind       | f(l)         | f'(l)      |
|------------|--------------|------------|
| `exp`      | e^l          | e^l        |
| `softplus` | log(1 + e^l) | sigmoid(l) |
| `square`   | l^2          | 2 l        |

One pass is enough if all rows have the same weight: dL/ds_ik is known as soon as s_ik is. In losses with a logarithm
per row (NT-Xent), the weights are known only after the sums, so a second `accumulate` with weights is needed. The
similarity is symmetric, so the gradient of the local rows counts each pair both as row and as column, and is complete
without any gradient from other ranks. No function here synchronises with the device, and the same inputs give the same
bits. These gradients cannot be differentiated again; `reference` in one process uses autograd, which supports
derivatives of any order.

| impl        | implementation                                                  | used for                     |
|-------------|-----------------------------------------------------------------|------------------------------|
| `fused`     | Triton: fp16 operands, fp32 sums, no [rows, columns] in memory  | CUDA, or Triton's interpreter |
| `chunked`   | torch, a tile of pairs at a time, fp32 or fp64                  | any device                   |
| `reference` | the equations on the whole matrix, fp32 or fp64                 | tests, second derivatives    |
| `auto`      | `fused` if it is fast and rounding is allowed, else `chunked`   |                              |
"""

import importlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, get_args

import torch
from torch import Tensor

Kind = Literal["exp", "softplus", "square"]
Impl = Literal["auto", "fused", "chunked", "reference"]
IMPLS: tuple[str, ...] = get_args(Impl)
_Function = TypeVar("_Function", bound=Callable[..., Any])

MAX_WIDTH = 2048  # largest D of the fused kernels

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Term:
    """The function f and the parameters of its logit.

    Attributes:
        kind: The kind of f.
        inv_temperature: t, 0-dim, fp32 (fp64 for fp64 rows), on the device of the rows.
        bias: b, likewise.
        wide_range: e^l spans more than fp16's normal numbers, so a kernel in fp16 must rescale it as it proceeds.
    """

    kind: Kind
    inv_temperature: Tensor
    bias: Tensor
    wide_range: bool = True


class Rows(NamedTuple):
    """Result of `normalize` for z [V, B, D].

    Attributes:
        u: Unit rows in the implementation's operand form, contiguous; [V, B, D'], gathered over ranks in this form.
        inv_norm: 1 / |z| [V, B], fp32 (fp64 for fp64 z).
        positives: s of the positive pairs [V (V - 1) / 2, B], views v < w in lexical order, dtype of inv_norm.
    """

    u: Tensor
    inv_norm: Tensor
    positives: Tensor


@dataclass(kw_only=True)
class Side:
    """One side of the pairs: rows, their groups and weights, and their accumulators (None: not accumulated).

    Attributes:
        u: [Q, B, D'] from `normalize`; each block is contiguous, but blocks need not be adjacent in memory.
        groups: Integers [Q, B]; pairs with equal groups are excluded.
        weights: g [Q, B], fp32 or fp64; either both sides have weights or neither.
        sums: [Q, B].
        slopes: [Q, B].
        pulls: [Q, B, D].
    """

    u: Tensor
    groups: Tensor | None = None
    weights: Tensor | None = None
    sums: Tensor | None = None
    slopes: Tensor | None = None
    pulls: Tensor | None = None


class Implementation(Protocol):
    """The functions of an implementation module."""

    def normalize(self, z: Tensor, inv_temperature: Tensor) -> Rows:
        """Normalise z [V, B, D], any floating dtype; inv_temperature as in Term, for forms that fold it into u."""
        ...

    def accumulate(self, rows: Side, columns: Side, term: Term, own: int | None) -> None:
        """Accumulate over the pairs of two sides.

        Args:
            rows: [V, B, D'].
            columns: [Q, B, D']. If this is the same object as rows, each pair is visited once and counted for both of
                its rows. If it is another object with accumulators, they are filled too, with rows and columns
                swapped.
            term: f.
            own: Index of the first of the V blocks of columns that belong to the same samples as the rows. There,
                pairs of the same sample are excluded. None: the columns belong to other samples.
        """
        ...

    def finish(
        self, z: Tensor, inv_norm: Tensor, pulls: Tensor, pull_scale: Tensor, positive_grads: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The gradient of the unnormalised rows, dz = (I - u u^T) du / |z|, du = pull_scale * pulls + positives' part.

        Args:
            z: As in `normalize`.
            inv_norm: From it.
            pulls: [V, B, D].
            pull_scale: 0-dim, dtype of the pulls.
            positive_grads: dL/ds of the positive pairs, in the order of `Rows.positives`.

        Returns:
            dz [V, B, D] of z's dtype, and <u_i, pulls_i> [V, B] (times t this is sum_k f' t s_ik).
        """
        ...


def choose_impl(impl: Impl, z: Tensor) -> Impl:
    """Resolve "auto" for z; any other choice is checked and returned.

    "auto" is "fused" on a CUDA device of at least compute capability 9.0 with Triton, up to MAX_WIDTH, for fp16 and
    bf16 z, and for fp32 z if torch may round fp32 products too (`torch.set_float32_matmul_precision`). Devices of
    compute capability 8.0 to 8.9 run "fused" only on request: they have no hardware engine for its tile loads, which
    become loads of single numbers. Whether it is still faster there is not measured.

    Args:
        impl: The requested implementation.
        z: [..., D], on its device.

    Raises:
        ValueError: Unknown, or "fused" cannot run on z.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    if impl == "fused" and (reason := _why_not_fused(z)):
        raise ValueError(f"impl fused: {reason}")
    if impl != "auto":
        return impl
    rounds = z.dtype in (torch.float16, torch.bfloat16) or _may_round_fp32()
    fits = z.is_cuda and rounds and _has_copy_engine(z.device) and not _why_not_fused(z)
    chosen: Impl = "fused" if fits else "chunked"
    if not torch.compiler.is_compiling():
        _say_choice(chosen, z.device.type, str(z.dtype).removeprefix("torch."), z.shape[-1])
    return chosen


def load_impl(impl: str) -> Implementation:
    """Import the module of an implementation from `choose_impl`; only "fused" imports Triton."""
    return importlib.import_module(f"kernels.similarity.{impl}")  # pyright: ignore[reportReturnType]


def _why_not_fused(z: Tensor) -> str | None:
    if z.dtype == torch.float64:
        return "fp64 is for chunked and reference"
    if z.shape[-1] > MAX_WIDTH:
        return f"rows are at most {MAX_WIDTH} wide, got {z.shape[-1]}"
    return _why_not_triton(z.device)


def _constant_when_compiled(function: _Function) -> _Function:
    """Make torch.compile treat the function's result as a constant instead of tracing it.

    Same as `torch.compiler.assume_constant_result`, which however imports the compiler: 2 s in every process.
    """
    function._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
    return function


@_constant_when_compiled
def _may_round_fp32() -> bool:
    return torch.get_float32_matmul_precision() != "highest"


@_constant_when_compiled
def _has_copy_engine(device: torch.device) -> bool:
    """Whether a CUDA device loads tiles by descriptor in hardware."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


@_constant_when_compiled
def _why_not_triton(device: torch.device) -> str | None:
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it needs a CUDA device (or TRITON_INTERPRET=1 in the environment), the rows are on {device.type}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "the device is older than compute capability 8.0"
    if not _has_triton():
        return "Triton is not installed"
    return None


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None  # pyright: ignore[reportAttributeAccessIssue]


@cache
def _say_choice(chosen: str, device: str, dtype: str, width: int) -> None:
    _log.info("pair losses: %s kernels for %s rows of width %d on %s", chosen, dtype, width, device)
