"""The hook in Accelerate."""

import os
import weakref
from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from torch import nn

from ..policy import Bits
from ..register import Handle
from .common import attach, restore_rank, save_rank

__all__ = ["register"]


def register(accelerator: Accelerator, model: nn.Module, bits: Bits = 4, **options: Any) -> Handle:
    """Compress the gradients of a model that `accelerator.prepare` returned.

    ``handle = register(accelerator, model, bits=4)``; call it in all processes.

    `accelerator.save_state` and `load_state` save and load the hook's state, in one file per rank,
    like Accelerate's random states; a checkpoint without them is loaded with a warning.
    `accelerator.end_training` closes the hook. Log with ``accelerator.log({"loss": ...} |
    handle.figures(), step=step)``.

    With FSDP it calls `compress_fsdp`. In a single process it warns that there is nothing to
    compress.

    Args:
        accelerator: the Accelerator.
        model: what its `prepare` returned.
        bits, options: of `rhtcomm.hooks.register`.

    Raises:
        TypeError: it is not an Accelerator, or several processes train a model without DDP and
            FSDP.
        ValueError, RuntimeError, DisagreementError: as `rhtcomm.hooks.register` does.
    """
    if not isinstance(accelerator, Accelerator):
        raise TypeError(
            "rhtcomm.hooks.trainers.accelerate.register: accelerator must be the Accelerator, and "
            f"model what its prepare() returned, but this is {accelerator!r:.80}"
        )
    how = "start the script with accelerate launch or torchrun, for DDP or FSDP"
    owner = "rhtcomm.hooks.trainers.accelerate.register"
    handle = attach(model, bits, options, owner, how)
    ending = accelerator.end_training
    if not isinstance(ending, _Hooks):
        accelerator.end_training = ending = _Hooks(ending)
        accelerator.register_save_state_pre_hook(ending.save)
        accelerator.register_load_state_pre_hook(ending.load)
    ending.handles[model] = handle
    return handle


class _Hooks:
    """All hooks of an accelerator, by model; hooks of freed models are dropped.

    It replaces `end_training`, and closes the hooks first.
    """

    def __init__(self, end_training: Callable[[], None]) -> None:
        self.handles = weakref.WeakKeyDictionary[nn.Module, Handle]()
        self._end_training = end_training

    def __call__(self) -> None:
        for handle in self.handles.values():
            handle.close()
        self._end_training()

    def save(self, models: Any, weights: Any, folder: str | os.PathLike[str]) -> None:
        for index, handle in enumerate(self.handles.values()):
            save_rank(handle, folder, f"rhtcomm_{index}")

    def load(self, models: Any, folder: str | os.PathLike[str]) -> None:
        for index, handle in enumerate(self.handles.values()):
            restore_rank(handle, folder, f"rhtcomm_{index}")
