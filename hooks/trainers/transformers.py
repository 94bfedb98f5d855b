"""The hook in Transformers' Trainer."""

import functools
import os
import warnings
import weakref
from typing import Any

from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from ..policy import Bits
from ..register import Handle
from .common import abandon, attach, finish, restore_rank, save_rank

__all__ = ["RHTCallback"]


class RHTCallback(TrainerCallback):
    """Compress the gradients of `Trainer.train`.

    ``trainer.add_callback(RHTCallback(trainer, bits=4))``, on all ranks and before `train`.

    It registers the hook on the model that the Trainer has wrapped when training begins, adds its
    figures (`Handle.figures`) to the Trainer's logs, writes one file per rank into each checkpoint,
    reads them when `train` resumes, and closes the hook when training ends or fails. With FSDP it
    calls `compress_fsdp`. In a single process it warns that there is nothing to compress.

    Args:
        trainer: the Trainer, which callbacks need to find the wrapped model and the resumed
            checkpoint. Its `train` is replaced by one that records these.
        bits, options: of `rhtcomm.hooks.register`.

    Raises:
        TypeError: trainer is not a Trainer. When training begins: several processes train without
            DDP and FSDP.
    """

    def __init__(self, trainer: Trainer | None = None, bits: Bits = 4, **options: Any) -> None:
        if not isinstance(trainer, Trainer):
            raise TypeError(
                "RHTCallback: trainer must be the Trainer, which holds the wrapped model, but "
                f"this is {trainer!r:.80}; create the Trainer first, then call "
                "trainer.add_callback(RHTCallback(trainer, bits=4))"
            )
        self.handle: Handle | None = None
        """The handle of the current training."""
        self._trainer: Any = weakref.ref(trainer)
        self._bits, self._options = bits, options
        self._checkpoint: str | None = None  # to resume from
        self._first_step = 0
        trainer.train = self._around(trainer.train)

    def _around(self, train: Any) -> Any:
        """`train`, which first records its arguments, and closes the hook on failure."""

        @functools.wraps(train)
        def noted(resume_from_checkpoint: Any = None, *args: Any, **options: Any) -> Any:
            trainer = self._trainer()
            self._checkpoint = resume_from_checkpoint or None
            if resume_from_checkpoint is True:
                self._checkpoint = get_last_checkpoint(trainer.args.output_dir)
            modules = trainer.model_wrapped.modules()
            if any(isinstance(module, DistributedDataParallel) for module in modules):
                # The Trainer would reuse the DDP model, but DDP accepts a hook only once.
                trainer.model_wrapped = trainer.model
            if self not in trainer.callback_handler.callbacks:
                warnings.warn(
                    "RHTCallback: it is not among the Trainer's callbacks, so nothing is "
                    "compressed; call trainer.add_callback(RHTCallback(trainer, ...))",
                    stacklevel=2,
                )
            try:
                return train(resume_from_checkpoint, *args, **options)
            finally:
                self._abandon()

        return noted

    def _abandon(self) -> None:
        if self.handle is not None:
            handle, self.handle = self.handle, None
            abandon(handle)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._abandon()  # of an attempt with a batch that was too large (auto_find_batch_size)
        trainer = self._trainer()
        how = "start the script with torchrun or accelerate launch, for DDP or FSDP"
        self.handle = attach(trainer.model_wrapped, self._bits, self._options, "RHTCallback", how)
        if self._checkpoint is not None:
            restore_rank(self.handle, self._checkpoint)
        self._first_step = state.global_step
        # Reporting callbacks are called in order, and must find the figures in the logs.
        callbacks = trainer.callback_handler.callbacks
        callbacks.insert(0, callbacks.pop(callbacks.index(self)))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.handle is not None and logs is not None and "loss" in logs:
            figures = self.handle.figures()
            logs.update(figures)
            state.log_history[-1].update(figures)  # it has a copy of the logs

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = os.path.join(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        # A hyperparameter search uses other folders, and resumes no run.
        if self.handle is not None and not args.save_only_model and os.path.isdir(folder):
            save_rank(self.handle, folder)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.handle is not None:
            handle, self.handle = self.handle, None
            why = "compute_loss must call the model that it is given, not self.model"
            finish(handle, state.global_step > self._first_step, "RHTCallback", why)
