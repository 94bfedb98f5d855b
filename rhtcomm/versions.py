"""The versions that all ranks must share; docs/format.md says when each is raised."""

from collections.abc import Mapping

__all__ = ["ARITHMETIC", "PACKAGE", "VERSIONS", "WIRE"]

PACKAGE = "0.1.0"
WIRE = 1  # of the encoded bytes
ARITHMETIC = 2  # of the bits decoded from given bytes, and of the lattice's words

VERSIONS: Mapping[str, object] = {
    "package version": PACKAGE,
    "wire version": WIRE,
    "arithmetic version": ARITHMETIC,
}
