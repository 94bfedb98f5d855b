"""What an error of an exchange means, in words, and what it must not keep alive."""

import re
import traceback

from ..randomness import Key
from ..reduce import DisagreementError, Reducer

__all__ = ["cause_of", "clear_frames", "explain", "text_of"]

_LATE = re.compile("timed? ?out|waited", re.IGNORECASE)
_GONE = re.compile(
    "closed by|reset by|broken pipe|not connected|remote process exit", re.IGNORECASE
)
_NO_HOOK = "or registered no hook, or a hook with another process_group"


def explain(
    error: BaseException, reducer: Reducer, key: Key, agreed: bool, owner: str = "rht_hook"
) -> BaseException:
    """An error on a bucket's way, with what it means where it came from the transport.

    Args:
        error: what was raised.
        reducer: that raised it; its clock has not been stopped since.
        key: of the bucket.
        agreed: whether the ranks have compared their configurations.
        owner: whose call it is.
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
    """What the transport's error means."""
    if _LATE.search(str(error)):
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
    """What an error says; its type, where it says nothing."""
    return str(error) or repr(error)


def clear_frames(error: BaseException) -> None:
    """Forget the local variables in the tracebacks of an error and of those that it came from.

    They hold what refers to the process group, whose connections would stay open.
    """
    left, seen = [error], set[int]()
    while left:
        one = left.pop()
        if id(one) in seen:  # errors may come from each other
            continue
        seen.add(id(one))
        traceback.clear_frames(one.__traceback__)
        left += [before for before in (one.__cause__, one.__context__) if before is not None]
