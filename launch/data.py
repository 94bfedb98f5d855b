"""The Python standard library as training data: every machine has it, so a run needs no download.

Ranks read different windows of it, drawn by a generator with the key (seed, step, rank), so a run
can resume without saving anything about the data.
"""

import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# Excluded: third-party packages, tests, generated tables, and modules that distributions package
# separately.
EXCLUDED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "encodings",
    "pydoc_data",
    "idlelib",
    "lib2to3",
    "distutils",
    "tkinter",
    "turtledemo",
    "ensurepip",
}


def source_files(root: Path) -> list[str]:
    """Paths of the Python files under `root`, relative to it and sorted."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in EXCLUDED_FOLDERS]
        here = Path(folder).relative_to(root)
        found += [(here / name).as_posix() for name in names if name.endswith(".py")]
    return sorted(found)


def is_validation(relative_path: str) -> bool:
    """Whether a file is held out: one in ten, by a hash of its path."""
    return hashlib.sha256(relative_path.encode()).digest()[0] < 26


def load_corpus(root: Path) -> tuple[Tensor, Tensor]:
    """The bytes of the training files and of the validation files, each (bytes,) uint8."""
    train, validation = bytearray(), bytearray()
    for path in source_files(root):
        target = validation if is_validation(path) else train
        target += (root / path).read_bytes()
    for name, found in (("training", train), ("validation", validation)):
        if len(found) < 100_000:
            raise RuntimeError(
                f"the standard library at {root} has too little Python source ({len(found)} bytes "
                f"for {name}); use a Python that ships its library as .py files"
            )
    train_data = torch.frombuffer(train, dtype=torch.uint8)
    return train_data, torch.frombuffer(validation, dtype=torch.uint8)


def draw_batch(
    data: Tensor, batch: int, context: int, key: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Inputs and the bytes that follow them, both (batch, context) int64, drawn as `key` says."""
    offsets = np.random.default_rng(key).integers(len(data) - context, size=(batch, 1))
    windows = data[torch.from_numpy(offsets) + torch.arange(context + 1)].long()
    return windows[:, :-1], windows[:, 1:]
