"""What the doctor expects, derived again from the format's document and from the known answers."""

import re
from hashlib import blake2b

import numpy as np
import pytest
from golden import ecdq, literal, make
from harness import ROOT
from libraries import needs_library, variants

from rhtcomm import ECDQ, Codec, codebooks
from rhtcomm.doctor.answers import ANSWERS, TABLES
from rhtcomm.doctor.codec import KEY, NUMEL, RANKS, answer, codecs, input_of
from rhtcomm.doctor.installation import TESTED, digest
from rhtcomm.kernels import reference, use

CODECS = {name: make_codec() for name, make_codec in codecs()}
named = pytest.mark.parametrize("name", CODECS)


def by_the_document(codec: Codec) -> tuple[list[bytes], np.ndarray]:
    """Payloads, and the mean's bits, by the codecs of tests/codec/golden."""
    quantizer = codec.quantizer
    numbers = (KEY.seed, KEY.step, KEY.bucket, KEY.hop, RANKS, 0, NUMEL)
    origin = literal.Origin(*numbers, KEY.owner)
    xs = [input_of(rank).numpy() for rank in range(RANKS)]
    if isinstance(quantizer, ECDQ):
        form = ecdq.Form(quantizer.bits, codec.default_rotations, codec.block)
        payloads = [ecdq.encode(form, origin, x, rank) for rank, x in enumerate(xs)]
        return payloads, ecdq.decode(form, origin, payloads, 0, "float32")
    exact = bool(getattr(quantizer, "exact_fraction", 0))
    numbers = (int(quantizer.bits), codec.default_rotations, codec.block)
    form = literal.Format(type(quantizer).__name__, *numbers, exact, False)
    wishes = codec.encode(input_of(0), KEY, 0, RANKS)[3]
    payloads = [literal.encode(form, origin, x, rank, int(wishes)) for rank, x in enumerate(xs)]
    return payloads, literal.decode(form, origin, payloads, 0, "float32")


@named
def test_answers_follow_from_the_document(name: str) -> None:
    payloads, mean = by_the_document(CODECS[name])
    octets = b"".join(payloads) + mean.astype(np.uint32).tobytes()
    assert blake2b(octets, digest_size=8).hexdigest() == ANSWERS[name]


def test_answers_are_of_these_codecs_and_inputs() -> None:
    assert list(ANSWERS) == list(CODECS)
    assert len(set(ANSWERS.values())) == len(ANSWERS)
    for rank in range(RANKS):
        known = make.gaussian(NUMEL, rank, 256, "float32")
        assert np.array_equal(input_of(rank).numpy().view(np.uint32), known)


@needs_library
def test_all_kernels_give_the_answers() -> None:
    for kernel in (reference, *variants().values()):
        with use(kernel):
            for name in list(CODECS)[:: 5 if kernel is reference else 1]:
                assert answer(CODECS[name]) == ANSWERS[name], name


def test_tables_are_all_that_are_shipped() -> None:
    shipped = {path.stem for path in (ROOT / "rhtcomm" / "codebooks").glob("*.npz")}
    assert set(TABLES) == shipped
    for name, expected in TABLES.items():
        arrays = codebooks.load(name)
        assert digest(arrays) == expected
        first = min(arrays)
        arrays[first] = arrays[first].copy()
        arrays[first].flat[0] = np.nextafter(arrays[first].flat[0], np.inf)
        assert digest(arrays) != expected


def test_the_oldest_versions_are_those_of_the_project() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    for name in ("torch", "numpy"):
        (found,) = re.findall(rf'"{name}>=([\d.]+)"', text)
        assert TESTED[name][0] == tuple(map(int, found.split(".")))
    (found,) = re.findall(r'requires-python = ">=([\d.]+)"', text)
    assert TESTED["Python"][0] == tuple(map(int, found.split(".")))
