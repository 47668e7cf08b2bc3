"""The image tokenizer of a run, whichever architecture it has: what every other room reads and writes tokens with.

B batch, K codes, d width of the codebook, h w grid, H W picture.
"""

from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from dvae import artefact
from dvae.errors import ArtefactError, UserError
from dvae.model import DVAE, DVAEConfig
from dvae.vqgan import VQGAN, VQGANConfig

KIND = DVAE.kind
ARCHITECTURES = {"dvae": ("dVAE", DVAE, DVAEConfig), VQGAN.architecture: ("VQGAN", VQGAN, VQGANConfig)}


class ImageTokenizer(Protocol):
    """The face of a tokenizer. `config` says at least `image_size`, the height and width of its pictures, pixels."""

    config: Any
    grid: tuple[int, int]
    vocab_size: int

    def encode(self, images: Tensor) -> Tensor:
        """Images `(B, 3, H, W)` in [0, 1] -> tokens `(B, h, w)` int64, without noise."""

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens `(B, h, w)` -> images `(B, 3, H, W)` in [0, 1]."""

    def logits(self, images: Tensor) -> Tensor:
        """Images `(B, 3, H, W)` in [0, 1] -> `(B, K, h, w)`, of which the largest is the token."""

    def decode_soft(self, probabilities: Tensor) -> Tensor:
        """Weights over the codes `(B, K, h, w)`, each cell summing to one -> images `(B, 3, H, W)` in [0, 1]."""

    def codes(self) -> Tensor:
        """The codebook `(K, d)`."""


def load(run: str | Path) -> ImageTokenizer:
    """The trained image tokenizer of a run folder or an artefact folder, on the CPU, in eval mode.

    Raises:
        ArtefactError: it is missing, damaged, or not an image tokenizer.
    """
    found = artefact.load(artefact.find(run, KIND), KIND)
    config = dict(found.config)
    architecture = config.pop("architecture", "dvae")
    if architecture not in list(ARCHITECTURES):  # JSON may bring what has no hash
        raise ArtefactError(
            f"{run} holds an image tokenizer of the architecture {architecture!r}, which this version does not know",
            "use the version of this project that wrote it",
        )
    name, model_class, config_class = ARCHITECTURES[architecture]
    try:
        model = model_class(config_class(**config))
        model.load_state_dict(found.tensors)
    except (TypeError, RuntimeError, UserError) as error:
        raise ArtefactError(
            f"{run} does not hold a {name} of this version: {str(error).splitlines()[0]}",
            "train or import it again, or use the version of this project that wrote it",
        ) from error
    return model.eval().requires_grad_(False)
