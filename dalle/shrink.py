"""A copy of a trained model with 16-bit weights: half the size, to be shared.

What is loaded from it computes in 32 bits again; rounded weights change a log-probability in the third digit.
"""

import tempfile
from pathlib import Path

import torch
from torch import nn

from dalle import pipeline
from dvae import artefact
from dvae.errors import UserError
from dvae.tokenizer import KIND


def shrink(run: str, out: str = "small") -> None:
    """Copy a trained transformer and its image tokenizer with weights of 16 bits.

    Args:
        run: run folder or artefact folder of stage 2.
        out: folder to write, new or empty.
    """
    folder = Path(out)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{out} is not empty", "choose another folder with --out, or remove that one")
    drawer = pipeline.load(run)
    found = artefact.load(drawer.source, pipeline.KIND)
    with tempfile.TemporaryDirectory() as tokenizer:
        about = artefact.verify(found.parts[KIND])["about"]
        _rounded(drawer.tokenizer).save(tokenizer, about)
        model, parts = _rounded(drawer.model), (drawer.text, drawer.captions, Path(tokenizer), found.about)
        pipeline.save(folder, model, *parts, drawer.weights)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"wrote {out}, {size / 1e6:.1f} MB")


def _rounded(model: nn.Module) -> nn.Module:
    """Raises NumericsError, when it is saved, if a weight is too large for 16 bits."""
    return model.to(torch.float16)
