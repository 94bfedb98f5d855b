"""Time of a gradient bucket's exchange between two sites, over one connection and over several.

    python benchmarks/wan.py              all of it (root; 15 minutes)
    python benchmarks/wan.py --quick
    python benchmarks/wan.py --links      what emulated links do to a ping and to plain TCP streams

Links are emulated by launch/network.sh: 100 Mbit/s, 25 ms each way, queues of 50 ms. Each loss and
congestion control is one run. In it all contestants take turns on the same data, after a check: the
mean is as near to the exact one as its error allows, and does not depend on the number of
connections. Each turn is an exchange after a pause of a second, in which TCP forgets how fast the
link is, and then two that follow at once.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lib.machine import machine
from lib.processes import ONE_THREAD, execute, on_links
from lib.report import RESULTS, read_csv, table, write_csv
from rhtcomm.bench.checks import CheckError, Problem, check
from rhtcomm.bench.contestants import Bucket, Contestant, compressed, torchs
from rhtcomm.bench.ranks import Ranks

RATE, DELAY = "100mbit", "25ms"
NUMEL = 25 << 18
PAUSE = 1.0  # seconds; TCP forgets after about a quarter of one
NETWORKS = ["0% cubic", "0.1% cubic", "0.1% bbr"]  # loss, congestion control
CONNECTIONS = [1, 2, 4, 8, 16]
SEGMENT, ROUND_TRIP = 1448, 0.05  # bytes, seconds


def contestants(connections: list[int], uncompressed: bool) -> list[Contestant]:
    ours = [
        replace(compressed("gloo", 4, connections=count), name=f"4 bits, {count}")
        for count in connections
    ]
    return [*(torchs("gloo", 2, ["float32"]) if uncompressed else []), *ours]


def check_all(field: list[Contestant], problem: Problem) -> list[float]:
    """Seconds of the last exchange of each contestant.

    Raises:
        CheckError: a mean is wrong, or depends on the number of connections.
    """
    means, seconds = [], []
    for one in field:
        if one.compresses:  # the first of each state has the same key
            bucket = Bucket.of(problem.data)
            one.seconds(bucket)
            means.append(bucket.tensor)
        seconds.append(check(one, problem)[1])
    if not all(torch.equal(mean, means[0]) for mean in means):
        raise CheckError("the mean depends on the number of connections")
    return seconds


def measure(task: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each exchange; on every rank, with the time of the slowest."""
    ranks = Ranks(torch.device("cpu"))
    problem = Problem(NUMEL, ranks)
    field = contestants(task["connections"], task["uncompressed"])
    bucket, rows = Bucket.of(problem.data), []

    def note(one: Contestant, pause: float, seconds: float) -> None:
        row = {"network": task["network"], "contestant": one.name, "pause": pause}
        rows.append(row | {"ms": f"{1e3 * seconds:.1f}"})

    for one, seconds in zip(field, check_all(field, problem), strict=True):
        if not one.compresses:  # once, as it may take half a minute
            note(one, PAUSE, seconds)
    for _ in range(task["rounds"]):
        for one in field:
            for pause in (PAUSE, 0.0, 0.0) if one.compresses else ():
                bucket.tensor.copy_(problem.data)
                time.sleep(pause)
                note(one, pause, ranks.largest(one.seconds(bucket))[0])
    for one in field:
        one.close()
    return rows


def run_rank(task: dict[str, Any]) -> None:
    """What each rank runs; rank 0 writes the rows."""
    route = ["ip", "route", "change", "10.0.0.0/16", "dev", "veth0", "congctl", "lock"]
    subprocess.run([*route, task["network"].split()[1]], check=True)
    if "streams" in task:
        probe(task)
        return
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rows = measure(task)
    if dist.get_rank() == 0:
        Path(task["rows"]).write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def start(task: dict[str, Any]) -> None:
    environment = {**ONE_THREAD, "PYTHON": sys.executable}
    environment |= {"DELAY": DELAY, "LOSS": task["network"].split()[0]}
    execute([*on_links(2, RATE), __file__, "--task", json.dumps(task)], environment)


# ---- The links themselves ------------------------------------------------------------------------


def probe(task: dict[str, Any]) -> None:
    """Pings by UDP, then TCP streams side by side from rank 1 to rank 0, which prints both."""
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    streams, seconds = task["streams"], task["seconds"]
    if os.environ["RANK"] == "0":
        with socket.socket(type=socket.SOCK_DGRAM) as pings:
            pings.bind(address)
            for _ in range(20):
                pings.sendto(*pings.recvfrom(100))
        with socket.create_server(address) as server:
            peers = [server.accept()[0] for _ in range(streams)]
        received = [0] * streams
        for number, peer in enumerate(peers):
            threading.Thread(target=drain, args=(peer, received, number), daemon=True).start()
        time.sleep(seconds / 5)  # without its beginning
        before, start = sum(received), time.perf_counter()
        time.sleep(seconds)
        rate = 8e-6 * (sum(received) - before) / (time.perf_counter() - start)
        loss = float(task["network"].split("%")[0]) / 100
        theory = ""
        if loss:  # Mathis et al., 1997, for Reno
            mathis = 8e-6 * streams * SEGMENT / ROUND_TRIP * (1.5 / loss) ** 0.5
            theory = f"; Mathis: {mathis:.1f}"
        print(f"{task['network']}, {streams} streams: {rate:.1f} Mbit/s{theory}")
        return
    time.sleep(1)
    with socket.socket(type=socket.SOCK_DGRAM) as pings:
        times = []
        for _ in range(20):
            start = time.perf_counter()
            pings.sendto(b"ping", address)
            pings.recv(100)
            times.append(1e3 * (time.perf_counter() - start))
    print(f"ping: {min(times):.2f} to {max(times):.2f} ms, median {statistics.median(times):.2f}")
    time.sleep(0.5)
    for _ in range(streams):
        peer = socket.create_connection(address)
        threading.Thread(target=fill, args=(peer,), daemon=True).start()
    time.sleep(1.2 * seconds)


def drain(peer: socket.socket, received: list[int], number: int) -> None:
    while data := peer.recv(1 << 20):
        received[number] += len(data)


def fill(peer: socket.socket) -> None:
    while True:
        peer.sendall(bytes(1 << 16))


# ---- Results -------------------------------------------------------------------------------------


def report(rows: list[dict[str, str]]) -> str:
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    networks = list(dict.fromkeys(row["network"] for row in rows))
    networks.sort(key=lambda network: NETWORKS.index(network) if network in NETWORKS else 9)
    lines = []
    for name in names:
        cells = [name]
        for network in networks:
            for pause in (PAUSE, 0.0):
                key = (network, name, pause)
                cells.append(summary([r for r in rows if key_of(r) == key]))
        lines.append(cells)
    header = [f"{network}, {when}" for network in networks for when in ("after a pause", "at once")]
    return f"""# benchmarks/wan.py

{machine()}; one thread per rank, both ranks on {os.cpu_count()} cores.

Exchange of one bucket of 25 MiB of float32 between 2 ranks, from the hook's call until its future
is done on the slowest rank: median, ms (10% .. 90%; number of exchanges). Links of {RATE}, {DELAY}
each way, queues of 50 ms; a column has a loss and a congestion control, and TCP is Linux's default
otherwise. "After a pause" of {PAUSE:g} s, or directly after another exchange ("at once").
"4 bits, 8": this hook, over 8 connections. "float32": torch's hook, over one. The bytes of 4 bits
take 274 ms at the link's rate, those of float32 2194 ms, and the way takes 25 ms.

The run was made in parts, in each of which all contestants of a column took turns (float32 in the
first one only). All of ours had the same bits.

{table(["", *header], lines)}"""


def key_of(row: dict[str, str]) -> tuple[str, str, float]:
    return row["network"], row["contestant"], float(row["pause"])


def summary(rows: list[dict[str, str]]) -> str:
    times = sorted(float(row["ms"]) for row in rows)
    if not times:
        return ""
    low, high = times[len(times) // 10], times[-1 - len(times) // 10]
    return f"{statistics.median(times):.0f} ({low:.0f} .. {high:.0f}; {len(times)})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", default=NETWORKS, help="loss, congestion control")
    parser.add_argument("--connections", type=int, nargs="+", default=CONNECTIONS)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--no-float32", dest="uncompressed", action="store_false")
    parser.add_argument("--add", action="store_true", help="keep earlier times of these networks")
    parser.add_argument("--links", action="store_true", help="only measure the links")
    parser.add_argument("--table", action="store_true", help="only write wan.md anew")
    parser.add_argument("--quick", action="store_true", help="one round of 1 and 8 connections")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--task", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        run_rank(arguments.task)
        return
    if arguments.links:
        for network in arguments.networks:
            for streams in (1, 8):
                start({"network": network, "streams": streams, "seconds": 20})
        return
    if arguments.quick:
        arguments.networks, arguments.connections, arguments.rounds = ["0.1% cubic"], [1, 8], 1
        arguments.out = Path("demo-results")
    arguments.out.mkdir(parents=True, exist_ok=True)
    path, new = arguments.out / "wan.csv", arguments.out / "wan.partial.json"
    rows: list[dict[str, Any]] = list(read_csv(path)) if path.is_file() else []
    for network in [] if arguments.table else arguments.networks:
        task = {"network": network, "rows": str(new.resolve()), "rounds": arguments.rounds}
        task |= {"connections": arguments.connections, "uncompressed": arguments.uncompressed}
        start(task)
        if not arguments.add:
            rows = [row for row in rows if row["network"] != network]
        rows += json.loads(new.read_text())
        new.unlink()
        write_csv(path, rows)
    text = report(rows)
    (arguments.out / "wan.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
