"""Communication hooks for torch's data-parallel wrappers, and averagers for outer steps."""

from typing import TYPE_CHECKING, Any

from . import telemetry
from .ddp import rht_hook
from .local_sgd import OuterAverager
from .model_averager import CompressedModelAverager
from .register import Handle, register
from .state import RHTState
from .stats import BucketReport, Stats

if TYPE_CHECKING:
    from .fsdp import compress_fsdp

__all__ = [
    "BucketReport",
    "CompressedModelAverager",
    "Handle",
    "OuterAverager",
    "RHTState",
    "Stats",
    "compress_fsdp",
    "register",
    "rht_hook",
    "telemetry",
]


def __getattr__(name: str) -> Any:
    """Import `compress_fsdp` on first use: importing torch's FSDP2 takes seconds."""
    if name == "compress_fsdp":
        from .fsdp import compress_fsdp

        return compress_fsdp
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
