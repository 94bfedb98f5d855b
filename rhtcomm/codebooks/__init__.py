"""Quantization tables for N(0, 1), and the solvers that make them."""

import importlib.resources

import numpy as np
import numpy.typing as npt

__all__ = ["load"]


def load(name: str) -> dict[str, npt.NDArray[np.float64]]:
    """Reads the shipped table `name` ("quic_fl", "quic_fl_exact" or "lloyd_max").

    Returns:
        One float64 array of shape (entries,) for each bit width, under the keys "b1" to "b8".

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
        return dict(arrays)
