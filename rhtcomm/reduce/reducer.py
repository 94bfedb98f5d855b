"""Repeated means of tensors over ranks: routes, agreement, requested rotations and reports."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from rhtcomm.codec import DTYPES, Codec
from rhtcomm.communicators import Topology
from rhtcomm.floating_point import GRAIN, default_mode
from rhtcomm.kernels import Residual
from rhtcomm.lattice import Lattice
from rhtcomm.randomness import Key
from rhtcomm.reduce import feedback
from rhtcomm.reduce.agreement import check_agreement
from rhtcomm.reduce.clock import Clock
from rhtcomm.reduce.exact import Exact
from rhtcomm.reduce.job import Job
from rhtcomm.reduce.lattice import LatticeSum
from rhtcomm.reduce.mixed import Mixed, compressed_numel
from rhtcomm.reduce.payloads import Payloads
from rhtcomm.reduce.scatter import ExactScatter, Scatter
from rhtcomm.reduce.split import Algorithm, check_algorithm, check_streams, choose_algorithm
from rhtcomm.reduce.two_level import TwoLevels, between_nodes
from rhtcomm.segments import Segments
from rhtcomm.wire import PayloadError

__all__ = ["Reducer", "Report", "Route", "Treatment"]

_MOST_ROUTES = 1024  # cached; with more, the cache is cleared


@dataclass(slots=True)
class Report:
    """What happened to one tensor on this rank.

    Seconds are wall-clock time of the calling thread. Some chunks are exchanged while others are
    encoded and decoded; `exchange_seconds` counts only the remaining waiting. On CUDA the seconds
    are the time to launch the work, except for exchanges through host memory (Gloo), which wait for
    the device.
    """

    bytes_sent: int
    """Bytes sent by this rank; with two levels, only those to other nodes."""
    bytes_uncompressed: int
    """Bytes that a ring all-reduce (or reduce-scatter) of the tensor in its own dtype would
    send."""
    rotations: int | None
    """Number of rotations; None if nothing was compressed."""
    wanted_rotations: int | None
    """With rotations="auto": the number that suffices for this tensor on all ranks."""
    encode_seconds: float = 0.0
    """Rotating, quantizing and packing."""
    exchange_seconds: float = 0.0
    """Waiting for messages."""
    decode_seconds: float = 0.0
    """Unpacking, adding up and rotating back."""
    bits: float = 0.0
    """Bits per coordinate of the payloads; where nothing is compressed, of the dtype."""

    @classmethod
    def of_nothing(cls, wanted_rotations: int | None = None) -> "Report":
        """A report for no exchange: an empty tensor, or a single rank."""
        return cls(0, 0, None, wanted_rotations)


@dataclass(frozen=True)
class Treatment:
    """How one tensor is sent, if not all of it by the reducer's codec."""

    codec: Codec | Lattice | None
    """None: the tensor is sent uncompressed."""
    exact: tuple[bool, ...] | None = None
    """Which of its segments are sent exactly; None: none of them."""
    compare: bool = False
    """Whether the ranks compare this treatment before its first use."""


@dataclass(slots=True)
class Route:
    """How tensors of one length, dtype, device and set of segments are averaged; made once and
    cached."""

    run: Callable[[Job, torch.Tensor], int | None] | None
    """Exchanges the tensor of a job; None for an empty tensor or a single rank."""
    segments: Segments
    compressed: bool
    tells: bool
    """Whether the ranks tell each other which segments they use, even without a residual."""
    by_torch: bool
    """Whether torch computes a part of the mean, and not the kernels alone."""
    nothing: torch.Tensor
    """(0,) uint8 on the tensor's device."""
    bytes_uncompressed: int
    bits: float
    """Per coordinate of what is compressed; where nothing is, those of a number."""
    rotations: int | None = None
    """The codec's own number of rotations, if payloads leave this node."""


class Reducer:
    """Averages tensors over the ranks of a topology.

    Args:
        codec: how to compress, unless a `Treatment` says otherwise.
        topology: the ranks and their transport.
        algorithm, min_numel: see `rhtcomm.all_reduce`.

    Raises:
        ValueError: the algorithm is unknown or does not fit the codec.
    """

    def __init__(
        self,
        codec: Codec | Lattice,
        topology: Topology,
        algorithm: Algorithm = "auto",
        min_numel: int = 1 << 14,
    ) -> None:
        check_algorithm(algorithm, codec)
        self.codec, self.topology = codec, topology
        self.algorithm, self.min_numel = algorithm, min_numel
        self.clock = Clock()
        # rotations="auto": the number that the ranks request for a bucket, by its number and
        # length, which identify it in the next step.
        self.wishes: dict[tuple[int, int], int] = {}
        self._routes: dict[tuple[object, ...], Route] = {}

    def agree(self, facts: dict[str, object], device: torch.device) -> None:
        """Raise DisagreementError on every rank if `facts` are not the same on all of them."""
        self.clock.to("exchange")
        check_agreement(self.topology, facts, device)
        self.clock.to(None)

    def expected_bytes(self, numel: int, scatters: bool = False) -> float:
        """Bytes that this rank sends for `numel` compressed coordinates, apart from small rests."""
        ranks = self.topology.between.world_size
        if self.topology.within is not None:
            numel = -(-numel // self.topology.within.world_size)
        if isinstance(self.codec, Lattice):
            lanes = 32 // self.codec.lane_bits(ranks)
            return 2 * (ranks - 1) / ranks * 4 * numel / lanes
        if scatters:
            return (ranks - 1) * self.codec.nbytes(numel // ranks)
        payload = self.codec.nbytes(numel)
        algorithm = choose_algorithm(self.algorithm, ranks, payload)
        payloads = {
            "all_gather": ranks - 1,
            "two_shot": 2 * (ranks - 1) / ranks,
            "gather": ranks - 1 if self.topology.between.rank == 0 else 1,
        }
        return payload * payloads[algorithm]

    def compresses(
        self,
        flat: torch.Tensor,
        lengths: Sequence[int],
        treatment: Treatment | None,
        shards: int = 1,
    ) -> int:
        """Number of coordinates that are compressed in a tensor whose `shards` have these
        segments."""
        treatment, numel = treatment or Treatment(self.codec), flat.numel()
        if treatment.exact is not None:
            numel = shards * compressed_numel(lengths, treatment.exact)
        compressible = flat.dtype in DTYPES and self.topology.world_size > 1
        if treatment.codec is None or not compressible or numel < self.min_numel:
            return 0
        return numel

    def mean_(
        self,
        flat: torch.Tensor,
        key: Key,
        *,
        lengths: tuple[int, ...] | None = None,
        rows: tuple[int, ...] | None = None,
        residual: torch.Tensor | Sequence[torch.Tensor] | Residual | None = None,
        treatment: Treatment | None = None,
        settle: bool = True,
    ) -> Report:
        """Replace `flat` by its mean over all ranks, in place; every rank gets the same bits.

        Arguments are not checked; `rhtcomm.all_reduce` checks them.

        Args:
            flat: (numel,) floating point, contiguous. Dtypes other than float32, bfloat16 and
                float16 are sent exactly.
            key: the same on all ranks, and a new one for each call.
            lengths, rows: of the segments, see `rhtcomm.segments`; None: one segment.
            residual: (numel,) float32, in one or more contiguous pieces: error feedback, see
                `rhtcomm.reduce.feedback`.
            treatment: the same on all ranks; None: `flat` is compressed by the reducer's codec.
            settle: whether to wait until the others have what this rank sent.

        Raises:
            PayloadError: a payload that arrived is not what was expected.
        """
        job = Job(flat, key, self.clock)
        if isinstance(residual, torch.Tensor):
            residual = [residual]
        if residual is not None and not isinstance(residual, Residual):
            residual = Residual.of(residual)
        return self._reduce(job, lengths, rows, residual, treatment, settle)

    def scatter_(
        self,
        output: torch.Tensor,
        flat: torch.Tensor,
        key: Key,
        *,
        lengths: tuple[int, ...] | None = None,
        rows: tuple[int, ...] | None = None,
        treatment: Treatment | None = None,
        settle: bool = True,
    ) -> Report:
        """Write the mean over n ranks of this rank's shard of `flat` to `output`.

        Rank i owns the i-th of n shards. Arguments are not checked; `rhtcomm.reduce_scatter` checks
        them. The topology must have one level, and no codec may be a `Lattice`.

        Args:
            output: (m,) floating point, contiguous, in memory of its own; float64 if `flat` is.
            flat: (n m,) floating point, contiguous: n shards.
            lengths, rows: of the segments of a shard, the same in each.
            key, treatment, settle: as for `mean_`.

        Raises:
            PayloadError: a payload that arrived is not what was expected.
        """
        job = Job(flat, key, self.clock, output=output)
        return self._reduce(job, lengths, rows, None, treatment, settle)

    def _reduce(
        self,
        job: Job,
        lengths: tuple[int, ...] | None,
        rows: tuple[int, ...] | None,
        residual: Residual | None,
        treatment: Treatment | None,
        settle: bool,
    ) -> Report:
        flat, scatters = job.flat, job.output is not None
        place = (flat.numel(), flat.dtype, flat.device, lengths, rows, treatment, scatters)
        route = self._routes.get(place)
        if route is None:
            segments = Segments(lengths, job.result.numel(), rows)
            route = self._make_route(place, job, segments, treatment)
        self.clock.restart()
        # Kernels set their own floating-point mode; torch uses the thread's.
        if residual is None and not route.by_torch:
            return self._run(route, job, None, settle)
        with default_mode(pool=flat.numel() > GRAIN):
            return self._run(route, job, residual, settle)

    def _make_route(
        self,
        place: tuple[object, ...],
        job: Job,
        segments: Segments,
        treatment: Treatment | None,
    ) -> Route:
        topology, flat, treatment = self.topology, job.flat, treatment or Treatment(self.codec)
        if treatment.compare and topology.world_size > 1:
            self._agree_on(treatment, job.key, flat.device)
        codec, exact = treatment.codec, treatment.exact
        shards = 1 if job.output is None else topology.world_size
        numel = self.compresses(flat, segments.given, treatment, shards)
        compressed = numel > 0
        route = Route(
            run=None,
            segments=segments,
            compressed=compressed,
            # A tensor with a single segment needs no bits: zeros make blocks of zeros.
            tells=compressed and len(segments) > 1,
            by_torch=True,
            nothing=flat.new_empty(0, dtype=torch.uint8),
            bytes_uncompressed=topology.ring_bytes(flat.nbytes) // (1 if job.output is None else 2),
            bits=8.0 * flat.itemsize,
        )
        run_exact = Exact(topology) if job.output is None else ExactScatter(topology.between)
        if compressed and codec is not None:
            topology.check_nodes(flat.device)
            run = self._run_for(codec, numel, flat.device, scatters=job.output is not None)
            route.run = run
            route.bits = codec.bits if isinstance(codec, Lattice) else codec.quantizer.bits
            if exact is not None:
                route.run = Mixed(run, run_exact, segments.given, exact, shards)
            route.by_torch = not isinstance(route.run, (Payloads, Scatter, LatticeSum))
            # The ranks of a node exchange full precision.
            if topology.between.world_size > 1:
                route.rotations = codec.default_rotations
        elif flat.numel() > 0 and (topology.world_size > 1 or job.output is not None):
            route.run = run_exact
        if len(self._routes) >= _MOST_ROUTES:
            self._routes.clear()
        self._routes[place] = route
        return route

    def _run_for(
        self, codec: Codec | Lattice, numel: int, device: torch.device, scatters: bool
    ) -> Callable[[Job, torch.Tensor], int | None]:
        if scatters:
            assert isinstance(codec, Codec)
            between = self.topology.between
            return Scatter(codec, between, numel // between.world_size, device)
        check_streams(numel, self.topology.between.world_size)
        if self.topology.within is not None:
            return TwoLevels(codec, self.topology, self.algorithm, numel, device)
        return between_nodes(codec, self.topology, self.algorithm, numel, device)

    def _agree_on(self, treatment: Treatment, key: Key, device: torch.device) -> None:
        """Compare a policy's treatment of a bucket."""
        exact = treatment.exact
        facts: dict[str, object] = {
            f"codec of bucket {key.bucket}": treatment.codec,
            f"exact segments of bucket {key.bucket}": exact and [*map(int, exact)],
        }
        self.agree(facts, device)

    def _run(self, route: Route, job: Job, residual: Residual | None, settle: bool) -> Report:
        topology, clock, segments, flat = self.topology, self.clock, route.segments, job.flat
        sent, bucket = topology.bytes_sent, (job.key.bucket, flat.numel())
        job.rotations = self.wishes.get(bucket) if self.wishes else None
        tells = route.tells or residual is not None
        used = route.nothing
        if tells:
            clock.to("encode")
            used = self._used(segments, job)
        if residual is not None:
            in_place = isinstance(route.run, Payloads)
            used = feedback.begin(job, residual, segments, used, in_place)
        wanted = None
        if route.run is not None:
            try:
                wanted = route.run(job, used)
            except BaseException as error:
                if job.update is not None:
                    job.update.stop()
                if isinstance(error, PayloadError):
                    _settle_failed(error, topology, clock, settle)
                raise
        if tells:
            clock.to("decode")
            mine = used if job.output is None else used[topology.rank]
            segments.restore_(job.result, mine)
        elif route.compressed:
            clock.to("decode")
            segments.clear_zeros_(job.result)
        if residual is not None:
            feedback.finish(job, flat, residual, segments, used)
        clock.to("exchange")
        topology.settle(settle)
        clock.to(None)
        if wanted is not None:
            self.wishes[bucket] = wanted
        seconds = clock.seconds
        return Report(
            topology.bytes_sent - sent,
            route.bytes_uncompressed,
            route.rotations and (job.rotations or route.rotations),
            wanted,
            seconds["encode"],
            seconds["exchange"],
            seconds["decode"],
            route.bits,
        )

    def _used(self, segments: Segments, job: Job) -> torch.Tensor:
        """Which segments this rank uses; if the mean is scattered, one row per shard."""
        if job.output is None:
            return segments.used(job.flat)
        shards = job.flat.view(self.topology.world_size, -1)
        return torch.stack([segments.used(shard) for shard in shards])


def _settle_failed(
    error: PayloadError, topology: Topology, clock: Clock, settle: bool = True
) -> None:
    """Settle after a payload could not be decoded; all exchanges have finished.

    The other ranks settle, and wait for this one to do so too. If ranks have different numbers in
    the world, the error is extended to say so.
    """
    clock.to("exchange")
    topology.settle(settle)
    clock.to(None)
    group = topology.between
    names = [group.name_of(rank) for rank in range(min(64, group.world_size))]
    differing = [name for name in names if "(" in name]
    if differing:
        error.args = (f"{error}; in this group {', '.join(differing)}",)
