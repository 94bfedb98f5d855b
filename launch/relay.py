"""The links between ranks that `launch/network.sh` emulates with a delay or loss (root).

    python launch/relay.py RANKS MBIT DELAY LOSS

It makes devices wire0, wire1, ... and writes a line. The caller then gives each to its rank, with
the address 10.0.0.1, 10.0.0.2, and so on. A packet waits for its sender's link, which has a rate
of MBIT Mbit/s and a queue of 50 ms; travels for DELAY ms, unless it is lost, with a probability of
LOSS percent; and waits for its receiver's link, which is like the sender's. netem would do the
same, but some kernels lack it.
"""

import contextlib
import fcntl
import gc
import heapq
import os
import random
import select
import struct
import sys
import time
from dataclasses import dataclass

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 1, 0x1000
_ETHERNET = 14  # bytes that a frame adds to a packet; a token bucket of tc counts them too
_QUEUE = 0.05  # seconds
_TICK = 2e-4  # seconds: the shortest sleep, since waking up for each packet would take long


@dataclass
class Port:
    """One direction of a rank's link. `free` is when it will have sent what it has accepted."""

    bits_per_second: float
    free: float = 0.0

    def leaves(self, packet: bytes, now: float) -> float | None:
        """When a packet that comes now will have left; None if the queue is full."""
        begins = max(now, self.free)
        if begins - now > _QUEUE:
            return None
        self.free = begins + 8 * (len(packet) + _ETHERNET) / self.bits_per_second
        return self.free


class Relay:
    def __init__(self, devices: list[int], mbit: float, delay: float, loss: float) -> None:
        self.devices, self.delay, self.loss = devices, delay / 1e3, loss / 1e2
        self.up, self.down = ([Port(1e6 * mbit) for _ in devices] for _ in range(2))
        self.random = random.Random(0)
        self.travelling: list[tuple[float, int, int, bool, bytes]] = []
        self.count = 0  # packets at the same time leave in order

    def run(self) -> None:
        sender_of = {device: rank for rank, device in enumerate(self.devices)}
        while True:
            sleep = None
            if self.travelling:
                sleep = max(_TICK, self.travelling[0][0] - time.monotonic())
            for device in select.select(self.devices, [], [], sleep)[0]:
                self.read(device, self.up[sender_of[device]])
            self.move(time.monotonic())

    def read(self, device: int, port: Port) -> None:
        """Put what a rank sends on its link."""
        for _ in range(64):
            try:
                packet = os.read(device, 1 << 16)
            except BlockingIOError:
                return
            receiver = (packet[18] * 250 + packet[19] - 1) if packet[0] >> 4 == 4 else -1
            if not 0 <= receiver < len(self.devices):
                continue  # IPv6, multicast
            left = port.leaves(packet, time.monotonic())
            if left is not None and self.random.random() >= self.loss:
                self.later(left + self.delay, receiver, False, packet)

    def later(self, when: float, receiver: int, there: bool, packet: bytes) -> None:
        self.count += 1
        heapq.heappush(self.travelling, (when, self.count, receiver, there, packet))

    def move(self, now: float) -> None:
        """Packets reach the receiver's link, and then the receiver."""
        while self.travelling and self.travelling[0][0] <= now:
            when, _, receiver, there, packet = heapq.heappop(self.travelling)
            if there:
                with contextlib.suppress(OSError):  # its device went down, as the rank ended
                    os.write(self.devices[receiver], packet)
                continue
            left = self.down[receiver].leaves(packet, when)
            if left is not None:
                self.later(left, receiver, True, packet)


def device(name: str) -> int:
    made = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(made, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return made


def main() -> None:
    ranks, (mbit, delay, loss) = int(sys.argv[1]), map(float, sys.argv[2:])
    relay = Relay([device(f"wire{rank}") for rank in range(ranks)], mbit, delay, loss)
    with contextlib.suppress(PermissionError):  # ahead of the ranks, or they delay packets too
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    gc.disable()  # no cycles arise
    print("ready", flush=True)
    relay.run()


if __name__ == "__main__":
    main()
