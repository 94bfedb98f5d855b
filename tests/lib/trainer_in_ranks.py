"""The trainer in processes that have imported torch before."""

import contextlib
import io
import os
import sys
from typing import Any
from unittest import mock

import torch

import train_ddp
from options import parse_args

__all__ = ["train"]


def train(
    rank: int,
    world_size: int,
    arguments: list[list[str]],
    environments: list[dict[str, str]],
    fails_at: int | None,
) -> str:
    """For `Ranks`: train with each rank's own arguments and environment; what the rank printed."""
    clip = torch.nn.utils.clip_grad_norm_
    calls = 0

    def clip_or_fail(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise RuntimeError("made for the purpose")
        return clip(*given)

    with (
        mock.patch.dict(os.environ, {"RANK": str(rank)} | environments[rank]),
        mock.patch.object(sys, "argv", ["train_ddp.py", *arguments[rank]]),
        mock.patch.object(torch.nn.utils, "clip_grad_norm_", clip_or_fail),
        contextlib.redirect_stdout(io.StringIO()) as printed,
    ):
        train_ddp.train(parse_args())
    return printed.getvalue()
