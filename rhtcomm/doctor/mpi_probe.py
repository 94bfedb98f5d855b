"""What MPI says of itself, as JSON. Run by `rhtcomm.doctor.mpi` in a process of its own.

MPI may end the process that initializes it, or wait for ever. The process inherits from the rank
what connects it with mpiexec, and so takes the rank's place. It imports nothing of rhtcomm.
"""

import json
import sys


def main(start: bool) -> None:
    import mpi4py

    mpi4py.rc.initialize = start
    from mpi4py import MPI

    facts: dict[str, object] = {
        "mpi4py": mpi4py.__version__,
        "vendor": MPI.get_vendor()[0],
        "version": ".".join(map(str, MPI.get_vendor()[1])),
    }
    if start:
        facts |= in_the_world(MPI.COMM_WORLD)
    print(json.dumps(facts), flush=True)


def in_the_world(world: "object") -> dict[str, object]:
    """The size, a sum over all ranks, and where rank 0 can be reached."""
    import socket
    from array import array

    from mpi4py import MPI

    assert isinstance(world, MPI.Intracomm)
    total = array("f", [world.rank + 1.0] * 1000)
    world.Allreduce(MPI.IN_PLACE, total)
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    host = "127.0.0.1" if node.size == world.size else socket.gethostname()
    host, port = world.bcast((host, port))
    return {
        "rank": world.rank,
        "size": world.size,
        "threads": MPI.Query_thread() >= MPI.THREAD_SERIALIZED,
        "sum": set(total) == {world.size * (world.size + 1) / 2},
        "address": host,
        "port": port,
    }


if __name__ == "__main__":
    main("start" in sys.argv[1:])
