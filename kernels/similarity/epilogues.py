# type: ignore  (Triton's language is no Python to a type checker)
"""What a fused kernel makes of a tile of exponents: values f and slopes f', as few instructions as they take.

# x = l log2(e): the exponent of e^l = 2^x; a tile is [R, C] pairs of R rows and C columns
# INTERP: Triton's interpreter knows no inline PTX; the same steps in tl.math then

Slopes become fp16 operands of the product with u, so each kind has a power-of-two scale that keeps them among fp16's
normal numbers (2^-14 .. 2^16); the kernels undo it in fp32:

| kind       | scale of the slopes                                                                |
|------------|------------------------------------------------------------------------------------|
| `exp`      | 1, or with a wide range 2^(TOP - ceil(largest x of the row so far))                 |
| `softplus` | 2^TOP: sigmoids down to 2^-29 are normal numbers, those below 2^-40 vanish          |
| `square`   | of f' / 2 = l: 2^TOP over the least power of two above t + |b|, which bounds |l|    |
| weighted   | 2^(TOP - n), 2^n above the largest weighted slope of the row so far, for every kind  |

A tile writes its pulls' operand at once, so its scale follows the rows as in flash attention; a strip of slopes that
stays in memory is scaled there, by row and by column (strips.py).
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
FOLDED: tl.constexpr = tl.constexpr(4)  # columns that `fold` leaves


@triton.jit
def ex2(x, INTERP: tl.constexpr):
    """2^x; rel. error 2^-22; 0 below 2^-126."""
    if INTERP:
        return tl.math.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def ex2_of_minus_abs(x, INTERP: tl.constexpr):
    """2^-|x|: sign and magnitude are modifiers of the one instruction, which ptxas sees in one piece of PTX only."""
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
    """2^n of whole numbers n, exactly; 0 below 2^-126."""
    exponent = tl.minimum(tl.maximum(n, -127.0), 127.0) + 127.0
    return (exponent.to(tl.int32) << 23).to(tl.float32, bitcast=True)


@triton.jit
def fold(x):
    """Part of the sum along a row, [R, C] -> [R, FOLDED]: only columns that the same thread holds are added."""
    groups: tl.constexpr = x.shape[1] // (2 * FOLDED)
    return tl.sum(tl.sum(tl.reshape(x, (x.shape[0], groups, FOLDED, 2)), 3), 1)


@triton.jit
def _multiply(a, b):
    return a * b


@triton.jit
def softplus(x, INTERP: tl.constexpr):
    """Values log2(1 + 2^x), folded along the rows [R, FOLDED], and slopes sigmoid(l) 2^TOP [R, C].

    With e = 2^-|x| nothing overflows: value = max(x, 0) + log2(1 + e), slope = 1 / (1 + e), times e where x < 0.
    Neighbours share a reciprocal, 1/a = b / (ab), and the columns that a thread holds share a logarithm, of their
    product. A value is right to 6e-8 absolute, as 1 + e is rounded: pairs with l below -16 add nothing to the sum.
    Slopes have all their digits. (sum max(x, 0) = sum |x| / 2 + sum x / 2 with the last sum in closed form would save
    an instruction, and cost the digits of what is left where most logits are far below zero, as with a bias of -10.)
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
    """As `softplus`, with the values of each pair, [R, C]; their relative error is at most 1.5e-5.

    Below e = 1/64 log(1 + e) is its series, right to e^3 / 4 < 1e-6: the errors of 1 + e, 2^-24, and of its logarithm,
    2^-22, are absolute, and with a bias of -10 they would be a thousandth of the value.
    """
    e = ex2_of_minus_abs(x, INTERP)
    inverse = rcp(1.0 + e, INTERP) * 32768.0
    series = e * LOG2_E * (1.0 - e * (0.5 - e * (1.0 / 3)))
    logs = tl.where(e < 1.0 / 64, series, lg2(1.0 + e, INTERP))
    return tl.maximum(x, 0.0) + logs, tl.where(x >= 0, inverse, e * inverse)


@triton.jit
def exponent_above(x):
    """The least whole number n with x < 2^n, from the bits of normal numbers x > 0."""
    return ((x.to(tl.int32, bitcast=True) >> 23) - 126).to(tl.float32)


@triton.jit
def square_scale(inv_temperature, bias):
    """The scale of l in `square`: |l| times it is at most 2^TOP."""
    bound = (inv_temperature + tl.abs(bias)) * 1.01
    return pow2(-(exponent_above(tl.maximum(bound, 1e-30)) - TOP))


@triton.jit
def rising_top(top, largest):
    """The new exponent of a row's scale, never falling: `largest` is below 2 to it."""
    return tl.maximum(top, exponent_above(tl.maximum(largest, 1e-30)))
