"""`python -m rhtcomm plan`: what `rhtcomm.plan` predicts, and what the prediction rests on."""

import argparse
import math
from typing import Any

import torch

from rhtcomm.kernels import kernel_for
from rhtcomm.markdown import table
from rhtcomm.planning.cost import TYPICAL
from rhtcomm.planning.measured import Measured
from rhtcomm.planning.plan import BITS, plan
from rhtcomm.planning.probe import codec_of, measure_codec

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `python -m rhtcomm plan`."""
    # What is not given has no attribute: its value depends on the file.
    parser.argument_default = argparse.SUPPRESS
    parser.add_argument(
        "--from",
        dest="measured",
        metavar="FILE",
        help="what bench --json wrote; the other arguments replace what is in it",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--numel", type=int, help="coordinates of a bucket")
    size.add_argument(
        "--mebibytes", type=float, nargs="+", help="the same, as float32 (default: 25)"
    )
    parser.add_argument(
        "--world-size", type=int, help="ranks, each with its own link (default: the file's)"
    )
    parser.add_argument("--link-gbps", type=float, help="Gbit/s each way (default: the file's)")
    parser.add_argument(
        "--latency",
        type=float,
        help=f"seconds for a message to arrive (default: the file's, or {TYPICAL.latency:g})",
    )
    parser.add_argument(
        "--cores",
        type=float,
        help="cores per rank (default: the file's, or as many as a rank can use)",
    )
    parser.add_argument(
        "--threads", type=int, help="threads per rank, where there is no file (default: torch's)"
    )
    parser.add_argument(
        "--slowdown",
        type=float,
        help="how much slower the codec runs in training than it was measured (default: 1)",
    )
    parser.add_argument("--quantizer", choices=BITS, help="default: quic_fl")
    parser.add_argument(
        "--bits", type=float, nargs="+", help="default: the file's, or all whole numbers"
    )
    parser.add_argument(
        "--max-nmse",
        type=float,
        help="squared error allowed, relative to what is encoded (default: 0.03)",
    )


def run(args: argparse.Namespace) -> None:
    """Print the plan of each size that the arguments ask for."""
    given = vars(args)
    if "threads" in given and given["threads"] < 1:
        raise ValueError(f"rhtcomm.plan: threads={given['threads']} must be positive")
    file = Measured.read(given["measured"]) if "measured" in given else None
    options = _from_here(given) if file is None else _from(file, given)
    for name in ("world_size", "link_gbps", "latency", "cores", "slowdown", "max_nmse", "bits"):
        if name in given:
            options[name] = given[name]
    if "numel" in given:
        sizes = [given["numel"]]
    else:
        mebibytes = given.get("mebibytes", [25.0])
        if not all(0 < size < math.inf for size in mebibytes):
            raise ValueError(f"rhtcomm.plan: mebibytes={mebibytes} must be positive")
        sizes = [int(size * 2**18) for size in mebibytes]
    plans = [plan(numel, **options) for numel in sizes]
    print(_facts(options, given, file))
    for numel, planned in zip(sizes, plans, strict=True):
        print(f"\n{_heading(numel, options['world_size'])}\n\n{planned}")


def _from_here(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `plan` where there is no file: the codec is measured here."""
    required = {"world_size": "--world-size", "link_gbps": "--link-gbps"}
    if missing := [option for name, option in required.items() if name not in given]:
        raise ValueError(
            f"rhtcomm.plan: {' and '.join(missing)} must be given, or --from with a file of bench"
        )
    if "threads" in given:
        torch.set_num_threads(given["threads"])
    quantizer = given.get("quantizer", "quic_fl")
    bits = given.get("bits", [b for b in BITS[quantizer] if b % 1 == 0])
    return {
        "link": TYPICAL,
        "cores": math.inf,
        "threads": torch.get_num_threads(),
        "quantizer": quantizer,
        # What is no number of bits is for `plan` to refuse.
        "speeds": {b: measure_codec(b, quantizer=quantizer) for b in bits if b in BITS[quantizer]},
        "bits": bits,
    }


def _from(file: Measured, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `plan` as the file has them."""
    if "threads" in given:
        raise ValueError(
            f"rhtcomm.plan: --threads={given['threads']} does not go with --from: the codec in "
            f"{file.path} was measured with {file.threads}; run bench again with other threads"
        )
    quantizer = given.get("quantizer", "quic_fl")
    speeds = file.speeds.get(quantizer, {})
    if missing := set(given.get("bits", [])) - set(speeds):
        lacking = ", ".join(f"{bits:g}" for bits in sorted(missing))
        raise ValueError(
            f"rhtcomm.plan: {file.path} lacks the codec's speed for {quantizer} at {lacking} bits; "
            f"it has {', '.join(f'{bits:g}' for bits in sorted(speeds)) or 'none'}"
        )
    if not speeds:
        others = ", ".join(name for name in file.speeds if file.speeds[name]) or "none"
        raise ValueError(
            f"rhtcomm.plan: {file.path} has no speeds of {quantizer}, only of {others}; run bench "
            "with it, or choose another quantizer"
        )
    return {
        "link": file.link,
        "link_gbps": file.link.gbps,
        "world_size": file.world_size,
        "cores": file.cores,
        "threads": file.threads,
        "quantizer": quantizer,
        "speeds": speeds,
        "bits": sorted(speeds),
    }


def _facts(options: dict[str, Any], given: dict[str, Any], file: Measured | None) -> str:
    """What predictions rest on, and what of it was measured, given or assumed."""
    link, found = options["link"], "assumed" if file is None else "measured"

    def source(name: str) -> str:
        return "given" if name in given else found

    cores = options["cores"]
    latency = options.get("latency", link.latency)
    rows = [
        ["ranks", f"{options['world_size']}", source("world_size")],
        ["cores per rank", "enough" if cores == math.inf else f"{cores:g}", source("cores")],
        ["rate of a link", f"{options['link_gbps']:.3g} Gbit/s", source("link_gbps")],
        ["latency", f"{1e6 * latency:.3g} us", source("latency")],
        ["posting a message", f"{1e6 * link.posting:.3g} us", found],
        ["handover", f"{1e6 * link.handover:.3g} us", found],
        ["moving bytes", f"{1e9 * link.transport:.3g} ns per byte", found],
        ["float32 sum", f"{1e9 * link.all_reduce:.3g} ns per byte", found],
    ]
    if link.all_reduce_bf16 is not None:
        rows.append(["bf16 sum", f"{1e9 * link.all_reduce_bf16:.3g} ns per byte", found])
    threads = options["threads"]
    with_threads = f"{options['quantizer']}, {threads} thread{'s' * (threads != 1)}"
    if file is None:
        kernel = kernel_for(torch.device("cpu"), codec_of(options["quantizer"], 4).quantizer)
        kernels = getattr(kernel, "variant", "reference")
        rows.append(["codec", f"{with_threads}, kernels: {kernels}", "measured here"])
    else:
        rows.append(["codec", with_threads, found])
    if "slowdown" in given:
        rows.append(["slowdown of the codec", f"{given['slowdown']:g}", "given"])
    origin = "" if file is None else f"{file.path}, measured with {file.world_size} ranks"
    text = table([origin, "", ""], rows)
    if file is not None and file.remark:
        text += f"\n\n{file.remark}"
    return text


def _heading(numel: int, ranks: int) -> str:
    return (
        f"{numel / 2**18:.3g} MiB ({numel:,} coordinate{'s' * (numel != 1)}), {ranks} ranks. Times "
        "in ms are of the exchange alone: what the backward pass hides of it cannot be saved."
    )
