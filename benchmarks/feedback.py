"""Time of the kernels in an exchange with error feedback, as a ratio to the same without.

    python benchmarks/feedback.py

One process makes the kernels' calls that one of n ranks makes for a bucket of float32:

    all_gather: encode; decode the mean of n payloads
    two_shot:   encode n shards; decode the mean of one, encode it; decode n shards

and with feedback, first the check of what the ranks announce. Contestants take turns. A time counts
only because the same run gave, on the whole bucket, the bits of the torch reference.
"""

import argparse
import time
from collections.abc import Callable, Iterator

import torch

import rhtcomm
from lib.machine import machine
from lib.report import table
from lib.timing import interleave
from rhtcomm.kernels import Feedback, Residual, reference, use
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
        """Raise unless the kernel in use gives the bits of the reference, and then start anew."""
        found = []
        before = self.residual.clone()
        for kernel in (None, reference):
            self.x.copy_(self.xs[0])
            self.residual.copy_(before)
            if kernel is None:
                self.run(feedback=True)
            else:
                with use(kernel):
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


def rows(given: argparse.Namespace) -> Iterator[list[str]]:
    numel = int(given.mebibytes * 2**18)
    copy, source = torch.empty(numel), torch.randn(numel)
    for bits in given.bits:
        for name, quantizer in quantizers(bits).items():
            if given.only and name not in given.only:
                continue
            for ranks in given.ranks:
                contestants: dict[str, Callable[[], object]] = {"copy": lambda: copy.copy_(source)}
                for algorithm, shards in (("all_gather", 1), ("two_shot", ranks)):
                    made = Exchange(rhtcomm.Codec(quantizer), numel, ranks, shards)
                    Exchange(rhtcomm.Codec(quantizer), 1 << 18, ranks, shards).check()
                    for feedback in (False, True):
                        what = f"{algorithm} {feedback}"
                        contestants[what] = lambda made=made, feedback=feedback: made.run(feedback)
                times = interleave(contestants, given.rounds, time.process_time)
                floor = times["copy"][1]
                for algorithm in ("all_gather", "two_shot"):
                    without, with_feedback = (
                        times[f"{algorithm} {feedback}"][1] for feedback in (False, True)
                    )
                    yield [
                        *(name, str(bits), str(ranks), algorithm),
                        *(f"{without / floor:.2f}", f"{with_feedback / floor:.2f}"),
                        f"{with_feedback / without:.2f}",
                    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mebibytes", type=float, default=25)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 2])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--only", nargs="+")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    header = ["quantizer", "bits", "ranks", "algorithm", "without / copy_", "with / copy_", "ratio"]
    print(table(header, rows(given), left=(0, 3)), end="")


if __name__ == "__main__":
    main()
