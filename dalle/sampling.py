"""Drawing image tokens from a caption, one cell at a time. Knows no pixels and no words.

Randomness belongs to a picture, never to a batch: picture k of a prompt with seed s has one uniform number for each
cell, a function of (s, k) alone, and the token is where that number falls in the cumulated distribution. So the batch
size, the number of pictures and the other prompts cannot shift it. What they can shift is the last bit of a logit, for
matrix kernels sum in an order that depends on the number of rows: in float32 a token then changes in very rare
near-ties. With `exact` not even that happens.

What is drawn from is a mixture of logits of one or more texts, all read side by side: the prompt's, the null prompt's
under guidance, a second prompt's when two are blended. Cells may be given beforehand: they are read, not drawn.

Shapes: P prompts, R rows (pictures) at a time, T text ids, N = h w cells, K image codes.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dalle.model import DALLE, KVCache
from dvae.errors import EnvironmentProblem, NumericsError, UserError
from dvae.forecast import available
from dvae.forecast import size as human
from dvae.seeds import generator

_EXACT_ROWS = 8  # pictures that `exact` always computes together
_MOST = 1000  # of temperature and guidance; far beyond what makes sense, far below what overflows


class Sampled(NamedTuple):
    """Pictures as tokens, with what the model itself thinks of them.

    `logprobs` are ln p(token | text, tokens before it): of the plain model, at temperature 1, unfiltered and unguided.
    `null` is the same under the null prompt, where guidance computed it. Cells that were given have theirs, too.
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
    if top_k is not None:  # before the doubles, for half the bytes are searched in half the time
        least = logits.topk(top_k, sorted=False).values.amin(-1, keepdim=True)
        logits = logits.masked_fill(logits < least, -math.inf)
    logits = logits.double()
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # the largest is 0: no temperature can overflow it
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


class Blend(NamedTuple):
    """A second prompt (1, T), and its share of the mixture, from 0 to 1."""

    text_ids: Tensor
    share: float


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
    blend: Blend | None = None,
    known: Tensor | None = None,
    seeds: int | Sequence[int] = 0,
    batch: int | None = None,
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
        blend: a second prompt for all; the text's logits are then (1 - share) of the first and `share` of the second,
            the normalised geometric mean of the two distributions.
        known: int64 (P, h, w): of each prompt the tokens that its pictures are to hold, -1 where they are drawn.
        seeds: one for all prompts, or one for each; 0 <= seed < 2**63.
        batch: pictures computed at a time; memory grows with it, and doubles with guidance. None: see `fitting`.
        exact: bit-equal tokens and log-probabilities on one machine, whatever count, batch, threads or other prompts:
            always 8 pictures of one prompt together, on one thread. Slower; `batch` is then not used.
        progress: called with the number of tokens just drawn; they add up to P * count * N.
    Raises:
        UserError: a setting is out of its range.
        EnvironmentProblem: there is not enough memory for one picture.
        NumericsError: the model's logits are not finite; names the picture.
    """
    prompts = len(text_ids)
    seeds = list(seeds) if isinstance(seeds, Sequence) else [seeds] * prompts
    check_settings(model, temperature, top_k, top_p, guidance)
    beside, weights = _beside(null_ids, guidance, blend)
    batch = fitting(model, len(weights)) if batch is None else batch
    _check(prompts, count, seeds, batch)
    choose = functools.partial(_choose, temperature=temperature, top_k=top_k, top_p=top_p)
    if known is not None:
        _check_known(model, known, prompts)

    # Exactness by construction: the same 8 pictures are computed together whether or not all of them were asked for.
    at_once, together = (_EXACT_ROWS, 1) if exact else (batch, batch)
    computed, cells = math.ceil(count / at_once) * at_once if exact else count, math.prod(model.config.grid)
    drawn = []
    with torch.inference_mode(), _one_thread() if exact else contextlib.nullcontext():
        cache = None  # the first is the largest, and all others stand where it stood
        for first in range(0, prompts, together):
            ids = text_ids[first : first + together]
            # each prompt is read once, here, and its pictures start from copies; the texts beside it come last
            prefix = model.prefill(torch.cat([ids, *(text.to(ids) for text in beside)]))
            pictures = [(prompt, k) for prompt in range(first, first + len(ids)) for k in range(computed)]
            for start in range(0, len(pictures), at_once):
                chunk = pictures[start : start + at_once]
                rows = [prompt - first for prompt, _ in chunk]
                rows += [len(ids) + text for text in range(len(beside)) for _ in chunk]
                uniforms = torch.stack([_uniforms(seeds[prompt], k, cells) for prompt, k in chunk])
                given = None if known is None else known.flatten(1)[[prompt for prompt, _ in chunk]]
                own = prefix.select(rows, cache)
                cache = cache or own
                drawing = Drawing(model, own, weights, guidance != 1, uniforms, choose, chunk, given)
                wanted = sum(k < count for _, k in chunk)
                for _ in range(cells):
                    drawing.step()
                    if progress is not None:
                        progress(wanted)
                drawn.append(drawing.sampled())
    tokens, logprobs, *null = (
        torch.cat(parts).unflatten(0, (prompts, computed))[:, :count].flatten(0, 1)
        for parts in zip(*drawn, strict=True)
        if parts[0] is not None
    )
    return Sampled(tokens.unflatten(1, model.config.grid), logprobs, null[0] if null else None)


def sample_pruned(
    model: DALLE,
    text_ids: Tensor,
    count: int,
    stages: Sequence[tuple[int, int]],
    score: Callable[[DALLE, Tensor, Sampled], Tensor],
    *,
    null_ids: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance: float = 1.0,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> tuple[Sampled, Tensor]:
    """Draw `count` pictures for one prompt, of which only the most promising are drawn to their end.

    What is drawn to the end is what `sample` draws with the same seed: each picture keeps its random numbers.

    Args:
        text_ids: int64 (1, T), pads placed.
        stages: (cells, keep), both in order: after so many cells of each picture, the `keep` with the highest scores
            are drawn on.
        score: (model, text_ids, Sampled) -> (R,), of R unfinished pictures: their tokens are (R, cells).
        seed, and the others: see `sample`.
        progress: called with the number of tokens just drawn, count N less those that pruning saves.
    Returns:
        The pictures drawn to the end, and the number of each, int64, ascending.
    """
    check_settings(model, temperature, top_k, top_p, guidance)
    _check(len(text_ids), count, [seed], count)
    cells, before, left = math.prod(model.config.grid), 0, count
    for cell, keep in stages:
        if not (whole(cell, before + 1, cells - 1) and whole(keep, 1, left)):
            raise UserError(
                f"the stage ({cell}, {keep}) cannot follow {before} cells and {left} pictures of {cells} cells",
                "give pairs (cells, keep): more cells and no more pictures from stage to stage",
            )
        before, left = cell, keep
    beside, weights = _beside(null_ids, guidance, None)
    if count > (most := fitting(model, len(weights), count)):
        hint = f"draw {most} or fewer, or do not prune: pictures are then drawn as many at a time as fit"
        raise EnvironmentProblem(f"there is not enough memory for {count} pictures at a time", hint)
    choose = functools.partial(_choose, temperature=temperature, top_k=top_k, top_p=top_p)
    numbers, keeps = torch.arange(count), dict(stages)
    with torch.inference_mode():
        prefix = model.prefill(torch.cat([text_ids, *(text.to(text_ids) for text in beside)]))
        cache = prefix.expand(count)
        uniforms = torch.stack([_uniforms(seed, k, cells) for k in range(count)])
        drawing = Drawing(model, cache, weights, guidance != 1, uniforms, choose, [(0, k) for k in range(count)])
        for cell in range(1, cells + 1):
            drawing.step()
            if progress is not None:
                progress(len(numbers))
            if cell in keeps:
                scores = score(model, text_ids, drawing.sampled())
                best = torch.argsort(-scores, stable=True)[: keeps[cell]].sort().values.cpu()
                drawing, numbers = drawing.select(best), numbers[best]
    tokens, logprobs, null = drawing.sampled()
    return Sampled(tokens.unflatten(1, model.config.grid), logprobs, null), numbers


class Drawing:
    """R pictures on their way, cell by cell; `select` goes on with some of them.

    Args:
        cache: a prefilled cache of R rows for each weight: the pictures' own prompts, then the texts beside them, the
            null prompt first.
        weights: of the logits of each of these texts in the mixture that is drawn from.
        guided: whether the null prompt is among them.
        uniforms: float64 (R, N).
        choose: tokens (R,) of logits (R, K) and uniforms (R,).
        names: (prompt, k) of each picture, for errors.
        known: int64 (R, N), -1 where a token is drawn.
    """

    def __init__(
        self,
        model: DALLE,
        cache: KVCache,
        weights: Sequence[float],
        guided: bool,
        uniforms: Tensor,
        choose: Callable[[Tensor, Tensor], Tensor],
        names: Sequence[tuple[int, int]],
        known: Tensor | None = None,
    ):
        self.model, self.cache, self.weights, self.guided, self.uniforms = model, cache, weights, guided, uniforms
        self.choose, self.names, self.known = choose, names, known
        self.tokens: list[Tensor] = []
        self.logprobs: list[tuple[Tensor, ...]] = []  # of each text
        self.sums: list[Tensor] = []  # of the logits (R,) of cells that were not looked at yet

    def step(self) -> None:
        """Draw the next cell of each picture."""
        cell = len(self.tokens)
        held = self.tokens[-1].repeat(len(self.weights)) if cell else None
        logits = self.model.step(held, cell, self.cache).chunk(len(self.weights))
        mixed = logits[0]
        if len(logits) > 1:
            mixed = sum(weight * stream.double() for weight, stream in zip(self.weights, logits, strict=True))
        self.sums.append(mixed.sum(1, dtype=torch.float64))
        token = self.choose(mixed, self.uniforms[:, cell].to(mixed.device))
        if self.known is not None:
            given = self.known[:, cell].to(token)
            token = torch.where(given < 0, token, given)
        self.tokens.append(token)
        self.logprobs.append(tuple(_logprob(stream, token) for stream in logits))
        if (cell + 1) % self.model.config.grid[1] == 0:  # of a row together, for each look waits for the device
            self._check_finite()

    def _check_finite(self) -> None:
        """Raise NumericsError for the first of the cells not looked at yet whose logits are no numbers."""
        if not self.sums:
            return
        finite = torch.isfinite(torch.stack(self.sums))  # (cells, R)
        if not finite.all():
            later, row = (~finite).nonzero()[0].tolist()
            (prompt, k), cell = self.names[row], len(self.tokens) - len(finite) + later
            raise NumericsError(
                f"the model's logits are not finite at cell {cell} of picture {k} of prompt {prompt}",
                "the weights are damaged or diverged in training: use an earlier checkpoint, or float32",
            )
        self.sums.clear()

    def sampled(self) -> Sampled:
        """What was drawn so far: tokens (R, cells), and the columns beside them."""
        text, *beside = (torch.stack(column, 1) for column in zip(*self.logprobs, strict=True))
        return Sampled(torch.stack(self.tokens, 1), text, beside[0] if self.guided else None)

    def select(self, rows: Tensor) -> "Drawing":
        """The pictures of these rows, int64, on their way."""
        self._check_finite()
        size, texts = len(self.uniforms), range(len(self.weights))
        cache = self.cache.select(torch.cat([text * size + rows for text in texts]))
        known = None if self.known is None else self.known[rows]
        names = [self.names[row] for row in rows.tolist()]
        mixture = self.weights, self.guided
        chosen = Drawing(self.model, cache, *mixture, self.uniforms[rows], self.choose, names, known)
        chosen.tokens = [token[rows] for token in self.tokens]
        chosen.logprobs = [tuple(column[rows] for column in columns) for columns in self.logprobs]
        return chosen


def _beside(null_ids: Tensor, guidance: float, blend: Blend | None) -> tuple[list[Tensor], list[float]]:
    """The texts (1, T) that are read beside the prompt, and the weights of the logits of all, the prompt's first."""
    texts, weights, share = [], [guidance], 0.0 if blend is None else blend.share
    if not (_number(share) and 0 <= share <= 1):
        raise UserError(f"the share of the second prompt is {share!r}", "give a number from 0 to 1")
    if guidance != 1:
        texts, weights = [null_ids], [*weights, 1 - guidance]
    if share:
        texts, weights = [*texts, blend.text_ids], [guidance * (1 - share), *weights[1:], guidance * share]
    return texts, weights


def fitting(model: DALLE, texts: int, most: int = 256) -> int:
    """How many pictures can be drawn at a time, `most` at the most, if half of the free memory may be taken.

    Args:
        texts: that are read for each picture: its prompt and those beside it.
    Raises:
        EnvironmentProblem: not even one.
    """
    config, size = model.config, model.start.element_size()
    keys = 2 * config.depth * config.width * 2 * model.layout.states * size  # read once, and copied once
    chances = 8 * 8 * config.vocab_image  # some float64 of each code
    free, each = available(model.start.device), texts * keys + (texts + 1) * chances
    if free is None:
        return most
    if each > free:
        raise EnvironmentProblem(
            f"drawing one picture takes {human(each)}, and {human(free)} of memory are free",
            "end other programs, or draw with a smaller model",
        )
    return max(1, min(most, free // 2 // each))


def _choose(logits: Tensor, uniforms: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    return draw(filter_logits(logits, temperature, top_k, top_p), uniforms)


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
    if not (_number(temperature) and 0 < temperature <= _MOST):
        hint = f"give a number above 0, up to {_MOST}; for the likeliest codes use top_k 1"
        raise UserError(f"temperature is {temperature!r}", hint)
    if top_k is not None and not whole(top_k, 1, vocab):
        raise UserError(f"top_k is {top_k!r}", f"give a whole number from 1 to {vocab}, the codes of this model")
    if top_p is not None and not (_number(top_p) and 0 < top_p <= 1):
        raise UserError(f"top_p is {top_p!r}", "give a number above 0, up to 1")
    if not (_number(guidance) and 0 <= guidance <= _MOST):
        raise UserError(f"guidance is {guidance!r}", f"give a number from 0 to {_MOST}; 1 is no guidance")


def _check(prompts: int, count: int, seeds: Sequence[int], batch: int) -> None:
    if not whole(count, 1):
        raise UserError(f"count is {count!r}", "ask for 1 picture or more")
    if not whole(batch, 1):
        raise UserError(f"batch is {batch!r}", "compute 1 picture or more at a time")
    if len(seeds) != prompts:
        raise UserError(f"{len(seeds)} seeds for {prompts} prompts", "give one seed, or one for each prompt")
    for seed in seeds:
        if not whole(seed, 0, 2**63 - 1):
            raise UserError(f"seed is {seed!r}", "give a whole number from 0 to 2**63 - 1")


def _check_known(model: DALLE, known: Tensor, prompts: int) -> None:
    size, vocab = (prompts, *model.config.grid), model.config.vocab_image
    if known.shape != size:
        raise UserError(f"known tokens are {tuple(known.shape)}, not {size}", "give a grid of tokens for each prompt")
    if known.amin() < -1 or known.amax() >= vocab:
        raise UserError("a known token is none of this model's", f"give a code from 0 to {vocab - 1}, or -1")


def whole(value: Any, least: int, most: float = math.inf) -> bool:
    """Whether a setting is a whole number of this range."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
