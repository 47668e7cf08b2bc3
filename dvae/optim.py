"""What moves the weights: AdamW as the paper runs it, Muon beside it, and the step size over updates.

Knows parameters by name and number of dimensions, and losses as numbers; neither Lightning nor what a model is.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from dvae.errors import UserError
from dvae.schedules import Schedule


@dataclass(frozen=True)
class Plateau:
    """When the step size is halved because the training loss has stopped falling.

    The paper (B.2) tells that this was done and how often, not by which rule; this one is ours. After the warm-up the
    loss is averaged over one window of updates after the other. A mean that lies below the best one so far by more than
    `threshold` of it is the new best one; `patience` windows in a row that bring none halve the step size, and the
    count of windows begins anew.

    Args:
        window: updates whose losses are averaged.
        patience: windows without an improvement after which the step size is halved.
        threshold: the least improvement that counts, as a share of the best mean.
        halvings: how often the step size is halved at the most (the paper: 5, to a 32nd).

    Raises:
        UserError: for counts below 1 and a threshold outside [0, 1).
    """

    window: int = 1000
    patience: int = 10
    threshold: float = 1e-3
    halvings: int = 5

    def __post_init__(self):
        for name in ("window", "patience", "halvings"):
            if getattr(self, name) < 1:
                raise UserError(f"plateau.{name} is {getattr(self, name)}", "give a whole number from 1 on")
        if not 0 <= self.threshold < 1:
            raise UserError(f"plateau.threshold is {self.threshold}", "give a share from 0 to below 1, such as 0.001")


@dataclass(frozen=True)
class Optimiser:
    """AdamW, or Muon beside it, and what moves the step size.

    Biases, gains and other vectors are never decayed; matrices, convolutions and embeddings are. The paper does not say
    which are; this is the rule of openai/distribution_augmentation, code of the same group.

    Args:
        learning_rate: step size as a schedule over updates.
        weight_decay: AdamW's multiplier.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the root of the second moment.
        muon: let torch's Muon move the matrices inside the transformer's blocks, with the same step size and decay;
            AdamW moves the rest. Not in the paper.
        clip: largest norm of the whole gradient; null does not clip.
        second_moment_clip: largest value of AdamW's running second moment, to which it is cut after each update (the
            paper's stage 2: 5); null does not cut.
        plateau: halves the step size where the training loss stops falling; null does not.
        ema: decay of the averaged weights that are validated and kept; null keeps the last weights instead.
        ema_every: the averaged weights follow after the first update, which they copy, and then after every so many
            (the paper's stage 2: 25).

    Raises:
        UserError: for values out of their range, and for settings that contradict each other.
    """

    learning_rate: Schedule
    weight_decay: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    muon: bool = False
    clip: float | None = None
    second_moment_clip: float | None = None
    plateau: Plateau | None = None
    ema: float | None = 0.999
    ema_every: int = 1

    def __post_init__(self):
        rate = self.learning_rate
        allowed = {
            "weight_decay": (self.weight_decay >= 0, "a number from 0 on, such as 1e-4"),
            "beta1": (0 <= self.beta1 < 1, "a number from 0 to below 1, such as 0.9"),
            "beta2": (0 <= self.beta2 < 1, "a number from 0 to below 1, such as 0.999"),
            "eps": (self.eps >= 0, "a number from 0 on, such as 1e-8"),
            "clip": (self.clip is None or self.clip > 0, "a number above 0, such as 4, or null"),
            "second_moment_clip": (
                self.second_moment_clip is None or self.second_moment_clip > 0,
                "a number above 0, such as 5, or null",
            ),
            "ema": (self.ema is None or 0 <= self.ema < 1, "a number from 0 to below 1, such as 0.999, or null"),
            "ema_every": (self.ema_every >= 1, "a whole number from 1 on"),
        }
        for name, (holds, values) in allowed.items():
            if not holds:
                raise UserError(f"optimiser.{name} is {getattr(self, name)}", f"give {values}")
        if rate.least < 0:
            raise UserError(
                f"optimiser.learning_rate goes from {rate.start} to {rate.end}", "give step sizes from 0 on"
            )
        if self.ema is None and self.ema_every != 1:
            raise UserError(
                f"optimiser.ema_every is {self.ema_every}, but optimiser.ema is null: no weights are averaged",
                "set ema, such as 0.99, or leave ema_every away",
            )
        if self.plateau is not None and rate.end is not None:
            raise UserError(
                f"optimiser.plateau halves the step size, and learning_rate.end {rate.end} lets it fall as well",
                "set learning_rate.end to null and its steps to 0 (constant after the warm-up), or plateau to null",
            )

    def build(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        """One optimiser over all parameters of `model` that are trained.

        Raises:
            UserError: for Muon and a model without matrices whose names begin with `blocks.`.
        """
        rate = self.learning_rate(0)
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        hidden = {name for name, p in named.items() if self.muon and p.ndim == 2 and name.startswith("blocks.")}
        rest = [p for name, p in named.items() if name not in hidden]
        groups = [
            {"params": [p for p in rest if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
        ]
        adamw = torch.optim.AdamW(groups, lr=rate, betas=(self.beta1, self.beta2), eps=self.eps, fused=True)
        adamw._step_supports_amp_scaling = False  # let a loss scaler undo its scale before the gradient is clipped
        if self.second_moment_clip is not None:
            adamw.register_step_post_hook(self.cut_second_moments)
        if not self.muon:
            return adamw
        if not hidden:
            raise UserError("muon is set, but this model has no matrices inside blocks", "set optimiser.muon to false")
        matrices = [named[name] for name in sorted(hidden)]
        muon = torch.optim.Muon(matrices, lr=rate, weight_decay=self.weight_decay, adjust_lr_fn="match_rms_adamw")
        return Together(muon, adamw)

    @torch.no_grad()
    def cut_second_moments(self, adamw: torch.optim.AdamW, *_: Any) -> None:
        for group in adamw.param_groups:
            for parameter in group["params"]:
                if parameter in adamw.state:  # one that has had a gradient
                    adamw.state[parameter]["exp_avg_sq"].clamp_(max=self.second_moment_clip)


class Together(torch.optim.Optimizer):
    """Several optimisers that step and are saved as one: Lightning's automatic optimisation knows only one."""

    def __init__(self, *parts: torch.optim.Optimizer):
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.share()

    def share(self) -> None:
        """Let every part see its own groups and the common state."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.share()

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss


class StepSize:
    """The step size of every update: what the schedule says, halved as often as the plateaus of the loss ask for."""

    def __init__(self, schedule: Schedule, plateau: Plateau | None):
        self.schedule, self.plateau = schedule, plateau
        self.halved = 0
        self.best = math.nan  # mean loss of a window; NaN before the first one
        self.stale = 0  # windows in a row without a new best one
        self.total, self.count = 0.0, 0  # of the losses in the window that is open

    def __call__(self, update: int) -> float:
        return self.schedule(update) * 0.5**self.halved

    def see(self, update: int, loss: float) -> bool:
        """Take in the loss of an update (from 0); true where the step size is halved from the next one on."""
        plateau = self.plateau
        if plateau is None or update < self.schedule.warmup or self.halved == plateau.halvings:
            return False
        self.total, self.count = self.total + loss, self.count + 1
        if self.count < plateau.window:
            return False
        mean = self.total / self.count
        self.total, self.count = 0.0, 0
        if math.isnan(self.best) or self.best - mean > plateau.threshold * abs(self.best):
            self.best, self.stale = mean, 0
            return False
        self.stale += 1
        if self.stale < plateau.patience:
            return False
        self.halved, self.stale = self.halved + 1, 0
        return True

    def state_dict(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in ("halved", "best", "stale", "total", "count")}

    def load_state_dict(self, state: dict[str, float]) -> None:
        vars(self).update(state)
