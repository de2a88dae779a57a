"""Four float32 lanes for jitted code: one RGB pixel and a spare lane.

LLVM vectorises loops over contiguous numbers by itself. What it leaves scalar is a loop whose body works on the three
channels of one pixel: there these functions say what the lanes are. None of them checks an index.
"""

from typing import Any

from llvmlite import ir
from numba import extending, types
from numba.core import cgutils
from numba.extending import models, register_model

intrinsic: Any = extending.intrinsic  # called with fewer arguments than defined: the first is numba's own

_LANES = 4
_FLOATS = ir.VectorType(ir.FloatType(), _LANES)
_INTS = ir.VectorType(ir.IntType(32), _LANES)
_LEVELS = ir.VectorType(ir.IntType(8), _LANES)
_CONTRACT = ("contract",)  # a product and a sum may become one fused instruction


class _FloatLanes(types.Type):
    def __init__(self) -> None:
        super().__init__("FloatLanes")


_float_lanes = _FloatLanes()


@register_model(_FloatLanes)
class _FloatLanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: types.Type) -> None:
        super().__init__(manager, numba_type, _FLOATS)


@intrinsic
def load(_context: Any, array: Any, start: Any) -> Any:
    """array[start : start + 4] of a contiguous float32 array."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_address(context, builder, signature, args, _FLOATS), align=4)

    return _float_lanes(array, types.intp), generate


@intrinsic
def load_same(_context: Any, array: Any, index: Any) -> Any:
    """array[index] of a contiguous float32 array, in all lanes."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        number = builder.load(_address(context, builder, signature, args, ir.FloatType()))
        one_lane = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), number, ir.Constant(ir.IntType(32), 0))
        return builder.shuffle_vector(one_lane, one_lane, ir.Constant(_INTS, [0] * _LANES))

    return _float_lanes(array, types.intp), generate


@intrinsic
def multiply(_context: Any, a: Any, b: Any) -> Any:
    """a * b."""
    return _float_lanes(a, b), lambda _, builder, __, args: builder.fmul(*args)


@intrinsic
def add(_context: Any, a: Any, b: Any) -> Any:
    """a + b."""
    return _float_lanes(a, b), lambda _, builder, __, args: builder.fadd(*args)


@intrinsic
def multiply_add(_context: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c."""

    def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
        return builder.fadd(builder.fmul(args[0], args[1], flags=_CONTRACT), args[2], flags=_CONTRACT)

    return _float_lanes(a, b, c), generate


@intrinsic
def store_levels(_context: Any, lanes: Any, array: Any, start: Any) -> Any:
    """Round half to even and write uint8 to array[start : start + 4]; the numbers must lie in [0, 255]."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rint = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_FLOATS, [_FLOATS]), "llvm.rint.v4f32")
        levels = builder.trunc(builder.fptosi(builder.call(rint, [args[0]]), _INTS), _LEVELS)
        address = _address(context, builder, signature, args, _LEVELS, first=1)
        builder.store(levels, address, align=1)
        return context.get_dummy_value()

    return types.void(lanes, array, types.intp), generate


def _address(context: Any, builder: Any, signature: Any, args: Any, kind: Any, first: int = 0) -> Any:
    """The address of (array, index), which are the arguments from `first` on, as a pointer to `kind`."""
    array = context.make_array(signature.args[first])(context, builder, args[first])
    return builder.bitcast(builder.gep(array.data, [args[first + 1]]), kind.as_pointer())
