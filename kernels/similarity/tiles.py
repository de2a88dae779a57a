"""Rows up to 256 wide: tile sizes, and the distribution of tiles over the programs of tile_kernels.py.

# row blocks [V, B, D'], column blocks [Q, B, D'], from `fused.normalize`
"""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.similarity import Side, Term
from kernels.similarity.epilogues import INTERPRETED, KINDS
from kernels.similarity.tile_kernels import one_pass_rows

MAX_TILE_WIDTH = 256
# Maximum extra memory for the pulls of shares after the first, used if a batch is too small to fill the device.
MAX_SPLIT_BYTES = 8 * 2**20
MAX_SPLITS = 16


class TileConfig(NamedTuple):
    """Tile settings: rows and columns of a tile, warps, stages of loads, programs that fit on a multiprocessor."""

    rows: int
    columns: int  # a multiple of rows
    num_warps: int
    stages: int
    programs: int


# By width. Chosen from sm_90 machine code (test_compile.py): no register spills in the main loop, few instructions per
# pair, products that stay asynchronous. At 128, measured on an H200 (tune_tiles.py, benchmarks/results/tiles.csv). Not
# tuned at run time: another tile size changes the order of summation, and runs must be bitwise reproducible.
CONFIGS = {
    16: TileConfig(64, 64, 4, 3, 4),
    32: TileConfig(64, 64, 4, 3, 4),
    64: TileConfig(64, 64, 4, 3, 4),
    128: TileConfig(64, 64, 4, 3, 3),
    256: TileConfig(64, 64, 4, 2, 2),
}
# Triton 3.6 uses 173 registers with weights, 212 with groups: two programs fit.
HEAVY_CONFIGS = CONFIGS | {128: TileConfig(64, 64, 4, 3, 2)}
WEIGHTED_PULLS_CONFIGS = CONFIGS | {128: TileConfig(64, 128, 4, 2, 2)}
# Narrow `exp`, and sums only: there are registers left for twice as many columns, which share the loop's instructions
# and the reads of u from shared memory: 5.1 instructions per pair instead of 6.3; 5.9 instead of 7.7 for the sums of a
# wide range. At 256 there are not (exp spills), and only one program would run on a multiprocessor.
LIGHT_CONFIGS = {
    16: TileConfig(64, 128, 4, 3, 3),
    32: TileConfig(64, 128, 4, 3, 3),
    64: TileConfig(64, 128, 4, 3, 3),
    128: TileConfig(64, 128, 4, 3, 2),
    256: CONFIGS[256],
}
# At 64 x 128 with a wide range, ptxas waits for each product, but it is still 5.8 % faster: 8.1 instructions per pair
# instead of 10.5.
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
    """Choose the tile settings.

    Args:
        width: Width of the rows, a power of two, at least 16.
        weighted: The sides have weights.
        groups: The sides have groups.
        only_pulls: Neither sums nor slopes are needed.
        narrow_exp: f is e^l, and its range fits fp16 without scaling.
        wide_exp: f is e^l, and its range does not fit fp16.
        only_sums: Neither slopes nor pulls are needed.
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
        own_rows: Index of the first block of rows, and number of blocks, whose samples are on both sides.
        own_columns: The same for the columns; 0 blocks if the sides share no samples.
        config: The tile settings; None: those of `choose_config`.
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
            for share in shares:  # one by one: summing them first would need another tensor of the pulls' size
                total += share


def choose_splits(num_programs: int, num_column_tiles: int, num_slots: int, pulls_bytes: int) -> int:
    """Choose the number of shares of the columns, so that the last round of programs leaves few slots idle.

    Args:
        num_programs: Number of programs per share.
        num_column_tiles: Number of column tiles to divide.
        num_slots: Number of programs that the device runs at a time.
        pulls_bytes: Size of one share's pulls; those of the first share are the accumulator itself.
    """

    def busy(num_splits: int) -> float:  # a share costs a write and a read of its pulls: estimated as 2 %
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
    """Descriptor of tiles [1, block, width] of u [Q, B, D']; elements beyond B and D' are zero."""
    num_blocks, num_samples, padded = u.shape
    between = u.stride(0) if num_blocks > 1 else num_samples * padded
    if between % 8 or u.data_ptr() % 16:  # the copy engine requires 16-byte alignment
        u, between = u.clone(memory_format=torch.contiguous_format), num_samples * padded
    return TensorDescriptor(u, [num_blocks, num_samples, padded], [between, padded, 1], [1, block, width])


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
