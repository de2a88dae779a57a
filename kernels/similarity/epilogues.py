# type: ignore  (Triton's language is no Python to a type checker)
"""Epilogues of the fused kernels: values f and slopes f' of a tile of exponents, in as few instructions as possible.

# x = l log2(e): the exponent of e^l = 2^x; a tile is [R, C] pairs of R rows and C columns
# INTERP: use the same steps in tl.math, since Triton's interpreter does not support inline PTX

Slopes become fp16 operands of the product with u, so each kind has a power-of-two scale that keeps them within fp16's
normal numbers (2^-14 .. 2^16); the kernels undo it in fp32:

| kind       | scale of the slopes                                                                |
|------------|------------------------------------------------------------------------------------|
| `exp`      | 1, or with a wide range 2^(TOP - ceil(largest x of the row so far))                 |
| `softplus` | 2^TOP: sigmoids down to 2^-29 are normal numbers, those below 2^-40 vanish          |
| `square`   | of f' / 2 = l: 2^TOP over the least power of two above t + |b|, which bounds |l|    |
| weighted   | 2^(TOP - n), 2^n above the largest weighted slope of the row so far, for every kind  |

A tile uses its slopes immediately as the operand of its pulls, so its scale is updated per row as in flash attention. A
strip of slopes is kept in memory and scaled there, by row and by column (strips.py).
"""

import triton
import triton.language as tl

EXP: tl.constexpr = tl.constexpr(0)
SOFTPLUS: tl.constexpr = tl.constexpr(1)
SQUARE: tl.constexpr = tl.constexpr(2)
INTERPRETED = triton.knobs.runtime.interpret
KINDS = {"exp": EXP.value, "softplus": SOFTPLUS.value, "square": SQUARE.value}

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
TOP: tl.constexpr = tl.constexpr(15)  # the largest slope of a scaled row is at most 2^TOP; fp16 ends at 2^16
LEAST_TOP: tl.constexpr = tl.constexpr(-100)  # weighted slopes below 2^LEAST_TOP are not scaled further up
FOLDED: tl.constexpr = tl.constexpr(4)  # number of columns after `fold`


@triton.jit
def ex2(x, INTERP: tl.constexpr):
    """2^x; rel. error 2^-22; 0 below 2^-126."""
    if INTERP:
        return tl.math.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def ex2_of_minus_abs(x, INTERP: tl.constexpr):
    """2^-|x|: sign and magnitude are modifiers of one instruction, which ptxas finds only within one piece of PTX."""
    if INTERP:
        return tl.math.exp2(-tl.abs(x))
    return tl.inline_asm_elementwise(
        "{.reg .f32 y; abs.f32 y, $1; neg.f32 y, y; ex2.approx.ftz.f32 $0, y;}",
        "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def lg2(x, INTERP: tl.constexpr):
    """log2(x); error 2^-22, absolute between 1/2 and 2 and relative beyond."""
    if INTERP:
        return tl.math.log2(x)
    return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def rcp(x, INTERP: tl.constexpr):
    """1 / x; rel. error 2^-23."""
    if INTERP:
        return 1.0 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def pow2(n):
    """2^n for integers n, exact; 0 below 2^-126."""
    exponent = tl.minimum(tl.maximum(n, -127.0), 127.0) + 127.0
    return (exponent.to(tl.int32) << 23).to(tl.float32, bitcast=True)


@triton.jit
def fold(x):
    """Partial sum along a row, [R, C] -> [R, FOLDED]: only columns held by the same thread are added."""
    groups: tl.constexpr = x.shape[1] // (2 * FOLDED)
    return tl.sum(tl.sum(tl.reshape(x, (x.shape[0], groups, FOLDED, 2)), 3), 1)


@triton.jit
def _multiply(a, b):
    return a * b


@triton.jit
def softplus(x, INTERP: tl.constexpr):
    """Values log2(1 + 2^x), folded along the rows [R, FOLDED], and slopes sigmoid(l) 2^TOP [R, C].

    With e = 2^-|x| nothing overflows: value = max(x, 0) + log2(1 + e), slope = 1 / (1 + e), times e where x < 0.
    Neighbours share a reciprocal, 1/a = b / (ab), and the columns held by a thread share the logarithm of their
    product. The absolute error of a value is 6e-8, as 1 + e is rounded: pairs with l below -16 add nothing to the sum.
    Slopes have full precision. (sum max(x, 0) = sum |x| / 2 + sum x / 2 with the last sum in closed form would save
    an instruction, but lose precision by cancellation if most logits are far below zero, as with a bias of -10.)
    """
    R: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[1]
    e = ex2_of_minus_abs(x, INTERP)
    a, b = tl.split(tl.reshape(1.0 + e, (R, C // 2, 2)))
    product = a * b
    inverse = rcp(product, INTERP) * 32768.0
    slopes = tl.reshape(tl.join(inverse * b, inverse * a), (R, C))
    slopes = tl.where(x >= 0, slopes, e * slopes)
    if INTERP:  # its reduction with a function of ours is slow
        logs = fold(tl.math.log2(1.0 + e))
    else:
        products = tl.reshape(product, (R, C // (2 * FOLDED), FOLDED))
        logs = lg2(tl.reduce(products, 1, _multiply), INTERP)
    return fold(tl.maximum(x, 0.0)) + logs, slopes


@triton.jit
def softplus_each(x, INTERP: tl.constexpr):
    """Like `softplus`, but with the value of each pair, [R, C]; their relative error is at most 1.5e-5.

    Below e = 1/64, log(1 + e) is computed by its series, with an error of e^3 / 4 < 1e-6. The errors of 1 + e, 2^-24,
    and of its logarithm, 2^-22, are absolute, and with a bias of -10 they would be a thousandth of the value.
    """
    e = ex2_of_minus_abs(x, INTERP)
    inverse = rcp(1.0 + e, INTERP) * 32768.0
    series = e * LOG2_E * (1.0 - e * (0.5 - e * (1.0 / 3)))
    logs = tl.where(e < 1.0 / 64, series, lg2(1.0 + e, INTERP))
    return tl.maximum(x, 0.0) + logs, tl.where(x >= 0, inverse, e * inverse)


@triton.jit
def exponent_above(x):
    """The smallest integer n with x < 2^n, from the bits of normal numbers x > 0."""
    return ((x.to(tl.int32, bitcast=True) >> 23) - 126).to(tl.float32)


@triton.jit
def square_scale(inv_temperature, bias):
    """The scale of l in `square`: |l| times the scale is at most 2^TOP."""
    bound = (inv_temperature + tl.abs(bias)) * 1.01
    return pow2(-(exponent_above(tl.maximum(bound, 1e-30)) - TOP))


@triton.jit
def rising_top(top, largest):
    """The new exponent of a row's scale: `largest` is below 2 to this power, and the exponent never decreases."""
    return tl.maximum(top, exponent_above(tl.maximum(largest, 1e-30)))
