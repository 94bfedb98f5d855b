"""The ranks meet, compare what they found, and make a mean over all of them."""

import dataclasses
import json
import socket
import time
from collections.abc import Sequence, Set
from datetime import timedelta
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from rhtcomm.doctor.finding import Finding
from rhtcomm.doctor.launcher import Launch

__all__ = ["Meeting", "Unreachable", "exchange"]

NUMEL = 100_000
MEET = "see that rank 0 runs, that MASTER_ADDR is its address, and that no firewall is between"
CONNECT = "see the lines on Gloo; export GLOO_SOCKET_IFNAME, and open the firewall between machines"


class Unreachable(Exception):
    """A rank did not come in time."""


class Meeting:
    """A store that all ranks reach: it needs one port of one machine, and no other connections.

    Args:
        launch: with an address and a port.
        seconds: how long to wait for the others, each time.

    Raises:
        Unreachable: this rank did not reach the store.
    """

    def __init__(self, launch: Launch, seconds: float) -> None:
        assert launch.address is not None
        assert launch.port is not None
        self._launch, self._patience = launch, timedelta(seconds=seconds)
        self._neighbors: list[int] = []  # ranks on this machine
        where = f"{launch.address}:{launch.port}"
        try:
            store = TCPStore(
                launch.address,
                launch.port,
                launch.world_size,
                is_master=launch.rank == 0 and not launch.agent,
                timeout=self._patience,
                wait_for_workers=False,
            )
        except (RuntimeError, ValueError) as error:
            verb = "serve" if launch.rank == 0 and not launch.agent else "reach"
            said = " ".join(str(error).split())[:160]
            raise Unreachable(f"rank {launch.rank} could not {verb} {where} ({said})") from None
        self.store: Any = PrefixStore("rhtcomm doctor", store)

    def machines(self) -> int | None:
        """Among which the ranks are; None if they did not all come in time.

        Containers on one machine count as several, as they need the network between them.
        """
        boot = Path("/proc/sys/kernel/random/boot_id")
        own = f"{socket.gethostname()} {boot.read_text() if boot.exists() else ''}"
        keys = self._all_set("machine", own, 0)
        machines = [self.store.get(key) for key in keys]
        self._neighbors = [rank for rank, one in enumerate(machines) if one == own.encode()]
        return len(set(machines)) if keys else None

    def local_cores(self, own: Set[int]) -> int | None:
        """How many cores the ranks on this rank's machine may run on, taken together.

        Call it after `machines`. None if ranks did not tell in time.
        """
        keys = self._all_set("cores", " ".join(map(str, sorted(own))), 0)
        told = [self.store.get(keys[rank]).split() for rank in self._neighbors] if keys else []
        return len({core for cores in told for core in cores}) or None

    def ready(self, longer: float) -> bool:
        """Whether all ranks have called it, within so many seconds more than usual."""
        return bool(self._all_set("ready", "", longer))

    def _all_set(self, name: str, own: str, longer: float) -> list[str]:
        """The keys under which all ranks have set something; none if some did not in time.

        Rank 0 decides for all, as one that came late would else wait for those that went on.
        """
        self.store.set(f"{name} {self._launch.rank}", own)
        keys = [f"{name} {rank}" for rank in range(self._launch.world_size)]
        decided, patience = f"{name} of all", self._patience + timedelta(seconds=longer)
        if self._launch.rank == 0:
            self.store.set(decided, "yes" if self._wait(keys, patience) else "no")
        elif not self._wait([decided], 2 * patience):
            return []
        return keys if self.store.get(decided) == b"yes" else []

    def _wait(self, keys: list[str], patience: timedelta) -> bool:
        """Whether all of them were set in time."""
        try:
            self.store.wait(keys, patience)
        except RuntimeError:
            return False
        return True

    def tell(self, findings: Sequence[Finding]) -> None:
        told = json.dumps([dataclasses.asdict(one) for one in findings])
        self.store.set(f"found by {self._launch.rank}", told)

    def gather(self, longer: float) -> tuple[dict[int, Sequence[Finding]], list[int]]:
        """What ranks found, and which of them did not say within so many seconds more."""
        by_rank: dict[int, Sequence[Finding]] = {}
        silent = []
        end = time.monotonic() + self._patience.total_seconds() + longer
        for rank in range(self._launch.world_size):
            key, left = f"found by {rank}", max(0.01, end - time.monotonic())
            if self._wait([key], timedelta(seconds=left)):
                by_rank[rank] = [Finding(**one) for one in json.loads(self.store.get(key))]
            else:
                silent.append(rank)
        return by_rank, silent

    def end(self, status: int) -> None:
        """Rank 0 says that it has printed, and the status with which all ranks end."""
        self.store.set("status", str(status))
        for rank in range(1, self._launch.world_size):  # the store ends with this process
            if not self._wait([f"left by {rank}"], timedelta(seconds=2)):
                return

    def status(self, longer: float) -> int:
        """Rank 0's."""
        try:
            self.store.wait(["status"], 2 * self._patience + timedelta(seconds=longer))
            status = int(self.store.get("status"))
            self.store.set(f"left by {self._launch.rank}", "")
        except RuntimeError:
            return 1
        return status


def exchange(meeting: Meeting, launch: Launch, seconds: float) -> list[Finding]:
    """A mean over all ranks by Gloo, plain and compressed, and whether all ranks have its bits."""
    import rhtcomm

    patience = timedelta(seconds=seconds)
    others = f"{launch.world_size} ranks"
    try:
        dist.init_process_group(
            "gloo",
            store=PrefixStore("gloo", meeting.store),
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=patience,
        )
        total = torch.tensor([launch.rank + 1.0])
        dist.all_reduce(total)
        if total.item() != launch.world_size * (launch.world_size + 1) / 2:
            fact = f"Gloo's sum over {others} is wrong: {total.item():g}"
            return [Finding("problem", "exchange", fact, "report this, with the versions")]
    except (RuntimeError, ValueError) as error:
        return [Finding("problem", "exchange", _failure(launch, error), CONNECT, key="Gloo")]
    xs = [_gradient(rank) for rank in range(min(launch.world_size, 8))]
    x, key = _gradient(launch.rank % len(xs)), rhtcomm.Key(7)
    start = time.perf_counter()
    try:
        codec = rhtcomm.Codec(rhtcomm.QuicFL(4))
        rhtcomm.all_reduce(x, codec, key, rhtcomm.TorchCommunicator(), min_numel=0)
    except Exception as error:  # such as ranks with different versions
        said = " ".join(str(error).split())[:300]
        return [Finding("problem", "exchange", said, "install one version on all machines")]
    took = time.perf_counter() - start
    counts = [len(range(rank, launch.world_size, len(xs))) for rank in range(len(xs))]
    weighted = [count * one for count, one in zip(counts, xs, strict=True)]
    mean = torch.stack(weighted).sum(dim=0) / launch.world_size
    error_ratio = ((x - mean).norm() / mean.norm()).item()
    same = _compare(meeting, launch, blake2b(x.numpy().tobytes(), digest_size=8).hexdigest())
    if same is not None:
        return [same]
    fact = f"a mean over {others}, by 4 bits over Gloo, has the same bits on all"
    fact += f"; {1e3 * took:.0f} ms for {NUMEL} coordinates"
    if not error_ratio < 0.4:  # expected: at most about 0.15
        fact = f"the mean over {others} is wrong by {100 * error_ratio:.0f}%"
        return [Finding("problem", "exchange", fact, "see the known answers", key="wrong")]
    return [Finding("ok", "exchange", fact, key="right")]


def _gradient(rank: int) -> torch.Tensor:
    return torch.randn(NUMEL, generator=torch.Generator().manual_seed(rank))


def _failure(launch: Launch, error: Exception) -> str:
    said = " ".join(str(error).split())[:200]
    return f"Gloo does not connect rank {launch.rank} on {socket.gethostname()} ({said})"


def _compare(meeting: Meeting, launch: Launch, digest: str) -> Finding | None:
    """A problem if ranks have different bits."""
    digests: list[Any] = [None] * launch.world_size
    dist.all_gather_object(digests, digest)
    others = [rank for rank, other in enumerate(digests) if other != digests[0]]
    if not others:
        return None
    fact = f"a compressed mean has other bits on ranks {', '.join(map(str, others))} than on rank 0"
    return Finding("problem", "exchange", fact, "see the lines on known answers and kernels")
