"""A byte-level GPT, its loss, its optimizer and its learning rate."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Causal attention with rotary positions, then a GELU network; both with pre-norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.RMSNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: (batch, context, width); cos, sin: (context, head width / 2)."""
        qkv = self.query_key_value(self.attention_norm(x))
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, T, C) each
        y = F.scaled_dot_product_attention(
            rotate_pairs(q, cos, sin), rotate_pairs(k, cos, sin), v, is_causal=True
        )
        x = x + self.attention_out(y.transpose(1, 2).flatten(2))
        x = x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))
        return x


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding. x: (..., context, head width)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class GPT(nn.Module):
    """From bytes to the logits of the next byte; the head shares the embedding's weights."""

    def __init__(self, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.half_head = width // heads // 2
        self.embedding = nn.Embedding(256, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width)

        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # The residual stream is a sum of 2 * layers such outputs.
                residual = name.endswith(("attention_out.weight", "mlp_out.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if residual else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (batch, context) int64 -> logits (batch, context, 256)."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        exponents = torch.arange(self.half_head, device=tokens.device) / self.half_head
        angles = torch.outer(positions, 10_000.0**-exponents)
        cos, sin = angles.cos(), angles.sin()
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, cos, sin)
        return F.linear(self.norm(x), self.embedding.weight)


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats per byte."""
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def make_optimizer(model: nn.Module, lr: float) -> torch.optim.AdamW:
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    gains = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Linear warmup, then a cosine from the peak to a hundredth of it."""
    rise = min(1.0, (step + 1) / max(1, warmup))
    progress = max(0.0, (step - warmup) / max(1, steps - warmup))
    return float(peak * rise * (0.505 + 0.495 * math.cos(math.pi * progress)))
