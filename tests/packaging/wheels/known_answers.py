"""Whether an installed rhtcomm gives the known answers of tests/codec/golden, all bits of them.

    python known_answers.py wheel|kernels|reference

It is run by the Python of an environment into which rhtcomm was installed, without pytest. With
`kernels` it tries every variant of the C kernels that the processor has. With `wheel` the kernels
must use torch's own OpenMP runtime in addition. With `reference` none may be there.
"""

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "codec"))  # holds no rhtcomm

import numpy as np
import torch
from golden import make, make_ecdq

import rhtcomm
from rhtcomm.kernels import Kernel, choose, cpu, reference, use

VARIANTS = ("avx512vbmi", "avx512", "avx2", "baseline")


def chosen(wanted: str) -> dict[str, Kernel]:
    """The kernels by name; ends the program if the package does not choose them, and in silence."""
    warnings: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("rhtcomm").addHandler(handler)
    plain = choose("cpu", rhtcomm.QuicFL) is reference
    if plain != (wanted == "reference") or plain != bool(warnings):
        sys.exit(
            f"{wanted} wanted, {'reference' if plain else 'kernels'} found; the log: {warnings}"
        )
    path = cpu.library_path()
    if plain or path is None:
        return {"reference": reference}
    usable: dict[str, Kernel] = {}
    for name in VARIANTS:
        try:
            usable[name] = cpu.Library(path, name)
        except RuntimeError:  # the processor lacks it
            continue
    return usable


def differences(kernel: Kernel) -> tuple[int, list[str]]:
    """How many answers were compared, and the names of those that differ."""
    count, wrong = 0, []
    with use(kernel):
        for cases, path in ((make.CASES, make.PATH), (make_ecdq.CASES, make_ecdq.PATH)):
            known = make.read(path)
            for case in cases:
                payloads = case.encode()
                found = {
                    "payloads": payloads.numpy(),
                    "mean": make.canonical(case.decode(payloads)),
                }
                for kind, array in found.items():
                    count += 1
                    array = make.digest(array) if case.digested else array
                    if not np.array_equal(array, known[f"{case.name}/{kind}"]):
                        wrong.append(f"{kind} of {case.name}")
    return count, wrong


def runtimes() -> set[Path]:
    """OpenMP's, in this process."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {Path(line.split()[-1]) for line in lines if "libgomp" in line or "libomp" in line}


def main() -> int:
    wanted, failed = sys.argv[1], False
    if Path(rhtcomm.__file__).parent == Path(__file__).parents[3] / "rhtcomm":
        sys.exit(f"{rhtcomm.__file__} is the checkout's, not an installed one")
    for name, kernel in chosen(wanted).items():
        count, wrong = differences(kernel)
        failed |= bool(wrong) or not count
        print(f"{name}: {count - len(wrong)} of {count} known answers", *wrong, sep="\n  ")
    print("OpenMP:", *sorted(runtimes()))
    if wanted == "wheel" and runtimes() != {Path(torch.__file__).parent / "lib" / "libgomp.so.1"}:
        sys.exit("the kernels should share torch's OpenMP runtime")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
