"""Vectors of 16-bit numbers in compiled code: load, multiply, add, transpose and store sixteen numbers at a time.

numba has no vectors, and LLVM finds none of these instructions in loops over numbers: it multiplies 16-bit numbers as
32-bit ones. These functions are LLVM's vector operations, without instructions of one kind of CPU. They check no index.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

LANES = 16  # numbers of a vector: 256 bits
TILE = 8  # the side of the squares that are transposed in registers

# YCbCr to RGB (ITU-T T.871), in units of 2**-14.
RED_OF_CR = 22970
GREEN_OF_CB = -5638
GREEN_OF_CR = -11700
BLUE_OF_CB = 29032


class Vector(types.Type):
    """Numba's type of LANES unsigned 16-bit numbers."""

    def __init__(self) -> None:
        super().__init__(name=f"Vector({LANES})")


class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: types.Type) -> None:
        super().__init__(manager, numba_type, _U16)


_U16 = ir.VectorType(ir.IntType(16), LANES)
_U32 = ir.VectorType(ir.IntType(32), LANES)
_U8 = ir.VectorType(ir.IntType(8), LANES)
_VECTOR = Vector()
register_model(Vector)(_VectorModel)


def _constant(vector_type: ir.VectorType, value: int) -> ir.Constant:
    return ir.Constant(vector_type, [value & (1 << vector_type.element.width) - 1] * vector_type.count)


def _shuffle(builder: Any, a: Any, b: Any, positions: Sequence[int]) -> Any:
    """Collect numbers of two vectors by their positions in both."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), len(positions)), list(positions)))


def _pointer(context: Any, builder: Any, array_type: types.Array, array: Any, at: Any, vector_type: Any) -> Any:
    """The address of the element `at` of an array, counted as if the array had one dimension."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at]), vector_type.as_pointer())


def _load(typing_context: Any, array: types.Array, at: types.Type) -> tuple[Any, Callable[..., Any]]:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, array, arguments[0], arguments[1], _U16)
        return builder.load(pointer, align=2)

    return _VECTOR(array, types.intp), generate


def _load_bytes(typing_context: Any, array: types.Array, at: types.Type) -> tuple[Any, Callable[..., Any]]:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, array, arguments[0], arguments[1], _U8)
        values = builder.load(pointer, align=1)
        return builder.shl(builder.zext(values, _U16), _constant(_U16, 8))

    return _VECTOR(array, types.intp), generate


def _store(
    typing_context: Any, vector: types.Type, array: types.Array, at: types.Type
) -> tuple[Any, Callable[..., Any]]:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, array, arguments[1], arguments[2], _U16)
        builder.store(arguments[0], pointer, align=2)
        return context.get_dummy_value()

    return types.void(_VECTOR, array, types.intp), generate


def _fill(typing_context: Any, value: types.Type) -> tuple[Any, Callable[..., Any]]:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _repeat(builder, arguments[0])

    return _VECTOR(types.uint16), generate


def _repeat(builder: Any, value: Any) -> Any:
    undefined = ir.Constant(_U16, ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(ir.IntType(32), 0))
    return _shuffle(builder, first, undefined, [0] * LANES)


def _multiply_add(
    typing_context: Any, total: types.Type, vector: types.Type, weight: types.Type
) -> tuple[Any, Callable[..., Any]]:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        total, vector, weight = arguments
        wide = builder.mul(builder.zext(vector, _U32), builder.zext(_repeat(builder, weight), _U32))
        return builder.add(total, builder.trunc(builder.lshr(wide, _constant(_U32, 16)), _U16))

    return _VECTOR(_VECTOR, _VECTOR, types.uint16), generate


def _store_rgb(
    typing_context: Any, y: types.Type, cb: types.Type, cr: types.Type, out: types.Array, at: types.Type
) -> tuple[Any, Callable[..., Any]]:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def scaled(chroma: Any, factor: int) -> Any:
            """A signed product in units of 1/64."""
            wide = builder.mul(builder.sext(chroma, _U32), _constant(_U32, factor))
            return builder.trunc(builder.ashr(wide, _constant(_U32, 16)), _U16)

        def to_bytes(channel: Any) -> Any:
            level = builder.ashr(channel, _constant(_U16, 6))
            for limit, beyond in ((0, "<"), (255, ">")):
                is_beyond = builder.icmp_signed(beyond, level, _constant(_U16, limit))
                level = builder.select(is_beyond, _constant(_U16, limit), level)
            return builder.trunc(level, _U8)

        y, cb, cr, out, at = arguments
        cb, cr = (builder.xor(chroma, _constant(_U16, 0x8000)) for chroma in (cb, cr))  # minus 128, signed
        # Half a level, to round, and 1/64, because up to three numbers are rounded down.
        luma = builder.add(builder.lshr(y, _constant(_U16, 2)), _constant(_U16, 33))
        red = builder.add(luma, scaled(cr, RED_OF_CR))
        green = builder.add(builder.add(luma, scaled(cb, GREEN_OF_CB)), scaled(cr, GREEN_OF_CR))
        blue = builder.add(luma, scaled(cb, BLUE_OF_CB))
        red, green, blue = (to_bytes(channel) for channel in (red, green, blue))
        both = range(2 * LANES)
        pixels = [position for x in range(LANES) for position in (x, LANES + x, 2 * LANES + x)]
        rgb = _shuffle(builder, _shuffle(builder, red, green, both), _shuffle(builder, blue, blue, both), pixels)
        builder.store(rgb, _pointer(context, builder, signature.args[3], out, at, rgb.type), align=1)
        return context.get_dummy_value()

    return types.void(_VECTOR, _VECTOR, _VECTOR, out, types.intp), generate


def _transpose(
    typing_context: Any,
    source: types.Array,
    at: types.Type,
    step: types.Type,
    out: types.Array,
    out_at: types.Type,
    out_step: types.Type,
) -> tuple[Any, Callable[..., Any]]:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        row_type = ir.VectorType(ir.IntType(16), TILE)

        def row_pointers(position: int) -> list[Any]:
            array, at, step = arguments[position : position + 3]
            starts = [builder.add(at, builder.mul(step, context.get_constant(types.intp, i))) for i in range(TILE)]
            return [_pointer(context, builder, signature.args[position], array, start, row_type) for start in starts]

        rows = [builder.load(pointer, align=2) for pointer in row_pointers(0)]
        # Three times, rows i and i + TILE / 2 become rows 2 i and 2 i + 1: their first halves, alternating, and their
        # second halves.
        half = TILE // 2
        halves = [[p for k in range(first, first + half) for p in (k, TILE + k)] for first in (0, half)]
        for _ in range(3):
            pairs = zip(rows[:half], rows[half:])
            rows = [_shuffle(builder, a, b, positions) for a, b in pairs for positions in halves]
        for row, pointer in zip(rows, row_pointers(3)):
            builder.store(row, pointer, align=2)
        return context.get_dummy_value()

    return types.void(source, types.intp, types.intp, out, types.intp, types.intp), generate


# For compiled code; positions are counted as if an array had one dimension:

# load(array, at): the numbers from a position of a uint16 array on.
load = cast("Callable[[np.ndarray, int], Vector]", intrinsic(_load))
# load_bytes(array, at): the same of a uint8 array, times 256.
load_bytes = cast("Callable[[np.ndarray, int], Vector]", intrinsic(_load_bytes))
# store(vector, array, at)
store = cast("Callable[[Vector, np.ndarray, int], None]", intrinsic(_store))
# fill(value): LANES times the same uint16 number.
fill = cast("Callable[[np.uint16], Vector]", intrinsic(_fill))
# multiply_add(total, vector, weight): the total plus the products with a uint16 number, divided by 65536, rounded down.
multiply_add = cast("Callable[[Vector, Vector, np.uint16], Vector]", intrinsic(_multiply_add))
# store_rgb(y, cb, cr, out, at): LANES pixels, from YCbCr in units of 1/256 to RGB in 3 LANES bytes of a uint8 array.
store_rgb = cast("Callable[[Vector, Vector, Vector, np.ndarray, int], None]", intrinsic(_store_rgb))
# transpose(source, at, step, out, out_at, out_step): a square of TILE x TILE numbers of uint16 arrays. Its rows start
# at `at` and are `step` numbers apart.
transpose = cast("Callable[[np.ndarray, int, int, np.ndarray, int, int], None]", intrinsic(_transpose))
