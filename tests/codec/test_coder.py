"""The hot path: what `Codec.coder` makes does what the codec does, and costs next to nothing."""

import cProfile
import pstats
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from libraries import FRACTION, needs_library, variants
from problems import gaussian

from rhtcomm import ECDQ, Codec, Eden, Key, PayloadError, QuicFL, VectorQuantizer
from rhtcomm.kernels import Kernel, Task, kernel_for, reference, use

KEY = Key(seed=5, step=6, bucket=7, hop=1)
BLOCK = 256
CODECS = [
    Codec(QuicFL(4), block=BLOCK),
    Codec(QuicFL(3, FRACTION), 1, BLOCK),
    Codec(Eden(2), "auto", BLOCK),
    Codec(VectorQuantizer(2), block=BLOCK),
    Codec(ECDQ(2.5), block=BLOCK),
]
CPU = torch.device("cpu")


def slots(*shape: int, nbytes: int) -> torch.Tensor:
    """(..., nbytes) uint8, rows of which lie 12 bytes further apart than they are long."""
    return torch.full((*shape, nbytes + 12), 0xA5, dtype=torch.uint8)


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("shards", [1, 3])
def test_it_gives_what_the_codec_gives(codec: Codec, shards: int) -> None:
    """Of two ranks, each in shards, in rows that are longer than their payloads."""
    numel = 3 * 2 * BLOCK if shards > 1 else 5 * BLOCK + 77
    offset, rank, world_size, each = 7 * BLOCK, 1, 4, numel // shards
    coder, xs = codec.coder(numel, shards), [gaussian(numel, rank) for rank in range(2)]
    assert coder.nbytes == codec.nbytes(each)
    payloads = slots(2, shards, nbytes=coder.nbytes)
    for i, (x, row) in enumerate(zip(xs, payloads, strict=True)):
        coder.encode(x, KEY, offset, rank + i, world_size, row)
        expected = codec.encode(x, KEY, rank + i, world_size, offset=offset, shards=shards)
        assert torch.equal(row[:, :-12], expected)
    assert bool((payloads[..., -12:] == 0xA5).all())
    out = torch.empty(numel, dtype=torch.bfloat16)
    wanted = coder.decode(payloads, KEY, offset, rank, world_size, out)
    assert wanted == codec.wanted_rotations(payloads.flatten(0, 1))
    means = [
        codec.decode_mean(
            payloads[:, i, :-12],
            KEY,
            each,
            offset=offset + i * each,
            first_rank=rank,
            world_size=world_size,
        )
        for i in range(shards)
    ]
    assert torch.equal(out, torch.cat(means).bfloat16())


@needs_library
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_kernels_agree_on_ranks_in_shards(codec: Codec) -> None:
    numel, found = 3 * 2 * BLOCK, []
    kernels: list[Kernel] = [reference, *variants().values()]
    for kernel in kernels:
        with use(kernel):
            coder = codec.coder(numel, 3)
        payloads, out = slots(2, 3, nbytes=coder.nbytes), torch.empty(numel)
        for rank in range(2):
            coder.encode(gaussian(numel, rank), KEY, 0, rank, 2, payloads[rank])
        coder.decode(payloads, KEY, 0, 0, 2, out)
        found.append((payloads, out))
    for payloads, out in found[1:]:
        assert torch.equal(payloads, found[0][0])
        assert torch.equal(out, found[0][1])


def test_rotations_and_wishes_go_along() -> None:
    codec, x = Codec(QuicFL(4), "auto"), gaussian(9000)
    coder, out, payload = codec.coder(9000), torch.empty(9000), slots(1, nbytes=codec.nbytes(9000))
    for rotations, wanted in ((None, None), (1, None), (3, 2)):
        coder.encode(x, KEY, 0, 0, 1, payload, rotations, wanted)
        assert torch.equal(
            payload[0, :-12], codec.encode(x, KEY, rotations=rotations, wanted=wanted)
        )
        assert coder.decode(payload[None], KEY, 0, 0, 1, out) == (wanted or 1)
    few = torch.zeros(4096)
    few[:3] = torch.tensor([1.0, 0.6, 0.3])
    coder, payload = codec.coder(4096), slots(2, nbytes=codec.nbytes(4096))
    for rank, x in enumerate((gaussian(4096), few)):
        coder.encode(x, KEY, 0, rank, 2, payload[rank : rank + 1])
    assert coder.decode(payload[:, None], KEY, 0, 0, 2, torch.empty(4096)) == 2


def test_headers_are_checked() -> None:
    codec = CODECS[0]
    coder, out = codec.coder(2 * BLOCK, 2), torch.zeros(2 * BLOCK)
    payloads = slots(1, 2, nbytes=coder.nbytes)
    coder.encode(gaussian(2 * BLOCK), KEY, BLOCK, 2, 3, payloads[0])
    with pytest.raises(PayloadError, match=r"rank 2 was made for another.*offset=256, numel=256"):
        coder.decode(payloads.flip(1), KEY, BLOCK, 2, 3, out)
    with pytest.raises(PayloadError, match="of rank 1 was made for another"):
        coder.decode(payloads, KEY, BLOCK, 1, 3, out)
    assert not out.any(), "it was decoded all the same"


def test_lengths_are_checked_once() -> None:
    codec = CODECS[0]
    for numel, shards, fault in (
        (-1, 1, "numel=-1 must not be negative"),
        (
            600,
            2,
            "Codec.coder: 600 coordinates cannot be split into 2 equal shards of whole blocks "
            "of 256",
        ),
        (600, 0, "cannot be split into 0 equal shards"),
    ):
        with pytest.raises(ValueError, match=fault):
            codec.coder(numel, shards)
    with pytest.raises(TypeError):
        codec.coder(600.5)  # type: ignore[arg-type]


def test_it_is_kept_for_each_length_and_kernel() -> None:
    codec = Codec(QuicFL(4))
    coder = codec.coder(5000)
    assert codec.coder(5000, 1, CPU) is coder
    assert codec.coder(5001) is not coder
    with use(reference):
        assert codec.coder(5000) is codec.coder(5000)
        assert (codec.coder(5000) is coder) == (kernel_for(CPU, QuicFL(4)) is not reference)
    assert codec.coder(5000) is coder


class Recorder:
    """A kernel that writes down what it is asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Task]] = []

    def encode(self, task: Task, *_: object) -> None:
        self.calls.append(("encode", task))

    def decode(self, task: Task, *_: object) -> None:
        self.calls.append(("decode", task))


def test_a_kernel_is_called_once_whatever_sections_there_are() -> None:
    codec, kernel = Codec(QuicFL(4)), Recorder()
    with use(kernel):
        for numel in (0, 100, 4096, 4096 + 100):
            codec.decode_mean(codec.encode(torch.zeros(numel), KEY)[None], KEY, numel)
    assert [name for name, _ in kernel.calls] == ["encode", "decode"] * 4
    for (_, one), (_, other) in zip(kernel.calls[::2], kernel.calls[1::2], strict=True):
        assert one is other, "plans are kept by the task"
    assert [len(task.sections) for _, task in kernel.calls[::2]] == [0, 1, 1, 2]


def test_a_kernel_is_used_on_all_threads_and_given_back() -> None:
    found: list[Kernel] = []
    before = kernel_for(CPU, QuicFL(4))

    def look() -> None:
        found.append(kernel_for(CPU, QuicFL(4)))

    def fail() -> None:
        with use(reference):
            thread = threading.Thread(target=look)
            thread.start()
            thread.join()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert found == [reference]
    assert kernel_for(CPU, QuicFL(4)) is before


def calls_of(function: Callable[[], Any], times: int = 20) -> float:
    """Calls of Python functions and built-in ones, per call of the function."""
    function()
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(times):
        function()
    profile.disable()
    return pstats.Stats(profile).total_calls // times - 1  # type: ignore[attr-defined]


@needs_library
def test_a_call_is_few_calls() -> None:
    codec, x = Codec(QuicFL(4)), gaussian(5000)
    coder, out = codec.coder(5000), torch.empty(5000)
    payloads = torch.empty(2, 1, coder.nbytes, dtype=torch.uint8)
    for rank in range(2):
        coder.encode(x, KEY, 0, rank, 2, payloads[rank])
    row = payloads[0]
    assert calls_of(lambda: coder.encode(x, KEY, 0, 0, 2, row)) <= 16
    assert calls_of(lambda: coder.decode(payloads, KEY, 0, 0, 2, out)) <= 24
