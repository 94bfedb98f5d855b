"""The hook in Lightning's Trainer."""

import contextlib
import importlib
import sys
from typing import Any

from torch import nn

from ..policy import Bits
from ..register import Handle
from .common import abandon, attach, finish, gathered, load

__all__ = ["RHTCallback"]


def _callback_class() -> Any:
    """`Callback` of the imported package: `lightning` and `pytorch_lightning` each have their
    own."""
    names = ("lightning.pytorch", "pytorch_lightning")
    loaded = [name for name in names if name in sys.modules]
    for name in (*loaded, *names):
        with contextlib.suppress(ModuleNotFoundError):
            return importlib.import_module(name).Callback
    raise ModuleNotFoundError(
        "rhtcomm.hooks.trainers.lightning: Lightning is not installed; pip install lightning"
    )


_Callback: Any = _callback_class()


class RHTCallback(_Callback):
    """Compress the gradients of `Trainer.fit`.

    ``Trainer(strategy="ddp", callbacks=[RHTCallback(bits=4)], ...)``

    It registers the hook when a fit begins, logs its figures with each step (`Handle.figures`, by
    `self.log`), saves its state in the Trainer's checkpoints, and closes it when the fit ends or
    fails. Another fit continues with the same random streams. With `ModelParallelStrategy` (FSDP2)
    it calls `compress_fsdp`. In a single process it warns that there is nothing to compress.

    With error feedback each checkpoint has the residuals of all ranks, gathered on rank 0.

    Args:
        bits, options: of `rhtcomm.hooks.register`.

    Raises:
        TypeError: when a fit begins: several processes train without DDP and FSDP.
    """

    def __init__(self, bits: Bits = 4, **options: Any) -> None:
        super().__init__()
        self.handle: Handle | None = None
        """The handle of the current fit."""
        self._bits, self._options = bits, options
        self._state: dict[str, Any] = {}  # from a checkpoint or the previous fit
        self._first_step = 0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        model = trainer.strategy.model
        assert isinstance(model, nn.Module)
        how = 'use Trainer(strategy="ddp", devices=...), or ModelParallelStrategy for FSDP2'
        self.handle = attach(model, self._bits, self._options, "RHTCallback", how)
        if self._state:
            load(self.handle, self._state)
            self._state = {}  # it may have the residuals of all ranks

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._first_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.handle is not None:
            pl_module.log_dict(self.handle.figures(), on_step=True, on_epoch=False)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self.handle is not None:
            handle, self.handle = self.handle, None
            self._state = handle.state_dict()  # for a later save or fit
            why = "with manual optimization, call self.manual_backward(loss), not loss.backward()"
            finish(handle, trainer.global_step > self._first_step, "RHTCallback", why)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._abandon()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._abandon()  # of a fit that had nothing to do and did not reach its end

    def _abandon(self) -> None:
        if self.handle is not None:
            handle, self.handle = self.handle, None
            with contextlib.suppress(Exception):  # Lightning may save after an error
                self._state = handle.state_dict()
            abandon(handle)

    def state_dict(self) -> dict[str, Any]:
        """Lightning calls it on all ranks, and writes what rank 0 returns."""
        return gathered(self._state if self.handle is None else self.handle.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.handle is None:
            self._state = state_dict
        else:  # some strategies load a checkpoint only after wrapping
            load(self.handle, state_dict)
