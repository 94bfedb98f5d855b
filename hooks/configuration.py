"""The codec that a state's arguments describe."""

from typing import Any, Literal

from ..codec import Codec
from ..lattice import Lattice
from ..quantizers import ECDQ, Eden, QuicFL, VectorQuantizer
from ..reduce import check_error_feedback

__all__ = ["Quantizer", "codec_for", "most_bits"]

Quantizer = Literal["quic_fl", "ecdq", "eden", "vector", "lattice"]

_EDEN: dict[str, type[Eden] | type[VectorQuantizer]] = {"eden": Eden, "vector": VectorQuantizer}
_LATTICE = "lattice"
_MOST_BITS = {"ecdq": 6, "vector": 4}
_QUANTIZERS = ("quic_fl", *_EDEN, "ecdq", _LATTICE)


def codec_for(
    bits: float,
    quantizer: Quantizer,
    rotations: int | Literal["auto"] | None,
    block: int,
    exact_fraction: float,
    error_feedback: bool,
) -> Codec | Lattice:
    """The codec of an RHTState.

    Raises:
        ValueError: an argument is out of its range, or does not fit the others.
    """
    codec = _codec(bits, quantizer, rotations, block, exact_fraction, error_feedback)
    if error_feedback:
        check_error_feedback(codec)
    return codec


def most_bits(quantizer: Quantizer) -> int:
    """Bits per coordinate."""
    return _MOST_BITS.get(quantizer, 8)


def _codec(
    bits: Any,  # quantizers check it
    quantizer: str,
    rotations: int | Literal["auto"] | None,
    block: int,
    exact_fraction: float,
    error_feedback: bool,
) -> Codec | Lattice:
    if quantizer not in _QUANTIZERS:
        raise ValueError(
            f"RHTState: quantizer={quantizer!r} must be one of {', '.join(_QUANTIZERS)}"
        )
    if exact_fraction and quantizer != "quic_fl":
        raise ValueError(
            f"RHTState: exact_fraction={exact_fraction!r} is only for quantizer='quic_fl', not "
            f"{quantizer!r}; leave it out"
        )
    if quantizer == "quic_fl":
        return Codec(QuicFL(bits, exact_fraction), rotations, block)
    if quantizer == "ecdq":
        return Codec(ECDQ(bits), rotations, block)
    if quantizer != _LATTICE:
        return Codec(_EDEN[quantizer](bits, biased=error_feedback), rotations, block)
    if isinstance(rotations, str):
        raise ValueError(
            'RHTState: rotations="auto" is not for quantizer="lattice", whose error depends on '
            "the largest coordinate; pass a number"
        )
    return Lattice(bits, 2 if rotations is None else rotations, block)
