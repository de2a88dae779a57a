# type: ignore  (Triton's language is no Python to a type checker)
"""The Triton kernel for rows wider than 256: f and f' of a strip of pairs, whose product with u is computed by torch.

# a strip: R rows of one block x C columns of one block; x = u_i . u_k + b log2(e), the exponent of e^l
# BLOCK_R, BLOCK_C: the tile of a program; STEP: how much of the width it multiplies at a time
# PART: how much of the width the tensor cores sum up. They truncate partial sums (tests/helpers/rounded.py): in
# one sum over D = 2048, e^l at l = 20 is 2e-4 too small. Sums of parts are added, and rounded, in fp32.
"""

import triton
import triton.language as tl

from kernels.similarity.epilogues import LN_2, LOG2_E, SOFTPLUS, SQUARE, ex2, softplus_each


@triton.jit(do_not_specialize=["num_rows", "num_columns", "diagonal"])
def pair_strip(
    rows, columns, bias, row_groups, column_groups, row_weights, column_weights,
    slopes, slopes_stride, row_parts, column_parts, row_slope_parts, column_slope_parts,
    num_rows, num_columns, width, diagonal,
    KIND: tl.constexpr, WEIGHTED: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, STEP: tl.constexpr, PART: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of rows, tiles of columns).

    Writes slopes [R, C], those of `softplus` times 2^TOP, and for each tile the sums along its columns
    (row_parts [tiles of columns, R]) and along its rows (column_parts [tiles of rows, C]), to be added in order.
    Outputs that are None are not computed. diagonal: row i and column i of the strip are the same sample.
    """
    i = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_row = i < num_rows
    is_column = k < num_columns
    x = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for begin in tl.range(0, width, PART):
        part = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        for d in tl.range(begin, begin + PART, STEP):
            u_i = rows.load([tl.program_id(0) * BLOCK_R, d])  # zeros beyond the width
            u_k = columns.load([tl.program_id(1) * BLOCK_C, d])
            if INTERP:
                u_i = u_i.to(tl.float32)
                u_k = u_k.to(tl.float32)
            part = tl.dot(u_i, tl.trans(u_k), part)
        x += part

    b = tl.load(bias).to(tl.float32)
    excluded = ~(is_row[:, None] & is_column[None, :]) | ((diagonal != 0) & (i[:, None] == k[None, :]))
    if GROUPS:
        row_group = tl.load(row_groups + i, mask=is_row, other=0)
        column_group = tl.load(column_groups + k, mask=is_column, other=0)
        excluded |= row_group[:, None] == column_group[None, :]
    x = tl.where(excluded, 0.0 if KIND == SQUARE else float("-inf"), x + b * LOG2_E)
    if KIND == SOFTPLUS:
        values, g = softplus_each(x, INTERP)
        values *= LN_2
    elif KIND == SQUARE:
        values = x * x * (LN_2 * LN_2)
        g = x * (2 * LN_2)
    else:
        values = ex2(x, INTERP)
        g = values
    if WEIGHTED:
        row_weight = tl.load(row_weights + i, mask=is_row, other=0.0)
        column_weight = tl.load(column_weights + k, mask=is_column, other=0.0)
        g *= row_weight[:, None] + column_weight[None, :]

    row_at = tl.program_id(1) * num_rows + i
    column_at = tl.program_id(0) * num_columns + k
    if row_parts is not None:
        tl.store(row_parts + row_at, tl.sum(values, 1), mask=is_row)
    if column_parts is not None:
        tl.store(column_parts + column_at, tl.sum(values, 0), mask=is_column)
    if row_slope_parts is not None:
        tl.store(row_slope_parts + row_at, tl.sum(g, 1), mask=is_row)
    if column_slope_parts is not None:
        tl.store(column_slope_parts + column_at, tl.sum(g, 0), mask=is_column)
    if slopes is not None:
        at = i.to(tl.int64)[:, None] * slopes_stride + k[None, :]
        tl.store(slopes + at, g.to(slopes.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])
