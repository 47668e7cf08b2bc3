"""From the encoder's logits to something discrete: `(logits, temperature, generator) -> Quantized`.

B batch, K codes, h w grid.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Quantized(NamedTuple):
    """What the decoder reads, and what it costs.

    z: `(B, K, h, w)` weights over the codes, each cell summing to one.
    tokens: `(B, h, w)` int64, the most likely code of each cell, without noise.
    kl: `(B,)` nats, summed over the cells (paper, 2.1 and appendix A.2).
    """

    z: Tensor
    tokens: Tensor
    kl: Tensor


def kl_to_uniform(logits: Tensor) -> Tensor:
    """KL(softmax(logits) || uniform) in closed form, summed over the grid: `(B, K, h, w)` -> `(B,)` nats."""
    log_q = F.log_softmax(logits.float(), dim=1)
    per_cell = (log_q.exp() * log_q).sum(1) + math.log(logits.shape[1])
    return per_cell.sum((1, 2))


def gumbel_softmax(
    logits: Tensor, temperature: float, generator: torch.Generator, straight_through: bool = False
) -> Quantized:
    """The Gumbel-softmax relaxation (paper, 2.1): softmax((logits + noise) / temperature) over the codes.

    Soft in the forward and in the backward pass, as the paper's authors trained; with `straight_through` the forward
    pass is one-hot and only the gradient is soft. The noise is drawn on the CPU from `generator`, so that it is the
    same on every device.
    """
    # uniform numbers and two logarithms are several times faster on a CPU than exponential ones; a 0 becomes -inf,
    # which only means that this code is not drawn
    noise = -torch.rand(logits.shape, generator=generator).log_().neg_().log_().to(logits.device)
    z = F.softmax((logits.float() + noise) / temperature, dim=1)
    if straight_through:
        hard = F.one_hot(z.argmax(1), z.shape[1]).movedim(-1, 1).to(z.dtype)
        z = hard + (z - z.detach())  # the bracket is exactly 0, so the sum is exactly one-hot
    return Quantized(z, logits.argmax(1), kl_to_uniform(logits))


def usage_gap(logits: Tensor) -> Tensor:
    """ln K minus the entropy of the batch-mean code distribution: scalar, nats, 0 when all codes share the work.

    Not in the paper. As a loss it keeps codes from dying in small models; a recipe that uses it says so.
    """
    mean = F.softmax(logits.float(), dim=1).mean((0, 2, 3))
    return (mean * mean.clamp_min(1e-12).log()).sum() + math.log(logits.shape[1])
