"""Quantization tables for Gaussian coordinates, and the solvers that make them."""

import importlib.resources
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["load", "save"]


def load(name: str) -> dict[str, npt.NDArray[np.float64]]:
    """Reads the shipped table `name` ("quic_fl", "quic_fl_exact", "lloyd_max" or "vector").

    Returns:
        One float64 array for each bit width b, under the key "b1" and so on: (entries,), but for
        "vector" (128, 8 / b).

    Raises:
        FileNotFoundError: No table of that name is installed.
    """
    table = importlib.resources.files(__name__).joinpath(f"{name}.npz")
    if not table.is_file():
        raise FileNotFoundError(
            f"The codebook table {name}.npz is not installed beside {__name__}. "
            f"Make it with `python -m {__name__}.{name.replace('_exact', ' --exact')}`."
        )
    with table.open("rb") as file, np.load(file) as arrays:
        return {key: array.astype(np.float64) for key, array in arrays.items()}


def save(path: Path, tables: Mapping[str, npt.NDArray[Any]]) -> None:
    """Writes what `load` reads.

    Uncompressed, so that the bytes depend on the numbers alone and not on the zlib at hand.
    """
    np.savez(path, **tables)  # type: ignore[arg-type]  # numpy 1 knows no allow_pickle here
