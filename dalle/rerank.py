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

`contrast` is the posterior of the caption among its neighbours, up to a constant; the mean is over y and all y_k.

Shapes: P captions, N pictures, T text ids.
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from dalle.model import DALLE
from dalle.sampling import Sampled
from dvae.errors import UserError

Scorer = Callable[[DALLE, Tensor, Sampled], Tensor]

_LOGITS = 2**25  # numbers that one scoring pass may hold as logits, 128 MB in float32
NEIGHBOURS = 4


def none(model: DALLE, text_ids: Tensor, sampled: Sampled) -> Tensor:
    return torch.zeros(len(sampled.tokens), device=sampled.logprobs.device)


def likelihood(model: DALLE, text_ids: Tensor, sampled: Sampled) -> Tensor:
    return sampled.logprobs.sum(1)


def pmi(model: DALLE, text_ids: Tensor, sampled: Sampled, *, null_ids: Tensor, weight: float = 1.0) -> Tensor:
    """The null prompt's share is taken from `sampled` where guidance computed it, else from one more pass."""
    null = log_likelihoods(model, null_ids, sampled.tokens)[0] if sampled.null is None else sampled.null.sum(1)
    return sampled.logprobs.sum(1) - weight * null


def contrast(model: DALLE, text_ids: Tensor, sampled: Sampled, *, captions_ids: Tensor) -> Tensor:
    """Against the 4 nearest other captions of the sample `captions_ids` (M, T)."""
    rivals = nearest(text_ids, captions_ids, NEIGHBOURS, model.config.vocab_text)
    own = sampled.logprobs.sum(1)
    everyone = torch.cat([own[None], log_likelihoods(model, rivals, sampled.tokens)])  # (K + 1, N)
    return own - (everyone.logsumexp(0) - math.log(len(everyone)))


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
    """ln p(caption | picture), (P, N), pads counted: they say that the caption ends where it does.

    Each picture is read once; pairs are then scored in one teacher-forced pass for as many as fit. Needs a model of both
    orders.
    """
    texts, pictures = len(text_ids), len(tokens)
    prefix = model.prefill_image(tokens)
    pairs = torch.arange(texts * pictures)
    sums = [torch.empty(0, device=tokens.device)]
    ids_all = model.config.vocab_text + model.config.text_length
    for rows in pairs.split(max(1, _LOGITS // (model.config.text_length * ids_all))):
        targets = text_ids[(rows // pictures).to(text_ids.device)]  # (R, T)
        logits = model.score_text(targets, prefix.select(rows % pictures))
        sums.append(logits.log_softmax(-1).gather(2, targets[..., None]).sum((1, 2)))
    return torch.cat(sums).unflatten(0, (texts, pictures))


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


def scorer(name: str, captions_ids: Tensor | None = None, null_ids: Tensor | None = None) -> Scorer:
    """The scorer of that name, with what it needs: `contrast` a sample of captions (M, T), `pmi` the null prompt."""
    if name in ("pmi", "half-pmi") and null_ids is not None:
        return functools.partial(pmi, null_ids=null_ids, weight=1.0 if name == "pmi" else 0.5)
    if name == "contrast" and captions_ids is not None and len(captions_ids):
        return functools.partial(contrast, captions_ids=captions_ids)
    if name in ("pmi", "half-pmi", "contrast"):
        raise UserError(f"this model carries nothing to rank by {name} with", "rank by likelihood or none")
    if name not in ("none", "likelihood"):
        raise UserError(f"there is no score named {name!r}", "choose one of none, likelihood, pmi, half-pmi, contrast")
    return {"none": none, "likelihood": likelihood}[name]


def rank(scores: Tensor) -> Tensor:
    """int64 (N,): indices of the pictures, best first; equals keep their order, and what is not a number comes last."""
    return torch.argsort(-scores, stable=True)
