"""Error feedback (Seide et al., INTERSPEECH 2014; Karimireddy et al., ICML 2019).

The residual r_t, the compression error so far, is added to the rank's tensor x_t of step t:

    sent = decode(encode(x_t + r_t)),    r_(t+1) = x_t + r_t - sent,    r_0 = 0,

so that over any number of steps the sum of the results plus the mean residual equals the sum of the
exact means. When the owner of a shard (two_shot; gather: rank 0) encodes the mean of n ranks again,
n times its error goes into its own residual, which has weight 1/n. The error of rounding the mean
to bfloat16 or float16 is the same on all ranks, and goes into each residual.

A segment whose x_t is zero on all ranks keeps its residual: otherwise the residual would move a
layer that is no longer used. And the whole residual stays as it is if any number of the mean is not
finite: a gradient scaler then skips the step.

Payloads update the residual in place, chunk by chunk, when the mean of a chunk takes the place of x
(`rhtcomm.kernels.feedback` has the arithmetic). No chunk can know then whether the means of later
chunks will be finite. So before the first chunk, ranks tell each other by a bit, behind those of
used segments, whether all their x and r are small enough that no mean can overflow. (In the hook r
has a bound, which kernels keep up, and is not read for that.) If not, or for float16, whose means
may always overflow, a copy of the residual is kept until the end, as it is on devices, where the
host does not know the bits.

If an exchange raises, a chunk has its new residual if its mean was written before, otherwise its
old one, and after a `PayloadError` no further chunk is updated. With a copy, all chunks have the
old one.
"""

import torch

from rhtcomm.codec import Codec
from rhtcomm.floating_point import assign_
from rhtcomm.kernels import Residual
from rhtcomm.lattice import Lattice
from rhtcomm.reduce.job import Job
from rhtcomm.reduce.residual import Update
from rhtcomm.segments import Segments

__all__ = ["begin", "check_error_feedback", "finish"]


def check_error_feedback(codec: Codec | Lattice) -> None:
    """Raise ValueError unless residuals of the codec stay bounded."""
    if isinstance(codec, Lattice):
        raise ValueError(
            "rhtcomm: error feedback must decode each rank's own codes, but a Lattice can decode "
            "only their sum; use another quantizer, such as Eden"
        )
    # Two hops of vNMSE e leave e + e (1 + e), which at one bit exceeds 1 unless the scale is
    # biased.
    if codec.quantizer.bits == 1 and not getattr(codec.quantizer, "biased", False):
        raise ValueError(
            f"rhtcomm: error feedback with {codec.quantizer} can diverge, since with one bit and "
            "an unbiased scale the residual may grow; use 2 bits, or Eden(1, biased=True) (hook: "
            "quantizer='eden')"
        )


def begin(
    job: Job, residual: Residual, segments: Segments, used: torch.Tensor, in_place: bool
) -> torch.Tensor:
    """Prepare a job whose tensor is to be sent with the residual; returns what to send as `used`.

    Payloads update the residual in place. Others average x_t + r_t in a tensor of its own.
    """
    if in_place:
        job.update = Update(residual, segments)
        return job.update.announce(job.flat, used)
    total = job.flat.float() + residual.read(job.flat.numel())
    job.flat, job.update = total, Update.of(torch.zeros_like(total))
    return used


def finish(
    job: Job, flat: torch.Tensor, residual: Residual, segments: Segments, used: torch.Tensor
) -> None:
    """Write the job's mean to `flat`, and this rank's error to the residual."""
    assert job.update is not None
    if job.flat is flat:
        job.update.finish(flat, used)
        return
    left, before = job.update.left, residual.read(flat.numel())
    assign_(flat, job.flat)
    left += job.flat - flat.float()  # error of rounding to the tensor's dtype
    segments.restore_(left, used, before)
    usable = flat.isfinite().all()
    residual.write(torch.where(usable, left, before))
