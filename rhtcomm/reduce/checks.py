"""Checks of the collectives' arguments.

If one rank raised alone, the others would wait for it. So checks that depend on argument values run
twice: once to tell the other ranks, and once more to raise.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist

from rhtcomm.codec import AUTO, DTYPES, Codec
from rhtcomm.communicators import Topology
from rhtcomm.lattice import Lattice
from rhtcomm.memory import memory_of, overlap
from rhtcomm.randomness import Key
from rhtcomm.reduce.agreement import check_agreement
from rhtcomm.reduce.feedback import check_error_feedback

__all__ = [
    "agree",
    "check_alike",
    "check_residual",
    "check_rotations",
    "check_scatter",
    "check_tensor",
    "check_types",
    "described",
]


def agree(
    codec: Codec | Lattice,
    key: Key,
    communicator: Topology,
    device: torch.device,
    facts: Mapping[str, object],
    check: Callable[[], object],
) -> None:
    """Compare the ranks' configurations, and whether `check` accepts the arguments of each.

    Raises:
        DisagreementError: on all ranks, naming the fields in which they differ.
    """
    verdict = "valid"
    try:
        check()
    except (TypeError, ValueError) as fault:
        verdict = str(fault)
    facts = {**codec.configuration, "key": key, **facts, "arguments": verdict}
    check_agreement(communicator, facts, device)


def described(x: torch.Tensor | None) -> object:
    """What ranks compare of an argument."""
    return None if x is None else (x.dtype, tuple(x.shape), x.device.type)


def check_types(codec: object, key: object, communicator: object, call: str) -> None:
    """Raise TypeError if ranks cannot even compare their arguments."""
    if not isinstance(codec, (Codec, Lattice)):
        raise TypeError(
            f"rhtcomm.{call}: codec={codec!r} must be a Codec, such as Codec(QuicFL(bits=4)), "
            "or a Lattice"
        )
    if isinstance(communicator, dist.ProcessGroup):
        raise TypeError(
            f"rhtcomm.{call}: the communicator is a process group; pass "
            "rhtcomm.TorchCommunicator(group)"
        )
    if isinstance(communicator, type) or not hasattr(communicator, "all_reduce_"):
        raise TypeError(
            f"rhtcomm.{call}: communicator={communicator!r} must be a communicator such as "
            "rhtcomm.TorchCommunicator()"
        )
    if not isinstance(key, Key):
        raise TypeError(f"rhtcomm.{call}: key={key!r} must be a rhtcomm.Key, such as Key(seed)")


def check_rotations(codec: Codec | Lattice, rotations: int | None) -> None:
    """Raise ValueError unless the codec accepts this number of rotations."""
    if rotations is None:
        return
    if type(rotations) is not int or rotations not in (1, 2, 3):  # True is an int too
        raise ValueError(
            f"rhtcomm.all_reduce: rotations={rotations!r} must be 1, 2 or 3 (an int), or None"
        )
    if codec.rotations not in (AUTO, rotations):
        raise ValueError(
            f"rhtcomm.all_reduce: rotations={rotations}, but this {type(codec).__name__} was made "
            f"with rotations={codec.rotations}; leave out rotations here"
        )


def check_tensor(x: torch.Tensor, name: str, call: str) -> None:
    """Raise unless x can be reduced in place."""
    if x.dtype not in DTYPES:
        raise TypeError(
            f"rhtcomm.{call}: the {name} is {x.dtype}, but only float32, bfloat16 and "
            "float16 can be reduced; convert it, or reduce it with torch.distributed"
        )
    _check_own_elements(x, name, call)


def _check_own_elements(x: torch.Tensor, name: str, call: str) -> None:
    """Raise ValueError unless each element has memory of its own."""
    if any(step == 0 and size > 1 for step, size in zip(x.stride(), x.shape, strict=True)):
        raise ValueError(
            f"rhtcomm.{call}: the {name} was expanded to its shape {tuple(x.shape)}, so its "
            f"elements share memory; pass the original, or {name}.clone()"
        )


def check_residual(
    residual: torch.Tensor | None,
    shape: Sequence[int],
    device: torch.device,
    codec: Codec | Lattice,
    call: str,
) -> None:
    """Raise unless `residual` fits the tensor and the codec for error feedback."""
    if residual is None:
        return
    _check_own_elements(residual, "residual", call)
    check_error_feedback(codec)
    fits = tuple(residual.shape) == tuple(shape) and residual.device == device
    if not fits or residual.dtype != torch.float32:
        raise ValueError(
            f"rhtcomm.{call}: the residual is {residual.dtype} of shape {tuple(residual.shape)} on "
            f"{residual.device}, but {tuple(shape)} on {device} is needed; create it with "
            f"torch.zeros({tuple(shape)}, device={str(device)!r})"
        )


def check_alike(tensors: Sequence[torch.Tensor]) -> None:
    """Raise unless the tensors can be flattened into one and reduced."""
    for i, tensor in enumerate(tensors):
        check_tensor(tensor, f"tensors[{i}]", "all_reduce_many")
    kinds = {(tensor.dtype, tensor.device) for tensor in tensors}
    if len(kinds) != 1:
        found = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds)) or "nothing"
        raise ValueError(
            "rhtcomm.all_reduce_many: the tensors must have one dtype and device, but have "
            f"{found}; call it once for each dtype and device"
        )


def check_scatter(output: torch.Tensor, tensor: torch.Tensor, world_size: int) -> None:
    """Raise unless `output` can hold one of `world_size` shards of `tensor`."""
    for x, name in ((output, "output"), (tensor, "tensor")):
        check_tensor(x, name, "reduce_scatter")
        if not x.is_contiguous() or x.is_neg():
            fact, remedy = ("negated", "resolve_neg") if x.is_neg() else ("strided", "contiguous")
            raise ValueError(
                f"rhtcomm.reduce_scatter: the {name} is {fact}; pass {name}.{remedy}()"
            )
    memory = memory_of(output, "rhtcomm.reduce_scatter", "output")
    if overlap(memory, memory_of(tensor, "rhtcomm.reduce_scatter", "tensor")):
        raise ValueError(
            "rhtcomm.reduce_scatter: output overlaps tensor; give it memory of its own"
        )
    if tensor.numel() != world_size * output.numel():
        raise ValueError(
            f"rhtcomm.reduce_scatter: tensor has {tensor.numel()} coordinates and output "
            f"{output.numel()}, but {world_size} ranks need {world_size} shards of output's length"
        )
    if output.device != tensor.device:
        raise ValueError(
            f"rhtcomm.reduce_scatter: output lies on {output.device}, tensor on {tensor.device}; "
            "move one to the other"
        )
