"""Run torch's own distributed tests with our hook in the place of theirs; `docs/peers.md`.

    make peers

Every test is run with the hook of "exact" (all buckets travel uncompressed, torch's tolerances
apply), then with "8 bits" where it registers a hook (the tolerance is the theory's), and in the end
with a wrong mean, to see whether it could fail. It ends with status 1 if a test fails that is not
among those which cannot run, or if one that registers a hook does not notice the wrong mean.
"""

import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "lib")]
os.environ.setdefault("RHTCOMM_TEST_STRETCH", "1")  # a test that hangs costs its time limit

import of_ddp  # noqa: E402
import of_fsdp  # noqa: E402
import pytest  # noqa: E402
from harness import Failure, Ranks  # noqa: E402
from stand_in import HOOKS  # noqa: E402

WORLD_SIZE = 2
LIMIT, LONG = 30, {"test_ddp_uneven_inputs": 400, "test_ddp_compile_static_graph": 150}  # seconds

# Patterns of names, and why such tests say nothing of a hook.
CANNOT = {
    "SyncBatchNorm|sync_bn|ddp_inference": "SyncBatchNorm runs on GPUs alone",
    "test_ddp_device$|logging_data_gpu": "it asks for the numbers of GPUs",
    "apply_optim_in_backward": "DDP itself registers a hook for it, and takes one",
    "comm_hook_logging": "it asks for the names of torch's own hooks",
    "pickling_powerSGD": "it asks for PowerSGD's own fields",
    "python_error_logged": "it registers what is no hook, to see it refused",
    "profiling": "it counts all-reduces by name",
    "native_mixed_precision_(no_)?grad": "it needs events of CUDA",
    "grad_div_uneven_inputs": "DDP tells no hook how many ranks still train",
}


# What registers a hook, but asks only that nothing hangs.
WITHOUT_MEANS = ("test_ddp_uneven_inputs",)


def outcome(ranks: Ranks, name: str, function: Any, *args: Any) -> tuple[str, int]:
    """What became of a test, in one line, and how often the hook was called.

    A test that ends or hangs its processes gets new ones, once: what other tests left in them
    (debug levels) may be why.
    """
    for _ in range(2):
        ranks.run(of_ddp.be_there, WORLD_SIZE, timeout=200)  # processes start slowly
        try:
            limit = LONG.get(name, LIMIT)
            found = ranks.outcomes(function, WORLD_SIZE, *args, timeout=limit)
        except (Exception, pytest.fail.Exception) as error:
            text = f"hangs: {str(error).splitlines()[0]}"
            continue
        failed = [one for one in found if isinstance(one, Failure)]
        if failed:
            line = (failed[0].message.splitlines() or [""])[0]
            return f"fails: {failed[0].type}: {line:.90}", 0
        return found[0]
    return text, 0


def tests(ranks: Ranks, folder: str) -> list[tuple[str, str, Any, bool]]:
    """Kind, name, what runs it by the name of a hook, and whether it registers a hook itself."""
    hooks, others = ranks.run(of_ddp.names, WORLD_SIZE, folder, timeout=120)[0]

    def ddp(name: str, everywhere: bool) -> Any:
        def run(hook: str) -> tuple[str, int]:
            case = f"{folder}/{name}-{hook}"
            return outcome(ranks, name, of_ddp.run, name, hook, everywhere, case)

        return run

    def fsdp(name: str) -> Any:
        return lambda hook: outcome(ranks, name, of_fsdp.run, name, hook)

    found = [("registers a hook", name, ddp(name, False), True) for name in hooks]
    found += [("FSDP2", name, fsdp(name), True) for name in of_fsdp.MODELS]
    return found + [("DDP", name, ddp(name, True), False) for name in others]


def main() -> int:
    chosen = sys.argv[1:]
    counts: dict[str, int] = {}
    bad = []
    with Ranks() as ranks, tempfile.TemporaryDirectory() as folder:
        for kind, name, run, compares in tests(ranks, folder):
            if chosen and name not in chosen:
                continue
            reasons = [why for pattern, why in CANNOT.items() if re.search(pattern, name)]
            results = {} if reasons else {"exact": run("exact")}
            text, calls = results.get("exact", (f"cannot: {''.join(reasons)}", 0))
            if text == "passed" and calls:
                for hook in HOOKS if compares else ("exact", "wrong"):
                    results.setdefault(hook, run(hook))
                notices = results["wrong"][0] != "passed"
                what = "passes, and notices a wrong mean" if notices else "passes with any mean"
                if (compares and not notices and name not in WITHOUT_MEANS) or results.get(
                    "8 bits", ("passed",)
                )[0] != "passed":
                    bad.append(name)
            elif text == "passed":
                what = "never calls the hook"
            else:
                what = re.split("[:]", text)[0]
                if what not in ("cannot", "skipped"):
                    bad.append(name)
            counts[f"{kind}: {what}"] = counts.get(f"{kind}: {what}", 0) + 1
            shown = "; ".join(f"{hook} {text} ({n})" for hook, (text, n) in results.items())
            print(f"{kind:16} {name}: {what} | {shown or text}", flush=True)
    for what, count in sorted(counts.items()):
        print(f"{count:4} {what}")
    print("failed:", *bad or ["none"])
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
