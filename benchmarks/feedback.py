"""Time of the kernels in an exchange with error feedback, as a ratio to the same without.

    python benchmarks/feedback.py            (writes results/feedback.md)

One process makes the kernels' calls that one of n ranks makes for a bucket of float32:

    all_gather: encode; decode the mean of n payloads
    two_shot:   encode n shards; decode the mean of one, encode it; decode n shards

and with feedback, first the check of what the ranks announce. Times are of the processor, with one
thread; contestants take turns. Before each case is timed, it must give the bits of the torch
reference for a bucket of 1 MiB.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial

import torch

import rhtcomm
from lib.report import RESULTS, heading, table
from lib.timing import interleave
from rhtcomm.kernels import Feedback, Residual, reference, use
from rhtcomm.kernels.cpu import Library, library_path
from rhtcomm.reduce.residual import Update
from rhtcomm.segments import Segments

KEY = rhtcomm.Key(seed=1)
NOTHING = torch.zeros(4, dtype=torch.uint8)


class Exchange:
    """What rank 0 of n computes; the others' payloads are made once."""

    def __init__(self, codec: rhtcomm.Codec, numel: int, ranks: int, shards: int) -> None:
        self.codec, self.ranks, self.shards = codec, ranks, shards
        draw = torch.Generator().manual_seed(0)
        self.xs = torch.randn(ranks, numel, generator=draw)
        self.x = self.xs[0].clone()
        self.residual = torch.randn(numel, generator=draw) / 8
        self.before = self.residual.clone()
        self.bound = self.residual.abs().max().view(1)  # the hook knows one
        whole, mine = codec.coder(numel, shards), codec.coder(numel // shards)
        self.sent = torch.empty(ranks, shards, whole.nbytes, dtype=torch.uint8)
        for rank in range(1, ranks):
            whole.encode(self.xs[rank], KEY, 0, rank, ranks, self.sent[rank])
        # In the second hop each rank owns a shard; the means of the others are some numbers.
        self.gathered = torch.empty(1, shards, whole.nbytes, dtype=torch.uint8)
        self.mean = torch.empty(numel // shards)
        again = KEY.next_hop()
        for rank, shard in enumerate(self.xs[0].split(numel // shards)):
            offset = rank * (numel // shards)
            mine.encode(shard, again, offset, 0, 1, self.gathered[:, rank])

    def reset(self) -> None:
        """Undo what `run` did: with the same key again, the residual would depend on the dither."""
        self.x.copy_(self.xs[0])
        self.residual.copy_(self.before)

    def run(self, feedback: bool) -> None:
        residual = None
        if feedback:
            residual = Residual.of([self.residual], self.bound)
            update = Update(residual, Segments(None, self.x.numel()))
            update.announce(self.x, NOTHING)
        again, n, numel = KEY.next_hop(), self.ranks, self.x.numel()
        whole = self.codec.coder(numel, self.shards)
        whole.encode(self.x, KEY, 0, 0, n, self.sent[0], residual=residual)
        own, payloads, mean = self.sent[0], self.sent, None
        key, world_size = KEY, n
        if self.shards > 1:
            mine = self.codec.coder(numel // self.shards)
            mine.decode(self.sent[:, :1], KEY, 0, 0, n, self.mean)
            mine.encode(self.mean, again, 0, 0, 1, self.gathered[:, 0])
            payloads, mean, key, world_size = self.gathered, self.mean, again, 1
        given = None
        if residual is not None:
            given = Feedback(residual, KEY, 0, n, own, mean, 0, n)
        whole.decode(payloads, key, 0, 0, world_size, self.x, given)

    def check(self) -> None:
        """Raise unless the kernel in use gives the bits of the reference."""
        found = []
        for kernel in (None, reference):
            self.reset()
            with nullcontext() if kernel is None else use(kernel):
                self.run(feedback=True)
            found.append((self.x.clone(), self.residual.clone(), self.sent[0].clone()))
        if not all(torch.equal(one, other) for one, other in zip(*found, strict=True)):
            raise AssertionError("the kernels differ from the reference")


def quantizers(bits: int) -> dict[str, rhtcomm.quantizers.Quantizer]:
    return {
        "QUIC-FL": rhtcomm.QuicFL(bits),
        "EDEN": rhtcomm.Eden(bits, biased=True),
        "ECDQ": rhtcomm.ECDQ(bits),
    }


def ratios(
    quantizer: rhtcomm.quantizers.Quantizer, numel: int, ranks: int, rounds: int
) -> Iterator[list[str]]:
    """Cells of a row for each algorithm."""
    copy, source = torch.empty(numel), torch.randn(numel)
    contestants: dict[str, Callable[[], object]] = {"copy_": partial(copy.copy_, source)}
    codec, made = rhtcomm.Codec(quantizer), []
    for algorithm, shards in (("all_gather", 1), ("two_shot", ranks)):
        Exchange(codec, 1 << 18, ranks, shards).check()
        made.append(Exchange(codec, numel, ranks, shards))
        contestants[algorithm] = partial(made[-1].run, feedback=False)
        contestants[f"{algorithm} with feedback"] = partial(made[-1].run, feedback=True)

    def before() -> None:
        for exchange in made:
            exchange.reset()
        copy.copy_(source)  # so that all begin with the same in the caches

    times = interleave(contestants, rounds, time.process_time, before)
    floor = times["copy_"][1]
    for algorithm in ("all_gather", "two_shot"):
        plain, more = times[algorithm][1], times[f"{algorithm} with feedback"][1]
        yield [algorithm, f"{plain / floor:.2f}", f"{more / floor:.2f}", f"{more / plain:.2f}"]


def rows(given: argparse.Namespace) -> Iterator[list[str]]:
    path = library_path()
    assert path is not None, "the C kernels were not built"
    numel = int(given.mebibytes * 2**18)
    for variant in given.kernels:
        with use(Library(path, variant)):
            for bits in given.bits:
                for name, quantizer in quantizers(bits).items():
                    for ranks in given.ranks:
                        for cells in ratios(quantizer, numel, ranks, given.rounds):
                            yield [variant, name, str(bits), str(ranks), *cells]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mebibytes", type=float, default=25)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 2])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--kernels", nargs="+", default=["avx2", "avx512vbmi"])
    given = parser.parse_args()
    torch.set_num_threads(1)
    header = ["kernels", "quantizer", "bits", "ranks", "algorithm"]
    header += ["without / copy_", "with / copy_", "ratio"]
    text = f"{heading()}\n{given.mebibytes:g} MiB of float32, medians of {given.rounds} rounds.\n\n"
    text += table(header, rows(given), left=(0, 1, 4))
    (RESULTS / "feedback.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
