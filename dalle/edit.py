"""Which cells of a picture are drawn anew, and how: completion, masks, extension, variation, at the level of tokens.

The model draws cells row by row and each from those before it, so it does not see a kept cell that comes later. What
makes it heed them is chance and choice: several candidates are drawn at once, and

* whenever the drawing has passed kept cells, candidates are drawn again in proportion to the probability that they gave
  to these cells (`redraw`; sequential Monte Carlo with systematic resampling): a candidate that does not lead to what
  stands there gives way to a copy of one that does, and the copies part again;
* `passes` then redraw cell by cell, each given all others, earlier and later (Gibbs sampling with a few proposals);
* at the end candidates are ranked by a score of the whole picture, kept cells and all.

With settings that are not plain (temperature, filters, guidance) what is drawn follows them, while kept cells weigh as
the plain model has them: they were not drawn.

Pixels are touched twice: what is to be redrawn is hidden before the picture is encoded, so that its neighbours' tokens
cannot tell of it, and afterwards only the redrawn patches are pasted. Knows no words and opens no files.

Shapes: h w the model's grid, N = h w, h' w' a canvas of at least that size, R candidates, K codes, H W pixels.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dalle import rerank
from dalle.model import DALLE, KVCache
from dalle.rerank import Scorer
from dalle.sampling import Drawing, Sampled, check_settings, draw, filter_logits, whole
from dvae import seeds
from dvae.errors import UserError
from dvae.images import to_uint8

SIDES = ("left", "right", "up", "down")
PROPOSALS = 8  # tokens among which a pass chooses each cell's, the one that stands there among them
_LOGITS = 2**25  # numbers that one scoring pass may hold as logits, 128 MB in float32


# ------------------------------------------------------------------------------------------------- what is redrawn


@dataclass(frozen=True)
class Canvas:
    """A grid to draw on, which may be larger than the model's.

    tokens: int64 (h', w'), -1 where a token is to be drawn.
    windows: (top, left) of the model's grid on it, in the order in which they are drawn; each draws all cells of its
        own that are still open.
    """

    tokens: Tensor
    windows: tuple[tuple[int, int], ...] = ((0, 0),)

    @property
    def redrawn(self) -> Tensor:
        """bool (h', w')."""
        return self.tokens < 0


def masked(tokens: Tensor, redrawn: Tensor) -> Canvas:
    """Tokens (h, w) to be kept but where `redrawn`, bool (h, w)."""
    return Canvas(tokens.masked_fill(redrawn, -1))


def below(grid: tuple[int, int], rows: int) -> Tensor:
    """bool (h, w): the cells after the first `rows` rows, from 1 to h - 1 of them."""
    if not whole(rows, 1, grid[0] - 1):
        most = f"give from 1 to {grid[0] - 1} rows of cells" if grid[0] > 1 else "a single row cannot be completed"
        raise UserError(f"rows is {rows!r}, and this model draws {grid[0]}", most)
    redrawn = torch.ones(grid, dtype=torch.bool)
    redrawn[:rows] = False
    return redrawn


def touched(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """bool (h, w): the cells of which a pixel of mask, bool (H, W) of any size, lies in the patch, whole or in part."""
    rows, columns = (
        torch.stack([(k + 1) * cells > place * pixels for place in range(cells)])
        & torch.stack([k * cells < (place + 1) * pixels for place in range(cells)])
        for cells, pixels, k in zip(grid, mask.shape, map(torch.arange, mask.shape), strict=True)
    )  # (h, H) and (w, W): which pixels lie, whole or in part, in which row and column of cells
    return (rows.float() @ mask.float() @ columns.float().t()) > 0


def share_of(grid: tuple[int, int], share: float, seed: int) -> Tensor:
    """bool (h, w): a share of the cells, from 0 to 1, chosen by the seed; a larger share holds a smaller one."""
    if not (isinstance(share, int | float) and not isinstance(share, bool) and 0 <= share <= 1):  # NaN is not
        raise UserError(f"variation is {share!r}", "give a number from 0 (only repainted) to 1 (all drawn anew)")
    _check_seed(seed)
    cells = math.prod(grid)
    redrawn = torch.zeros(cells, dtype=torch.bool)
    number = max(round(share * cells), share > 0)  # a little is not nothing
    redrawn[torch.randperm(cells, generator=seeds.generator("variation", seed))[:number]] = True
    return redrawn.unflatten(0, grid)


def extended(tokens: Tensor, side: str, cells: int) -> Canvas:
    """Tokens (h, w) with `cells` more columns at the left or right, or rows up or down.

    The model's grid slides over the new part by half of itself at a time, or what is left: the other half is what was
    there, or what was just drawn.
    """
    if side not in SIDES:
        raise UserError(f"extend is {side!r}", f"choose one of {', '.join(SIDES)}")
    if not whole(cells, 1):
        raise UserError(f"cells is {cells!r}", "extend by 1 cell or more")
    across = side in ("left", "right")
    before = side in ("left", "up")
    length = tokens.shape[1 if across else 0]
    padding = (cells, 0) if before else (0, cells)
    canvas = F.pad(tokens, padding if across else (0, 0, *padding), value=-1)
    stride = max(1, length // 2)
    drawn = [min(done + stride, cells) for done in range(0, cells, stride)]  # cells of the new part after each window
    places = [cells - done if before else done for done in drawn]
    return Canvas(canvas, tuple((0, place) if across else (place, 0) for place in places))


# --------------------------------------------------------------------------------------------------------- drawing


def redraw(
    model: DALLE,
    text_ids: Tensor,
    known: Tensor,
    count: int,
    *,
    null_ids: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance: float = 1.0,
    resample: bool = True,
    passes: int = 0,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Sampled:
    """Draw `count` candidates of one picture of which some cells are kept.

    Args:
        text_ids: int64 (1, T), pads placed.
        known: int64 (h, w), -1 where a token is drawn.
        null_ids, temperature, top_k, top_p, guidance: see `dalle.sampling.sample`.
        resample: whether candidates that make the kept cells between two redrawn ones unlikely give way to copies of
            others. The candidates then depend on each other, and so on `count`.
        passes: how often each redrawn cell is drawn once more, given all others.
        seed: 0 <= seed < 2**63.
        progress: called with the number of tokens just drawn; they add up to (1 + passes) count times the cells
            that are not kept.
    Returns:
        Candidates in no order, not yet weighed by the kept cells after the last redrawn one: ranking by likelihood
        does that. `logprobs` are those of the plain model for all N cells.
    Raises:
        UserError: a setting is out of its range. NumericsError: the model's logits are not finite.
    """
    check_settings(model, temperature, top_k, top_p, guidance)
    _check(model, known, count, passes)
    _check_seed(seed)
    texts, weights = [text_ids], [guidance]
    if guidance != 1:
        texts, weights = [text_ids, null_ids.to(text_ids)], [guidance, 1 - guidance]
    choice = functools.partial(filter_logits, temperature=temperature, top_k=top_k, top_p=top_p)
    random = seeds.generator("edit", seed)
    redrawn = (known < 0).flatten().tolist()
    with torch.inference_mode():
        prefix = model.prefill(torch.cat(texts))
        uniforms = torch.rand(count, len(redrawn), dtype=torch.float64, generator=random)
        drawing = Drawing(
            model,
            prefix.expand(count),
            weights,
            guided=guidance != 1,
            uniforms=uniforms,
            choose=lambda logits, numbers: draw(choice(logits), numbers),
            names=[(0, k) for k in range(count)],
            known=known.flatten().expand(count, -1),
        )
        passed = torch.zeros(count, dtype=torch.float64)  # ln p of the kept cells since candidates were last chosen
        for cell, new in enumerate(redrawn):
            if new and resample and passed.any():
                drawing = drawing.select(_systematic(passed, torch.rand((), dtype=torch.float64, generator=random)))
                drawing.uniforms, passed = uniforms, torch.zeros_like(passed)  # copies part: each place has its numbers
            drawing.step()
            if new and progress is not None:
                progress(count)
            if not new and any(redrawn[:cell]):
                passed += drawing.logprobs[-1][0].cpu().double()
        sampled = drawing.sampled()
        if passes and any(redrawn):
            tokens = sampled.tokens
            for _ in range(passes):
                tokens = _pass(model, prefix, weights, tokens, redrawn, choice, random, progress)
            logprobs = [_logprobs(model, prefix, text, tokens) for text in range(len(texts))]
            sampled = Sampled(tokens, logprobs[0], logprobs[1] if len(logprobs) > 1 else None)
    return sampled._replace(tokens=sampled.tokens.unflatten(1, model.config.grid))


def _pass(
    model: DALLE,
    prefix: KVCache,
    weights: Sequence[float],
    tokens: Tensor,
    redrawn: Sequence[bool],
    choice: Callable[[Tensor], Tensor],
    random: torch.Generator,
    progress: Callable[[int], None] | None,
) -> Tensor:
    """Candidates (R, N) with each redrawn cell drawn once more: by the probability of all that comes after it, among a
    few tokens drawn from what comes before it and the one that is there. It leaves the distribution as it is in which
    redrawn cells follow the settings, kept ones the plain model, and the kept tokens are what they are."""
    count, texts = len(tokens), range(len(weights))
    after = torch.tensor(redrawn, device=tokens.device)
    for cell in after.nonzero()[:, 0].tolist():
        parts = _parts(model, tokens[:, : cell + 1])
        streams = [torch.cat([_logits(model, prefix, text, some)[:, -1] for some in parts]) for text in texts]
        mixed = sum(weight * stream.double() for weight, stream in zip(weights, streams, strict=True))
        uniforms = torch.rand(count * (PROPOSALS - 1), dtype=torch.float64, generator=random).to(tokens.device)
        fresh = draw(choice(mixed).repeat_interleave(PROPOSALS - 1, 0), uniforms)
        tries = torch.cat([tokens[:, cell, None], fresh.unflatten(0, (count, -1))], 1)  # (R, PROPOSALS)
        pictures = tokens.repeat_interleave(PROPOSALS, 0)
        pictures[:, cell] = tries.flatten()
        fits = [_fit(model, prefix, weights, some, after, cell + 1, choice) for some in _parts(model, pictures)]
        fit = torch.cat(fits).unflatten(0, (count, PROPOSALS))
        fit[:, 0].clamp_(min=-1e300)  # what stands there was possible when it was drawn
        uniforms = torch.rand(count, dtype=torch.float64, generator=random).to(tokens.device)
        tokens = tokens.clone()
        tokens[:, cell] = tries.gather(1, draw(fit, uniforms)[:, None])[:, 0]
        if progress is not None:
            progress(count)
    return tokens


def _fit(
    model: DALLE,
    prefix: KVCache,
    weights: Sequence[float],
    pictures: Tensor,
    redrawn: Tensor,
    start: int,
    choice: Callable[[Tensor], Tensor],
) -> Tensor:
    """float64 (R,): ln p of the cells from `start` on, redrawn ones by the settings, kept ones by the plain model."""
    logits = [_logits(model, prefix, text, pictures)[:, start:] for text in range(len(weights))]
    mixed = sum(weight * each[:, redrawn[start:]].double() for weight, each in zip(weights, logits, strict=True))
    parts = ((logits[0][:, ~redrawn[start:]].double(), ~redrawn[start:]), (choice(mixed), redrawn[start:]))
    return sum(
        part.log_softmax(-1).gather(2, pictures[:, start:][:, where][..., None]).sum((1, 2)) for part, where in parts
    )


def _logprobs(model: DALLE, prefix: KVCache, text: int, tokens: Tensor) -> Tensor:
    """(R, N): ln p of every cell (R, N) of candidates after one of the texts that were read."""
    found = []
    for some in _parts(model, tokens):
        found.append(_logits(model, prefix, text, some).log_softmax(-1).gather(2, some[..., None])[..., 0])
    return torch.cat(found)


def _parts(model: DALLE, tokens: Tensor) -> Sequence[Tensor]:
    """Candidates (R, n), so many at a time that their logits can be held."""
    return tokens.split(max(1, _LOGITS // (tokens.shape[1] * model.config.vocab_image)))


def _logits(model: DALLE, prefix: KVCache, text: int, tokens: Tensor) -> Tensor:
    """(R, n, K) of the first n cells (R, n) of candidates after one of the texts that were read."""
    return model.score(tokens, prefix.select([text] * len(tokens)))


def _systematic(log_weights: Tensor, uniform: Tensor) -> Tensor:
    """int64 (R,): rows in proportion to their weights, each floor or ceil of R times its share; equal ones stay."""
    cdf, rows = log_weights.softmax(0).cumsum(0), len(log_weights)
    places = (torch.arange(rows, dtype=torch.float64) + uniform) * (cdf[-1] / rows)
    return torch.searchsorted(cdf, places, right=True).clamp(max=rows - 1)


@dataclass(frozen=True)
class Drawn:
    """Candidates of a whole canvas, in the order of drawing.

    tokens: int64 (R, h', w'). scores: (R,), higher is better. order: int64 (R,), best first, repetitions of an earlier
    one last.
    """

    tokens: Tensor
    scores: Tensor
    order: Tensor


def draw_canvas(
    model: DALLE,
    text_ids: Tensor,
    canvas: Canvas,
    count: int,
    keep: int,
    score: Callable[[Tensor], Scorer],
    *,
    seed: int = 0,
    **settings: Any,
) -> Drawn:
    """Draw the open cells of a canvas, window by window.

    From each window to the next the `keep` best go on, each in its share of `count` new candidates. A score is the
    sum over all windows.

    Args:
        score: the scorer of pictures of which bool (h, w) cells were redrawn.
        settings: see `redraw`.
    """
    if not (whole(count, 1) and whole(keep, 1, count)):
        raise UserError(f"keep is {keep!r} of count {count!r}", "keep from 1 to as many pictures as are drawn")
    _check_seed(seed)
    (height, width), device = model.config.grid, model.start.device
    chains, scores = canvas.tokens.to(device)[None], torch.zeros(1, device=device)
    for number, (top, left) in enumerate(canvas.windows):
        window = slice(top, top + height), slice(left, left + width)
        grown, drawn, before = [], [], []
        for place, chain in enumerate(chains):
            share = count // len(chains) + (place < count % len(chains))
            own = seed if number == 0 else seeds.key("window", seed, number, place)
            drawn.append(redraw(model, text_ids, chain[window], share, seed=own, **settings))
            grown.append(chain.repeat(share, 1, 1))
            grown[-1][(slice(None), *window)] = drawn[-1].tokens
            before.append(scores[place].expand(share))
        # together, for some scores compare pictures; the same cells are open in all chains
        sampled = Sampled(*(None if part[0] is None else torch.cat(part) for part in zip(*drawn, strict=True)))
        scoring = score(chains[0][window] < 0)
        tokens, totals = torch.cat(grown), torch.cat(before) + scoring(model, text_ids, sampled)
        order = rerank.distinct_first(rerank.rank(totals), tokens)
        chains, scores = tokens[order[:keep]], totals[order[:keep]]
    return Drawn(tokens, totals, order)


# --------------------------------------------------------------------------------------------------------- ranking


def rest(model: DALLE, text_ids: Tensor, sampled: Sampled, *, redrawn: Tensor) -> Tensor:
    """ln p(kept cells | text, all cells before each) of pictures of which bool (h, w) cells were redrawn.

    Weighted by it, candidates that were drawn without resampling follow the exact posterior. A scorer like those of
    `dalle.rerank`, which take the whole picture, kept cells and all.
    """
    return (sampled.logprobs * ~redrawn.flatten().to(sampled.logprobs.device)).sum(1)


# ---------------------------------------------------------------------------------------------------------- pixels


def hidden(picture: Tensor, redrawn: Tensor) -> Tensor:
    """uint8 (3, H, W) with its redrawn patches, bool (h, w), filled from what is around them, pixel by pixel inwards.

    What stood there has no influence. A picture that is redrawn whole becomes grey."""
    kept = ~_pixels(redrawn, picture.shape[1:])
    if not kept.any():
        return torch.full_like(picture, 128)
    return to_uint8(_spread(picture.float() / 255, kept, max(picture.shape))[0])


def paste(picture: Tensor, painted: Tensor, redrawn: Tensor, blend: int = 0) -> Tensor:
    """A picture, uint8 (3, H, W), with the redrawn patches of painted ones, uint8 (B, 3, H, W); of their shape.

    All pixels outside the redrawn patches, bool (h, w), are the picture's, bit for bit.

    Args:
        blend: how far into these patches, pixels, a step of colour at their border is levelled out: by what the picture
            and the painted one differ beside it, less and less with the distance.
    """
    kept = ~_pixels(redrawn, picture.shape[1:])
    if blend and kept.any():
        step, distance = _spread(picture.float() - painted.float(), kept, blend)
        near = (1 - distance / (blend + 1)).clamp(min=0)
        painted = to_uint8((painted.float() + near * step) / 255)
    return torch.where(kept, picture, painted)


def _pixels(cells: Tensor, size: Sequence[int]) -> Tensor:
    """bool (h, w) -> bool (H, W), H and W multiples of h and w."""
    return cells.repeat_interleave(size[0] // len(cells), 0).repeat_interleave(size[1] // cells.shape[1], 1)


def _spread(values: Tensor, known: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Values (..., H, W), of which those where `known`, bool (H, W), go on to their neighbours, as a mean, `steps`
    times, others are 0; and the number of steps (H, W) until each was reached, infinite where none did."""
    values = values * known
    distance = torch.where(known, 0.0, torch.inf)
    for step in range(1, steps + 1):
        if known.all():
            break
        around = F.pad(known.float(), (1, 1, 1, 1))
        number = around[:-2, 1:-1] + around[2:, 1:-1] + around[1:-1, :-2] + around[1:-1, 2:]
        held = F.pad(values, (1, 1, 1, 1))
        sums = held[..., :-2, 1:-1] + held[..., 2:, 1:-1] + held[..., 1:-1, :-2] + held[..., 1:-1, 2:]
        new = ~known & (number > 0)
        values = torch.where(new, sums / number.clamp(min=1), values)
        distance = torch.where(new, float(step), distance)
        known = known | new
    return values, distance


# ----------------------------------------------------------------------------------------------------------- checks


def _check(model: DALLE, known: Tensor, count: int, passes: int) -> None:
    grid, vocab = tuple(model.config.grid), model.config.vocab_image
    if tuple(known.shape) != grid:
        raise UserError(f"known tokens are {tuple(known.shape)}, not {grid}", "give one grid of tokens of this model")
    if known.amin() < -1 or known.amax() >= vocab:
        raise UserError("a known token is none of this model's", f"give a code from 0 to {vocab - 1}, or -1")
    if not whole(count, 1):
        raise UserError(f"count is {count!r}", "ask for 1 picture or more")
    if not whole(passes, 0):
        raise UserError(f"passes is {passes!r}", "give a whole number from 0 on")


def _check_seed(seed: int) -> None:
    if not whole(seed, 0, 2**63 - 1):
        raise UserError(f"seed is {seed!r}", "give a whole number from 0 to 2**63 - 1")
