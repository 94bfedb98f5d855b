"""Lightning's Trainer, on two ranks."""

import csv
import importlib.util
import logging
import os
import sys
import warnings
import weakref
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from harness import Ranks
from models import parameters_of
from torch.utils.data import DataLoader
from trainers import (
    OPTIONS,
    RATE,
    batches,
    check_logged,
    check_resumed,
    check_resumed_example,
    check_same,
    example,
    launched,
    loss_of,
    plain,
    seeded,
)

import rhtcomm.hooks

pytest.importorskip("lightning", reason="the extra 'test' is not installed")


def quiet() -> None:
    """Warnings of Lightning's own, which are errors here."""
    logging.getLogger("lightning").setLevel(logging.ERROR)
    for message in (
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",
        "The 'train_dataloader' does not have many workers",
        "Checkpoint directory .* exists and is not empty",
        "The `srun` command is available on your system",
    ):
        warnings.filterwarnings("ignore", message)


def module(manual: bool = False) -> Any:
    """`Net` and its loss; with `manual`, a mistake by which no gradient is averaged."""
    import lightning
    from torch.distributed.fsdp import FSDPModule, fully_shard

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = seeded()
            self.automatic_optimization = not manual

        def configure_model(self) -> None:
            mesh = self.device_mesh
            if mesh is not None and not isinstance(self.net, FSDPModule):
                fully_shard(self.net, mesh=mesh["data_parallel"])

        def training_step(self, x: torch.Tensor, index: int) -> torch.Tensor:
            loss = loss_of(self.net, x)
            if manual:
                loss.backward()
                self.optimizers().step()
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), RATE)

    return Module()


def fit(
    rank: int,
    folder: str,
    epochs: int,
    checkpoint: str | None = None,
    manual: bool = False,
    strategy: Any = "ddp",
    **options: Any,
) -> Any:
    """Parameters after a fit, and the Trainer."""
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger

    from rhtcomm.hooks.trainers.lightning import RHTCallback

    model = module(manual)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=torch.distributed.get_world_size(),
        strategy=strategy,
        max_epochs=epochs,
        log_every_n_steps=1,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=CSVLogger(folder, flush_logs_every_n_steps=1),
        callbacks=[
            RHTCallback(**OPTIONS | options),
            ModelCheckpoint(folder, "{epoch}", save_top_k=-1, auto_insert_metric_name=False),
        ],
    )
    trainer.fit(model, DataLoader(batches(rank), batch_size=None), ckpt_path=checkpoint)
    return parameters_of(model.net), trainer


def fsdp2(rank: int, world_size: int, folder: str) -> dict[str, torch.Tensor]:
    """This rank's shards after two epochs by `fully_shard`, by Lightning, and resumed by it."""
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def shards(net: torch.nn.Module) -> torch.Tensor:
        parameters: list[Any] = [*net.parameters()]
        return torch.cat([p.detach().to_local().flatten() for p in parameters])

    exact = {"error_feedback": False}  # which FSDP2 has not
    net = fully_shard(seeded(), mesh=init_device_mesh("cpu", (world_size,)))
    optimizer = torch.optim.SGD(net.parameters(), RATE)
    with rhtcomm.hooks.compress_fsdp(net, **OPTIONS | exact):
        for x in batches(rank) * 2:
            loss_of(net, x).backward()
            optimizer.step()
            optimizer.zero_grad()
    results = {"plain": shards(net)}
    for name, checkpoint in (("whole", None), ("resumed", f"{folder}/0.ckpt")):
        strategy = ModelParallelStrategy(world_size, 1, process_group_backend="gloo")
        _, trainer = fit(rank, folder, 2, checkpoint, strategy=strategy, **exact)
        results[name] = shards(trainer.lightning_module.net)
    return results


def cases(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    os.chdir(folder)
    with launched(rank, world_size), warnings.catch_warnings():
        quiet()
        expected, figures = plain(rank, epochs=2)
        whole, trainer = fit(rank, folder, 2)
        trainer.save_checkpoint(f"{folder}/after.ckpt")  # when the hook is closed
        resumed, trainer = fit(rank, folder, 2, f"{folder}/0.ckpt")
        trainer.fit(module(), DataLoader(batches(rank), batch_size=None))  # nothing is left to do
        assert trainer.callbacks[0].handle is None, "the hook was not closed"

        checkpoint = torch.load(f"{folder}/0.ckpt")
        del checkpoint["callbacks"]["RHTCallback"]
        torch.save(checkpoint, f"{folder}/without{rank}.ckpt")
        forgotten, _ = fit(rank, folder, 2, f"{folder}/without{rank}.ckpt")

        with pytest.warns(match="hook was never called.*call self.manual_backward"):
            fit(rank, folder, 1, manual=True)
        saved = "lightning-example/epoch=1.ckpt"
        printed = [example("train_lightning.py", *last) for last in ([], [saved])]
        sharded = fsdp2(rank, world_size, f"{folder}/fsdp2")
    return {
        "whole": whole,
        "plain": expected,
        "figures": figures,
        "resumed": resumed,
        "forgotten": forgotten,
        "printed": printed,
        "sharded": sharded,
    }


def one_process(rank: int, world_size: int, folder: str) -> None:
    """Trains on from a checkpoint of two ranks."""
    with launched(rank, world_size), warnings.catch_warnings():
        quiet()
        with pytest.warns(match="RHTCallback: a single process sends no gradients.*strategy="):
            fit(rank, folder, 3, f"{folder}/after.ckpt")


def test_same_bits_as_plain_ddp(results: list[dict[str, Any]]) -> None:
    check_same(results)


def test_fsdp2(results: list[dict[str, Any]]) -> None:
    for result in results:
        sharded = result["sharded"]
        assert torch.equal(sharded["whole"], sharded["plain"])
        assert torch.equal(sharded["resumed"], sharded["whole"])


def test_resume_is_bit_identical(results: list[dict[str, Any]], folder: Path) -> None:
    check_resumed(results)
    during, after = (
        torch.load(folder / name)["callbacks"]["RHTCallback"] for name in ("1.ckpt", "after.ckpt")
    )
    assert during.keys() == after.keys()
    assert during["step"] == after["step"] == 6


def test_logs_each_step(results: list[dict[str, Any]], folder: Path) -> None:
    with (folder / "lightning_logs/version_0/metrics.csv").open() as file:
        check_logged([*csv.DictReader(file)], results[0]["figures"])


def test_a_hook_that_was_never_called_warns(
    results: list[dict[str, Any]], trainer_ranks: Ranks, folder: Path
) -> None:
    assert results  # where the ranks waited for it in vain
    trainer_ranks.run(one_process, 1, str(folder))


def test_example(results: list[dict[str, Any]]) -> None:
    check_resumed_example(results[0]["printed"], loss=0.05)


def test_a_state_that_was_loaded_is_not_kept() -> None:
    """With error feedback it has the residuals of all ranks."""
    from rhtcomm.hooks.trainers.lightning import RHTCallback

    # replicate_group is compress_fsdp's, and of no use in one process.
    callback = RHTCallback(error_feedback=True, replicate_group=None)
    residual = torch.zeros(3)
    kept = weakref.ref(residual)
    callback.load_state_dict({"seed": 0, "step": 5, "residuals of rank 1 of 2": {"w": residual}})
    del residual
    assert kept() is not None
    trainer = SimpleNamespace(strategy=SimpleNamespace(model=torch.nn.Linear(2, 2)))
    with pytest.warns(match="a single process sends no gradients"):
        callback.on_fit_start(trainer, None)
    assert kept() is None
    assert callback.state_dict()["step"] == 5


def test_the_callback_is_of_the_package_that_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    from rhtcomm.hooks.trainers import lightning as module

    class Callback:
        pass

    other = ModuleType("pytorch_lightning")
    other.Callback = Callback  # type: ignore[attr-defined]
    monkeypatch.delitem(sys.modules, "lightning.pytorch")
    monkeypatch.setitem(sys.modules, "pytorch_lightning", other)
    name = f"{module.__package__}.anew"
    spec = importlib.util.spec_from_file_location(name, module.__file__)
    anew = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(anew)  # type: ignore[union-attr]
    assert issubclass(anew.RHTCallback, Callback)
    assert not issubclass(module.RHTCallback, Callback)
