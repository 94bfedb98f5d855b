"""VectorQuantizer: brute force in float64, and error and bias at fixed seeds."""

import numpy as np
import pytest
import torch
from libraries import both_ways, needs_library, variants
from problems import ROUNDOFF, gaussian

from rhtcomm import Codec, Key, RandomizedHadamard, VectorQuantizer, codebooks
from rhtcomm.hooks import RHTState
from rhtcomm.kernels import reference

BITS = (1, 2, 4)
EDEN_VNMSE = {1: 0.570796, 2: 0.133121, 4: 0.009592}
GAIN = {1: 0.16, 2: 0.18, 4: 0.10}
BLOCK = 4096
KEY = Key(seed=41, step=42, bucket=43)


@pytest.mark.parametrize("bits", BITS)
def test_the_nearest_codeword_and_the_scale(bits: int) -> None:
    y = gaussian(16 * 1024, bits).view(16, 1024) * torch.logspace(-6, 6, 16)[:, None]
    codes, scale = VectorQuantizer(bits).encode(y, KEY, 0, 0, 1)
    rows = y.double().numpy()
    z = rows / np.sqrt((rows**2).mean(axis=1))[:, None]
    half = codebooks.load("vector")[f"b{bits}"]
    words = np.concatenate([half, -half])
    groups = z.reshape(-1, 1, 8 // bits)
    distances = ((groups - words) ** 2).sum(axis=-1)
    best = np.partition(distances, 1, axis=-1)[:, :2]
    # Twice the rounding of g + 2 sums and of z, whose products are at most |z| |c|.
    reach = (groups**2).sum(axis=-1)[:, 0] + (words**2).sum(axis=-1).max()
    edge = best[:, 1] - best[:, 0] <= 128 * ROUNDOFF * reach
    assert edge.mean() < 0.005
    found = codes.numpy().ravel()
    np.testing.assert_array_equal(found[~edge], distances.argmin(axis=-1)[~edge])
    values = words[found].reshape(rows.shape)
    exact = (rows**2).sum(axis=1) / (rows * values).sum(axis=1)
    np.testing.assert_allclose(scale.numpy(), exact, rtol=64 * ROUNDOFF)


def measure(bits: int, rotations: int | None, row: torch.Tensor) -> tuple[float, float]:
    """NMSE of one estimate, and N times that of the mean of N = 512."""
    codec, draws = Codec(VectorQuantizer(bits), rotations), 512
    x = row.repeat(draws)
    found = codec.decode_mean(codec.encode(x, KEY)[None], KEY, x.numel()).view(-1, BLOCK).double()
    norm = float(row.double().square().sum())
    one_shot = float((found - row).square().sum()) / draws / norm
    return one_shot, draws * float((found.mean(dim=0) - row).square().sum()) / norm


@pytest.mark.parametrize("bits", BITS)
def test_error_beats_eden_and_is_unbiased_after_three_transforms(bits: int) -> None:
    few = torch.zeros(BLOCK)
    few[:3] = torch.tensor([1.0, 0.6, 0.3])
    for row in (few, gaussian(BLOCK)):
        one_shot, averaged = measure(bits, None, row)  # three by default
        assert one_shot < (1 - GAIN[bits]) * EDEN_VNMSE[bits]
        # The relative standard error is (2 / 4096)^(1/2) = 2.2%.
        assert averaged == pytest.approx(one_shot, rel=0.1)
    # One transform fails by far, and two still leave the coordinates of a group correlated.
    assert measure(bits, 1, few)[1] > 50 * one_shot
    assert measure(bits, 2, few)[1] > 1.3 * one_shot


@needs_library
@pytest.mark.parametrize("bits", BITS)
def test_kernels_break_near_ties_alike(bits: int) -> None:
    """Groups half way between two codewords, where the order of additions decides."""
    words = torch.from_numpy(VectorQuantizer(bits).table.codewords).double()
    distances = torch.cdist(words, words).fill_diagonal_(torch.inf)
    halfway = ((words + words[distances.argmin(dim=1)]) / 2).flatten()
    # As the block's root mean square is 1, the quantizer sees them as they are.
    rest = gaussian(BLOCK - halfway.numel(), bits).double()
    rest *= ((BLOCK - halfway.square().sum()) / rest.square().sum()).sqrt()
    rows = []
    for block in range(8):
        y = torch.cat([halfway, rest]).float()[None]
        rows.append(RandomizedHadamard(1, BLOCK).unrotate(y, KEY, block * BLOCK) / BLOCK**0.5)
    codec, xs = Codec(VectorQuantizer(bits), 1, BLOCK), [torch.cat(rows).flatten()]
    expected = both_ways(reference, codec, xs, KEY, 0, torch.float32)
    for name, kernel in variants().items():
        found = both_ways(kernel, codec, xs, KEY, 0, torch.float32)
        assert all(map(torch.equal, found, expected)), name


@pytest.mark.parametrize("bits", [0, 3, 8, True, 4.0])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"VectorQuantizer: bits={bits} must be 1, 2 or 4"):
        RHTState(bits, quantizer="vector")
