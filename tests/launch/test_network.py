"""launch/network.sh: the rate of its links, and that nothing of it stays behind."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness import ROOT, limit

SCRIPT = ROOT / "launch" / "network.sh"


def missing() -> str | None:
    """Why the links cannot be made here, if they cannot."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "tc", "unshare", "setpriv"):
        if shutil.which(tool) is None:
            return f"{tool} was not found"
    probe = subprocess.run(
        [str(SCRIPT), "1", "1gbit", "--", "true"], capture_output=True, text=True, timeout=limit(20)
    )
    if "peration not permitted" in probe.stderr or "nknown device type" in probe.stderr:
        return f"this machine does not let root make them: {probe.stderr.strip()}"
    return None


REASON = missing()
needs_namespaces = pytest.mark.skipif(REASON is not None, reason=str(REASON))
needs_tun = pytest.mark.skipif(not Path("/dev/net/tun").exists(), reason="there is no /dev/net/tun")

# Rank 0 sends 1 MB to each of two others at once, then both send to it: 2 MB each way of one link.
TRANSFER = """
import os, socket, time
from concurrent.futures import ThreadPoolExecutor
BYTES = 1_000_000
def send(peer):
    peer.recv(1)
    peer.sendall(bytes(BYTES))
    peer.recv(1)
def receive(peer):
    peer.sendall(b"?")
    left = BYTES
    while left:
        left -= len(peer.recv(min(left, 1 << 16)))
    peer.sendall(b"!")
address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
if os.environ["RANK"] == "0":
    with socket.create_server(address) as server, ThreadPoolExecutor() as pool:
        peers = [server.accept()[0] for _ in range(2)]
        for action in send, receive:
            start = time.perf_counter()
            list(pool.map(action, peers))
            print(time.perf_counter() - start)
else:
    while True:
        try:
            peer = socket.create_connection(address)
            break
        except OSError:
            time.sleep(0.05)
    receive(peer)
    send(peer)
"""


# Rank 1 sends datagrams, a few at a time, and rank 0 sends back those that reach it. It prints how
# many came back, and the shortest time that one took.
DATAGRAMS = 3000
PINGS = f"""
import os, socket, threading, time
address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
pings = socket.socket(type=socket.SOCK_DGRAM)
if os.environ["RANK"] == "0":
    pings.bind(address)
    while True:
        data, sender = pings.recvfrom(64)
        if data == b"end":
            break
        pings.sendto(data, sender)
else:
    pings.settimeout(0.2)
    while True:
        pings.sendto(b"begin", address)
        try:
            pings.recv(64)
            break
        except OSError:
            pass
    pings.settimeout(1)
    sent, times = {{}}, []
    def receive():
        try:
            while True:
                number = int(pings.recv(64))
                times.append(time.perf_counter() - sent[number])
        except TimeoutError:
            print(len(times), min(times))
    receiving = threading.Thread(target=receive)
    receiving.start()
    for number in range({DATAGRAMS}):
        sent[number] = time.perf_counter()
        pings.sendto(str(number).encode(), address)
        if number % 20 == 0:
            time.sleep(0.002)
    receiving.join()
    for _ in range(10):
        pings.sendto(b"end", address)
"""


def network(ranks: int, rate: str, *program: str, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [str(SCRIPT), str(ranks), rate, "--", *program],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def processes_with(marker: str) -> list[int]:
    """Processes of the whole machine that have the marker among their arguments."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and marker.encode() in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:  # it has just ended
            continue
    return found


def traces() -> tuple[str, str, set[str]]:
    """Named namespaces, devices and mounts, as the whole machine sees them."""
    names = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    devices = subprocess.run(["ip", "-brief", "link"], capture_output=True, text=True, check=True)
    return names.stdout, devices.stdout, set(Path("/proc/mounts").read_text().splitlines())


@needs_namespaces
def test_a_transfer_takes_what_the_rate_says_in_both_directions() -> None:
    # 2 MB of TCP in frames of 1514 bytes, 1448 of them payload. A link that was idle has 16 kB to
    # its credit, at either end. A busy machine only makes a transfer slower, hence three tries.
    frames = 2_000_000 * 1514 / 1448
    least = (frames - 3 * 16_000) * 8 / 100e6
    for _ in range(3):
        run = network(3, "100mbit", sys.executable, "-c", TRANSFER)
        output, errors = run.communicate(timeout=limit(30))
        assert run.returncode == 0, errors
        seconds = [float(line) for line in output.split()]
        assert len(seconds) == 2
        assert min(seconds) >= least
        if max(seconds) < 1.5 * least:
            return
    pytest.fail(f"the links are slower than 100 Mbit/s: {seconds} s, {least} s expected")


@needs_namespaces
@needs_tun
def test_a_way_takes_its_delay_and_loses_its_part() -> None:
    run = network(2, "100mbit", sys.executable, "-c", PINGS, DELAY="30ms", LOSS="5%")
    output, errors = run.communicate(timeout=limit(30))
    assert run.returncode == 0, errors
    came, shortest = output.split()
    assert float(shortest) >= 2 * 0.030
    kept = 0.95**2  # both ways
    deviation = (DATAGRAMS * kept * (1 - kept)) ** 0.5
    assert abs(int(came) - kept * DATAGRAMS) < 5 * deviation


@needs_namespaces
def test_ranks_find_their_place_and_see_only_their_link() -> None:
    program = "echo $RANK $WORLD_SIZE $LOCAL_RANK $MASTER_ADDR $GLOO_SOCKET_IFNAME; "
    program += "ls /sys/class/net | tr '\\n' ' '"
    output, errors = network(2, "1gbit", "sh", "-c", program).communicate(timeout=limit(30))
    assert errors == ""
    for rank in range(2):
        assert f"{rank} 2 0 10.0.0.1 veth0" in output
    assert output.count("veth0") == 4
    assert "eth0" not in output.replace("veth0", "")


@needs_namespaces
@pytest.mark.parametrize("delay", ["", pytest.param("1ms", marks=needs_tun)])
@pytest.mark.parametrize("end", ["success", "failure", "SIGINT", "SIGTERM", "SIGKILL"])
def test_nothing_stays_behind(end: str, delay: str) -> None:
    before = traces()
    marker = f"marker-{os.getpid()}-{end}"
    # Each rank leaves a child behind that ignores what a polite end would send.
    stubborn = "trap : TERM INT HUP; while true; do sleep 1; done"
    program = f"sh -c '{stubborn}' {marker} & echo up; "
    if end == "success":
        program += "exit 0"
    elif end == "failure":
        program += "if [ $RANK = 1 ]; then sleep 0.5; exit 7; fi; sleep 60"
    else:
        program += "sleep 60"
    with network(2, "1gbit", "sh", "-c", program, marker, DELAY=delay) as run:
        assert run.stdout is not None
        for _ in range(2):
            assert run.stdout.readline() == "up\n"
        if end.startswith("SIG"):
            run.send_signal(signal.Signals[end])
        status = run.wait(timeout=limit(15))
    expected = {"success": 0, "failure": 7, "SIGINT": 130, "SIGTERM": 143, "SIGKILL": -9}
    assert status == expected[end]
    # After SIGKILL the kernel needs a moment; in all other cases the script has waited for it.
    deadline = time.monotonic() + (limit(10) if end == "SIGKILL" else 0)
    while (left := processes_with(marker)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []
    assert traces() == before


@needs_namespaces
def test_two_networks_at_once_do_not_meet() -> None:
    runs = [network(3, "100mbit", sys.executable, "-c", TRANSFER) for _ in range(2)]
    for run in runs:
        output, errors = run.communicate(timeout=limit(30))
        assert run.returncode == 0, errors
        assert len(output.split()) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="network namespaces are Linux's")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("0", "1gbit", "--", "true"), "RANKS must be a positive number"),
        (("2", "1g", "--", "true"), "RATE must be like 100mbit or 1gbit, not '1g'"),
        (("2", "1gbit", "true"), "give the program after '--'"),
        (("2", "1gbit", "--"), "give the program after '--'"),
        (("DELAY=25", "2", "1gbit", "--", "true"), "DELAY must be like 25ms, not '25'"),
        (("LOSS=0.001", "2", "1gbit", "--", "true"), "LOSS must be like 0.1%, not '0.001'"),
    ],
)
def test_wrong_arguments_are_named(arguments: tuple[str, ...], message: str) -> None:
    variables = [word for word in arguments if "=" in word]
    command = ["env", *variables, str(SCRIPT), *arguments[len(variables) :]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit(20))
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="network namespaces are Linux's")
def test_without_root_or_iproute2_it_says_so(tmp_path: Path) -> None:
    for tool in ("bash", "env"):
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    done = subprocess.run(
        [str(SCRIPT), "2", "1gbit", "--", "true"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=limit(20),
    )
    assert done.returncode == 2
    assert "ip was not found: install iproute2" in done.stderr
    if os.geteuid() == 0 and shutil.which("setpriv") and shutil.which("ip"):
        done = subprocess.run(
            ["setpriv", "--reuid", "65534", "bash", "-s", "2", "1gbit", "--", "true"],
            input=SCRIPT.read_text(),
            capture_output=True,
            text=True,
            timeout=limit(20),
        )
        assert done.returncode == 2
        assert "only root can make network namespaces" in done.stderr
