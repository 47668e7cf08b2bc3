"""A yardstick for rankers: a small CLIP-style model, trained from nothing on the budget of a transformer.

    python tests/benchmarks/yardstick.py scenes:train:20000 --val scenes:val:500 --text runs/demo/tokens/text.json \
        --steps 700 --batch 64 --parameters 1900000 --out runs/yardstick

The project ranks its samples by the model that drew them; CLIP would rank them by a second model. To compare the two
fairly, that second model gets what the transformer had: the same captioned pictures, about as many parameters, as many
updates of as many pairs. An image encoder and a text encoder map both to unit vectors, and a symmetric InfoNCE over the
batch with a learned temperature draws pairs together (Radford et al. 2021). Writes OUT.safetensors and OUT.json.

The first blocks of the image encoder see 8 x 8 places, the others 4 x 4, and their mean is the picture's vector. With
`--near N`, batches hold near neighbours after NEAR_FROM of the updates: half of a batch are captions of almost the same
words as the other half. Among pairs by chance two colours tell nearly every caption from all others, and "above" for
"below" is hardly ever punished.

B batch, M pictures, D joint width, S side of a picture in pixels, T ids of a caption.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from dalle.pairs import open_pairs
from dalle.text import Text
from dvae import files, scenes, seeds, tokenizer
from dvae.data import Endless, Source, split
from dvae.errors import DataError, UserError
from dvae.optim import Optimiser
from dvae.schedules import Schedule

GRID, DEPTH, HEADS = 8, 2, 4  # places along a side; blocks of each of the three towers; heads in all of them
TOLERANCE = 0.05  # by which the number of parameters may differ from the one that was asked for
HOTTEST = 100.0  # largest scale of the cosines, as in CLIP
NEAR_FROM = 0.4  # of the updates, the share after which batches hold near neighbours
JOINT = 128  # D

Pairs = tuple[Tensor, Sequence[Sequence[str]]]


# ---------------------------------------------------------------------------------------------------------- model


@dataclass(frozen=True)
class Config:
    """image_size: S. ids: of the vocabulary, its pads not counted. width: of the towers; the first one has half of it.
    hidden: of their MLPs."""

    image_size: int
    ids: int
    text_length: int
    width: int
    hidden: int


class Block(nn.Module):
    """Attention and an MLP, each added to what comes in, which is normalised before it."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.inputs, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor, heard: Tensor | None = None) -> Tensor:
        """(B, N, w) -> (B, N, w); `heard`, bool (B, 1, 1, N), are the places that may be looked at."""
        parts = self.inputs(self.before(x)).chunk(3, -1)
        query, key, value = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        found = F.scaled_dot_product_attention(query, key, value, heard)
        x = x + self.output(found.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.between(x))))


class Encoders(nn.Module):
    """Pictures and captions -> unit vectors of one space. Muon moves the matrices in `blocks`, as the transformer's."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        width, hidden, stride = config.width, config.hidden, config.image_size // (2 * GRID)
        half = width // 2
        self.near = nn.Conv2d(3, half // 2, stride + 2, stride, padding=1)
        self.far = nn.Conv2d(half // 2, half, 4, 2, padding=1)
        self.place = nn.Parameter(0.02 * torch.randn(GRID**2, half))
        self.merge = nn.Conv2d(half, width, 2, 2)
        self.words = nn.Embedding(config.ids + 1, width)  # the last one reads the caption
        nn.init.normal_(self.words.weight, std=0.02)
        self.position = nn.Parameter(0.02 * torch.randn(config.text_length + 1, width))
        towers = {"fine": (half, 2 * width), "coarse": (width, hidden), "text": (width, hidden)}
        self.blocks = nn.ModuleDict(
            {name: nn.ModuleList(Block(*sizes) for _ in range(DEPTH)) for name, sizes in towers.items()}
        )
        self.seen, self.read = nn.LayerNorm(width), nn.LayerNorm(width)
        self.of_image = nn.Linear(width, JOINT)
        self.of_text = nn.Linear(width, JOINT)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def image(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) in [0, 1] -> float32 (B, D)."""
        x = self.far(F.gelu(self.near((images - 0.5) / 0.25)))
        x = x.flatten(2).transpose(1, 2) + self.place
        for block in self.blocks["fine"]:
            x = block(x)
        x = self.merge(x.transpose(1, 2).unflatten(2, (GRID, GRID))).flatten(2).transpose(1, 2)
        for block in self.blocks["coarse"]:
            x = block(x)
        return F.normalize(self.of_image(self.seen(x).mean(1)).float(), dim=-1)

    def text(self, ids: Tensor) -> Tensor:
        """int64 (B, T), as `Text.encode` gives them -> float32 (B, D)."""
        reader = self.config.ids
        heard = F.pad(ids < reader, (1, 0), value=True)[:, None, None]
        x = self.words(F.pad(ids.clamp(max=reader), (1, 0), value=reader)) + self.position
        for block in self.blocks["text"]:
            x = block(x, heard)
        return F.normalize(self.of_text(self.read(x[:, 0])).float(), dim=-1)

    def scale(self) -> Tensor:
        """By what cosines are multiplied: one over the temperature."""
        return self.log_scale.clamp(max=math.log(HOTTEST)).exp()


def fitted(image_size: int, text: Text, parameters: int) -> Config:
    """The model of about `parameters` numbers: as wide as it can be with MLPs of four times the width, and these then
    as much larger as is needed.

    Raises:
        UserError: no model comes within TOLERANCE of it, or pictures are not of a multiple of 16 pixels.
    """
    if image_size % (2 * GRID):
        raise UserError(f"pictures have {image_size} pixels a side", f"give a multiple of {2 * GRID}")

    def count(width: int, hidden: int) -> int:
        with torch.random.fork_rng([]):
            model = Encoders(Config(image_size, text.vocab_size, text.text_length, width, hidden))
        return sum(parameter.numel() for parameter in model.parameters())

    width = 2 * HEADS
    while count(width + 2 * HEADS, 4 * (width + 2 * HEADS)) <= parameters:
        width += 2 * HEADS
    base, unit = count(width, 4 * width), count(width, 4 * width + 1) - count(width, 4 * width)
    hidden = max(1, 4 * width + round((parameters - base) / unit))
    if abs(count(width, hidden) / parameters - 1) > TOLERANCE:
        raise UserError(f"no yardstick has {parameters:,} parameters", f"the smallest has {count(width, 1):,}")
    return Config(image_size, text.vocab_size, text.text_length, width, hidden)


class Yardstick:
    """A trained pair of encoders with its vocabulary. `about` says how it was trained and what was measured."""

    def __init__(self, model: Encoders, text: Text, about: dict[str, Any]):
        self.model, self.text, self.about = model.eval().requires_grad_(False), text, about

    def images(self, images: Tensor) -> Tensor:
        """Unit vectors (B, D) of pictures (B, 3, S, S) in [0, 1]."""
        return torch.cat([self.model.image(some) for some in images.split(256)])

    def captions(self, captions: Sequence[str]) -> Tensor:
        """Unit vectors (B, D) of captions."""
        return torch.cat([self.model.text(some) for some in self.text.encode(captions).split(256)])

    def score(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """(B,): the cosine of each of the pictures (B, 3, S, S) in [0, 1] and its caption; higher is better."""
        return (self.images(images) * self.captions(captions)).sum(1)

    def save(self, file: str | Path) -> None:
        """Write FILE.safetensors and FILE.json."""
        files.write_bytes(f"{file}.safetensors", safetensors.torch.save(self.model.state_dict()))
        described = {"config": asdict(self.model.config), "text": json.loads(self.text.to_json()), "about": self.about}
        files.write_json(f"{file}.json", described)


def load(file: str | Path) -> Yardstick:
    """The yardstick that `save` wrote under this name."""
    described = json.loads(Path(f"{file}.json").read_text())
    model = Encoders(Config(**described["config"]))
    model.load_state_dict(safetensors.torch.load_file(f"{file}.safetensors"))
    return Yardstick(model, Text.from_json(json.dumps(described["text"])), described["about"])


# ------------------------------------------------------------------------------------------------------- training


def infonce(images: Tensor, captions: Tensor, scale: Tensor | float, same: Tensor) -> Tensor:
    """The mean of two cross-entropies: which caption of the batch is a picture's, and which picture a caption's.

    Args:
        images, captions: unit vectors (B, D), row i of both from pair i.
        same: bool (B, B), true where two pairs have the same caption: all of them are right answers, in equal shares.
    """
    logits, target = scale * images @ captions.T, same.float() / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def neighbours(ids: Tensor, vocab_size: int, count: int) -> Tensor:
    """int64 (M, count): the other captions of (M, T) with the most words in common, rare words counting more.

    Those of the very same ids come last, for they are no other captions.
    """
    words = torch.zeros(len(ids), vocab_size + 1).scatter_add_(1, ids.clamp(max=vocab_size), torch.ones(ids.shape))
    words = words[:, :vocab_size]  # without pads
    words = F.normalize(words * (len(ids) / (1 + (words > 0).sum(0))).log().clamp_min(0.1))
    order = torch.unique(ids, dim=0, return_inverse=True)[1]
    found = []
    for some, own in zip(words.split(1024), order.split(1024), strict=True):
        found.append((some @ words.T).masked_fill_(own[:, None] == order, -1).topk(count).indices)
    return torch.cat(found)


def varied(images: Tensor, chance: torch.Generator, shift: int, colour: float = 0.1) -> Tensor:
    """Training pictures (B, 3, S, S), each moved by up to `shift` pixels, tinted a little, and half of them softened.

    Never mirrored, for captions may say "left". What will be scored comes out of a decoder, which softens and tints.
    """
    count, _, side, _ = images.shape
    padded = F.pad(images, (shift,) * 4, mode="replicate")
    corners = torch.randint(2 * shift + 1, (count, 2), generator=chance).tolist()
    images = torch.stack([one[:, y : y + side, x : x + side] for one, (y, x) in zip(padded, corners, strict=True)])
    contrast, tint = (2 * torch.rand(count, parts, 1, 1, generator=chance) - 1 for parts in (1, 3))
    images = 0.5 + (images - 0.5) * (1 + colour * contrast) + colour / 2 * tint
    line = torch.tensor([0.25, 0.5, 0.25])
    soft = F.conv2d(F.pad(images, (1,) * 4, mode="replicate"), torch.outer(line, line).repeat(3, 1, 1, 1), groups=3)
    return images.lerp(soft, (2 * torch.rand(count, 1, 1, 1, generator=chance) - 1).clamp_min(0))


def train(
    pairs: Source | Pairs,
    text: Text,
    steps: int = 700,
    parameters: int = 1_900_000,
    batch: int = 64,
    seed: int = 0,
    learning_rate: float = 3e-3,
    weight_decay: float = 0.2,
    near: int = 0,
    progress: bool = False,
) -> Yardstick:
    """A yardstick, trained from nothing; the averaged weights of all updates are kept, as of the transformer.

    Args:
        pairs: rows of a data source, or pictures, uint8 (M, 3, S, S), and the captions of each.
        steps: updates, each of `batch` pairs.
        parameters: how many numbers may be learned; see `fitted`.
        near: after NEAR_FROM of the updates half of a batch are drawn by chance, and the other half are for each of
            these one of so many captions of the most similar words; 0: all of them are always drawn by chance.
    """
    images, captions = pairs if isinstance(pairs, tuple) else gathered(pairs)
    begin = time.process_time()
    config = fitted(images.shape[-1], text, parameters)
    with torch.random.fork_rng([]):
        torch.manual_seed(seeds.key("yardstick", seed))
        model = Encoders(config)
    warmup = max(1, steps // 14)  # 50 of 700, as the demo's transformer
    rate = Schedule(learning_rate, learning_rate / 50, max(1, steps - warmup), warmup)
    optimiser = Optimiser(rate, weight_decay=weight_decay, beta2=0.96, muon=True).build(model)
    averaged = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(min(0.99, 1 - 7 / (steps + 7)))
    )
    first = text.encode([spoken[0] for spoken in captions])
    alike = neighbours(first, text.vocab_size, near) if near else None
    batches = zip(range(steps), Endless(len(images), batch, seed), strict=False)
    for step, drawn in tqdm(batches, "yardstick", total=steps, disable=not progress):
        chance = seeds.generator("yardstick", seed, step)
        rows = torch.tensor([row for _, row in drawn])
        if alike is not None and step >= NEAR_FROM * steps:
            rows = rows[: (batch + 1) // 2]
            chosen = torch.randint(alike.shape[1], (len(rows), 1), generator=chance)
            rows = torch.cat([rows, alike[rows].gather(1, chosen)[:, 0]])[:batch]
        which = torch.rand(len(rows), generator=chance).tolist()
        spoken = [captions[row][int(part * len(captions[row]))] for row, part in zip(rows.tolist(), which, strict=True)]
        ids = text.encode(spoken)
        pictures = varied(images[rows].float() / 255, chance, shift=config.image_size // 32 or 1)
        for group in optimiser.param_groups:
            group["lr"] = rate(step)
        with torch.autocast("cpu", torch.bfloat16):
            seen, read = model.image(pictures), model.text(ids)
        loss = infonce(seen, read, model.scale(), (ids[:, None] == ids).all(2))
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 4.0)
        optimiser.step()
        averaged.update_parameters(model)
    about = {"steps": steps, "batch": batch, "seed": seed, "pictures": len(images), "learning_rate": learning_rate}
    about |= {"weight_decay": weight_decay, "near": near, "parameters": sum(p.numel() for p in model.parameters())}
    about |= {"loss": loss.item(), "scale": model.scale().item(), "cpu_seconds": time.process_time() - begin}
    return Yardstick(averaged.module, text, about)


def gathered(source: Source) -> Pairs:
    """All rows of a source in memory: pictures, uint8 (M, 3, S, S), and the captions of each."""
    return source.images(range(len(source))), [source.captions(row) for row in range(len(source))]


# ------------------------------------------------------------------------------------------------------ measuring

_NAMES = {word: name for name, words in scenes.SPOKEN.items() for word in words}
_WORDS = {
    "colour": tuple(scenes.COLOURS),
    "shape": tuple(scenes.SHAPES),
    "size": tuple(scenes.SIZES),
    "background": tuple(scenes.BACKGROUNDS),
    "relation": ("above", "below"),
    "side": ("left", "right"),
}


def of_scene(caption: str) -> list[tuple[str, str]]:
    """(which word, caption) for each way to make a true caption of a scene false by one word."""
    words, false = caption.split(), []
    for place, word in enumerate(words):
        for kind, names in _WORDS.items():
            if _NAMES.get(word, word) in names:
                others = [name for name in names if name != _NAMES.get(word, word)]
                false += [(kind, " ".join([*words[:place], other, *words[place + 1 :]])) for other in others]
    return [(kind, other) for kind, other in false if scenes.parse(other) != scenes.parse(caption)]


def of_others(caption: str, captions: Sequence[str]) -> list[tuple[str, str]]:
    """("word", caption) for each of other captions that differs in exactly one word."""
    words = caption.split()
    others = [other for other in dict.fromkeys(captions) if len(other.split()) == len(words)]
    return [("word", other) for other in others if sum(map(str.__ne__, words, other.split())) == 1]


@torch.inference_mode()
def measured(yardstick: Yardstick, images: Tensor, captions: Sequence[str], among: int = 64) -> dict[str, float]:
    """How well real pictures (M, 3, S, S) in [0, 1], none of them trained on, are told by their captions.

    Returns:
        `one_word`: how often the true caption has a higher score than one that differs by a word, and the same for
        each kind of word; `all_words`: how often it has a higher score than all of these; `retrieval`: how often it,
        or one of the same text, has the highest of `among` captions; and `pictures` M.
    """
    try:
        false = [of_scene(caption) for caption in captions]
    except DataError:  # no scenes
        false = [of_others(caption, captions) for caption in captions]
    seen, read = yardstick.images(images), yardstick.captions(captions)
    own, kept, kinds = (seen * read).sum(1), [], {}
    for row, others in enumerate(false):
        wins = (own[row] > yardstick.captions([other for _, other in others]) @ seen[row]).tolist() if others else []
        for (kind, _), win in zip(others, wins, strict=True):
            kinds.setdefault(kind, []).append(win)
        kept += [all(wins)] if others else []
    hits = []
    for first in range(0, len(captions) - among + 1, among):
        some = slice(first, first + among)
        best = (seen[some] @ read[some].T).argmax(1).tolist()
        hits += [captions[first + row] == captions[first + place] for row, place in enumerate(best)]

    def mean(wins: list[bool]) -> float:
        return sum(wins) / len(wins) if wins else math.nan

    found = {"one_word": mean([win for wins in kinds.values() for win in wins])}
    found |= {f"one_word {kind}": mean(wins) for kind, wins in kinds.items()}
    return found | {"all_words": mean(kept), "retrieval": mean(hits), "pictures": len(images)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="data source of the pictures with captions")
    parser.add_argument("--val", help="another source to measure on; without it a part of `data` is set aside")
    parser.add_argument("--val_share", type=float, default=0.05)
    parser.add_argument("--hold_out", help="a regular expression: the captions that are set aside, instead of a share")
    parser.add_argument("--text", required=True, help="a vocabulary, as `dalle vocab` writes it")
    parser.add_argument("--dvae", help="image tokenizer, on whose reconstructions it is measured too")
    parser.add_argument("--size", type=int, default=32, help="side of the pictures, pixels")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--parameters", type=int, default=1_900_000)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--weight_decay", type=float, default=0.2)
    parser.add_argument("--near", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    training = open_pairs(given.data, given.size)
    if given.val is None:
        training, held = split(training, given.val_share, given.hold_out)
    else:
        held = open_pairs(given.val, given.size)
    yardstick = train(
        training,
        Text.from_file(given.text),
        given.steps,
        given.parameters,
        given.batch,
        given.seed,
        given.learning_rate,
        given.weight_decay,
        given.near,
        progress=True,
    )
    yardstick.save(given.out)
    pictures, captions = gathered(held)
    parts, first = {"held out": pictures.float() / 255}, [spoken[0] for spoken in captions]
    if given.dvae:
        stage_1 = tokenizer.load(given.dvae)
        with torch.inference_mode():
            again = [stage_1.decode(stage_1.encode(some)) for some in parts["held out"].split(64)]
        parts["held out, reconstructed"] = torch.cat(again)
    for name, real in parts.items():
        yardstick.about[name] = measured(yardstick, real, first)
        print(f"{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in yardstick.about[name].items()))
    yardstick.save(given.out)
    print(f"wrote {given.out}.safetensors and {given.out}.json: {json.dumps(yardstick.about)}")


if __name__ == "__main__":
    main()
