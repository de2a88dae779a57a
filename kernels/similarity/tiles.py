"""The Triton kernel for rows up to 256 wide: all pairs of a tile of rows in one pass, its pulls in registers.

# row blocks [V, B, D'], column blocks [Q, B, D'] fp16 with B samples each; BLOCK: rows and columns of a tile
# a tile stands within one block, so pairs of one sample stand on the diagonal of tiles with the same number
# x = u_i . u_k + b log2(e), the exponent of e^l; full: tiles of a block without its ragged end

A program owns BLOCK rows of one block and a share of the columns. Tiles with nothing to exclude come first, in a loop
without masks; then, with masks, the ragged end of each block and the tiles that hold pairs of the same sample. With
groups every tile is masked. The order within a program is fixed and programs share nothing: the same bits every time.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.similarity import Side, Term
from kernels.similarity.epilogues import (
    EXP,
    FOLDED,
    LEAST_TOP,
    LN_2,
    LOG2_E,
    KINDS,
    SOFTPLUS,
    SQUARE,
    TOP,
    ex2,
    fold,
    pow2,
    rising_top,
    softplus,
    square_scale,
)


__all__ = ["MAX_TILE_WIDTH", "accumulate_tiles"]

INTERPRETED = triton.knobs.runtime.interpret
MAX_TILE_WIDTH = 256
# Partial pulls of all shares of the columns: what a batch too small to fill the device may take.
MAX_SPLIT_BYTES = 32 * 2**20
MAX_SPLITS = 16


class TileConfig(NamedTuple):
    """How a width is cut: BLOCK rows and columns of a tile, stages of loads, and programs of a multiprocessor."""

    block: int
    num_warps: int
    stages: int
    programs: int


# Without spills on sm_90 (tests/kernels/similarity/test_compile.py). Fixed rather than tuned at run time: another tile
# adds in another order, and a run must give the same bits again. Which of them is fastest is not measured yet.
CONFIGS = {
    16: TileConfig(64, 4, 3, 4),
    32: TileConfig(64, 4, 3, 4),
    64: TileConfig(64, 4, 3, 4),
    128: TileConfig(64, 4, 3, 3),
    256: TileConfig(64, 4, 2, 2),
}
INTERPRETED_CONFIG = TileConfig(16, 4, 1, 1)


def accumulate_tiles(
    rows: Side, columns: Side, term: Term, own_rows: tuple[int, int], own_columns: tuple[int, int]
) -> None:
    """Fill the accumulators of `rows` from its pairs with `columns`.

    Args:
        rows: [V, B, D'], D' at most MAX_TILE_WIDTH.
        columns: [Q, B, D'].
        term: f.
        own_rows: First block of rows and number of blocks of samples that stand on both sides.
        own_columns: The same of the columns; 0 blocks where the sides share none.
    """
    if rows.sums is None and rows.slopes is None and rows.pulls is None:
        return
    (num_views, num_samples, padded), num_blocks = rows.u.shape, len(columns.u)
    width = max(16, triton.next_power_of_2(padded))
    config = INTERPRETED_CONFIG if INTERPRETED else CONFIGS[width]
    tiles_per_block = triton.cdiv(num_samples, config.block)
    num_splits = choose_splits(
        num_views * tiles_per_block,
        num_blocks * tiles_per_block,
        _num_slots(rows.u.device, config),
        0 if rows.pulls is None else rows.pulls.numel() * rows.pulls.element_size(),
    )
    adds = num_splits == 1
    wanted = [x if x is None or adds else x.new_empty(num_splits, *x.shape) for x in (rows.sums, rows.slopes, rows.pulls)]
    sums, slopes, pulls = wanted
    groups = [_dense(side.groups) for side in (rows, columns)]
    weights = [_dense(side.weights) for side in (rows, columns)]
    has_groups, has_weights = all(x is not None for x in groups), all(x is not None for x in weights)
    block_dim = 0 if adds else 1
    one_pass_rows[num_views * tiles_per_block, num_splits](
        _descriptor(rows.u, config.block, width), _descriptor(columns.u, config.block, width),
        term.inv_temperature, term.bias, *groups, *weights, sums, slopes, pulls,
        num_samples, num_blocks, *own_rows, *own_columns,
        *(0 if x is None else x.stride(0) for x in (*groups, *weights)),
        *(0 if x is None else x.stride(block_dim) for x in wanted),
        0 if pulls is None else pulls.stride(block_dim + 1),
        0 if adds else num_views * num_samples, 0 if adds or pulls is None else pulls.stride(0),
        KIND=KINDS[term.kind], WIDE=term.kind == "exp" and term.wide_range and not has_weights,
        WEIGHTED=has_weights, GROUPS=has_groups,
        SUMS=sums is not None, SLOPES=slopes is not None, PULLS=pulls is not None, ADDS=adds,
        BLOCK=config.block, D=padded if pulls is None else pulls.shape[-1], WIDTH=width,
        STAGES=config.stages, INTERP=INTERPRETED, num_warps=config.num_warps,
    )  # fmt: skip
    if not adds:
        for total, parts in zip((rows.sums, rows.slopes, rows.pulls), wanted, strict=True):
            if total is not None and parts is not None:
                total += parts.sum(0)


def choose_splits(num_programs: int, num_column_tiles: int, num_slots: int, pulls_bytes: int) -> int:
    """Into how many shares to cut the columns, so that the last round of programs leaves few slots idle.

    Args:
        num_programs: Programs of one share.
        num_column_tiles: What there is to share.
        num_slots: Programs that the device runs at a time.
        pulls_bytes: What one share's pulls take.
    """

    def busy(num_splits: int) -> float:  # a share costs a write and a read of its pulls: 2 % as a guess
        programs = num_programs * num_splits
        return programs / (triton.cdiv(programs, num_slots) * num_slots) - 0.02 * num_splits

    most = min(MAX_SPLITS, max(1, num_column_tiles // 4), max(1, MAX_SPLIT_BYTES // max(1, pulls_bytes)))
    return max(range(1, most + 1), key=busy)


def _num_slots(device: torch.device, config: TileConfig) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count * config.programs


def _dense(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _descriptor(u: Tensor, block: int, width: int) -> TensorDescriptor:
    """Tiles [1, block, width] of u [Q, B, D']; what they hold beyond B and D' is zero."""
    num_blocks, num_samples, padded = u.shape
    between = u.stride(0) if num_blocks > 1 else num_samples * padded
    if between % 8 or u.data_ptr() % 16:  # the copy engine wants 16 bytes
        u, between = u.clone(memory_format=torch.contiguous_format), num_samples * padded
    return TensorDescriptor(u, [num_blocks, num_samples, padded], [between, padded, 1], [1, block, width])


@triton.jit
def _visit(
    q, c, is_own, pulls, sums, slope_sums, top,
    u_i, columns, x_bias, x_scale, i, row_groups, column_groups, groups_stride, row_weights, column_weights,
    weights_stride, num_samples,
    KIND: tl.constexpr, WIDE: tl.constexpr, WEIGHTED: tl.constexpr, GROUPS: tl.constexpr, MASKED: tl.constexpr,
    SUMS: tl.constexpr, SLOPES: tl.constexpr, PULLS: tl.constexpr,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """Add column tile c of block q to pulls, sums and slope sums; top is the exponent of each row's scale."""
    u_k = tl.reshape(columns.load([q, c * BLOCK, 0]), (BLOCK, WIDTH))
    if INTERP:
        u_k = u_k.to(tl.float32)
    x = tl.dot(u_i, tl.trans(u_k), out_dtype=tl.float32)
    k = c * BLOCK + tl.arange(0, BLOCK)
    if KIND == SQUARE:
        x = (x + x_bias) * x_scale
    elif not WIDE:  # there the bias waits for the end
        x += x_bias
    if MASKED:
        excluded = (k >= num_samples)[None, :] | (is_own & (i[:, None] == k[None, :]))
        if GROUPS:
            groups = tl.load(column_groups + q * groups_stride + k, mask=k < num_samples, other=0)
            excluded |= row_groups[:, None] == groups[None, :]
        x = tl.where(excluded, 0.0 if KIND == SQUARE else float("-inf"), x)

    if WIDE:
        new_top = tl.maximum(top, tl.ceil(tl.max(x, 1)))
        rescale = pow2(top - new_top)
        top = new_top
        x -= (top - TOP)[:, None]
        sums *= rescale[:, None]
    if KIND == SOFTPLUS:
        values, slopes = softplus(x, INTERP)
    elif KIND == SQUARE:
        slopes = x
        values = fold(x * x)
    else:
        slopes = ex2(x, INTERP)
        values = fold(slopes)
    if SUMS:
        sums += values
    if WEIGHTED:
        weights = tl.load(column_weights + q * weights_stride + k, mask=k < num_samples, other=0.0)
        slopes *= row_weights[:, None] + weights[None, :]
        new_top = rising_top(top, tl.max(tl.abs(slopes), 1))
        rescale = pow2(top - new_top)
        top = new_top
    if SLOPES:
        slope_sums += fold(slopes)
    if PULLS:
        if WEIGHTED:
            slopes *= pow2(-(top - TOP))[:, None]
        if WIDE or WEIGHTED:
            pulls *= rescale[:, None]
        pulls = tl.dot(slopes.to(tl.float16).to(u_k.dtype), u_k, pulls)
    return pulls, sums, slope_sums, top


@triton.jit
def _store(pointers, x, mask, ADDS: tl.constexpr):
    if ADDS:
        x += tl.load(pointers, mask=mask, other=0.0)
    tl.store(pointers, x, mask=mask)


@triton.jit(do_not_specialize=["own_row", "own_rows", "own_column", "own_columns", "num_blocks"])
def one_pass_rows(
    rows, columns, inv_temperature, bias, row_groups, column_groups, row_weights, column_weights,
    sums, slopes, pulls, num_samples, num_blocks, own_row, own_rows, own_column, own_columns,
    row_groups_stride, column_groups_stride, row_weights_stride, column_weights_stride,
    sums_stride, slopes_stride, pulls_stride, pulls_stride_row, split_stride, split_stride_pulls,
    KIND: tl.constexpr, WIDE: tl.constexpr, WEIGHTED: tl.constexpr, GROUPS: tl.constexpr,
    SUMS: tl.constexpr, SLOPES: tl.constexpr, PULLS: tl.constexpr, ADDS: tl.constexpr,
    BLOCK: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """Grid (row blocks x tiles of a block, SPLIT).

    Row blocks own_row .. + own_rows and column blocks own_column .. + own_columns are of the same samples. Strides
    are from block to block unless named otherwise. ADDS: add to sums, slopes and pulls, else (SPLIT > 1) write this
    share's part, split_stride(_pulls) further for each share. WIDE: `exp` with a wide range and no weights.
    """
    num_tiles = tl.cdiv(num_samples, BLOCK)
    full = num_samples // BLOCK
    block = tl.program_id(0) // num_tiles
    tile = tl.program_id(0) % num_tiles
    split = tl.program_id(1)
    num_splits = tl.num_programs(1)
    i = tile * BLOCK + tl.arange(0, BLOCK)
    is_row = i < num_samples

    t = tl.load(inv_temperature).to(tl.float32)
    b = tl.load(bias).to(tl.float32)
    x_bias = b * LOG2_E
    x_scale = square_scale(t, b)
    u_i = tl.reshape(rows.load([block, tile * BLOCK, 0]), (BLOCK, WIDTH))
    if INTERP:
        u_i = u_i.to(tl.float32)
    groups = i
    if GROUPS:
        groups = tl.load(row_groups + block * row_groups_stride + i, mask=is_row, other=0)
    weights = u_i
    if WEIGHTED:
        weights = tl.load(row_weights + block * row_weights_stride + i, mask=is_row, other=0.0)

    ONE_SUM: tl.constexpr = KIND == EXP and not WEIGHTED  # f' is f
    ADD_SUMS: tl.constexpr = SUMS or (SLOPES and ONE_SUM)
    ADD_SLOPES: tl.constexpr = SLOPES and not ONE_SUM
    acc = tl.zeros((BLOCK, WIDTH), tl.float32)
    value_sums = tl.zeros((BLOCK, FOLDED), tl.float32)
    slope_sums = tl.zeros((BLOCK, FOLDED), tl.float32)
    top = tl.full((BLOCK,), LEAST_TOP if WEIGHTED else -16384.0, tl.float32)

    # j counts tiles with the block as the faster index, so the own tiles of these rows are neighbours: skipped as one.
    # j // Q as a product: exact while j Q < 2^30.
    over_q = (1 << 30) // num_blocks + 1
    is_own_row = (block >= own_row) & (block < own_row + own_rows)
    own_tiles = tl.where(is_own_row & (tile < full), own_columns, 0)
    first_own = tile * num_blocks + own_column
    plain = 0 if GROUPS else full * num_blocks - own_tiles
    for m in tl.range(plain * split // num_splits, plain * (split + 1) // num_splits, num_stages=STAGES):
        j = m + tl.where(m >= first_own, own_tiles, 0)
        c = ((j.to(tl.int64) * over_q) >> 30).to(tl.int32)
        acc, value_sums, slope_sums, top = _visit(
            j - c * num_blocks, c, False, acc, value_sums, slope_sums, top,
            u_i, columns, x_bias, x_scale, i, groups, column_groups, column_groups_stride, weights, column_weights,
            column_weights_stride, num_samples,
            KIND, WIDE, WEIGHTED, GROUPS, False, ADD_SUMS, ADD_SLOPES, PULLS, BLOCK, WIDTH, INTERP,
        )  # fmt: skip

    ragged = tl.where(full < num_tiles, num_blocks, 0)
    masked = num_tiles * num_blocks if GROUPS else ragged + own_tiles
    for m in tl.range(split, masked, num_splits, num_stages=STAGES if GROUPS else 1):
        if GROUPS:
            c = m // num_blocks
            q = m % num_blocks
        else:
            c = tl.where(m < ragged, full, tile)
            q = tl.where(m < ragged, m, own_column + m - ragged)
        is_own = is_own_row & (q >= own_column) & (q < own_column + own_columns)
        acc, value_sums, slope_sums, top = _visit(
            q, c, is_own, acc, value_sums, slope_sums, top,
            u_i, columns, x_bias, x_scale, i, groups, column_groups, column_groups_stride, weights, column_weights,
            column_weights_stride, num_samples,
            KIND, WIDE, WEIGHTED, GROUPS, True, ADD_SUMS, ADD_SLOPES, PULLS, BLOCK, WIDTH, INTERP,
        )  # fmt: skip

    value_unit = tl.full((BLOCK,), 1.0, tl.float32)
    slope_unit = value_unit
    if WIDE:
        value_unit = pow2(-(value_unit * TOP)) * tl.math.exp2(top + x_bias)
        slope_unit = value_unit
    elif KIND == SOFTPLUS:
        value_unit *= LN_2
        slope_unit = pow2(-(slope_unit * TOP))
    elif KIND == SQUARE:
        value_unit *= LN_2 * LN_2 / x_scale / x_scale
        slope_unit *= 2 * LN_2 / x_scale
    at = block.to(tl.int64) * sums_stride + split.to(tl.int64) * split_stride + i
    if SUMS:
        _store(sums + at, tl.sum(value_sums, 1) * value_unit, is_row, ADDS)
    if SLOPES:
        at = block.to(tl.int64) * slopes_stride + split.to(tl.int64) * split_stride + i
        total = tl.sum(value_sums if ONE_SUM else slope_sums, 1)
        _store(slopes + at, total * slope_unit, is_row, ADDS)
    if PULLS:
        if WEIGHTED:
            slope_unit *= pow2(top - TOP)
        acc *= (slope_unit / tl.sqrt_rn(t * LOG2_E))[:, None]
        d = tl.arange(0, WIDTH)
        start = block.to(tl.int64) * pulls_stride + split.to(tl.int64) * split_stride_pulls
        at = start + i.to(tl.int64)[:, None] * pulls_stride_row + d[None, :]
        _store(pulls + at, acc, is_row[:, None] & (d < D)[None, :], ADDS)
