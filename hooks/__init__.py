"""Communication hooks for torch's data-parallel wrappers."""

from .ddp import RHTState, Stats, rht_hook

__all__ = ["RHTState", "Stats", "rht_hook"]
