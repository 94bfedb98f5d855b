"""Single checks, each with the fault that it must find."""

import re
import shutil
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from libraries import needs_library

from rhtcomm import codebooks
from rhtcomm.communicators import interfaces as net
from rhtcomm.communicators.interfaces import Interface
from rhtcomm.doctor import codec, installation, kernels, network
from rhtcomm.doctor.answers import ANSWERS
from rhtcomm.doctor.finding import Finding, guarded, merged
from rhtcomm.doctor.launcher import Launch, launch_of
from rhtcomm.doctor.processor import Machine, cores, threads
from rhtcomm.doctor.report import name_of
from rhtcomm.kernels import cpu


def grades(findings: list[Finding]) -> list[str]:
    return [finding.grade for finding in findings]


# Kernels -----------------------------------------------------------------------------------------


def test_a_missing_library_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "library_path", lambda: None)
    (found,) = kernels.kernels()
    assert (found.grade, found.topic) == ("problem", "kernels")
    assert "not installed: plain torch takes their place" in found.fact
    assert "RHTCOMM_REQUIRE_KERNELS=1" in found.remedy


@needs_library
def test_a_damaged_library_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = cpu.library_path()
    assert whole is not None
    for name, octets in (("junk", b"junk"), ("cut", whole.read_bytes()[:100_000])):
        path = tmp_path / name
        path.write_bytes(octets)
        monkeypatch.setattr(cpu, "library_path", lambda path=path: path)
        (found,) = kernels.kernels()
        assert found.grade == "problem"
        assert f"{path} cannot be loaded" in found.fact


@needs_library
def test_a_forced_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RHTCOMM_KERNELS", "RHTCOMM_CPU"):
        monkeypatch.delenv(name, raising=False)
    assert grades(kernels.kernels()) == ["ok"]
    for name, value, grade, fact in (
        ("RHTCOMM_CPU", "baseline", "remark", "baseline: forced by RHTCOMM_CPU=baseline"),
        ("RHTCOMM_KERNELS", "cpu", "remark", "forced by RHTCOMM_KERNELS=cpu"),
        ("RHTCOMM_KERNELS", "reference", "problem", "forces plain torch, 40 times slower"),
        ("RHTCOMM_KERNELS", "fast", "problem", "must be 'reference', 'cpu' or 'gpu'"),
        ("RHTCOMM_CPU", "mmx", "problem", "must be one of avx512vbmi"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            (found,) = kernels.kernels()
        assert found.grade == grade
        assert fact in found.fact
        assert found.remedy == f"unset {name}"


def test_triton_counts_by_what_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its package is also called pytorch-triton, or pytorch-triton-rocm."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "X")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.6.0+git1"))
    (found,) = kernels.gpu()
    assert (found.grade, found.fact) == ("ok", "2 CUDA device(s), X, Triton 3.6.0+git1")
    monkeypatch.setitem(sys.modules, "triton", None)  # which Python cannot import
    (found,) = kernels.gpu()
    assert found.grade == "problem"
    assert "Triton is not installed" in found.fact


def test_what_the_processor_lacks_is_named(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    flags = " ".join(flag for name in ("avx512", "avx2") for flag in kernels.INSTRUCTIONS[name])
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: fpu {flags}\n")
    assert kernels.missing_instructions("avx512vbmi", cpuinfo) == ["avx512vbmi", "avx512_vbmi2"]
    assert kernels.missing_instructions("avx512", cpuinfo) == []


@needs_library
def test_wrong_answers_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RHTCOMM_KERNELS", "RHTCOMM_CPU"):
        monkeypatch.delenv(name, raising=False)
    assert codec.known_answers()[0].grade == "ok"
    monkeypatch.setitem(ANSWERS, "ECDQ 4, 1 rotations", "0")
    found = codec.known_answers()[0]
    assert found.grade == "problem"
    assert f"1 of {len(ANSWERS)} are wrong on cpu, such as ECDQ 4, 1 rotations" in found.fact


# Installation ------------------------------------------------------------------------------------


def test_damaged_tables_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = Path(codebooks.__file__).parent
    for path in folder.glob("*.npz"):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(codebooks, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr(codebooks.importlib.resources, "files", lambda _: tmp_path)
    assert grades(installation.tables()) == ["ok"]
    octets = bytearray((tmp_path / "quic_fl.npz").read_bytes())
    octets[3000] ^= 1
    (tmp_path / "quic_fl.npz").write_bytes(octets)
    (tmp_path / "vector.npz").write_bytes((folder / "vector.npz").read_bytes()[:500])
    (tmp_path / "lloyd_max.npz").unlink()
    with np.load(folder / "ecdq.npz") as arrays:
        changed = {name: array.copy() for name, array in arrays.items()}
    changed["b2"].flat[3] += 1
    np.savez(tmp_path / "ecdq.npz", **changed)
    found = installation.tables()
    assert grades(found) == ["problem"] * 4
    for name, fact in (
        ("ecdq", "damaged: numbers differ"),
        ("lloyd_max", "missing"),
        ("quic_fl", "damaged: Bad CRC-32 for file 'b2.npy'"),
        ("vector", "damaged: "),
    ):
        (one,) = (one for one in found if f"/{name}.npz" in one.fact)
        assert f"{name}.npz is {fact}" in one.fact


@pytest.mark.parametrize(
    ("name", "version", "grade"),
    [
        ("torch", "2.13.0+cpu", None),
        ("torch", "2.9.1", None),
        ("torch", "2.9.0", "problem"),
        ("torch", "2.15.3", None),
        ("torch", "2.16.0a0+git123", "remark"),
        ("numpy", "1.23.5", "problem"),
        ("Python", "3.14.0", "remark"),
    ],
)
def test_versions_out_of_what_was_tested(name: str, version: str, grade: str | None) -> None:
    found = installation.of_version(name, version)
    assert (found.grade if found else None) == grade


# Cores and threads -------------------------------------------------------------------------------


def machine(
    root: Path, affinity: set[int], *, limit: str = "max 100000", old: bool = False
) -> Machine:
    """Of eight logical cores, two to a core, and with a container's limit."""
    group = root / "sys/fs/cgroup" / ("cpu/docker/1" if old else "docker/1")
    group.mkdir(parents=True)
    (root / "proc/self").mkdir(parents=True)
    lines = "2:cpu,cpuacct:/docker/1\n" if old else "0::/docker/1/inner\n"
    (root / "proc/self/cgroup").write_text(f"7:memory:/other\n{lines}")
    if old:
        quota, period = limit.split()
        (group / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        (group / "cpu.cfs_period_us").write_text(f"{period}\n")
    else:
        (group / "cpu.max").write_text(f"{limit}\n")
        (root / "sys/fs/cgroup/cpuset.cpus.effective").write_text("0-5,6-7\n")
    for core in range(8):
        folder = root / f"sys/devices/system/cpu/cpu{core}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{core % 4},{core % 4 + 4}\n")
    found = Machine(root, affinity)
    if old:
        found.allowed = set(range(8))
    return found


def test_limits_of_containers(tmp_path: Path) -> None:
    everything = set(range(8))
    unlimited = machine(tmp_path / "a", everything)
    assert unlimited.limit is None
    assert unlimited.allowed == everything
    assert unlimited.physical(everything) == 4
    assert machine(tmp_path / "b", everything, limit="150000 100000").limit == 1.5
    assert machine(tmp_path / "c", everything, limit="400000 100000", old=True).limit == 4
    assert machine(tmp_path / "d", everything, limit="-1 100000", old=True).limit is None
    few = machine(tmp_path / "e", everything, limit="250000 100000")
    fine, limited = cores(Launch(), few)
    assert (fine.grade, limited.grade) == ("ok", "remark")
    assert "limits it to 2.5 cores" in limited.fact
    (found,) = threads(Launch(), few, 4)
    assert "only 2 cores for each rank" in found.fact
    assert found.remedy == "set OMP_NUM_THREADS=2"


def test_ranks_bound_to_a_core_are_found(tmp_path: Path) -> None:
    launch = Launch("Open MPI", world_size=4, local_size=4)
    (found,) = cores(launch, machine(tmp_path / "a", {3}))
    assert found.grade == "problem"
    assert found.fact == "each rank may run on 1 of 8 cores, though 2 are its share"
    assert "--bind-to none" in found.remedy
    (found,) = cores(Launch("srun", world_size=8, local_size=8), machine(tmp_path / "b", {3}))
    assert found.grade == "remark"
    assert "bound to one core" in found.fact
    assert "--cpu-bind=none" in found.remedy
    assert grades(cores(launch, machine(tmp_path / "c", set(range(8))))) == ["ok"]
    crowded = Launch("torchrun", world_size=8, local_size=8, local_cores=1)
    (found,) = cores(crowded, machine(tmp_path / "d", {3}))
    assert found.grade == "problem"
    assert found.fact == "the 8 ranks on this machine are all bound to one core, of 8"


def test_threads_against_cores(tmp_path: Path) -> None:
    all_cores = machine(tmp_path, set(range(8)))
    for ranks, number, grade, fact in (
        (1, 4, "ok", "1 rank on this machine with 4 threads"),
        (1, 8, "ok", ""),  # torch takes the physical ones, but hyperthreads may be wanted
        (1, 1, "remark", "each rank has 4 cores: some stay idle"),
        (1, 9, "remark", "only 8 cores for each rank: the threads wait"),
        (4, 1, "ok", "4 ranks on this machine with 1 thread each"),
        (4, 4, "remark", "only 2 cores for each rank"),
        (16, 1, "ok", ""),
    ):
        launch = Launch("torchrun", world_size=ranks, local_size=ranks)
        (found,) = threads(launch, all_cores, number)
        assert (found.grade, fact in found.fact) == (grade, True), found


# Launchers and networks --------------------------------------------------------------------------


def test_launchers_by_their_environment() -> None:
    hydra = {"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALNRANKS": "2"}
    open_mpi = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}
    slurm = {"SLURM_STEP_NUM_TASKS": "5", "SLURM_PROCID": "4", "SLURM_NODEID": "2"}
    slurm |= {"SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "1"}
    torchrun = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a"}
    torchrun |= {"MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "x"}
    assert launch_of({}) == launch_of({"SLURM_STEP_NUM_TASKS": "1"}) == Launch()
    found = launch_of(torchrun | slurm)
    assert found == Launch("torchrun", 1, 4, 2, "a", 29500)
    assert launch_of(torchrun | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).agent
    found = launch_of(hydra | slurm, parent=12_345)
    assert (found.name, found.rank, found.world_size, found.local_size) == ("MPICH", 1, 4, 2)
    assert found.has_mpi
    assert launch_of(hydra | {"I_MPI_HYDRA_UUID": "x"}).name == "Intel MPI"
    found = launch_of(open_mpi | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, parent=12_345)
    assert (found.name, found.rank, found.world_size, found.local_size) == ("Open MPI", 3, 4, 4)
    assert (found.address, found.port) == ("127.0.0.1", 22_345)
    found = launch_of(slurm)
    assert (found.name, found.rank, found.world_size, found.local_size) == ("srun", 4, 5, 1)
    assert found.port == 20_000 + 7 * 16 + 1
    assert not found.has_mpi
    assert launch_of(slurm | {"PMI_RANK": "4", "PMI_SIZE": "5"}).has_mpi
    assert launch_of({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}).local_size == 2
    with pytest.raises(ValueError, match="PMI_RANK='x' must be a number"):
        launch_of(hydra | {"PMI_RANK": "x"})


THERE = [Interface("lo", ("127.0.0.1", "::1")), Interface("eth0", ("10.0.0.5",), 10_000)]


@pytest.mark.parametrize(
    ("wanted", "address", "machines", "grade", "fact"),
    [
        (None, "10.0.0.5", 2, "ok", "Gloo takes eth0, since the name of this host"),
        (None, "127.0.1.1", 2, "problem", "Gloo takes lo, .*other machines cannot reach it"),
        (None, "127.0.1.1", 1, "ok", "Gloo takes lo"),
        (None, "10.9.9.9", 2, "problem", "Gloo takes lo, since .* is no address of this machine"),
        (None, None, 2, "problem", "is no address of this machine"),
        ("eth0", "127.0.1.1", 2, "ok", "Gloo takes eth0, since GLOO_SOCKET_IFNAME=eth0"),
        ("eth7", "10.0.0.5", 1, "problem", "no such interface has an address here"),
    ],
)
def test_the_interface_of_gloo(
    wanted: str | None,
    address: str | None,
    machines: int,
    grade: str,
    fact: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def resolved(host: str, port: None) -> list[tuple[object, ...]]:
        if address is None:
            raise OSError("unknown host")
        return [(None, None, None, "", (address, 0))]

    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    if wanted:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", wanted)
    monkeypatch.setattr(network, "interfaces", lambda: THERE)
    monkeypatch.setattr(net.socket, "getaddrinfo", resolved)
    here = {address for one in THERE for address in one.addresses}
    monkeypatch.setattr(net, "is_here", lambda address: address in here | {"127.0.1.1"})
    launch = Launch("torchrun", world_size=2, local_size=1, machines=machines)
    listed, found = network.network(launch)
    assert listed.fact == "lo (127.0.0.1, ::1), eth0 (10.0.0.5, 10 Gbit/s)"
    assert found.grade == grade
    assert re.search(fact, found.fact)
    assert ("eth0" in found.remedy) == (grade == "problem")


def test_a_machine_with_ipv6_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(97, "Address family not supported by protocol")

    monkeypatch.setattr(net.socket, "socket", refused)
    assert all(":" in address for one in net.interfaces() for address in one.addresses)


def test_interfaces_of_this_machine_have_the_loopback() -> None:
    found = net.interfaces()
    if found:  # Linux
        assert any(one.loopback and "127.0.0.1" in one.addresses for one in found)


# The frame ---------------------------------------------------------------------------------------


def test_a_check_that_fails_or_hangs_is_a_problem() -> None:
    def fails() -> list[Finding]:
        raise KeyError("nothing")

    never = threading.Event()

    def hangs() -> list[Finding]:
        never.wait()
        return []

    (found,) = guarded("topic", fails, 10)
    assert (found.grade, found.topic) == ("problem", "topic")
    assert "KeyError: 'nothing'" in found.fact
    (found,) = guarded("topic", hangs, 0.1)
    assert "did not end within 0.1 s" in found.fact
    never.set()


def test_ranks_share_a_line_if_they_agree() -> None:
    fine = Finding("ok", "a", "fine")
    measured = [Finding("ok", "b", f"{rank} ms", key="fast") for rank in range(3)]
    lines = merged({rank: [fine, measured[rank]] for rank in range(3)})
    assert lines == [((0, 1, 2), fine), ((0, 1, 2), measured[0])]
    other = Finding("problem", "a", "not fine")
    lines = merged({0: [fine, measured[0]], 1: [other, measured[1]], 2: [fine]})
    assert lines == [((0, 2), fine), ((1,), other), ((0, 1), measured[0])]
    assert name_of((0, 1, 2, 5, 7, 8)) == "ranks 0 to 2, 5, 7, 8"
    assert name_of((4,)) == "rank 4"
