"""Three quantizers of other papers, to compare with: each maps x (numel,) float32 to its estimate
and the bits that it puts on the wire. All random rounding comes from `generator`.

They are written from the papers for their error, not for speed: nothing is packed, and a wire
length is counted as plain fixed-width fields, float32 for every scale.
"""

import math

import torch

Result = tuple[torch.Tensor, float]


def _rows(x: torch.Tensor, size: int) -> torch.Tensor:
    """(numel,) -> (rows, size), padded by zeros."""
    return torch.nn.functional.pad(x, (0, -x.numel() % size)).view(-1, size)


def _round(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """To one of the two neighbouring integers, x in the mean."""
    return (x + torch.rand(x.shape, generator=generator)).floor()


def uniform(y: torch.Tensor, bits: int, block: int, generator: torch.Generator) -> Result:
    """Stochastic uniform quantization: y goes to one of 2^b even levels from a block's least to
    its largest value. After one randomized Hadamard transform it is the "stochastic rotated
    quantization" of Suresh, Yu, Kumar and McMahan ("Distributed mean estimation with limited
    communication", ICML 2017). b bits per coordinate and two float32 per block.
    """
    rows = _rows(y, block)
    low, high = rows.amin(dim=1, keepdim=True), rows.amax(dim=1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    codes = _round(torch.where(step > 0, (rows - low) / step, 0.0), generator)
    codes = codes.clamp(0, 2**bits - 1)  # a rounding of the division may pass the last level
    return (low + step * codes).flatten()[: y.numel()], bits * y.numel() + 64 * len(rows)


def qsgd(x: torch.Tensor, bits: int, norm: float, generator: torch.Generator) -> Result:
    """QSGD (Alistarh, Grubic, Li, Tomioka and Vojnovic, NIPS 2017), buckets of 512 as in its
    experiments: |x_i| / |x|_p goes to one of the levels 0, 1/s, ..., 1. The analysis has p = 2, the
    experiments p = infinity. A sign and a level of s = 2^(b-1) - 1 take b bits, so b >= 2; a bucket
    has one float32.
    """
    rows, steps = _rows(x, 512), 2 ** (bits - 1) - 1
    scale = torch.linalg.vector_norm(rows, norm, dim=1, keepdim=True)
    levels = _round(torch.where(scale > 0, rows.abs() / scale * steps, 0.0), generator)
    estimate = (rows.sign() * levels.clamp(max=steps) * (scale / steps)).flatten()[: x.numel()]
    return estimate, bits * x.numel() + 32 * len(rows)


def qsgd_elias(x: torch.Tensor, steps: int, generator: torch.Generator) -> Result:
    """QSGD with p = 2 and the code of its analysis: for each nonzero level the gap since the last
    one, the sign and the level, integers by Elias' omega code. Its length is exact, for these data.
    """
    rows = _rows(x, 512)
    scale = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    levels = _round(torch.where(scale > 0, rows.abs() / scale * steps, 0.0), generator)
    levels = levels.clamp(max=steps)
    row, column = levels.nonzero().t()
    first = torch.cat([torch.ones(1, dtype=torch.bool), row[1:] != row[:-1]])[: len(row)]
    before = torch.where(first, -1, torch.cat([column[:1], column[:-1]]))
    omega = torch.tensor([0, *(elias_omega_bits(n) for n in range(1, max(512, steps) + 1))])
    length = omega[column - before].sum() + omega[levels[row, column].long()].sum() + len(row)
    estimate = (rows.sign() * levels * (scale / steps)).flatten()[: x.numel()]
    return estimate, float(length) + 32 * len(rows)


def elias_omega_bits(n: int) -> int:
    """Length of Elias' omega code of n >= 1."""
    length = 1
    while n > 1:
        length += n.bit_length()
        n = n.bit_length() - 1
    return length


def terngrad(x: torch.Tensor, block: int, clip: float, generator: torch.Generator) -> Result:
    """TernGrad (Wen et al., NIPS 2017): s sign(x_i) with probability |x_i| / s, else 0, where s is
    the largest magnitude. `clip` first limits magnitudes to that many standard deviations, which
    makes it biased (the paper recommends 2.5); infinity leaves them as they are. The paper has one
    s per layer; one per block, as here, is no worse. Five ternary digits per byte, one float32 per
    block.
    """
    rows = _rows(x, block)
    limit = clip * rows.std(dim=1, keepdim=True) if math.isfinite(clip) else math.inf
    clipped = rows.clamp(-limit, limit)
    scale = clipped.abs().amax(dim=1, keepdim=True)
    digits = _round(torch.where(scale > 0, clipped.abs() / scale, 0.0), generator).clamp(max=1)
    estimate = (rows.sign() * digits * scale).flatten()[: x.numel()]
    return estimate, 8 * math.ceil(x.numel() / 5) + 32 * len(rows)
