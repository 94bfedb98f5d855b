"""The interpreter refuses kernels whose bits would differ between versions of Triton."""

import pytest
from interpreter import Interpreted, misused, needs_triton


@needs_triton
def test_a_fused_operation_must_not_round_its_product(interpreted: Interpreted) -> None:
    assert interpreted(misused, "fma", -1.0) == -2.0
    with pytest.raises(Exception, match=r"tl\.fma of products that are not exact"):
        interpreted(misused, "fma", 0.1)


@needs_triton
def test_the_high_half_of_products_is_of_unsigned_numbers(interpreted: Interpreted) -> None:
    assert interpreted(misused, "umulhi", False) == 256.0
    with pytest.raises(Exception, match="umulhi of signed integers"):
        interpreted(misused, "umulhi", True)
