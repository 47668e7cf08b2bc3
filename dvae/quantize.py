"""Four bottlenecks between an encoder and a decoder, side by side: `(features, temperature, generator) -> Quantized`.

| class             | makes of the two    | what passes             | what it costs                              |
|-------------------|---------------------|-------------------------|--------------------------------------------|
| `Identity`        | an autoencoder      | the features            | nothing                                    |
| `Gaussian`        | a VAE               | a draw around a mean    | KL to the standard normal distribution     |
| `VectorQuantizer` | a VQ-VAE            | the nearest code        | the distance to that code                  |
| `GumbelSoftmax`   | the dVAE of DALL-E  | a draw from K codes     | KL to the uniform distribution             |

The encoder's last layer has as many channels as a bottleneck reads, the decoder's first one as many as it gives; all
else may be the same. Nothing here knows pictures or what weight the penalty has in a loss. Noise is drawn
where `generator` lives: one of the CPU gives the same on every device, one of a GPU does not keep it waiting.

B batch, D channels, K codes, h w grid.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F


class Quantized(NamedTuple):
    """What the decoder reads, and what it costs.

    z: `(B, D, h, w)`; of the `GumbelSoftmax` `(B, K, h, w)`, weights over the codes, each cell summing to one.
    tokens: `(B, h, w)` int64, the code of each cell, without noise; None where nothing is discrete.
    penalty: `(B,)`, summed over the cells; nats where it is a KL.
    """

    z: Tensor
    tokens: Tensor | None
    penalty: Tensor


class Identity(nn.Module):
    """No bottleneck but the few channels: an autoencoder. It says nothing of where features lie, so none can be drawn.

    Reads and gives `(B, D, h, w)`; neither the temperature nor the generator does anything.
    """

    def forward(self, features: Tensor, temperature: float, generator: torch.Generator) -> Quantized:
        return Quantized(features, None, features.new_zeros(len(features)))


class Gaussian(nn.Module):
    """Adds a distribution: each number is drawn around a mean, and pays for being unlike N(0, 1) (Kingma & Welling
    2014, "Auto-Encoding Variational Bayes"). So drawing from N(0, 1) becomes a way to make pictures.

    Reads `(B, 2 D, h, w)`, the means before the log-variances; gives `(B, D, h, w)`. The standard deviation is
    multiplied by the temperature: 1 is the VAE, 0 the means alone.
    """

    def forward(self, features: Tensor, temperature: float, generator: torch.Generator) -> Quantized:
        mean, log_variance = features.float().chunk(2, dim=1)
        noise = torch.randn(mean.shape, generator=generator, device=generator.device).to(mean.device)
        z = mean + temperature * (log_variance / 2).exp() * noise
        return Quantized(z, None, kl_to_normal(mean, log_variance))


class VectorQuantizer(nn.Module):
    """Adds a codebook: each cell becomes the nearest of K codes, an integer (van den Oord et al. 2017, "Neural Discrete
    Representation Learning"). The gradient passes straight through the choice, which has none of its own, and
    `commitment` times the squared distance keeps the encoder near its codes.

    In training mode the codes follow the mean of the cells that choose them, by exponential moving averages instead of
    a gradient (the same paper, appendix A.1; Razavi et al. 2019, "Generating Diverse High-Fidelity Images with
    VQ-VAE-2"). As in SoundStream (Zeghidour et al. 2021) they start from k-means of the first batch, and a code that
    is hardly chosen any more is put on a random cell. For one process: several would each keep codes of their own.

    Reads and gives `(B, D, h, w)`; the temperature does nothing.

    Args:
        vocab_size: number of codes K.
        width: channels of a code D.
        commitment: weight of the penalty against the loss of the reconstruction (beta of the paper).
        decay: how much of an average is kept at each update.
    """

    dead = 0.05  # of its even share of the cells: a code that is chosen less often is dead

    def __init__(self, vocab_size: int, width: int, commitment: float = 0.25, decay: float = 0.99):
        super().__init__()
        self.commitment, self.decay = commitment, decay
        self.register_buffer("codes", torch.zeros(vocab_size, width))
        self.register_buffer("counts", torch.zeros(vocab_size))  # cells that chose a code, averaged over updates

    def forward(self, features: Tensor, temperature: float, generator: torch.Generator) -> Quantized:
        features = features.float()
        cells = rearrange(features.detach(), "b d h w -> (b h w) d")
        if self.training and not self.counts.any():
            self.codes.copy_(kmeans(cells.cpu(), len(self.codes), generator))
            self.counts.fill_(len(cells) / len(self.codes))
        chosen = nearest(cells, self.codes)
        tokens = chosen.view(len(features), *features.shape[2:])
        codes = self.look_up(tokens)
        if self.training:
            self.follow(cells, chosen, generator)
        z = codes + (features - features.detach())  # the bracket is exactly 0, so the sum is exactly the codes
        return Quantized(z, tokens, self.commitment * (features - codes).square().sum((1, 2, 3)))

    def look_up(self, tokens: Tensor) -> Tensor:
        """Tokens `(B, h, w)` -> their codes `(B, D, h, w)`."""
        return self.codes[tokens].movedim(-1, 1)

    def follow(self, cells: Tensor, chosen: Tensor, generator: torch.Generator) -> None:
        """Move the codes towards the cells `(N, D)` that chose them, `(N,)`; dead ones to random cells."""
        sums, sizes = pool(cells, chosen, len(self.codes))
        totals = self.decay * self.counts[:, None] * self.codes + (1 - self.decay) * sums
        self.counts.lerp_(sizes, 1 - self.decay)
        self.codes.copy_(totals / self.counts[:, None])
        dead = self.counts < self.dead * self.counts.mean()
        self.codes[dead] = cells[torch.randint(len(cells), (int(dead.sum()),), generator=generator)]
        self.counts[dead] = self.counts.mean()  # time to be found


class GumbelSoftmax(nn.Module):
    """Makes the choice among K codes a random one, with a gradient: softmax((logits + Gumbel noise) / temperature)
    (Jang et al. 2017, "Categorical Reparameterization with Gumbel-Softmax"; Maddison et al. 2017, "The Concrete
    Distribution"; DALL-E's paper, 2.1). The largest weight is an exact draw from softmax(logits); as the temperature
    falls, the weights become that draw alone. Being unlike the uniform distribution costs, as in a VAE.

    Reads logits and gives weights, both `(B, K, h, w)`. The decoder's first layer is the codebook.

    Args:
        straight_through: in training mode the forward pass is one-hot and only the gradient is soft. DALL-E's authors
            trained soft in both.
    """

    def __init__(self, straight_through: bool = False):
        super().__init__()
        self.straight_through = straight_through

    def forward(self, features: Tensor, temperature: float, generator: torch.Generator) -> Quantized:
        # uniform numbers and two logarithms are several times faster on a CPU than exponential ones; a 0 becomes -inf,
        # which only means that this code is not drawn
        uniform = torch.rand(features.shape, generator=generator, device=generator.device)
        noise = -uniform.log_().neg_().log_().to(features.device)
        z = over_codes(F.softmax, (features.float() + noise) / temperature)
        if self.straight_through and self.training:
            hard = F.one_hot(z.argmax(1), z.shape[1]).movedim(-1, 1).to(z.dtype)
            z = hard + (z - z.detach())  # the bracket is exactly 0, so the sum is exactly one-hot
        return Quantized(z, features.argmax(1), kl_to_uniform(features))


def over_codes(function: Callable[..., Tensor], logits: Tensor) -> Tensor:
    """softmax or log_softmax over the codes of `(B, K, h, w)`, in the memory layout that comes in: torch's own over
    dimension 1 copies channels_last there and back."""
    if logits.is_contiguous(memory_format=torch.channels_last):
        return function(logits.movedim(1, -1), dim=-1).movedim(-1, 1)
    return function(logits, dim=1)


def kl_to_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(0, 1)) in closed form, summed over channels and grid: `(B, D, h, w)` -> `(B,)` nats."""
    return (mean.square() + log_variance.exp() - log_variance - 1).sum((1, 2, 3)) / 2


def kl_to_uniform(logits: Tensor) -> Tensor:
    """KL(softmax(logits) || uniform) in closed form, summed over the grid: `(B, K, h, w)` -> `(B,)` nats."""
    log_q = over_codes(F.log_softmax, logits.float())
    per_cell = (log_q.exp() * log_q).sum(1) + math.log(logits.shape[1])
    return per_cell.sum((1, 2))


def usage_gap(logits: Tensor) -> Tensor:
    """ln K minus the entropy of the batch-mean code distribution: scalar, nats, 0 when all codes share the work.

    Not in the paper. As a loss it keeps codes from dying in small models; a recipe that uses it says so.
    """
    mean = over_codes(F.softmax, logits.float()).mean((0, 2, 3))
    return (mean * mean.clamp_min(1e-12).log()).sum() + math.log(logits.shape[1])


def nearest(points: Tensor, codes: Tensor) -> Tensor:
    """Points `(N, D)` -> the index of the nearest of the codes `(K, D)` to each, `(N,)` int64."""
    return torch.cdist(points, codes).argmin(1)


def pool(points: Tensor, chosen: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The sums `(count, D)` of the points `(N, D)` that chose the same, `(N,)`, and how many they are, `(count,)`."""
    sums = points.new_zeros(count, points.shape[1]).index_add_(0, chosen, points)
    return sums, torch.bincount(chosen, minlength=count).to(points)


def kmeans(points: Tensor, count: int, generator: torch.Generator, rounds: int = 10) -> Tensor:
    """`count` centres `(count, D)` of points `(N, D)`, by Lloyd's rounds from a k-means++ start (Arthur & Vassilvitskii
    2007): a point is the likelier to become a centre the farther it is from the others. Where there are fewer points
    than centres, several centres are the same."""
    picked = torch.randint(len(points), (1,), generator=generator)
    distances = (points - points[picked]).square().sum(1)
    for _ in range(count - 1):
        pick = torch.multinomial(distances.clamp_min(1e-12), 1, generator=generator)
        distances = torch.minimum(distances, (points - points[pick]).square().sum(1))
        picked = torch.cat([picked, pick])
    centres = points[picked]
    for _ in range(rounds):
        sums, sizes = pool(points, nearest(points, centres), count)
        centres = torch.where(sizes[:, None] > 0, sums / sizes.clamp_min(1)[:, None], centres)
    return centres
