"""Transformers' Trainer with compressed gradients.

    torchrun --nproc-per-node=2 launch/examples/train_transformers.py [checkpoint to resume from]

Compression adds the lines that end with "# rhtcomm".
"""

import sys
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from rhtcomm.hooks.trainers.transformers import RHTCallback  # rhtcomm


def sequences() -> list[dict[str, Any]]:
    """Arithmetic progressions modulo 64."""
    step, start = torch.randint(1, 4, (1024, 1)), torch.randint(0, 64, (1024, 1))
    return [{"input_ids": row, "labels": row} for row in (torch.arange(33) * step + start) % 64]


def main(checkpoint: str | None = None) -> None:
    set_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=64, n_embd=64, n_layer=1, n_head=4)
    config.bos_token_id = config.eos_token_id = None
    arguments = TrainingArguments(
        output_dir="transformers-example",
        num_train_epochs=2,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        logging_steps=16,
        save_strategy="epoch",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(GPT2LMHeadModel(config), arguments, train_dataset=sequences())
    trainer.add_callback(RHTCallback(trainer, bits=4))  # rhtcomm
    trainer.train(resume_from_checkpoint=checkpoint)
    last = [row for row in trainer.state.log_history if "loss" in row][-1]
    if trainer.is_world_process_zero():
        ratio = last["rhtcomm/compression_ratio"]
        print(f"loss {last['loss']:.3f}, {ratio:.1f} times fewer bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
