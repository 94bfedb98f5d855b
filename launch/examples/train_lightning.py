"""Lightning with compressed gradients.

    torchrun --nproc-per-node=2 launch/examples/train_lightning.py [checkpoint to resume from]

Compression adds the lines that end with "# rhtcomm".
"""

import sys

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from rhtcomm.hooks.trainers.lightning import RHTCallback  # rhtcomm


class Regression(lightning.LightningModule):
    """Learns a fixed linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(checkpoint: str | None = None) -> None:
    lightning.seed_everything(0)
    x = torch.randn(4096, 64)
    data = TensorDataset(x, x @ torch.randn(64, 64) / 8)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=3,
        log_every_n_steps=1,
        logger=CSVLogger("logs", "lightning"),
        enable_progress_bar=False,
        callbacks=[
            ModelCheckpoint("lightning-example", filename="{epoch}", save_top_k=-1),
            RHTCallback(bits=4),  # rhtcomm
        ],
    )
    loader = DataLoader(data, batch_size=64, shuffle=True)
    trainer.fit(Regression(), loader, ckpt_path=checkpoint)
    logged = trainer.logged_metrics
    if trainer.is_global_zero:
        ratio = logged["rhtcomm/compression_ratio"]
        print(f"loss {logged['loss']:.6f}, {ratio:.1f} times fewer bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
