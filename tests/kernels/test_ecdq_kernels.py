"""ECDQ's C kernels where it differs from other quantizers: units that do not fit, and tables."""

import zlib

import pytest
import torch
from libraries import ECDQS, both_ways, needs_library, variants
from problems import gaussian, that_overflows

import rhtcomm.quantizers.ecdq
from rhtcomm import ECDQ, Codec, Key
from rhtcomm.kernels import cpu, reference, use

pytestmark = needs_library
KEY = Key(seed=3)


@pytest.mark.parametrize("bits", [1, 1.75, 2.5])
def test_units_that_do_not_fit_are_those_of_the_reference(bits: float) -> None:
    codec, numel = Codec(ECDQ(bits)), 3 << 16
    x = gaussian(numel, 1)
    x[1 << 16 : 2 << 16] = that_overflows(bits, numel, KEY)[1 << 16 : 2 << 16]
    x[4096 * 17 : 4096 * 18] = torch.inf  # a block of the unit that is coded again
    expected = both_ways(reference, codec, [x], KEY, 0, torch.float32)
    (section,) = codec.layout(numel)
    scales, _ = section.part(expected[0][0], slice(0, 48), codec.quantizer)
    factor = scales / codec.quantizer.table.quarter_step  # type: ignore[attr-defined]
    rms = x.view(-1, 4096).square().mean(dim=1).sqrt()
    coarse = (factor / rms)[18:32]
    assert bool((coarse > 1.01).all()), "it was meant not to fit"
    for name, kernel in variants().items():
        found = both_ways(kernel, codec, [x], KEY, 0, torch.float32)
        assert torch.equal(found[0], expected[0]), name
        assert torch.equal(found[1], expected[1]), name


def test_units_that_never_fit_are_those_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their length is cut, since no input is known that needs it."""
    monkeypatch.setattr(ECDQ, "unit_bytes", lambda self, numel: 132 if numel else 0)
    codec, x = Codec(ECDQ(2)), gaussian(20 * 4096 + 13)  # a length of its own: layouts are kept
    x[4096 * 3] = torch.nan
    with use(reference):
        expected = codec.encode(x, KEY)
    codes = codec.layout(len(x))[0].codes
    assert not expected[codes : codes + 132].any()
    for name, kernel in variants().items():
        with use(kernel):
            payload = torch.full_like(expected, 0xA5)
            codec.encode(x, KEY, out=payload)
        assert torch.equal(payload, expected), name


@pytest.mark.parametrize("quantizer", ECDQS, ids=repr)
def test_plans_own_the_tables_that_they_point_into(quantizer: ECDQ) -> None:
    plans = cpu.plans_of(Codec(quantizer, 1, 1024).task(1024))
    (plan,) = plans.array
    table = plans.table
    assert {plan.symbols, plan.slots} == {
        table.entries.ctypes.data,  # type: ignore[attr-defined]
        table.slots.ctypes.data,  # type: ignore[attr-defined]
    }
    registers = table.registers  # type: ignore[attr-defined]
    assert plan.registers == (None if registers is None else registers.ctypes.data)
    assert plan.levels is plan.positions is plan.boundaries is plan.half_norms is None
    assert quantizer.table is table


def test_whoever_changes_a_table_raises_the_abi() -> None:
    """Or kernels that were built before would read it as the old one, and write wrong payloads."""
    table = ECDQ(2).table
    assert table.registers is not None
    found = [zlib.crc32(each.tobytes()) for each in (table.entries, table.slots, table.registers)]
    assert (cpu.ABI, found) == (12, [1455437848, 3329800127, 1767161200])


@pytest.mark.parametrize("quarters", range(4, 25))
def test_division_by_multiplication_is_exact(quarters: int) -> None:
    """x // f = (x m) >> (31 + s) up to the largest x < 2^(32 - P) f: where x m / 2^(31 + s) exceeds
    x / f by less than 1 / f, that is where x (m f - 2^(31 + s)) < 2^(31 + s)."""
    table = ECDQ(quarters / 4).table
    for (entry, inverse), f in zip(
        table.entries.tolist(), table.frequencies.flatten().tolist(), strict=True
    ):
        shift = 31 + (entry >> 26)
        assert entry & 0x1FFF == f
        assert inverse < 1 << 32
        assert ((f << (32 - table.precision)) - 1) * (inverse * f - (1 << shift)) < 1 << shift
    assert int(table.frequencies.max()) < 1 << 12
    assert table.precision >= 10  # the division of native/rans_registers.h relies on it
    assert table.frequencies.size <= 1 << 8  # symbols of all classes are bytes


@pytest.mark.parametrize("quarters", range(4, 25))
def test_units_and_ranks_side_by_side_are_those_of_the_reference(
    quarters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups of units end where a shard's last one is shorter, and where a thread's share ends."""
    monkeypatch.setattr(rhtcomm.quantizers.ecdq, "UNIT", 256)
    codec, numel = Codec(ECDQ(quarters / 4), block=64), 11 * 256 + 3 * 64 + 7  # lengths of its own
    xs = [gaussian(numel, rank) for rank in range(6)]
    threads = torch.get_num_threads()
    for ranks, some in ((1, 1), (2, 1), (3, 2), (6, 3)):
        expected = both_ways(reference, codec, xs[:ranks], KEY, 0, torch.float32)
        torch.set_num_threads(some)
        try:
            for name, kernel in variants().items():
                found = both_ways(kernel, codec, xs[:ranks], KEY, 0, torch.float32)
                assert torch.equal(found[0], expected[0]), (name, ranks)
                assert torch.equal(found[1], expected[1]), (name, ranks)
        finally:
            torch.set_num_threads(threads)
