"""torch's own tests of DDP, one by one, on the ranks of a harness."""

import inspect
import os
import warnings
from pathlib import Path
from typing import Any
from unittest import SkipTest, mock

import torch
from stand_in import cpu_in_place_of_gpus, our_hook


def upstream(world_size: int, folder: str) -> Any:
    """The module of torch's tests, which reads the environment when it is imported."""
    for name in ("barrier", "test_dir", "init_dir"):
        Path(folder, name).mkdir(parents=True, exist_ok=True)
    os.environ.update(BACKEND="gloo", WORLD_SIZE=str(world_size), TEMP_DIR=folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal import common_distributed as common

    def take(*_: Any, **__: Any) -> Any:
        return lambda test: test

    as_it_is = {"skip_if_lt_x_gpu": take, "nccl_skip_if_lt_x_gpu": take}
    with (
        mock.patch.multiple(common, **as_it_is, skip_if_no_gpu=lambda test: test),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        from torch.testing._internal.distributed import distributed_test
    distributed_test.init_multigpu_helper = lambda n, _: {rank: [rank] for rank in range(n)}
    return distributed_test


def be_there(rank: int, world_size: int) -> None: ...


def names(rank: int, world_size: int, folder: str) -> tuple[list[str], list[str]]:
    """The tests that register a hook for gradients, and the others that train by DDP."""
    tests = upstream(world_size, folder).DistributedTest._DistTestBase
    found: tuple[list[str], list[str]] = ([], [])
    for name in sorted(n for n in dir(tests) if n.startswith("test_")):
        text = whole = inspect.getsource(getattr(tests, name))
        for helper in {part.split("(")[0] for part in text.split("self.")[1:]}:
            if helper.startswith(("_test", "_run")):
                whole += inspect.getsource(getattr(tests, helper))
        if "DistributedDataParallel(" in whole or "_prepare_" in whole:
            registers = "hook" in text and "register_comm_hook" in whole
            found[0 if registers else 1].append(name)
    return found


def run(
    rank: int, world_size: int, name: str, hook: str, everywhere: bool, folder: str
) -> tuple[str, int]:
    """What became of a test, "passed" or why it was skipped; and how often the hook was called."""
    module = upstream(world_size, folder)

    class Case(module.TestDistBackend, module.DistributedTest._DistTestBase):  # type: ignore[misc,name-defined]
        def assertEqual(self, x: Any, y: Any, *args: Any, **given: Any) -> None:
            if seen.tolerance and "atol" not in given:
                given |= {"atol": seen.tolerance, "rtol": 1.3e-6}
            super().assertEqual(x, y, *args, **given)  # noqa: PT009

        def _run_uneven_inputs_test(self, test_case: Any, *args: Any, **given: Any) -> None:
            if test_case.name != "large_conv_model":  # which takes minutes without a GPU
                super()._run_uneven_inputs_test(test_case, *args, **given)

    case = Case(name)
    case.rank, case.file_name = rank, f"{folder}/file"
    module.Barrier.barrier_id = 0
    torch.manual_seed(0)
    with warnings.catch_warnings(), cpu_in_place_of_gpus(), our_hook(hook, everywhere) as seen:
        warnings.simplefilter("ignore")
        try:
            getattr(case, name)()
        except SkipTest as reason:
            return f"skipped: {reason}", seen.calls
        except SystemExit as reason:
            return f"skipped: exit code {reason.code}", seen.calls
    return "passed", seen.calls
