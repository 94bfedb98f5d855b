"""What many threads ask for at the same time is built once, and outlives whoever asked."""

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from hashlib import blake2b

import pytest
import torch
from harness import call_in_fresh_process, in_fresh_process
from interpreter import has_triton, needs_triton
from libraries import needs_library

from rhtcomm import ECDQ, Codec, Eden, Key, QuicFL, VectorQuantizer, codebooks
from rhtcomm.kernels import cpu
from rhtcomm.once import once
from rhtcomm.quantizers import Quantizer

FRACTION = 1 / 512
QUANTIZERS: list[Quantizer] = [
    *(QuicFL(bits, exact) for bits in range(1, 9) for exact in (0.0, FRACTION)),
    *(Eden(bits, biased) for bits in range(1, 9) for biased in (False, True)),
    *(VectorQuantizer(bits, biased) for bits in (1, 2, 4) for biased in (False, True)),
]
ECDQS: list[Quantizer] = [ECDQ(quarters / 4) for quarters in range(4, 25)]


def use(quantizer: Quantizer, rotations: int = 2) -> bytes:
    """A hash of payloads and their mean."""
    numel, key = 150, Key(int(quantizer.bits))
    codec = Codec(quantizer, rotations, block=32)
    x = torch.randn(2, numel, generator=torch.Generator().manual_seed(1))
    payloads = torch.stack([codec.encode(x[rank], key, rank, 2) for rank in range(2)])
    mean = codec.decode_mean(payloads, key, numel)
    return blake2b(payloads.numpy().tobytes() + mean.numpy().tobytes(), digest_size=8).digest()


def race(quantizers: str) -> None:
    """For a process of its own: threads that meet as they read the same table."""
    torch.set_num_threads(1)
    for quantizer in eval(quantizers):
        print(*race_for(quantizer), flush=True)


def race_for(quantizer: Quantizer, count: int = 4) -> tuple[object, ...]:
    """How many times a table was read, and all the hashes that came out, then and later."""
    together, first_is_done = threading.Barrier(count), threading.Event()
    calls: list[str] = []
    found: list[bytes] = []
    load = codebooks.load

    def slow_load(name: str) -> object:
        calls.append(name)
        number = len(calls)
        with suppress(threading.BrokenBarrierError):
            together.wait(0.1)  # passes only if all threads come here
            if number > 1:  # until what the first one built is in use
                first_is_done.wait(5)
        return load(name)

    def work() -> None:
        found.append(use(quantizer))
        first_is_done.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codebooks, "load", slow_load)
        run_together(work, count)
    assert len(found) == count
    junk = [
        torch.full((1 << k,), 7.0) for k in range(4, 16) for _ in range(20)
    ]  # over what is free
    once_more = use(quantizer)
    del junk
    return len(calls), *{value.hex() for value in (*found, once_more)}


def run_together(work: Callable[[], object], count: int) -> None:
    start = threading.Barrier(count)

    def run() -> None:
        start.wait(60)
        work()

    threads = [threading.Thread(target=run, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


FEW = "[QuicFL(4), QuicFL(2, 1 / 512), Eden(3), VectorQuantizer(4), ECDQ(1.5)]"


@pytest.mark.parametrize(
    ("kernel", "quantizers"), [("cpu", "[*QUANTIZERS, *ECDQS]"), ("reference", FEW), ("gpu", FEW)]
)
def test_threads_that_meet_in_a_table_all_get_its_bits(kernel: str, quantizers: str) -> None:
    if kernel == "cpu" and cpu.library_path() is None:
        pytest.skip("the C kernels are missing")
    if kernel == "gpu" and not has_triton:
        pytest.skip("Triton 3.6 is not installed")
    environment = {"RHTCOMM_KERNELS": kernel}
    if kernel == "gpu":
        environment["TRITON_INTERPRET"] = "1"
    lines = call_in_fresh_process(race, quantizers, **environment)
    seen: set[object] = set()
    for quantizer, line in zip(eval(quantizers), lines, strict=True):
        table = (type(quantizer), quantizer.bits, getattr(quantizer, "exact_fraction", 0))
        loads = 0 if table in seen else 1  # biased quantizers share a table with the others
        seen.add(table)
        assert line.split() == [str(loads), use(quantizer).hex()], quantizer


@needs_library
def test_plans_own_the_tables_that_they_point_into() -> None:
    for quantizer in QUANTIZERS:
        plans = cpu.plans_of(Codec(quantizer, 1, 1024).task(1024))
        arrays = [array for array in vars(plans.table).values() if hasattr(array, "size")]
        owned, (plan,) = {array.ctypes.data for array in arrays}, plans.array
        pointers = {plan.levels, plan.positions, plan.boundaries, plan.half_norms} - {None}
        assert pointers == owned, quantizer


def test_threads_that_rotate_at_once_get_the_same_bits() -> None:
    found: list[tuple[bytes, ...]] = []

    def work() -> None:
        found.append(tuple(use(QuicFL(4), rotations) for rotations in (1, 2, 3)))

    run_together(work, 8)
    work()
    assert len(found) == 9
    assert len(set(found)) == 1


# The cache itself --------------------------------------------------------------------------------


def test_a_value_is_built_once_however_many_threads_ask() -> None:
    count, built = 8, []
    inside = threading.Barrier(2)

    @once
    def value(name: str) -> object:
        built.append(name)
        with pytest.raises(threading.BrokenBarrierError):
            inside.wait(0.2)  # no second one comes
        return object()

    found: list[object] = []
    run_together(lambda: found.append(value("a")), count)
    assert built == ["a"]
    assert len(found) == count
    assert len(set(map(id, found))) == 1


def test_what_failed_is_built_anew() -> None:
    built = []

    @once
    def value() -> int:
        built.append(1)
        if len(built) == 1:
            raise OSError("the disk")
        return 5

    with pytest.raises(OSError, match="the disk"):
        value()
    assert value() == value() == 5
    assert len(built) == 2


def test_a_hit_does_not_wait_for_a_build() -> None:
    building, go_on = threading.Event(), threading.Event()

    @once
    def value(slow: bool) -> bool:
        if slow:
            building.set()
            assert go_on.wait(60)
        return slow

    assert value(False) is False
    thread = threading.Thread(target=value, args=(True,))
    thread.start()
    assert building.wait(60)
    assert value(False) is False  # or it would stand here
    go_on.set()
    thread.join()


def test_values_built_out_of_each_other_in_both_orders_do_not_lock() -> None:
    both = threading.Barrier(2)

    def meet() -> None:
        with suppress(threading.BrokenBarrierError):
            both.wait(0.2)  # with a lock for each cache, both would come here, and stand still

    @once
    def one(depth: int) -> int:
        meet()
        return 1 + other(depth - 1) if depth else 0

    @once
    def other(depth: int) -> int:
        meet()
        return 1 + one(depth - 1) if depth else 0

    found: list[int] = []
    threads = [
        threading.Thread(target=lambda f=f: found.append(f(3)), daemon=True) for f in (one, other)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [3, 3]


FORK = """
import os, signal, threading
from rhtcomm.once import once

building = threading.Event()

@once
def value():
    building.set()
    threading.Event().wait(0.3)  # while the other thread forks
    return 5

thread = threading.Thread(target=value)
thread.start()
building.wait()
child = os.fork()
if child == 0:
    signal.alarm(20)
    os._exit(value())
thread.join()
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_that_was_forked_during_a_build_does_not_hang() -> None:
    program = "import warnings; warnings.simplefilter('ignore')\n" + FORK
    assert in_fresh_process(program) == ["5"]


def tune() -> None:
    """For a process with the interpreter: a second thread launches while the first one times."""
    from rhtcomm.kernels import gpu

    torch.set_num_threads(1)
    timing, launched, timed = threading.Event(), threading.Event(), []

    class Clock(gpu.Tuner):
        least = 2

        def can_time(self, device: torch.device) -> bool:
            return True

        def seconds(self, call: object) -> float:
            timed.append(1)
            timing.set()
            assert launched.wait(60)
            return 1.0

    gpu.tuner = Clock()
    codec, x = Codec(QuicFL(4), block=256), torch.randn(1024)
    thread = threading.Thread(target=codec.encode, args=(x, Key(0)))
    thread.start()
    assert timing.wait(60)
    codec.encode(x, Key(0))
    candidates = len(timed)
    launched.set()
    thread.join()
    codec.encode(x, Key(0))
    print(candidates, len(timed), len(gpu.tuner.fastest))


@needs_triton
def test_tuning_holds_up_no_other_thread() -> None:
    interpreted = {"RHTCOMM_KERNELS": "gpu", "TRITON_INTERPRET": "1"}
    first, total, shapes = call_in_fresh_process(tune, **interpreted)[0].split()
    assert first == "1"
    assert int(total) <= 4
    assert shapes == "1"
