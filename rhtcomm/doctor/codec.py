"""Whether the codec gives the known answers, and how fast."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import blake2b

import numpy as np
import torch

from rhtcomm.codec import Codec
from rhtcomm.doctor.answers import ANSWERS
from rhtcomm.doctor.finding import Finding
from rhtcomm.doctor.kernels import loaded
from rhtcomm.kernels import choose, cpu
from rhtcomm.quantizers import ECDQ, Eden, Quantizer, QuicFL, VectorQuantizer
from rhtcomm.randomness import Key

__all__ = ["KEY", "NUMEL", "RANKS", "answer", "clock", "codecs", "input_of", "known_answers"]

NUMEL, RANKS, BLOCK = 600, 2, 256  # two blocks and a shorter one
KEY = Key(seed=20, step=3, bucket=1)
EXACT = 1 / 512
# How often a copy of the same tensor fits into encoding and decoding it with 4 bits. C kernels take
# 20 to 80 copies, by instruction set and processor.
MOST = 200
# Nor are they slower than this, in GB/s of float32.
LEAST = 0.1


def codecs() -> Iterator[tuple[str, Callable[[], Codec]]]:
    """Each quantizer at each number of bits, with one to three rotations in turn.

    To be made when it is its turn, as a damaged table concerns some of them only.
    """
    quantizers: list[tuple[str, Callable[[], Quantizer]]] = [
        *((f"QuicFL {bits}", partial(QuicFL, bits)) for bits in range(1, 9)),
        *((f"QuicFL {bits}, exact", partial(QuicFL, bits, EXACT)) for bits in range(1, 9)),
        *((f"Eden {bits}", partial(Eden, bits)) for bits in range(1, 9)),
        *((f"VectorQuantizer {bits}", partial(VectorQuantizer, bits)) for bits in (1, 2, 4)),
        *((f"ECDQ {half / 2:g}", partial(ECDQ, half / 2)) for half in range(2, 13)),
    ]
    for number, (name, quantizer) in enumerate(quantizers):
        rotations = 1 + number % 3
        yield f"{name}, {rotations} rotations", partial(_codec, quantizer, rotations)


def _codec(quantizer: Callable[[], Quantizer], rotations: int) -> Codec:
    return Codec(quantizer(), rotations, BLOCK)


def input_of(rank: int) -> torch.Tensor:
    """(NUMEL,) float32, nearly Gaussian: sums of eight random bytes, by exact operations."""
    words = np.random.PCG64(1000 + rank).random_raw(NUMEL)
    sums = words[:, None].view(np.uint8).reshape(NUMEL, 8).sum(axis=1, dtype=np.int64) - 1020
    integers = (sums << 13) + (words & np.uint64(0x1FFF)).astype(np.int64)
    return torch.from_numpy(np.ldexp(integers.astype(np.float32), -6 - rank))


def answer(codec: Codec, device: str = "cpu") -> str:
    """A hash of the payloads of all ranks, and of the bits of their mean."""
    payloads = torch.stack(
        [codec.encode(input_of(rank).to(device), KEY, rank, RANKS) for rank in range(RANKS)]
    )
    mean = codec.decode_mean(payloads, KEY, NUMEL)
    octets = payloads.cpu().numpy().tobytes() + mean.cpu().numpy().tobytes()
    return blake2b(octets, digest_size=8).hexdigest()


def known_answers() -> list[Finding]:
    """Whether all kernels that this process would use give the bits of the reference."""
    if reason := _why_not():
        return [Finding("remark", "known answers", f"not tried: {reason}")]
    return [_known_answers_on(device) for device in _devices()]


def _known_answers_on(device: str) -> Finding:
    wrong = []
    for name, codec in codecs():
        try:
            if answer(codec(), device) != ANSWERS[name]:
                wrong.append(name)
        except Exception as error:  # such as of a damaged table
            wrong.append(f"{name} ({' '.join(str(error).split())[:100]})")
    if wrong:
        fact = f"{len(wrong)} of {len(ANSWERS)} are wrong on {device}, such as {wrong[0]}"
        remedy = "do not train with it: install rhtcomm again, or try RHTCOMM_CPU=baseline"
        return Finding("problem", "known answers", fact, remedy)
    return Finding("ok", "known answers", f"all {len(ANSWERS)} are right on {device}")


def clock() -> list[Finding]:
    """The speed of a codec run, in times of a copy."""
    if _why_not():
        return []
    return [_clock_on(device) for device in _devices()]


def _clock_on(device: str) -> Finding:
    x = torch.randn(1 << (24 if device == "cuda" else 18), device=device)
    codec, copy = Codec(QuicFL(4)), torch.empty_like(x)
    payloads = codec.encode(x, KEY)[None]
    # The least of many: what else runs on the machine only makes them slower.
    copying = _least(partial(copy.copy_, x), device)
    encoding = _least(partial(codec.encode, x, KEY), device)
    decoding = _least(partial(codec.decode_mean, payloads, KEY, x.numel()), device)
    ratio = (encoding + decoding) / copying
    speed = x.nbytes / 1e9 / (encoding + decoding)
    fact = f"encoding and decoding 4 bits on {device}: {speed:.2g} GB/s, the "
    fact += f"time of {ratio:.0f} copies"
    if ratio > MOST or speed < LEAST:
        fact += f"; usual are {LEAST:g} GB/s or more, and {MOST} copies or fewer"
        remedy = "see the lines on kernels, threads and cores; is the machine busy or throttled?"
        if ratio <= MOST:
            fact += "; a plain copy was slow, too"
            remedy = "end other programs; see the line on cores; is the processor throttled?"
        return Finding("remark", "codec", fact, remedy, key="slow")
    return Finding("ok", "codec", fact, key="fast")


def _devices() -> list[str]:
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def _why_not() -> str:
    """Why the codec cannot run here; empty if it can. The line on kernels has the remedy."""
    path = cpu.library_path()
    if path and loaded(path)[1].startswith("loading it"):
        return "the C kernels would end this process"
    try:
        choose("cpu", QuicFL)
    except (RuntimeError, ValueError):
        return "no kernel can be chosen"
    return ""


def _least(work: Callable[[], object], device: str, seconds: float = 0.15) -> float:
    """The least time that one call took within about so many seconds."""
    least, end = float("inf"), time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        least = min(least, now - start)
        if now > end:
            return least
