"""Versions, the compiler, and the tables of the quantizers."""

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from hashlib import sha256
from importlib import metadata

from rhtcomm.doctor.answers import TABLES
from rhtcomm.doctor.finding import Finding

__all__ = ["compiler", "tables", "versions"]

# The floors of pyproject.toml, and the newest that the tests have run on.
TESTED = {
    "Python": ((3, 10), (3, 13)),
    "torch": ((2, 9, 1), (2, 15)),
    "numpy": ((1, 24), (2, 4)),
}


def versions() -> list[Finding]:
    import numpy
    import torch

    from rhtcomm.versions import PACKAGE

    found = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
    }
    everything = ", ".join(f"{name} {version}" for name, version in found.items())
    findings = [Finding("ok", "versions", f"rhtcomm {PACKAGE}, {everything}")]
    for name, version in found.items():
        if one := of_version(name, version):
            findings.append(one)
    try:
        installed = metadata.version("rhtcomm")
    except metadata.PackageNotFoundError:
        return findings
    if installed != PACKAGE:
        fact = f"the code is rhtcomm {PACKAGE}, but pip installed {installed}"
        findings.append(Finding("remark", "versions", fact, "install it again"))
    return findings


def of_version(name: str, version: str) -> Finding | None:
    """What is to be said of a version that is older than supported, or newer than tested."""
    oldest, newest = TESTED[name]
    numbers = tuple(map(int, re.findall(r"\d+", version.partition("+")[0])[:3]))
    if numbers < oldest:
        least = ".".join(map(str, oldest))
        fact = f"{name} {version} is older than {least}, the oldest that rhtcomm supports"
        return Finding("problem", "versions", fact, f"install {name} {least} or newer")
    if numbers[: len(newest)] > newest:
        fact = f"{name} {version} is newer than {'.'.join(map(str, newest))}, the newest tested"
        return Finding("remark", "versions", fact, "if something fails, try an older one")
    return None


def compiler() -> list[Finding]:
    """The C compiler, which only an installation from source uses."""
    wanted = os.environ.get("CC", "").split()[:1]
    found = next(filter(None, map(shutil.which, [*wanted, "cc", "gcc", "clang"])), None)
    if found is None:
        return [Finding("ok", "compiler", "none; only an installation from source needs one")]
    try:
        said = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=10)
        version = (said.stdout.splitlines() or ["unknown version"])[0]
    except (OSError, subprocess.TimeoutExpired) as error:
        version = f"does not run ({error})"
    return [Finding("ok", "compiler", f"{found}, {version}")]


def tables() -> list[Finding]:
    """Whether the quantizers' tables are those that were shipped."""
    from rhtcomm import codebooks

    findings = []
    for name, expected in TABLES.items():
        file = os.path.join(os.path.dirname(codebooks.__file__), f"{name}.npz")
        try:
            damage = "" if digest(codebooks.load(name)) == expected else "damaged: numbers differ"
        except FileNotFoundError:
            damage = "missing"
        except Exception as error:  # of many kinds, by what in the file is damaged
            damage = f"damaged: {' '.join(str(error).split())}"
        if damage:
            fact = f"the table {file} is {damage}"
            findings.append(Finding("problem", "tables", fact, "install rhtcomm again"))
    return findings or [Finding("ok", "tables", f"all {len(TABLES)} are as they were shipped")]


def digest(arrays: Mapping[str, object]) -> str:
    """Of the names, shapes and numbers of a table's arrays."""
    import numpy as np

    found = sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name], np.float64)
        found.update(f"{name} {array.shape}".encode())
        found.update(array.tobytes())
    return found.hexdigest()[:32]
