"""Ranks compare their configurations before they exchange anything else."""

import hashlib
import json

import torch

from rhtcomm.communicators import Topology

__all__ = ["FACTS_BYTES", "DisagreementError", "check_agreement"]

FACTS_BYTES = 4096  # of a rank's configuration message, in every version
_NAME = "name of the rank"


class DisagreementError(RuntimeError):
    """The ranks have different configurations."""


def check_agreement(topology: Topology, facts: dict[str, object], device: torch.device) -> None:
    """Raise on every rank if `facts` are not the same on all of them.

    One exchange of fixed length, so it works for any facts.

    Raises:
        DisagreementError: naming the fields that differ, and their values by rank; or a rank that
            sent something else.
    """
    greeting = {name: _shown(value) for name, value in facts.items()}
    levels = [level for level in (topology.within, topology.between) if level is not None]
    greeting["connections"] = ", ".join(str(level.connections) for level in levels)
    greeting[_NAME] = topology.name_of(topology.rank)
    text = json.dumps(greeting).encode()
    assert len(text) <= FACTS_BYTES
    row = torch.frombuffer(bytearray(text.ljust(FACTS_BYTES)), dtype=torch.uint8).to(device)
    by_rank = [
        _read_greeting(bytes(other), topology.name_of(rank))
        for rank, other in enumerate(topology.all_gather(row).tolist())
    ]
    names = [other.pop(_NAME) for other in by_rank]
    differing = []
    for name in dict.fromkeys(name for other in by_rank for name in other):
        ranks_of: dict[str, list[int]] = {}
        for rank, other in enumerate(by_rank):
            ranks_of.setdefault(other.get(name, "absent"), []).append(rank)
        if len(ranks_of) > 1:
            values = "; ".join(
                f"{value} on {_abridged([names[rank] for rank in ranks])}"
                for value, ranks in ranks_of.items()
            )
            differing.append(f"{name} ({values})")
    if differing:
        raise DisagreementError(
            f"rhtcomm: the ranks are configured differently in {', '.join(differing)}; "
            "give all ranks the same arguments"
        )


def _shown(value: object) -> str:
    """At most 80 characters; longer text ends with a digest."""
    text = str(value)
    if len(text) <= 80:
        return text
    return f"{text[:67]}... {hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}"


def _read_greeting(row: bytes, name: str) -> dict[str, str]:
    try:
        greeting = json.loads(row)
        if not isinstance(greeting, dict) or not isinstance(greeting.get(_NAME), str):
            raise ValueError("it lacks a name")
    except ValueError as error:
        raise DisagreementError(
            f"rhtcomm: {name} did not send its configuration ({error}): it runs another version of "
            "rhtcomm, or other code uses this process group; start all ranks with the same "
            "program and version"
        ) from error
    return greeting


def _abridged(names: list[str]) -> str:
    """Names such as "rank 1", or "rank 1 (rank 3 of the world)"."""
    shown = names[:8]
    if len(names) > 1 and all(name.removeprefix("rank ").isdigit() for name in shown):
        text = "ranks " + ", ".join(name.removeprefix("rank ") for name in shown)
    else:
        text = ", ".join(shown)
    return text if len(names) <= 8 else f"{text} and {len(names) - 8} more"
