"""Error feedback (Seide et al., INTERSPEECH 2014; Karimireddy et al., ICML 2019).

The residual r_t, the compression error so far, is added to the rank's tensor x_t of step t:

    sent = decode(encode(x_t + r_t)),    r_(t+1) = x_t + r_t - sent,    r_0 = 0,

so that over any number of steps the sum of the results plus the mean residual equals the sum of the
exact means. When the owner of a shard (two_shot; gather: rank 0) encodes the mean of n ranks again,
n times its error goes into its own residual, which has weight 1/n. The error of rounding the mean
to bfloat16 or float16 is the same on all ranks, and goes into each residual.

A segment whose x_t is zero on all ranks keeps its residual: otherwise the residual would move a
layer that is no longer used.
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
    # Two hops of vNMSE e leave e + e (1 + e), which at one bit exceeds 1 unless the scale is
    # biased.
    if codec.quantizer.bits == 1 and not getattr(codec.quantizer, "biased", False):
        raise ValueError(
            f"rhtcomm: error feedback with {codec.quantizer} can diverge, since with one bit and "
            "an unbiased scale the residual may grow; use 2 bits, or Eden(1, biased=True) (hook: "
            "quantizer='eden')"
        )


def add_residual(flat: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x_t + r_t (numel,) float32, and a buffer for its error."""
    total = flat.float() + residual
    return total, torch.zeros_like(total)


def keep_residual_(
    residual: torch.Tensor, job: Job, flat: torch.Tensor, segments: Segments, used: torch.Tensor
) -> None:
    """Write the mean `job.flat` to `flat`, and this rank's error to `residual`.

    If any number of the mean is not finite, the residual does not change: a gradient scaler then
    skips the step.
    """
    assert job.left is not None
    assign_(flat, job.flat)
    job.left += job.flat - flat.float()  # error of rounding to the tensor's dtype
    segments.restore_(job.left, used, residual)
    usable = flat.isfinite().all()
    residual.copy_(torch.where(usable, job.left, residual))
