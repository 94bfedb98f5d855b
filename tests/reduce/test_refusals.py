"""What all_reduce refuses, and that all ranks find out."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from groups import OfTheUser
from harness import Ranks
from simulation import ALGORITHMS, BLOCK, CODEC, KEY, data, same_bits, simulated

import rhtcomm
from rhtcomm import (
    Codec,
    DisagreementError,
    Eden,
    Key,
    Lattice,
    PayloadError,
    QuicFL,
    TorchCommunicator,
)
from rhtcomm.communicators import Communicator
from rhtcomm.reduce import Algorithm, check_agreement

# ---- Arguments --------------------------------------------------------------------------------


def reduce_wrong_dtypes(rank: int, world_size: int) -> list[str]:
    messages = []
    for dtype in (torch.float64, torch.int32, torch.int64, torch.uint8, torch.complex64):
        for check in (True, False):
            for numel in (3, 20_000):  # of the uncompressed and of the compressed path
                x = torch.full((numel,), rank, dtype=dtype)
                with pytest.raises(TypeError, match="only float32, bfloat16 and float16") as error:
                    rhtcomm.all_reduce(x, CODEC, KEY, rhtcomm.TorchCommunicator(), check=check)
                assert bool((x == rank).all())
        messages.append(str(error.value))
    return messages


def test_other_dtypes_are_refused_on_every_rank(ranks: Ranks) -> None:
    for messages in ranks.run(reduce_wrong_dtypes, 2):
        for name, message in zip(("float64", "int32", "int64", "uint8"), messages, strict=False):
            assert f"torch.{name}," in message


def reduce_by_other_things(rank: int, world_size: int) -> None:
    x, communicator = data(rank, 5), rhtcomm.TorchCommunicator()
    with pytest.raises(TypeError, match=r"codec=QuicFL\(bits=4.* must be a Codec, such as"):
        rhtcomm.all_reduce(x, QuicFL(4), KEY, communicator)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"process group; pass rhtcomm.TorchCommunicator\(group\)"):
        rhtcomm.all_reduce(x, CODEC, KEY, dist.group.WORLD)  # type: ignore[arg-type]


def test_other_things_are_refused_by_name(ranks: Ranks) -> None:
    ranks.run(reduce_by_other_things, 2)


def reduce_by_unknown_algorithm(rank: int, world_size: int) -> None:
    with pytest.raises(ValueError, match="'foo' must be one of auto, all_gather, two_shot"):
        rhtcomm.all_reduce(
            data(rank, 5),
            CODEC,
            KEY,
            rhtcomm.TorchCommunicator(),
            algorithm="foo",  # type: ignore[arg-type]
        )


def test_unknown_algorithm(ranks: Ranks) -> None:
    ranks.run(reduce_by_unknown_algorithm, 2)


@pytest.mark.parametrize("codec", [Codec, Lattice, QuicFL(4), "quic_fl"])
def test_all_reduce_takes_an_object_for_a_codec(codec: Any) -> None:
    with pytest.raises(TypeError, match="must be a Codec"):
        rhtcomm.all_reduce(torch.ones(3), codec, Key(0), None)  # type: ignore[arg-type]


@pytest.mark.parametrize("communicator", ["gloo", None, object(), TorchCommunicator])
def test_all_reduce_takes_communicators_alone(communicator: Any) -> None:
    codec = rhtcomm.Codec(rhtcomm.QuicFL(4))
    with pytest.raises(TypeError, match="must be a communicator such as"):
        rhtcomm.all_reduce(torch.ones(3), codec, rhtcomm.Key(0), communicator)


def test_all_reduce_takes_keys_alone() -> None:
    codec, communicator = rhtcomm.Codec(rhtcomm.QuicFL(4)), Communicator.__new__(OfTheUser)
    with pytest.raises(TypeError, match=r"key=3 must be a rhtcomm\.Key"):
        rhtcomm.all_reduce(torch.ones(3), codec, 3, communicator)  # type: ignore[arg-type]


# ---- Ranks that disagree ----------------------------------------------------------------------

# What one rank has in place of the others' value, and the field that the error must name.
DISAGREEMENTS: dict[str, dict[str, Any]] = {
    "bits": {"codec": Codec(QuicFL(3), block=BLOCK)},
    "quantizer": {"codec": Codec(Eden(4), block=BLOCK)},
    "rotations": {"codec": Codec(QuicFL(4), rotations=3, block=BLOCK)},
    "block": {"codec": Codec(QuicFL(4), block=2 * BLOCK)},
    "algorithm": {"algorithm": "two_shot"},
    "min_numel": {"min_numel": 7},
    "shape": {"numel": 5000},
    "dtype": {"dtype": torch.bfloat16},
    "key": {"key": Key(KEY.seed, KEY.step + 1, KEY.bucket)},
}
ALIKE: dict[str, Any] = {"codec": CODEC, "key": KEY, "numel": 5120, "dtype": torch.float32}


def reduce_as_told(
    rank: int,
    *,
    codec: Codec,
    key: Key,
    numel: int,
    dtype: torch.dtype,
    min_numel: int = 0,
    algorithm: Algorithm = "auto",
) -> torch.Tensor:
    x = data(rank, numel, dtype)
    communicator = rhtcomm.TorchCommunicator()
    rhtcomm.all_reduce(x, codec, key, communicator, algorithm=algorithm, min_numel=min_numel)
    return x


def disagree(rank: int, world_size: int, odd_one: int) -> tuple[dict[str, str], torch.Tensor]:
    messages = {}
    for field, otherwise in DISAGREEMENTS.items():
        arguments = ALIKE | (otherwise if rank == odd_one else {})
        with pytest.raises(DisagreementError) as error:
            reduce_as_told(rank, **arguments)
        messages[field] = str(error.value)
    return messages, reduce_as_told(rank, **ALIKE)


@pytest.mark.parametrize(("world_size", "odd_one"), [(2, 0), (3, 2)])
def test_disagreement_is_named_on_every_rank(world_size: int, odd_one: int, ranks: Ranks) -> None:
    inputs = [data(rank, ALIKE["numel"]) for rank in range(world_size)]
    usable = simulated(inputs, CODEC, KEY, "auto")
    results = ranks.run(disagree, world_size, odd_one)
    for messages, after in results:
        assert messages == results[0][0]
        assert same_bits(after, usable), "the process group is not usable any more"
    for field, message in results[0][0].items():
        assert f"differently in {field} (" in message
        assert f"on rank {odd_one}" in message
        assert message.count(" on rank") == 2, f"more than {field} is named: {message}"


def disagree_in_two_fields(rank: int, world_size: int) -> str:
    facts = {"color": ["red", "green", "red"][rank], "same": 1, "size": rank}
    if rank == 0:
        facts["extra"] = "x"
    with pytest.raises(DisagreementError) as error:
        check_agreement(rhtcomm.TorchCommunicator(), facts, torch.device("cpu"))
    return str(error.value)


def test_all_differing_fields_are_named_with_their_values(ranks: Ranks) -> None:
    expected = (
        "differently in color (red on ranks 0, 2; green on rank 1), "
        "size (0 on rank 0; 1 on rank 1; 2 on rank 2), extra (x on rank 0; absent on ranks 1, 2);"
    )
    for message in ranks.run(disagree_in_two_fields, 3):
        assert expected in message


def disagree_at_the_end(rank: int, world_size: int) -> str:
    same, long = list(range(500)), [*range(500), rank]
    with pytest.raises(DisagreementError) as error:
        check_agreement(
            rhtcomm.TorchCommunicator(), {"same": same, "long": long}, torch.device("cpu")
        )
    return str(error.value)


def test_long_values_are_compared_to_their_end(ranks: Ranks) -> None:
    for message in ranks.run(disagree_at_the_end, 2):
        assert "differently in long ([0, 1, 2," in message
        assert len(message) < 400


def greet_a_stranger(rank: int, world_size: int, row: bytes) -> str:
    """Rank 1 sends something else than a configuration."""
    communicator = rhtcomm.TorchCommunicator()
    if rank == 1:
        greeting = torch.frombuffer(bytearray(row.ljust(4096)), dtype=torch.uint8)
        communicator.all_gather(greeting)
        return ""
    with pytest.raises(DisagreementError) as caught:
        check_agreement(communicator, {"bits": 4}, torch.device("cpu"))
    return str(caught.value)


@pytest.mark.parametrize("row", [b"hello", b"\xff\xfe", b"[1, 2]", b"{}", b'{"bits": "4"}'])
def test_a_peer_that_is_no_rhtcomm_is_named(row: bytes, ranks: Ranks) -> None:
    for message in ranks.run(greet_a_stranger, 3, row)[::2]:
        assert "rank 1 did not send its configuration" in message


# ---- Payloads out of step ---------------------------------------------------------------------


def reduce_out_of_step(rank: int, world_size: int, algorithm: Algorithm) -> str:
    """Without the check, the payloads' headers tell."""
    key = Key(KEY.seed, KEY.step + rank)
    with pytest.raises(rhtcomm.PayloadError) as error:
        rhtcomm.all_reduce(
            data(rank, 5120),
            CODEC,
            key,
            rhtcomm.TorchCommunicator(),
            algorithm=algorithm,
            min_numel=0,
            check=False,
        )
    return str(error.value)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_payload_of_another_step_is_refused(algorithm: Algorithm, ranks: Ranks) -> None:
    for message in ranks.run(reduce_out_of_step, 2, algorithm):
        assert "out of step" in message


def swap_payloads(rank: int, world_size: int) -> str:
    """In a group of ranks 1 and 3, whose keys differ."""
    group = dist.new_group([1, 3])
    if rank not in (1, 3):
        return ""
    x = torch.ones(5000)
    with pytest.raises(PayloadError) as caught:
        rhtcomm.all_reduce(
            *(x, Codec(QuicFL(4)), Key(rank), rhtcomm.TorchCommunicator(group)),
            check=False,
            min_numel=0,
        )
    return str(caught.value)


def test_payload_errors_of_a_group_name_its_ranks_in_the_world(ranks: Ranks) -> None:
    for message in ranks.run(swap_payloads, 4)[1::2]:
        assert "in this group rank 0 (rank 1 of the world), rank 1 (rank 3 of the world)" in message


def two_threads_at_once(rank: int, world_size: int) -> list[str]:
    """One waits in an exchange that rank 1 joins late; the other's is refused meanwhile."""

    codec, found = Codec(QuicFL(8)), []
    begun = threading.Event()

    class Watched(rhtcomm.TorchCommunicator):
        """One that says when an exchange begins."""

        def start_all_gather(self, x: torch.Tensor) -> Callable[[], torch.Tensor]:
            begun.set()
            return super().start_all_gather(x)

    communicator = Watched()

    def reduce() -> None:
        x = torch.full((5000,), float(rank))
        rhtcomm.all_reduce(x, codec, Key(0), communicator, min_numel=0, check=False)
        found.append(x[0].item())

    if rank == 1:
        dist.barrier()
        reduce()
    else:
        thread = threading.Thread(target=reduce)
        thread.start()
        assert begun.wait(60)
        other = rhtcomm.TorchCommunicator()  # over the same group
        with pytest.raises(RuntimeError, match="would be mixed up"):
            rhtcomm.all_reduce(torch.ones(5000), codec, Key(1), other)
        dist.barrier()
        thread.join()
    assert abs(found[0] - 0.5) < 0.05
    y = torch.full((5000,), float(rank))
    rhtcomm.all_reduce(y, codec, Key(2), communicator)  # afterwards, it is free again
    return [str(y[0].item())]


def test_two_threads_over_one_group_are_refused(ranks: Ranks) -> None:
    ranks.run(two_threads_at_once, 2)
