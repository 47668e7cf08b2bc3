"""What the transformer does, cell by cell: how sure it is, how right it was, what the words explain, where it looks.

Everything is of the plain model, temperature 1 and no filter, teacher-forced: each cell is judged after the true text
and the true cells before it, drawn or encoded alike. Image tokens come in, numbers come out: this file knows no pixels
and draws nothing.

Attention says what a head reads, not what the picture owes to it; for that, look at `Cells.explained`.

Shapes: B pictures, T text ids, h w grid, N = h w cells, K image codes, D depth, H heads, S states, P pieces.
"""

import contextlib
import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle.layout import Layout
from dalle.model import DALLE, Attention
from dalle.text import Text

_AT_ONCE = 16  # pictures whose logits are held together


class Cells(NamedTuple):
    """How each cell came about; all but the codes float32 or wider, in nats where they are logarithms.

    Attributes:
        entropy: (B, h, w), of the distribution that the cell was drawn from, 0 .. ln K.
        logprobs: (B, h, w), ln p(token | text, cells before it).
        baseline: (B, h, w), the same under the baseline's text.
        codes: int64 (B, h, w, k), the likeliest codes, best first.
        chances: (B, h, w, k), their probabilities.
    """

    entropy: Tensor
    logprobs: Tensor
    baseline: Tensor
    codes: Tensor
    chances: Tensor

    @property
    def explained(self) -> Tensor:
        """(B, h, w): what the text adds to a cell over the baseline, `logprobs - baseline`.

        With the null prompt as baseline these are the pointwise mutual informations of words and cell given the cells
        before; their sum is the score `pmi` of `dalle.rerank`. Negative where the words made the token less likely.
        """
        return self.logprobs - self.baseline


class Attended(NamedTuple):
    """Where each image cell looks, by layer and head; the last dimensions of all three together sum to 1.

    A row belongs to the cell that is predicted: row 0 is read from start-of-image, row j from the state that holds the
    token of cell j - 1.

    Attributes:
        text: (B, D, H, N, T), to the text ids. Pads are ids like any other and are read like any other: heads with
            nothing to look for often rest there, so take their share apart, as `by_piece` does.
        cells: (B, D, H, N, N), to the cells before; zero from the diagonal on and where the block's pattern has a gap.
        starts: (B, D, H, N, 2), to start-of-text and start-of-image; the latter is in a pattern or not, like a cell.
    """

    text: Tensor
    cells: Tensor
    starts: Tensor


@torch.inference_mode()
def cells(model: DALLE, text_ids: Tensor, tokens: Tensor, baseline_ids: Tensor, k: int = 8) -> Cells:
    """Judge every cell of B pictures.

    Args:
        text_ids: int64 (B, T), pads placed.
        tokens: int64 (B, h, w).
        baseline_ids: int64 (1, T) or (B, T), what the words are measured against: the null prompt, or the captions
            with a word changed.
        k: how many of the likeliest codes; all K where there are fewer.
    """
    batches = (rows.split(_AT_ONCE) for rows in (text_ids, tokens, baseline_ids.expand_as(text_ids)))
    parts = [_cells(model, *some, k) for some in zip(*batches, strict=True)]
    return Cells(*(torch.cat(columns).unflatten(1, model.config.grid) for columns in zip(*parts, strict=True)))


def _cells(model: DALLE, text_ids: Tensor, tokens: Tensor, baseline_ids: Tensor, k: int) -> tuple[Tensor, ...]:
    own, baseline = (model(ids, tokens).image.log_softmax(-1) for ids in (text_ids, baseline_ids))  # (B, N, K)
    targets = tokens.to(own.device).flatten(1)[..., None]
    best = own.topk(min(k, own.shape[-1]))
    logprobs = (table.gather(2, targets)[..., 0] for table in (own, baseline))
    return -(own.exp() * own).sum(-1), *logprobs, best.indices, best.values.exp()


@torch.inference_mode()
def attention(model: DALLE, text_ids: Tensor, tokens: Tensor) -> Attended:
    """The attention of B pictures (B, h, w) under texts (B, T): B D H N S numbers, so give as many as memory holds."""
    layout, found = model.layout, []  # a map for each block

    def record(kind: str, module: Attention, inputs: tuple) -> None:
        found.append(_weights(module, inputs[0], layout, kind))

    with contextlib.ExitStack() as hooks:
        for block in model.blocks:
            look = functools.partial(record, block.kind)
            hooks.enter_context(block.attention.register_forward_pre_hook(look))
        model(text_ids, tokens)
    weights = torch.stack(found, 1)  # (B, D, H, N, S)
    sot, text, soi, before = weights.split([1, model.config.text_length, 1, layout.cells - 1], -1)
    return Attended(text, F.pad(before, (0, 1)), torch.cat([sot, soi], -1))  # the last cell is never an input


def _weights(attention: Attention, x: Tensor, layout: Layout, kind: str) -> Tensor:
    """(B, H, N, S), where image states look among normed states x (B, S, E): what the fused kernel does not tell."""
    q, k, _ = attention.qkv(x).unflatten(-1, (3, attention.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, S, E / H)
    scores = q[:, :, layout.image] @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    return scores.masked_fill(~layout.mask(kind)[layout.image].to(x.device), -math.inf).softmax(-1)


def by_piece(text: Text, ids: Tensor, weights: Tensor) -> tuple[list[str], Tensor]:
    """Names for what stands in the last dimension of `Attended.text`, with all pads in one.

    Args:
        ids: int64 (T,), one caption.
        weights: (..., T), the attention to it.

    Returns:
        What each id says, and "pads" last where there are any; and the weights (..., P), those of the pads added up.
        An id that holds but a part of a character is named by the replacement character.
    """
    said = [text.decode([i]) or "␣" for i in ids.tolist() if i < text.vocab_size]
    pads = weights[..., len(said) :].sum(-1, keepdim=True)
    if len(said) == len(ids):
        return said, weights
    return [*said, "pads"], torch.cat([weights[..., : len(said)], pads], -1)


def selectivity(weights: Tensor) -> Tensor:
    """How much different cells look at different pieces, float64 (...), 0 .. ln P nats.

    The mutual information of cell and piece in the attention that falls on the pieces, times the share that does.
    Zero for a head that looks at the same words everywhere, however hard, or at no word at all.

    Args:
        weights: (..., N, P), attention from N cells to P pieces; leave the pads out.
    """
    weights = weights.double()  # a head may give words as little as 1e-40, and this multiplies two of them
    of_cell, of_piece = weights.sum(-1, keepdim=True), weights.mean(-2, keepdim=True)
    expected = of_cell * of_piece / of_piece.sum(-1, keepdim=True).clamp_min(1e-300)
    return (torch.xlogy(weights, weights) - torch.xlogy(weights, expected)).sum(-1).mean(-1).clamp_min(0)
