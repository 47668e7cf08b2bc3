"""What a model of both orders says of pictures: captions searched or drawn from p(text | image), and ln p(text).

Of all rows of T ids only captions are looked at: one word or more, then the pad of each position to the end. So the
first pad ends a caption, no pad stands in the place of another, and the empty caption, which no training pair has, is
none. Log-probabilities are those of the plain model, at temperature 1 and unfiltered, of the words and of the first
pad, which says that the caption ends there; the pads after it are certain. Knows no pixels and no words.

Shapes: B pictures, R rows at a time, C captions, T text ids, V text vocabulary with pads.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dalle.model import DALLE, KVCache
from dalle.rerank import spoken
from dalle.sampling import check_settings, draw, filter_logits, whole
from dvae.errors import NumericsError, UserError
from dvae.seeds import generator

ROWS = 256  # captions computed at a time; memory grows with it


class Captions(NamedTuple):
    """Captions of one picture, each once, best first."""

    text_ids: Tensor  # int64 (C, T)
    logprobs: Tensor  # float64 (C,): ln p(text | image)
    drawn: Tensor | None = None  # int64 (C,): how many of the draws each one was; None of a search


@torch.inference_mode()
def beam(model: DALLE, tokens: Tensor, width: int = 8, count: int = 1, rows: int = ROWS) -> list[Captions]:
    """The likeliest captions of each picture, by beam search.

    It keeps the `width` likeliest beginnings at each position, so it is exact where these are all there are, and
    otherwise may miss a likelier caption whose beginning is unlikely.

    Args:
        tokens: int64 (B, h, w).
        width: beginnings that are kept.
        count: captions of each picture, at most `width`; fewer come back where there are no more.
        rows: beginnings computed at a time, or one picture's where these are more.
    Raises:
        UserError: the model reads text first only, or a setting is out of its range.
        NumericsError: the model's logits are not finite.
    """
    check_search(width, count)
    _check(model, tokens, count, rows)
    found = []
    for part in tokens.split(max(1, rows // width)):
        ids, logprobs = _search(model, part, width)
        found += [Captions(*best) for best in zip(ids[:, :count], logprobs[:, :count], strict=True)]
    return found


@torch.inference_mode()
def sampled(
    model: DALLE,
    tokens: Tensor,
    count: int = 1,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    rows: int = ROWS,
) -> list[Captions]:
    """Captions of each picture drawn from the model; those that were drawn several times are one.

    Draw k has uniform numbers of its own, a function of (seed, k), the same for every picture; so the batch, the number
    of draws and the other pictures cannot shift it.

    Args:
        tokens: int64 (B, h, w).
        count: draws for each picture.
        temperature, top_k, top_p: see `dalle.sampling.filter_logits`; of what may stand at a position.
        seed: 0 <= seed < 2**63.
        rows: draws computed at a time.
    Raises:
        UserError, NumericsError: as `beam`.
    """
    _check(model, tokens, count, rows)
    check_settings(model, temperature, top_p=top_p)
    ids = model.config.vocab_text + model.config.text_length
    if top_k is not None and not whole(top_k, 1, ids):
        raise UserError(f"top_k is {top_k!r}", f"give a whole number from 1 to {ids}, the text ids of this model")
    if not whole(seed, 0, 2**63 - 1):
        raise UserError(f"seed is {seed!r}", "give a whole number from 0 to 2**63 - 1")
    uniforms = torch.stack([_uniforms(seed, k, model.config.text_length) for k in range(count)])
    found = []
    for part in tokens.split(max(1, rows // count)):
        prefix = model.prefill_image(part)  # each picture is read once, here
        draws = []
        for some in uniforms.split(rows):
            own = some.repeat(len(part), 1)  # (R, T), picture by picture
            ids, logprobs = _draw(model, prefix.expand(len(some)), own, temperature, top_k, top_p)
            draws.append((ids.unflatten(0, (len(part), -1)), logprobs.unflatten(0, (len(part), -1))))
        found += map(_distinct, *(torch.cat(columns, 1) for columns in zip(*draws, strict=True)))
    return found


@torch.inference_mode()
def log_priors(model: DALLE, text_ids: Tensor) -> Tensor:
    """ln p(text), (P,), of texts (P, T) before any picture: of the words and of the first pad."""
    logprobs = model.text_logits(text_ids).log_softmax(-1)
    text_ids = text_ids.to(logprobs.device)
    each = logprobs.gather(2, text_ids[..., None])[..., 0]
    return each.where(spoken(text_ids, model.config.vocab_text), 0).sum(1)


def check_order(model: DALLE) -> None:
    """Raise UserError for a model that cannot read a picture before its words."""
    if not model.config.both_orders:
        raise UserError(
            "this model was trained to read words before pictures only, so it cannot caption",
            "train one with --model.image_first.share 0.25; dalle score --by likelihood works with this one",
        )


def check_search(width: int, count: int) -> None:
    """Raise UserError for a setting of `beam` that is out of its range."""
    if not whole(count, 1):
        raise UserError(f"count is {count!r}", "ask for 1 caption or more")
    if not whole(width, count):
        raise UserError(f"width is {width!r}, count {count}", "give a whole number from count on")


def _search(model: DALLE, tokens: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The best captions (B, C, T) found for pictures (B, h, w), best first, and their log-probabilities (B, C)."""
    cache = model.prefill_image(tokens)
    first = torch.arange(len(tokens), device=cache.stored.device)[:, None]
    ids = first.new_empty(len(tokens), 1, 0)
    scores = torch.zeros(ids.shape[:2], dtype=torch.float64, device=first.device)
    parents = first  # rows of the cache, (B, C)
    for place in range(model.config.text_length):
        if place:
            cache = cache.select(parents.flatten())
        step = _step(model, ids[..., -1].flatten() if place else None, place, cache)
        ahead = (scores[..., None] + step.unflatten(0, scores.shape)).flatten(1)  # (B, C V)
        # what may follow does not depend on the picture, so all have as many beginnings
        scores, chosen = ahead.topk(min(width, int(torch.isfinite(ahead[0]).sum())))
        parent, token = chosen // step.shape[1], chosen % step.shape[1]
        parents = first * ids.shape[1] + parent
        ids = torch.cat([ids[first, parent], token[..., None]], dim=2)
    return ids, scores


def _draw(
    model: DALLE, cache: KVCache, uniforms: Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> tuple[Tensor, Tensor]:
    """A caption (R, T) of each row of a cache by uniforms (R, T), and their log-probabilities (R,)."""
    ids, logprobs = [], []
    for place in range(model.config.text_length):
        step = _step(model, ids[-1] if place else None, place, cache)
        ids.append(draw(filter_logits(step, temperature, top_k, top_p), uniforms[:, place].to(step.device)))
        logprobs.append(step.gather(1, ids[-1][:, None])[:, 0])
    return torch.stack(ids, 1), torch.stack(logprobs, 1).sum(1)


def _step(model: DALLE, before: Tensor | None, place: int, cache: KVCache) -> Tensor:
    """ln p, (R, V) float64, of each id at `place` after the ids (R,) before it; -inf of those that make no caption."""
    logits = model.step_text(before, place, cache).double()
    if not torch.isfinite(logits).all():
        raise NumericsError(
            f"the model's logits are not finite at text id {place}",
            "the weights are damaged or diverged in training: use an earlier checkpoint, or float32",
        )
    words = model.config.vocab_text
    may = torch.zeros_like(logits, dtype=torch.bool)
    may[:, :words] = True if before is None else (before < words)[:, None]
    may[:, words + place] = before is not None
    logprobs = logits.log_softmax(-1).masked_fill(~may, -math.inf)
    return logprobs if before is None else logprobs.where((before < words)[:, None] | ~may, 0)


def _uniforms(seed: int, k: int, length: int) -> Tensor:
    """float64 (T,) in [0, 1): the randomness of draw k."""
    return torch.rand(length, dtype=torch.float64, generator=generator("caption", seed, k))


def _distinct(ids: Tensor, logprobs: Tensor) -> Captions:
    """Draws (N, T) with their log-probabilities (N,), each caption once."""
    ids, which, drawn = ids.unique(dim=0, return_inverse=True, return_counts=True)
    # those of one caption are equal but for the last bit
    logprobs = logprobs.new_empty(len(ids)).scatter_reduce(0, which, logprobs, "amax", include_self=False)
    order = torch.argsort(-logprobs, stable=True)
    return Captions(ids[order], logprobs[order], drawn[order])


def _check(model: DALLE, tokens: Tensor, count: int, rows: int) -> None:
    check_order(model)
    grid, vocab = model.config.grid, model.config.vocab_image
    if tokens.ndim != 3 or tuple(tokens.shape[1:]) != grid or not len(tokens):
        hint = f"it reads (batch, {grid[0]}, {grid[1]}), one picture or more"
        raise UserError(f"tokens of shape {tuple(tokens.shape)} do not fit this model", hint)
    if tokens.amin() < 0 or tokens.amax() >= vocab:
        raise UserError("a token is none of this model's", f"give codes from 0 to {vocab - 1}")
    if not whole(count, 1):
        raise UserError(f"count is {count!r}", "ask for 1 caption or more")
    if not whole(rows, 1):
        raise UserError(f"rows is {rows!r}", "compute 1 caption or more at a time")
