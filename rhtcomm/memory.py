"""Where a tensor lies: what C, Triton and NumPy are given in its place."""

import torch

__all__ = ["address_of", "overlap", "refuse_fake_mode"]


def address_of(x: torch.Tensor, owner: str = "rhtcomm", name: str = "a tensor") -> int:
    """The address of the first element of x, all of whose elements lie in memory of its own.

    Args:
        owner, name: the function that was given x, and as what; for the error.

    Raises:
        TypeError: x is no tensor, or has no memory of its own: it wraps other tensors (DTensor),
            stands for one (FakeTensor, what torch.func's transforms pass), is not strided, lies on
            the meta device, or its storage was freed or made smaller.
    """
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{owner}: {name} is a {type(x).__name__}; make it a torch.Tensor")
    address, inside = 0, False
    try:
        # x.data_ptr() alone is not zero where there is no memory, but an offset into it.
        storage = x.untyped_storage()
        start, stop = storage.data_ptr(), storage.nbytes()
        address = x.data_ptr()
        span = x.nbytes if x.is_contiguous() else _span(x)
        inside = start > 0 and address + span <= start + stop and not x.is_nested
    except RuntimeError:  # what wrappers and other layouts than strided have for a storage
        pass
    if not inside:
        fault = _fault(x, name)
        if fault:
            raise TypeError(f"{owner}: {name} {fault}")
    return address


def overlap(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether the stretches of memory from the first to the last element of both have a byte in
    common."""
    first, second = x.data_ptr(), y.data_ptr()
    return first < second + _span(y) and second < first + _span(x)


def refuse_fake_mode(owner: str) -> None:
    """Raise TypeError where new tensors have no memory: under FakeTensorMode, in functionalize."""
    modes = torch._C._len_torch_dispatch_stack()
    if modes or torch._C._functorch.peek_interpreter_stack():  # seldom, and most do no harm
        address_of(torch.empty(1, device="cpu"), owner, "a tensor made here")


def _span(x: torch.Tensor) -> int:
    """Bytes from the beginning of the first element to the end of the last."""
    if not x.numel():
        return 0
    steps = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return (steps + 1) * x.element_size()


def _fault(x: torch.Tensor, name: str) -> str | None:
    """Why x has no memory and what to do about it; None where it is plainly empty."""
    kind = type(x).__name__
    for method in ("to_local", "wait"):  # of DTensor, and of functional collectives' results
        if hasattr(x, method):
            return f"is a {kind}, which has no memory of its own; pass {name}.{method}()"
    if isinstance(x, torch._subclasses.FakeTensor):
        return f"is a {kind}, which has no memory; pass a real one, outside of FakeTensorMode"
    if x.is_nested:
        return "is a nested tensor; pass its parts one by one"
    if x.layout != torch.strided:
        return f"has the layout {x.layout}; pass {name}.to_dense()"
    if x.device.type == "meta":
        return "lies on the meta device, which has no memory; make it on another one"
    if torch._C._functorch.is_functorch_wrapped_tensor(x) or torch._is_functional_tensor(x):
        return (
            "is what torch.func (vmap, grad, functionalize) passes for a tensor, and has no memory "
            "of its own; call this outside of the transform"
        )
    if type(x).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return f"is a {kind}, which has no memory of its own; pass the tensor that it wraps"
    if not x.numel():
        return None
    return "has no memory, since its storage was freed or made smaller; give it back first"
