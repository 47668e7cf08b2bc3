"""Captions -> candidates -> verdicts: how many pictures show what their caption says, and what ranking adds.

The judge is exact and sees pixels only (`dvae.scenes.judge`); the rankers never see its verdicts.

P prompts, N candidates of each.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dalle.pipeline import Pipeline
from dalle.rerank import rank
from dalle.sampling import Sampled
from dvae import scenes


@dataclass(frozen=True)
class Settings:
    """How candidates are drawn."""

    temperature: float = 1.0
    guidance: float = 1.0


@dataclass(frozen=True)
class Candidates:
    """N pictures for each of P captions, judged, and where each ranker put its trust.

    images: `(P, N, 3, H, W)` in [0, 1]. exact: bool `(P, N)`. reasons: why not, `P x N`.
    best: for each ranker, int64 `(P,)`, the candidate that it likes best.
    """

    captions: list[str]
    images: Tensor
    exact: Tensor
    reasons: list[list[str]]
    best: dict[str, Tensor]

    def share(self, ranker: str) -> "Share":
        """Of the prompts, how many are truly shown by the candidate that the ranker chose."""
        chosen = self.exact.gather(1, self.best[ranker][:, None])
        return Share(int(chosen.sum()), len(chosen))

    @property
    def single(self) -> "Share":
        """Of all candidates. The N of a prompt share its difficulty, so the interval counts prompts, not pictures."""
        prompts = len(self.exact)
        return Share(float(self.exact.float().mean()) * prompts, prompts)

    @property
    def ceiling(self) -> "Share":
        """Of the prompts with at least one true candidate: what a perfect ranker would reach."""
        return Share(int(self.exact.any(1).sum()), len(self.exact))


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


@torch.inference_mode()
def draw_and_judge(
    pipeline: Pipeline,
    captions: Sequence[str],
    count: int,
    seeds: Sequence[int],
    settings: Settings,
    rankers: Sequence[str],
    progress: Callable[[int], None] | None = None,
) -> Candidates:
    """Draw `count` candidates for each caption of scenes, let every ranker choose, and judge all pictures.

    Args:
        progress: called with the number of prompts that are done.
    """
    images, exact, reasons = [], [], []
    best: dict[str, list[int]] = {name: [] for name in rankers}
    scorers = {name: pipeline.scorer(name) for name in rankers}
    together = max(1, 256 // count)  # prompts sampled at a time
    for first in range(0, len(captions), together):
        some = list(captions[first : first + together])
        sampled = pipeline.sample(
            some,
            count,
            list(seeds[first : first + together]),
            temperature=settings.temperature,
            guidance=settings.guidance,
        )
        pictures = pipeline.tokenizer.decode(sampled.tokens)
        verdicts = scenes.judge(pictures, [caption for caption in some for _ in range(count)])
        images.append(pictures.unflatten(0, (len(some), count)))
        exact += [v.exact for v in verdicts]
        reasons += [v.reason for v in verdicts]
        for k, caption in enumerate(some):
            rows = slice(k * count, (k + 1) * count)
            mine = Sampled(*(None if part is None else part[rows] for part in sampled))
            ids = pipeline.text.encode(caption)
            for name, score in scorers.items():
                best[name].append(int(rank(score(pipeline.model, ids, mine))[0]))
        if progress is not None:
            progress(len(some))
    return Candidates(
        list(captions),
        torch.cat(images),
        torch.tensor(exact).unflatten(0, (len(captions), count)),
        [reasons[k : k + count] for k in range(0, len(reasons), count)],
        {name: torch.tensor(chosen) for name, chosen in best.items()},
    )
