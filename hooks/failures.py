"""Explains errors of exchanges, and frees what their tracebacks keep alive."""

import errno
import re
import traceback

from ..randomness import Key
from ..reduce import DisagreementError, Reducer

__all__ = ["cause_of", "clear_frames", "explain", "text_of"]

# What sockets say if probes or data get no answer, or if a router knows no way.
_UNREACHABLE = re.compile(
    rf"\[Errno ({errno.ETIMEDOUT}|{errno.EHOSTUNREACH})\]|no route to host|unreachable",
    re.IGNORECASE,
)
_LATE = re.compile("timed? ?out|waited", re.IGNORECASE)
_GONE = re.compile(
    "closed by|reset by|broken pipe|not connected|remote process exit", re.IGNORECASE
)
_NO_HOOK = "or registered no hook, or a hook with another process_group"


def explain(
    error: BaseException, reducer: Reducer, key: Key, agreed: bool, owner: str = "rht_hook"
) -> BaseException:
    """The error of a bucket; if it came from the transport, with an explanation.

    Args:
        error: the exception.
        reducer: the one that raised it; its clock is still running.
        key: of the bucket.
        agreed: whether the ranks have compared their configurations.
        owner: the called function, for the message.
    """
    from_transport = reducer.clock.part == "exchange"
    reducer.clock.to(None)
    if isinstance(error, DisagreementError) or not from_transport:
        return error
    if not isinstance(error, (RuntimeError, TimeoutError)):
        return error
    topology = reducer.topology
    explained = RuntimeError(
        f"{owner}: {topology.name_of(topology.rank)} of {topology.world_size} could not exchange "
        f"bucket {key.bucket} of step {key.step}: {cause_of(error, topology.patience, agreed)}. "
        f"The transport says: {error}"
    )
    explained.__cause__ = error
    return explained


def cause_of(error: BaseException, patience: str, agreed: bool) -> str:
    """The likely cause of a transport error."""
    if _UNREACHABLE.search(str(error)):
        cause = "another machine, or the network between, no longer answers"
    elif _LATE.search(str(error)):
        cause = (
            f"another rank did not answer within {patience}; it hangs, was stopped, or makes "
            "different calls"
        )
    elif _GONE.search(str(error)):
        cause = "another rank died, or failed and closed its connections"
    else:
        cause = "this rank failed, or another rank made a different call"
    if not agreed:
        cause += f", {_NO_HOOK}"
    return f"{cause}. See what the other ranks printed first"


def text_of(error: BaseException) -> str:
    """The text of an error, or its type if the text is empty."""
    return str(error) or repr(error)


def clear_frames(error: BaseException) -> None:
    """Clear the local variables in the tracebacks of an error and of its causes.

    They refer to the process group, whose connections would stay open.
    """
    left, seen = [error], set[int]()
    while left:
        one = left.pop()
        if id(one) in seen:  # errors may cause each other
            continue
        seen.add(id(one))
        traceback.clear_frames(one.__traceback__)
        left += [before for before in (one.__cause__, one.__context__) if before is not None]
