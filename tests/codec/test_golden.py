"""Known-answer vectors: the bytes and bits of tests/codec/golden, by every kernel there is.

A failure here means that this code and the released one, or two kernels, no longer understand each
other. If that is meant, raise WIRE (other payloads) or ARITHMETIC (other results) in
rhtcomm/versions.py, say so in docs/format.md and in the changelog, and write the vectors anew with
`python tests/codec/golden/make.py`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from golden import literal
from golden.make import CASES, Case, canonical, digest, read
from harness import ROOT, Ranks
from interpreter import encode_and_decode, needs_triton
from libraries import needs_library, variants

import rhtcomm
from rhtcomm import Codec, DisagreementError, Eden, Key, Lattice, PayloadError, QuicFL
from rhtcomm.kernels import reference, use
from rhtcomm.versions import ARITHMETIC, VERSIONS, WIRE

VECTORS = read()
CHANGED = (
    "differs from the known answer: either this is a fault, or the {} version must be raised in "
    "rhtcomm/versions.py, the changelog and docs/format.md must say so, and the vectors be made "
    "anew (python tests/codec/golden/make.py)"
)
named = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def check(found: torch.Tensor | np.ndarray[Any, Any], case: Case, kind: str, by: str) -> None:
    """Against the stored payloads, or the stored bits of the mean."""
    if isinstance(found, torch.Tensor):
        found = found.numpy() if kind == "payloads" else canonical(found)
    found = digest(found) if case.digested else found
    expected = VECTORS[f"{case.name}/{kind}"]
    same = found.dtype == expected.dtype and np.array_equal(found, expected)
    changed = CHANGED.format("wire" if kind == "payloads" else "arithmetic")
    assert same, f"{kind} of {case.name} by {by} {changed}"


def stored(case: Case) -> torch.Tensor:
    """The payloads, which are known by their hash alone where they are large."""
    found = case.encode() if case.digested else torch.from_numpy(VECTORS[f"{case.name}/payloads"])
    check(found, case, "payloads", "the kernels by default")
    return found


def test_versions_are_those_of_the_vectors() -> None:
    # Arithmetic version 2 changed nothing but the lattice; what it was before is still in the file.
    assert VECTORS["versions"].tolist() == [WIRE, 1]
    assert len({case.name for case in CASES}) == len(CASES)
    of_cases = {f"{case.name}/{kind}" for case in CASES for kind in ("payloads", "mean")}
    of_payloads = {name for name in VECTORS if not name.startswith("Lattice")}
    assert of_payloads == {"versions"} | of_cases


@named
def test_reference(case: Case) -> None:
    with use(reference):
        check(case.encode(), case, "payloads", "the reference")
        check(case.decode(stored(case)), case, "mean", "the reference")


@needs_library
@named
def test_c_kernels(case: Case) -> None:
    payloads = stored(case)
    for name, kernel in variants().items():
        with use(kernel):
            check(case.encode(), case, "payloads", name)
            check(case.decode(payloads), case, "mean", name)


# A block takes the interpreter from a tenth of a second to several.
FEW = ("-n1", "-n255", "-n256", "-n257", "FL4-kauto-d256-takes-1", "FL7-k2-d128-mixed")


@needs_triton
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name.endswith(FEW)], ids=lambda case: case.name
)
def test_triton_kernels(interpreted: Callable[..., Any], case: Case) -> None:
    payloads, mean = interpreted(encode_and_decode, case)
    check(payloads, case, "payloads", "Triton")
    check(mean, case, "mean", "Triton")


# A codec that was written by the document --------------------------------------------------- --


def form_of(codec: Codec) -> literal.Format:
    quantizer = codec.quantizer
    return literal.Format(
        type(quantizer).__name__,
        quantizer.bits,
        codec.rotations or 0,
        codec.block,
        bool(getattr(quantizer, "exact_fraction", 0)),
        getattr(quantizer, "biased", False),
    )


def origin_of(key: Key, world_size: int, offset: int, numel: int) -> literal.Origin:
    origin = (key.seed, key.step, key.bucket, key.hop, world_size, offset, numel)
    return literal.Origin(*origin, key.owner)


def decoded(case: Case, payloads: torch.Tensor) -> np.ndarray[Any, Any]:
    origin = origin_of(case.key, case.world_size, case.offset, case.numel)
    rows = [row.numpy().tobytes() for row in payloads]
    return literal.decode(form_of(case.codec), origin, rows, case.first_rank, case.out)


@named
def test_decoder_by_the_document(case: Case) -> None:
    check(decoded(case, stored(case)), case, "mean", "the decoder of tests/codec/golden/literal.py")


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.recipe != "any bytes"], ids=lambda case: case.name
)
def test_encoder_by_the_document(case: Case) -> None:
    payloads = stored(case)
    origin = origin_of(case.key, case.world_size, case.offset, case.numel)
    for rank, payload in enumerate(payloads, case.first_rank):
        x, fourth = case.input(rank).float().numpy(), int(payload[3])
        found = literal.encode(form_of(case.codec), origin, x, rank, fourth)
        assert found == payload.numpy().tobytes(), f"rank {rank}"


def test_owner_is_in_the_check_alone() -> None:
    case = replace(FIXED, key=replace(FIXED.key, owner=2**32 - 1))
    payloads, plain = case.encode(), stored(FIXED)
    assert (payloads != plain).any(dim=0).nonzero().flatten().tolist() == [4, 5, 6, 7]
    assert decoded(case, payloads).tolist() == decoded(FIXED, plain).tolist()
    refuses(case, plain, "rank 0 was made for another key")


def test_example_of_the_document() -> None:
    text = (ROOT / "docs" / "format.md").read_text()
    assert f"Wire version {WIRE}, arithmetic version {ARITHMETIC}." in text
    example = "".join(
        line for line in text.partition("## Example")[2].splitlines() if line.startswith("    ")
    )
    payload, mean = (
        [int(word, 16) for word in example.split() if len(word) == digits] for digits in (2, 8)
    )
    case = Case("example", Codec(QuicFL(1), 1, 32), 32, Key(1))
    found = case.codec.encode(torch.arange(1.0, 33), case.key)
    assert found.tolist() == payload
    assert decoded(case, found[None]).tolist() == mean
    assert canonical(case.decode(found[None])).tolist() == mean


def test_philox_of_the_literal_codec_gives_the_published_answers() -> None:
    """kat_vectors of Random123."""
    for counter, key, answer in (
        ((0,) * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ):
        found = literal.philox(([counter[0]], *counter[1:]), key)
        assert " ".join(f"{word:08x}" for word in found[0].tolist()) == answer


# What must be refused ----------------------------------------------------------------------------

FIXED = next(case for case in CASES if case.name == "QuicFL4-k2-d4096-n257")
AUTO = next(case for case in CASES if case.name == "QuicFL4-kauto-d256-takes-2")


def refuses(case: Case, payloads: torch.Tensor, fact: str) -> None:
    with pytest.raises(PayloadError, match=fact):
        case.decode(payloads)
    with pytest.raises(literal.Refused):
        decoded(case, payloads)


@pytest.mark.parametrize(
    ("byte", "value", "fact"),
    [
        (0, ord("r"), "rank 1 does not begin with the mark"),
        (1, 0, "rank 1 does not begin with the mark"),
        (2, 0, "rank 1 has format version 0, but this is version 1"),
        (2, 2, "rank 1 has format version 2, but this is version 1"),
        (3, 0x00, "rank 1 was made with a configuration other"),
        (3, 0x03, "rank 1 was made with a configuration other"),
        (3, 0x22, "rank 1 was made with a configuration other"),
        *((byte, None, "rank 1 was made for another key, rank") for byte in range(4, 8)),
        *((byte, None, "rank 1 was made with a configuration other") for byte in range(8, 16)),
    ],
)
def test_damaged_headers_are_refused(byte: int, value: int | None, fact: str) -> None:
    payloads = stored(FIXED).clone()
    payloads[1, byte] = payloads[1, byte] ^ 0x10 if value is None else value
    refuses(FIXED, payloads, fact)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("wish", [0, 4, 5, 8, 15])
def test_impossible_wishes_for_rotations_are_refused(wish: int, rank: int) -> None:
    payloads = stored(AUTO).clone()
    payloads[rank, 3] = 2 + 16 * wish
    refuses(AUTO, payloads, f"rank {rank} has 2 rotations and requests {wish} next.* damaged")


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("rotations", [0, 4, 15])
def test_impossible_rotations_are_refused(rotations: int, rank: int) -> None:
    payloads = stored(AUTO).clone()
    payloads[rank, 3] = rotations + 16
    refuses(AUTO, payloads, f"rank {rank} has {rotations} rotations and requests 1 next.* damaged")


def test_other_lengths_and_places_are_refused() -> None:
    for case in (FIXED, AUTO):
        payloads = stored(case)
        refuses(case, payloads[:, :-1], "cut short")
        refuses(case, torch.nn.functional.pad(payloads, (0, 4)), "cut short")
        refuses(case, payloads[:, :15], "cut short")
        refuses(replace(case, world_size=3), payloads, "rank 0 was made for another key")
        refuses(replace(case, offset=case.codec.block), payloads, "rank 0 was made for another key")
        refuses(replace(case, numel=case.numel + 1), payloads, "rank 0 was made for another key")
        refuses(case, payloads.flip(0), "rank 0 was made for another key")


@pytest.mark.parametrize("wanted", [0, 4, -1, 16, 255])
def test_impossible_wishes_are_not_sent(wanted: int) -> None:
    with pytest.raises(ValueError, match=f"wanted={wanted} must be 1, 2 or 3"):
        Codec(QuicFL(4), "auto").encode(torch.ones(10), Key(1), wanted=wanted)


def test_wishes_are_for_rotations_that_can_change() -> None:
    with pytest.raises(
        ValueError, match=r"wanted=2.*the number can be chosen only with rotations=.auto."
    ):
        Codec(QuicFL(4)).encode(torch.ones(10), Key(1), wanted=2)
    with pytest.raises(TypeError):
        Codec(QuicFL(4), "auto").encode(torch.ones(10), Key(1), wanted=2.0)  # type: ignore[arg-type]


# Versions ----------------------------------------------------------------------------------------


def reduce_with_versions(rank: int, world_size: int) -> list[str]:
    """The messages where rank 1 alone has another version of one kind."""
    messages = []
    for name, codec in (
        (name, codec) for name in VERSIONS for codec in (Codec(Eden(4)), Lattice())
    ):
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                patch.setitem(VERSIONS, name, "another")  # type: ignore[arg-type]
            with pytest.raises(DisagreementError) as error:
                rhtcomm.all_reduce(torch.ones(5000), codec, Key(1), rhtcomm.TorchCommunicator())
        messages.append(str(error.value))
    return messages


def test_ranks_compare_their_versions(ranks: Ranks) -> None:
    first, second = ranks.run(reduce_with_versions, 2)
    assert first == second
    for (name, version), found in zip(
        VERSIONS.items(), zip(first[::2], first[1::2], strict=True), strict=True
    ):
        fact = f"differently in {name} ({version} on rank 0; another on rank 1);"
        assert all(fact in message for message in found)


def test_versions_do_not_change_the_fingerprint() -> None:
    """The header has the wire version in a place of its own; the hash is the documented one."""
    for case in CASES:
        assert case.codec.fingerprint == literal.fingerprint(form_of(case.codec)), case.name
        assert VERSIONS.items() <= case.codec.configuration.items()
    assert VERSIONS.items() <= Lattice().configuration.items()
    assert VERSIONS["package version"] == rhtcomm.__version__
