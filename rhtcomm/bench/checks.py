"""A contestant is timed only after its mean was found right, on the same ranks and size."""

import functools
import hashlib
import math

import torch

from rhtcomm.bench.contestants import Bucket, Contestant
from rhtcomm.bench.ranks import Ranks

__all__ = ["CheckError", "Problem", "check"]

_COLUMNS = 1024
_WARMUP = 3  # PowerSGD sends its first two buckets uncompressed
# A second exchange tells how long one takes without making connections, where it is quick.
_QUICK = 0.5


class CheckError(AssertionError):
    """On all ranks: a mean is not within its expected error, or ranks have different ones."""


class Problem:
    """Gradients of one length, Gaussian and different on every rank, and their exact mean.

    Rank i has one vector, turned by another number of places. So every rank knows all of them, and
    no exchange has to be trusted for the exact mean.

    Args:
        numel: coordinates, a multiple of 1024.
        number: of the bucket, see `Bucket.of`.
    """

    def __init__(self, numel: int, ranks: Ranks, number: int = 0) -> None:
        self.numel, self.number, self.ranks = numel, number, ranks
        generator = torch.Generator().manual_seed(numel)
        self._gaussian = torch.randn(numel, generator=generator)
        self.data = self._turned(self._gaussian, ranks.rank).to(ranks.device)

    def _turned(self, x: torch.Tensor, rank: int) -> torch.Tensor:
        return x.roll(rank * x.numel() // self.ranks.world_size + rank)

    def _mean(self, x: torch.Tensor) -> torch.Tensor:
        total = self._turned(x, 0).double()
        for rank in range(1, self.ranks.world_size):
            total += self._turned(x, rank)
        return (total / self.ranks.world_size).float().to(self.data.device)

    @functools.cached_property
    def mean(self) -> torch.Tensor:
        """(numel,) float32, of all ranks' `data`, correctly rounded."""
        return self._mean(self._gaussian)

    def low_rank(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Other data and their mean: matrices of rank 1, of which ranks share one factor."""
        column = self._gaussian[: self.numel // _COLUMNS, None].to(self.data.device)
        row = torch.randn(_COLUMNS, generator=torch.Generator().manual_seed(1))
        own = self._turned(row, self.ranks.rank).to(self.data.device)
        return (column * own).flatten(), (column * self._mean(row)).flatten()


def check(contestant: Contestant, problem: Problem) -> tuple[float, float]:
    """Average the problem's gradients and compare the mean; all ranks call it.

    Returns:
        |mean' - mean|^2 / |mean|^2 of Gaussian gradients, and the seconds that an exchange took on
        the slowest rank.

    Raises:
        CheckError: on all ranks.
    """
    if contestant.low_rank:
        _error(contestant, problem, *problem.low_rank(), repeats=_WARMUP)
    bounded = not contestant.low_rank
    return _error(contestant, problem, problem.data, problem.mean, bounded=bounded)


def _error(
    contestant: Contestant,
    problem: Problem,
    data: torch.Tensor,
    exact: torch.Tensor,
    repeats: int = 1,
    bounded: bool = True,
) -> tuple[float, float]:
    bucket, seconds = Bucket.of(data, problem.number), 0.0
    failure = ""
    for attempt in range(repeats + 1):
        bucket.tensor.copy_(data)
        try:
            seconds = contestant.seconds(bucket)
        except (RuntimeError, ValueError, TypeError) as error:
            failure = f"{type(error).__name__}: {error}".splitlines()[0]
        # All ranks learn here that one failed, and of a rank that is lost.
        seconds, failed = problem.ranks.largest(seconds, float(bool(failure)))
        if failed:
            raise CheckError(failure or "it failed on another rank")
        if attempt >= repeats - 1 and seconds > _QUICK:
            break
    difference = bucket.tensor - exact
    nmse = float(difference.dot(difference) / exact.dot(exact))
    digest = hashlib.blake2b(bucket.tensor.cpu().numpy().tobytes(), digest_size=6).digest()
    number = float(int.from_bytes(digest, "little"))  # of 48 bits, which float64 holds exactly
    nmse, most, least = problem.ranks.largest(
        nmse if math.isfinite(nmse) else math.inf, number, -number
    )
    if most != -least:
        raise CheckError("ranks end with different means")
    _compare(contestant, nmse if bounded else contestant.error, problem.ranks.world_size)
    return nmse, seconds


def _compare(contestant: Contestant, nmse: float, world_size: int) -> None:
    """Raise CheckError unless an error is what is expected of the contestant."""
    allowed = contestant.slack * contestant.error
    if not nmse <= allowed:
        raise CheckError(
            f"the mean is off by an NMSE of {nmse:.3g}, and {allowed:.3g} is the most that its "
            "quantizer explains"
        )
    # The lattice's depends on the largest coordinate, and its expectation is a bound.
    if contestant.compresses and contestant.quantizer != "lattice" and nmse < contestant.error / 3:
        raise CheckError(
            f"the mean is off by an NMSE of only {nmse:.3g} where {contestant.error:.3g} is "
            "expected, so this was not the exchange that was asked for"
        )
