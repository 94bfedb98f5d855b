"""Transports: the exchanges on which the collectives are built."""

from rhtcomm.communicators.base import Communicator, Topology, ring_bytes
from rhtcomm.communicators.hierarchical import HierarchicalCommunicator
from rhtcomm.communicators.mpi import MPICommunicator
from rhtcomm.communicators.sockets import SocketCommunicator
from rhtcomm.communicators.torch import TorchCommunicator, backend_of
from rhtcomm.communicators.users import users

__all__ = [
    "Communicator",
    "HierarchicalCommunicator",
    "MPICommunicator",
    "SocketCommunicator",
    "Topology",
    "TorchCommunicator",
    "backend_of",
    "ring_bytes",
    "users",
]
