"""What a pair of stages shows when it is looked at: numbers, no verdicts. What they mean is said in `dalle.diagnose`.

Losses are in nats per token unless they are said to be per picture; everything is computed on a sample of pictures and
repeats exactly. This file opens and writes nothing.

N pictures, T text ids, h w grid, C = h w cells, K image codes.
"""

import copy
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dalle.model import DALLE, losses
from dvae import seeds
from dvae.evaluate import psnr

SIDE = 8  # pixels to which pictures are reduced before captions are held against them
SHUFFLES = 200
LEARNING_RATE = 1e-3  # of the trial with a few pairs
_MOST_LOGITS = 2**24  # computed together


def at_once(vocab: int, cells: int) -> int:
    """How many pictures have logits of a size that is no burden, at most 32."""
    return max(1, min(32, _MOST_LOGITS // (vocab * cells)))


# ---------------------------------------------------------------------------------------------------------------- data


def dependence(captions: Sequence[str], images: Tensor) -> float:
    """How far captions and pictures depend on each other, in standard deviations of what chance gives.

    The Hilbert-Schmidt independence criterion (Gretton et al. 2005) with linear kernels: of the words of a caption, and
    of the picture reduced to 8 x 8 pixels; chance is the same captions shuffled. About 0 where captions lie beside
    the wrong pictures, far above 3 where they belong to them. Not a number where nothing can be told: one of the two
    does not vary, or no word stands in two captions.

    Args:
        images: `(N, 3, H, W)` in [0, 1].
    """
    words = {word: place for place, word in enumerate(sorted({w for caption in captions for w in caption.split()}))}
    said = torch.zeros(len(captions), max(len(words), 1), dtype=torch.float64)
    for row, caption in enumerate(captions):
        said[row, [words[word] for word in caption.split()]] = 1
    seen = F.adaptive_avg_pool2d(images, SIDE).flatten(1).double()
    a, b = ((x - x.mean(0)) @ (x - x.mean(0)).T for x in (said, seen))
    generator = seeds.generator("dependence")
    orders = [torch.randperm(len(captions), generator=generator) for _ in range(SHUFFLES)]
    chance = torch.stack([(a[order][:, order] * b).sum() for order in orders])
    spread = chance.std()
    return ((a * b).sum() - chance.mean()).div(spread).item() if spread > 1e-12 * (a * b).abs().sum() else math.nan


def contrast(images: Tensor) -> Tensor:
    """`(N,)`: the standard deviation of each picture's pixels, of its liveliest channel; images `(N, 3, H, W)`."""
    return images.flatten(2).std(2).amax(1)


# -------------------------------------------------------------------------------------------------------------- stage 1


class Reconstructed(NamedTuple):
    """What encoding and decoding leaves of N pictures; all means in dB but the tokens.

    Attributes:
        hard: of argmax codes, which is all that stage 2 will see.
        soft: of the encoder's whole distribution over the codes.
        mosaic: of one flat, exact colour for each cell: what a grid of this size gives for nothing.
        stretched: of `hard` after the best stretch and shift of each colour channel.
        each: `(N,)`, the hard one of each picture.
        tokens: int64 `(N, h, w)`.
    """

    hard: float
    soft: float
    mosaic: float
    stretched: float
    each: Tensor
    tokens: Tensor


@torch.no_grad()
def reconstructed(tokenizer: torch.nn.Module, images: Tensor) -> Reconstructed:
    """Images `(N, 3, H, W)` in [0, 1] through a tokenizer and back."""
    columns = []
    for some in images.split(at_once(tokenizer.vocab_size, math.prod(tokenizer.grid))):
        logits = tokenizer.logits(some)
        tokens = logits.argmax(1)
        mosaic = F.interpolate(F.adaptive_avg_pool2d(some, tokenizer.grid), some.shape[2:])
        pictures = tokenizer.decode(tokens), tokenizer.decode_soft(logits.softmax(1)), mosaic
        columns.append((pictures[0], *(psnr(picture, some) for picture in pictures), tokens))
    decoded, hard, soft, mosaic, tokens = (torch.cat(column) for column in zip(*columns, strict=True))
    stretched = psnr(_stretched(decoded, images), images)
    return Reconstructed(*(x.mean().item() for x in (hard, soft, mosaic, stretched)), hard, tokens)


def _stretched(images: Tensor, originals: Tensor) -> Tensor:
    """Images moved by the one slope and shift for each channel that bring them nearest to the originals."""
    x, y = (pictures.double().transpose(0, 1).flatten(1) for pictures in (images, originals))
    x_mean, y_mean = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
    slope = ((x - x_mean) * (y - y_mean)).sum(1) / (x - x_mean).square().sum(1).clamp_min(1e-12)
    slope, x_mean, y_mean = (value.reshape(1, 3, 1, 1) for value in (slope, x_mean, y_mean))
    return (y_mean + slope * (images.double() - x_mean)).clamp(0, 1)


# -------------------------------------------------------------------------------------------------------------- stage 2


class Scores(NamedTuple):
    """-ln p of every token given the true ones before it: text `(N, T)`, image `(N, C)`."""

    text: Tensor
    image: Tensor


@torch.no_grad()
def teacher_forced(model: DALLE, text_ids: Tensor, tokens: Tensor) -> Scores:
    """Text ids (N, T) with pads, tokens (N, h, w)."""
    columns = []
    size = at_once(model.config.vocab_image, math.prod(model.config.grid))
    for ids, some in zip(text_ids.split(size), tokens.split(size), strict=True):
        logits = model(ids, some)
        text = F.cross_entropy(logits.text.transpose(1, 2), ids, reduction="none")
        columns.append((text, F.cross_entropy(logits.image.transpose(1, 2), some.flatten(1), reduction="none")))
    return Scores(*(torch.cat(column) for column in zip(*columns, strict=True)))


def unigram(seen: Tensor, tokens: Tensor, vocab: int) -> float:
    """The mean loss on `tokens` of who knows only how often each code occurs in `seen`, with one more of each."""
    counts = torch.bincount(seen.flatten(), minlength=vocab).double() + 1
    return -(counts / counts.sum()).log()[tokens.flatten()].mean().item()


class Listening(NamedTuple):
    """What the right caption is worth against another picture's, nats per picture: the mean, and its standard error."""

    mean: float
    error: float


def listening(model: DALLE, text_ids: Tensor, tokens: Tensor, right: Tensor) -> Listening:
    """Give every picture the caption of another one, text_ids (N, T), and see how much less likely it becomes.

    Pairs whose two captions are equal are left out; where less than two are left, the error is infinite.

    Args:
        right: `(N, C)`, the image scores with the right captions.
    """
    n = len(text_ids)
    order = torch.randperm(n, generator=seeds.generator("listening"))
    other = torch.empty_like(order)
    other[order] = order.roll(1)  # a single cycle: nobody keeps the own caption
    differ = (text_ids != text_ids[other]).any(1)
    if differ.sum() < 2:
        return Listening(0.0, math.inf)
    wrong = teacher_forced(model, text_ids[other][differ], tokens[differ]).image
    gain = (wrong - right[differ]).sum(1).double()
    return Listening(gain.mean().item(), (gain.std() / len(gain) ** 0.5).item())


def memorised(model: DALLE, text_ids: Tensor, tokens: Tensor, updates: int) -> list[float]:
    """The image loss before each update, and after the last one, of a copy that trains on these few pairs alone."""
    trial = copy.deepcopy(model).train().requires_grad_(True)
    optimiser = torch.optim.AdamW(trial.parameters(), LEARNING_RATE, betas=(0.9, 0.95))
    keep, seen = torch.ones(len(text_ids), dtype=torch.bool), []
    with torch.enable_grad():
        for _ in range(updates + 1):
            loss = losses(trial(text_ids, tokens), text_ids, tokens, keep).image
            seen.append(loss.item())
            if not math.isfinite(seen[-1]) or seen[-1] < 0.01:
                break
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trial.parameters(), 1.0)
            optimiser.step()
    return seen


# ------------------------------------------------------------------------------------------------------------- sampling


def cache_error(model: DALLE, text_ids: Tensor, tokens: Tensor, logprobs: Tensor) -> float:
    """The largest difference between the log-probabilities that sampling computed step by step, (N, C), and those of
    one pass over the whole sequence."""
    return (teacher_forced(model, text_ids, tokens).image + logprobs).abs().max().item()


def histogram_distance(a: Tensor, b: Tensor, vocab: int) -> float:
    """Jensen-Shannon divergence of the code frequencies of two sets of tokens, 0 (equal) .. 1 (nothing shared)."""
    p, q = (torch.bincount(x.flatten(), minlength=vocab).double() for x in (a, b))
    p, q = p / p.sum(), q / q.sum()
    m = (p + q) / 2
    return sum((x * (x.clamp_min(1e-300) / m.clamp_min(1e-300)).log2()).sum().item() / 2 for x in (p, q))


def agreement(tokens: Tensor) -> float:
    """Share of cells in which two candidates of the same caption have the same code; tokens (P, n, h, w), n >= 2."""
    n = tokens.shape[1]
    pairs = [(tokens[:, i] == tokens[:, j]).double().mean() for i in range(n) for j in range(i)]
    return torch.stack(pairs).mean().item()
