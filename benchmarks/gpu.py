"""The Triton kernels and the hook on a GPU: bits, speed, streams, memory.

    benchmarks/gpu.sh                        installs the checkout for this run, and does all of it
    python benchmarks/gpu.py                 all of it, in less than nine minutes
    python benchmarks/gpu.py --dry-run       the same on a CPU at toy sizes, with a made-up clock
    python benchmarks/gpu.py --parts codec   one part; --variants NAME ... chooses among launches

Each part is a process of its own with a time limit, so that one that crashes or hangs costs no
other. What is found is written to gpu.json and gpu.md in the folder of --out row by row; gpu.md can
be copied to results/ as it is. Logs lie beside them. The parts are in benchmarks/device.
"""

import argparse
import contextlib
import faulthandler
import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where the package is not installed

from device.results import Part, Results, markdown, summary

TOTAL = 530.0  # seconds that all of it may take
ORDERLY = 5.0  # seconds before its limit at which a part should end by itself


@dataclass(frozen=True)
class Plan:
    """Of a part: its function, its seconds, and what runs at the same time."""

    function: str  # module:name
    seconds: float
    group: int


# In the order of importance. Only what is not timed shares the machine.
PLANS = {
    "machine": Plan("device.machine:run", 60, 0),
    "tests": Plan("device.tests:run", 145, 0),
    "bits": Plan("device.bits:run", 165, 0),
    "ahead": Plan("device.codec:compile_ahead", 145, 0),
    "codec": Plan("device.codec:run", 95, 1),
    "waits": Plan("device.hook:waits", 35, 2),
    "streams": Plan("device.streams:run", 75, 3),
    "memory": Plan("device.hook:memory", 50, 3),
    "sanitizer": Plan("device.tools:sanitizer", 75, 3),
    "more": Plan("device.bits:more", 75, 3),
    "training": Plan("device.training:run", 75, 4),
    "counters": Plan("device.tools:counters", 50, 5),
}


class Running:
    """A part's process."""

    def __init__(self, part: Part, plan: Plan, limit: float, folder: Path, given: list[str]):
        self.part, self.limit, self.started = part, limit, time.monotonic()
        self.rows, self.log = folder / f"{part.name}.jsonl", folder / f"{part.name}.log"
        command = [sys.executable, __file__, "--part", plan.function, "--rows", str(self.rows)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, "--seconds", str(limit - ORDERLY), *given],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        part.status = "runs"

    def ended(self) -> bool:
        """Whether it has, by itself or because its time was up."""
        part, code = self.part, self.process.poll()
        part.seconds = time.monotonic() - self.started
        if code is None and part.seconds < self.limit:
            return False
        part.status = "done"
        if code is None:
            self.end()
            part.status = f"did not end within {self.limit:.0f} s"
        elif code:
            part.status = f"failed, exit code {code}"
        if part.status != "done":
            part.log = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
        self.end()
        return True

    def end(self) -> None:
        """With all processes that it has left; one that hangs says where."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGUSR1)
            time.sleep(1)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Run:
    """All parts that were asked for, and what is written about them."""

    def __init__(self, arguments: argparse.Namespace, plans: dict[str, Plan]) -> None:
        self.arguments, self.plans, self.out = arguments, plans, arguments.out
        self.parts = {name: Part(name) for name in plans}
        started = arguments.started or time.time()
        self.deadline = time.monotonic() + TOTAL - (time.time() - started)
        self.date = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(started))

    def all(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for group in sorted({plan.group for plan in self.plans.values()}):
                self.group(group, Path(folder))

    def group(self, group: int, folder: Path) -> None:
        running = []
        given = ["--dry-run"] * self.arguments.dry_run
        if self.arguments.variants:
            given += ["--variants", *self.arguments.variants]
        for name, plan in self.plans.items():
            limit = min(plan.seconds, self.deadline - time.monotonic() - 2)
            if plan.group != group:
                continue
            if limit < 2:
                self.parts[name].status = "no time was left"
                continue
            running.append(Running(self.parts[name], plan, limit, folder, given))
        try:
            self.write()
            while running:
                time.sleep(0.2)
                news = False
                for one in list(running):
                    ended = one.ended()
                    news |= one.part.read(one.rows) or ended
                    if ended:
                        running.remove(one)
                        self.keep_log(one)
                if news:
                    self.write()
        finally:
            for one in running:
                one.part.status = "was cut short"
                one.end()
                one.part.read(one.rows)
                self.keep_log(one)
            self.write()

    def keep_log(self, one: Running) -> None:
        name = "tests.log" if one.part.name == "tests" else "parts.log"
        with (self.out / name).open("a") as log:
            log.write(f"==== {one.part.name}: {one.part.outcome}\n")
            log.write(one.log.read_text(errors="replace")[-4_000_000:])
        print(f"{one.part.name}: {one.part.outcome}, {one.part.seconds:.0f} s", flush=True)

    def write(self) -> None:
        """Both files, each at once, so that neither is ever half of itself."""
        dry, parts = self.arguments.dry_run, list(self.parts.values())
        command = f"benchmarks/gpu.sh{' --dry-run' * dry}"
        if list(self.plans) != list(PLANS):
            command += f" --parts {shlex.join(self.plans)}"
        if self.arguments.variants:
            command += f" --variants {shlex.join(self.arguments.variants)}"
        content = {
            "dry_run": dry,
            "command": command,
            "date": self.date,
            "parts": [
                {"name": p.name, "outcome": p.outcome, "seconds": p.seconds, "found": p.found}
                for p in parts
            ],
        }
        for name, text in (
            ("gpu.json", json.dumps(content, indent=1)),
            ("gpu.md", markdown(command, self.date, dry, parts)),
        ):
            (self.out / f".{name}").write_text(text)
            (self.out / f".{name}").rename(self.out / name)


def plans_of(names: Sequence[str]) -> dict[str, Plan]:
    """Those of the parts, or of name:seconds, a module on the path that has a function `run`."""
    plans = {}
    for name in names:
        if name in PLANS:
            plans[name] = PLANS[name]
        else:
            module, _, seconds = name.partition(":")
            plans[module] = Plan(f"{module}:run", float(seconds or 60), 0)
    return plans


def run_part(arguments: argparse.Namespace) -> None:
    """In the process of a part."""
    faulthandler.register(signal.SIGUSR1)
    if arguments.variants:
        from device import codec

        chosen = {name: codec.VARIANTS[name] for name in arguments.variants}
        codec.VARIANTS.clear()
        codec.VARIANTS.update(chosen)
    from device.devices import device_for

    module, _, function = arguments.part.partition(":")
    results = Results(arguments.rows, arguments.seconds)
    getattr(importlib.import_module(module), function)(device_for(arguments.dry_run), results)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="on a CPU; measures nothing")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder of results")
    parser.add_argument("--parts", nargs="+", default=list(PLANS), metavar="NAME[:SECONDS]")
    parser.add_argument("--variants", nargs="+", help="of codec.py, to compare these alone")
    parser.add_argument("--started", type=float, help="when the nine minutes began, by time.time()")
    for name, kind in (("--part", str), ("--rows", Path), ("--seconds", float)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.dry_run:  # before Triton is imported
        os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    if arguments.part:
        run_part(arguments)
        return 0
    if not arguments.dry_run:
        import torch

        if not torch.cuda.is_available():
            print("benchmarks/gpu.py: there is no GPU here, so nothing was measured; try --dry-run")
            return 1
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in ("tests.log", "parts.log"):
        (arguments.out / name).unlink(missing_ok=True)
    run = Run(arguments, plans_of(arguments.parts))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    try:
        run.all()
    finally:
        print(f"\n{summary(arguments.dry_run, list(run.parts.values()))}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
