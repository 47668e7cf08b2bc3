"""Released image tokenizers of others -> our artefact: `dvae import RELEASE ...`, one table of names per release.

Knows no training, and not how the files are read: see `dvae.foreign`.
"""

import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dvae import files
from dvae.errors import ArtefactError, UserError
from dvae.foreign import FETCH_AGAIN, Inert, modules, read, shown, tensors
from dvae.model import DVAE, DVAEConfig
from dvae.tokenizer import ImageTokenizer
from dvae.vqgan import VQGAN, VQGANConfig

# ------------------------------------------------------------------------------------------------------ every release

_TENSORS = 8  # at least, in a residual block of either release: four convolutions, or two and two normalisations


def check_new(out: str) -> None:
    """Raises UserError if `out` is a file, or a folder that is not empty."""
    if Path(out).is_file():
        raise UserError(f"{out} is a file", "name a folder with --out, new or empty")
    if Path(out).exists() and any(Path(out).iterdir()):
        raise UserError(f"{out} is not empty", "choose another folder with --out, or remove that one")


def renamed(
    path: str | Path, found: Mapping[str, Tensor], keys: Mapping[str, str], model: nn.Module
) -> dict[str, Tensor]:
    """The tensors of a file under our names, contiguous and in float32, of the shapes that they had.

    Args:
        path: the file, for what is said of it.
        found: its tensors by their own keys, float32 or float16.
        keys: the keys that it must have, no more and no fewer -> our key of each.
        model: ours, with the shapes that they must have.

    Raises:
        ArtefactError: a key is missing, unknown or misshapen, or its numbers are of another type or not finite.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    faults = {
        "lacks": [key for key in keys if key not in found],
        "has unknown keys:": [key for key in found if key not in keys],
    }
    for fault, which in faults.items():
        if which:
            raise ArtefactError(f"{path} {fault} {shown(which)}", "give a file of the release that you have named")
    for key, ours in keys.items():
        tensor = found[key]
        if tuple(tensor.shape) != shapes[ours]:
            raise ArtefactError(
                f"{path}: {key} has the shape {tuple(tensor.shape)}, and {shapes[ours]} fits the others",
                "give a file of the release that you have named",
            )
        if tensor.dtype not in (torch.float32, torch.float16):
            raise ArtefactError(
                f"{path}: {key} is of the type {str(tensor.dtype).removeprefix('torch.')}",
                "give a file with float32 or float16 weights",
            )
        if not tensor.isfinite().all():
            raise ArtefactError(f"{path}: {key} holds values that are not finite", FETCH_AGAIN)
    return {ours: found[key].float().contiguous() for key, ours in keys.items()}


def opened(path: str) -> tuple[Any, dict[str, str]]:
    """What a file holds, see `dvae.foreign.read`, and where that came from, for the artefact.

    Raises:
        ArtefactError: as `read`, or the file was changed meanwhile.
    """
    digest = files.sha256_file(path) if Path(path).is_file() else None
    tree = read(path)
    if files.sha256_file(path) != digest:
        raise ArtefactError(f"{path} was changed while it was read", "wait until it is written, and import it again")
    return tree, {"file": Path(path).name, "sha256": digest}


def unfilled(kind: type[nn.Module], config: Any, path: str) -> nn.Module:
    """A model of sizes that a file tells, without numbers.

    Raises:
        ArtefactError: the sizes are beyond all measure.
    """
    try:
        with torch.device("meta"):
            return kind(config)
    except RuntimeError as error:  # so many bytes cannot be counted
        raise ArtefactError(f"{path} has the shapes of no model", FETCH_AGAIN) from error


def write(model: ImageTokenizer, weights: Mapping[str, Tensor], out: str, about: dict[str, Any]) -> None:
    """Fill a tokenizer and save it as RUN/model, wholly or not at all, and say what was written and what to do next."""
    model.load_state_dict(weights, assign=True)
    new = not Path(out).exists()
    try:
        model.save(Path(out) / "model", about)
    except BaseException:
        shutil.rmtree(out if new else Path(out) / "model", ignore_errors=True)
        raise
    side, (h, w) = model.config.image_size, model.grid
    print(f"wrote {Path(out) / 'model'}: {side} x {side} pixels <-> {h} x {w} cells of {model.vocab_size:,} codes")
    print(f"next: dvae reconstruct {out} IMAGES --out pictures")
    print(f"      dalle prepare IMAGES --dvae {out} --out tokens")


# ------------------------------------------------------------------------------------------------------ OpenAI's dVAE

_FIRST, _LAST = "blocks.input.w", "blocks.output.conv.w"
_BLOCK = re.compile(r"blocks\.group_(\w+)\.block_(\w+)\.")


def openai(encoder: str, decoder: str, out: str = "openai-dvae", image_size: int = 256) -> None:
    """Make a run of the discrete VAE that OpenAI released with DALL-E, from its two files; nothing in them is executed.

    Args:
        encoder: the encoder's file: a whole module, as published, or a state dict of torch or safetensors.
        decoder: the decoder's file, likewise.
        out: the run folder to write, new or empty.
        image_size: height and width of the pictures, pixels: any multiple of 8, for the model is convolutional.
    """
    check_new(out)
    halves = {"encoder": encoder, "decoder": decoder}
    trees, origins = {}, {}
    for half, path in halves.items():
        trees[half], origins[half] = opened(path)
    found = {half: tensors(path, trees[half]) for half, path in halves.items()}
    sizes = {half: _sizes(half, path, found[half]) for half, path in halves.items()}
    model = unfilled(DVAE, replace(_config(halves, sizes), image_size=image_size), encoder)
    weights: dict[str, Tensor] = {}
    for half, path in halves.items():
        _check_gain(path, trees[half], model.config.residual_gain)
        weights |= renamed(path, found[half], _keys(half, model), model)
    about = {
        "imported": "the discrete VAE of OpenAI's DALL-E (github.com/openai/DALL-E)",
        "licence": "OpenAI's modified MIT licence, which asks you to say that the model was used",
    }
    write(model, weights, out, about | origins)


def _sizes(half: str, path: str, found: Mapping[str, Tensor]) -> dict[str, int]:
    """What one half was built by, told by its keys and shapes, in the names of `DVAEConfig`."""
    what = f"{path} is no {half} of OpenAI's dVAE"
    hint = "give encoder.pkl and decoder.pkl of that release, or their state dicts, in this order"
    if absent := [key for key in (_FIRST, _LAST) if key not in found or found[key].ndim != 4]:
        raise ArtefactError(f"{what}: it has no weights {absent[0]} of four dimensions", hint)
    first, last = found[_FIRST].shape, found[_LAST].shape
    if (first[1] == 3) != (half == "encoder"):  # the encoder reads pictures, the decoder codes
        raise ArtefactError(f"{what}, but its {'encoder' if first[1] == 3 else 'decoder'}", hint)
    blocks = [match.groups() for key in found if (match := _BLOCK.match(str(key)))]
    sizes = {"groups": len({group for group, _ in blocks}), "blocks": len({block for _, block in blocks})}
    if half == "encoder":
        sizes |= {"vocab_size": last[0], "hidden": first[0], "kernel": first[2]}
    else:
        sizes |= {"vocab_size": first[1], "hidden": last[1], "code_width": first[0]}
    if not blocks or (half == "encoder" and last[1] != first[0] << (sizes["groups"] - 1)):
        raise ArtefactError(f"{what}: its width does not double from group to group", hint)
    if _TENSORS * sizes["groups"] * sizes["blocks"] > len(found):
        raise ArtefactError(
            f"{what}: {len(found)} tensors are too few for {sizes['groups']} groups of {sizes['blocks']} blocks", hint
        )
    return sizes


def _config(halves: Mapping[str, str], sizes: Mapping[str, Mapping[str, int]]) -> DVAEConfig:
    """Of both halves, for its smallest picture."""
    one, other = sizes["encoder"], sizes["decoder"]
    for name in one:
        if name in other and one[name] != other[name]:
            raise ArtefactError(
                f"{halves['encoder']} and {halves['decoder']} do not belong together: "
                f"{name} is {one[name]} in the encoder and {other[name]} in the decoder",
                "give two files of the same release",
            )
    try:
        return DVAEConfig(image_size=1 << (one["groups"] - 1), **(one | other))
    except UserError as error:
        raise ArtefactError(
            f"{halves['encoder']} and {halves['decoder']} make no dVAE: {error}", "give the files of that release"
        ) from error


def _keys(half: str, model: DVAE) -> dict[str, str]:
    """Every key of theirs -> ours: the one table of this release."""
    place = {"encoder": 1, "decoder": 0}[half]  # in `body`, which begins with the encoder's first convolution
    table = {"blocks.input": {"encoder": "encoder.body.0", "decoder": "decoder.input"}[half]}
    for group in range(1, model.config.groups + 1):
        for block in range(1, model.config.blocks + 1):
            theirs, ours = f"blocks.group_{group}.block_{block}", f"{half}.body.{place}"
            table |= {f"{theirs}.res_path.conv_{k}": f"{ours}.residual.{2 * k - 1}" for k in (1, 2, 3, 4)}
            table[f"{theirs}.id_path"] = f"{ours}.skip"
            place += 1
        place += 1  # the pooling or the upsampling and, after the last block, the ReLU
    table["blocks.output.conv"] = {"encoder": "encoder.output", "decoder": f"decoder.body.{place}"}[half]
    there = model.state_dict()
    return {
        f"{theirs}.{kind[0]}": f"{ours}.{kind}"
        for theirs, ours in table.items()
        for kind in ("weight", "bias")
        if f"{ours}.{kind}" in there  # a skip that keeps its width has none
    }


def _check_gain(path: str, tree: Any, gain: float) -> None:
    """The weight of residual paths is no tensor: whole modules say it, state dicts do not."""
    for prefix, module in modules(path, tree) if type(tree) is Inert else ():
        if module.state.get("post_gain", gain) != gain:
            raise ArtefactError(
                f"{path}: {prefix}post_gain is not {gain}, as the number of its blocks asks for",
                "give a file of the release that you have named",
            )


# ------------------------------------------------------------------------------------- taming-transformers' VQGAN

_DOWN = re.compile(r"encoder\.down\.([0-9]+)\.block\.([0-9]+)\.")
_MOST_LEVELS = 12  # of which a cell would cover 2,048 pixels


def vqgan(checkpoint: str, out: str = "vqgan", image_size: int = 256) -> None:
    """Make a run of a VQGAN of taming-transformers, such as f16 and Gumbel f8; nothing in its file is executed.

    Args:
        checkpoint: what Lightning saved of its training, or a state dict of torch or safetensors. What only a training
            needs is left out: optimiser, callbacks, discriminator, perceptual loss.
        out: the run folder to write, new or empty.
        image_size: height and width of the pictures, pixels: any multiple of its downsampling, 16 for f16 and 8 for f8.
            The published ones were trained at 256.
    """
    check_new(out)
    tree, origin = opened(checkpoint)
    state = tree["state_dict"] if type(tree) is dict and "state_dict" in tree else tree
    found = tensors(checkpoint, state)
    of_training = {key for key in found if str(key).startswith("loss.")}
    theirs = {key: tensor for key, tensor in found.items() if key not in of_training}
    model = unfilled(VQGAN, replace(_vqgan_config(checkpoint, theirs), image_size=image_size), checkpoint)
    about: dict[str, Any] = {
        "imported": "a VQGAN of taming-transformers (github.com/CompVis/taming-transformers)",
        "licence": "the code's is MIT; ask those who published the weights for theirs",
        "checkpoint": origin,
        "left_out": sorted({".".join(key.split(".")[:2]) for key in of_training}),
    }
    write(model, renamed(checkpoint, theirs, _vqgan_keys(model), model), out, about)
    if of_training:
        print(f"left out, for only its training needs them: {len(of_training)} tensors of {shown(about['left_out'])}")


def _vqgan_config(path: str, found: Mapping[str, Tensor]) -> VQGANConfig:
    """Told by keys and shapes, for its smallest picture."""
    what = f"{path} is no VQGAN of taming-transformers"
    hint = "give a checkpoint or a state dict of its VQModel or GumbelVQ"

    def shape(key: str, dimensions: int) -> torch.Size:
        if key not in found or found[key].ndim != dimensions:
            raise ArtefactError(f"{what}: it has no weights {key} of {dimensions} dimensions", hint)
        return found[key].shape

    gumbel = "quantize.proj.weight" in found
    hidden, latent = shape("encoder.conv_in.weight", 4)[0], shape("decoder.conv_in.weight", 4)[1]
    vocab_size, code_width = shape(f"quantize.{'embed' if gumbel else 'embedding'}.weight", 2)
    places = [match.groups() for key in found if (match := _DOWN.match(str(key)))]
    levels = len({level for level, _ in places})
    widths = [shape(f"encoder.down.{level}.block.0.conv1.weight", 4)[0] for level in range(levels)]
    if not 0 < levels <= _MOST_LEVELS or not hidden or any(width % hidden for width in widths):
        raise ArtefactError(f"{what}: its levels have {widths} channels, and its first convolution has {hidden}", hint)
    blocks = len({block for _, block in places})
    if _TENSORS * levels * (2 * blocks + 1) > len(found):  # the decoder has one more in each level
        raise ArtefactError(f"{what}: {len(found)} tensors are too few for {levels} levels of {blocks} blocks", hint)
    try:
        return VQGANConfig(
            image_size=2 ** (levels - 1),
            vocab_size=vocab_size,
            hidden=hidden,
            multipliers=tuple(width // hidden for width in widths),
            blocks=blocks,
            attention=tuple(k for k in range(levels) if f"encoder.down.{k}.attn.0.norm.weight" in found),
            latent=latent,
            code_width=code_width,
            quantizer="gumbel" if gumbel else "nearest",
        )
    except UserError as error:
        raise ArtefactError(f"{what}: {error.what}", hint) from error


def _vqgan_keys(model: VQGAN) -> dict[str, str]:
    """Every key of theirs -> ours: the one table of this release."""
    config, ends = model.config, ["norm_out", "conv_out"]
    levels, middle = range(len(config.multipliers)), ["mid.block_1", "mid.attn_1", "mid.block_2"]

    def stage(level: str, blocks: int, attention: bool) -> list[str]:
        kinds = ("block", "attn") if attention else ("block",)
        return [f"{level}.{kind}.{block}" for block in range(blocks) for kind in kinds]

    down, up = [], []
    for level in levels:
        down += stage(f"down.{level}", config.blocks, level in config.attention)
        down += [f"down.{level}.downsample.conv"] * (level != levels[-1])
    for level in reversed(levels):
        up += stage(f"up.{level}", config.blocks + 1, level in config.attention)
        up += [f"up.{level}.upsample.conv"] * (level != 0)
    layers = {"encoder": ["conv_in", *down, *middle, *ends], "decoder": ["conv_in", *middle, *up, *ends]}
    table = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv", "projection": "quantize.proj"}
    for half, theirs in layers.items():
        ours = [name for name, layer in getattr(model, half).named_children() if list(layer.parameters())]
        table |= {f"{half}.{place}": f"{half}.{name}" for place, name in zip(ours, theirs, strict=True)}
    keys = {f"quantize.{'embedding' if model.projection is None else 'embed'}.weight": "codebook"}
    for ours in model.state_dict().keys() - {"codebook"}:
        place = next(place for place in table if ours.startswith(f"{place}."))
        rest = ours.removeprefix(place).replace(".skip.", ".nin_shortcut.").replace(".output.", ".proj_out.")
        keys[table[place] + rest] = ours
    return keys
