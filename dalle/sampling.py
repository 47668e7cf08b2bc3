"""Drawing image tokens from a caption, one cell at a time. Knows no pixels and no words.

Randomness belongs to a picture, never to a batch: picture k of a prompt with seed s has one uniform number for each
cell, a function of (s, k) alone, and the token is where that number falls in the cumulated distribution. So the batch
size, the number of pictures and the other prompts cannot shift it. What they can shift is the last bit of a logit, for
matrix kernels sum in an order that depends on the number of rows: in float32 a token then changes in very rare
near-ties. With `exact` not even that happens.

Shapes: P prompts, R rows (pictures) at a time, T text ids, N = h w cells, K image codes.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dalle.model import DALLE, KVCache
from dvae.errors import NumericsError, UserError
from dvae.seeds import generator

_EXACT_ROWS = 8  # pictures that `exact` always computes together


class Sampled(NamedTuple):
    """Pictures as tokens, with what the model itself thinks of them.

    `logprobs` are ln p(token | text, tokens before it): of the plain model, at temperature 1, unfiltered and unguided.
    `null` is the same under the null prompt, where guidance computed it.
    """

    tokens: Tensor  # int64 (B, h, w)
    logprobs: Tensor  # float32 (B, N)
    null: Tensor | None  # float32 (B, N)


def filter_logits(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Logits (..., K), float64, of the distribution to draw from: divided by the temperature, -inf outside the filters.

    Args:
        temperature: above 0; below 1 sharpens.
        top_k: keep the k most likely codes, and any that ties with the k-th.
        top_p: then keep the smallest set of most likely codes whose probabilities sum to top_p or more.
    """
    logits = logits.double()
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # the largest is 0: no temperature can overflow it
    if top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -math.inf)
    if top_p is not None:
        ranked, order = logits.sort(dim=-1, descending=True, stable=True)
        p = ranked.softmax(-1)
        outside = p.cumsum(-1) - p >= top_p
        outside[..., 0] = False
        logits = logits.masked_fill(outside.scatter(-1, order, outside), -math.inf)
    return logits


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Codes (R,) of filtered logits (R, K), chosen by uniforms (R,) in [0, 1), both float64; none of probability 0."""
    p = logits.softmax(-1)
    cdf = p.cumsum(-1).masked_fill(p == 0, 0)
    below_total = cdf.amax(-1) * (1 - 2**-52)  # a hair less, so that no rounding can reach past the last code
    return (cdf > (uniforms * below_total)[:, None]).byte().argmax(-1)  # the first of them


def sample(
    model: DALLE,
    text_ids: Tensor,
    count: int,
    *,
    null_ids: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance: float = 1.0,
    seeds: int | Sequence[int] = 0,
    batch: int = 256,
    exact: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Sampled:
    """Draw `count` pictures for each of P prompts; picture k of prompt p is row p * count + k.

    Args:
        text_ids: int64 (P, T), pads placed.
        null_ids: int64 (1, T), the null prompt; read only if guidance is not 1.
        temperature, top_k, top_p: see `filter_logits`; greedy is top_k=1.
        guidance: scale s of classifier-free guidance, logits = null + s (text - null); 1 is the plain model and half
            the work.
        seeds: one for all prompts, or one for each; 0 <= seed < 2**63.
        batch: pictures computed at a time; memory grows with it, and doubles with guidance.
        exact: bit-equal tokens and log-probabilities on one machine, whatever count, batch, threads or other prompts:
            always 8 pictures of one prompt together, on one thread. Slower; `batch` is then not used.
        progress: called with the number of tokens just drawn; they add up to P * count * N.
    Raises:
        UserError: a setting is out of its range.
        NumericsError: the model's logits are not finite; names the picture.
    """
    prompts = len(text_ids)
    seeds = list(seeds) if isinstance(seeds, Sequence) else [seeds] * prompts
    check_settings(model, temperature, top_k, top_p, guidance)
    _check(prompts, count, seeds, batch)
    guided, cells = guidance != 1, math.prod(model.config.grid)

    def choose(logits: Tensor, uniforms: Tensor) -> Tensor:
        return draw(filter_logits(logits, temperature, top_k, top_p), uniforms)

    # Exactness by construction: the same 8 pictures are computed together whether or not all of them were asked for.
    at_once, together = (_EXACT_ROWS, 1) if exact else (batch, batch)
    computed = math.ceil(count / at_once) * at_once if exact else count
    drawn = []
    with torch.inference_mode(), _one_thread() if exact else contextlib.nullcontext():
        for first in range(0, prompts, together):
            ids = text_ids[first : first + together]
            # each prompt is read once, here, and its pictures start from copies; the null prompt is the last row
            prefix = model.prefill(torch.cat([ids, null_ids.to(ids)]) if guided else ids)
            pictures = [(prompt, k) for prompt in range(first, first + len(ids)) for k in range(computed)]
            for start in range(0, len(pictures), at_once):
                chunk = pictures[start : start + at_once]
                rows = [prompt - first for prompt, _ in chunk] + [len(ids)] * len(chunk) * guided
                uniforms = torch.stack([_uniforms(seeds[prompt], k, cells) for prompt, k in chunk])
                wanted = sum(k < count for _, k in chunk)
                columns = []
                for column in _decode(model, prefix.select(rows), uniforms, guidance, choose, chunk):
                    columns.append(column)
                    if progress is not None:
                        progress(wanted)
                drawn.append([torch.stack(parts, dim=1) for parts in zip(*columns, strict=True)])
    tokens, logprobs, *null = (
        torch.cat(parts).unflatten(0, (prompts, computed))[:, :count].flatten(0, 1)
        for parts in zip(*drawn, strict=True)
    )
    return Sampled(tokens.unflatten(1, model.config.grid), logprobs, null[0] if guided else None)


def _decode(
    model: DALLE,
    cache: KVCache,
    uniforms: Tensor,
    guidance: float,
    choose: Callable[[Tensor, Tensor], Tensor],
    pictures: list[tuple[int, int]],
) -> Iterator[tuple[Tensor, ...]]:
    """Draw R `pictures`, named (prompt, k), from a prefilled cache of R rows, and with guidance R of the null prompt.

    Yields for each cell the token, its logprob and, with guidance, its null logprob, each (R,).
    """
    streams, token = 1 if guidance == 1 else 2, None
    for cell in range(uniforms.shape[1]):
        logits = model.step(token.repeat(streams) if cell else None, cell, cache).chunk(streams)
        mixed = logits[0]
        if streams == 2:
            text, null = (stream.double() for stream in logits)
            mixed = null + guidance * (text - null)
        finite = torch.isfinite(mixed).all(1)
        if not finite.all():
            prompt, k = pictures[finite.tolist().index(False)]
            raise NumericsError(
                f"the model's logits are not finite at cell {cell} of picture {k} of prompt {prompt}",
                "the weights are damaged or diverged in training: use an earlier checkpoint, or float32",
            )
        token = choose(mixed, uniforms[:, cell].to(mixed.device))
        yield token, *(_logprob(stream, token) for stream in logits)


def _logprob(logits: Tensor, token: Tensor) -> Tensor:  # (R, K), (R,) -> (R,)
    return logits.float().log_softmax(-1).gather(1, token[:, None])[:, 0]


def _uniforms(seed: int, k: int, cells: int) -> Tensor:
    """float64 (N,) in [0, 1): the randomness of picture k of a prompt with this seed."""
    return torch.rand(cells, dtype=torch.float64, generator=generator("sample", seed, k))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def check_settings(
    model: DALLE, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None, guidance: float = 1.0
) -> None:
    """Raise UserError for a setting that is out of its range; see `sample`."""
    vocab = model.config.vocab_image
    if not (_number(temperature) and temperature > 0):
        raise UserError(f"temperature is {temperature!r}", "give a number above 0; for the likeliest codes use top_k 1")
    if top_k is not None and not _whole(top_k, 1, vocab):
        raise UserError(f"top_k is {top_k!r}", f"give a whole number from 1 to {vocab}, the codes of this model")
    if top_p is not None and not (_number(top_p) and 0 < top_p <= 1):
        raise UserError(f"top_p is {top_p!r}", "give a number above 0, up to 1")
    if not (_number(guidance) and guidance >= 0):
        raise UserError(f"guidance is {guidance!r}", "give a number from 0 on; 1 is no guidance")


def _check(prompts: int, count: int, seeds: Sequence[int], batch: int) -> None:
    if not _whole(count, 1):
        raise UserError(f"count is {count!r}", "ask for 1 picture or more")
    if not _whole(batch, 1):
        raise UserError(f"batch is {batch!r}", "compute 1 picture or more at a time")
    if len(seeds) != prompts:
        raise UserError(f"{len(seeds)} seeds for {prompts} prompts", "give one seed, or one for each prompt")
    for seed in seeds:
        if not _whole(seed, 0, 2**63 - 1):
            raise UserError(f"seed is {seed!r}", "give a whole number from 0 to 2**63 - 1")


def _whole(value: Any, least: int, most: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
