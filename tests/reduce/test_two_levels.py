"""Nodes of several ranks: exact means within a node, compressed ones between nodes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from groups import two_levels
from harness import Ranks
from problems import DTYPES, numbers
from simulation import BLOCK, CODEC, KEY, data, same_bits, simulated
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import rhtcomm
from rhtcomm import (
    ECDQ,
    Codec,
    DisagreementError,
    Eden,
    HierarchicalCommunicator,
    Key,
    Lattice,
    QuicFL,
)
from rhtcomm.deferred import DeferredChecks
from rhtcomm.reduce import Algorithm, split_into_shards

# ---- Means ------------------------------------------------------------------------------------

HIERARCHICAL: list[tuple[Codec | Lattice, Algorithm, int, torch.dtype]] = [
    (CODEC, "all_gather", 10 * BLOCK + 77, torch.float32),
    (CODEC, "all_gather", 10 * BLOCK + 77, torch.bfloat16),
    (CODEC, "two_shot", 10 * BLOCK, torch.float32),
    (CODEC, "gather", 10 * BLOCK, torch.float16),
    (Codec(Eden(3), block=BLOCK), "auto", 9 * BLOCK, torch.float32),
    (Codec(ECDQ(2), block=BLOCK), "gather", 9 * BLOCK, torch.float32),
    (CODEC, "auto", BLOCK, torch.float32),  # one block: the other shards of a node are empty
    (Lattice(4, block=BLOCK), "auto", 10 * BLOCK + 77, torch.float32),
]


def reduce_hierarchically(
    rank: int, world_size: int, ranks_of_a_node: int
) -> tuple[list[torch.Tensor], list[int], torch.Tensor]:
    communicator = two_levels(rank, world_size // ranks_of_a_node, ranks_of_a_node)
    assert (communicator.rank, communicator.world_size) == (rank, world_size)
    order = communicator.all_gather(torch.tensor([rank, 100 + rank], dtype=torch.uint8))
    assert order.tolist() == [[other, 100 + other] for other in range(world_size)]
    results, sent = [], []
    for codec, algorithm, numel, dtype in HIERARCHICAL:
        x, before = data(rank, numel, dtype), communicator.bytes_sent
        rhtcomm.all_reduce(
            x, codec, KEY, communicator, algorithm=algorithm, min_numel=0, check=False
        )
        results.append(x)
        sent.append(communicator.bytes_sent - before)
    small = data(rank, 1000)
    rhtcomm.all_reduce(small, CODEC, KEY, communicator)
    return results, sent, small


@pytest.mark.parametrize(("nodes", "ranks_of_a_node"), [(2, 2), (1, 3), (3, 1)])
def test_two_levels_equal_their_simulation(nodes: int, ranks_of_a_node: int, ranks: Ranks) -> None:
    """Exact means of nodes, and their mean as if each node were one rank."""
    n = nodes * ranks_of_a_node
    outcomes = ranks.run(reduce_hierarchically, n, ranks_of_a_node)
    for case, (codec, algorithm, numel, dtype) in enumerate(HIERARCHICAL):
        inputs = [data(rank, numel, dtype).float() for rank in range(n)]
        node_means = []
        for node in range(nodes):
            total = torch.zeros(numel)
            for x in inputs[node * ranks_of_a_node : (node + 1) * ranks_of_a_node]:
                total += x
            node_means.append(total / ranks_of_a_node)
        results = [of_rank[0][case] for of_rank in outcomes]
        assert all(same_bits(result, results[0]) for result in results)
        if nodes == 1:
            assert same_bits(results[0], node_means[0].to(dtype))
        elif isinstance(codec, Codec):
            if ranks_of_a_node == 1 or algorithm != "two_shot":  # shards of shards else
                expected = simulated(node_means, codec, KEY, algorithm).to(dtype)
                assert same_bits(results[0], expected)
            sent = sum(of_rank[1][case] for of_rank in outcomes)
            formula = 2 * (nodes - 1) * codec.nbytes(numel)
            if algorithm == "all_gather":
                formula = nodes * (nodes - 1) * codec.nbytes(numel)
            headers = 2 * 16 * n * n
            assert formula <= sent <= formula + headers + 4 * BLOCK * n
        exact = torch.stack(inputs).double().mean(0)
        error = ((results[0] - exact).square().sum() / exact.square().sum()).item()
        assert error < 0.5
    for _, _, small in outcomes:
        assert same_bits(small, outcomes[0][2])
    exact = torch.stack([data(rank, 1000) for rank in range(n)]).double().mean(0)
    torch.testing.assert_close(outcomes[0][2].double(), exact, rtol=1e-6, atol=1e-5)


def want_on_two_levels(rank: int, world_size: int, dtype: torch.dtype) -> list[int | None]:
    """Only one shard of one rank is too spiky for a single transform."""
    codec, communicator = Codec(QuicFL(4), "auto", 4 * BLOCK), two_levels(rank, 2, 2)
    wanted = []
    for spike in (0, 17 * codec.block, None):
        x = torch.randn(20 * codec.block, generator=torch.Generator().manual_seed(rank)).to(dtype)
        if spike is not None:
            x[spike : spike + codec.block] = 0
            if rank == 1:
                x[spike] = 100
        wanted.append(
            rhtcomm.all_reduce(
                *(x, codec, KEY, communicator),
                min_numel=0,
                check=False,
                segments=[1000, 20 * codec.block - 1000],
            ).wanted_rotations
        )
    return wanted


@pytest.mark.parametrize("dtype", DTYPES)
def test_wishes_of_all_shards_reach_all_ranks(dtype: torch.dtype, ranks: Ranks) -> None:
    assert ranks.run(want_on_two_levels, 4, dtype) == [[2, 2, 1]] * 4


# ---- Groups -----------------------------------------------------------------------------------


def from_device_mesh(rank: int, world_size: int) -> tuple[int, torch.Tensor]:
    mesh = init_device_mesh("cpu", (2, 2))
    communicator = rhtcomm.HierarchicalCommunicator.from_mesh(mesh)
    with pytest.raises(ValueError, match=r"has 1 dimension.*needs two: \(nodes, ranks of a node"):
        rhtcomm.HierarchicalCommunicator.from_mesh(init_device_mesh("cpu", (4,)))
    x = data(rank, 5000)
    rhtcomm.all_reduce(x, CODEC, KEY, communicator, min_numel=0)
    with pytest.raises(DisagreementError, match=r"bits \(4 on ranks 0, 1, 2; 3 on rank 3\)"):
        rhtcomm.all_reduce(x, Codec(QuicFL(4 if rank < 3 else 3)), KEY, communicator)
    return communicator.rank, x


def test_two_levels_from_a_device_mesh(ranks: Ranks) -> None:
    outcomes = ranks.run(from_device_mesh, 4)
    assert [number for number, _ in outcomes] == [0, 1, 2, 3]
    inputs = [(data(2 * node, 5000) + data(2 * node + 1, 5000)) / 2 for node in range(2)]
    for _, x in outcomes:
        assert same_bits(x, simulated(inputs, CODEC, KEY, "all_gather"))


def reduce_by_uneven_nodes(rank: int, world_size: int) -> None:
    """Nodes of ranks (0, 1) and (2,), so rank 1 finds its like in no other node."""
    within, _ = dist.new_subgroups_by_enumeration([[0, 1], [2]])
    between, _ = dist.new_subgroups_by_enumeration([[0, 2], [1]])
    communicator = rhtcomm.HierarchicalCommunicator(within, between)
    x = data(rank, 5000)
    for check, min_numel in ((True, 0), (False, 0), (False, 5001)):
        with pytest.raises(ValueError, match=r"1 to 2 ranks, and the groups between nodes 1 to 2;"):
            rhtcomm.all_reduce(x, CODEC, KEY, communicator, min_numel=min_numel, check=check)


def test_uneven_nodes_are_refused_on_every_rank(ranks: Ranks) -> None:
    ranks.run(reduce_by_uneven_nodes, 3)


def use_odd_meshes(rank: int, world_size: int) -> list[str]:
    messages = []
    with pytest.raises(ValueError, match="mesh") as caught:
        HierarchicalCommunicator.from_mesh(DeviceMesh("cpu", torch.tensor([[0, 1], [3, 2]])))
    messages.append(str(caught.value))
    # The same by hand: node 1 has its ranks the other way round for the groups between nodes.
    within = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    between = [dist.new_group([0, 3]), dist.new_group([1, 2])][rank in (1, 2)]
    communicator = HierarchicalCommunicator(within, between)
    x = numbers(rank, shape=(5000,))
    with pytest.raises(ValueError, match="have different places in their nodes") as caught:
        rhtcomm.all_reduce(x, rhtcomm.Codec(rhtcomm.QuicFL(8)), rhtcomm.Key(0), communicator)
    messages.append(str(caught.value))
    return messages


def test_nodes_that_number_their_ranks_otherwise_are_refused(ranks: Ranks) -> None:
    for of_mesh, _ in ranks.run(use_odd_meshes, 4):
        assert "the mesh lists ranks as [[0, 1], [3, 2]]" in of_mesh


# ---- Shards that fail -------------------------------------------------------------------------


def reduce_out_of_step_on_two_levels(rank: int, world_size: int, codec: Codec | Lattice) -> str:
    """Rank 1 is another node's, and the ranks of its place find out."""
    communicator = two_levels(rank, 2, 2)
    key = Key(KEY.seed, KEY.step + (rank == 1))
    with pytest.raises(rhtcomm.PayloadError) as error:
        rhtcomm.all_reduce(
            data(rank, 10 * BLOCK), codec, key, communicator, min_numel=0, check=False
        )
    x = torch.full((10,), float(rank))
    rhtcomm.all_reduce(x, CODEC, KEY, communicator)  # the groups are at one place still
    assert x.tolist() == [1.5] * 10
    return str(error.value)


@pytest.mark.parametrize("codec", [CODEC, Codec(QuicFL(4), "auto", BLOCK), Lattice(4, block=BLOCK)])
def test_a_share_that_fails_leaves_no_rank_of_the_node_waiting(
    codec: Codec | Lattice, ranks: Ranks
) -> None:
    messages = ranks.run(reduce_out_of_step_on_two_levels, 4, codec)
    for message in messages[1::2]:
        assert "out of step" in message
    for message in messages[0::2]:
        assert "of this node could not decode its share" in message


def fail_while_nobody_looks(
    rank: int, world_size: int, dtype: torch.dtype, block: int, place: int
) -> tuple[str, torch.Tensor, torch.Tensor, str]:
    """As on CUDA, where the host does not wait for headers; one place in a node cannot decode."""
    communicator, codec = two_levels(rank, 2, 2), Lattice(4, block=block)
    options: Any = {"min_numel": 0, "check": False, "segments": [7, 6 * BLOCK, 4 * BLOCK + 70]}
    x = data(rank, 10 * BLOCK + 77, dtype)
    x[7 : 6 * BLOCK + 7] *= rank == 3  # this node alone knows of it
    expected = x.clone()
    rhtcomm.all_reduce(expected, codec, KEY, communicator, **options)
    key = Key(KEY.seed, KEY.step, KEY.bucket + (rank == place))
    message, later, checks = "", "", DeferredChecks()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            DeferredChecks, "to_host", staticmethod(lambda headers: (Event(), headers.clone()))
        )
        patch.setattr(DeferredChecks, "devices", ("cpu",))
        with checks.deferring():
            try:
                rhtcomm.all_reduce(x, codec, key, communicator, **options)
            except rhtcomm.PayloadError as error:
                message = str(error)
        try:
            checks.raise_failed(wait=True)
        except rhtcomm.PayloadError as error:
            later = str(error)
    return message, x, expected, later


class Event:
    """Of CUDA, what deferred checks ask of it."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


@pytest.mark.parametrize(
    ("dtype", "block", "place"),
    [*((dtype, BLOCK, 1) for dtype in DTYPES), (torch.float32, 4096, 0)],  # one block: all of it
)
def test_a_failed_share_is_nan_where_headers_are_looked_at_later(
    dtype: torch.dtype, block: int, place: int, ranks: Ranks
) -> None:
    shard = split_into_shards(10 * BLOCK + 77, block, 2)[place]
    outcomes = ranks.run(fail_while_nobody_looks, 4, dtype, block, place)
    for rank, (message, x, expected, later) in enumerate(outcomes):
        assert bool(x[shard].isnan().all()), "finite numbers that are no mean"
        assert same_bits(x[: shard.start], expected[: shard.start])
        if rank % 2 == place:
            assert "another rank has codes that cannot be added" in message
            assert not later
        else:
            assert not message
            assert f"rank {place} of this node could not decode its share for {KEY}" in later


def reduce_with_a_foreign_share(rank: int, world_size: int) -> str:
    """What rank 2 gets from its node begins with something else."""
    communicator = two_levels(rank, 2, 2)
    start = communicator.within.start_all_gather

    def foreign(x: torch.Tensor) -> Callable[[], torch.Tensor]:
        finish = start(x)

        def finish_foreign() -> torch.Tensor:
            gathered = finish()
            gathered[1, 3] ^= rank == 2
            return gathered

        return finish_foreign

    communicator.within.start_all_gather = foreign  # type: ignore[method-assign]
    x = data(rank, 10 * BLOCK)
    try:
        rhtcomm.all_reduce(x, CODEC, KEY, communicator, min_numel=0, check=False)
    except rhtcomm.PayloadError as error:
        return str(error)
    return ""


def test_a_share_has_a_mark(ranks: Ranks) -> None:
    messages = ranks.run(reduce_with_a_foreign_share, 4)
    assert "from rank 1 of this node" in messages.pop(2)
    assert messages == [""] * 3
