"""Network interfaces, and the one that Gloo takes."""

import os
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

from rhtcomm.doctor.finding import Finding
from rhtcomm.doctor.launcher import Launch

__all__ = ["Interface", "chosen_by_gloo", "interfaces", "network"]

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
    """The interface that Gloo will take, and why; the name is empty where Gloo would fail.

    As torch does: GLOO_SOCKET_IFNAME, else the first address of the host's name that is this
    machine's, else the loopback.
    """
    wanted = os.environ.get("GLOO_SOCKET_IFNAME")
    if wanted:
        first = wanted.split(",")[0]
        known = [one.name for one in there]
        return (first if first in known else "", f"GLOO_SOCKET_IFNAME={wanted}")
    host = socket.gethostname()
    try:
        resolved = [str(entry[4][0]) for entry in socket.getaddrinfo(host, None)]
    except OSError:
        resolved = []
    for address in resolved:
        for one in there:
            if address in one.addresses or (address.startswith("127.") and one.loopback):
                return one.name, f"the name of this host, {host}, is {address}"
    return "lo", f"the name of this host, {host}, is no address of this machine"


def network(launch: Launch) -> list[Finding]:
    """Interfaces, and Gloo's choice."""
    there = interfaces()
    if not there:
        return [Finding("remark", "network", "which interfaces there are, only Linux tells")]
    names = ", ".join(one.name for one in there)
    found = [Finding("ok", "network", ", ".join(map(str, there)), key=names)]
    name, why = chosen_by_gloo(there)
    others = [one.name for one in there if not one.loopback]
    if not name:
        fact = f"{why}, but no such interface has an address here: Gloo fails"
        remedy = f"set it to {' or '.join(others)}" if others else "unset it"
        return [*found, Finding("problem", "Gloo", fact, remedy)]
    fact = f"Gloo takes {name}, since {why}"
    inside = name == "lo" or any(one.name == name and one.loopback for one in there)
    remedy = "on each machine export GLOO_SOCKET_IFNAME={}, or mend /etc/hosts"
    remedy = remedy.format(" or ".join(others) or "INTERFACE")
    if inside and not launch.on_one_machine:
        fact += ": other machines cannot reach it, and ranks wait for each other until a timeout"
        return [*found, Finding("problem", "Gloo", fact, remedy, key=name)]
    if inside and launch.world_size == 1:
        fact += ", which suffices on one machine only"
        return [*found, Finding("remark", "Gloo", fact, remedy, key=name)]
    return [*found, Finding("ok", "Gloo", fact, key=name)]


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # also where the driver does not know its speed
        return ""
