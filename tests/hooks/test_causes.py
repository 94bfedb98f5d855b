"""What errors of the transport mean, and what they let go of."""

import contextlib
import threading
import weakref

import pytest

from rhtcomm.hooks.failures import cause_of, clear_frames, text_of

LATE, GONE, OTHER = "did not answer within 9 s", "another rank died", "this rank failed"
SILENT = "another machine, or the network between, no longer answers"


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        ("Timed out waiting 9000ms for recv operation to complete", LATE),
        ("[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7)", LATE),
        ("[/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1", GONE),
        ("writev [127.0.0.1]:1: Connection reset by peer", GONE),
        ("ncclRemoteError: A call failed possibly due to a network error or a remote process "
         "exiting prematurely.", GONE),
        ("SocketCommunicator: rank 1: [Errno 110] Connection timed out", SILENT),
        ("SocketCommunicator: rank 1: [Errno 113] No route to host", SILENT),
        ("op.preamble.length <= op.nbytes. 4096 vs 8", OTHER),
    ],
)  # fmt: skip
def test_causes(said: str, cause: str) -> None:
    assert cause in cause_of(RuntimeError(said), "9 s", agreed=True)
    assert "registered no hook" in cause_of(RuntimeError(said), "9 s", agreed=False)


def test_an_error_without_a_text_says_its_type() -> None:
    assert text_of(MemoryError()) == "MemoryError()"
    assert text_of(KeyError("name")) == "'name'"


class Group:
    """Something that a frame refers to."""


def fail(groups: "list[weakref.ref[Group]]", error: BaseException) -> None:
    group = Group()
    groups.append(weakref.ref(group))
    raise error


def errors_in_a_circle(groups: "list[weakref.ref[Group]]") -> BaseException:
    """One with a cause and another context, which comes from it."""
    first, second, third = RuntimeError("first"), RuntimeError("second"), RuntimeError("third")
    for error in (first, second, third):
        with contextlib.suppress(RuntimeError):
            fail(groups, error)
    first.__cause__, first.__context__ = second, third
    third.__cause__ = first
    return first


def test_all_errors_that_one_came_from_let_their_frames_go() -> None:
    groups: list[weakref.ref[Group]] = []
    error = errors_in_a_circle(groups)
    assert all(group() for group in groups)
    clearing = threading.Thread(target=clear_frames, args=(error,), daemon=True)
    clearing.start()
    clearing.join(5)
    assert not clearing.is_alive(), "it went round in a circle"
    assert [group() for group in groups] == [None, None, None]
