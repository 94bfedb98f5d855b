"""One Reducer over many steps, against rhtcomm.all_reduce afresh in each of them."""

import gc
import math
from itertools import count
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from groups import Alone, two_levels
from harness import Ranks
from problems import nmse, numbers
from simulation import ALGORITHMS, BLOCK, CODEC, chunks_of, same_bits

import rhtcomm
from rhtcomm import Codec, Eden, Key, Lattice, QuicFL
from rhtcomm.communicators import Topology
from rhtcomm.reduce import Algorithm, Reducer, reducer
from rhtcomm.segments import Segments

STEPS = 4
FEEDBACK = Codec(Eden(4, biased=True), block=BLOCK)
AUTO = Codec(QuicFL(4), "auto", 4096)


def values(rank: int, step: int, bucket: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    return ((rank + 1) * numbers(rank, step, bucket, shape=(numel,))).to(dtype)


# ---- Bits -------------------------------------------------------------------------------------

# Buckets of a step: length, dtype, lengths of segments.
BUCKETS: list[tuple[int, torch.dtype, tuple[int, ...] | None]] = [
    (20 * BLOCK + 77, torch.float32, (1000, 0, 20 * BLOCK - 923)),
    (20 * BLOCK + 77, torch.float32, None),  # the same length, as one segment
    (20 * BLOCK + 77, torch.bfloat16, None),  # but of another dtype
    (9 * BLOCK, torch.float16, (BLOCK, 8 * BLOCK)),
    (1999, torch.float32, (999, 1000)),  # not compressed
]
CASES: dict[str, dict[str, Any]] = {
    **{algorithm: {"algorithm": algorithm} for algorithm in ALGORITHMS},
    "chunks": {"algorithm": "two_shot", "chunks": 3},
    "feedback": {"codec": FEEDBACK, "algorithm": "two_shot"},
    "lattice": {"codec": Lattice(4, block=BLOCK)},
    "two levels": {"nodes": 2},
    "two levels, feedback": {"codec": FEEDBACK, "nodes": 2},
    "one rank, feedback": {"codec": FEEDBACK},
}


def reduce_in_steps(rank: int, world_size: int, case: str) -> list[torch.Tensor]:
    """By one reducer; asserts that all_reduce gives the same."""
    options = dict(CASES[case])
    codec, algorithm = options.get("codec", CODEC), options.get("algorithm", "auto")
    communicator: Topology = rhtcomm.TorchCommunicator()
    if "nodes" in options:
        communicator = two_levels(rank, options["nodes"], world_size // options["nodes"])
    kept = Reducer(codec, communicator, algorithm, min_numel=2000)
    residuals: dict[tuple[bool, int], torch.Tensor] = {}
    results = []
    with chunks_of(options.get("chunks", 1 << 10)):
        for step in range(STEPS):
            for bucket, (numel, dtype, lengths) in enumerate(BUCKETS):
                means, key = [], Key(5, step, bucket)
                for fresh in (False, True):
                    residual = None
                    if codec is FEEDBACK:
                        residual = residuals.setdefault((fresh, bucket), torch.zeros(numel))
                    mean = values(rank, step, bucket, numel, dtype)
                    if lengths is not None and step > 1:
                        mean[: lengths[0]] = 0  # unused from now on
                    if step == 2:
                        mean[-1] = torch.nan  # a residual is not touched then
                    if fresh:
                        report = rhtcomm.all_reduce(
                            *(mean, codec, key, communicator),
                            algorithm=algorithm,
                            min_numel=2000,
                            segments=lengths,
                            check=False,
                            residual=residual,
                        )
                    else:
                        report = kept.mean_(mean, key, lengths=lengths, residual=residual)
                    means += [mean, report.bytes_sent, report.rotations]
                assert same_bits(means[0], means[3]), f"step {step}, bucket {bucket}"
                assert means[1:3] == means[4:]
                if residuals:
                    assert same_bits(residuals[False, bucket], residuals[True, bucket])
                    assert residuals[False, bucket].isfinite().all()
                results.append(means[0])
    return results


@pytest.mark.parametrize("case", CASES)
def test_one_reducer_gives_the_bits_of_fresh_calls(case: str, ranks: Ranks) -> None:
    world_size = 1 if "one rank" in case else 4 if "two levels" in case else 3
    outcomes = ranks.run(reduce_in_steps, world_size, case)
    for results in outcomes[1:]:
        for mean, first in zip(results, outcomes[0], strict=True):
            assert same_bits(mean, first)
    for index, mean in enumerate(outcomes[0]):
        step, bucket = divmod(index, len(BUCKETS))
        if step < 2:
            inputs = [
                values(rank, step, bucket, *BUCKETS[bucket][:2]) for rank in range(world_size)
            ]
            exact = torch.stack(inputs).double().mean(0)
            assert nmse(mean.double(), exact) < (0.2 if codec_is_lossy(bucket) else 1e-5)


def codec_is_lossy(bucket: int) -> bool:
    return BUCKETS[bucket][0] >= 2000


# ---- Routes -----------------------------------------------------------------------------------


def count_routes(rank: int, world_size: int, algorithm: Algorithm) -> list[tuple[int, int]]:
    """How often segments and coders are worked out, after each step."""
    kept = Reducer(CODEC, rhtcomm.TorchCommunicator(), algorithm, min_numel=2000)
    made: dict[str, int] = {"segments": 0, "coders": 0}
    after_steps = []

    def counting(name: str, of: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            made[name] += 1
            return of(*args, **options)

        return call

    with (
        mock.patch.object(reducer, "Segments", counting("segments", Segments)),
        mock.patch.object(Codec, "coder", counting("coders", Codec.coder)),
    ):
        for step in range(3):
            for bucket, (numel, dtype, lengths) in enumerate(BUCKETS):
                x = values(rank, step, bucket, numel, dtype)
                kept.mean_(x, Key(0, step, bucket), lengths=lengths)
            after_steps.append((made["segments"], made["coders"]))
    return after_steps


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_routes_are_made_once(algorithm: Algorithm, ranks: Ranks) -> None:
    for first, *later in ranks.run(count_routes, 3, algorithm):
        assert first[0] == len(BUCKETS)
        assert first[1] >= sum(map(codec_is_lossy, range(len(BUCKETS))))
        assert later == [first, first]


def test_the_number_of_routes_is_bounded() -> None:
    """Of a program whose tensors have new lengths for ever."""
    kept = Reducer(CODEC, Alone(), min_numel=0)
    for numel in range(1, 3001):
        kept.mean_(torch.ones(numel), Key(0))
    routes = [thing for thing in gc.get_objects() if type(thing) is reducer.Route]
    assert 0 < len(routes) <= 1024


# ---- Wishes -----------------------------------------------------------------------------------


def wish_in_steps(rank: int, world_size: int) -> list[tuple[int, int | None, int | None]]:
    """Bucket 0 is spiky on rank 1 in steps 2 and 3, bucket 1 never; then bucket 1 is longer."""
    kept, told = Reducer(AUTO, rhtcomm.TorchCommunicator()), []
    for step in range(6):
        for bucket in range(2):
            numel = (8 + 4 * (bucket == 1 and step > 3)) * 4096
            x = values(rank, step, bucket, numel, torch.float32)
            if bucket == 0 and rank == 1 and step in (2, 3):
                x[5::4096] *= 1000
            report = kept.mean_(x, Key(0, step, bucket))
            told.append((bucket, report.rotations, report.wanted_rotations))
    return told


def test_the_next_step_takes_what_the_ranks_want(ranks: Ranks) -> None:
    for told in ranks.run(wish_in_steps, 2):
        of_bucket = [[report[1:] for report in told if report[0] == bucket] for bucket in range(2)]
        assert of_bucket[0] == [(2, 1), (1, 1), (1, 2), (2, 2), (2, 1), (1, 1)]
        # Of another length it is another bucket, which begins with the safe number.
        assert of_bucket[1] == [(2, 1), (1, 1), (1, 1), (1, 1), (2, 1), (1, 1)]


def wish_by_hand(rank: int, world_size: int) -> None:
    """What a reducer remembers gives the bits of all_reduce that is told so."""
    communicator = rhtcomm.TorchCommunicator()
    kept, rotations = Reducer(AUTO, communicator), None
    for step in range(4):
        x = values(rank, step, 0, 8 * 4096, torch.float32)
        x[5::4096] *= 1000 if step == 1 else 1
        y, key = x.clone(), Key(0, step)
        kept.mean_(x, key)
        report = rhtcomm.all_reduce(y, AUTO, key, communicator, rotations=rotations)
        rotations = report.wanted_rotations
        assert same_bits(x, y)
        assert kept.wishes == {(0, 8 * 4096): rotations}
        assert rotations == (2 if step == 1 else 1)


def test_wishes_are_kept_as_all_reduce_returns_them(ranks: Ranks) -> None:
    ranks.run(wish_by_hand, 2)


# ---- Reports ----------------------------------------------------------------------------------


def report_in_steps(rank: int, world_size: int, nodes: int) -> list[tuple[int, int, float, float]]:
    """Bytes of the reports and of the communicator; and expected and sent bytes of payloads."""
    communicator: Topology = rhtcomm.TorchCommunicator()
    if nodes > 1:
        communicator = two_levels(rank, nodes, world_size // nodes)
        communicator.check_nodes(torch.device("cpu"))  # which is no tensor's
    found = []
    for algorithm in ("auto", *ALGORITHMS):
        kept = Reducer(CODEC, communicator, algorithm, min_numel=2000)  # type: ignore[arg-type]
        before, reported = communicator.bytes_sent, 0
        for step in range(2):
            for bucket, (numel, dtype, lengths) in enumerate(BUCKETS):
                x = values(rank, step, bucket, numel, dtype)
                nbytes = x.nbytes
                report = kept.mean_(x, Key(0, step, bucket), lengths=lengths)
                reported += report.bytes_sent
                between = communicator.between.world_size
                of_ring = 2 * (between - 1) / between * nbytes / (world_size / between)
                assert report.bytes_uncompressed == pytest.approx(of_ring, abs=1)
                assert report.rotations == (2 if codec_is_lossy(bucket) else None)
                assert report.wanted_rotations is None
        x = values(rank, 0, 0, 200 * BLOCK, torch.float32)
        sent = kept.mean_(x, Key(0, 3)).bytes_sent
        sent_so_far = communicator.bytes_sent - before - sent
        found.append((reported, sent_so_far, kept.expected_bytes(200 * BLOCK), float(sent)))
    return found


@pytest.mark.parametrize(("world_size", "nodes"), [(2, 1), (3, 1), (4, 2)])
def test_reports_have_the_bytes_that_were_sent(world_size: int, nodes: int, ranks: Ranks) -> None:
    for found in ranks.run(report_in_steps, world_size, nodes):
        for reported, sent, expected, sent_of_one in found:
            assert reported == sent > 0
            assert sent_of_one == pytest.approx(expected, rel=0.02)


def count_time(rank: int, world_size: int) -> list[tuple[float, float]]:
    """By a clock that goes on by one whenever it is looked at: seconds, and looks at it."""
    found = []
    for codec, residual in ((CODEC, None), (FEEDBACK, torch.zeros(5000)), (Lattice(), None)):
        kept = Reducer(codec, rhtcomm.TorchCommunicator(), min_numel=0)
        ticks = count()
        clock = SimpleNamespace(perf_counter=lambda ticks=ticks: float(next(ticks)))
        x = values(rank, 0, 0, 5000, torch.float32)
        with mock.patch("rhtcomm.reduce.clock.time", clock):
            report = kept.mean_(x, Key(0), lengths=(1000, 4000), residual=residual)
        seconds = (report.encode_seconds, report.exchange_seconds, report.decode_seconds)
        assert min(seconds) > 0
        found.append((sum(seconds), float(next(ticks) - 1)))
    return found


def test_seconds_of_all_parts_add_up(ranks: Ranks) -> None:
    """From the first part to the last, every moment belongs to one of them."""
    for found in ranks.run(count_time, 2):
        for seconds, elapsed in found:
            assert seconds == elapsed


# ---- Failures ---------------------------------------------------------------------------------


def go_on_after_a_failure(rank: int, world_size: int) -> list[torch.Tensor]:
    kept, results = Reducer(CODEC, rhtcomm.TorchCommunicator(), min_numel=0), []
    for step in range(3):
        x = values(rank, step, 0, 5000, torch.float32)
        key = Key(0, step, bucket=rank if step == 1 else 0)
        if step == 1:
            with pytest.raises(rhtcomm.PayloadError, match="out of step"):
                kept.mean_(x, key)
            assert kept.clock.part is None
        else:
            report = kept.mean_(x, key)
            assert math.isclose(sum(kept.clock.seconds.values()), of_all(report))
            results.append(x)
    return results


def of_all(report: reducer.Report) -> float:
    return report.encode_seconds + report.exchange_seconds + report.decode_seconds


def test_a_reducer_can_be_used_after_a_payload_was_refused(ranks: Ranks) -> None:
    first, second = ranks.run(go_on_after_a_failure, 2)
    assert all(map(same_bits, first, second))
