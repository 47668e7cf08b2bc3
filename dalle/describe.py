"""What a training of stage 2 takes, told before it begins: parameters, memory and arithmetic of a config.

All is counted from the shapes, nothing is measured and nothing large is built: the parameters are those of the model on
torch's meta device, the rest are sums over what its blocks do. The tests hold each sum against a model that runs. This
file reads a config's settings as they are spelled there; it opens neither Lightning nor data.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from dalle.model import DALLE, DALLEConfig
from dalle.tokens import Sizes
from dvae.commands import find_config
from dvae.errors import DataError, UserError, warn
from dvae.files import write_json

PAPER = Sizes(vocab_text=16384, text_length=256, vocab_image=8192, grid=(32, 32))

# every setting that decides what is told here, with the value that `dalle fit` takes where a config has none
SETTINGS = {
    "model.depth": None,
    "model.width": None,
    "model.heads": None,
    "model.mlp_ratio": 4,
    "model.patterns": "full",
    "model.checkpointing": False,
    "model.image_first.share": 0.0,
    "model.expects": None,
    "model.optimiser.muon": False,
    "model.optimiser.ema": 0.999,
    "data.tokens": None,
    "data.batch_size": 64,
    "trainer.precision": "32-true",
    "trainer.devices": "auto",
    "trainer.num_nodes": 1,
    "trainer.accumulate_grad_batches": 1,
    "trainer.max_steps": -1,
}

_FULL = 4  # bytes of a weight, a gradient, a moment, and of what is computed outside autocast
_PRECISIONS = {"32-true": 4, "bf16-mixed": 2, "16-mixed": 2}  # bytes of what is computed inside
_SHORT = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}  # for which Lightning takes these
_ALL = ("auto", -1, "-1")  # devices of a machine: one, here

# parts of the model by what the names of their parameters hold, the first that fits
_PARTS = {
    "text_embedding": "text embedding",
    "image_embedding": "image embedding",
    "position": "positions and starts",
    "start": "positions and starts",
    "attention.": "attention",
    "mlp.": "MLPs",
    "norm": "norms",
    "text_head": "text head",
    "image_head": "image head",
}


def describe(config: str, settings: dict[str, Any] | None = None, out: str | None = None) -> None:
    """Tell the parameters, memory and arithmetic of a training of stage 2 before it begins. Further settings, spelled
    as for that training, stand in place of the config's own: --model.depth 32 --data.batch_size 1.

    Args:
        config: a file, or the name of one that comes with the project, such as dalle/paper-12b.
        settings: by their dotted keys, such as model.depth.
        out: a file to write the numbers to, as JSON.
    """
    if out is not None and Path(out).is_dir():
        raise UserError(f"{Path(out)} is a folder", f"name a file, such as --out {Path(out) / 'sizes.json'}")
    plan = read(config, settings)
    counted = count(plan)
    if plan.sizes_from.startswith("the paper"):
        warn(f"these are the sizes of {plan.sizes_from}", "prepare the tokens first, or set model.expects")
    print(f"{config}\n\n" + "\n".join(page(plan, counted)))
    if out is not None:
        write_json(out, {"config": config, **counted})
        print(f"\nwrote {out}")


# ------------------------------------------------------------------------------------------------------- the settings


@dataclass(frozen=True)
class Plan:
    """What of an experiment decides what it takes.

    Args:
        config: the model's.
        sizes_from: who says its vocabularies, text length and grid.
        checkpointing: whether blocks are computed again in the backward pass.
        muon: whether Muon moves the matrices inside the blocks.
        averaged: whether averaged weights are kept.
        precision: Lightning's name of it.
        batch_size: pictures at a time on one device.
        accumulate: such batches to an update.
        devices: of all machines.
        updates: of the whole training.
        idle: settings that were given and change none of the numbers.
    """

    config: DALLEConfig
    sizes_from: str
    checkpointing: bool
    muon: bool
    averaged: bool
    precision: str
    batch_size: int
    accumulate: int
    devices: int
    updates: int
    idle: tuple[str, ...] = ()

    @property
    def batch(self) -> int:
        """Pictures to an update."""
        return self.batch_size * self.accumulate * self.devices


def read(config: str, settings: Mapping[str, Any] | None = None) -> Plan:
    """The plan of a config, with `settings` in place of its own: by their dotted keys, such as model.depth."""
    try:
        given = dict(_flat(yaml.safe_load(find_config(config).read_text(encoding="utf-8"))))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"{config} is no YAML file: {said}", "give a config of stage 2") from error
    idle, own_tokens = [], True
    for key, value in _flat(settings):
        whole = any(name.startswith(f"{key}.") for name in SETTINGS)
        if whole or not key.startswith(("model.", "data.", "trainer.")):
            raise UserError(f"{key} is no single setting of a training", f"what counts here: {', '.join(SETTINGS)}")
        name = next((name for name in SETTINGS if f"{key}.".startswith(f"{name}.")), None)
        if name is None:
            idle.append(key)
            continue
        own_tokens = own_tokens and name != "data.tokens"
        inner = key.removeprefix(name).removeprefix(".")  # model.expects holds several
        before = given.get(name)
        given[name] = {**(before if isinstance(before, Mapping) else {}), inner: value} if inner else value
    said = {key: given.get(key, default) for key, default in SETTINGS.items()}
    precision = said["trainer.precision"] or SETTINGS["trainer.precision"]  # Lightning writes null
    said["trainer.precision"] = _SHORT.get(str(precision), precision)
    said["trainer.devices"] = 1 if said["trainer.devices"] in _ALL else said["trainer.devices"]
    for key in ("model.depth", "model.width", "model.heads"):
        if said[key] is None:
            raise UserError(f"{config} does not say {key}", "give a config of stage 2, such as dalle/demo")
    trainer = ("max_steps", "accumulate_grad_batches", "devices", "num_nodes")
    for key in ("data.batch_size", *(f"trainer.{name}" for name in trainer)):
        if type(said[key]) is not int or said[key] < 1:
            raise UserError(f"{key} is {said[key]!r}", f"give a whole number from 1 on here, such as --{key} 1")
    for key in ("model.checkpointing", "model.optimiser.muon"):
        if type(said[key]) is not bool:
            raise UserError(f"{key} is {said[key]!r}", "give true or false")
    other = said["model.image_first.share"]
    if type(other) not in (int, float) or not 0 <= other < 1:
        raise UserError(f"model.image_first.share is {other!r}", "give a share from 0 to below 1, such as 0.25")
    ema = said["model.optimiser.ema"]
    try:
        share = 0.0 if ema is None else float(ema)  # YAML's 1e-3 is a text
    except (TypeError, ValueError):
        share = math.nan
    if not 0 <= share < 1:
        hint = "give a number from 0 to below 1, such as 0.999, or null"
        raise UserError(f"model.optimiser.ema is {ema!r}", hint)
    if said["trainer.precision"] not in [*_PRECISIONS]:
        raise UserError(f"trainer.precision is {said['trainer.precision']!r}", f"known here: {', '.join(_PRECISIONS)}")
    sizes, sizes_from = _sizes(said["model.expects"], said["data.tokens"], own_tokens)
    names = ("depth", "width", "heads", "mlp_ratio", "patterns")
    return Plan(
        config=DALLEConfig(
            **asdict(sizes),
            **{name: said[f"model.{name}"] for name in names},
            both_orders=said["model.image_first.share"] > 0,
        ),
        sizes_from=sizes_from,
        checkpointing=said["model.checkpointing"],
        muon=said["model.optimiser.muon"],
        averaged=ema is not None,
        precision=said["trainer.precision"],
        batch_size=said["data.batch_size"],
        accumulate=said["trainer.accumulate_grad_batches"],
        devices=said["trainer.devices"] * said["trainer.num_nodes"],
        updates=said["trainer.max_steps"],
        idle=tuple(idle),
    )


def _flat(settings: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested settings under their dotted keys; a setting that counts is a leaf, whatever it holds."""
    for name, value in settings.items() if isinstance(settings, Mapping) else ():
        key = f"{above}{name}"
        if isinstance(value, Mapping) and key not in SETTINGS:
            yield from _flat(value, f"{key}.")
        else:
            yield key, value


def _sizes(expects: Mapping[str, Any] | None, tokens: str | None, may_lack: bool) -> tuple[Sizes, str]:
    """Vocabularies, text length and grid, and who says so: the paper where a folder is not there and `may_lack`."""
    if expects is not None:
        try:
            return Sizes(**{**expects, "grid": tuple(expects["grid"])}), "model.expects"
        except (TypeError, KeyError) as error:
            hint = f"give just {', '.join(asdict(PAPER))}, or null"
            raise UserError(f"model.expects is {expects!r}", hint) from error
    prepared = Path(str(tokens)) / "prepared.json"
    if may_lack and not prepared.is_file():
        return PAPER, f"the paper: there are no tokens in {tokens}" if tokens else "the paper"
    try:
        return Sizes(**json.loads(prepared.read_bytes())["sizes"]), f"the tokens in {tokens}"
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{tokens} holds no prepared tokens", "make them with dalle prepare") from error


# ------------------------------------------------------------------------------------------------------- the counting


def count(plan: Plan) -> dict[str, Any]:
    """All numbers of a plan, as JSON takes them: parameters by part, bytes, FLOPs and keys.

    Raises:
        UserError: one of its tensors has more bytes than torch can count.
    """
    try:
        with torch.device("meta"):
            model = DALLE(plan.config)
    except RuntimeError as error:
        sizes = ", ".join(f"{name} {value}" for name, value in asdict(plan.config).items())
        raise UserError(f"no tensor can be so large: {sizes}", "give smaller sizes") from error
    return {
        "sizes": {**asdict(plan.config), "from": plan.sizes_from},
        "parameters": parameters(model),
        "memory": memory(model, plan),
        "activations of one picture": {
            name: activations(plan.config, plan.precision, again)
            for name, again in (("without checkpointing", False), ("with checkpointing", True))
        },
        "flops": flops(model, plan),
        "patterns": patterns(model),
    }


def parameters(model: DALLE) -> dict[str, int]:
    """Numbers to be learned in each part of the model, and in `all`."""
    counted = dict.fromkeys(dict.fromkeys(_PARTS.values()), 0)
    for name, parameter in model.named_parameters():
        counted[next(part for words, part in _PARTS.items() if words in name)] += parameter.numel()
    return {**counted, "all": sum(counted.values())}


def memory(model: DALLE, plan: Plan) -> dict[str, int]:
    """Bytes that one device holds at the height of a training: in a backward pass, with the gradients before it.

    Kernels' working memory, the batches, the masks and, with several devices, the buffers that exchange gradients come
    on top. `dvae.forecast.memory` finds the same by asking torch, for a training that is there already.
    """
    tensors, matrices = list(model.parameters()), _matrices(model)
    narrow, config = _PRECISIONS[plan.precision], plan.config
    with_muon = matrices if plan.muon else []
    moments = 2 * _numbers(tensors) - _numbers(with_muon)  # AdamW has two, Muon one
    updates = len(tensors) - len(with_muon)  # which AdamW counts for each tensor
    copied = config.depth if not plan.checkpointing else 1  # blocks, the one that is computed again or all
    rows = {
        "weights": _FULL * _numbers(tensors),
        "gradients": _FULL * _numbers(tensors),
        "optimiser": _FULL * (moments + updates),
        "averaged weights": _FULL * _numbers(tensors) * plan.averaged,
        "weights in 16 bits": narrow * _numbers(matrices) * copied // config.depth * (narrow < _FULL),
        "activations of a batch": plan.batch_size * activations(config, plan.precision, plan.checkpointing),
        "gradients of its logits": plan.batch_size * logit_gradients(config, plan.precision, plan.checkpointing),
    }
    return {**rows, "all": sum(rows.values())}


def activations(config: DALLEConfig, precision: str, checkpointing: bool) -> int:
    """Bytes that the backward pass needs of one picture.

    Of a block, in float32: what enters its two norms, their means and deviations, and the sum of each softmax. In the
    autocast's precision: what enters the four matrices, queries, keys and values, and what enters the GELU. After the
    blocks, in float32: what enters the norm and the heads, and the chances of all ids and codes. With checkpointing
    only what enters each block is kept, and the rest of one block at a time is made again, when the chances are gone.
    """
    entering, block, ends, _ = _of_one_picture(config, precision)
    if checkpointing:
        return config.depth * entering + max(ends, block - entering)
    return config.depth * block + ends


def logit_gradients(config: DALLEConfig, precision: str, checkpointing: bool) -> int:
    """Bytes of one picture that the way back through the larger head adds to `activations` at the height of them.

    Two gradients, of the logits and of their logarithms of chances, float32. With checkpointing a block that is
    computed again later may be the height instead.
    """
    entering, block, ends, chances = _of_one_picture(config, precision)
    return max(0, ends + 2 * chances - max(ends, block - entering)) if checkpointing else 2 * chances


def _of_one_picture(config: DALLEConfig, precision: str) -> tuple[int, int, int, int]:
    """Bytes of what enters a block, a block with it, what comes after the blocks, and the larger head's chances."""
    cells = math.prod(config.grid)
    states, predicted, narrow = config.text_length + 1 + cells, config.text_length + cells, _PRECISIONS[precision]
    entering = _FULL * states * config.width
    block = 2 * entering + _FULL * states * (4 + config.heads)
    block += narrow * states * config.width * (6 + 2 * config.mlp_ratio)
    chances = config.text_length * (config.vocab_text + config.text_length), cells * config.vocab_image
    # and the targets, int64, with a bool: is the caption kept?
    ends = entering + _FULL * (predicted * (config.width + 2) + sum(chances)) + 8 * predicted + 1
    return entering, block, ends, _FULL * max(chances)


def flops(model: DALLE, plan: Plan) -> dict[str, int]:
    """Floating-point operations of the matrix products, a multiplication with its addition counted as two.

    The backward pass has two products for each of the forward pass. `its attention` is what scores and values take of
    one picture: `all x all` as it is executed, for the masks of patterns are dense, `as needed` for the states that are
    read. A picture is drawn with the cache and without guidance, which would take twice as much.
    """
    config, layout, matrices = plan.config, model.layout, _numbers(_matrices(model))
    pair = 4 * config.width  # a state reads another: its score, and its share of the value
    masks = {kind: layout.mask(kind) for kind in set(config.kinds)}
    needed = pair * sum(int(masks[kind].sum()) for kind in config.kinds)
    drawn = pair * sum(int(masks[kind][layout.image].sum()) for kind in config.kinds)
    square = pair * layout.states**2 * config.depth
    heads = 2 * (config.text_length * model.text_head.weight.numel() + layout.cells * model.image_head.weight.numel())
    forward = 2 * layout.states * matrices + square + heads
    # computing a block again ends before its last product, whose result nothing needs
    last = _numbers(block.mlp.out.weight for block in model.blocks)
    again = plan.checkpointing * (2 * layout.states * (matrices - last) + square)
    picture = 3 * forward + again
    # of the states before the picture the last block computes keys and values only
    read, end = layout.text_length + 1, model.blocks[-1]
    unread = _numbers(layer.weight for layer in (end.attention.out, end.mlp.hidden, end.mlp.out))
    drawing = 2 * (layout.states * matrices - read * unread) + pair * read**2 * (config.depth - 1) + drawn
    return {
        "forward pass": forward,
        "backward pass": 2 * forward,
        "blocks computed again": again,
        "one picture": picture,
        "its attention, all x all": (3 + plan.checkpointing) * square,
        "its attention, as needed": (3 + plan.checkpointing) * needed,
        "one update": picture * plan.batch,
        "the training": picture * plan.batch * plan.updates,
        "drawing a picture": drawing + 2 * layout.cells * model.image_head.weight.numel(),
    }


def patterns(model: DALLE) -> dict[str, dict[str, float]]:
    """Of each kind of attention: its layers, and how many states an image state reads on average."""
    layout = model.layout
    return {
        kind: {"layers": layers, "keys": layout.mask(kind)[layout.image].sum(1).double().mean().item()}
        for kind, layers in Counter(model.config.kinds).items()
    }


def _matrices(model: DALLE) -> list[Tensor]:
    """Those that every state goes through."""
    return [parameter for parameter in model.blocks.parameters() if parameter.ndim == 2]


def _numbers(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


# ----------------------------------------------------------------------------------------------------------- the page


def page(plan: Plan, counted: Mapping[str, Any]) -> Iterator[str]:
    """The numbers for people, as one screen of lines."""
    config, (rows, columns) = plan.config, plan.config.grid
    yield f"{config.depth} blocks of width {config.width:,}, {config.heads} heads x {config.width // config.heads}"
    yield (
        f"{config.text_length} text ids of {config.vocab_text:,}, {rows} x {columns} image tokens of "
        f"{config.vocab_image:,}: sizes of {plan.sizes_from}"
    )
    yield (
        f"{plan.updates:,} updates of {plan.batch:,} pictures: batch_size {plan.batch_size:,} x accumulate "
        f"{plan.accumulate:,} x devices {plan.devices:,}"
    )
    if plan.idle:
        yield f"of no effect on these numbers: {', '.join(plan.idle)}"
    yield ""
    yield from _beside(
        [
            ("parameters", ""),
            *((name, _scaled(value, 1000, ["", "K", "M", "B"])) for name, value in counted["parameters"].items()),
        ],
        [
            (f"memory of one device, {plan.precision}", ""),
            *((name, _bytes(value)) for name, value in counted["memory"].items()),
        ],
    )
    yield ""
    yield from _beside(
        [("arithmetic", ""), *((name, _flops(value)) for name, value in counted["flops"].items())],
        [
            (f"attention, {config.text_length + 1 + rows * columns:,} states", "layers       reads"),
            *((kind, f"{at['layers']:6,} {at['keys']:11,.1f}") for kind, at in counted["patterns"].items()),
            ("", ""),
            ("activations of one picture", ""),
            *((name, _bytes(value)) for name, value in counted["activations of one picture"].items()),
        ],
    )


def _beside(left: Sequence[tuple[str, str]], right: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Two tables of names and values, the first row of each its title."""
    for own, other in zip_longest(left, right, fillvalue=("", "")):
        yield f"{own[0]:<26}{own[1]:>14}    {other[0]:<34}{other[1]:>18}".rstrip()


def _scaled(value: float, base: int, units: Sequence[str]) -> str:
    steps = 0
    while value >= base and steps < len(units) - 1:
        value, steps = value / base, steps + 1
    return f"{value:,.2f} {units[steps]:<{len(units[-1])}}" if steps or value else "-"


def _bytes(value: int) -> str:
    return _scaled(value, 1024, ["B", "KiB", "MiB", "GiB", "TiB"])


def _flops(value: float) -> str:
    return _scaled(value, 1000, [f"{prefix}FLOP" for prefix in ("", "k", "M", "G", "T", "P", "E", "Z")])
