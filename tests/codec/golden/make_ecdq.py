"""Known-answer vectors of ECDQ, in ecdq.npz.

    PYTHONPATH=tests/codec python -m golden.make_ecdq

writes it, as make.py does for the other quantizers; inputs and NaN are as there.
"""

from pathlib import Path

from golden.make import Case, write

from rhtcomm import ECDQ, Codec, Key

__all__ = ["CASES", "PATH"]

PATH = Path(__file__).with_name("ecdq.npz")


def of_every_width() -> list[Case]:
    """Means of two ranks of three, in blocks of 64, 256 and 1024, one to three rotations."""
    cases = []
    for quarters in range(4, 25):
        bits, block = quarters / 4, 64 << (2 * (quarters % 3))
        codec = Codec(ECDQ(bits), 1 + quarters % 3, block)
        dtype = ("float32", "bfloat16", "float16")[quarters % 3]
        recipe = ("gaussian", "heavy")[quarters % 2]
        name = f"ECDQ{bits:g}-k{codec.rotations}-d{block}"
        key, offset = Key(seed=quarters << 32, step=7, bucket=quarters), 5 * block
        cases.append(Case(name, codec, 2 * block + 77, key, 2, 1, 3, offset, dtype, dtype, recipe))
    return cases


def of_odd_inputs() -> list[Case]:
    """Infinite and other unusual numbers, and payloads of any bytes."""
    return [
        Case(f"ECDQ{bits:g}-{recipe}", Codec(ECDQ(bits), block=block), 1024, Key(3), recipe=recipe)
        for bits in (1, 2.5, 6)
        for recipe, block in (("mixed", 256), ("any bytes", 256), ("edges", 32))
    ]


def of_whole_units() -> list[Case]:
    """Two units and a part of one, of 16 blocks of 4096."""
    return [
        Case(f"ECDQ{bits:g}-units", Codec(ECDQ(bits)), 150_000, Key(4), 1, digested=True)
        for bits in (1, 2, 4, 5)
    ]


CASES = [*of_every_width(), *of_odd_inputs(), *of_whole_units()]


if __name__ == "__main__":
    write(PATH, CASES)
