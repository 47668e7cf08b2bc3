"""The discrete VAE: images <-> a grid of integers (paper, 2.1 and appendix A).

The family is the paper's: an encoder of residual bottleneck blocks with max-pooling, a decoder of the same with
nearest-neighbour upsampling, no normalisation, 1x1 convolutions next to the relaxation. `DVAEConfig()`'s depth and
width are free; a `patch` above 1 lets small models skip the expensive full-resolution layers.
The model prints nothing, opens no files, knows no device and no training.

B batch, H W picture, h w grid, K codes, C channels.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from dvae import artefact
from dvae.errors import UserError
from dvae.images import check_batch
from dvae.likelihood import likelihood
from dvae.quantize import GumbelSoftmax, Quantized


@dataclass(frozen=True)
class DVAEConfig:
    """The architecture of a discrete VAE.

    Args:
        image_size: height and width of the pictures, pixels.
        vocab_size: number of codes K (the paper: 8192).
        hidden: channels of the first group (the paper: 256); group g has hidden * 2**g.
        groups: groups of blocks; between two groups the grid is halved (the paper: 4).
        blocks: residual blocks per group (the paper: 2).
        bottleneck: channels of a block over channels inside its residual path (the paper: 4).
        code_width: channels that the decoder reads from the codes, the width of the codebook (the paper: 128).
        tied: codes are points on a sphere that encoder and decoder share, see `Sphere`; the paper has two separate
            1x1 convolutions instead.
        kernel: size of the encoder's first convolution (the paper: 7).
        patch: stride of the first convolution, undone by the last one (the paper: 1).
        gain: weight of each residual path; null means the paper's 1 / (groups * blocks)**2.
        likelihood: logit-laplace (the paper), l2 or l1.
        spread: fixed spread of l2 and l1; logit-laplace learns its own.
    """

    image_size: int = 256
    vocab_size: int = 8192
    hidden: int = 256
    groups: int = 4
    blocks: int = 2
    bottleneck: int = 4
    code_width: int = 128
    tied: bool = False
    kernel: int = 7
    patch: int = 1
    gain: float | None = None
    likelihood: str = "logit-laplace"
    spread: float = 0.1

    def __post_init__(self):
        for name in ("image_size", "vocab_size", "hidden", "groups", "blocks", "bottleneck", "code_width", "patch"):
            check_whole(name, getattr(self, name))
        check_whole("kernel", self.kernel)
        if self.kernel < self.patch or (self.kernel - self.patch) % 2:
            raise UserError(
                f"kernel {self.kernel} does not fit patch {self.patch}",
                "the kernel must be as large as the patch and differ from it by an even number",
            )
        if self.image_size % self.factor:
            raise UserError(
                f"image_size {self.image_size} is not a multiple of the downsampling factor {self.factor}",
                f"choose a multiple of {self.factor} = patch * 2**(groups - 1)",
            )
        if self.hidden % self.bottleneck:
            raise UserError(
                f"hidden {self.hidden} is not a multiple of bottleneck {self.bottleneck}",
                f"choose a multiple of {self.bottleneck}: a residual path has hidden / bottleneck channels",
            )
        if self.gain is not None and not 0 < self.gain < math.inf:
            raise UserError(
                f"gain {self.gain} is not a positive number",
                f"null means the paper's 1 / (groups * blocks)**2, here 1/{(self.groups * self.blocks) ** 2}",
            )
        likelihood(self.likelihood, self.spread)

    @property
    def factor(self) -> int:
        """Downsampling from picture to grid."""
        return self.patch * 2 ** (self.groups - 1)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.image_size // self.factor, self.image_size // self.factor

    @property
    def residual_gain(self) -> float:
        return 1 / (self.groups * self.blocks) ** 2 if self.gain is None else self.gain


def check_whole(name: str, value: int) -> None:
    """Raises UserError if a size is not 1, 2, 3, ...; 8.0 and True are none."""
    if type(value) is not int or value < 1:
        raise UserError(f"{name} is {value!r}", f"{name} must be a whole number, at least 1")


def float32(device: torch.device) -> AbstractContextManager:
    """Inside, nothing is cast to 16 bits; the device "meta" has no autocast that could be switched off."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


class ExactConv(nn.Conv2d):
    """A convolution in its weights' precision, float32 that is, under autocast too: it stands next to the relaxation.

    The released code does so; logits decide by small differences which code is drawn.
    """

    def forward(self, x: Tensor) -> Tensor:
        with float32(x.device):
            return super().forward(x.to(self.weight.dtype))


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, kind: type[nn.Conv2d] = nn.Conv2d) -> nn.Conv2d:
    """Zero-padded; weights normal with standard deviation 1 / sqrt(fan-in), biases 0 (the released code's choice)."""
    layer = kind(inputs, outputs, kernel, stride, padding=(kernel - stride) // 2)
    nn.init.normal_(layer.weight, std=1 / math.sqrt(inputs * kernel**2))
    nn.init.zeros_(layer.bias)
    return layer


class Block(nn.Module):
    """skip + gain * residual: four convolutions behind ReLUs, three of them 3x3, one 1x1 (appendix A.1).

    The 1x1 stands next to the relaxation: last in the encoder's blocks, first in the decoder's.
    """

    def __init__(self, inputs: int, outputs: int, config: DVAEConfig, kernels: tuple[int, int, int, int]):
        super().__init__()
        inner = outputs // config.bottleneck
        widths = (inputs, inner, inner, inner, outputs)
        layers = []
        for k, kernel in enumerate(kernels):
            layers += [nn.ReLU(), conv(widths[k], widths[k + 1], kernel)]
        self.residual = nn.Sequential(*layers)
        self.skip = nn.Identity() if inputs == outputs else conv(inputs, outputs, 1)
        self.gain = config.residual_gain

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.gain * self.residual(x)


class Encoder(nn.Module):
    """Mapped images `(B, 3, H, W)` -> logits `(B, K, h, w)`, or directions `(B, code_width, h, w)` for a `Sphere`."""

    def __init__(self, config: DVAEConfig):
        super().__init__()
        width = config.hidden
        layers: list[nn.Module] = [conv(3, width, config.kernel, config.patch)]
        for group in range(config.groups):
            outputs = config.hidden * 2**group
            for _ in range(config.blocks):
                layers.append(Block(width, outputs, config, (3, 3, 3, 1)))
                width = outputs
            if group < config.groups - 1:
                layers.append(nn.MaxPool2d(2))
        self.body = nn.Sequential(*layers, nn.ReLU())
        self.output = (
            conv(width, config.code_width, 1) if config.tied else conv(width, config.vocab_size, 1, kind=ExactConv)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.body(x))


class Decoder(nn.Module):
    """Weights over the codes `(B, K, h, w)` -> the likelihood's raw channels `(B, C, H, W)`.

    The rows of the first 1x1 convolution are the codebook: there is no other, unless a `Sphere` stands before it.
    """

    def __init__(self, config: DVAEConfig, channels: int):
        super().__init__()
        self.patch = config.patch
        self.input = nn.Identity() if config.tied else conv(config.vocab_size, config.code_width, 1, kind=ExactConv)
        width = config.code_width
        layers: list[nn.Module] = []
        for group in reversed(range(config.groups)):
            outputs = config.hidden * 2**group
            for _ in range(config.blocks):
                layers.append(Block(width, outputs, config, (1, 3, 3, 3)))
                width = outputs
            if group:
                layers.append(nn.Upsample(scale_factor=2, mode="nearest"))
        self.body = nn.Sequential(*layers, nn.ReLU(), conv(width, channels * config.patch**2, 1))

    def forward(self, z: Tensor) -> Tensor:
        raw = self.body(self.input(z))
        return rearrange(raw, "b (c p q) h w -> b c (h p) (w q)", p=self.patch, q=self.patch)


class Sphere(nn.Module):
    """K codes on the unit sphere, read by the encoder and the decoder alike.

    Not in the paper; the idea is that of vector quantisers with normalised, narrow codes. Codes that look alike stand
    side by side, so what is learned for one serves its neighbours, and few codes are never chosen.
    """

    def __init__(self, config: DVAEConfig):
        super().__init__()
        self.codes = nn.Parameter(F.normalize(torch.randn(config.vocab_size, config.code_width), dim=1))
        self.log_sharpness = nn.Parameter(torch.tensor(math.log(16.0)))  # how much a cosine of 1 is worth, in logits

    def points(self) -> Tensor:
        """`(K, code_width)`, each of length 1."""
        return F.normalize(self.codes, dim=1)

    def logits(self, directions: Tensor) -> Tensor:
        """`(B, code_width, h, w)` -> cosines with all codes, sharpened: `(B, K, h, w)`."""
        with float32(directions.device):  # neighbours differ in the third decimal
            cosines = torch.einsum("bdhw,kd->bkhw", F.normalize(directions.float(), dim=1), self.points())
            return cosines * self.log_sharpness.exp()

    def mix(self, z: Tensor) -> Tensor:
        """`(B, K, h, w)` -> `(B, code_width, h, w)`, of about unit variance per channel for a single code."""
        return torch.einsum("bkhw,kd->bdhw", z, self.points()) * math.sqrt(self.codes.shape[1])


class DVAE(nn.Module):
    """The image tokenizer; its face is `encode`, `decode`, `logits`, `decode_soft`, `codes`, `grid`, `vocab_size`.

    Args:
        config: the architecture.
        straight_through: of the `GumbelSoftmax`, in training.
    """

    kind = "dvae"

    def __init__(self, config: DVAEConfig, straight_through: bool = False):
        super().__init__()
        self.config = config
        self.likelihood = likelihood(config.likelihood, config.spread)
        self.encoder = Encoder(config)
        self.quantizer = GumbelSoftmax(straight_through)
        self.decoder = Decoder(config, self.likelihood.channels)
        self.sphere = Sphere(config) if config.tied else None

    @property
    def grid(self) -> tuple[int, int]:
        return self.config.grid

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def logits(self, images: Tensor) -> Tensor:
        """Images `(B, 3, H, W)` in [0, 1] -> unnormalised log-probabilities of the codes `(B, K, h, w)`.

        Raises:
            UserError: when the pictures are not of the size that the model was made for, or no floats.
        """
        check_batch(images, self.config.image_size)
        output = self.encoder(self.likelihood.inmap(images))
        return output if self.sphere is None else self.sphere.logits(output)

    def paint(self, z: Tensor) -> Tensor:
        """Weights over the codes `(B, K, h, w)` -> the likelihood's raw channels `(B, C, H, W)`."""
        return self.decoder(z if self.sphere is None else self.sphere.mix(z))

    def encode(self, images: Tensor) -> Tensor:
        """Images `(B, 3, H, W)` in [0, 1] -> tokens `(B, h, w)` int64, by argmax: no noise (paper, 2.2)."""
        return self.logits(images).argmax(1)

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens `(B, h, w)` -> images `(B, 3, H, W)` in [0, 1]."""
        return self.decode_soft(F.one_hot(tokens, self.vocab_size).movedim(-1, 1).to(self.codes().dtype))

    def decode_soft(self, probabilities: Tensor) -> Tensor:
        """Weights over the codes `(B, K, h, w)`, each cell summing to one -> images `(B, 3, H, W)` in [0, 1]."""
        return self.likelihood.picture(self.paint(probabilities))

    def codes(self) -> Tensor:
        """The codebook `(K, code_width)`: what the decoder's first convolution makes of each code, or its points."""
        return self.decoder.input.weight[:, :, 0, 0].t() if self.sphere is None else self.sphere.points()

    def forward(
        self, images: Tensor, temperature: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Quantized]:
        """The training pass: relaxed codes with Gumbel noise.

        Returns:
            the decoder's raw output `(B, channels, H, W)`, the encoder's logits `(B, K, h, w)`, and the `Quantized`.
        """
        logits = self.logits(images)
        quantized = self.quantizer(logits, temperature, generator)
        return self.paint(quantized.z), logits, quantized

    def save(self, folder: str | Path, about: dict | None = None) -> str:
        """Write the artefact to `folder`, replacing an older one atomically; returns its digest."""
        return artefact.save(folder, self.kind, asdict(self.config), self.state_dict(), about=about or {})
