"""What instructions of PTX compute of one value per thread, with the bits of a GPU, in NumPy."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["DTYPES", "OPERATIONS", "Fault", "Operation", "width_of"]

Array = npt.NDArray[Any]


class Fault(Exception):
    """What a GPU does not do, or not reliably, and what this emulator does not know."""


class Operation(NamedTuple):
    """An instruction that computes a value of its operands: all of them arrays (threads,)."""

    function: Callable[..., Array]
    result: str
    operands: tuple[str, ...]


DTYPES: dict[str, Any] = {"pred": np.bool_, "f32": np.float32}
DTYPES |= {f"s{width}": f"i{width // 8}" for width in (8, 16, 32, 64)}
DTYPES |= {f"{kind}{width}": f"u{width // 8}" for kind in "bu" for width in (8, 16, 32, 64)}
DTYPES |= {"f16": "u2", "bf16": "u2", "f16x2": "u4", "bf16x2": "u4"}
DTYPES = {name: np.dtype(dtype) for name, dtype in DTYPES.items()}


def width_of(type: str) -> int:
    return 8 * DTYPES[type].itemsize


def canonical(function: Callable[..., Array]) -> Callable[..., Array]:
    """Results that are not numbers are the one NaN of GPUs."""

    def computed(*operands: Array) -> Array:
        x = function(*operands)
        return np.where(np.isnan(x), np.uint32(0x7FFFFFFF), x.view(np.uint32)).view(np.float32)

    return computed


def fused(x: Array, y: Array, z: Array) -> Array:
    if not ((abs(x) == 1).all() or (abs(y) == 1).all()):
        raise Fault("fma of other products than by 1 or -1 rounds once, and NumPy twice")
    return x * y + z


def maximum(x: Array, y: Array) -> Array:
    """0 is above -0."""
    same = (x.view(np.uint32) & y.view(np.uint32)).view(np.float32)
    return np.where(x == y, same, np.fmax(x, y))


def minimum(x: Array, y: Array) -> Array:
    return -maximum(-x, -y)


FLOATS: dict[str, tuple[Callable[..., Array], int]] = {  # and how many operands they have
    "add.rn": (np.add, 2),
    "sub.rn": (np.subtract, 2),
    "mul.rn": (np.multiply, 2),
    "div.rn": (np.divide, 2),
    "sqrt.rn": (np.sqrt, 1),
    "fma.rn": (fused, 3),
    "max": (maximum, 2),
    "min": (minimum, 2),
    "abs": (np.abs, 1),
    "neg": (np.negative, 1),
}


def shift_of(x: Array, count: Array) -> Array:
    if (count >= 8 * x.dtype.itemsize).any():
        raise Fault(f"shifts {8 * x.dtype.itemsize} bits by {count.max()}")
    return count.astype(x.dtype)


def field(x: Array, begin: Array, length: Array) -> Array:
    """Bits of x, with their sign where x has one."""
    if not ((length > 0) & (begin + length <= 32)).all():
        raise Fault("bfe of no bits, or of bits outside the number")
    return (x << (32 - begin - length).astype(x.dtype)) >> (32 - length).astype(x.dtype)


def ones(x: Array) -> Array:
    octets = np.ascontiguousarray(x).view(np.uint8).reshape(len(x), -1)
    return np.unpackbits(octets, axis=1).sum(axis=1).astype(np.uint32)


def left(low: Array, high: Array, count: Array) -> Array:
    """The upper word of a pair that is shifted to the left."""
    pair = high.astype(np.uint64) << np.uint64(32) | low
    return (pair << (count & 31).astype(np.uint64) >> np.uint64(32)).astype(np.uint32)


def right(low: Array, high: Array, count: Array) -> Array:
    pair = high.astype(np.uint64) << np.uint64(32) | low
    return (pair >> (count & 31).astype(np.uint64)).astype(np.uint32)


def divided(function: Callable[..., Array]) -> Callable[..., Array]:
    def computed(x: Array, y: Array) -> Array:
        if not y.all():
            raise Fault("divides by zero")
        return function(x, y)

    return computed


INTEGERS: dict[str, tuple[Callable[..., Array], int]] = {
    "add": (np.add, 2),
    "sub": (np.subtract, 2),
    "mul.lo": (np.multiply, 2),
    "mad.lo": (lambda x, y, z: x * y + z, 3),
    "min": (np.minimum, 2),
    "max": (np.maximum, 2),
    "neg": (np.negative, 1),
    "and": (np.bitwise_and, 2),
    "or": (np.bitwise_or, 2),
    "xor": (np.bitwise_xor, 2),
    "not": (np.invert, 1),
}

COMPARISONS: dict[str, Callable[..., Array]] = {
    "eq": np.equal,
    "ne": lambda x, y: (x < y) | (x > y),  # unless one is not a number
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


def unordered(function: Callable[..., Array]) -> Callable[..., Array]:
    return lambda x, y: function(x, y) | np.isnan(x) | np.isnan(y)


def of_floats() -> dict[str, Operation]:
    found = {
        f"{name}.f32": Operation(canonical(function), "f32", ("f32",) * count)
        for name, (function, count) in FLOATS.items()
    }
    for name, function in COMPARISONS.items():
        found[f"setp.{name}.f32"] = Operation(function, "pred", ("f32", "f32"))
        found[f"setp.{name}u.f32"] = Operation(unordered(function), "pred", ("f32", "f32"))
    nan = unordered(lambda x, y: np.zeros(len(x), np.bool_))
    found["setp.nan.f32"] = Operation(nan, "pred", ("f32", "f32"))
    found["setp.num.f32"] = Operation(lambda x, y: ~nan(x, y), "pred", ("f32", "f32"))
    return found


def of_integers(type: str) -> dict[str, Operation]:
    width, signed = width_of(type), type[0] == "s"
    found = {
        f"{name}.{type}": Operation(function, type, (type,) * count)
        for name, (function, count) in INTEGERS.items()
    }
    for name, function in COMPARISONS.items():
        found[f"setp.{name}.{type}"] = Operation(function, "pred", (type, type))
    shifts = {"shl": lambda x, n: x << shift_of(x, n), "shr": lambda x, n: x >> shift_of(x, n)}
    for name, function in shifts.items():
        found[f"{name}.{type}"] = Operation(function, type, (type, "u32"))
    if not signed:
        found[f"div.{type}"] = Operation(divided(np.floor_divide), type, (type, type))
        found[f"rem.{type}"] = Operation(divided(np.remainder), type, (type, type))
    if width == 64:
        return found
    wide = f"{type[0]}{2 * width}"
    to = DTYPES[wide]
    product = Operation(lambda x, y: x.astype(to) * y.astype(to), wide, (type, type))
    sum_of = Operation(lambda x, y, z: x.astype(to) * y.astype(to) + z, wide, (type, type, wide))
    high = Operation(
        lambda x, y: (x.astype(to) * y.astype(to) >> to.type(width)).astype(x.dtype),
        type,
        (type, type),
    )
    found |= {f"mul.wide.{type}": product, f"mad.wide.{type}": sum_of, f"mul.hi.{type}": high}
    if width == 32:
        found[f"bfe.{type}"] = Operation(field, type, (type, "u32", "u32"))
    return found


def bfloat16(x: Array) -> Array:
    """To the nearest, ties to even."""
    wide = x.view(np.uint32).astype(np.uint64)
    rounded = (wide + 0x7FFF + (wide >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def float16(x: Array) -> Array:
    return np.where(np.isnan(x), 0x7FFF, x.astype(np.float16).view(np.uint16)).astype(np.uint16)


def both(rounded: Callable[[Array], Array]) -> Callable[..., Array]:
    def packed(high: Array, low: Array) -> Array:
        return rounded(high).astype(np.uint32) << np.uint32(16) | rounded(low)

    return packed


def truncated(least: int, most: int, dtype: Any) -> Callable[[Array], Array]:
    """Saturating, and NaN becomes zero."""

    def integer(x: Array) -> Array:
        return np.nan_to_num(x.astype(np.float64)).clip(least, most).astype(np.int64).astype(dtype)

    return integer


def conversions() -> dict[str, Operation]:
    found = {
        "cvt.rn.bf16x2.f32": Operation(both(bfloat16), "bf16x2", ("f32", "f32")),
        "cvt.rn.f16x2.f32": Operation(both(float16), "f16x2", ("f32", "f32")),
        "cvt.rn.bf16.f32": Operation(bfloat16, "bf16", ("f32",)),
        "cvt.rn.f16.f32": Operation(float16, "f16", ("f32",)),
        "cvt.f32.f16": Operation(
            canonical(lambda x: x.view(np.float16).astype(np.float32)), "f32", ("f16",)
        ),
        "cvt.rzi.s32.f32": Operation(truncated(-(2**31), 2**31 - 1, np.int32), "s32", ("f32",)),
        "cvt.rzi.u32.f32": Operation(truncated(0, 2**32 - 1, np.uint32), "u32", ("f32",)),
    }
    for type in ("s32", "u32"):
        found[f"cvt.rn.f32.{type}"] = Operation(lambda x: x.astype(np.float32), "f32", (type,))
    integers = [f"{kind}{width}" for kind in "su" for width in (8, 16, 32, 64)]
    for to in integers:
        for of in integers:
            found[f"cvt.{to}.{of}"] = Operation(
                lambda x, dtype=DTYPES[to]: x.astype(dtype), to, (of,)
            )
    return found


def halves(function: Callable[..., Array]) -> Callable[..., Array]:
    return lambda x, y: function(x.view(np.uint16), y.view(np.uint16)).view(np.uint32)


def operations() -> dict[str, Operation]:
    found = of_floats() | conversions()
    for width in (16, 32, 64):
        for kind in "bus":
            found |= of_integers(f"{kind}{width}")
    for name in ("and", "or", "xor", "not"):
        function, count = INTEGERS[name]
        found[f"{name}.pred"] = Operation(function, "pred", ("pred",) * count)
    for type in ("b16", "b32", "b64", "u16", "u32", "u64", "s16", "s32", "s64", "f32"):
        found[f"selp.{type}"] = Operation(
            lambda x, y, chosen: np.where(chosen, x, y), type, (type, type, "pred")
        )
    for name, function in (("add", np.add), ("sub", np.subtract)):
        for type in ("s16x2", "u16x2"):
            found[f"{name}.{type}"] = Operation(halves(function), "b32", ("b32", "b32"))
    found["popc.b32"] = Operation(ones, "u32", ("b32",))
    found["shf.l.wrap.b32"] = Operation(left, "b32", ("b32", "b32", "u32"))
    found["shf.r.wrap.b32"] = Operation(right, "b32", ("b32", "b32", "u32"))
    return found


OPERATIONS = operations()
