"""Tensors to compress, and whether two are the same."""

import torch

__all__ = ["numbers", "same"]


def numbers(count: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Made on the CPU, so that both sides have the same."""
    generator = torch.Generator().manual_seed(seed)
    some = torch.randn(min(count, (1 << 22) - 5), generator=generator)
    return some.repeat(-(-count // some.numel()))[:count].to(dtype)


def same(x: torch.Tensor, y: torch.Tensor) -> bool:
    """All bits, but that all NaN are one."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.itemsize]
    if torch.equal(x.view(whole), y.view(whole)):
        return True
    return bool(((x.view(whole) == y.view(whole)) | (x.isnan() & y.isnan())).all())
