"""What `python -m rhtcomm bench` measures of exchanges, in which order, and what it leaves out."""

import argparse
import functools
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from rhtcomm.bench.advice import PLAIN, best_compressed, best_plain, pays
from rhtcomm.bench.checks import Problem
from rhtcomm.bench.contestants import (
    Contestant,
    compressed_by,
    expected_error,
    fits,
    interest,
    power_sgd,
    torchs,
    uncompressed_by_mpi,
)
from rhtcomm.bench.failures import Watch
from rhtcomm.bench.ranks import TIMEOUT, Ranks
from rhtcomm.bench.results import Result, Row
from rhtcomm.bench.rounds import Budget, Entry, measure, quantiles
from rhtcomm.communicators import (
    Communicator,
    HierarchicalCommunicator,
    MPICommunicator,
    Topology,
    TorchCommunicator,
)
from rhtcomm.planning.probe import measure_codec, measure_link

__all__ = ["field", "in_order", "measure_exchanges", "row_of"]

_SMALL = (1 << 14, 1 << 16)  # coordinates of buckets that only the best ones are measured on
_FOR_SMALL, _FOR_LINK, _FOR_CODEC = 0.1, 0.05, 0.08  # of the seconds
_LINK_SECONDS = 3.0  # which suffice
_ALIGN = 1024  # coordinates, see `Bucket.of`


def field(arguments: argparse.Namespace, backend: str, ranks: Ranks) -> list[Contestant]:
    """All contestants, the more interesting ones first."""
    found = torchs(backend, ranks.world_size, ("float32", "bf16"))
    found += [power_sgd(backend, ranks.world_size, rank) for rank in (1, 4)]
    what = (arguments.bits, arguments.quantizers, arguments.algorithms)
    connections = arguments.connections
    if arguments.communicator == "mpi":
        mpi = MPICommunicator(timeout=TIMEOUT.total_seconds())
        found.append(uncompressed_by_mpi(mpi))
        found += compressed_by("mpi", *what, lambda: mpi)
    else:
        over = backend if connections == 1 else f"{backend}, {connections} connections"
        found += compressed_by(over, *what, connections=connections)
    if ranks.nodes > 1 and ranks.ranks_per_node > 1:
        carrier = "mpi" if arguments.communicator == "mpi" else backend
        make = functools.cache(functools.partial(two_levels, carrier, ranks, connections))
        found += compressed_by(f"{carrier}, two levels", *what, make)
    return sorted(found, key=functools.partial(interest, ranks.world_size))


def two_levels(carrier: str, ranks: Ranks, connections: int) -> Topology:
    """Full precision within a node, compressed between nodes."""
    if carrier != "mpi":
        shape = (ranks.nodes, ranks.ranks_per_node)
        mesh = init_device_mesh(ranks.device.type, shape)
        return HierarchicalCommunicator.from_mesh(mesh, connections)
    from mpi4py import MPI

    node, place = divmod(ranks.rank, ranks.ranks_per_node)
    within: Any = MPI.COMM_WORLD.Split(node)
    between: Any = MPI.COMM_WORLD.Split(place)
    return HierarchicalCommunicator(MPICommunicator(within), MPICommunicator(between))


def _measure_machine(
    arguments: argparse.Namespace, result: Result, budget: Budget, ranks: Ranks
) -> None:
    """The link and the codec, each alone, for `plan --from`."""
    plain: Communicator = (
        MPICommunicator()
        if arguments.communicator == "mpi"
        else TorchCommunicator(connections=arguments.connections)
    )
    communicator = plain.apart(ranks.device.type)
    seconds = min(_LINK_SECONDS, _FOR_LINK * arguments.seconds)
    link = measure_link(communicator, ranks.device, seconds, uncompressed=plain)
    result.facts["link"] = asdict(link)
    communicator.close()
    budget.end("link")
    result.facts["speeds"] = _speeds(arguments, budget, ranks)
    budget.end("codec")


def _speeds(
    arguments: argparse.Namespace, budget: Budget, ranks: Ranks
) -> dict[str, dict[str, dict[str, float]]]:
    """Of the codec, by quantizer and bits, as far as there is time; of 4 bits first."""
    speeds: dict[str, dict[str, dict[str, float]]] = {}
    until = budget.gone() + _FOR_CODEC * arguments.seconds
    for bits in sorted(arguments.bits, key=lambda bits: abs(bits - 4)):
        for quantizer in ("quic_fl", "ecdq"):
            if quantizer not in arguments.quantizers or not fits(quantizer, bits):
                continue
            if speeds and not ranks.tell(budget.gone() < until):
                return speeds
            dist.barrier()  # ranks of one machine share its memory, so they measure at once
            speed = asdict(measure_codec(bits, quantizer=quantizer, device=ranks.device))
            speeds.setdefault(quantizer, {})[f"{bits:g}"] = speed
    return speeds


def measure_exchanges(
    arguments: argparse.Namespace,
    seconds: float,
    result: Result,
    budget: Budget,
    ranks: Ranks,
    watch: Watch,
) -> None:
    """Fill in rows, failures and what was left out; all ranks call it alike.

    Args:
        seconds: of the budget, that may be gone at the end.
    """
    watch.doing = "the link was measured"
    _measure_machine(arguments, result, budget, ranks)
    backend = str(result.facts["backend"])
    everybody = field(arguments, backend, ranks)
    sizes = sorted({_aligned(mebibytes) for mebibytes in arguments.mebibytes})
    problems = {numel: Problem(numel, ranks, number) for number, numel in enumerate(sizes)}
    entries = in_order([Entry(one, problems[numel]) for one in everybody for numel in sizes])

    watch.doing = "exchanges were measured"
    until = budget.gone() + (1 - _FOR_SMALL) * (seconds - budget.gone())
    dropped = measure(entries, until, budget, ranks, "exchanges")
    rows = [row_of(entry) for entry in entries if entry.measured]

    best = ranks.tell(_finalists(rows, arguments.max_nmse))
    numbers = range(len(sizes), len(sizes) + len(_SMALL))
    small = [
        Entry(one, problem)
        for number, numel in zip(numbers, _SMALL, strict=True)
        if best and numel < max(sizes) and numel not in sizes
        for problem in (Problem(numel, ranks, number),)
        for one in everybody
        if (one.name, one.carrier) in best
    ]
    dropped += measure(small, seconds, budget, ranks, "small buckets")
    entries += small
    for one in everybody:
        one.close()
    result.rows = sorted(
        (row_of(entry) for entry in entries if entry.measured), key=lambda row: -row.numel
    )
    failed = [entry for entry in entries if entry.failure]
    result.failed = [_named(entry) | {"reason": entry.failure} for entry in failed]
    result.dropped = [_named(entry) for entry in dropped]


def in_order(entries: Sequence[Entry]) -> list[Entry]:
    """First what any advice needs, of the smallest size and then of the others; then the rest.

    Contestants stay in their order.
    """
    ours = next((one.contestant for one in entries if one.contestant.compresses), None)

    def needed(entry: Entry) -> bool:
        return entry.contestant is ours or entry.contestant.name in PLAIN

    first = sorted((one for one in entries if needed(one)), key=lambda one: one.numel)
    return first + [one for one in entries if not needed(one)]


def _aligned(mebibytes: float) -> int:
    return max(1, round(mebibytes * 2**18 / _ALIGN)) * _ALIGN


def _named(entry: Entry) -> dict[str, Any]:
    one = entry.contestant
    return {"contestant": one.name, "carrier": one.carrier, "numel": entry.numel}


def _finalists(rows: Sequence[Row], max_nmse: float) -> list[tuple[str, str]]:
    """Names and carriers of those that are measured on small buckets too; [] where none pays."""
    numel = max((row.numel for row in rows), default=0)
    plain = best_plain(rows, numel)
    best = best_compressed(rows, numel, expected_of, max_nmse)
    if plain is None or best is None or not pays(best, plain):
        return []
    uncompressed = {(row.contestant, row.carrier) for row in rows if row.contestant in PLAIN}
    return [(best.contestant, best.carrier), *sorted(uncompressed)]


def expected_of(row: Row) -> float:
    """The expected error of a row, relative to what is encoded."""
    assert row.quantizer is not None
    assert row.algorithm is not None
    return expected_error(row.quantizer, row.bits, row.algorithm)


def row_of(entry: Entry) -> Row:
    """Its figures, with times of this rank's parts."""
    one = entry.contestant
    low, median, high = quantiles(entry.seconds)
    encode, exchange, decode, sent = (
        statistics.median(cost[part] for cost in entry.costs) for part in range(4)
    )
    if one.bytes_sent is not None:
        sent = one.bytes_sent(entry.numel)
    return Row(
        one.name,
        one.carrier,
        one.quantizer,
        one.algorithm,
        one.bits,
        entry.numel,
        len(entry.seconds),
        median,
        low,
        high,
        encode,
        exchange,
        decode,
        sent,
        entry.nmse,
    )
