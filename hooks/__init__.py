"""Communication hooks for torch's data-parallel wrappers."""

from .ddp import rht_hook
from .register import Handle, register
from .state import RHTState
from .telemetry import Stats

__all__ = ["Handle", "RHTState", "Stats", "register", "rht_hook"]
