"""Quantization tables for Gaussian coordinates.

The solvers that made them are in this package; nothing imports them at run time.
"""

import importlib.resources
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["EXPECTED_VNMSE", "load", "save"]

# E|x' - x|^2 / |x|^2 in the limit of many dimensions, by table and bits, from an independent
# earlier solver of the same problem.
EXPECTED_VNMSE = {
    "quic_fl": {
        1: 1.6538,
        2: 0.24583,
        3: 0.050527,
        4: 0.011587,
        5: 0.0027654,
        6: 0.00068436,
        7: 0.00016896,
        8: 0.000043918,
    },
    "quic_fl_exact": {
        1: 1.4654,
        2: 0.21350,
        3: 0.042638,
        4: 0.0095131,
        5: 0.0022460,
        6: 0.00055218,
        7: 0.00013602,
        8: 0.000035320,
    },
}


def load(name: str) -> dict[str, npt.NDArray[np.float64]]:
    """Read the shipped table `name` ("quic_fl", "quic_fl_exact", "lloyd_max" or "vector").

    Returns:
        One float64 array for each bit width b, under the key "b1" and so on: (entries,), but for
        "vector" (128, 8 / b).

    Raises:
        FileNotFoundError: No table of that name is installed.
    """
    table = importlib.resources.files(__name__).joinpath(f"{name}.npz")
    if not table.is_file():
        raise FileNotFoundError(
            f"The codebook table {name}.npz is not installed next to {__name__}. "
            f"Make it with `python -m {__name__}.{name.replace('_exact', ' --exact')}`."
        )
    with table.open("rb") as file, np.load(file) as arrays:
        return {key: array.astype(np.float64) for key, array in arrays.items()}


def save(path: Path, tables: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write a file for `load`.

    Uncompressed, so that the bytes depend only on the numbers and not on the zlib version.
    """
    np.savez(path, **tables)  # type: ignore[arg-type]  # numpy 1 knows no allow_pickle here
