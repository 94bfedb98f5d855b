"""Gradient compression by randomized Hadamard transforms and unbiased quantization."""

import sys

if sys.byteorder != "little":
    raise ImportError(
        "rhtcomm: this processor is big-endian, where payloads would be decoded wrongly; "
        "only little-endian ones (x86-64, aarch64, riscv64, ppc64le) can be used"
    )

from rhtcomm.codec import Codec, PayloadError
from rhtcomm.collectives import DisagreementError, all_reduce
from rhtcomm.communicator import HierarchicalCommunicator, MPICommunicator, TorchCommunicator
from rhtcomm.cost import plan
from rhtcomm.lattice import Lattice
from rhtcomm.quantizers import Eden, QuicFL, VectorQuantizer
from rhtcomm.randomness import Key
from rhtcomm.rotation import RandomizedHadamard, choose_rotations
from rhtcomm.versions import PACKAGE

__version__ = PACKAGE

__all__ = [
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
    "TorchCommunicator",
    "VectorQuantizer",
    "all_reduce",
    "choose_rotations",
    "plan",
]
