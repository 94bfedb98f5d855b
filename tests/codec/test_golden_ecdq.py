"""ECDQ's known-answer vectors, and a coder that was written by the document."""

from typing import Any

import numpy as np
import pytest
import torch
from golden import ecdq
from golden.literal import Origin
from golden.make import Case, canonical, digest
from golden.make_ecdq import CASES, read
from libraries import needs_library, variants

from rhtcomm.kernels import reference, use
from rhtcomm.versions import ARITHMETIC, WIRE

VECTORS = read()
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
    assert VECTORS["versions"].tolist() == [WIRE, ARITHMETIC]
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
