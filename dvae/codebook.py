"""What the codes of a tokenizer do: how often and where each is used, what it paints, what could stand in its place.

Works on any `dvae.tokenizer.ImageTokenizer`; draws nothing, opens no files. What is said of pictures is
gathered over batches, so memory does not grow with their number.

B batch, K codes, d width of the codebook, h w grid, H W picture, p q pixels of a cell.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


def perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy of counts `(K, ...)` along the codes: how many equally used codes would be as varied.

    1..K for each of the other axes; 1 where nothing was counted.
    """
    p = counts.double() / counts.sum(0).clamp_min(1)
    return (-(p * p.clamp_min(1e-300).log()).sum(0)).exp()


class Usage(NamedTuple):
    """counts: `(K,)` int64, how often each code was the token of a cell."""

    counts: Tensor

    @property
    def used(self) -> float:
        """Share of the codes that were seen at least once, 0..1."""
        return (self.counts > 0).float().mean().item()

    @property
    def perplexity(self) -> float:
        """See `perplexity`, 1..K."""
        return perplexity(self.counts).item()

    @property
    def dead(self) -> Tensor:
        """The codes that were never seen, int64."""
        return (self.counts == 0).nonzero()[:, 0]


def usage(tokens: Tensor, vocab_size: int) -> Usage:
    """Count the codes in tokens of any shape."""
    return Usage(torch.bincount(tokens.flatten(), minlength=vocab_size))


def usage_by_cell(tokens: Tensor, vocab_size: int) -> Tensor:
    """How often each code was the token of each cell: `(B, h, w)` -> `(K, h, w)` int64."""
    counts = torch.zeros(vocab_size, *tokens.shape[1:], dtype=torch.int64)
    return counts.scatter_add_(0, tokens, torch.ones_like(tokens))


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
    cells = patches(images, grid).flatten(2)
    return ((cells.amax(2) - cells.amin(2)).amax(1) <= tolerance).float().mean().item()


def spread(length: int, count: int) -> Tensor:
    """At most `count` of the indices 0 .. length - 1, evenly spread, rising, int64."""
    count = min(length, count)
    return torch.arange(count) * length // max(count, 1)


def patches(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """The pixels of every cell of images `(B, C, H, W)`, cell by cell, row by row: `(B h w, C, p, q)`."""
    rows, columns = grid
    cells = images.unflatten(2, (rows, -1)).unflatten(4, (columns, -1))  # B C h p w q
    return cells.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


# -------------------------------------------------------------------------------------------- what a code stands for


def grid_alone(tokenizer: torch.nn.Module) -> tuple[int, int]:
    """Rows and columns of what `painted_alone` paints: the grid, or 8 x 8 cells of a larger one."""
    h, w = tokenizer.grid
    return min(h, 8), min(w, 8)


@torch.inference_mode()
def painted_alone(tokenizer: torch.nn.Module, codes: Tensor | None = None, batch: int = 256) -> Tensor:
    """What codes paint when every cell holds them: the central cell, `(C, 3, p, q)` in [0, 1].

    Of a grid larger than 8 x 8 only so many cells are painted, at a sixteenth of the work of 32 x 32. This is not what
    the whole grid would show where the decoder sees farther than 4 cells: a little different where many convolutions
    follow each other, and quite different where it normalises or attends over the whole picture, as a `VQGAN` does.

    Args:
        codes: int64 `(C,)`; null: all K.
        batch: codes painted at a time.
    """
    h, w = grid_alone(tokenizer)
    codes = torch.arange(tokenizer.vocab_size) if codes is None else codes
    cells, batch = [], max(1, min(batch, 2**24 // (tokenizer.vocab_size * h * w)))  # one-hot codes are what is large
    for some in codes.split(batch):
        pictures = tokenizer.decode(some[:, None, None].expand(-1, h, w))
        cells.append(patches(pictures, (h, w)).unflatten(0, (-1, h, w))[:, h // 2, w // 2])
    return torch.cat(cells)


class Observed(NamedTuple):
    """What real pictures show under each code.

    counts: `(K, h, w)` int64, how often the code was the token of each cell.
    data: `(K, 3, p, q)` in [0, 1], the mean patch of the pictures where the code was chosen; 0 where it never was.
    painted: `(K, 3, p, q)` in [0, 1], the mean patch of the reconstructions there: the code in context.
    typical: `(K, n, 3, p, q)` in [0, 1], the patches of the pictures for which the encoder was surest of the code.
    probability: `(K, n)`, how sure it was, falling; 0 (and an empty patch) where the code was chosen less than n times.
    """

    counts: Tensor
    data: Tensor
    painted: Tensor
    typical: Tensor
    probability: Tensor

    @property
    def usage(self) -> Usage:
        return Usage(self.counts.sum((1, 2)))


@torch.inference_mode()
def observe(tokenizer: torch.nn.Module, batches: Iterable[Tensor], typical: int = 4) -> Observed:
    """Encode and decode pictures, and gather what stands under each code.

    Args:
        batches: pictures `(B, 3, H, W)` in [0, 1].
        typical: how many patches are kept of each code.
    """
    codes, grid = tokenizer.vocab_size, tokenizer.grid
    p, q = patches(tokenizer.decode(torch.zeros(1, *grid, dtype=torch.int64)), grid).shape[2:]
    counts = torch.zeros(codes, *grid, dtype=torch.int64)
    # float32 would stop growing at 2**24, which a background reaches
    data, painted = (torch.zeros(codes, 3, p, q, dtype=torch.float64) for _ in range(2))
    kept, sure = torch.zeros(codes * typical, 3, p, q), torch.zeros(codes * typical)
    places = torch.arange(codes).repeat_interleave(typical)
    for images in batches:
        probability, tokens = tokenizer.logits(images).softmax(1).max(1)
        counts += usage_by_cell(tokens, codes)
        cells, under = patches(images, grid), tokens.flatten()
        data.index_add_(0, under, cells.double())
        painted.index_add_(0, under, patches(tokenizer.decode(tokens), grid).double())
        best = _highest(torch.cat([sure, probability.flatten()]), torch.cat([places, under]), typical)
        kept, sure = torch.cat([kept, cells])[best], torch.cat([sure, probability.flatten()])[best]
    times = counts.sum((1, 2)).clamp_min(1)[:, None, None, None]
    shape = codes, typical
    means = (data / times).float(), (painted / times).float()
    return Observed(counts, *means, kept.unflatten(0, shape), sure.unflatten(0, shape))


def _highest(scores: Tensor, groups: Tensor, count: int) -> Tensor:
    """Where the `count` highest scores of each group are, group by group, falling; of equal ones the first come first.

    scores and groups: `(N,)`; groups are 0, 1, ... and each has at least `count` members.
    """
    order = scores.argsort(descending=True, stable=True)
    order = order[groups[order].argsort(stable=True)]
    sorted_groups = groups[order]
    starts = torch.searchsorted(sorted_groups, sorted_groups)
    return order[torch.arange(len(order)) - starts < count]


# ----------------------------------------------------------------------------------------- what could stand for it


class Neighbours(NamedTuple):
    """codes: `(M, n)` int64, the nearest first. distances: `(M, n)`, Euclidean, rising."""

    codes: Tensor
    distances: Tensor


@torch.inference_mode()
def neighbours(tokenizer: torch.nn.Module, codes: Tensor, count: int) -> Neighbours:
    """The nearest other codes, in the space that the decoder reads, of codes `(M,)`; at most K - 1 of each."""
    space = tokenizer.codes().float()
    count, found = min(count, len(space) - 1), []
    for some in codes.split(256):
        # "don't": distances of near codes must not drown in the rounding of the matrix product
        distances = torch.cdist(space[some], space, compute_mode="donot_use_mm_for_euclid_dist")
        distances[torch.arange(len(some)), some] = torch.inf
        found.append(distances.topk(count, largest=False))
    return Neighbours(torch.cat([f.indices for f in found]), torch.cat([f.values for f in found]))


@torch.inference_mode()
def swap_effect(
    tokenizer: torch.nn.Module, tokens: Tensor, code: int, others: Tensor, contexts: int = 4, batch: int = 64
) -> Tensor:
    """How much a picture changes when one cell's code is exchanged for each of `others` `(M,)`.

    Averaged over the cells of tokens `(B, h, w)` that hold the code, at most `contexts` of them, evenly spread; each is
    exchanged alone. This is what the codes mean to the decoder, whatever their distance in code space.

    Returns:
        `(M,)`, root of the mean squared change, summed over the picture and given per value of one cell, so that 1 is a
        cell that turned from black to white. NaN where no cell holds the code.
    """
    places = (tokens == code).nonzero()
    places = places[spread(len(places), contexts)]
    change = torch.zeros(len(others), dtype=torch.float64)
    for b, row, column in places.tolist():
        before = tokenizer.decode(tokens[b : b + 1])
        values = before.numel() / tokens[0].numel()
        for start in range(0, len(others), batch):
            some = others[start : start + batch]
            exchanged = tokens[b].repeat(len(some), 1, 1)
            exchanged[:, row, column] = some
            squares = (tokenizer.decode(exchanged) - before).double().square()
            change[start : start + batch] += squares.sum((1, 2, 3)) / values
    return (change / len(places)).sqrt() if len(places) else torch.full_like(change, math.nan)


# --------------------------------------------------------------------------------------------- how far a cell reaches


def pixels_that_move(tokenizer: torch.nn.Module, images: Tensor, cell: tuple[int, int]) -> Tensor:
    """Where the encoder looks when it chooses the code of a cell (row, column): its receptive field, as it is used.

    The gradient of the chosen code's logit over the mean logit, with respect to images `(B, 3, H, W)`.

    Returns:
        `(H, W)`, mean absolute gradient over pictures and channels, in logits per unit of brightness.
    """
    with torch.inference_mode(False), torch.enable_grad():
        images = images.clone().requires_grad_()
        logits = tokenizer.logits(images)[:, :, cell[0], cell[1]]
        (logits.max(1).values - logits.mean(1)).sum().backward()
    return images.grad.abs().mean((0, 1))


@torch.inference_mode()
def pixels_that_change(tokenizer: torch.nn.Module, tokens: Tensor, cell: tuple[int, int], others: Tensor) -> Tensor:
    """Where the decoder paints differently when the code of a cell (row, column) is exchanged.

    Args:
        tokens: `(B, h, w)`, each changed in this cell alone.
        others: `(M,)` codes that are put there, one by one.

    Returns:
        `(H, W)`, mean absolute change over pictures, codes and channels.
    """
    total = 0.0
    for grid in tokens:
        exchanged = grid.repeat(len(others), 1, 1)
        exchanged[:, cell[0], cell[1]] = others
        total = total + (tokenizer.decode(exchanged) - tokenizer.decode(grid[None])).abs().mean((0, 1))
    return total / len(tokens)


# ------------------------------------------------------------------------------------------------------- from A to B


def token_walk(start: Tensor, end: Tensor, generator: torch.Generator) -> Tensor:
    """From tokens `(h, w)` to others, one cell at a time, in random order: `(D + 1, h, w)`, D cells being different."""
    cells = (start != end).flatten().nonzero()[:, 0]
    cells = cells[torch.randperm(len(cells), generator=generator)]
    walk = start.flatten().repeat(len(cells) + 1, 1)
    for step, cell in enumerate(cells.tolist(), 1):
        walk[step:, cell] = end.flatten()[cell]
    return walk.unflatten(1, start.shape)


def soft_walk(start: Tensor, end: Tensor, vocab_size: int, steps: int) -> Tensor:
    """From tokens `(h, w)` to others in even steps, all cells at once: weights over the codes for `decode_soft`.

    What the decoder reads is linear in these weights, so this is the straight line in code space too.

    Returns:
        `(steps, K, h, w)`, each cell summing to one; the first is one-hot at `start`, the last at `end`.
    """
    share = torch.linspace(0, 1, steps)[:, None, None, None]
    first, last = (F.one_hot(tokens, vocab_size).movedim(-1, 0).float() for tokens in (start, end))
    return (1 - share) * first + share * last
