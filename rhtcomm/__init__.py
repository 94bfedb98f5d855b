"""Gradient compression by randomized Hadamard transforms and unbiased quantization."""

from rhtcomm.codec import Codec, PayloadError
from rhtcomm.collectives import DisagreementError, all_reduce
from rhtcomm.communicator import MPICommunicator, TorchCommunicator
from rhtcomm.lattice import Lattice
from rhtcomm.plan import plan
from rhtcomm.quantizers import Eden, QuicFL
from rhtcomm.randomness import Key
from rhtcomm.rotation import RandomizedHadamard

__all__ = [
    "Codec",
    "DisagreementError",
    "Eden",
    "Key",
    "Lattice",
    "MPICommunicator",
    "PayloadError",
    "QuicFL",
    "RandomizedHadamard",
    "TorchCommunicator",
    "all_reduce",
    "plan",
]
