"""What is made on a device, beside payloads, as large as the bucket; on CPU tensors here."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rhtcomm.segments import Segments


class Made(TorchDispatchMode):
    """Where tensors of at least `nbytes` lie that operations return within it."""

    def __init__(self, nbytes: int) -> None:
        super().__init__()
        self.addresses, self._nbytes = set[int](), nbytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.nbytes >= self._nbytes:
                self.addresses.add(x.untyped_storage().data_ptr())
        return result


@pytest.mark.parametrize("by_value", [False, True])
def test_segments_are_restored_by_one_mask_of_bytes(by_value: bool) -> None:
    lengths = [40_000, 3, 90_000]
    x, segments = torch.zeros(sum(lengths), dtype=torch.bfloat16), Segments(lengths, sum(lengths))
    used, value = segments.used(x), torch.ones_like(x) if by_value else None
    restore_ = getattr(segments, "_restore_on_device_")  # noqa: B009  for CPU tensors there is another
    with Made(x.numel()) as made:
        restore_(x, used, value)
    assert len(made.addresses - {x.data_ptr()}) == 1
