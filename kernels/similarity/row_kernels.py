# type: ignore  (Triton's language is no Python to a type checker)
"""The Triton kernels of `normalize` and `finish`: one pass over the rows of all views, fp32 inside.

# V views of B samples, D width; V, D are compile-time constants; a program takes ROWS samples of all views
# WIDTH: the smallest power of two >= D; PADDED: the width of u, D rounded up to a multiple of 8
"""

import triton
import triton.language as tl

from kernels.similarity.epilogues import LOG2_E


@triton.jit
def _load(x, view, rows, columns, is_row, stride_view, stride_row, D: tl.constexpr):
    """Load [ROWS, WIDTH] of one view in fp32; zeros beyond B and D."""
    start = x + view * tl.cast(stride_view, tl.int64)
    pointers = start + rows[:, None] * stride_row + columns[None, :]
    return tl.load(pointers, mask=is_row[:, None] & (columns < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _pair(v: tl.constexpr, w: tl.constexpr, V: tl.constexpr):
    """Index of the positives of views v < w, in lexical order."""
    return v * (2 * V - v - 1) // 2 + w - v - 1


@triton.jit
def _inv_norm(x):
    return 1.0 / tl.maximum(tl.sqrt_rn(tl.sum(x * x, 1)), 1e-12)


@triton.jit(do_not_specialize=["num_samples"])
def normalize_rows(
    z, u, inv_norm, positives, inv_temperature, num_samples, stride_view, stride_row,
    V: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """u = z / |z| sqrt(t log2 e) in fp16: the product of two rows is directly the exponent of 2."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = rows < num_samples
    columns = tl.arange(0, WIDTH)
    scale = tl.sqrt_rn(tl.load(inv_temperature).to(tl.float32) * LOG2_E)
    for v in tl.static_range(V):
        x = _load(z, v, rows, columns, is_row, stride_view, stride_row, D)
        inv = _inv_norm(x)
        tl.store(inv_norm + v * num_samples + rows, inv, mask=is_row)
        pointers = u + (v * num_samples.to(tl.int64) + rows[:, None]) * PADDED + columns[None, :]
        scaled = (x * (inv * scale)[:, None]).to(tl.float16)
        tl.store(pointers, scaled, mask=is_row[:, None] & (columns < PADDED)[None, :])
        for w in tl.static_range(v + 1, V):
            y = _load(z, w, rows, columns, is_row, stride_view, stride_row, D)
            similarity = tl.sum(x * y, 1) * inv * _inv_norm(y)
            tl.store(positives + _pair(v, w, V) * num_samples + rows, similarity, mask=is_row)


@triton.jit(do_not_specialize=["num_samples"])
def finish_rows(
    z, inv_norm, pulls, pull_scale, positive_grads, dz, dots, num_samples,
    stride_view, stride_row, pulls_stride_view, pulls_stride_row,
    V: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dz = (du - <u, du> u) / |z|, du = pull_scale pulls + the positives' part; dots = <u, pulls>."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = rows < num_samples
    columns = tl.arange(0, WIDTH)
    for v in tl.static_range(V):
        inv = tl.load(inv_norm + v * num_samples + rows, mask=is_row, other=0.0)
        u = _load(z, v, rows, columns, is_row, stride_view, stride_row, D) * inv[:, None]
        pull = _load(pulls, v, rows, columns, is_row, pulls_stride_view, pulls_stride_row, D)
        tl.store(dots + v * num_samples + rows, tl.sum(u * pull, 1), mask=is_row)
        du = pull * tl.load(pull_scale)
        for w in tl.static_range(V):
            if w != v:
                pair = _pair(v, w, V) if v < w else _pair(w, v, V)
                grad = tl.load(positive_grads + pair * num_samples + rows, mask=is_row, other=0.0)
                other_inv = tl.load(inv_norm + w * num_samples + rows, mask=is_row, other=0.0)
                other = _load(z, w, rows, columns, is_row, stride_view, stride_row, D)
                du += other * (grad * other_inv)[:, None]
        radial = tl.sum(u * du, 1)
        out = (du - radial[:, None] * u) * inv[:, None]
        pointers = dz + (v * num_samples.to(tl.int64) + rows[:, None]) * D + columns[None, :]
        tl.store(pointers, out.to(dz.dtype.element_ty), mask=is_row[:, None] & (columns < D)[None, :])
