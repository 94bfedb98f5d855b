"""The Triton kernels as compiled for GPUs against the torch reference: the same bits, always.

No GPU is needed: `ptx` runs what Triton compiles, and notices races, which Triton's interpreter
cannot have.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import ptx
import pytest
import torch
from interpreter import needs_triton
from lattices import sum_of
from problems import gaussian

import rhtcomm.quantizers.ecdq
from rhtcomm import ECDQ, Codec, Eden, Key, Lattice, QuicFL, VectorQuantizer
from rhtcomm.kernels import Kernel, reference
from rhtcomm.wire import layout

pytestmark = needs_triton
KEY = Key(2**64 - 3, step=2**32 - 1, bucket=2**31 + 5, hop=15)


def raw(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def both_ways(
    kernel: Kernel, codec: Codec, xs: list[torch.Tensor], shift: int = 0
) -> list[torch.Tensor]:
    """Payloads of all ranks, the bits of the mean, and those of the mean of bytes at random."""
    numel, ranks, offset = len(xs[0]), len(xs), 7 * codec.block
    task = codec.task(numel)
    payloads = torch.full((ranks, 1, codec.nbytes(numel)), 165, dtype=torch.uint8)
    for rank, x in enumerate(xs):
        kernel.encode(task, KEY, offset, rank, ranks, x, payloads[rank])
    found = [payloads]
    random = torch.Generator().manual_seed(5)
    garbage = torch.randint(256, payloads.shape, dtype=torch.uint8, generator=random)
    for section in task.sections:
        scales = torch.randn(ranks, 1, section.blocks.count, generator=random)
        odd = scales[0, 0, 1:7]  # but in the first block
        odd.copy_(torch.tensor([torch.inf, torch.nan, 1e-45, -3e38, -torch.inf, -0.0])[: len(odd)])
        octets = scales.view(torch.uint8)
        garbage[..., section.scales : section.scales + octets.shape[-1]] = octets
    for given in (payloads, garbage):
        out = torch.zeros(shift + numel, dtype=xs[0].dtype)[shift:]
        kernel.decode(task, KEY, offset, 0, ranks, given, out)
        found.append(raw(out))
    return found


def inputs(numel: int, ranks: int, dtype: torch.dtype, shift: int = 0) -> list[torch.Tensor]:
    """Of different magnitudes; `shift` coordinates behind an aligned address."""
    return [
        (gaussian(shift + numel, rank) * (0.3 + rank)).to(dtype)[shift:] for rank in range(ranks)
    ]


@pytest.fixture
def units_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Makes units of ECDQ have so many coordinates, and bytes where they are given."""

    def patch(numel: int, nbytes: int | None = None) -> None:
        monkeypatch.setattr(rhtcomm.quantizers.ecdq, "UNIT", numel)
        if nbytes is not None:
            monkeypatch.setattr(ECDQ, "unit_bytes", lambda self, numel: nbytes if numel else 0)
        layout.cache_clear()

    yield patch
    layout.cache_clear()


class Case(NamedTuple):
    """A codec, and xs; `warps` instead of the guess, and unaligned by `shift` coordinates."""

    quantizer: Any
    rotations: int
    size: int
    numel: int
    dtype: torch.dtype = torch.float32
    ranks: int = 1
    warps: int | None = None
    shift: int = 0

    def __str__(self) -> str:
        return f"{self.quantizer}, {self.size}, {self.dtype}"


CASES = [
    Case(QuicFL(4), 2, 256, 600, ranks=2),
    Case(QuicFL(4), 2, 4096, 4096, torch.bfloat16),
    Case(QuicFL(3), 1, 512, 1200, torch.bfloat16, shift=1),
    Case(QuicFL(3, 1 / 512), 2, 1024, 1024, warps=2),
    Case(Eden(3), 3, 256, 700, torch.float16, warps=2),
    Case(VectorQuantizer(2), 1, 512, 1024, torch.bfloat16, ranks=2, warps=4),
    Case(ECDQ(2.5), 2, 256, 1100),
    Case(ECDQ(5), 1, 64, 200, torch.float16, ranks=2),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_bits_as_the_reference(case: Case, units_of: Callable[..., None]) -> None:
    from emulated import KERNELS, emulated

    from rhtcomm.kernels import gpu, gpu_units

    units_of(2 * case.size)
    codec = Codec(case.quantizer, case.rotations, case.size)
    xs = inputs(case.numel, case.ranks, case.dtype, case.shift)
    kernel = gpu_units if isinstance(case.quantizer, ECDQ) else gpu
    with emulated(case.warps) as launched:
        found = both_ways(kernel, codec, xs, case.shift)
    assert set(launched) == set(KERNELS[kernel.__name__.rsplit(".", 1)[1]])
    for one, other in zip(found, both_ways(reference, codec, xs, case.shift), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("bits", "size", "dtype", "warps"),
    [(4, 256, torch.float32, None), (1, 512, torch.bfloat16, 2)],
)
def test_the_lattice_has_the_bits_of_the_reference(
    bits: int, size: int, dtype: torch.dtype, warps: int | None
) -> None:
    from emulated import KERNELS, emulated

    from rhtcomm.kernels import lattice_gpu

    lattice, xs = Lattice(bits, 1 + bits % 2, size), inputs(2 * size + 30, 2, dtype)
    xs[1][size] = torch.nan
    for x in xs:
        x[2 * size :] = 0
    with emulated(warps) as launched:
        found = sum_of(lattice, xs, KEY, 7 * size, lattice_gpu)
    assert set(launched) == set(KERNELS["lattice_gpu"])
    expected = sum_of(lattice, xs, KEY, 7 * size)
    for one, other in zip(found.everything(), expected.everything(), strict=True):
        assert torch.equal(one, other)


def test_blocks_of_extreme_values() -> None:
    from emulated import emulated

    from rhtcomm.kernels import gpu

    codec, rows = Codec(QuicFL(4), 2, 256), gaussian(9 * 256).view(9, 256)
    rows[0] *= 1e-42
    rows[1] *= 1e-38
    rows[2] = rows[2].sign() * 3e38
    rows[3, 5], rows[4, 6] = torch.inf, torch.nan
    rows[5], rows[6] = 0, -0.0
    rows[7] = rows[7].abs()
    rows[8] = 0
    rows[8, 3] = -1.5
    xs = [rows.flatten()[:-10], rows.flip(1).flatten()[10:].clone()]
    with emulated():
        found = both_ways(gpu, codec, xs)
    for one, other in zip(found, both_ways(reference, codec, xs), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("nbytes", [208, 132], ids=["by another factor", "never"])
def test_units_that_do_not_fit_at_once(nbytes: int, units_of: Callable[..., None]) -> None:
    from emulated import emulated

    from rhtcomm.kernels import gpu_units

    xs = inputs(4 * 256, 1, torch.float32)
    xs[0][512:768] = torch.nan
    codec = Codec(ECDQ(2), 1, 256)
    units_of(512)
    fitting, *_ = both_ways(reference, codec, xs)
    units_of(512, nbytes)
    with emulated():
        found = both_ways(gpu_units, codec, xs)
    for one, other in zip(found, both_ways(reference, codec, xs), strict=True):
        assert torch.equal(one, other)
    (section,) = codec.layout(len(xs[0]))
    units = found[0][0, 0, section.codes : section.stop].view(2, nbytes)
    assert units.any(dim=1).tolist() == [nbytes > 132] * 2
    scales, before = (
        payload[0, 0, section.scales : section.scales + 8].view(torch.float32)
        for payload in (found[0], fitting)
    )
    assert (scales / before > 1.01).tolist() == [nbytes > 132] * 2, "they were meant not to fit"


def test_moments_are_those_of_the_input() -> None:
    from emulated import emulated

    from rhtcomm.kernels import gpu

    codec, (x,) = Codec(QuicFL(4), 2, 256), inputs(600, 1, torch.float32)
    task, payload = codec.task(600), torch.empty(1, codec.nbytes(600), dtype=torch.uint8)
    moments = torch.full((2, task.blocks, 10), -1.0)
    reference.encode(task, KEY, 0, 0, 1, x, payload, moments[0])
    with emulated():
        gpu.encode(task, KEY, 0, 0, 1, x, payload, moments[1])
    assert torch.allclose(*moments, rtol=1e-6, atol=0)


def encoded(quantizer: Any, warps: int | None, change: Callable[[str], str]) -> torch.Tensor:
    """A payload by a kernel whose PTX has been changed."""
    from emulated import emulated

    from rhtcomm.kernels import gpu

    changed = []

    def checked(ptx: str) -> str:
        changed.append(change(ptx) != ptx)
        return change(ptx)

    codec, (x,) = Codec(quantizer, 2, 256), inputs(600, 1, torch.float32)
    payload = torch.zeros(1, codec.nbytes(600), dtype=torch.uint8)
    with emulated(warps, checked):
        gpu.encode(codec.task(600), KEY, 0, 0, 1, x, payload)
    assert all(changed)
    return payload


def test_a_barrier_that_lacks_is_a_race() -> None:
    with pytest.raises(ptx.Fault, match="race"):
        encoded(QuicFL(4), 2, lambda text: re.sub(r"bar\.sync\s+0;", "", text))


def test_a_wrong_constant_gives_other_bits() -> None:
    philox = ("-766435501", "-766435503")
    codec, (x,) = Codec(QuicFL(4), 2, 256), inputs(600, 1, torch.float32)
    expected = torch.zeros(1, codec.nbytes(600), dtype=torch.uint8)
    reference.encode(codec.task(600), KEY, 0, 0, 1, x, expected)
    assert torch.equal(encoded(QuicFL(4), None, lambda text: text + "\n"), expected)
    assert not torch.equal(encoded(QuicFL(4), None, lambda text: text.replace(*philox)), expected)


def test_a_wrong_pointer_is_out_of_bounds() -> None:
    names = "encode_block_param_0]", "encode_block_param_1]"
    with pytest.raises(ptx.Fault, match=r"line \d+: .*ld.global.*: out of the bounds"):
        encoded(QuicFL(4), None, lambda text: text.replace(*names))
