"""Time of the codec's kernels as a ratio to `copy_` of the same float32 bucket, in the same run.

    python benchmarks/kernels.py                     the table of README.md
    python benchmarks/kernels.py --hook              the whole hook against Gloo's all_reduce

Correctness first: a row is printed only after encode and decode gave, on the whole bucket, the bits
of the torch reference. Contestants are interleaved, so that a noisy machine disturbs all alike.
"""

import argparse
import functools
import socket
import statistics
import warnings
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import rhtcomm.hooks
from lib.machine import machine
from lib.report import table
from lib.timing import interleave, milliseconds
from rhtcomm.bench.contestants import Bucket
from rhtcomm.hooks.scales import Scales
from rhtcomm.kernels import Kernel, reference, use

KEY = rhtcomm.Key(seed=1)
FLOAT32 = "float32 all_reduce (Gloo)"

Times = dict[str, tuple[float, float, float]]  # quantiles, by contestant


def with_kernel(kernel: Kernel, action: Callable[[], torch.Tensor]) -> torch.Tensor:
    with use(kernel):
        return action()


class Case:
    """One codec on one bucket: encode, and decode of K payloads.

    As in the hook, results take the place of earlier ones: new memory costs time of its own.
    """

    def __init__(self, x: torch.Tensor, codec: rhtcomm.Codec) -> None:
        self.x, self.out, self.codec = x, torch.empty_like(x), codec
        self.coder = codec.coder(x.numel(), 1, x.device)
        self.payload = torch.empty(1, self.coder.nbytes, dtype=torch.uint8)

    def encode(self, rank: int = 0, world_size: int = 1) -> torch.Tensor:
        self.coder.encode(self.x, KEY, 0, rank, world_size, self.payload)
        return self.payload[0]

    def encode_by(self, kernel: Kernel, world_size: int = 1) -> torch.Tensor:
        return with_kernel(kernel, lambda: self.codec.encode(self.x, KEY, 0, world_size))

    def payloads(self, world_size: int) -> torch.Tensor:
        return torch.stack([self.encode(rank, world_size).clone() for rank in range(world_size)])

    def decode(self, payloads: torch.Tensor) -> torch.Tensor:
        return self.codec.decode_mean(payloads, KEY, self.x.numel(), out=self.out)

    def check(self, world_size: int) -> None:
        """Raise unless the kernel in use gives the bits of the reference."""
        payloads = self.payloads(world_size)
        mean = self.decode(payloads).clone()
        expected = with_kernel(reference, lambda: self.payloads(world_size))
        if not torch.equal(payloads, expected):
            raise AssertionError(f"encode differs from the reference: {self.codec}")
        if not torch.equal(mean, with_kernel(reference, lambda: self.decode(payloads))):
            raise AssertionError(f"decode differs from the reference: {self.codec}")


def codecs(quick: bool) -> dict[str, rhtcomm.Codec]:
    """By what the table calls them."""
    found = {
        f"k = {rotations}, b = {bits}": rhtcomm.Codec(rhtcomm.QuicFL(bits), rotations)
        for rotations in (1, 2)
        for bits in ((4,) if quick else (1, 2, 4, 8))
    }
    for bits in (4,) if quick else (1, 2, 4):
        found[f"ECDQ, b = {bits}"] = rhtcomm.Codec(rhtcomm.ECDQ(bits))
    return found


def equalizing(x: torch.Tensor) -> dict[str, Callable[[], object]]:
    """What equalize=True adds to a step: scales of a bucket x of matrices with rows of 1024."""
    parameters = list(torch.empty_like(x).view(-1, 1024).split(1600))
    scales, bucket = Scales(), x.clone()
    scales.learn(parameters, x)

    def apply() -> None:
        with scales.applied(parameters, [bucket], None):
            pass

    apply()
    if not torch.equal(bucket, x):
        raise AssertionError("a bucket that is divided by its scales and multiplied again differs")
    return {
        "equalize, divide and multiply": apply,
        "equalize, learn": lambda: scales.learn(parameters, bucket),
    }


def kernel_table(mebibytes: float, threads: int, rounds: int, quick: bool) -> None:
    torch.set_num_threads(threads)
    x = torch.randn(int(mebibytes * 2**18), generator=torch.Generator().manual_seed(0))
    copy = torch.empty_like(x)
    contestants: dict[str, Callable[[], object]] = {"copy_": lambda: copy.copy_(x)}
    for what, codec in codecs(quick).items():
        case = Case(x, codec)
        contestants[f"encode, {what}"] = case.encode
        for world_size in (1, 2) if quick else (1, 2, 8):
            case.check(world_size)
            payloads = case.payloads(world_size)
            contestants[f"decode K = {world_size}, {what}"] = functools.partial(
                case.decode, payloads
            )
    contestants |= equalizing(x)
    warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)  # deprecated
    contestants["bf16 cast round trip"] = lambda: copy.copy_(x.bfloat16())
    contestants["torch.quantize_per_tensor round trip"] = lambda: torch.quantize_per_tensor(
        x, 0.05, 128, torch.quint8
    ).dequantize()
    times = interleave(contestants, rounds)
    slow = Case(x, rhtcomm.Codec(rhtcomm.QuicFL(4), 2))
    slow_payloads = slow.payloads(1)
    times |= interleave(
        {
            "reference encode, k = 2, b = 4": lambda: slow.encode_by(reference),
            "reference decode K = 1, k = 2, b = 4": lambda: with_kernel(
                reference, lambda: slow.decode(slow_payloads)
            ),
        },
        3,
    )
    floor = times["copy_"][1]
    print(f"\n{mebibytes:g} MiB of float32, {threads} thread(s), {rounds} rounds\n")
    rows = []
    for name, seconds in times.items():
        median = seconds[1]
        rate = f"{4e-9 * x.numel() / median:.2f}"
        rows.append([name, *milliseconds(seconds), rate, f"{median / floor:.2f}"])
    header = ["", "median, ms", "10% .. 90%, ms", "GB/s of input", "ratio to copy_"]
    print(table(header, rows), end="")
    both = ("encode, k = 2, b = 4", "decode K = 1, k = 2, b = 4")
    factor = sum(times[f"reference {name}"][1] for name in both) / sum(
        times[name][1] for name in both
    )
    print(f"\nEncode plus decode, k = 2, b = 4: {factor:.0f} times faster than the reference.")
    ratios = ", ".join(
        f"{what} {times[f'{what}, ECDQ, b = 4'][1] / times[f'{what}, k = 2, b = 4'][1]:.2f}"
        for what in ("encode", "decode K = 1", "decode K = 2")
    )
    print(f"ECDQ with one transform takes, of QUIC-FL's time with two at b = 4: {ratios}.")
    added = sum(seconds[1] for name, seconds in times.items() if name.startswith("equalize"))
    codec_time = sum(times[f"{what}, k = 2, b = 4"][1] for what in ("encode", "decode K = 2"))
    print(f"equalize=True adds {added / codec_time:.2f} of QUIC-FL's encode and decode K = 2.")


def hook_rank(
    rank: int, port: int, mebibytes: float, rounds: int, results: "mp.SimpleQueue[Times]"
) -> None:
    """The exchange of one bucket between 2 ranks on loopback, by the hook; rank 0 tells times."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    x = torch.randn(int(mebibytes * 2**18), generator=torch.Generator().manual_seed(rank))
    mean = x.clone()
    dist.all_reduce(mean)
    mean /= 2
    raw = x.clone()
    contestants: dict[str, Callable[[], object]] = {FLOAT32: lambda: dist.all_reduce(raw)}
    for bits in (2, 4, 8):
        state, bucket = rhtcomm.hooks.RHTState(bits=bits, warmup_steps=0), Bucket.of(x)

        def exchange(state: rhtcomm.hooks.RHTState = state, bucket: Bucket = bucket) -> None:
            rhtcomm.hooks.rht_hook(state, bucket).wait()  # type: ignore[arg-type]

        exchange()
        error = ((bucket.tensor - mean).square().sum() / mean.square().sum()).item()
        bound = 0.5 * 4.0 ** (2 - bits)
        if not error < bound:
            raise AssertionError(f"the mean at {bits} bits is off: NMSE {error}")
        contestants[f"rhtcomm, b = {bits}"] = exchange
    times = interleave(contestants, rounds)
    if rank == 0:
        results.put(times)
    dist.barrier()
    dist.destroy_process_group()


def hook_table(mebibytes: float, rounds: int, starts: int) -> None:
    """Medians over several starts of the processes, between which float32's own time varies."""
    found: list[Times] = []
    for _ in range(starts):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        results: mp.SimpleQueue[Times] = mp.get_context("spawn").SimpleQueue()
        mp.spawn(hook_rank, (port, mebibytes, rounds, results), nprocs=2)
        found.append(results.get())
    print(f"\n{mebibytes:g} MiB of float32, 2 ranks on loopback, 1 thread each, {rounds} rounds in")
    print(f"each of {starts} starts; medians over the starts (least .. most)\n")
    rows = []
    for name in found[0]:
        medians = [1e3 * times[name][1] for times in found]
        ratios = [times[name][1] / times[FLOAT32][1] for times in found]
        rows.append([name, _spread(medians, ".1f"), _spread(ratios, ".2f")])
    print(table(["", "median, ms", "ratio to float32 of the same start"], rows), end="")


def _spread(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} .. {max(values):{form}})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mebibytes", type=float, default=25)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--quick", action="store_true", help="b = 4 and K = 1, 2 only")
    parser.add_argument("--hook", action="store_true", help="the whole exchange on loopback")
    parser.add_argument("--starts", type=int, default=5, help="of the ranks, with --hook")
    arguments = parser.parse_args()
    print(machine())
    if arguments.hook:
        hook_table(arguments.mebibytes, arguments.rounds, arguments.starts)
        return
    for threads in arguments.threads:
        kernel_table(arguments.mebibytes, threads, arguments.rounds, arguments.quick)


if __name__ == "__main__":
    main()
