"""Transformers' Trainer, on two ranks."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Ranks
from models import parameters_of
from torch import nn
from trainers import (
    EPOCH,
    OPTIONS,
    RATE,
    batches,
    check_example,
    check_logged,
    check_resumed,
    check_same,
    example,
    launched,
    loss_of,
    plain,
    seeded,
)

pytest.importorskip("transformers", reason="the extra 'test' is not installed")


class Model(nn.Module):
    """`Net`, with its loss in its output, as Trainer wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = seeded()

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": loss_of(self.net, x)}


def dataset(world_size: int) -> list[dict[str, torch.Tensor]]:
    """Samples in the order in which Trainer hands batches to the ranks."""
    by_rank = [batches(rank) for rank in range(world_size)]
    return [{"x": x} for step in range(EPOCH) for rank in by_rank for x in rank[step]]


def reset() -> None:
    """Have Accelerate, of which Trainer is made, begin as in a new process."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def trainer_of(folder: str, epochs: int, kind: Any = None) -> Any:
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    reset()
    arguments = TrainingArguments(
        output_dir=folder,
        num_train_epochs=epochs,
        per_device_train_batch_size=4,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        save_strategy="epoch",
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        ddp_backend="gloo",
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    model = Model()
    trainer = (kind or Trainer)(
        model=model,
        args=arguments,
        train_dataset=dataset(arguments.world_size),
        optimizers=(torch.optim.SGD(model.parameters(), RATE), None),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def train(folder: str, epochs: int, checkpoint: Any = None, kind: Any = None) -> Any:
    """The Trainer after training; it has `rows`, what was logged."""
    from transformers import TrainerCallback

    from rhtcomm.hooks.trainers.transformers import RHTCallback

    class Reporter(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any, **_: Any) -> None:
            trainer.rows.append({"step": state.global_step, **logs})

    trainer = trainer_of(folder, epochs, kind)
    trainer.rows = []
    trainer.add_callback(Reporter())
    trainer.add_callback(RHTCallback(trainer, **OPTIONS))
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def unwrapped() -> Any:
    """A Trainer with a mistake by which no gradient is averaged."""
    from transformers import Trainer

    class Unwrapped(Trainer):
        def compute_loss(self, model: nn.Module, inputs: Any, *_: Any, **__: Any) -> Any:
            return self.model(**inputs)["loss"]

    return Unwrapped


def failing() -> Any:
    from transformers import Trainer

    class Failing(Trainer):
        def compute_loss(self, model: nn.Module, inputs: Any, *_: Any, **__: Any) -> Any:
            raise ZeroDivisionError

    return Failing


def cases(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    from rhtcomm.hooks.trainers.transformers import RHTCallback

    os.chdir(folder)
    with launched(rank, world_size):
        expected, figures = plain(rank, epochs=2)
        trainer = train(folder, 2)
        whole, rows = parameters_of(trainer.model), [*trainer.rows]
        history = [row for row in trainer.state.log_history if "loss" in row]

        resumed = parameters_of(train(folder, 2, f"{folder}/checkpoint-3").model)
        torch.distributed.barrier()
        Path(folder, f"checkpoint-3/rhtcomm_rank{rank}.pt").unlink()
        torch.distributed.barrier()
        with pytest.warns(match="has no state of the hook"):
            forgotten = parameters_of(train(folder, 2, f"{folder}/checkpoint-3").model)

        trainer.train()  # again, in the same model
        again = [row for row in trainer.rows[len(rows) :] if "loss" in row]

        with pytest.warns(match="hook was never called.*compute_loss must call the model"):
            train(f"{folder}/unwrapped", 1, kind=unwrapped())
        with pytest.raises(ZeroDivisionError):
            train(f"{folder}/failing", 1, kind=failing())
        trainer = trainer_of(f"{folder}/failing", 1, failing())
        RHTCallback(trainer)
        with (
            pytest.warns(match="not among the Trainer's callbacks"),
            pytest.raises(ZeroDivisionError),
        ):
            trainer.train()
        with pytest.raises(TypeError, match=r"trainer.add_callback\(RHTCallback\(trainer, bits=4"):
            RHTCallback(bits=4)
        reset()
        printed = example("train_transformers.py")
    return {
        "whole": whole,
        "plain": expected,
        "figures": figures,
        "resumed": resumed,
        "forgotten": forgotten,
        "rows": [row for row in rows if "loss" in row],
        "history": history,
        "again": again,
        "printed": printed,
    }


def one_process(rank: int, world_size: int, folder: str) -> None:
    """Trains on from a checkpoint of two ranks."""
    with (
        launched(rank, world_size),
        pytest.warns(match="RHTCallback: a single process sends no gradients.*torchrun"),
    ):
        train(folder, 3, True)


def test_same_bits_as_plain_ddp(results: list[dict[str, Any]]) -> None:
    check_same(results)


def test_resume_is_bit_identical(results: list[dict[str, Any]]) -> None:
    check_resumed(results)


def test_logs_each_step(results: list[dict[str, Any]]) -> None:
    for rows in (results[0]["rows"], results[0]["history"], results[0]["again"]):
        check_logged(rows, results[0]["figures"])


def test_a_hook_that_was_never_called_warns(
    results: list[dict[str, Any]], trainer_ranks: Ranks, folder: Path
) -> None:
    assert results  # where the ranks waited for it in vain
    trainer_ranks.run(one_process, 1, str(folder))


def test_example(results: list[dict[str, Any]]) -> None:
    check_example(results[0]["printed"], loss=2)
