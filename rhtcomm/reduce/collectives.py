"""All-reduce (mean) and reduce-scatter (mean) of tensors through compressed payloads.

all_gather: every rank decodes all n payloads. two_shot: each rank receives all payloads of one
shard, averages them, encodes the mean again, and gathers the shards of the others. gather: rank 0
does this for the whole tensor, like a parameter server. Large tensors are split into chunks of
whole blocks, so that the link and the codec work at the same time. A block's randomness depends on
its offset in the tensor, so chunks do not change any bit of the result.

Segments (whole parameters, or their rows) that are zero on all ranks come back as zeros; see
rhtcomm/segments.py. One bit per segment is sent with the first chunk.
"""

import threading
from collections.abc import Sequence
from functools import partial

import torch

from rhtcomm.codec import AUTO, Codec
from rhtcomm.communicators import Communicator, Topology, users
from rhtcomm.floating_point import assign_
from rhtcomm.lattice import Lattice
from rhtcomm.memory import memory_of
from rhtcomm.randomness import Key
from rhtcomm.reduce.checks import (
    agree,
    check_alike,
    check_residual,
    check_rotations,
    check_scatter,
    check_tensor,
    check_types,
    described,
)
from rhtcomm.reduce.reducer import Reducer, Report
from rhtcomm.reduce.split import Algorithm, check_algorithm
from rhtcomm.segments import Segments, rows_of

__all__ = ["all_reduce", "all_reduce_many", "reduce_scatter"]


def all_reduce(
    tensor: torch.Tensor,
    codec: Codec | Lattice,
    key: Key,
    communicator: Topology,
    *,
    algorithm: Algorithm = "auto",
    min_numel: int = 1 << 14,
    rotations: int | None = None,
    segments: Sequence[int] | None = None,
    check: bool = True,
    residual: torch.Tensor | None = None,
) -> Report:
    """Replace `tensor` by its mean over all ranks, in place; every rank gets the same bits.

    If the exchange fails, the content of `tensor` is lost.

    n is the number of ranks, P the payload bytes of the whole tensor, e the quantizer's vNMSE, m
    the mean over ranks of |tensor|^2; b, w and D are those of `Lattice`:

                      bytes sent per rank      squared error of the mean
        all_gather    (n - 1) P                e m / n
        two_shot      2 (n - 1) / n P          e m / n + e |mean|^2
        gather        P, rank 0: (n - 1) P     e m / n + e |mean|^2
        lattice       2 (n - 1) / n P w / b    D^2 / 12 / n per coordinate

    Args:
        tensor: float32, bfloat16 or float16, any shape, contiguous or not; the same dtype and shape
            on all ranks.
        codec: how to compress. A `Lattice` uses one integer all-reduce instead of payloads.
        key: the same on all ranks, and a new one for each call: errors of successive calls average
            out only with new randomness.
        communicator: who takes part.
        algorithm: "all_gather", "two_shot", "gather" (to rank 0 and back), or "auto": all_gather if
            it sends at most 128 KiB more than two_shot (as with two ranks), otherwise two_shot. A
            `Lattice` allows only "auto".
        min_numel: smaller tensors are sent uncompressed, as float32.
        rotations: only if the codec's are "auto": the number for this call, the same on all ranks,
            such as `wanted_rotations` of the last report for this tensor; None: the safe number.
        segments: lengths of the parameters that make up the flattened tensor, the same on all
            ranks; by default one segment. A segment that is zero on all ranks (0.0 or -0.0) comes
            back as 0.0, even if its neighbours are not finite (below `min_numel` as -0.0 if it is
            -0.0 on all ranks); its part of `residual` does not change. Zeros in other segments are
            coded like other numbers.
        check: compare the configuration of all ranks first, which costs one small exchange.
        residual: float32 of the tensor's shape and device, zeros before the first step: error
            feedback, see `rhtcomm.reduce.feedback`. It is added to the tensor and replaced by this
            rank's compression error. If any number of the result is not finite, the residual does
            not change: a gradient scaler then skips the step. One bit needs a quantizer with
            biased=True.

    Returns:
        What happened. `wanted_rotations` came with the payloads: the most that any rank found its
        own tensor to need; where nothing was compressed, `rotations` as given.

    Raises:
        TypeError: the tensor has another dtype (float64 and integers are never rounded silently) or
            no memory of its own (as a DTensor has none), the codec is a bare quantizer, the
            communicator a process group or not a communicator at all, or the key not a `Key`.
        ValueError: the algorithm is unknown, or requested with a `Lattice`; the rotations are not
            1, 2 or 3, or differ from the fixed number of the codec or `Lattice`; the segments do
            not add up to the tensor; elements of the tensor share memory; the residual has another
            shape, dtype or device; or the codec does not support one.
        DisagreementError: on all ranks, naming the fields in which they differ: "arguments" if only
            some ranks were given arguments that are refused above.
        RuntimeError: another user is sending over the communicator's process group.
        PayloadError: a payload that arrived is not what was expected. With two levels all ranks of
            a node raise it if one does. Ranks that received other payloads may return the mean, so
            the run must not continue after this error; the DDP hook then calls the communicator's
            `abort`.
    """
    check_types(codec, key, communicator, "all_reduce")
    memory_of(tensor, "rhtcomm.all_reduce", "tensor")
    if residual is not None:
        memory_of(residual, "rhtcomm.all_reduce", "residual")

    def check_arguments() -> None:
        check_algorithm(algorithm, codec)
        check_rotations(codec, rotations)
        check_tensor(tensor, "tensor", "all_reduce")
        check_residual(residual, tensor.shape, tensor.device, codec, "all_reduce")

    with users.using(communicator, threading.current_thread()):
        if check:
            facts = {
                "algorithm": algorithm,
                "min_numel": min_numel,
                "dtype": tensor.dtype,
                "shape": tuple(tensor.shape),
                "rotations now": rotations,
                "segments": list(segments) if isinstance(segments, Sequence) else segments,
                "residual": described(residual),
            }
            agree(codec, key, communicator, tensor.device, facts, check_arguments)
        check_arguments()
        lengths = None if segments is None else Segments(segments, tensor.numel()).given
        reducer = Reducer(codec, communicator, algorithm, min_numel)
        return _mean_(reducer, tensor, key, rotations, lengths, None, residual)


def all_reduce_many(
    tensors: Sequence[torch.Tensor],
    codec: Codec | Lattice,
    key: Key,
    communicator: Topology,
    *,
    algorithm: Algorithm = "auto",
    min_numel: int = 1 << 14,
    check: bool = True,
    residual: torch.Tensor | None = None,
) -> Report:
    """`all_reduce` of several tensors of one dtype and device in one exchange, in place.

    They are sent as one flattened tensor. Its segments (see `all_reduce`) are these tensors, or
    their rows along the first of two or more dimensions if rows have at least 64 coordinates. So
    rows of an embedding that are zero on all ranks, since their symbols occurred on no rank, come
    back as zeros.

    Args:
        tensors: as for `all_reduce`, the same number and shapes on all ranks.
        codec, key, communicator, algorithm, check: as for `all_reduce`.
        min_numel: as for `all_reduce`, counted over all tensors.
        residual: (coordinates of all tensors,) float32, as for `all_reduce`.

    Returns:
        What happened to all of them together.

    Raises:
        ValueError: there is no tensor, or they differ in dtype or device.
        TypeError, ValueError, DisagreementError, RuntimeError, PayloadError: as `all_reduce` does.
    """
    check_types(codec, key, communicator, "all_reduce_many")
    tensors = list(tensors)
    for i, tensor in enumerate(tensors):
        memory_of(tensor, "rhtcomm.all_reduce_many", f"tensors[{i}]")
    if residual is not None:
        memory_of(residual, "rhtcomm.all_reduce_many", "residual")
    lengths = tuple(tensor.numel() for tensor in tensors)

    def check_arguments() -> None:
        check_algorithm(algorithm, codec)
        check_alike(tensors)
        device = tensors[0].device
        check_residual(residual, (sum(lengths),), device, codec, "all_reduce_many")

    with users.using(communicator, threading.current_thread()):
        if check:
            facts = {
                "algorithm": algorithm,
                "min_numel": min_numel,
                "dtypes": [tensor.dtype for tensor in tensors],
                "shapes": [tuple(tensor.shape) for tensor in tensors],
                "residual": described(residual),
            }
            device = tensors[0].device if tensors else torch.device("cpu")
            agree(codec, key, communicator, device, facts, check_arguments)
        check_arguments()
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
        rows = tuple(map(rows_of, (x.shape for x in tensors), lengths))
        reducer = Reducer(codec, communicator, algorithm, min_numel)
        report = _mean_(reducer, flat, key, None, lengths, rows, residual)
    for tensor, mean in zip(tensors, flat.split(lengths), strict=True):
        assign_(tensor.detach(), mean.view(tensor.shape))
    return report


def reduce_scatter(
    output: torch.Tensor,
    tensor: torch.Tensor,
    codec: Codec,
    key: Key,
    communicator: Communicator,
    *,
    min_numel: int = 1 << 14,
    check: bool = True,
) -> Report:
    """Each rank gets the mean over all ranks of its shard of `tensor`.

    One all-to-all of encoded shards; each rank decodes only its own. With P the payload bytes of
    the whole tensor, a rank of n sends (n - 1) / n P; the error of the mean is e / n.

    Args:
        output: (m,) or any shape of m coordinates, contiguous: becomes the mean of shard `rank`.
        tensor: (n m,) or any shape of n m coordinates, contiguous: shard i is the i-th part of m
            coordinates. Both are float32, bfloat16 or float16, and may differ in dtype.
        codec: how to compress; a `Lattice` has no payloads for a single rank.
        key: the same on all ranks, and a new one for each call.
        communicator: who takes part; flat, since shards belong to single ranks.
        min_numel: tensors with fewer coordinates are sent uncompressed, in their own dtype.
        check: as for `all_reduce`.

    Returns:
        What happened; `bytes_uncompressed` is for a ring reduce-scatter.

    Raises:
        TypeError: as `all_reduce` does, or the codec is a `Lattice`.
        ValueError: the lengths do not fit, a tensor is not contiguous, the tensors are on different
            devices or share memory, or the communicator has two levels.
        DisagreementError, RuntimeError, PayloadError: as `all_reduce` does.
    """
    check_types(codec, key, communicator, "reduce_scatter")
    if isinstance(codec, Lattice):
        raise TypeError(
            "rhtcomm.reduce_scatter: a Lattice has no payload for a single rank; pass a Codec, "
            "such as Codec(QuicFL(bits=4))"
        )
    if communicator.within is not None:
        raise ValueError(
            "rhtcomm.reduce_scatter: the communicator has two levels, but shards belong to single "
            "ranks; pass one with a single level, such as rhtcomm.TorchCommunicator()"
        )
    memory_of(output, "rhtcomm.reduce_scatter", "output")
    memory_of(tensor, "rhtcomm.reduce_scatter", "tensor")
    check_arguments = partial(check_scatter, output, tensor, communicator.world_size)
    with users.using(communicator, threading.current_thread()):
        if check:
            facts = {
                "min_numel": min_numel,
                "dtype": tensor.dtype,
                "shape": tuple(tensor.shape),
            }
            agree(codec, key, communicator, tensor.device, facts, check_arguments)
        check_arguments()
        if tensor.numel() == 0:
            return Report.of_nothing()
        reducer = Reducer(codec, communicator, min_numel=min_numel)
        return reducer.scatter_(output.detach().view(-1), tensor.detach().view(-1), key)


def _mean_(
    reducer: Reducer,
    tensor: torch.Tensor,
    key: Key,
    rotations: int | None,
    lengths: tuple[int, ...] | None,
    rows: tuple[int, ...] | None,
    residual: torch.Tensor | None,
) -> Report:
    """`Reducer.mean_` of a tensor of any shape and layout."""
    if tensor.numel() == 0 or (reducer.topology.world_size == 1 and residual is None):
        return Report.of_nothing(rotations if reducer.codec.rotations == AUTO else None)
    flat = tensor.detach().resolve_neg().contiguous().view(-1)
    left = None if residual is None else residual.detach().resolve_neg().reshape(-1)
    if rotations is not None:
        reducer.wishes[key.bucket, flat.numel()] = rotations
    report = reducer.mean_(flat, key, lengths=lengths, rows=rows, residual=left)
    if flat.data_ptr() != tensor.data_ptr():
        assign_(tensor.detach(), flat.view(tensor.shape))
    if residual is not None and left is not None and left.data_ptr() != residual.data_ptr():
        residual.detach().copy_(left.view(residual.shape))
    if report.wanted_rotations is None and reducer.codec.rotations == AUTO:
        report.wanted_rotations = rotations
    return report
