"""How good a tokenizer's reconstructions are: PSNR, SSIM, error per channel, Frechet distance, the worst pictures.

Everything is summed over batches in float64, so memory does not grow with the number of pictures. Knows no files and
no commands.

B batch, H W picture, D features.
"""

import heapq
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dvae.codebook import Usage, usage
from dvae.errors import DataError

WINDOW, SIGMA = 11, 1.5  # of SSIM, in pixels
C1, C2 = 0.01**2, 0.03**2  # of SSIM, for pictures in [0, 1]
CHANNELS = ("red", "green", "blue")


def psnr(images: Tensor, originals: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of images `(B, 3, H, W)` in [0, 1]: `(B,)` dB; at most 100, where they are equal."""
    error = (images.double() - originals.double()).square().mean((1, 2, 3))
    return -10 * error.clamp_min(1e-10).log10()


def ssim(images: Tensor, originals: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of images `(B, 3, H, W)` in [0, 1]: `(B,)`, -1..1, 1 for equal ones.

    A Gaussian window of 11 x 11 pixels and standard deviation 1.5, K1 = 0.01, K2 = 0.03; the mean over all windows that
    lie inside the picture, of each channel alone, and over the channels. The sides must be at least 11 pixels.
    """
    assert min(images.shape[2:]) >= WINDOW
    offsets = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    weights = (-(offsets**2) / (2 * SIGMA**2)).exp()
    weights /= weights.sum()

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, weights[None, None, :, None]), weights[None, None, None, :])

    x, y = (pictures.double().flatten(0, 1)[:, None] for pictures in (images, originals))
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    alike = (2 * mean_x * mean_y + C1) * (2 * covariance + C2)
    alike /= (mean_x**2 + mean_y**2 + C1) * (var_x + var_y + C2)
    return alike.mean((1, 2, 3)).unflatten(0, images.shape[:2]).mean(1)


class Moments:
    """Mean and covariance of feature vectors that come in batches, in float64.

    Attributes:
        count: how many vectors were added.
        mean: `(D,)`.
    """

    def __init__(self, width: int):
        self.count, self.mean = 0, torch.zeros(width, dtype=torch.float64)
        self._scatter = torch.zeros(width, width, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """Take `(B, D)` in (Chan et al. 1983: the scatter about the mean, so that large means cost no digits)."""
        features = features.double()
        mean, total = features.mean(0), self.count + len(features)
        centred, apart = features - mean, mean - self.mean
        self._scatter += centred.T @ centred + torch.outer(apart, apart) * (self.count * len(features) / total)
        self.mean = self.mean + apart * (len(features) / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """`(D, D)`, unbiased; zero of a single vector."""
        return self._scatter / max(self.count - 1, 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """Between Gaussians of these means and covariances, |m - n|^2 + tr(A + B - 2 (A B)^(1/2)) (Dowson & Landau 1982).

    The trace of (A B)^(1/2) is that of the symmetric (A^(1/2) B A^(1/2))^(1/2), whose eigenvalues are real and not
    negative but for rounding. So covariances without full rank, as those of fewer vectors than features, give a finite
    number too; it comes out too large then, for what few vectors do not show counts as missing.
    """
    values, vectors = torch.linalg.eigh(a.covariance)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    both = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp_min(0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * both
    return max(distance.item(), 0.0)


def precision_recall(real: Tensor, drawn: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """How many drawn pictures look real, and how many real ones could have been drawn (Kynkaanniemi et al. 2019).

    A set of features `(R, D)`, `(S, D)` covers the balls around its vectors that reach to their third nearest neighbour
    among themselves. Precision is the share of the drawn inside the balls of the real, recall the other way round.
    Both depend on the sizes of the sets, which should be equal.
    """

    def covered(points: Tensor, others: Tensor) -> float:
        radii = torch.cdist(others, others).kthvalue(min(neighbours + 1, len(others)), dim=1).values  # itself is one
        return (torch.cdist(points, others) <= radii).any(1).double().mean().item()

    real, drawn = real.double(), drawn.double()
    return covered(drawn, real), covered(real, drawn)


@torch.inference_mode()
def evaluate(
    tokenizer: torch.nn.Module,
    batches: Iterable[Tensor],
    features: Callable[[Tensor], Tensor] | None = None,
    worst: int = 16,
) -> dict[str, Any]:
    """Reconstruct pictures and measure what was lost.

    Args:
        batches: pictures `(B, 3, H, W)` in [0, 1], at least one.
        features: maps such pictures to `(B, D)`; with it the Frechet distance is measured. The tokenizer's own encoder
            is no fair judge of what it has kept.
        worst: how many of the worst pictures are named.

    Returns:
        JSON values: `pictures`; `psnr` in dB and `ssim`, means over the pictures (`ssim` is None for sides below 11
        pixels); `channels`: for each colour `error`, the mean absolute one, and `bias`, the mean of reconstruction
        minus original, both in brightness 0..1; `used` and `perplexity` of the codes; `frechet` (None without
        `features`) and the number of `features`; `worst`: `picture` (its place, from 0) and `psnr`, the worst first.

    Raises:
        DataError: there are no pictures.
    """
    count, decibels, likeness = 0, 0.0, 0.0
    error, bias = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    counts = torch.zeros(tokenizer.vocab_size, dtype=torch.int64)
    moments: tuple[Moments, Moments] | None = None  # of the pictures, of the reconstructions
    lowest: list[tuple[float, int]] = []  # (-dB, -place)
    for images in batches:
        tokens = tokenizer.encode(images)
        decoded = tokenizer.decode(tokens)
        counts += usage(tokens, len(counts)).counts
        each = psnr(decoded, images)
        decibels += each.sum().item()
        likeness += ssim(decoded, images).sum().item() if min(images.shape[2:]) >= WINDOW else math.nan
        change = (decoded - images).double()
        bias += change.mean((2, 3)).sum(0)
        error += change.abs().mean((2, 3)).sum(0)
        if features is not None:
            both = features(images), features(decoded)
            moments = moments or (Moments(both[0].shape[1]), Moments(both[1].shape[1]))
            for seen, found in zip(moments, both, strict=True):
                seen.add(found)
        lowest = heapq.nlargest(worst, lowest + [(-db, -place) for place, db in enumerate(each.tolist(), count)])
        count += len(images)
    if not count:
        raise DataError("there are no pictures to evaluate on", "give a data source with at least one")
    codes = Usage(counts)
    return {
        "pictures": count,
        "psnr": decibels / count,
        "ssim": None if math.isnan(likeness) else likeness / count,
        "channels": {
            name: {"error": e / count, "bias": b / count}
            for name, e, b in zip(CHANNELS, error.tolist(), bias.tolist(), strict=True)
        },
        "used": codes.used,
        "perplexity": codes.perplexity,
        "frechet": None if moments is None else frechet_distance(*moments),
        "features": None if moments is None else len(moments[0].mean),
        "worst": [{"picture": -place, "psnr": -db} for db, place in lowest],
    }
