"""launch/slurm.sbatch under a real Slurm of two nodes on this machine: what `make slurm` runs.

Debian: apt-get install slurm-wlm munge. The daemons run as root in a PID namespace, which ends them
all with this program, and keep their files in a temporary folder; the nodes' names stand in an
/etc/hosts that only this program's mount namespace sees.
"""

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import ROOT
from training_runs import FAULT, KILL, STEP_8, Files

LIMIT = 300  # seconds for a job
NODES = ("n1", "n2")
DAEMONS = ("munged", "slurmctld", "slurmd")
PROGRAMS = (*DAEMONS, "sbatch", "srun", "scontrol", "sinfo", "unshare", "mount")
NAMESPACES = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")

CONFIGURATION = """
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits until the credentials of its first start have expired.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
SlurmctldPort={ports[0]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
MpiDefault=none
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=all Nodes=n1,n2 Default=YES
"""


def missing() -> str | None:
    """Why Slurm cannot run here, if it cannot."""
    if sys.platform != "linux":
        return "namespaces of processes and mounts are Linux's"
    if os.geteuid() != 0:
        return "only root can start Slurm's daemons and make namespaces"
    for program in PROGRAMS:
        if shutil.which(program) is None:
            return f"{program} was not found (Debian: apt-get install slurm-wlm munge)"
    probe = subprocess.run([*NAMESPACES, "true"], capture_output=True, text=True)
    if probe.returncode:
        return f"this machine does not let root make namespaces: {probe.stderr.strip()}"
    return None


def free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports: list[int] = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def start_slurm(folder: Path) -> None:
    """Start the daemons, and name them in this process's environment; wait for the nodes."""
    host = socket.gethostname()
    hosts = folder / "hosts"
    hosts.write_text(f"127.0.0.1 localhost {' '.join(NODES)} {host}\n")
    subprocess.run(["mount", "--bind", str(hosts), "/etc/hosts"], check=True)

    folder.chmod(0o711)  # munged wants a socket that everyone reaches
    munge = folder / "munge"
    munge.mkdir()
    (munge / "key").write_bytes(os.urandom(1024))
    (munge / "key").chmod(0o400)
    files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log"}
    files["seed-file"] = "seed"
    options = [f"--{option}={munge / name}" for option, name in files.items()]
    subprocess.run(["munged", *options], check=True)

    (folder / "state").mkdir()
    configuration = folder / "slurm.conf"
    configuration.write_text(CONFIGURATION.format(host=host, folder=folder, ports=free_ports(3)))
    os.environ["SLURM_CONF"] = str(configuration)
    subprocess.run(["slurmctld"], check=True)
    for node in NODES:
        subprocess.run(["slurmd", "-N", node], check=True)
    deadline = time.monotonic() + LIMIT
    idle = ""
    while idle.split() != ["2"]:
        if time.monotonic() > deadline:
            logs = "\n".join(log.read_text() for log in sorted(folder.glob("*.log")))
            raise TimeoutError(f"Slurm's nodes did not become idle within {LIMIT} s:\n{logs}")
        time.sleep(0.2)
        command = ["sinfo", "--noheader", "--states=idle", "--format=%D"]
        idle = subprocess.run(command, capture_output=True, text=True).stdout


def submit(folder: Path, arguments: list[str], **variables: str) -> None:
    """Run a job to its end.

    Raises:
        RuntimeError: it failed, or did not end within LIMIT; with what it printed.
    """
    output = folder / "printed"
    (port,) = free_ports(1)
    variables |= {"PYTHON": sys.executable, "NPROC_PER_NODE": "1", "MASTER_PORT": str(port)}
    variables["GLOO_SOCKET_IFNAME"] = "lo"
    command = ["sbatch", "--parsable", "--nodes=2", "--cpus-per-task=1", f"--output={output}"]
    command += [str(ROOT / "launch" / "slurm.sbatch"), *arguments]
    submitted = subprocess.run(
        command, cwd=ROOT, env=os.environ | variables, stdout=subprocess.PIPE, text=True, check=True
    )
    # sbatch --wait looks for the end only every half minute.
    deadline = time.monotonic() + LIMIT
    state = "PENDING"
    while state in ("PENDING", "RUNNING", "COMPLETING") and time.monotonic() < deadline:
        time.sleep(0.2)
        command = ["scontrol", "--oneliner", "show", "job", submitted.stdout.strip()]
        shown = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        state = shown.partition("JobState=")[2].split()[0]
    if state != "COMPLETED":
        printed = output.read_text() if output.exists() else ""
        raise RuntimeError(f"after at most {LIMIT} s the job was {state}: {shown}{printed}")


def diagnose(*options: str) -> None:
    """Run the doctor on a rank of each node, which srun starts.

    Raises:
        RuntimeError: it found a problem, or no exchange, or ended in another way.
    """
    command = ["srun", "--quiet", "--nodes=2", "--ntasks-per-node=1", *options]
    command += [sys.executable, "-m", "rhtcomm", "doctor", "--json"]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
    print(f"make slurm: {' '.join(command[:-1])}: no problem", flush=True)
    report = json.loads(done.stdout)
    fine = {one["topic"]: one for one in report["findings"] if one["grade"] == "ok"}
    assert (report["launcher"], report["world_size"]) == ("srun", 2), report
    assert fine["exchange"]["ranks"] == [0, 1], report
    expected = "2 ranks, a sum is right" if options else ""
    assert expected in fine["MPI"]["fact"], report


def run_jobs(folder: Path) -> None:
    start_slurm(folder)
    whole = Files(folder, "whole")

    def job(name: str, **variables: str) -> None:
        started = time.monotonic()
        files = whole if name == "torchrun" else Files(folder, name)
        submit(folder, files.arguments, **variables)
        files.check_that_it_ended_as(whole)
        print(
            f"make slurm: {name}: ended well after {time.monotonic() - started:.0f} s", flush=True
        )

    job("torchrun")
    diagnose()
    if importlib.util.find_spec("mpi4py"):
        job("MPI", LAUNCHER="mpi", SRUN_OPTIONS="--mpi=pmi2")
        diagnose("--mpi=pmi2")
    else:
        print("make slurm: MPI: skipped, as mpi4py is not installed")
    (folder / "sitecustomize.py").write_text(FAULT)
    requeue = f"scontrol requeue $SLURM_JOB_ID; {KILL}"
    for name, rank, command, max_restarts in (
        ("rank 0 killed", 0, KILL, "1"),
        ("rank 1 killed", 1, KILL, "1"),
        ("requeued", 1, requeue, "0"),
    ):
        done = folder / f"{name}, done"
        job(
            name,
            **{"FAULT": f"{rank} {STEP_8}", "FAULT_DONE": str(done)},
            **{"FAULT_COMMAND": command, "MAX_RESTARTS": max_restarts},
            PYTHONPATH=f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        )
        assert done.exists(), f"{name}: the fault did not happen"


def main() -> None:
    if sys.argv[1:]:
        run_jobs(Path(sys.argv[1]))
        return
    if reason := missing():
        print(f"make slurm: skipped: {reason}")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the namespace, too
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(subprocess.run([*NAMESPACES, sys.executable, __file__, folder]).returncode)


if __name__ == "__main__":
    main()
