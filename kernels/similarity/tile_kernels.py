# type: ignore  (Triton's language is no Python to a type checker)
"""The Triton kernel for rows up to 256 wide: all pairs of a tile of rows in one pass, with its pulls in registers.

# row blocks [V, B, D'], column blocks [Q, B, D'] fp16 with B samples each; a tile: ROWS x COLUMNS pairs
# a tile is within one block, so pairs of one sample are in the tiles crossed by the diagonal of two blocks
# x = u_i . u_k + b log2(e), the exponent of e^l; full: tiles of a block without its incomplete last tile

A program owns ROWS rows of one block and a share of the columns. It first processes the tiles without excluded pairs,
in a loop without masks; then, with masks, the incomplete last tile of each block and the tiles with pairs of the same
sample. With groups, every tile is masked. The order within a program is fixed and programs share no data, so the
results are bitwise reproducible.
"""

import triton
import triton.language as tl

from kernels.similarity.epilogues import (
    EXP,
    FOLDED,
    LEAST_TOP,
    LN_2,
    LOG2_E,
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


@triton.jit
def _visit(
    q, c, is_own, pulls, sums, slope_sums, top,
    u_i, columns, x_bias, l_scale, i, row_groups, column_groups, groups_stride, row_weights, column_weights,
    weights_stride, num_samples,
    KIND: tl.constexpr, WIDE: tl.constexpr, WEIGHTED: tl.constexpr, GROUPS: tl.constexpr, MASKED: tl.constexpr,
    SUMS: tl.constexpr, SLOPES: tl.constexpr, PULLS: tl.constexpr,
    COLUMNS: tl.constexpr, WIDTH: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """Add column tile c of block q to the pulls, sums and slope sums; top is the exponent of each row's scale."""
    u_k = tl.reshape(columns.load([q, c * COLUMNS, 0]), (COLUMNS, WIDTH))
    if INTERP:
        u_k = u_k.to(tl.float32)
    x = tl.dot(u_i, tl.trans(u_k), out_dtype=tl.float32)
    k = c * COLUMNS + tl.arange(0, COLUMNS)
    # Triton makes the bias of a sum the product's first summand, and the tensor cores cut each partial sum at its last
    # place: that saves registers, and the exponent is then off by last places of a large bias. Of `exp` with weights,
    # whose sums came from a pass without the bias, the difference would stay in the gradient: a difference is no sum.
    if KIND == SOFTPLUS:
        x += x_bias
    elif not WIDE:  # there the bias waits for the end
        x -= -x_bias
    if KIND == SQUARE:
        x *= l_scale * LN_2
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
def _store(pointers, x, mask, adds):
    """Store x; adds: add to the existing values instead of overwriting them."""
    x += tl.load(pointers, mask=mask & adds, other=0.0)
    tl.store(pointers, x, mask=mask)


@triton.jit
def _store_wide(pointers, x, start, is_row, adds, D: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr):
    """Store columns start .. start + WIDTH of rows, at most PART at a time: the existing values need registers too."""
    if WIDTH > PART:
        HALF: tl.constexpr = WIDTH // 2
        low, high = tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, HALF)), (0, 2, 1)))
        _store_wide(pointers, low, start, is_row, adds, D, HALF, PART)
        _store_wide(pointers, high, start + HALF, is_row, adds, D, HALF, PART)
    else:
        d = start + tl.arange(0, WIDTH)
        _store(pointers[:, None] + d[None, :], x, is_row[:, None] & (d < D)[None, :], adds)


@triton.jit(do_not_specialize=["num_samples", "own_row", "own_rows", "own_column", "own_columns", "num_blocks"])
def one_pass_rows(
    rows, columns, inv_temperature, bias, row_groups, column_groups, row_weights, column_weights,
    sums, slopes, pulls, sum_parts, slope_parts, pull_parts,
    num_samples, num_blocks, own_row, own_rows, own_column, own_columns,
    row_groups_stride, column_groups_stride, row_weights_stride, column_weights_stride,
    sums_stride, slopes_stride, pulls_stride, pulls_stride_row,
    KIND: tl.constexpr, WIDE: tl.constexpr, WEIGHTED: tl.constexpr, GROUPS: tl.constexpr,
    SUMS: tl.constexpr, SLOPES: tl.constexpr, PULLS: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    STAGES: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """Grid (row blocks x tiles of a block, SPLIT).

    Row blocks own_row .. + own_rows and column blocks own_column .. + own_columns belong to the same samples. Strides
    are from block to block unless named otherwise. Share 0 adds to sums, slopes and pulls; PARTS (SPLIT > 1): share
    s > 0 writes the dense sum_parts[s - 1] [row blocks, B], slope_parts likewise, and pull_parts[s - 1]
    [row blocks, B, D]. WIDE: `exp` with a wide range and no weights.
    """
    num_row_tiles = tl.cdiv(num_samples, ROWS)
    num_column_tiles = tl.cdiv(num_samples, COLUMNS)
    full = num_samples // COLUMNS
    block = tl.program_id(0) // num_row_tiles
    first_row = tl.program_id(0) % num_row_tiles * ROWS
    own_tile = first_row // COLUMNS
    split = tl.program_id(1)
    num_splits = tl.num_programs(1)
    i = first_row + tl.arange(0, ROWS)
    is_row = i < num_samples

    t = tl.load(inv_temperature).to(tl.float32)
    b = tl.load(bias).to(tl.float32)
    x_bias = b * LOG2_E
    l_scale = square_scale(t, b)
    u_i = tl.reshape(rows.load([block, first_row, 0]), (ROWS, WIDTH))
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
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    value_sums = tl.zeros((ROWS, FOLDED), tl.float32)
    slope_sums = tl.zeros((ROWS, FOLDED), tl.float32)
    top = tl.full((ROWS,), LEAST_TOP if WEIGHTED else -16384.0, tl.float32)

    # j counts tiles with the block as the faster index, so the own tiles of these rows are neighbours: skipped as one.
    # j // Q as a product: exact while j Q < 2^30.
    over_q = (1 << 30) // num_blocks + 1
    is_own_row = (block >= own_row) & (block < own_row + own_rows)
    own_tiles = tl.where(is_own_row & (own_tile < full), own_columns, 0)
    first_own = own_tile * num_blocks + own_column
    plain = 0 if GROUPS else full * num_blocks - own_tiles
    for m in tl.range(plain * split // num_splits, plain * (split + 1) // num_splits, num_stages=STAGES):
        j = m + tl.where(m >= first_own, own_tiles, 0)
        c = ((j.to(tl.int64) * over_q) >> 30).to(tl.int32)
        acc, value_sums, slope_sums, top = _visit(
            j - c * num_blocks, c, False, acc, value_sums, slope_sums, top,
            u_i, columns, x_bias, l_scale, i, groups, column_groups, column_groups_stride, weights, column_weights,
            column_weights_stride, num_samples,
            KIND, WIDE, WEIGHTED, GROUPS, False, ADD_SUMS, ADD_SLOPES, PULLS, COLUMNS, WIDTH, INTERP,
        )  # fmt: skip

    ragged = tl.where(full < num_column_tiles, num_blocks, 0)
    masked = num_column_tiles * num_blocks if GROUPS else ragged + own_tiles
    for m in tl.range(split, masked, num_splits, num_stages=STAGES if GROUPS else 1):
        if GROUPS:
            c = m // num_blocks
            q = m % num_blocks
        else:
            c = tl.where(m < ragged, full, own_tile)
            q = tl.where(m < ragged, m, own_column + m - ragged)
        is_own = is_own_row & (q >= own_column) & (q < own_column + own_columns)
        acc, value_sums, slope_sums, top = _visit(
            q, c, is_own, acc, value_sums, slope_sums, top,
            u_i, columns, x_bias, l_scale, i, groups, column_groups, column_groups_stride, weights, column_weights,
            column_weights_stride, num_samples,
            KIND, WIDE, WEIGHTED, GROUPS, True, ADD_SUMS, ADD_SLOPES, PULLS, COLUMNS, WIDTH, INTERP,
        )  # fmt: skip

    value_unit = tl.full((ROWS,), 1.0, tl.float32)
    slope_unit = value_unit
    if WIDE:
        value_unit = pow2(-(value_unit * TOP)) * tl.math.exp2(top + x_bias)
        slope_unit = value_unit
    elif KIND == SOFTPLUS:
        value_unit *= LN_2
        slope_unit = pow2(-(slope_unit * TOP))
    elif KIND == SQUARE:
        value_unit /= l_scale * l_scale
        slope_unit *= 2 / l_scale
    adds = split == 0
    part = ((split.to(tl.int64) - 1) * (tl.num_programs(0) // num_row_tiles) + block) * num_samples  # its first row
    if SUMS:
        at = sums + block.to(tl.int64) * sums_stride
        if PARTS:
            at = tl.where(adds, at, sum_parts + part)
        _store(at + i, tl.sum(value_sums, 1) * value_unit, is_row, adds)
    if SLOPES:
        at = slopes + block.to(tl.int64) * slopes_stride
        if PARTS:
            at = tl.where(adds, at, slope_parts + part)
        total = tl.sum(value_sums if ONE_SUM else slope_sums, 1)
        _store(at + i, total * slope_unit, is_row, adds)
    if PULLS:
        if WEIGHTED:
            slope_unit *= pow2(top - TOP)
        acc *= (slope_unit / tl.sqrt_rn(t * LOG2_E))[:, None]
        at = pulls + block.to(tl.int64) * pulls_stride
        stride_row = pulls_stride_row
        if PARTS:
            at = tl.where(adds, at, pull_parts + part * D)
            stride_row = tl.where(adds, stride_row, D)
        _store_wide(at + i.to(tl.int64) * stride_row, acc, 0, is_row, adds, D, WIDTH, WIDTH if INTERP else 32)
