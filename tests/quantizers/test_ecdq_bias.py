"""ECDQ has no bias: N NMSE(N), N times the error of the mean of N estimates, is that of one.

The estimate of x (d,) by one key is off by R^T e, whose coordinates are uncorrelated and of one
variance whatever the rotation R is, as those of e are. The mean by N = 1000 keys is off by the sum
of so many of these: d independent Gaussian numbers. So N NMSE(N) / vNMSE is a chi-square divided by
its d degrees, of mean 1 and deviation sqrt(2 / d), 0.55% for 2^16 coordinates and 0.78% for 2^15. A
bias of |B|^2 = b |x|^2 adds N b.
"""

import math

import pytest
import torch
from libraries import needs_library
from problems import adversarial, gaussian, lognormal

from rhtcomm import ECDQ, Codec, Key

BLOCK, UNIT = 4096, 1 << 16
KEYS = 1000

OUTLIER = 0.01 * gaussian(BLOCK, 9)
OUTLIER[77] = 1
# In all blocks, as blocks of zeros have no errors.
FEW = {**adversarial(BLOCK), "outlier": OUTLIER}
NAMES = ("one_hot", "two_hot", "three_unequal", "walsh_row", "constant", "half_zeros", "outlier")
INPUTS = {
    "gaussian": gaussian(UNIT, 8),
    "lognormal": lognormal(UNIT, 4),
    **{name: FEW[name].repeat(UNIT // BLOCK // 2) for name in NAMES},
}


def deviation_of(x: torch.Tensor) -> float:
    return math.sqrt(2 / len(x))


def averaged(codec: Codec, x: torch.Tensor, keys: range, seed: int = 1) -> float:
    """N NMSE(N), N = len(keys)."""
    total = torch.zeros_like(x, dtype=torch.float64)
    for step in keys:
        key = Key(seed, step)
        total += codec.decode_mean(codec.encode(x, key)[None], key, len(x))
    exact = x.double()
    off = (total / len(keys) - exact).square().sum() / exact.square().sum()
    return len(keys) * float(off)


@needs_library  # 33 or 65 million coordinates; the torch reference gives the same bits
@pytest.mark.parametrize("bits", [1, 1.5, 2, 3, 4])
@pytest.mark.parametrize("name", INPUTS)
def test_the_mean_over_1000_keys_has_a_thousandth_of_the_error(name: str, bits: float) -> None:
    """Within 5% is promised. The scale may be above the root mean square, by up to 0.2% of D^2."""
    x = INPUTS[name]
    found = averaged(Codec(ECDQ(bits)), x, range(KEYS)) / ECDQ(bits).vnmse
    assert abs(found - 1) < 5 * deviation_of(x) + 0.004 < 0.05


@needs_library
def test_it_deviates_as_derived() -> None:
    """40 times, by 25 other keys each: a deviation is known to 1 / sqrt(80), a ninth."""
    codec, x = Codec(ECDQ(2)), INPUTS["one_hot"]
    found = [averaged(codec, x, range(i, i + 25), seed=2) for i in range(0, 25 * 40, 25)]
    deviation = float(torch.tensor(found).std()) / ECDQ(2).vnmse
    assert 0.6 < deviation / deviation_of(x) < 1.4
