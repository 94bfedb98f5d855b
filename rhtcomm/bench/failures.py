"""What is said when a rank is lost: one sentence, by one of the ranks that are left."""

import os
import re
import signal
import sys
import time
from types import FrameType

from torch.distributed import DistError, PrefixStore, Store  # type: ignore[attr-defined]

__all__ = ["Told", "Watch", "in_words", "sentence_of"]

_OWN = "rhtcomm bench: "  # how messages of the benchmark begin
_PATIENCE = 3.0  # seconds that the others get to say what they know
# Torch raises RuntimeError for lost connections, with many texts, and for most errors of models.
_LOST = re.compile(
    r"gloo|nccl|xccl|\bucc\b|\bmpi|connect|\bpeer\b|socket|broken pipe|tim(ed|es?) ?out|"
    r"process ?group|transport|rht_hook",
    re.IGNORECASE,
)
_LATE = re.compile(r"tim(ed|es?) ?out", re.IGNORECASE)


class Told(BaseException):
    """This rank was told to end, by SIGTERM."""


class Watch:
    """Knows what ranks were doing, and what becomes of them; it works through a store of torch."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.doing = "the ranks were connecting"
        self._ending = False
        self._store: Store | None = None
        # What launchers send to the other ranks when one is lost.
        signal.signal(signal.SIGTERM, self._told)

    def connect(self, store: Store) -> None:
        self._store = PrefixStore("rhtcomm bench", store)

    def _told(self, number: int, frame: FrameType | None) -> None:
        if not self._ending:
            raise Told

    def end(self, error: BaseException) -> None:
        """Say what happened, on one rank, and end this process with the status 1.

        A rank whose own error it was comes with a reason; one that only notices that others are
        gone, with a symptom.
        """
        self._ending = True
        self._say(error)
        sys.stdout.flush()
        os._exit(1)  # connections to ranks that are gone may never close

    def _say(self, error: BaseException) -> None:
        own, who = in_words(error), f"rank {self.rank} of {self.world_size}"
        if self._store is None:
            _print(f"{who} ended while {self.doing}: {own.lstrip('?')}")
            return
        try:
            self._store.set(f"ended {self.rank}", own)
            if self._store.add("tellers", 1) > 1:
                _wait(self._store, ["told"])
                return
            known = self._gather()
            _print(sentence_of(known, self.world_size, self.doing))
            # The others leave when this is there, and some launchers then kill those that are left.
            self._store.set("told", "")
        except (RuntimeError, OSError):  # the store went with rank 0
            if self.rank == 1:
                _print(f"rank 0 of {self.world_size} is gone while {self.doing}")

    def _gather(self) -> dict[int, str]:
        """What ranks said before they ended."""
        assert self._store is not None
        keys = [f"ended {rank}" for rank in range(self.world_size)]
        _wait(self._store, keys)
        return {
            rank: self._store.get(key).decode()
            for rank, key in enumerate(keys)
            if self._store.check([key])
        }


def _print(sentence: str) -> None:
    print(f"{_OWN}{sentence}", file=sys.stderr, flush=True)


def in_words(error: BaseException) -> str:
    """A reason, or "" for what may only be the consequence of another rank's."""
    if isinstance(error, Told):
        return ""
    if isinstance(error, KeyboardInterrupt):
        return "it was interrupted"
    text = (str(error).splitlines() or [""])[0]
    if isinstance(error, DistError) or (type(error) is RuntimeError and _LOST.search(text)):
        return f"?{text}"
    if text.startswith(_OWN):
        return text.removeprefix(_OWN)
    return f"it raised {type(error).__name__}: {text}"


def sentence_of(known: dict[int, str], world_size: int, doing: str) -> str:
    """Of what ranks said before they ended; those that said nothing are gone.

    A text that begins with "?" may be a consequence.
    """
    reasons = {rank: text for rank, text in known.items() if text and not text.startswith("?")}
    if reasons:
        rank, text = min(reasons.items())
        return f"rank {rank} of {world_size} ended the run while {doing}: {text}"
    gone = [rank for rank in range(world_size) if rank not in known]
    if gone and any(_LATE.search(text) for text in known.values()):
        which = f"rank {gone[0]} of {world_size}" if len(gone) == 1 else f"ranks {gone}"
        return f"{which} did not come in time (it hangs, or is much slower) while {doing}"
    if gone:
        which = f"rank {gone[0]} of {world_size} is" if len(gone) == 1 else f"ranks {gone} are"
        return f"{which} gone (killed, or it crashed) while {doing}"
    symptoms = {rank: text[1:] for rank, text in known.items() if text}
    if symptoms:
        rank, text = min(symptoms.items())
        return f"rank {rank} of {world_size} failed while {doing}: {text}"
    return f"all ranks were told to end (SIGTERM) while {doing}"


def _wait(store: Store, keys: list[str]) -> None:
    """Until they are there, or for `_PATIENCE`."""
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline and not store.check(keys):
        time.sleep(0.05)
