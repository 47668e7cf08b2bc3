"""What the codes of a tokenizer do: how many are in use, how evenly, and what each one paints.

Works on any tokenizer with the face of `dvae.model.DVAE`; draws nothing to files.

B batch, K codes, h w grid, H W picture.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Usage(NamedTuple):
    """counts: `(K,)` int64, how often each code was the token of a cell."""

    counts: Tensor

    @property
    def used(self) -> float:
        """Share of the codes that were seen at least once, 0..1."""
        return (self.counts > 0).float().mean().item()

    @property
    def perplexity(self) -> float:
        """exp of the entropy of the token distribution, 1..K: how many equally used codes would be as varied."""
        p = self.counts.double() / self.counts.sum().clamp_min(1)
        return math.exp(-(p * p.clamp_min(1e-300).log()).sum().item())


def usage(tokens: Tensor, vocab_size: int) -> Usage:
    """Count the codes in tokens of any shape."""
    return Usage(torch.bincount(tokens.flatten(), minlength=vocab_size))


def perplexity_bound(flat_share: float, flat_kinds: int, vocab_size: int) -> float:
    """The highest perplexity that still lets equal flat cells have equal codes.

    A share `flat_share` of the cells shows nothing but one of `flat_kinds` plain backgrounds, equally often, and each
    such cell deserves one code; the other cells may spread evenly over all other codes.
    """
    rest = 1 - flat_share
    split = -sum(share * math.log(share) for share in (flat_share, rest) if share > 0)
    return math.exp(split + flat_share * math.log(flat_kinds) + rest * math.log(max(1, vocab_size - flat_kinds)))


def flat_share(images: Tensor, grid: tuple[int, int], tolerance: float = 1 / 255) -> float:
    """Share of grid cells in which all pixels of images `(B, 3, H, W)` in [0, 1] are equal up to `tolerance`."""
    rows, columns = images.shape[2] // grid[0], images.shape[3] // grid[1]
    patches = F.unfold(images, (rows, columns), stride=(rows, columns)).unflatten(1, (3, -1))  # B 3 pixels cells
    spread = patches.amax(2) - patches.amin(2)
    return (spread.amax(1) <= tolerance).float().mean().item()


@torch.inference_mode()
def painted_alone(tokenizer: torch.nn.Module, batch: int = 256) -> Tensor:
    """What each code paints when every cell of the grid holds it: the central cell, `(K, 3, H/h, W/w)` in [0, 1]."""
    h, w = tokenizer.grid
    cells = []
    for codes in torch.arange(tokenizer.vocab_size).split(batch):
        pictures = tokenizer.decode(codes[:, None, None].expand(-1, h, w))
        rows, columns = pictures.shape[2] // h, pictures.shape[3] // w
        top, left = (h // 2) * rows, (w // 2) * columns
        cells.append(pictures[:, :, top : top + rows, left : left + columns])
    return torch.cat(cells)


@torch.inference_mode()
def painted_in_context(tokenizer: torch.nn.Module, images: Tensor, batch: int = 64) -> tuple[Tensor, Tensor]:
    """The mean patch of real reconstructions under each code.

    Args:
        images: `(B, 3, H, W)` in [0, 1].

    Returns:
        mean patches `(K, 3, H/h, W/w)` (zero where a code was not used) and counts `(K,)`.
    """
    rows, columns = (side // cells for side, cells in zip(images.shape[2:], tokenizer.grid, strict=True))
    sums = torch.zeros(tokenizer.vocab_size, 3 * rows * columns)
    counts = torch.zeros(tokenizer.vocab_size, dtype=torch.int64)
    for some in images.split(batch):
        tokens = tokenizer.encode(some)
        patches = F.unfold(tokenizer.decode(tokens), (rows, columns), stride=(rows, columns))  # B pixels cells
        sums.index_add_(0, tokens.flatten(), patches.movedim(1, 2).flatten(0, 1))
        counts += usage(tokens, tokenizer.vocab_size).counts
    return (sums / counts.clamp_min(1)[:, None]).unflatten(1, (3, rows, columns)), counts
