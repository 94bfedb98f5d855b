"""Where a tensor lies in memory, for C, Triton and NumPy."""

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["address_of", "bytes_of", "memory_of", "overlap", "plain", "refuse_fake_mode"]


def memory_of(x: torch.Tensor, owner: str, name: str) -> tuple[int, int]:
    """The range of addresses from the first element of x to the end of the last.

    A tensor has no memory of its own if it wraps another tensor (DTensor) or stands for one
    (FakeTensor, torch.func's transforms), is not strided, is on the meta device, or has a storage
    that was freed or shrunk. `owner` is the called function, `name` its argument.

    Raises:
        TypeError: x is not a tensor, or has no memory of its own.
    """
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{owner}: {name} is a {type(x).__name__}; make it a torch.Tensor")
    try:
        if type(x) is not torch.Tensor and isinstance(x, torch._subclasses.FakeTensor):
            raise RuntimeError  # whose storage only warns
        storage = x.untyped_storage()
        origin, begin = storage.data_ptr(), x.data_ptr()
        end = begin + (x.nbytes if x.is_contiguous() else _span(x))
        if origin and end - origin <= storage.nbytes() and not x.is_nested:
            return begin, end
    except RuntimeError:  # raised for wrappers and layouts other than strided
        pass
    fault = _fault(x, name)
    if fault:
        raise TypeError(f"{owner}: {name} {fault}")
    return 0, 0


def address_of(x: torch.Tensor) -> int:
    """The address of the first element of x, which is not 0 unless x is empty.

    Raises:
        TypeError: x has no memory of its own.
    """
    if type(x) is not torch.Tensor:
        memory_of(x, "rhtcomm", "a tensor")
    try:
        address = x.data_ptr()
    except RuntimeError:
        address = 0
    # Without a storage this is only an offset. Real addresses are hardly ever this small.
    if address < 1 << 40 and address <= x.storage_offset() * x.element_size():
        memory_of(x, "rhtcomm", "a tensor")
    return address


def bytes_of(x: torch.Tensor) -> npt.NDArray[np.uint8]:
    """The bytes of x, as a view of its memory that keeps x alive.

    After `x.numpy()` torch would refuse to resize the storage of x, which some callers do to free
    it.

    Raises:
        ValueError: x is not contiguous.
    """
    if not x.is_contiguous():
        raise ValueError(
            f"rhtcomm: a tensor of shape {tuple(x.shape)} and strides {x.stride()} is not "
            "contiguous; pass x.contiguous()"
        )
    return np.asarray(_Memory(x))


class _Memory:
    """What NumPy asks for the memory of a tensor."""

    __slots__ = ("__array_interface__", "_tensor")

    def __init__(self, x: torch.Tensor) -> None:
        self._tensor = x
        self.__array_interface__ = {
            "version": 3,
            "shape": (x.nbytes,),
            "typestr": "|u1",
            "data": (x.data_ptr(), False),
        }


def overlap(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two ranges of memory (see `memory_of`) have a byte in common."""
    return one[0] < other[1] and other[0] < one[1]


def refuse_fake_mode(owner: str) -> None:
    """Raise TypeError if new tensors have no memory: under FakeTensorMode, in torch.func."""
    modes = torch._C._len_torch_dispatch_stack()
    if modes or torch._C._functorch.peek_interpreter_stack():  # rare, and most are harmless
        try:
            memory_of(torch.empty(1, device="cpu"), owner, "a tensor made here")
        except TypeError as fault:
            raise TypeError(
                f"{owner}: new tensors have no memory here, as under FakeTensorMode or in a "
                "torch.func transform; call it outside of these"
            ) from fault


def plain(x: torch.Tensor, copy: bool = True) -> torch.Tensor:
    """x as kernels take it: without autograd's graph and the negative bit; contiguous if `copy`."""
    if x.requires_grad:  # rare, and detaching is the slowest part here
        x = x.detach()
    if x.is_neg():  # the imaginary part of a conjugate
        x = x.resolve_neg()
    return x.contiguous() if copy else x


def _span(x: torch.Tensor) -> int:
    """Bytes from the beginning of the first element to the end of the last."""
    if not x.numel():
        return 0
    steps = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return (steps + 1) * x.element_size()


def _fault(x: torch.Tensor, name: str) -> str | None:
    """Why x has no memory and what to do about it; None if it is simply empty."""
    kind = type(x).__name__
    for method in ("to_local", "wait"):  # of DTensor, and of functional collectives' results
        if hasattr(x, method):
            return f"is a {kind}, which has no memory of its own; pass {name}.{method}()"
    if isinstance(x, torch._subclasses.FakeTensor):
        return f"is a {kind}, which has no memory; pass a real tensor, outside of FakeTensorMode"
    if x.is_nested:
        return "is a nested tensor; pass its components one by one"
    if x.layout != torch.strided:
        return f"has the layout {x.layout}; pass {name}.to_dense()"
    if x.device.type == "meta":
        return "is on the meta device, which has no memory; create it on another device"
    if torch._C._functorch.is_functorch_wrapped_tensor(x) or torch._is_functional_tensor(x):
        return (
            "is a wrapper of torch.func (vmap, grad, functionalize), which has no memory of its "
            "own; call this outside of the transform"
        )
    if type(x).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return f"is a {kind}, which has no memory of its own; pass the tensor that it wraps"
    if not x.numel():
        return None
    return "has no memory: its storage was freed, shrunk or never allocated; allocate it"
