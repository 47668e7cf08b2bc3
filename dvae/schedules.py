"""Values that move with the training step: temperature, KL weight, learning rate."""

import math
from dataclasses import dataclass

from dvae.errors import UserError


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

    Raises:
        UserError: for values that are not finite, negative counts of updates, or `steps` that lead nowhere.
    """

    start: float
    end: float | None = None
    steps: int = 0
    warmup: int = 0

    def __post_init__(self):
        for name, value in (("start", self.start), ("end", self.end)):
            if value is not None and not math.isfinite(value):
                raise UserError(f"{name} {value} of a schedule is not a finite number", "give a number")
        if self.steps < 0 or self.warmup < 0:
            raise UserError(
                f"steps {self.steps}, warmup {self.warmup} of a schedule",
                "updates are counted from 0: none is negative",
            )
        if self.steps and self.end is None:
            raise UserError(
                f"steps is {self.steps}, but end is null: the schedule stays at its start {self.start}",
                "say at which value it ends, or leave steps away",
            )

    @property
    def least(self) -> float:
        """The lower of its two ends, the warm-up not counted."""
        return self.start if self.end is None else min(self.start, self.end)

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return self.start * (step + 1) / (self.warmup + 1)
        if self.end is None:
            return self.start
        if step - self.warmup >= self.steps:
            return self.end
        way = (step - self.warmup) / self.steps
        return self.end + (self.start - self.end) * 0.5 * (1 + math.cos(math.pi * way))
