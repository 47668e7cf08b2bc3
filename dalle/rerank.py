"""Scores of drawn pictures without CLIP, from the model that drew them; ranking is a separate, last line.

Every scorer has one signature, (model, text_ids (1, T), sampled) -> (N,), and higher is better. It knows the model, the
ids, the tokens and at most a sample of captions that the trained artefact carries: no pixels, no words, no grammar.

| score      | formula                                  | says                                                     |
|------------|------------------------------------------|----------------------------------------------------------|
| none       | 0                                        | keeps the order of drawing                               |
| likelihood | ln p(i given y)                          | likely pictures first; prefers plain, uniform ones       |
| pmi        | ln p(i given y) - ln p(i given null)     | how much the caption explains; cancels plainness         |
| half-pmi   | ln p(i given y) - 1/2 ln p(i given null) | likely, but for the caption rather than in general       |
| contrast   | ln p(i given y) - ln mean p(i given y_k) | this caption rather than its nearest neighbours y_k      |
| caption    | ln p(y given i)                          | reading the picture first, the model says these words    |
| combined   | caption and others of these, see below   | what is right most often                                 |

`contrast` is the posterior of the caption among its neighbours, up to a constant; the mean is over y and all y_k.
`caption` needs a model of both orders. To subtract ln p(y) from it, as one must between captions, changes nothing
between the pictures of one caption.

`combined` has weights that were fitted for the model, or else is caption + min(0, likelihood in standard deviations
from its mean), both taken over the N pictures: what is less likely than its rivals may be broken, what is likelier is
only plainer. Deviations, because how far likelihoods lie apart is a matter of the data: some nats between drawn scenes
of 16 cells, forty between photos of 64. Such a score compares pictures that were scored together, and no others.

A name followed by `-seen` judges what a viewer will see: the tokens that the image tokenizer reads in the painted
picture, not those that were drawn. What the decoder has spoilt shows there only.

Shapes: P captions, N pictures, T text ids.
"""

import functools
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dalle.model import DALLE
from dalle.sampling import Sampled
from dvae.errors import UserError

Scorer = Callable[[DALLE, Tensor, Sampled], Tensor]

NEIGHBOURS = 4

SEEN, COMBINED = "-seen", "combined"

_LOGITS = 2**25  # numbers that one scoring pass may hold as logits, 128 MB in float32


class Evidence:
    """What a model says about N pictures of one caption. Each part is computed when it is first asked for, and once.

    Args:
        text_ids: int64 (1, T).
        captions_ids: int64 (M, T), the sample of captions that rivals are taken from.
        null_ids: int64 (1, T), the null prompt.
        repaint: tokens (N, h, w) -> the tokens that the image tokenizer reads in the painted pictures.
        weights: of other scores in `combined`; without them it is the default.
    """

    def __init__(
        self,
        model: DALLE,
        text_ids: Tensor,
        sampled: Sampled,
        captions_ids: Tensor | None = None,
        null_ids: Tensor | None = None,
        repaint: Callable[[Tensor], Tensor] | None = None,
        weights: Mapping[str, float] | None = None,
    ):
        self.model, self.text_ids, self.sampled = model, text_ids, sampled
        self.captions_ids, self.null_ids, self.repaint, self.weights = captions_ids, null_ids, repaint, weights

    @functools.cached_property
    def likelihood(self) -> Tensor:
        """From sampling, or from one more pass for tokens that were not drawn."""
        if self.sampled.logprobs is not None:
            return self.sampled.logprobs.sum(1)
        return log_likelihoods(self.model, self.text_ids, self.sampled.tokens)[0]

    @functools.cached_property
    def null(self) -> Tensor:
        """ln p(i given null), from sampling where guidance computed it, else from one more pass."""
        if self.sampled.null is not None:
            return self.sampled.null.sum(1)
        return log_likelihoods(self.model, self.null_ids, self.sampled.tokens)[0]

    @functools.cached_property
    def contrast(self) -> Tensor:
        rivals = nearest(self.text_ids, self.captions_ids, NEIGHBOURS, self.model.config.vocab_text)
        everyone = torch.cat([self.likelihood[None], log_likelihoods(self.model, rivals, self.sampled.tokens)])
        return self.likelihood - (everyone.logsumexp(0) - math.log(len(everyone)))

    @functools.cached_property
    def caption(self) -> Tensor:
        return text_log_likelihoods(self.model, self.text_ids, self.sampled.tokens)[0]

    @functools.cached_property
    def seen(self) -> "Evidence":
        """The same of the tokens that are read in the painted pictures."""
        tokens = Sampled(self.repaint(self.sampled.tokens), None, None)
        return Evidence(self.model, self.text_ids, tokens, self.captions_ids, self.null_ids)

    def score(self, name: str) -> Tensor:
        """The score of that name, (N,)."""
        if name == COMBINED and not self.weights:
            return self.caption + in_deviations(self.likelihood).clamp(max=0)
        if name == COMBINED:
            return sum(weight * self.score(part) for part, weight in self.weights.items())
        if name.endswith(SEEN):
            return self.seen.score(name.removesuffix(SEEN))
        return SCORES[name](self)


SCORES: dict[str, Callable[[Evidence], Tensor]] = {
    "none": lambda e: torch.zeros(len(e.sampled.tokens), device=e.sampled.tokens.device),
    "likelihood": lambda e: e.likelihood,
    "pmi": lambda e: e.likelihood - e.null,
    "half-pmi": lambda e: e.likelihood - e.null / 2,
    "contrast": lambda e: e.contrast,
    "caption": lambda e: e.caption,
}


@torch.inference_mode()
def log_likelihoods(model: DALLE, text_ids: Tensor, tokens: Tensor) -> Tensor:
    """ln p(picture | caption), (P, N), of every picture (N, h, w) under every caption (P, T).

    Each caption is read once; pairs are then scored in one teacher-forced pass for as many as fit.
    """
    pictures = len(tokens)
    prefix = model.prefill(text_ids)
    pairs = torch.arange(len(text_ids) * pictures)
    sums = [torch.empty(0, device=tokens.device)]
    for rows in pairs.split(max(1, _LOGITS // (math.prod(model.config.grid) * model.config.vocab_image))):
        targets = tokens[(rows % pictures).to(tokens.device)]  # (R, h, w)
        logits = model.score(targets, prefix.select(rows // pictures))
        sums.append(logits.log_softmax(-1).gather(2, targets.flatten(1)[..., None]).sum((1, 2)))
    return torch.cat(sums).unflatten(0, (len(text_ids), pictures))


@torch.inference_mode()
def text_log_likelihoods(model: DALLE, text_ids: Tensor, tokens: Tensor) -> Tensor:
    """ln p(caption | picture), (P, N), of all words and of the first pad, which says that the caption ends there.

    Each picture is read once; pairs are then scored in one teacher-forced pass for as many as fit. It takes a model of
    both orders.
    """
    texts, pictures, c = len(text_ids), len(tokens), model.config
    told = spoken(text_ids, c.vocab_text)
    text_ids, told = text_ids[:, : told.sum(1).max()], told[:, : told.sum(1).max()]
    prefix = model.prefill_image(tokens)
    pairs = torch.arange(texts * pictures)
    sums = [torch.empty(0, device=tokens.device)]
    for rows in pairs.split(max(1, _LOGITS // (text_ids.shape[1] * (c.vocab_text + c.text_length)))):
        of_text = (rows // pictures).to(text_ids.device)
        targets = text_ids[of_text]  # (R, n)
        logits = model.score_text(targets, prefix.select(rows % pictures))
        logprobs = logits.log_softmax(-1).gather(2, targets[..., None])[..., 0]
        sums.append(logprobs.where(told[of_text], 0).sum(1))
    return torch.cat(sums).unflatten(0, (texts, pictures))


def in_deviations(scores: Tensor) -> Tensor:
    """(N,) -> (N,): how many standard deviations, of 0.01 at the least, above the mean. What is not finite is left out
    of both, and stays what it is."""
    finite = scores[scores.isfinite()]
    deviation = (finite - finite.mean()).square().mean().sqrt()
    return (scores - finite.mean()) / deviation.clamp_min(0.01)


def spoken(text_ids: Tensor, vocab_text: int) -> Tensor:
    """bool (P, T): the words of texts (P, T), and the first pad, which ends each; what comes after it is certain."""
    words = text_ids < vocab_text
    return words | (words.cumsum(1) == torch.arange(text_ids.shape[1], device=words.device))


def nearest(text_ids: Tensor, captions_ids: Tensor, k: int, vocab_text: int) -> Tensor:
    """The at most k captions (k, T) of a sample (M, T) that share most of their tokens with text_ids (1, T).

    Nearness is |shared| / |either| of the two sets of tokens, pads left out; of equally near ones the first come first.
    Copies of the prompt and repetitions are left out; another order of the same words is as near as can be.
    """
    prompt = tuple(text_ids[0].tolist())
    own = {i for i in prompt if i < vocab_text}

    def nearness(caption: tuple[int, ...]) -> float:
        other = {i for i in caption if i < vocab_text}
        return len(own & other) / max(1, len(own | other))

    others = dict.fromkeys(map(tuple, captions_ids.tolist()))  # a set that keeps the order
    others.pop(prompt, None)
    chosen = sorted(others, key=nearness, reverse=True)[:k]
    return torch.tensor(chosen, dtype=torch.int64, device=text_ids.device).reshape(-1, text_ids.shape[1])


NAMES: tuple[str, ...] = (*SCORES, *(name + SEEN for name in SCORES if name != "none"), COMBINED)


def scorer(
    name: str,
    captions_ids: Tensor | None = None,
    null_ids: Tensor | None = None,
    repaint: Callable[[Tensor], Tensor] | None = None,
    weights: Mapping[str, float] | None = None,
    both_orders: bool = True,
) -> Scorer:
    """The scorer of that name.

    Args:
        captions_ids, null_ids, repaint: see `Evidence`; what is None cannot be used.
        weights: of other scores in `combined`; without them it is the default.
        both_orders: whether the model that will be asked reads pictures first, too.
    Raises:
        UserError: there is no such score, or something that it needs is not there.
    """
    if name not in NAMES:
        raise UserError(f"there is no score named {name!r}", f"choose one of {', '.join(NAMES)}")
    for part in (weights or ("caption", "likelihood")) if name == COMBINED else (name,):
        plain = part.removesuffix(SEEN)
        if plain == "caption" and not both_orders:
            raise UserError(
                f"this model draws but does not caption, and {name} asks it to",
                "rank by another score, or train it with --model.image_first.share 0.25",
            )
        lacks = (plain in ("pmi", "half-pmi") and null_ids is None) or (plain != part and repaint is None)
        if lacks or (plain == "contrast" and (captions_ids is None or not len(captions_ids))):
            raise UserError(f"this model carries nothing to rank by {part} with", "rank by likelihood or none")

    def score(model: DALLE, text_ids: Tensor, sampled: Sampled) -> Tensor:
        return Evidence(model, text_ids, sampled, captions_ids, null_ids, repaint, weights).score(name)

    return score


def partly(null_ids: Tensor | None) -> Scorer:
    """What can be said of unfinished pictures, whose tokens are (R, cells), for nothing: half-pmi of the cells so far,
    or likelihood without a null prompt (1, T)."""
    return scorer("likelihood" if null_ids is None else "half-pmi", null_ids=null_ids)


def stages(count: int, cells: int) -> tuple[tuple[int, int], ...]:
    """When early pruning leaves pictures behind: (cells drawn, pictures that go on). Of 64 pictures 24 go on after a
    quarter of the cells and 12 after half of them, which is 44 % of the work."""
    halts = ((cells // 4, math.ceil(3 * count / 8)), (cells // 2, math.ceil(3 * count / 16)))
    return tuple((cell, keep) for cell, keep in halts if cell)


def rank(scores: Tensor) -> Tensor:
    """int64 (N,): indices of the pictures, best first; equals keep their order, and what is not a number comes last."""
    return torch.argsort(-scores, stable=True)


def distinct_first(order: Tensor, tokens: Tensor) -> Tensor:
    """int64 (N,): an order of pictures (N, h, w) with each repetition of an earlier one moved to the end."""
    seen: set[bytes] = set()
    first, again = [], []
    for k in order.tolist():
        picture = tokens[k].cpu().numpy().tobytes()
        (again if picture in seen else first).append(k)
        seen.add(picture)
    return torch.tensor(first + again)
