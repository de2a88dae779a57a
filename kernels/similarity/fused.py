"""Triton kernels behind the functions of similarity/__init__.py: fp16 operands, fp32 sums, no atomics.

# V views of B samples, D width; u [V, B, D'] fp16, D' = D rounded up to a multiple of 8 (16 bytes, for the copy engine)
# u = z / |z| sqrt(t log2 e): the product of two rows is directly the exponent of 2

Rows up to 256 wide are processed in one pass (tiles.py). For wider rows the pulls do not fit in registers, so strips of
slopes are written to memory and multiplied with torch's products (strips.py).
"""

import contextlib
from typing import Any, cast

import torch
from torch import Tensor

from kernels.similarity import Rows, Side, Term
from kernels.similarity.row_kernels import finish_rows, normalize_rows
from kernels.similarity.strips import accumulate_strips
from kernels.similarity.tiles import MAX_TILE_WIDTH, accumulate_tiles

WIDTH_MULTIPLE = 8
# Elements per program of the row kernels: 16 per thread and view. Not measured yet.
ROW_KERNEL_ELEMENTS = 2048


def normalize(z: Tensor, inv_temperature: Tensor) -> Rows:
    """See `kernels.similarity.Implementation`; z fp32, fp16 or bf16, at most MAX_WIDTH wide (`choose_impl`)."""
    z = _with_dense_rows(z)
    num_views, num_samples, width = z.shape
    padded = -(-width // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
    rows = Rows(
        z.new_empty(num_views, num_samples, padded, dtype=torch.float16),
        z.new_empty(num_views, num_samples, dtype=torch.float32),
        z.new_empty(num_views * (num_views - 1) // 2, num_samples, dtype=torch.float32),
    )
    with _on_device_of(z):
        cast(Any, normalize_rows)[_row_grid(z)](
            z, *rows, inv_temperature, num_samples, z.stride(0), z.stride(1),
            V=num_views, D=width, PADDED=padded, WIDTH=_width(z), ROWS=_row_block(z),
        )  # fmt: skip
    return rows


def accumulate(rows: Side, columns: Side, term: Term, own: int | None) -> None:
    """See `kernels.similarity.Implementation`; accumulators are fp32 with contiguous rows.

    Raises:
        ValueError: The sides have blocks of different shapes, or an accumulator has strided rows.
    """
    if rows.u.shape[1:] != columns.u.shape[1:]:
        raise ValueError(f"blocks of both sides must be alike, got {list(rows.u.shape)} and {list(columns.u.shape)}")
    for x in (x for side in (rows, columns) for x in (side.sums, side.slopes, side.pulls) if x is not None):
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(f"accumulators must have dense rows, got strides {list(x.stride())}")
    with _on_device_of(rows.u):
        if rows.u.shape[2] > MAX_TILE_WIDTH:
            accumulate_strips(rows, columns, term, own)
            return
        num_views = len(rows.u)
        accumulate_tiles(rows, columns, term, (0, num_views), (own, num_views) if own is not None else (0, 0))
        if columns is not rows:
            accumulate_tiles(columns, rows, term, (own, num_views) if own is not None else (0, 0), (0, num_views))


def finish(
    z: Tensor, inv_norm: Tensor, pulls: Tensor, pull_scale: Tensor, positive_grads: Tensor
) -> tuple[Tensor, Tensor]:
    """See `kernels.similarity.Implementation`; u is recomputed from z in fp32."""
    z, pulls = _with_dense_rows(z), _with_dense_rows(pulls)
    num_views, num_samples, width = z.shape
    dz = torch.empty_like(z, memory_format=torch.contiguous_format)
    dots = torch.empty_like(inv_norm, memory_format=torch.contiguous_format)
    with _on_device_of(z):
        cast(Any, finish_rows)[_row_grid(z)](
            z, inv_norm.contiguous(), pulls, pull_scale, positive_grads.contiguous(), dz, dots, num_samples,
            z.stride(0), z.stride(1), pulls.stride(0), pulls.stride(1),
            V=num_views, D=width, WIDTH=_width(z), ROWS=_row_block(z),
        )  # fmt: skip
    return dz, dots


def _with_dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def _width(z: Tensor) -> int:
    return 1 << (max(z.shape[2], WIDTH_MULTIPLE) - 1).bit_length()


def _row_block(z: Tensor) -> int:
    return max(1, ROW_KERNEL_ELEMENTS // _width(z))


def _row_grid(z: Tensor) -> tuple[int]:
    return (-(-z.shape[1] // _row_block(z)),)


def _on_device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Make x's device current: Triton launches on the current device, not on that of the tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
