"""The hook in the training loops of Ray Train's workers."""

import os
from typing import Any

from torch import nn

from ..policy import Bits
from ..register import Handle
from .common import attach, restore_rank, save_rank

__all__ = ["register", "restore", "save"]


def register(model: nn.Module, bits: Bits = 4, **options: Any) -> Handle:
    """Compress the gradients of a model that `ray.train.torch.prepare_model` returned.

    ``handle = register(model, bits=4)``; call it in all workers. It calls `rhtcomm.hooks.register`,
    or `compress_fsdp` for FSDP2; with one worker it warns that there is nothing to compress. Report
    ``{"loss": ...} | handle.figures()``, and close it at the end of the training loop, or use it as
    a context manager.

    Args:
        model: the result of `prepare_model`.
        bits, options: of `rhtcomm.hooks.register`.

    Raises:
        TypeError: several workers train a model without DDP and FSDP2.
        ValueError, RuntimeError, DisagreementError: as `rhtcomm.hooks.register` does.
    """
    how = "pass ScalingConfig(num_workers=2) to the trainer, and the model to prepare_model()"
    return attach(model, bits, options, "rhtcomm.hooks.trainers.ray.register", how)


def save(handle: Handle, folder: str | os.PathLike[str]) -> None:
    """Write this worker's state of the hook into the folder that it reports as a checkpoint.

    ``save(handle, folder)`` on all workers, and each reports ``Checkpoint.from_directory(folder)``:
    Ray puts the files of all workers into one checkpoint. Data that is equal on all workers, such
    as the model, is needed only in the folder of rank 0.

    Args:
        handle: what `register` returned.
        folder: must exist.
    """
    save_rank(handle, folder)


def restore(handle: Handle, folder: str | os.PathLike[str]) -> None:
    """Load what `save` wrote, from ``checkpoint.as_directory()``; call it in all workers.

    Their number may have changed, except with error feedback. A checkpoint without the hook's state
    is loaded with a warning.

    Args:
        handle: what `register` returned.
        folder: the one that `save` wrote to.

    Raises:
        ValueError: see `Handle.load_state_dict`.
    """
    restore_rank(handle, folder)
