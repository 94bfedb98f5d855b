"""Error feedback (Seide et al., INTERSPEECH 2014; Karimireddy et al., ICML 2019).

It adds to x_t, what a rank has at step t, the residual r_t of what it could not send before:

    sent = decode(encode(x_t + r_t)),    r_(t+1) = x_t + r_t - sent,    r_0 = 0,

so that over any number of steps the results and the mean residual add up to the exact means. What
an owner of a shard (two_shot; gather: rank 0) loses when it encodes the mean of n ranks again goes
n times into its own residual, which counts as one n-th. What the mean loses as it is rounded to
bfloat16 or float16 is the same on all ranks, and goes into the residual of each.

A segment that is zero on all ranks, by x_t alone, keeps its residual: otherwise a layer that is not
used any more would be moved by what is left.
"""

import torch

from rhtcomm.codec import Codec
from rhtcomm.floating_point import assign_
from rhtcomm.lattice import Lattice
from rhtcomm.reduce.job import Job
from rhtcomm.segments import Segments

__all__ = ["add_residual", "check_error_feedback", "keep_residual_"]


def check_error_feedback(codec: Codec | Lattice) -> None:
    """Raise ValueError unless residuals of the codec stay bounded."""
    if isinstance(codec, Lattice):
        raise ValueError(
            "rhtcomm: error feedback must decode each rank's own codes, but a Lattice can decode "
            "only their sum; use another quantizer, such as Eden"
        )
    # Two hops of vNMSE e leave e + e (1 + e), which at one bit exceeds 1 but for the biased scale.
    if codec.quantizer.bits == 1 and not getattr(codec.quantizer, "biased", False):
        raise ValueError(
            f"rhtcomm: error feedback with {codec.quantizer} can diverge, since with one bit and "
            "an unbiased scale the residual may grow; use 2 bits, or Eden(1, biased=True) (hook: "
            "quantizer='eden')"
        )


def add_residual(flat: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x_t + r_t (numel,) float32, and room for what is left of it."""
    total = flat.float() + residual
    return total, torch.zeros_like(total)


def keep_residual_(
    residual: torch.Tensor, job: Job, flat: torch.Tensor, segments: Segments, used: torch.Tensor
) -> None:
    """The mean `job.flat` goes to `flat`, and what is left of this rank's to `residual`.

    Where any number of the mean is not finite, the residual stays as it was: a gradient scaler then
    skips the step.
    """
    assert job.left is not None
    assign_(flat, job.flat)
    job.left += job.flat - flat.float()  # the rounding to the tensor's dtype
    segments.restore_(job.left, used, residual)
    usable = flat.isfinite().all()
    residual.copy_(torch.where(usable, job.left, residual))
