"""Scalar quantizers of rotated blocks."""

from rhtcomm.quantizers.base import Quantizer
from rhtcomm.quantizers.eden import Eden
from rhtcomm.quantizers.quic_fl import QuicFL

__all__ = ["Eden", "Quantizer", "QuicFL"]
