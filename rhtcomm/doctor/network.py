"""Network interfaces, and the one that Gloo takes."""

from rhtcomm.communicators.interfaces import chosen_by_gloo, interfaces
from rhtcomm.doctor.finding import Finding
from rhtcomm.doctor.launcher import Launch

__all__ = ["network"]


def network(launch: Launch) -> list[Finding]:
    """Interfaces, and Gloo's choice."""
    there = interfaces()
    if not there:
        return [Finding("remark", "network", "which interfaces there are, only Linux tells")]
    names = ", ".join(one.name for one in there)
    found = [Finding("ok", "network", ", ".join(map(str, there)), key=names)]
    address, why = chosen_by_gloo(there)
    others = [one.name for one in there if not one.loopback]
    if not address:
        fact = f"{why}, but no such interface has an address here: Gloo fails"
        remedy = f"set it to {' or '.join(others)}" if others else "unset it"
        return [*found, Finding("problem", "Gloo", fact, remedy)]
    inside = address.startswith("127.") or address == "::1"
    having = (one.name for one in there if address in one.addresses)
    name = next(having, "lo" if inside else address)
    fact = f"Gloo takes {name}, since {why}"
    remedy = "on each machine export GLOO_SOCKET_IFNAME={}, or mend /etc/hosts"
    remedy = remedy.format(" or ".join(others) or "INTERFACE")
    if inside and not launch.on_one_machine:
        fact += ": other machines cannot reach it, and ranks wait for each other until a timeout"
        return [*found, Finding("problem", "Gloo", fact, remedy, key=name)]
    if inside and launch.world_size == 1:
        fact += ", which suffices on one machine only"
        return [*found, Finding("remark", "Gloo", fact, remedy, key=name)]
    return [*found, Finding("ok", "Gloo", fact, key=name)]
