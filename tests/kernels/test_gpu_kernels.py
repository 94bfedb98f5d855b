"""The Triton kernels against the torch reference: the same bits, always.

Without a GPU they run in Triton's interpreter, block by block in NumPy: slow, so at small sizes.
"""

import os
import re
from collections.abc import Iterator

import forks
import pytest
import torch
from cuda import needs_cuda
from harness import limit
from interpreter import (
    Interpreted,
    bits_of,
    both_ways,
    decode,
    in_shards,
    moments_of,
    needs_triton,
    ranks_in_shards,
    tuned,
)
from libraries import FRACTION
from problems import DTYPES

from rhtcomm import Codec, Eden, Key, QuicFL, RandomizedHadamard, VectorQuantizer
from rhtcomm.kernels import reference, use
from rhtcomm.moments import block_moments
from rhtcomm.quantizers import Quantizer
from rhtcomm.wire import HEADER_BYTES

QUANTIZERS: tuple[Quantizer, ...] = (
    *(QuicFL(bits) for bits in range(1, 9)),
    *(QuicFL(bits, exact_fraction=FRACTION) for bits in range(1, 9)),
    *(Eden(bits) for bits in range(1, 9)),
    Eden(2, biased=True),
    *(VectorQuantizer(bits) for bits in (1, 2, 4)),
    VectorQuantizer(2, biased=True),
)
SIZES = (32, 64, 256, 1024, 4096)


@pytest.fixture
def _on_reference() -> Iterator[None]:
    with use(reference):
        yield


def tensors(numel: int, ranks: int, seed: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.logspace(-1, 0, ranks)
    return [(torch.randn(numel, generator=generator) * s).to(dtype) for s in spread]


def check(
    interpreted: Interpreted,
    codec: Codec,
    xs: list[torch.Tensor],
    key: Key,
    offset: int = 0,
    dtype: torch.dtype = torch.float32,
) -> None:
    payloads, mean = both_ways(codec, xs, key, offset, dtype)
    found = interpreted(both_ways, codec, xs, key, offset, dtype)
    assert torch.equal(found[0], payloads)
    assert torch.equal(found[1], mean)


@needs_triton
@pytest.mark.usefixtures("_on_reference")
@pytest.mark.parametrize("case", range(len(QUANTIZERS)), ids=lambda i: repr(QUANTIZERS[i]))
def test_same_bits_as_the_reference(interpreted: Interpreted, case: int) -> None:
    size, ranks = SIZES[case % 5], 1 + case % 4
    codec = Codec(QUANTIZERS[case], 1 + case % 3, size)
    xs = tensors(int(1.6 * size), ranks, case, DTYPES[case % 3])
    key = Key(2**64 - 1 - case, step=2**32 - 1 - case, bucket=2**31 + case, hop=case % 16)
    offset = (0, 7, 2**20 + 3)[case % 3] * size
    check(interpreted, codec, xs, key, offset, DTYPES[case // 3 % 3])


@needs_triton
@pytest.mark.usefixtures("_on_reference")
def test_shards_are_those_of_the_reference(interpreted: Interpreted) -> None:
    codec, key = Codec(QuicFL(3), block=128), Key(3)
    (x,) = tensors(6 * 128, 1, 0, torch.float32)
    payloads, decoded = in_shards(codec, x, key)
    found = interpreted(in_shards, codec, x, key)
    assert torch.equal(found[0], payloads)
    assert torch.equal(found[1], decoded)


@needs_triton
@pytest.mark.usefixtures("_on_reference")
@pytest.mark.parametrize("quantizer", [QuicFL(3), Eden(2)], ids=repr)
def test_ranks_in_shards_are_those_of_the_reference(
    interpreted: Interpreted, quantizer: Quantizer
) -> None:
    codec, key = Codec(quantizer, block=128), Key(3)
    xs = tensors(6 * 128, 2, 0, torch.float32)
    payloads, decoded = ranks_in_shards(codec, xs, key)
    found = interpreted(ranks_in_shards, codec, xs, key)
    assert torch.equal(found[0], payloads)
    assert torch.equal(found[1], decoded)


@needs_triton
@pytest.mark.usefixtures("_on_reference")
@pytest.mark.parametrize(
    ("quantizer", "dtype"),
    list(zip([QuicFL(4), QuicFL(3, FRACTION), Eden(3)], DTYPES, strict=True)),
    ids=str,
)
def test_numbers_at_the_ends_of_the_range(
    interpreted: Interpreted, quantizer: Quantizer, dtype: torch.dtype
) -> None:
    """One block each of the smallest, the largest, those that are not finite, and zeros."""
    size = 128
    rows = torch.randn(8, size, generator=torch.Generator().manual_seed(1))
    rows[0] *= 1e-42
    rows[1] *= 1e-38
    rows[2] = rows[2].sign() * 3e38
    rows[3, 5] = float("inf")
    rows[4, 6] = float("nan")
    rows[5] = 0.0
    rows[6] = -0.0
    xs = [rows.flatten().to(dtype), rows.flip(1).flatten().to(dtype)]
    check(interpreted, Codec(quantizer, 2, size), xs, Key(3), 0, dtype)


@needs_triton
@pytest.mark.usefixtures("_on_reference")
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_coordinates_at_the_ends_of_the_range(interpreted: Interpreted, bits: int) -> None:
    """Blocks that are one coordinate once rotated, whose nodes are the first and the last."""
    size, key = 1024, Key(3)
    y = torch.zeros(4, size)
    y[range(4), range(7, 11)] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    x = RandomizedHadamard(2, size).unrotate(y, key, 0).flatten()
    check(interpreted, Codec(QuicFL(bits), 2, size), [x], key)


@needs_triton
@pytest.mark.usefixtures("_on_reference")
@pytest.mark.parametrize("ties", [False, True])
def test_blocks_with_any_number_of_exact_coordinates(interpreted: Interpreted, ties: bool) -> None:
    size, key, quantizer = 1024, Key(9), QuicFL(2, FRACTION)
    capacity = quantizer.exact_capacity(size)
    generator = torch.Generator().manual_seed(size)
    counts = [0, 1, capacity - 1, capacity, capacity + 1, size // 10, size]
    # Small integers, which the transforms there and back leave as they are.
    y = torch.randint(-1, 2, (len(counts), size), generator=generator).float()
    for row, count in zip(y, counts, strict=True):
        chosen = torch.randperm(size, generator=generator)[:count]
        row[chosen] = 40.0 if ties else 40.0 + torch.arange(count) % 19
        row *= 1 - 2 * torch.randint(0, 2, (size,), generator=generator)
    x = RandomizedHadamard(1, size).unrotate(y, key, 0).flatten() / size
    check(interpreted, Codec(quantizer, 1, size), [x], key)


@needs_triton
@pytest.mark.usefixtures("_on_reference")
@pytest.mark.parametrize(
    "quantizer", [QuicFL(5), QuicFL(4, FRACTION), Eden(7), VectorQuantizer(1)], ids=repr
)
def test_random_payloads_decode_alike(interpreted: Interpreted, quantizer: Quantizer) -> None:
    size, key, ranks = 1024, Key(quantizer.bits), 3
    codec, numel = Codec(quantizer, block=size), 2 * size + 77
    generator = torch.Generator().manual_seed(1)
    payloads = torch.randint(
        0, 256, (ranks, codec.nbytes(numel)), dtype=torch.uint8, generator=generator
    )
    for rank, payload in enumerate(payloads):
        header = slice(HEADER_BYTES)
        payload[header] = codec.encode(torch.zeros(numel), key, rank, ranks)[header]
    for section in codec.layout(numel):
        if section.blocks.count == 1:
            continue  # scales of any bits there
        scales, rows = section.views(payloads)
        scales.copy_(torch.rand(scales.shape, generator=generator))
        if isinstance(quantizer, QuicFL) and quantizer.exact_fraction:
            # Indices that count, and each kind that does not.
            at, capacity = quantizer.bits * size // 8, quantizer.exact_capacity(size)
            odd = torch.tensor([-1, -(2**15), 2**15 - 1, 0, 0, 5, size - 1, size])
            chosen = odd[torch.randint(0, len(odd), (ranks, 2, capacity), generator=generator)]
            rows[..., at : at + 2 * capacity] = chosen.to(torch.int16).view(torch.uint8)
    expected = decode(codec, payloads, key, numel, 0, torch.float32)
    assert torch.equal(interpreted(decode, codec, payloads, key, numel, 0, torch.float32), expected)


@needs_triton
@pytest.mark.parametrize("size", [1024, 4096])
def test_other_blocks_than_4096_take_the_number_of_warps_that_is_fastest(
    interpreted: Interpreted, size: int
) -> None:
    codec, key = Codec(QuicFL(4), block=size), Key(3)
    (x,) = tensors(2 * size + 100, 1, 3, torch.float32)  # and a tail, which is not worth it
    mean, timed, launched = interpreted(tuned, codec, x, key)
    assert torch.equal(mean, codec.decode_mean(codec.encode(x, key)[None], key, x.numel()))
    if size == 4096:
        assert timed == []
        assert launched == [2, 1] * 4
    else:  # once for each of the two kernels; then they are known
        assert timed == [1, 2, 4] * 2
        assert launched == [*([1, 2, 4, 2, 1] * 2), *([2, 1] * 2)]


@needs_triton
def test_the_moments_are_those_of_the_input(interpreted: Interpreted) -> None:
    """To a rounding or two of each of their at most 12 levels of additions."""
    size = 4096
    x = torch.cat([*tensors(size, 2, 1, torch.float32), torch.zeros(size)])
    x[size] = float("inf")
    unit = 2.0 ** torch.tensor([[x[:size].abs().max().log2().floor()], [127.0], [-126.0]])
    z = torch.where(x.view(3, size).isfinite().all(dim=1, keepdim=True), x.view(3, size) / unit, 0)
    expected = block_moments(z.double(), unit.double()[:, 0])
    found = interpreted(moments_of, Codec(QuicFL(4), "auto", size), x, Key(1))
    assert torch.equal(found[:, -1].double(), expected[:, -1].clamp(max=2.0**126))
    torch.testing.assert_close(found[:, :-1].double(), expected[:, :-1], rtol=2e-6, atol=0)


@needs_triton
@pytest.mark.usefixtures("_on_reference")
def test_blocks_beyond_one_program_take_the_reference(interpreted: Interpreted) -> None:
    codec = Codec(QuicFL(4), 2, 1 << 15)
    check(interpreted, codec, tensors((1 << 15) + 100, 2, 5, torch.float32), Key(1))


# Without the interpreter -------------------------------------------------------------------------


@needs_triton
@pytest.mark.skipif(bool(os.environ.get("TRITON_INTERPRET")), reason="it runs in the interpreter")
@pytest.mark.parametrize("encode", [True, False])
@pytest.mark.parametrize("quantizer", [QuicFL(4, FRACTION), Eden(3), VectorQuantizer(4)], ids=repr)
@pytest.mark.parametrize("size", [256, 1024])
def test_it_compiles_and_rounds_each_operation(
    size: int, quantizer: Quantizer, encode: bool
) -> None:
    from lib.compiled import compiled

    kernel = compiled(Codec(quantizer, 2, size), torch.bfloat16, encode)
    assert kernel.asm["cubin"]
    ptx = kernel.asm["ptx"]
    # The only fused operations are by the +-1 of butterflies between threads, of which each of the
    # 5 strides has one. Larger blocks have none, since threads exchange whole rows there.
    factors = re.findall(r"fma\.rn\.f32\s+\S+, \S+, (\S+), ", ptx)
    if size == 256:
        assert len(factors) >= 2 * 5 * size // 32
        assert len(set(factors)) <= 5
    else:
        assert not factors
    assert not re.search(r"fma\.(?!rn\.f32)|\.ftz|\.approx|\.full|rsqrt|ex2", ptx)
    if encode:
        assert "sqrt.rn.f32" in ptx
        assert "div.rn.f32" in ptx


def choose(device: str, *wishes: str, before: str = "", interpret: bool = False) -> list[str]:
    """The kernel that a fresh process picks for each RHTCOMM_KERNELS, and what it says of it."""
    program = f"""
import os, sys
{before}
import torch
from rhtcomm import QuicFL
from rhtcomm.kernels import choose
for wish in {wishes}:
    os.environ["RHTCOMM_KERNELS"] = wish
    try:
        print(choose("{device}", QuicFL).__name__.split(".")[-1])
    except RuntimeError as error:
        print(error)
assert not torch.cuda.is_initialized()
"""
    environment = {name: value for name, value in os.environ.items() if "TRITON" not in name}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    done = forks.start(program, environment, strict=False).wait(limit(120))
    assert done.returncode == 0, done.stderr
    return [*done.stderr.splitlines(), *done.stdout.splitlines()]


@needs_triton
def test_the_device_and_the_environment_choose_the_kernel() -> None:
    *chosen, refused = choose("cuda", "", "gpu", "reference", "cpu")
    assert chosen == ["gpu", "gpu", "reference"]
    assert "RHTCOMM_KERNELS=cpu, but there are no such kernels for QuicFL on cuda" in refused
    assert "because TRITON_INTERPRET is not set" in choose("cpu", "gpu")[0]
    assert choose("cpu", "gpu", interpret=True) == ["gpu"]


def test_without_triton_the_reference_runs_and_says_so_once() -> None:
    said, *chosen, refused = choose("cuda", "", "", "gpu", before="sys.modules['triton'] = None")
    assert "Triton cannot be used" in said
    assert chosen == ["reference", "reference"]
    assert "pip install 'rhtcomm[gpu]'" in refused


def test_a_triton_that_is_too_old_is_not_used() -> None:
    """Triton 3.5, that of torch 2.9, cannot compile the kernels."""
    old = "import types; sys.modules['triton'] = types.SimpleNamespace(__version__='3.5.1')"
    said, *chosen, refused = choose("cuda", "", "", "gpu", before=old)
    assert "3.5.1, but the kernels need 3.6" in said
    assert chosen == ["reference", "reference"]
    assert "3.5.1, but the kernels need 3.6" in refused


# On a GPU ----------------------------------------------------------------------------------------


@needs_cuda
@needs_triton
@pytest.mark.parametrize("case", range(len(QUANTIZERS)), ids=lambda i: repr(QUANTIZERS[i]))
def test_same_bits_on_a_gpu(case: int) -> None:
    """As the kernels of the CPU, which have the bits of the reference.

    `benchmarks/gpu.py` compares all of them at 4096, with each number of rotations and dtype.
    """
    size, rotations = (512, 1 << 14, 32, 4096)[case % 4], 1 + case // 4 % 3
    codec, key = Codec(QUANTIZERS[case], rotations, size), Key(2**63 + 1, bucket=2, hop=3)
    xs = tensors(int(9.3 * size), 3, size, DTYPES[case // 2 % 3])
    xs[0][3 * size + 5] = float("inf")
    payloads, mean = both_ways(codec, xs, key, 5 * size, xs[0].dtype)
    on_gpu = [x.cuda() for x in xs]
    found = torch.stack(
        [codec.encode(x, key, rank, 3, offset=5 * size) for rank, x in enumerate(on_gpu)]
    )
    assert torch.equal(found.cpu(), payloads)
    out = codec.decode_mean(found, key, len(xs[0]), offset=5 * size, out=on_gpu[0]).cpu()
    assert torch.equal(bits_of(out), mean)


@needs_cuda
@needs_triton
def test_the_moments_on_a_gpu_choose_as_those_of_the_cpu() -> None:
    codec = Codec(QuicFL(4), "auto")
    few = torch.zeros(1 << 14)
    few[:3] = torch.tensor([1.0, 0.6, 0.3])
    for x in (few, *tensors(1 << 14, 1, 0, torch.float32)):
        assert torch.equal(codec.encode(x.cuda(), Key(1)).cpu(), codec.encode(x, Key(1)))
