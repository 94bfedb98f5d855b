"""Gradient compression by randomized Hadamard transforms and unbiased quantization."""

import sys

if sys.byteorder != "little":
    raise ImportError(
        "rhtcomm: this processor is big-endian, and would decode payloads wrongly; use a "
        "little-endian one (x86-64, aarch64, riscv64, ppc64le)"
    )

from rhtcomm.codec import Codec
from rhtcomm.communicators import HierarchicalCommunicator, MPICommunicator, TorchCommunicator
from rhtcomm.lattice import Lattice
from rhtcomm.moments import choose_rotations
from rhtcomm.planning.plan import plan
from rhtcomm.quantizers import ECDQ, Eden, QuicFL, VectorQuantizer
from rhtcomm.randomness import Key
from rhtcomm.reduce import (
    DisagreementError,
    Report,
    all_reduce,
    all_reduce_many,
    reduce_scatter,
)
from rhtcomm.rotation import RandomizedHadamard
from rhtcomm.versions import PACKAGE
from rhtcomm.wire import PayloadError

__version__ = PACKAGE

__all__ = [
    "ECDQ",
    "Codec",
    "DisagreementError",
    "Eden",
    "HierarchicalCommunicator",
    "Key",
    "Lattice",
    "MPICommunicator",
    "PayloadError",
    "QuicFL",
    "RandomizedHadamard",
    "Report",
    "TorchCommunicator",
    "VectorQuantizer",
    "all_reduce",
    "all_reduce_many",
    "choose_rotations",
    "plan",
    "reduce_scatter",
]
