"""Float32 SIMD lanes for jitted code: four for one RGB pixel and a spare lane, eight for contiguous numbers.

LLVM vectorises long loops over contiguous numbers by itself. It does not vectorise a loop whose body works on the
three channels of one pixel, nor the remainder of a loop after whole blocks of 32, which is most of a small image's row.
In these cases, the functions here make the lanes explicit. They do not check indices.
"""

from typing import Any

from llvmlite import ir
from numba import extending, types
from numba.core import cgutils
from numba.extending import models, register_model

intrinsic: Any = extending.intrinsic  # called with one argument less than defined: numba passes the first

_CONTRACT = ("contract",)  # a product and a sum may become one fused instruction


class _FloatLanes(types.Type):
    def __init__(self, num: int) -> None:
        super().__init__(f"FloatLanes({num})")
        self.vector = ir.VectorType(ir.FloatType(), num)


_pixel, _eight = _FloatLanes(4), _FloatLanes(8)


@register_model(_FloatLanes)
class _FloatLanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: Any) -> None:
        super().__init__(manager, numba_type, numba_type.vector)


def _load(lanes: _FloatLanes, array: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_address(context, builder, signature, args, lanes.vector), align=4)

    return lanes(array, types.intp), generate


@intrinsic
def load(_context: Any, array: Any, start: Any) -> Any:
    """array[start : start + 4] of a contiguous float32 array."""
    return _load(_pixel, array)


@intrinsic
def load_eight(_context: Any, array: Any, start: Any) -> Any:
    """array[start : start + 8] of a contiguous float32 array."""
    return _load(_eight, array)


@intrinsic
def load_eight_levels(_context: Any, array: Any, start: Any) -> Any:
    """array[start : start + 8] of a contiguous uint8 array, as floats."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = _address(context, builder, signature, args, ir.VectorType(ir.IntType(8), 8))
        return builder.uitofp(builder.load(address, align=1), _eight.vector)

    return _eight(array, types.intp), generate


def _load_same(lanes: _FloatLanes, array: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        number = builder.load(_address(context, builder, signature, args, ir.FloatType()))
        undefined, places = ir.Constant(lanes.vector, ir.Undefined), ir.VectorType(ir.IntType(32), lanes.vector.count)
        one_lane = builder.insert_element(undefined, number, ir.Constant(ir.IntType(32), 0))
        return builder.shuffle_vector(one_lane, one_lane, ir.Constant(places, None))

    return lanes(array, types.intp), generate


@intrinsic
def load_same(_context: Any, array: Any, index: Any) -> Any:
    """array[index] of a contiguous float32 array, in all four lanes."""
    return _load_same(_pixel, array)


@intrinsic
def load_same_eight(_context: Any, array: Any, index: Any) -> Any:
    """array[index] of a contiguous float32 array, in all eight lanes."""
    return _load_same(_eight, array)


@intrinsic
def multiply(_context: Any, a: Any, b: Any) -> Any:
    """a * b. numba allows LLVM to fuse any product and sum into one instruction, including this one and an `add`."""
    return a(a, b), lambda _, builder, __, args: builder.fmul(*args)


@intrinsic
def multiply_round(_context: Any, a: Any, b: Any) -> Any:
    """a * b, rounded: never fused with a sum. Used as c of `multiply_add`, it determines which product is fused."""

    def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
        kind = ir.FunctionType(a.vector, [a.vector])
        fence = cgutils.get_or_insert_function(builder.module, kind, f"llvm.arithmetic.fence.v{a.vector.count}f32")
        return builder.call(fence, [builder.fmul(*args)])

    return a(a, b), generate


@intrinsic
def add(_context: Any, a: Any, b: Any) -> Any:
    """a + b."""
    return a(a, b), lambda _, builder, __, args: builder.fadd(*args)


@intrinsic
def multiply_add(_context: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c."""

    def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
        return builder.fadd(builder.fmul(args[0], args[1], flags=_CONTRACT), args[2], flags=_CONTRACT)

    return a(a, b, c), generate


@intrinsic
def store(_context: Any, lanes: Any, array: Any, start: Any) -> Any:
    """Write to array[start...] of a contiguous float32 array."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[0], _address(context, builder, signature, args, lanes.vector, first=1), align=4)
        return context.get_dummy_value()

    return types.void(lanes, array, types.intp), generate


@intrinsic
def store_levels(_context: Any, lanes: Any, array: Any, start: Any) -> Any:
    """Round half to even and write uint8 to array[start...]; the numbers must lie in [0, 255]."""
    floats, num = lanes.vector, lanes.vector.count
    ints, levels = (ir.VectorType(ir.IntType(bits), num) for bits in (32, 8))

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rint = cgutils.get_or_insert_function(builder.module, ir.FunctionType(floats, [floats]), f"llvm.rint.v{num}f32")
        rounded = builder.trunc(builder.fptosi(builder.call(rint, [args[0]]), ints), levels)
        builder.store(rounded, _address(context, builder, signature, args, levels, first=1), align=1)
        return context.get_dummy_value()

    return types.void(lanes, array, types.intp), generate


def _address(context: Any, builder: Any, signature: Any, args: Any, kind: Any, first: int = 0) -> Any:
    """Address of array[index], as a pointer to `kind`; array and index are the arguments from `first` on."""
    array = context.make_array(signature.args[first])(context, builder, args[first])
    return builder.bitcast(builder.gep(array.data, [args[first + 1]]), kind.as_pointer())
