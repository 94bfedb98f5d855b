"""What may be wrong on this machine, or among the ranks of a launcher, and what to do about it.

Each check is a function that returns findings. Modules of checks are imported only when they run,
and no check can end the program or make it wait for ever: see `guarded`.
"""

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from rhtcomm.doctor.finding import Finding, guarded
from rhtcomm.doctor.launcher import Launch, own_launch
from rhtcomm.doctor.report import printed

if TYPE_CHECKING:
    from rhtcomm.doctor.ranks import Meeting

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `python -m rhtcomm doctor`."""
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument(
        "--seconds", type=float, default=30, help="how long to wait for MPI and for other ranks"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print what the checks find; the status is 1 if any rank has a problem, else 0."""
    if not arguments.seconds > 0:
        raise ValueError(f"--seconds {arguments.seconds:g} must be positive")
    status = diagnose(own_launch(), arguments.seconds, arguments.json)
    sys.stdout.flush()
    sys.stderr.flush()
    # Python would wait for the threads of a Gloo group that did not connect.
    os._exit(status)


def diagnose(launch: Launch, seconds: float, as_json: bool) -> int:
    """The exit status of this rank."""
    logging.getLogger("rhtcomm").setLevel(logging.ERROR)  # its warnings are findings here
    from_mpi: dict[str, Any] = {}
    # First, as MPI knows where ranks on several machines can meet.
    last = guarded("MPI", partial(_mpi, launch, seconds, from_mpi), seconds + 90)
    launch = _with_address(launch, from_mpi)
    meeting: list[Meeting] = []
    if launch.world_size > 1:
        last += guarded("ranks", partial(_meet, launch, seconds, meeting), seconds + 30)
    if meeting:
        launch = replace(launch, machines=meeting[0].machines())
    if launch.machines is not None:  # all ranks came
        own = _named("processor", "Machine")().affinity
        launch = replace(launch, local_cores=meeting[0].local_cores(own))
    findings = alone(launch, seconds) + last
    if not meeting:
        return printed({launch.rank: findings}, launch, as_json)
    return _together(meeting[0], launch, findings, seconds, as_json)


def alone(launch: Launch, seconds: float) -> list[Finding]:
    """What does not ask other ranks."""

    def check(module: str, function: str, *arguments: object) -> Callable[[], Sequence[Finding]]:
        def imported() -> Sequence[Finding]:
            found: Sequence[Finding] = _named(module, function)(*arguments)
            return found

        return imported

    checks = (
        ("versions", check("installation", "versions")),
        ("kernels", check("kernels", "kernels")),
        ("compiler", check("installation", "compiler")),
        ("GPU", check("kernels", "gpu")),
        ("tables", check("installation", "tables")),
        ("cores", check("processor", "of_this_process", launch)),
        ("known answers", check("codec", "known_answers")),
        ("codec", check("codec", "clock")),
        ("network", check("network", "network", launch)),
    )
    # The torch reference takes a while for all known answers.
    return [finding for topic, one in checks for finding in guarded(topic, one, seconds + 60)]


def _together(
    meeting: "Meeting", launch: Launch, findings: list[Finding], seconds: float, as_json: bool
) -> int:
    """Rank 0 prints for all."""
    longer = 0.0
    if launch.machines is not None:  # all ranks came
        longer = 3 * seconds + 60
        if meeting.ready(longer=60):
            exchange = partial(_named("ranks", "exchange"), meeting, launch, seconds)
            findings = findings + guarded("exchange", exchange, 3 * seconds + 30)
    meeting.tell(findings)
    if launch.rank != 0:
        return meeting.status(longer)
    by_rank, silent = meeting.gather(longer)
    status = printed(by_rank, launch, as_json, silent)
    meeting.end(status)
    return status


def _named(module: str, function: str) -> Callable[..., Any]:
    found: Callable[..., Any] = getattr(
        importlib.import_module(f"rhtcomm.doctor.{module}"), function
    )
    return found


def _mpi(launch: Launch, seconds: float, facts: dict[str, Any]) -> Sequence[Finding]:
    found, told = _named("mpi", "mpi")(launch, seconds)
    facts.update(told)
    checked: Sequence[Finding] = found
    return checked


def _meet(launch: Launch, seconds: float, meeting: "list[Meeting]") -> Sequence[Finding]:
    from rhtcomm.doctor.ranks import MEET, Meeting, Unreachable

    if launch.address is None or launch.port is None:
        fact = f"{launch.name} started {launch.world_size} ranks, but nothing tells where they meet"
        return [Finding("problem", "ranks", fact, "set MASTER_ADDR and MASTER_PORT on all ranks")]
    try:
        meeting.append(Meeting(launch, seconds))
    except Unreachable as error:
        return [Finding("problem", "ranks", str(error), MEET)]
    return []


def _with_address(launch: Launch, from_mpi: Mapping[str, Any]) -> Launch:
    if not from_mpi or os.environ.get("MASTER_ADDR"):
        return launch
    return replace(launch, address=from_mpi["address"], port=from_mpi["port"])
