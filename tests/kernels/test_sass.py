"""What the Triton kernels do on paper: benchmarks/sass.py."""

from collections import Counter

import pytest
import torch
from interpreter import needs_triton

from rhtcomm import Codec, QuicFL

pytestmark = needs_triton

SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_1) ;
.L_x_0:
        /*0020*/                   FADD R2, R2, R3 ;
        /*0030*/               @P1 EXIT ;
        /*0040*/               @P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0050*/                   LDS.128 R4, [R4] ;
        /*0060*/             @!UP0 LDSM.16.M88.4 R4, [R4] ;
        /*0070*/                   EXIT ;
        /*0080*/                   FMUL R2, R2, R3 ;
.L_x_2:
        /*0090*/                   BRA `(.L_x_2);
"""


def test_loops_and_what_follows_the_exit_are_left_out() -> None:
    from lib.compiled import executed

    assert executed(SASS) == ["MOV", "BRA", "LDS.128", "LDSM.16.M88.4"]


def test_the_slowest_limit_bounds_the_speed() -> None:
    import sass
    from lib.compiled import Counts

    names = Counter({"FADD": 24.0, "LOP3": 16.0, "F2I": 1.0, "LDS": 1.0})
    counts = Counts(names, 9.0, 1.0, 168, 0, 16 << 10, 64)
    assert sass.clocks(counts) == {
        "instructions": 42 / 128,
        "floats": 24 / 128,
        "integers": 16 / 64,
        "conversions": 1 / 16,
        "shared memory": (9 + 2.5) / 32,
    }
    assert sass.resident(counts) == 6  # by registers; by shared memory 13
    assert counts.kind("integer") == 17


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("encode", "most"), [(True, 60), (False, 52)])
def test_threads_exchange_rows_and_spill_nothing(
    encode: bool, most: int, dtype: torch.dtype
) -> None:
    from lib.compiled import compiled, count

    counts = count(compiled(Codec(QuicFL(4), 2), dtype, encode), 4096)
    assert counts.names["SHFL"] < 0.3  # 12 of 24 strides would take a shuffle each
    assert counts.spilled == 0
    assert 24 < counts.total < most
    assert counts.names["FADD"] < 24 + 1.6  # nothing is computed twice, in two layouts
