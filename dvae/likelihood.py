"""How likely a picture is under what the decoder says of it: three likelihoods with one signature.

Each takes the decoder's raw output `(B, channels, H, W)` and images `(B, 3, H, W)` in [0, 1]. `nll` is a true negative
log-density in nats per value, so that the KL term keeps its meaning whichever likelihood is chosen. A likelihood also
owns the pixel map that its domain asks for: `inmap` is applied to the encoder's input too (paper, appendix A.3).

B batch, H W picture.
"""

import math
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from dvae.errors import UserError


class Likelihood(Protocol):
    channels: int  # of the decoder's raw output

    def inmap(self, images: Tensor) -> Tensor: ...
    def nll(self, raw: Tensor, images: Tensor) -> Tensor: ...
    def picture(self, raw: Tensor) -> Tensor: ...


class LogitLaplace:
    """The paper's density on (0, 1): a Laplace distribution behind a logit (eq. 2), with phi's epsilon of 0.1 (eq. 3).

    The six channels are mu for R, G, B, then ln b for R, G, B.
    """

    channels = 6
    epsilon = 0.1

    def inmap(self, images: Tensor) -> Tensor:
        """[0, 1] -> [epsilon, 1 - epsilon], where the logit is finite."""
        return (1 - 2 * self.epsilon) * images + self.epsilon

    def nll(self, raw: Tensor, images: Tensor) -> Tensor:
        """-ln f(phi(x) | mu, b) per value, `(B, 3, H, W)` nats; f integrates to one over (0, 1)."""
        mu, log_b = raw.float().chunk(2, dim=1)
        x = self.inmap(images)
        distance = (torch.logit(x) - mu).abs()
        return math.log(2) + log_b + torch.log(x * (1 - x)) + distance * torch.exp(-log_b)

    def picture(self, raw: Tensor) -> Tensor:
        """What to show, in [0, 1]: phi's inverse of sigmoid(mu); b is ignored, as in the paper."""
        mu = raw[:, :3].float()
        return ((torch.sigmoid(mu) - self.epsilon) / (1 - 2 * self.epsilon)).clamp(0, 1)


class _Plain:
    """Pixels as they are, three channels, one fixed spread for all values."""

    channels = 3

    def __init__(self, spread: float):
        self.spread = spread

    def inmap(self, images: Tensor) -> Tensor:
        return images

    def picture(self, raw: Tensor) -> Tensor:
        return raw.float().clamp(0, 1)


class L2(_Plain):
    """A normal distribution with standard deviation `spread`: squared error, scaled."""

    def nll(self, raw: Tensor, images: Tensor) -> Tensor:
        constant = math.log(self.spread) + 0.5 * math.log(2 * math.pi)
        return F.mse_loss(raw.float(), images, reduction="none") / (2 * self.spread**2) + constant


class L1(_Plain):
    """A Laplace distribution with scale `spread`: absolute error, scaled."""

    def nll(self, raw: Tensor, images: Tensor) -> Tensor:
        return F.l1_loss(raw.float(), images, reduction="none") / self.spread + math.log(2 * self.spread)


def likelihood(name: str, spread: float) -> Likelihood:
    """The likelihood called `name`: logit-laplace (which learns its spread), l2 or l1.

    Raises:
        UserError: for another name, or a spread that is not positive.
    """
    if not (spread > 0 and math.isfinite(spread)):
        raise UserError(f"spread {spread} of the likelihood is not a positive number", "0.1 suits pictures in [0, 1]")
    if name == "logit-laplace":
        return LogitLaplace()
    if name in ("l2", "l1"):
        return {"l2": L2, "l1": L1}[name](spread)
    raise UserError(f"unknown likelihood {name!r}", "choose logit-laplace, l2 or l1")
