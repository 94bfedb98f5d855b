"""What constructors and the codec refuse: the argument, the fact and the remedy are named."""

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from rhtcomm import (
    Codec,
    Eden,
    HierarchicalCommunicator,
    Key,
    Lattice,
    PayloadError,
    QuicFL,
    RandomizedHadamard,
    VectorQuantizer,
    choose_rotations,
)
from rhtcomm.segments import Segments


@pytest.mark.parametrize("quantizer", [QuicFL, Eden, VectorQuantizer, None, 4, "quic_fl"])
def test_a_codec_takes_an_object_for_a_quantizer(quantizer: Any) -> None:
    with pytest.raises(TypeError, match=r"must be a quantizer such as QuicFL\(bits=4\)"):
        Codec(quantizer)


def test_errors_of_decoding_name_the_function_that_was_called() -> None:
    codec, short = Codec(QuicFL(4)), torch.zeros(2, 5, dtype=torch.uint8)
    with pytest.raises(PayloadError, match=r"^Codec\.decode_shards: payloads is"):
        codec.decode_shards(short, Key(0), 8192)
    with pytest.raises(PayloadError, match=r"^Codec\.decode_mean: payloads is"):
        codec.decode_mean(short, Key(0), 8192)
    with pytest.raises(PayloadError, match=r"^Codec\.decode_shards: payloads is"):
        codec.decode_shards(short[0, 0], Key(0), 8192)


@pytest.mark.parametrize("make", [Codec(QuicFL(4)), Lattice(4)])
@pytest.mark.parametrize("field", ["rotations", "block"])
def test_numbers_of_a_configuration_are_plain_ints(make: Codec | Lattice, field: str) -> None:
    class Int(int):
        def __repr__(self) -> str:
            return f"Int({int(self)})"

    value: Any = Int(getattr(make, field))
    with pytest.raises(ValueError, match=rf"{field}=Int\(\d+\) must be .* \(an int\)"):
        replace(make, **{field: value})
    with pytest.raises(ValueError, match="rotations=True must be"):
        replace(make, rotations=True)


@pytest.mark.parametrize("number", [np.float64, np.float32, Fraction, torch.tensor])
def test_equal_fractions_make_equal_configurations(number: Any) -> None:
    codec, other = Codec(QuicFL(4, 1 / 512)), Codec(QuicFL(4, number(1 / 512)))
    assert other.fingerprint == codec.fingerprint
    assert repr(other) == repr(codec)
    assert hash(other) == hash(codec)


@pytest.mark.parametrize("quantizer", [Codec(QuicFL(4)), Lattice(4)])
def test_a_codec_of_a_codec_is_refused(quantizer: Any) -> None:
    with pytest.raises(TypeError, match=r"must be a quantizer such as QuicFL\(bits=4\)"):
        Codec(quantizer)


@pytest.mark.parametrize("key", [0, (0, 1), None, Key])
def test_a_key_is_a_key(key: Any) -> None:
    codec, x = Codec(QuicFL(4)), torch.ones(40)
    payload = codec.encode(x, Key(0))
    with pytest.raises(TypeError, match=r"Codec.encode: key=.* must be a Key"):
        codec.encode(x, key)
    for decode in (codec.decode_mean, codec.decode_shards):
        with pytest.raises(TypeError, match=rf"{decode.__name__}: key=.* must be a Key"):
            decode(payload[None], key, 40)


def test_lengths_are_not_negative() -> None:
    codec = Codec(QuicFL(4))
    with pytest.raises(ValueError, match="numel=-1 must not be negative"):
        codec.nbytes(-1)
    with pytest.raises(ValueError, match="numel=-5000 must not be negative"):
        codec.decode_mean(codec.encode(torch.ones(0), Key(0))[None], Key(0), -5000)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Key(1.5), r"Key: seed=1\.5 must be an integer"),  # type: ignore[arg-type]
        (lambda: Key(0, "a"), "Key: step='a' must be an integer"),  # type: ignore[arg-type]
        (lambda: Codec(QuicFL(4)).encode(torch.ones(3), Key(0), "a"), "rank='a'"),  # type: ignore[arg-type]
        (lambda: Eden(4, biased="no"), "Eden: biased='no' must be True or False"),  # type: ignore[arg-type]
        (lambda: VectorQuantizer(4, 1), "VectorQuantizer: biased=1 must"),  # type: ignore[arg-type]
        (lambda: Segments(3, 3), "segments=3 must hold the length"),  # type: ignore[arg-type]
        (lambda: HierarchicalCommunicator.from_mesh("x"), "mesh='x' must be a DeviceMesh"),  # type: ignore[arg-type]
        (lambda: RandomizedHadamard().forward(torch.ones(3), 0), "key=0 must be a Key"),  # type: ignore[arg-type]
        (lambda: RandomizedHadamard().forward(torch.ones(3) * 1j, Key(0)), "torch.view_as_real"),
        (
            lambda: choose_rotations(torch.ones(3) * 1j),
            "complex64, which is not a floating-point type",
        ),
        (lambda: choose_rotations([1.0]), "x is a list; make it a torch.Tensor"),  # type: ignore[arg-type]
        (lambda: choose_rotations(torch.ones(3).to_sparse()), r"pass x\.to_dense\(\)"),
    ],
)
def test_arguments_of_another_type_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()


def test_rotation_and_choice_take_what_requires_grad() -> None:
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    leaf = x.clone().requires_grad_()
    rotation = RandomizedHadamard()
    assert torch.equal(rotation.forward(leaf, Key(0)), rotation.forward(x, Key(0)))
    assert choose_rotations(leaf) == choose_rotations(x)
