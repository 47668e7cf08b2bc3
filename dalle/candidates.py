"""Captions -> candidates -> verdicts: how many pictures show what their caption says, and what ranking adds.

A judge sees pixels and captions only, never a score; the rankers never see its verdicts. For scenes it is exact
(`dvae.scenes.judge`).

P prompts, N candidates of each.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dalle.pipeline import Pipeline
from dalle.sampling import Sampled
from dvae import scenes, seeds
from dvae.images import to_uint8

Judge = Callable[[Tensor, Sequence[str]], Sequence[bool]]  # pictures (B, 3, H, W) in [0, 1], a caption for each
PixelScorer = Callable[[Tensor, str], Tensor]  # pictures (N, 3, H, W) in [0, 1] of one caption -> (N,)

SIDE = 16  # pixels of a picture that is compared with another, so that a shift by a pixel counts little

_RESAMPLED = 2000  # times that prompts are drawn anew for an interval


@dataclass(frozen=True)
class Settings:
    """How candidates are drawn."""

    temperature: float = 1.0
    guidance: float = 1.0


@dataclass(frozen=True)
class Candidates:
    """N pictures for each of P captions, judged, and what each ranker says of them.

    images: uint8 `(P, N, 3, H, W)`. exact: bool `(P, N)`, whether a picture shows its caption.
    scores: by ranker, `(P, N)`, higher is better; of all N together, also where the best of fewer is asked for.
    """

    captions: list[str]
    images: Tensor
    exact: Tensor
    scores: dict[str, Tensor] = field(default_factory=dict)

    def share(self, ranker: str, n: int | None = None) -> "Share":
        """Of the prompts, how many are truly shown by the best of n candidates (None: of all N) of that ranker.

        The N candidates are N / n groups of n, and each group's best one counts as much.
        """
        groups, exact = self._groups(self.scores[ranker], n), self._groups(self.exact.float(), n)
        first = torch.argsort(-groups, dim=2, stable=True)[..., :1]  # what is not a number comes last
        return _share(exact.gather(2, first)[..., 0])

    def best(self, ranker: str) -> Tensor:
        """int64 (P,): the candidate that the ranker likes best."""
        return torch.argsort(-self.scores[ranker], dim=1, stable=True)[:, 0]

    @property
    def single(self) -> "Share":
        """Of all candidates: picking one by chance. The N of a prompt share its difficulty, so the interval counts
        prompts, not pictures."""
        return _share(self.exact.float())

    def ceiling(self, n: int | None = None) -> "Share":
        """Of the prompts with at least one true one among n candidates: what a perfect ranker would reach."""
        return _share(self._groups(self.exact.float(), n).amax(2))

    def gap(self, ranker: str, n: int | None = None) -> tuple[float, float, float] | None:
        """How much of the way from picking by chance (0) to the ceiling (1) a ranker goes, and a 95 % interval.

        The interval is that of the bootstrap over prompts. None where there is no way to go.
        """
        groups, exact = self._groups(self.scores[ranker], n), self._groups(self.exact.float(), n)
        first = torch.argsort(-groups, dim=2, stable=True)[..., :1]
        columns = exact.mean((1, 2)), exact.gather(2, first).mean((1, 2)), exact.amax(2).mean(1)
        chance, chosen, most = (column.double().numpy() for column in columns)
        if not (most > chance).any():
            return None
        rows = seeds.rng("gap", len(chance)).integers(len(chance), size=(_RESAMPLED, len(chance)))
        with np.errstate(invalid="ignore", divide="ignore"):
            shares = (chosen[rows] - chance[rows]).mean(1) / (most[rows] - chance[rows]).mean(1)
        value = (chosen - chance).mean() / (most - chance).mean()
        low, high = np.nanquantile(shares, (0.025, 0.975))  # nan of prompts that all have no way to go
        return float(value), float(low), float(high)

    def _groups(self, values: Tensor, n: int | None) -> Tensor:  # (P, N) -> (P, N // n, n)
        n = values.shape[1] if n is None else n
        return values[:, : values.shape[1] // n * n].unflatten(1, (-1, n))


@dataclass(frozen=True)
class Share:
    """A proportion with Wilson's 95 % interval."""

    hits: float
    trials: int

    @property
    def value(self) -> float:
        return self.hits / self.trials

    @property
    def interval(self) -> tuple[float, float]:
        z, n, p = 1.959964, self.trials, self.value
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return max(0.0, centre - half), min(1.0, centre + half)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.value:5.1f} % [{100 * low:.1f}, {100 * high:.1f}]"

    def json(self) -> dict[str, float]:
        low, high = self.interval
        return {"value": self.value, "low": low, "high": high, "trials": self.trials}


def _share(hits: Tensor) -> Share:
    """Of hits (P, ...) in [0, 1]; those of one prompt are one trial."""
    return Share(float(hits.flatten(1).mean(1).double().sum()), len(hits))


def judge_scenes(pictures: Tensor, captions: Sequence[str]) -> list[bool]:
    """The exact judge of drawn scenes."""
    return [verdict.exact for verdict in scenes.judge(pictures, captions)]


def small(pictures: Tensor) -> Tensor:
    """uint8 `(B, 3, H, W)` -> float `(B, 3 SIDE SIDE)` in [0, 1]."""
    return F.adaptive_avg_pool2d(pictures.float() / 255, SIDE).flatten(1)


def diversity(images: Tensor) -> float:
    """How different the candidates of a prompt are, uint8 `(P, N, 3, H, W)`: the mean over prompts and pairs of the
    root mean square difference of two, reduced to 16 x 16 pixels; 0 for equal ones, 1 is black against white."""
    count = images.shape[1]
    if count < 2:
        return math.nan
    points = small(images.flatten(0, 1)).unflatten(0, (-1, count))  # (P, N, D)
    apart = torch.cdist(points, points) / points.shape[2] ** 0.5
    return float(apart.sum((1, 2)).mean() / (count * (count - 1)))


@torch.inference_mode()
def draw_and_judge(
    pipeline: Pipeline,
    captions: Sequence[str],
    count: int,
    prompt_seeds: Sequence[int],
    settings: Settings,
    rankers: Sequence[str],
    progress: Callable[[int], None] | None = None,
    judge: Judge = judge_scenes,
    pixel_scorers: Mapping[str, PixelScorer] | None = None,
    told: Sequence[str] | None = None,
) -> Candidates:
    """Draw `count` candidates for each caption, let every ranker score them, and judge all pictures.

    Args:
        progress: called with the number of prompts that are done.
        pixel_scorers: further rankers, from outside, that see the painted pictures.
        told: captions that the rankers are told instead of those that were drawn from and are judged by: a control.
    """
    images, exact = [], []
    scores: dict[str, list[Tensor]] = {name: [] for name in (*rankers, *(pixel_scorers or {}))}
    together = max(1, 256 // count)  # prompts sampled at a time
    for first in range(0, len(captions), together):
        some = list(captions[first : first + together])
        sampled = pipeline.sample(some, count, list(prompt_seeds[first : first + together]), **asdict(settings))
        pictures = to_uint8(pipeline.tokenizer.decode(sampled.tokens))
        exact += judge(pictures.float() / 255, [caption for caption in some for _ in range(count)])
        images.append(pictures.unflatten(0, (len(some), count)))
        for k, caption in enumerate(some):
            rows = slice(k * count, (k + 1) * count)
            mine = Sampled(*(None if part is None else part[rows] for part in sampled))
            if told is not None:
                caption = told[first + k]
                mine = Sampled(mine.tokens, None, None)
            evidence = pipeline.evidence(pipeline.text.encode(caption), mine)
            for name in rankers:
                scores[name].append(evidence.score(name))
            for name, score in (pixel_scorers or {}).items():
                scores[name].append(score(pictures[rows].float() / 255, caption))
        if progress is not None:
            progress(len(some))
    return Candidates(
        list(captions),
        torch.cat(images),
        torch.tensor(exact).unflatten(0, (len(captions), count)),
        {name: torch.stack(rows).float() for name, rows in scores.items()},
    )


def fit(drawn: Sequence[Candidates], names: Sequence[str], ridge: float = 0.01) -> dict[str, float] | None:
    """Weights of the scores in `combined`, from candidates that were judged.

    The model of choice is a softmax over the candidates of a prompt of the weighted sum of their scores; what is made
    likely is that a true one is chosen (conditional logit). Prompts whose candidates are all true, or none, teach
    nothing; where there are no others, there are no weights. They are not negative: a score that seems to mislead on so
    few prompts is left out rather than turned.

    Args:
        names: of the scores.
        ridge: times the sum of squared weights, each of a score whose deviation within prompts is 1, is added to the
            mean loss.
    """
    scores = torch.cat([torch.stack([part.scores[name] for name in names], 2) for part in drawn]).double()  # (P, N, F)
    exact = torch.cat([part.exact for part in drawn])
    useful = exact.any(1) & ~exact.all(1)
    if not useful.any():
        return None
    scores, exact = scores[useful], exact[useful]
    centred = scores - scores.mean(1, keepdim=True)
    unit = centred.square().mean((0, 1)).sqrt().clamp_min(1e-9)
    centred /= unit
    raw = torch.zeros(len(names), dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([raw], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        log_p = (centred @ F.softplus(raw)).log_softmax(1)
        value = -log_p.masked_fill(~exact, -math.inf).logsumexp(1).mean()
        value = value + ridge * F.softplus(raw).square().sum()
        value.backward()
        return value

    search.step(loss)
    strengths = F.softplus(raw).detach()  # of scores of one deviation, so that their units do not matter
    kept = (strengths > 0.01 * strengths.max()).nonzero()[:, 0].tolist()
    weights = (strengths / unit)[kept]
    return {names[k]: float(f"{w:.4g}") for k, w in zip(kept, (weights / weights.max()).tolist(), strict=True)}
