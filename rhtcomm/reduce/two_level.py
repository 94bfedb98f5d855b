"""The mean over two levels: full precision within a node, compressed between nodes.

The ranks of a node first reduce-scatter their tensors in full precision. Each rank averages its
shard with the ranks at the same place in the other nodes. Then the node gathers the shards.
"""

import math
from functools import partial

import torch

from rhtcomm.codec import AUTO, Codec
from rhtcomm.communicators import Topology
from rhtcomm.deferred import deferred_on
from rhtcomm.floating_point import assign_
from rhtcomm.lattice import Lattice
from rhtcomm.randomness import Key
from rhtcomm.reduce.job import Job
from rhtcomm.reduce.lattice import LatticeSum
from rhtcomm.reduce.payloads import Payloads
from rhtcomm.reduce.residual import Update
from rhtcomm.reduce.split import Algorithm, split_into_shards
from rhtcomm.segments import merge_
from rhtcomm.wire import PayloadError

__all__ = ["TwoLevels", "between_nodes"]

# The header of the share that a rank returns to its node, an int32: this, plus _FAILED on an error,
# plus the number of rotations that it wants.
_SHARE, _SHARE_BYTES, _FAILED = 0x52480000, 4, 1 << 8


def between_nodes(
    codec: Codec | Lattice,
    topology: Topology,
    algorithm: Algorithm,
    numel: int,
    device: torch.device,
    offset: int = 0,
) -> Payloads | LatticeSum:
    """The exchange among `topology.between` of a tensor at `offset` of its bucket."""
    if isinstance(codec, Lattice):
        return LatticeSum(codec, topology.between, numel, device, offset)
    return Payloads(codec, topology.between, algorithm, numel, device, offset)


class TwoLevels:
    """Averages tensors of `numel` coordinates on two levels."""

    def __init__(
        self,
        codec: Codec | Lattice,
        topology: Topology,
        algorithm: Algorithm,
        numel: int,
        device: torch.device,
    ) -> None:
        assert topology.within is not None
        self._within = topology.within
        self._defers = codec.rotations != AUTO
        self._shards = split_into_shards(numel, codec.block, self._within.world_size)
        self._lengths = [shard.stop - shard.start for shard in self._shards]
        self._mine = self._shards[self._within.rank]
        length = self._lengths[self._within.rank]
        self._between = None
        if topology.between.world_size > 1 and length:
            self._between = between_nodes(
                codec, topology, algorithm, length, device, self._mine.start
            )

    def __call__(self, job: Job, used: torch.Tensor) -> int | None:
        mine = self._sum_of_node(job, used)
        header, failure = self._exchange_between(job, mine, used)
        job.clock.to("exchange")
        prefix = _SHARE_BYTES + used.numel()
        share = job.flat.new_empty(prefix + self._nbytes(job), dtype=torch.uint8)
        share[:_SHARE_BYTES].view(torch.int32).fill_(header)
        share[_SHARE_BYTES:prefix] = used
        assign_(share[prefix:].view(job.flat.dtype), mine)
        try:
            gathered = self._within.start_all_gather(share)()
        except RuntimeError as lost:  # ranks that learned of the failure may have left
            raise failure or lost from None
        # Ranks without a shard have exchanged nothing with other nodes.
        merge_(used, gathered[:, _SHARE_BYTES:prefix])
        shares = gathered[:, prefix:].view(job.flat.dtype)
        for values, shard, length in zip(shares, self._shards, self._lengths, strict=True):
            job.flat[shard] = values[:length]
        if failure is not None:
            raise failure
        headers = gathered[:, :_SHARE_BYTES].flatten()
        later = deferred_on(job.flat.device) if self._defers else None
        if later is not None:
            later.add(headers, partial(_check_shares, key=job.key))
            return None
        # Each rank has seen only its own shard.
        return _check_shares(headers, job.key) or None

    def _nbytes(self, job: Job) -> int:
        """Length of the longest shard."""
        return int(max(self._lengths) * job.flat.element_size())

    def _sum_of_node(self, job: Job, used: torch.Tensor) -> torch.Tensor:
        """The mean of this rank's shard over its node, float32, padded to the longest shard."""
        within, dtype = self._within, job.flat.dtype
        job.clock.to("exchange")
        # The bits of used segments are sent before each shard.
        prefix, nbytes = used.numel(), self._nbytes(job)
        outgoing = job.flat.new_zeros(within.world_size, prefix + nbytes, dtype=torch.uint8)
        outgoing[:, :prefix] = used
        shares = outgoing[:, prefix:].view(dtype)
        for values, shard, length in zip(shares, self._shards, self._lengths, strict=True):
            values[:length] = job.flat[shard]
        incoming = within.start_all_to_all(outgoing)()
        merge_(used, incoming[:, :prefix])
        mine = torch.zeros(max(self._lengths), dtype=torch.float32, device=job.flat.device)
        for values in incoming[:, prefix:].view(dtype):  # in the order of ranks
            mine += values
        mine /= within.world_size
        return mine

    def _exchange_between(
        self, job: Job, mine: torch.Tensor, used: torch.Tensor
    ) -> tuple[int, PayloadError | None]:
        """Replace `mine` by the mean over nodes; return its header, and the error if there was
        one."""
        if self._between is None:
            return _SHARE, None
        left = None if job.update is None else job.update.left[self._mine]
        length = self._mine.stop - self._mine.start
        shard = Job(mine[:length], job.key, job.clock, job.rotations)
        if left is not None:
            shard.update = Update.of(left)
        header, failure = _SHARE, None
        try:
            header += self._between(shard, used) or 0
        except PayloadError as error:  # the node's other ranks still wait for this shard
            header, failure = _SHARE + _FAILED, error
            # If they check headers later, no number may pass for a mean until then.
            mine.fill_(math.nan)
            used.fill_(255)
        if left is not None:
            left *= self._within.world_size  # of the node's mean, in which this rank is one of many
        return header, failure


def _check_shares(headers: torch.Tensor, key: Key) -> int:
    """The largest number of rotations that a rank of the node wants; headers (n _SHARE_BYTES,)
    uint8.

    Raises:
        PayloadError: naming a rank of the node that has no valid share.
    """
    most = 0
    for rank, header in enumerate(headers.view(torch.int32).tolist()):
        if header & ~0xFFFF != _SHARE:
            raise PayloadError(
                f"rhtcomm.all_reduce: the message from rank {rank} of this node for {key} does not "
                "begin with the mark of a share: the ranks are out of step, or other code uses "
                "the group"
            )
        if header & _FAILED:
            raise PayloadError(
                f"rhtcomm.all_reduce: rank {rank} of this node could not decode its share for "
                f"{key}; see the error on that rank"
            )
        most = max(most, header & 0xFF)
    return most
