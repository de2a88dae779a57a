"""Rows up to 256 wide: how their tiles are cut and shared out among the programs of tile_kernels.py.

# row blocks [V, B, D'], column blocks [Q, B, D'], as `fused.normalize` gives them
"""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.similarity import Side, Term
from kernels.similarity.epilogues import INTERPRETED, KINDS
from kernels.similarity.tile_kernels import one_pass_rows

__all__ = ["MAX_TILE_WIDTH", "accumulate_tiles"]

MAX_TILE_WIDTH = 256
# Pulls of the shares after the first, which a batch too small to fill the device may take beside rows and pulls.
MAX_SPLIT_BYTES = 8 * 2**20
MAX_SPLITS = 16


class TileConfig(NamedTuple):
    """How pairs are cut: rows and columns of a tile, warps, stages of loads, programs that fit a multiprocessor."""

    rows: int
    columns: int  # a multiple of rows
    num_warps: int
    stages: int
    programs: int


# By width. Chosen from sm_90 machine code (test_compile.py): nothing spilled in the main loop, few instructions a pair,
# products that stay asynchronous. At 128 measured on an H200 (tune_tiles.py, benchmarks/results/tiles.csv). Fixed
# rather than tuned at run time: another tile adds in another order, and a run must give the same bits again.
CONFIGS = {
    16: TileConfig(64, 64, 4, 3, 4),
    32: TileConfig(64, 64, 4, 3, 4),
    64: TileConfig(64, 64, 4, 3, 4),
    128: TileConfig(64, 64, 4, 3, 3),
    256: TileConfig(64, 64, 4, 2, 2),
}
# Triton 3.6 takes 173 registers for weights, 212 for groups: two programs fit.
HEAVY_CONFIGS = CONFIGS | {128: TileConfig(64, 64, 4, 3, 2)}
WEIGHTED_PULLS_CONFIGS = CONFIGS | {128: TileConfig(64, 128, 4, 2, 2)}
# Narrow `exp`, and sums alone: registers are left for twice the columns, which share the loop's instructions and the
# reads of u from shared memory: 5.1 instructions a pair in place of 6.3, 5.9 of 7.7 for the sums of a wide range.
# At 256 they are not left (exp spills), and a single program would have a multiprocessor.
LIGHT_CONFIGS = {
    16: TileConfig(64, 128, 4, 3, 3),
    32: TileConfig(64, 128, 4, 3, 3),
    64: TileConfig(64, 128, 4, 3, 3),
    128: TileConfig(64, 128, 4, 3, 2),
    256: CONFIGS[256],
}
# ptxas waits for each product of a wide range at 64 x 128, and it is 5.8 % faster all the same: 8.1 instructions a pair
# in place of 10.5.
WIDE_CONFIGS = CONFIGS | {128: TileConfig(64, 128, 4, 3, 2)}
INTERPRETED_CONFIG = TileConfig(16, 16, 4, 1, 1)


def choose_config(
    width: int,
    weighted: bool,
    groups: bool,
    only_pulls: bool,
    *,
    narrow_exp: bool = False,
    wide_exp: bool = False,
    only_sums: bool = False,
) -> TileConfig:
    """The tiles for rows of a width that is a power of two, at least 16.

    Args:
        width: See above.
        weighted: The sides have weights.
        groups: The sides have groups.
        only_pulls: Neither sums nor slopes are asked for.
        narrow_exp: f is e^l, and its range fits fp16 as it is.
        wide_exp: f is e^l, and it does not.
        only_sums: Neither slopes nor pulls are asked for.
    """
    if weighted and only_pulls and not groups:
        return WEIGHTED_PULLS_CONFIGS[width]
    if groups or weighted:
        return HEAVY_CONFIGS[width]
    if narrow_exp or only_sums:
        return LIGHT_CONFIGS[width]
    if wide_exp:
        return WIDE_CONFIGS[width]
    return CONFIGS[width]


def accumulate_tiles(
    rows: Side,
    columns: Side,
    term: Term,
    own_rows: tuple[int, int],
    own_columns: tuple[int, int],
    config: TileConfig | None = None,
) -> None:
    """Fill the accumulators of `rows` from its pairs with `columns`.

    Args:
        rows: [V, B, D'], D' at most MAX_TILE_WIDTH.
        columns: [Q, B, D'].
        term: f.
        own_rows: First block of rows and number of blocks of samples that stand on both sides.
        own_columns: The same of the columns; 0 blocks where the sides share none.
        config: The tiles; None: those of `choose_config`.
    """
    if rows.sums is None and rows.slopes is None and rows.pulls is None:
        return
    (num_views, num_samples, padded), num_blocks = rows.u.shape, len(columns.u)
    width = max(16, 1 << (padded - 1).bit_length())
    groups = [_dense(side.groups) for side in (rows, columns)]
    weights = [_dense(side.weights) for side in (rows, columns)]
    has_groups, has_weights = all(x is not None for x in groups), all(x is not None for x in weights)
    if INTERPRETED and config is None:
        config = INTERPRETED_CONFIG
    elif config is None:
        config = choose_config(
            width,
            has_weights,
            has_groups,
            only_pulls=rows.sums is None and rows.slopes is None,
            narrow_exp=term.kind == "exp" and not term.wide_range,
            wide_exp=term.kind == "exp" and term.wide_range,
            only_sums=rows.slopes is None and rows.pulls is None,
        )
    num_programs = num_views * _ceil_div(num_samples, config.rows)
    num_splits = choose_splits(
        num_programs,
        num_blocks * _ceil_div(num_samples, config.columns),
        _num_slots(rows.u.device, config),
        0 if rows.pulls is None else rows.pulls.numel() * rows.pulls.element_size(),
    )
    sums, slopes, pulls = totals = (rows.sums, rows.slopes, rows.pulls)
    has_parts = num_splits > 1
    parts = [x.new_empty(num_splits - 1, *x.shape) if x is not None and has_parts else None for x in totals]
    cast(Any, one_pass_rows)[num_programs, num_splits](
        _descriptor(rows.u, config.rows, width), _descriptor(columns.u, config.columns, width),
        term.inv_temperature, term.bias, *groups, *weights, *totals, *parts,
        num_samples, num_blocks, *own_rows, *own_columns,
        *(0 if x is None else x.stride(0) for x in (*groups, *weights, *totals)),
        0 if pulls is None else pulls.stride(1),
        KIND=KINDS[term.kind], WIDE=term.kind == "exp" and term.wide_range and not has_weights,
        WEIGHTED=has_weights, GROUPS=has_groups,
        SUMS=sums is not None, SLOPES=slopes is not None, PULLS=pulls is not None, PARTS=has_parts,
        ROWS=config.rows, COLUMNS=config.columns, D=padded if pulls is None else pulls.shape[-1], WIDTH=width,
        STAGES=config.stages, INTERP=INTERPRETED, num_warps=config.num_warps,
    )  # fmt: skip
    for total, shares in zip(totals, parts, strict=True):
        if total is not None and shares is not None:
            for share in shares:  # one by one: their sum would be another tensor of the pulls' size
                total += share


def choose_splits(num_programs: int, num_column_tiles: int, num_slots: int, pulls_bytes: int) -> int:
    """Into how many shares to cut the columns, so that the last round of programs leaves few slots idle.

    Args:
        num_programs: Programs of one share.
        num_column_tiles: What there is to share.
        num_slots: Programs that the device runs at a time.
        pulls_bytes: What one share's pulls take; those of the first are the accumulator itself.
    """

    def busy(num_splits: int) -> float:  # a share costs a write and a read of its pulls: 2 % as a guess
        programs = num_programs * num_splits
        return programs / (_ceil_div(programs, num_slots) * num_slots) - 0.02 * num_splits

    most = min(MAX_SPLITS, max(1, num_column_tiles // 4), 1 + MAX_SPLIT_BYTES // max(1, pulls_bytes))
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


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
