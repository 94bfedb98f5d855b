"""The network interfaces of this machine, and the one that Gloo takes."""

import os
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Interface", "chosen_by_gloo", "family_of", "interfaces", "is_here"]

_SIOCGIFADDR = 0x8915  # of <linux/sockios.h>: the IPv4 address of an interface


@dataclass(frozen=True)
class Interface:
    """
    Attributes:
        speed: in Mbit/s, where the driver tells.
    """

    name: str
    addresses: tuple[str, ...]
    speed: int | None = None

    @property
    def loopback(self) -> bool:
        return any(address.startswith("127.") or address == "::1" for address in self.addresses)

    def __str__(self) -> str:
        speed = f", {self.speed / 1000:g} Gbit/s" if self.speed else ""
        return f"{self.name} ({', '.join(self.addresses)}{speed})"


def interfaces(root: Path = Path("/")) -> list[Interface]:
    """Those with an address; none where the system is not Linux."""
    found = []
    six: dict[str, list[str]] = {}
    for line in _read(root / "proc/net/if_inet6").splitlines():
        octets, *_, name = line.split()
        address = socket.inet_ntop(socket.AF_INET6, bytes.fromhex(octets))
        if not address.startswith("fe80"):  # of the link alone
            six.setdefault(name, []).append(address)
    for _, name in socket.if_nameindex() if hasattr(socket, "if_nameindex") else []:
        addresses = [*_ipv4(name), *six.get(name, [])]
        text = _read(root / "sys/class/net" / name / "speed")
        speed = int(text) if text.isdecimal() and int(text) > 0 else None
        if addresses:
            found.append(Interface(name, tuple(addresses), speed))
    return found


def _ipv4(name: str) -> list[str]:
    try:
        import fcntl
    except ImportError:
        return []
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
    except OSError:  # it has none, or the machine has IPv6 only
        return []
    return [socket.inet_ntoa(answer[20:24])]


def chosen_by_gloo(there: list[Interface]) -> tuple[str, str]:
    """The address that Gloo takes, and why; the address is empty where Gloo would fail.

    As torch does: that of GLOO_SOCKET_IFNAME, else the first address of the host's name that is
    this machine's, else the loopback.
    """
    wanted = os.environ.get("GLOO_SOCKET_IFNAME")
    if wanted:
        first = wanted.split(",")[0]
        addresses = next((one.addresses for one in there if one.name == first), ("",))
        return addresses[0], f"GLOO_SOCKET_IFNAME={wanted}"
    host = socket.gethostname()
    try:
        resolved = [str(entry[4][0]) for entry in socket.getaddrinfo(host, None)]
    except OSError:
        resolved = []
    for address in resolved:
        if is_here(address):
            return address, f"the name of this host, {host}, is {address}"
    return "127.0.0.1", f"the name of this host, {host}, is no address of this machine"


def is_here(address: str) -> bool:
    """Whether it is an address of this machine; an interface may have several."""
    try:
        with socket.socket(family_of(address), socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


def family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # also where the driver does not know its speed
        return ""
