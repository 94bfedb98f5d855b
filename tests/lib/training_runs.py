"""A short run of the trainer, what it must end with, and faults in its ranks."""

import csv
import json
from pathlib import Path

import torch

STEPS = 12
RUN = f"--layers 1 --width 64 --heads 2 --context 32 --batch 2 --warmup 2 --steps {STEPS}"
RUN += " --eval-every 5 --eval-batches 1 --threads 1 --backend gloo --checkpoint-every 3"
RUN += " --hook rht --error-feedback --bucket-cap-mb 0.1"


class Files:
    """What a run writes."""

    def __init__(self, folder: Path, name: str) -> None:
        self.checkpoint = folder / f"{name}.pt"
        self.log = folder / f"{name}.csv"
        self.summary = folder / f"{name}.json"
        self.arguments = [
            *RUN.split(),
            f"--checkpoint={self.checkpoint}",
            f"--csv={self.log}",
            f"--summary={self.summary}",
        ]

    def losses(self) -> list[tuple[str, str]]:
        with self.log.open(newline="") as file:
            return [(row["step"], row["train_loss"]) for row in csv.DictReader(file)]

    def check_that_it_ended_as(self, whole: "Files") -> None:
        """With the same log, the same bits in all that was trained, and a summary."""
        assert self.losses() == whole.losses()
        assert [step for step, _ in self.losses()] == [str(step + 1) for step in range(STEPS)]
        ours, theirs = (torch.load(files.checkpoint, weights_only=True) for files in (self, whole))
        assert ours["step"] == STEPS
        buckets = [[state.pop("buckets") for state in one["hook"]] for one in (ours, theirs)]
        assert buckets[0] == buckets[1]  # which assert_close does not take, as names are strings
        for name in ("model", "optimizer", "hook"):
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0)
        summaries = [json.loads(files.summary.read_text()) for files in (self, whole)]
        assert len({summary["final_val_loss"] for summary in summaries}) == 1
        assert summaries[0].keys() == summaries[1].keys()


# Python imports this module at its start. Once, at a rank's n-th call of a function, it runs a
# command of the shell, whose parent is the rank.
FAULT = """
import os
from pathlib import Path
from pkgutil import resolve_name
rank, function, count = os.environ["FAULT"].split()
done = Path(os.environ["FAULT_DONE"])
if os.environ.get("RANK") == rank and not done.exists():
    module, name = function.split(":")
    owner, left = resolve_name(module), int(count)
    original = getattr(owner, name)
    def call(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            done.touch()
            os.system(os.environ["FAULT_COMMAND"])
        return original(*args, **kwargs)
    setattr(owner, name, call)
"""
STEP_8 = "torch.nn.utils:clip_grad_norm_ 8"
KILL = "kill -9 $PPID"
