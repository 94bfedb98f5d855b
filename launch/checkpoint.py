"""The checkpoint of a run, and how all ranks agree on the one to resume from."""

import argparse
import hashlib
import io
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# The settings that determine a run's results; a resumed run must have the same.
RESUME_FIELDS = (
    "layers",
    "width",
    "heads",
    "context",
    "batch",
    "steps",
    "lr",
    "warmup",
    "seed",
    "hook",
    "bits",
    "quantizer",
    "exact_fraction",
    "rotations",
    "algorithm",
    "error_feedback",
    "hook_warmup",
    "powersgd_rank",
    "bucket_cap_mb",
)

# The variables by which torchrun and Slurm (for a requeued job) tell a rank that it was restarted.
RESTART_COUNTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")


def settings_of(args: argparse.Namespace, world_size: int, corpus: str) -> dict[str, Any]:
    """The settings that a resumed run must share; `corpus` is the hash of the training data."""
    settings = {name: getattr(args, name) for name in RESUME_FIELDS}
    return settings | {"world_size": world_size, "corpus": corpus}


def gather(value: Any) -> list[Any]:
    """The values of all ranks, by rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    # If the run is killed here, the previous checkpoint must survive.
    partial = path.with_name(path.name + ".partial")
    torch.save(content, partial)
    os.replace(partial, path)


def load_checkpoint(
    path: Path, settings: dict[str, Any], device: torch.device
) -> tuple[dict[str, Any] | None, str]:
    """A rank's checkpoint or None, and a description of what it found at the path."""
    if not path.is_file():
        return None, "no file"
    try:
        data = path.read_bytes()
        content = torch.load(io.BytesIO(data), map_location=device, weights_only=True)
        saved, step = content["config"], content["step"]
    except Exception as error:  # anything that unpickling raises; all ranks must learn of it
        return None, f"no readable checkpoint ({type(error).__name__}: {error})"
    differing = [
        f"{name}={saved.get(name)} (now {value})"
        for name, value in settings.items()
        if saved.get(name) != value
    ]
    if differing:
        return None, f"a checkpoint that belongs to another run, with {', '.join(differing)}"
    return content, f"step {step} in a file with SHA-256 {hashlib.sha256(data).hexdigest()[:16]}"


def agreed_checkpoint(
    args: argparse.Namespace, settings: dict[str, Any], device: torch.device
) -> dict[str, Any] | None:
    """The checkpoint that all ranks resume from, or None for a new run.

    The ranks decide together, since their information may differ: torchrun counts a restart only on
    the node of the failure (torch 2.13), and a node may not see another's files.

    Raises:
        ValueError: on all ranks, if they do not all find the same checkpoint of this run.
    """
    restarted = any(int(os.environ.get(name, "0")) for name in RESTART_COUNTS)
    asked, again = (any(given) for given in zip(*gather((args.resume, restarted)), strict=True))
    path = args.checkpoint
    if path is None:
        return None
    if not (asked or again):
        # A restart before this run's first checkpoint must not load another run's.
        if dist.get_rank() == 0 and path.is_file():
            os.replace(path, path.with_name(path.name + ".previous"))
        return None

    checkpoint, found = load_checkpoint(path, settings, device)
    ranks_by_finding: dict[str, list[str]] = {}
    for rank, finding in enumerate(gather(found)):
        ranks_by_finding.setdefault(finding, []).append(str(rank))
    if list(ranks_by_finding) == ["no file"] and not asked:
        return None  # it failed before the first checkpoint
    if checkpoint is None or len(ranks_by_finding) > 1:
        findings = "; ".join(
            f"rank{'s' * (len(ranks) > 1)} {', '.join(ranks)} found {finding}"
            for finding, ranks in ranks_by_finding.items()
        )
        raise ValueError(
            f"the ranks cannot resume from --checkpoint {path}: {findings}. It must name a file "
            "that all nodes can read, written with the settings of this run; omit --resume to "
            "start a new run"
        )
    return checkpoint
