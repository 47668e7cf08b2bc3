"""Values that move with the training step: temperature, KL weight, learning rate."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """A half-cosine from `start` to `end` over `steps` updates, constant afterwards.

    The paper names cosine schedules for all three quantities (appendix A.2) without a formula; the half-cosine
    0.5 (1 + cos(pi t)) is our reading.

    Args:
        start: value at step 0 (after the warm-up, if there is one).
        end: value from `steps` on; null keeps `start` for ever.
        steps: updates that the way from `start` to `end` takes, the warm-up not counted.
        warmup: updates of a linear rise from 0 to `start` that come first.
    """

    start: float
    end: float | None = None
    steps: int = 0
    warmup: int = 0

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return self.start * (step + 1) / (self.warmup + 1)
        if self.end is None:
            return self.start
        if step - self.warmup >= self.steps:
            return self.end
        way = (step - self.warmup) / self.steps
        return self.end + (self.start - self.end) * 0.5 * (1 + math.cos(math.pi * way))
