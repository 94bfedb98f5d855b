"""ECDQ's known-answer vectors, and a coder that was written by the document."""

from typing import Any

import numpy as np
import pytest
import torch
from golden import ecdq, make_ecdq
from golden.literal import Origin
from golden.make import Case, canonical, digest, read
from golden.make_ecdq import CASES
from libraries import PATH, needs_library, variants

from rhtcomm import ECDQ, Codec, Key
from rhtcomm.kernels import reference, use
from rhtcomm.versions import WIRE

VECTORS = read(make_ecdq.PATH)
named = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def check(found: np.ndarray[Any, Any], case: Case, kind: str) -> None:
    found = digest(found) if case.digested else found
    expected = VECTORS[f"{case.name}/{kind}"]
    assert found.dtype == expected.dtype
    assert np.array_equal(found, expected), f"{kind} of {case.name}: see tests/codec/test_golden.py"


def stored(case: Case) -> torch.Tensor:
    if case.digested:
        return case.encode()
    return torch.from_numpy(VECTORS[f"{case.name}/payloads"])


def by_the_document(case: Case) -> tuple[ecdq.Form, Origin]:
    codec, key = case.codec, case.key
    form = ecdq.Form(codec.quantizer.bits, codec.default_rotations, codec.block)
    numbers = (key.seed, key.step, key.bucket, key.hop, case.world_size, case.offset, case.numel)
    return form, Origin(*numbers)


def test_vectors_are_of_these_versions_and_cases() -> None:
    # Arithmetic version 2 changed nothing but the lattice.
    assert VECTORS["versions"].tolist() == [WIRE, 1]
    of_cases = {f"{case.name}/{kind}" for case in CASES for kind in ("payloads", "mean")}
    assert set(VECTORS) == {"versions"} | of_cases


@named
def test_reference(case: Case) -> None:
    payloads = stored(case)
    with use(reference):
        check(case.encode().numpy(), case, "payloads")
        check(canonical(case.decode(payloads)), case, "mean")


@needs_library
@named
def test_c_kernels(case: Case) -> None:
    payloads = stored(case)
    for kernel in variants().values():
        with use(kernel):
            check(case.encode().numpy(), case, "payloads")
            check(canonical(case.decode(payloads)), case, "mean")


@named
def test_decoder_by_the_document(case: Case) -> None:
    rows = [row.numpy().tobytes() for row in stored(case)]
    mean = ecdq.decode(*by_the_document(case), rows, case.first_rank, case.out)
    check(mean, case, "mean")


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.recipe != "any bytes"], ids=lambda case: case.name
)
def test_encoder_by_the_document(case: Case) -> None:
    for rank, payload in enumerate(stored(case), case.first_rank):
        found = ecdq.encode(*by_the_document(case), case.input(rank).float().numpy(), rank)
        assert found == payload.numpy().tobytes(), f"rank {rank}"


@pytest.mark.parametrize("word", [0, 1, 3, 0xFFFF])
@pytest.mark.parametrize("bits", [1, 2.5, 4, 6])
def test_words_behind_the_end_are_zeros(bits: float, word: int) -> None:
    """States that begin below 2^16 take rare symbols, which read more words than there are."""
    case = Case(f"{bits:g}", Codec(ECDQ(bits), block=1024), 2048, Key(9))
    payload = case.encode()
    start = case.codec.layout(case.numel)[0].codes
    payload[0, start : start + 128].view(torch.int32).copy_(torch.arange(32) % 5)
    words = payload[0, start + 128 :].view(torch.int16)
    words.fill_(word - (word >> 15 << 16))
    words[-1] = 77  # read early, or not at all
    with use(reference):
        found = canonical(case.decode(payload))
    by_document = ecdq.decode(*by_the_document(case), [payload[0].numpy().tobytes()], 0, "float32")
    assert np.array_equal(found, by_document)
    for kernel in variants().values() if PATH else ():
        with use(kernel):
            assert np.array_equal(canonical(case.decode(payload)), found)
