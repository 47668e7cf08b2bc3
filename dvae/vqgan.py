"""VQGAN, a tokenizer that others have trained: images <-> a grid of integers (Esser et al. 2021, arXiv 2012.09841).

The architecture of taming-transformers: residual blocks with group normalisation, self-attention on coarse grids,
strided convolutions down and nearest-neighbour upsampling up. A cell's token is the nearest code of a codebook (VQ), or
the largest of a projection that was trained with Gumbel noise. It only reads and paints: it knows no training, no
discriminator and no file layout but our own; `dvae.importers` brings weights in.

B batch, H W picture, h w grid, K codes, d width of a code, C channels.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dvae import artefact
from dvae.errors import UserError
from dvae.images import check_batch
from dvae.model import check_whole

NORM_GROUPS = 32
QUANTIZERS = ("nearest", "gumbel")


@dataclass(frozen=True)
class VQGANConfig:
    """The architecture of a VQGAN; the defaults are the published f16 of 16,384 codes.

    Level 0 is the picture's own resolution; each further level has half of it. In brackets, the published `ddconfig`.

    Args:
        image_size: height and width of the pictures, pixels (resolution); any size will do that the grid divides.
        vocab_size: number of codes K (n_embed).
        hidden: channels of level 0 before its multiplier (ch).
        multipliers: channels of each level over `hidden` (ch_mult).
        blocks: residual blocks of each level in the encoder, one fewer than in the decoder (num_res_blocks).
        attention: the levels with self-attention behind each block (attn_resolutions, there in pixels).
        latent: channels that the encoder gives and the decoder takes (z_channels).
        code_width: width of the codebook d (embed_dim).
        quantizer: nearest (VQ) or gumbel (a projection to logits, of which the largest counts).
    """

    image_size: int = 256
    vocab_size: int = 16384
    hidden: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    attention: tuple[int, ...] = (4,)
    latent: int = 256
    code_width: int = 256
    quantizer: str = "nearest"

    def __post_init__(self):
        for name in ("multipliers", "attention"):  # JSON brings lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("image_size", "vocab_size", "hidden", "blocks", "latent", "code_width"):
            check_whole(name, getattr(self, name))
        if not self.multipliers:
            raise UserError("multipliers are []", "give one for each level")
        for multiplier in self.multipliers:
            check_whole("a multiplier", multiplier)
        if self.hidden % NORM_GROUPS:
            raise UserError(
                f"hidden is {self.hidden}, which the {NORM_GROUPS} groups of its normalisation do not divide",
                f"choose a multiple of {NORM_GROUPS}",
            )
        levels = range(len(self.multipliers))
        if not all(type(level) is int and level in levels for level in self.attention):
            raise UserError(
                f"attention is at levels {list(self.attention)}, but there are {len(self.multipliers)} levels",
                f"name levels of 0 to {len(self.multipliers) - 1}",
            )
        if self.quantizer not in QUANTIZERS:
            raise UserError(f"quantizer is {self.quantizer!r}", f"choose one of {', '.join(QUANTIZERS)}")
        if self.image_size % self.factor:
            raise UserError(
                f"image_size {self.image_size} is not a multiple of the downsampling factor {self.factor}",
                f"choose a multiple of {self.factor} = 2**(levels - 1)",
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.hidden * multiplier for multiplier in self.multipliers)

    @property
    def factor(self) -> int:
        """Downsampling from picture to grid."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.image_size // self.factor, self.image_size // self.factor


def conv(inputs: int, outputs: int, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)


def norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, width, eps=1e-6)


class Block(nn.Module):
    """skip + residual, which is twice normalisation, swish and a 3x3 convolution: `inputs` channels -> `outputs`."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.norm1, self.conv1 = norm(inputs), conv(inputs, outputs)
        self.norm2, self.conv2 = norm(outputs), conv(outputs, outputs)
        self.skip = nn.Identity() if inputs == outputs else conv(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(inner)))


class Attention(nn.Module):
    """x + self-attention of one head over all cells, without positions. `(B, C, h, w)` -> `(B, C, h, w)`."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = norm(width)
        self.q, self.k, self.v, self.output = (conv(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (layer(y).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))  # (B, h * w, C)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x + self.output(mixed.transpose(1, 2).reshape(x.shape))


def stage(inputs: int, outputs: int, blocks: int, attention: bool) -> list[nn.Module]:
    """The residual blocks of one level, each followed by attention or not."""
    layers: list[nn.Module] = []
    for block in range(blocks):
        layers.append(Block(outputs if block else inputs, outputs))
        if attention:
            layers.append(Attention(outputs))
    return layers


def middle(width: int) -> list[nn.Module]:
    """The bottom of encoder and decoder."""
    return [Block(width, width), Attention(width), Block(width, width)]


def encoder(config: VQGANConfig) -> nn.Sequential:
    """Images `(B, 3, H, W)` in [-1, 1] -> `(B, latent, h, w)`."""
    width = config.hidden
    layers: list[nn.Module] = [conv(3, width)]
    for level, outputs in enumerate(config.widths):
        if level:  # one row and column of zeros at the far sides: the published asymmetric padding
            layers += [nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(width, width, 3, stride=2)]
        layers += stage(width, outputs, config.blocks, level in config.attention)
        width = outputs
    return nn.Sequential(*layers, *middle(width), norm(width), nn.SiLU(), conv(width, config.latent))


def decoder(config: VQGANConfig) -> nn.Sequential:
    """`(B, latent, h, w)` -> images `(B, 3, H, W)`, of about [-1, 1]."""
    width = config.widths[-1]
    layers: list[nn.Module] = [conv(config.latent, width), *middle(width)]
    for level, outputs in reversed(list(enumerate(config.widths))):
        layers += stage(width, outputs, config.blocks + 1, level in config.attention)
        width = outputs
        if level:
            layers += [nn.Upsample(scale_factor=2, mode="nearest"), conv(width, width)]
    return nn.Sequential(*layers, norm(width), nn.SiLU(), conv(width, 3))


class VQGAN(nn.Module):
    """The image tokenizer; its face is `encode`, `decode`, `logits`, `decode_soft`, `codes`, `grid`, `vocab_size`."""

    kind = "dvae"  # the role, not the architecture: image tokenizer of a transformer
    architecture = "vqgan"

    def __init__(self, config: VQGANConfig):
        super().__init__()
        self.config = config
        self.encoder = encoder(config)
        self.quant_conv = conv(config.latent, config.code_width, 1)
        self.projection = conv(config.code_width, config.vocab_size, 1) if config.quantizer == "gumbel" else None
        self.codebook = nn.Parameter(torch.randn(config.vocab_size, config.code_width))
        self.post_quant_conv = conv(config.code_width, config.latent, 1)
        self.decoder = decoder(config)

    @property
    def grid(self) -> tuple[int, int]:
        return self.config.grid

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def logits(self, images: Tensor) -> Tensor:
        """Images `(B, 3, H, W)` in [0, 1] -> `(B, K, h, w)`, of which the largest is the token.

        Of a gumbel quantizer they are the projection, unnormalised log-probabilities of the codes. Of a nearest one
        they are minus the squared distances from the encoder's z to the codes: their softmax is the posterior of the
        codes where all are equally frequent and each spreads z around itself by a Gaussian of variance 1/2 a channel.

        Raises:
            UserError: when the pictures are not of the size that the model was made for, or no floats.
        """
        check_batch(images, self.config.image_size)
        z = self.quant_conv(self.encoder(2 * images - 1))
        if self.projection is not None:
            return self.projection(z)
        products = torch.einsum("bdhw,kd->bkhw", z, self.codebook)
        return 2 * products - self.codebook.square().sum(1)[:, None, None] - z.square().sum(1, keepdim=True)

    def paint(self, z: Tensor) -> Tensor:
        """What stands for the cells in code space `(B, d, h, w)` -> images `(B, 3, H, W)` in [0, 1]."""
        return ((self.decoder(self.post_quant_conv(z)) + 1) / 2).clamp(0, 1)

    def encode(self, images: Tensor) -> Tensor:
        """Images `(B, 3, H, W)` in [0, 1] -> tokens `(B, h, w)` int64, by argmax, without noise."""
        return self.logits(images).argmax(1)

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens `(B, h, w)` -> images `(B, 3, H, W)` in [0, 1]."""
        return self.paint(self.codebook[tokens].movedim(-1, 1))

    def decode_soft(self, probabilities: Tensor) -> Tensor:
        """Weights over the codes `(B, K, h, w)`, each cell summing to one -> images `(B, 3, H, W)` in [0, 1]."""
        return self.paint(torch.einsum("bkhw,kd->bdhw", probabilities, self.codebook))

    def codes(self) -> Tensor:
        """The codebook `(K, d)`."""
        return self.codebook

    def save(self, folder: str | Path, about: dict | None = None) -> str:
        """Write the artefact to `folder`, replacing an older one atomically; returns its digest."""
        config = {"architecture": self.architecture, **asdict(self.config)}
        return artefact.save(folder, self.kind, config, self.state_dict(), about=about or {})
