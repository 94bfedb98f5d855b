"""The ranks of a process group tell each other a few bytes, before they open other connections."""

import contextlib
import struct
from typing import TYPE_CHECKING

import torch

from rhtcomm.communicators.base import name_of

if TYPE_CHECKING:
    from datetime import timedelta

    import torch.distributed as dist

__all__ = ["FACT_BYTES", "Meeting"]

FACT_BYTES = 128  # that a rank tells the others, at most
_TAG = 0x726A  # for these messages, on a group that others may use too
_ANSWER = struct.Struct("<II")  # how the first rank's answer begins: one of these, and a rank
_MET, _CLOSED, _LATE = 0, 1, 2
_REASONS = {
    _CLOSED: "the first rank found its connection to %s closed by it",
    _LATE: "the first rank waited for %s until its timeout",
}


class Meeting:
    """All ranks of a group must make the same calls.

    Args:
        parent: the group.
        timeout: for each wait.
    """

    def __init__(self, parent: "dist.ProcessGroup", timeout: "timedelta") -> None:
        self._parent, self._timeout = parent, timeout
        self._answers: list[dist.Work] = []

    def name_of(self, rank: int) -> str:
        """A rank in words, with its number in the group and, if different, in the world."""
        return name_of(rank, torch.distributed.get_process_group_ranks(self._parent))

    def tell(self, mine: bytes) -> list[bytes]:
        """What each rank told, by rank, without zeros at the end.

        The first rank answers once it has heard from all. So if a rank has died or left, its
        connection to the first rank fails at once, whereas the rendezvous of a new group would wait
        for it.

        Raises:
            RuntimeError: a rank died or left, or did not answer in time.
        """
        parent, timeout, world_size = self._parent, self._timeout, self._parent.size()
        facts = torch.zeros(world_size, FACT_BYTES, dtype=torch.uint8, device="cpu")
        own = facts[parent.rank()]
        own[: len(mine)] = torch.frombuffer(bytearray(mine), dtype=torch.uint8) if mine else own[:0]
        answer = torch.empty(_ANSWER.size + facts.numel(), dtype=torch.uint8, device="cpu")
        if parent.rank() > 0:
            here = parent.send([own], 0, _TAG)
            parent.recv([answer], 0, _TAG).wait(timeout)
            here.wait()
            kind, lost = _ANSWER.unpack(bytes(answer[: _ANSWER.size].tolist()))
            if kind != _MET:
                raise RuntimeError(_REASONS[kind] % self.name_of(lost))
        else:
            self._collect(facts, answer)
        rows = answer[_ANSWER.size :].view(world_size, FACT_BYTES)
        return [bytes(row.tolist()).rstrip(b"\0") for row in rows]

    def _collect(self, facts: torch.Tensor, answer: torch.Tensor) -> None:
        """On the first rank: hear from all, and answer."""
        parent, others = self._parent, range(1, self._parent.size())
        lost: RuntimeError | None = None
        kind, which = _MET, 0
        for other, arrival in [(one, parent.recv([facts[one]], one, _TAG)) for one in others]:
            try:
                arrival.wait(self._timeout)
            except RuntimeError as error:
                if lost is None:
                    lost, which = RuntimeError(f"{self.name_of(other)}: {error}"), other
                    kind = _LATE if "timed out" in str(error).lower() else _CLOSED
        head = bytearray(_ANSWER.pack(kind, which))
        answer[: _ANSWER.size] = torch.frombuffer(head, dtype=torch.uint8)
        answer[_ANSWER.size :] = facts.view(-1)
        if lost is None:
            self.end()  # all have answered, so they have the earlier answer
            self._answers = [parent.send([answer], other, _TAG) for other in others]
            return
        for other in others:
            with contextlib.suppress(RuntimeError):
                parent.send([answer], other, _TAG).wait(self._timeout)
        raise lost

    def end(self) -> None:
        """To be called when all ranks are known to have the last answer.

        Waiting for a message that the other rank does not take might never end.
        """
        for answer in self._answers:
            answer.wait()
        self._answers = []
