"""Quantizers of rotated blocks."""

from rhtcomm.quantizers.base import Quantizer
from rhtcomm.quantizers.ecdq import ECDQ
from rhtcomm.quantizers.eden import Eden
from rhtcomm.quantizers.quic_fl import QuicFL
from rhtcomm.quantizers.vector import VectorQuantizer

__all__ = ["ECDQ", "Eden", "Quantizer", "QuicFL", "VectorQuantizer"]
