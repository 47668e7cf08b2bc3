"""Judges of real pictures, from outside of the models: does a picture show what its caption says?

    python tests/benchmarks/judges.py cifar10 ../shared/data/cifar10 --out runs/judge-cifar10 --dvae runs/cifar10-dvae
    python tests/benchmarks/judges.py emoji ../shared/data/noto-emoji --out runs/judge-emoji --dvae emoji

Scenes have an exact judge (`dvae.scenes.judge`); photos and emoji have none. Here one is a small classifier, trained
from nothing on the real training pictures of the same split as stages 1 and 2, which reads a caption by closed lists as
one value for each of some attributes. A picture shows its caption if it is classified as all of them. How far such a
judge may be trusted is measured on real pictures that it has not seen, and on their reconstructions by stage 1
(`--dvae`). Writes OUT.safetensors, OUT.json and OUT.pt2, the net without its heads, for `evaluate --features`.

B batch, M pictures, S side of a picture in pixels.
"""

import argparse
import itertools
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from dalle.pairs import open_pairs
from dvae import files, seeds, tokenizer
from dvae.data import Endless, Source, split
from dvae.errors import DataError
from dvae.optim import Optimiser
from dvae.schedules import Schedule

HOLD = (  # of the emoji, as in configs/dvae/emoji.yaml
    "man (?!and )[a-m].* dark skin tone|woman (?!and )[a-m].* light skin tone"
    "|man [n-z].* light skin tone|woman [n-z].* dark skin tone"
)
PHOTOS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PERSONS = ("man", "woman", "person")
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
YELLOW = "yellow"  # the tone of a caption that names none
HAIR = ("bald", "beard", "blond hair", "curly hair", "red hair", "white hair")  # these stand after the tone
# what a man, a woman and a person can be or do, each in up to six tones; those of fewer pictures are left out
ACTIVITIES = (
    "artist", "astronaut", "biking", "bouncing ball", "bowing", "cartwheeling", "climbing", "construction worker",
    "cook", "dancing", "detective", "elf", "facepalming", "factory worker", "fairy", "farmer", "feeding baby",
    "firefighter", "frowning", "gesturing no", "gesturing ok", "getting haircut", "getting massage", "golfing",
    "guard", "health worker", "in lotus position", "in manual wheelchair", "in manual wheelchair facing right",
    "in motorized wheelchair", "in motorized wheelchair facing right", "in steamy room", "in tuxedo", "judge",
    "juggling", "kneeling", "kneeling facing right", "lifting weights", "mage", "mechanic", "mountain biking",
    "office worker", "pilot", "playing handball", "playing water polo", "police officer", "pouting", "raising hand",
    "rowing boat", "running", "running facing right", "scientist", "shrugging", "singer", "standing", "student",
    "superhero", "supervillain", "surfing", "swimming", "teacher", "technologist", "tipping hand", "vampire",
    "walking", "walking facing right", "wearing turban", "with headscarf", "with veil", "with white cane",
    "with white cane facing right",
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------- captions


def read_photo(caption: str) -> tuple[str, ...] | None:
    """The word of "a photo of a frog"; None for another caption."""
    found = re.fullmatch(r"a photo of an? (\w+)", caption.strip().lower())
    return (found[1],) if found and found[1] in PHOTOS else None


_TONE = f"(?: (?P<tone>{'|'.join(TONES)}) skin tone)?"
_EMOJI = (
    re.compile(f"(?:(?P<person>{'|'.join(PERSONS)}) )?(?P<activity>{'|'.join(ACTIVITIES)}){_TONE}"),
    re.compile(f"(?P<person>{'|'.join(PERSONS)}){_TONE} (?P<activity>{'|'.join(HAIR)})"),
)


def read_emoji(caption: str) -> tuple[str, ...] | None:
    """(person, activity, tone) of a composition; None for a caption that is none.

    "artist" alone is a person; without a tone an emoji is yellow.
    """
    plain = " ".join(caption.lower().split())
    found = next(filter(None, (form.fullmatch(plain) for form in _EMOJI)), None)
    return found and (found["person"] or "person", found["activity"], found["tone"] or YELLOW)


@dataclass(frozen=True)
class Kind:
    """What one kind of pictures is judged by, and how its judge is trained.

    Args:
        read: a caption -> its value of each attribute, or None where the lists do not cover it.
        attributes: name -> values, in the order in which `read` gives them.
        size: side of the pictures, pixels.
        stride: of the first convolution.
        steps: updates, of `batch` pictures each.
        mirrored: whether a mirrored picture shows the same.
        colour: by how much, of 1, a training picture is made brighter or darker.
        share: of the pictures that is held out, where no caption is by `hold_out`, a regular expression.
    """

    read: Callable[[str], tuple[str, ...] | None]
    attributes: dict[str, tuple[str, ...]]
    size: int
    stride: int
    steps: int
    batch: int
    learning_rate: float
    mirrored: bool
    colour: float
    share: float = 0.02
    hold_out: str | None = None


_EMOJI_VALUES = {"person": PERSONS, "activity": ACTIVITIES + HAIR, "tone": (*TONES, YELLOW)}
KINDS = {
    "cifar10": Kind(read_photo, {"word": PHOTOS}, 32, 1, 2000, 128, 4e-3, True, 0.1),
    "emoji": Kind(read_emoji, _EMOJI_VALUES, 64, 2, 1500, 64, 4e-3, False, 0.02, hold_out=HOLD),
}
SHIFT = 8  # training pictures are moved by up to a so manieth part of their side

# ---------------------------------------------------------------------------------------------------------- model


class Residual(nn.Module):
    """A convolution that halves the picture, and two that add to it."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.halve = convolution(inputs, width, stride=2)
        self.more = nn.Sequential(convolution(width, width), convolution(width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.halve(x)
        return x + self.more(x)


def convolution(inputs: int, width: int, stride: int = 1) -> nn.Sequential:
    filters = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
    return nn.Sequential(filters, nn.BatchNorm2d(width), nn.GELU())


class Net(nn.Module):
    """Pictures `(B, 3, S, S)` in [0, 1] -> a list of logits `(B, values)`, one for each attribute."""

    def __init__(self, kind: Kind, widths: Sequence[int]):
        super().__init__()
        self.first = convolution(3, widths[0], kind.stride)
        self.parts = nn.Sequential(*(Residual(a, b) for a, b in itertools.pairwise(widths)))
        self.heads = nn.ModuleList(nn.Linear(2 * widths[-1], len(values)) for values in kind.attributes.values())
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.features(images)
        return [head(x) for head in self.heads]

    def features(self, images: Tensor) -> Tensor:
        """What the heads read, `(B, D)`."""
        x = ((images - 0.5) / 0.25).contiguous(memory_format=torch.channels_last)
        x = self.parts(self.first(x))
        return torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)


class Features(nn.Module):
    """The net without its heads, as a module of its own."""

    def __init__(self, net: Net):
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return self.net.features(images)


class Judge:
    """A trained classifier and the lists that it reads captions by. `about` holds what its training measured."""

    def __init__(self, name: str, net: Net, about: dict[str, Any]):
        self.name, self.kind, self.net, self.about = name, KINDS[name], net.eval().requires_grad_(False), about

    def knows(self, caption: str) -> bool:
        """Whether the lists cover a caption, so that pictures of it can be judged."""
        return self.kind.read(caption) is not None

    def see(self, images: Tensor) -> list[tuple[str, ...]]:
        """The most likely value of each attribute, for each of the pictures `(B, 3, S, S)` in [0, 1]."""
        seen = []
        for some in images.split(256):
            logits = self.net(some)
            if self.kind.mirrored:
                logits = [sum(two) for two in zip(logits, self.net(some.flip(3)), strict=True)]
            best = torch.stack([values.argmax(1) for values in logits], 1)
            seen += [tuple(map(tuple.__getitem__, self.kind.attributes.values(), row)) for row in best.tolist()]
        return seen

    def right(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """bool `(B, attributes)`: which attributes of its caption each of the pictures, as for `see`, shows.

        Raises:
            DataError: a caption is outside of the lists.
        """
        claims = [self.kind.read(caption) for caption in captions]
        if None in claims:
            raise DataError(f"the judge of {self.name} cannot read {captions[claims.index(None)]!r}", "ask it `knows`")
        pairs = zip(claims, self.see(images), strict=True)
        return torch.tensor([list(map(str.__eq__, claim, seen)) for claim, seen in pairs]).reshape(len(claims), -1)

    def judge(self, images: Tensor, captions: Sequence[str]) -> list[bool]:
        """Does each of the pictures `(B, 3, S, S)` in [0, 1] show its caption, in all attributes? Raises as `right`."""
        return self.right(images, captions).all(1).tolist()

    def save(self, file: str | Path) -> None:
        """Write FILE.safetensors, FILE.json, and FILE.pt2: pictures `(B, 3, S, S)` in [0, 1] -> features `(B, D)`."""
        tensors = {name: tensor.contiguous() for name, tensor in self.net.state_dict().items()}
        files.write_bytes(f"{file}.safetensors", safetensors.torch.save(tensors))
        files.write_json(f"{file}.json", {"kind": self.name, "about": self.about})
        some = torch.zeros(2, 3, self.kind.size, self.kind.size)
        program = torch.export.export(Features(self.net), (some,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
        torch.export.save(program, f"{file}.pt2")


def load(file: str | Path) -> Judge:
    """The judge that `save` wrote under this name."""
    described = json.loads(Path(f"{file}.json").read_text())
    tensors = safetensors.torch.load_file(f"{file}.safetensors")
    widths = described["about"]["widths"]
    net = Net(KINDS[described["kind"]], widths)
    net.load_state_dict(tensors)
    return Judge(described["kind"], net, described["about"])


# ------------------------------------------------------------------------------------------------------- training


def known(source: Source, kind: Kind) -> tuple[Tensor, list[str]]:
    """The pictures, uint8 `(M, 3, S, S)`, of all rows with a caption that the lists cover, and these captions."""
    captions = [next(filter(kind.read, source.captions(row)), None) for row in range(len(source))]
    rows = [row for row, caption in enumerate(captions) if caption is not None]
    return source.images(rows), [captions[row] for row in rows]


def varied(images: Tensor, kind: Kind, chance: torch.Generator) -> Tensor:
    """Training pictures `(B, 3, S, S)` in [0, 1], each moved, made lighter or darker, noisy, and half of them blurred.

    Blur and noise are there because what is judged comes out of a decoder, which loses the finest lines.
    """
    count, _, side, _ = images.shape

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, 1, generator=chance)

    far = side // SHIFT
    padded = F.pad(images, (far,) * 4, mode="replicate")
    corners = torch.randint(2 * far + 1, (count, 2), generator=chance).tolist()
    moved = [one[:, y : y + side, x : x + side] for one, (y, x) in zip(padded, corners, strict=True)]
    if kind.mirrored:
        flips = torch.rand(count, generator=chance) < 0.5
        moved = [one.flip(2) if flip else one for one, flip in zip(moved, flips.tolist(), strict=True)]
    images = torch.stack(moved)
    small = F.interpolate(images, scale_factor=0.5, mode="area")
    blurred = F.interpolate(small, scale_factor=2, mode="bilinear")
    images = images.lerp(blurred, uniform(-1, 1).clamp_min(0))
    images = images * uniform(1 - kind.colour, 1 + kind.colour) + uniform(-kind.colour, kind.colour)
    return images + uniform(0, 0.05) * torch.randn(images.shape, generator=chance)


def train(
    name: str,
    images: Tensor,
    captions: Sequence[str],
    steps: int | None = None,
    widths: Sequence[int] = (32, 64, 128, 256),
    seed: int = 0,
) -> Judge:
    """A judge of the kind `name`, trained from nothing on pictures, uint8 `(M, 3, S, S)`, and a caption of each.

    The averaged weights of all updates are kept, as in the trainings of both stages.
    """
    kind, begin = KINDS[name], time.process_time()
    steps = steps or kind.steps
    places = [dict(map(reversed, enumerate(values))) for values in kind.attributes.values()]
    answers = torch.tensor([list(map(dict.__getitem__, places, kind.read(caption))) for caption in captions])
    with torch.random.fork_rng([]):
        torch.manual_seed(seeds.key("judge", name, seed))
        net = Net(kind, widths)
    rate = Schedule(kind.learning_rate, 0.0, steps - steps // 10, steps // 10)
    optimiser = Optimiser(rate, weight_decay=0.05, beta2=0.98).build(net)
    averaged = torch.optim.swa_utils.AveragedModel(
        net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99), use_buffers=True
    )
    batches = zip(range(steps), Endless(len(images), kind.batch, seed), strict=False)
    for step, rows in tqdm(batches, f"judge of {name}", total=steps, disable=None):
        some = torch.tensor([row for _, row in rows])
        pictures = varied(images[some].float() / 255, kind, seeds.generator("varied", seed, step))
        with torch.autocast("cpu", torch.bfloat16):
            logits = net(pictures)
        pairs = zip(logits, answers[some].T, strict=True)
        loss = sum(F.cross_entropy(values.float(), right, label_smoothing=0.1) for values, right in pairs)
        for group in optimiser.param_groups:
            group["lr"] = rate(step)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        averaged.update_parameters(net)
    about = {"widths": list(widths), "steps": steps, "batch": kind.batch, "seed": seed, "pictures": len(images)}
    return Judge(name, averaged.module, about | {"loss": loss.item(), "cpu_seconds": time.process_time() - begin})


def measured(judge: Judge, images: Tensor, captions: Sequence[str]) -> dict[str, float]:
    """The share of pictures `(M, 3, S, S)` in [0, 1] of which each attribute, and `all`, is classified right."""
    right = judge.right(images, captions)
    shares = dict(zip(judge.kind.attributes, right.float().mean(0).tolist(), strict=True))
    return shares | {"all": right.all(1).float().mean().item(), "pictures": len(images)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("data", help="data source of the pictures with captions")
    parser.add_argument("--out", required=True)
    parser.add_argument("--dvae", help="image tokenizer, on whose reconstructions the judge is measured too")
    parser.add_argument("--steps", type=int, help="updates, other than the kind says")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    kind = KINDS[given.kind]
    training, held = split(open_pairs(given.data, kind.size), kind.share, kind.hold_out)
    pictures, captions = known(training, kind)
    held_pictures, held_captions = known(held, kind)
    print(f"training: {len(captions)} of {len(training)} pictures; held out: {len(held_captions)} of {len(held)}")
    judge = train(given.kind, pictures, captions, given.steps, seed=given.seed)
    chosen = seeds.rng("measured").permutation(len(captions))[:1000]
    parts = {
        "training": (pictures[chosen].float() / 255, [captions[row] for row in chosen]),
        "held out": (held_pictures.float() / 255, held_captions),
    }
    if given.dvae:
        stage_1 = tokenizer.load(given.dvae)
        for name, (real, spoken) in list(parts.items()):
            with torch.inference_mode():
                again = torch.cat([stage_1.decode(stage_1.encode(some)) for some in real.split(64)])
            parts[f"{name}, reconstructed"] = again, spoken
    for name, (real, spoken) in parts.items():
        judge.about[name] = measured(judge, real, spoken)
        print(f"{name}: {judge.about[name]}")
    judge.save(given.out)
    print(f"wrote {given.out}.safetensors and {given.out}.json, {judge.about['cpu_seconds']:.0f} s on one core")


if __name__ == "__main__":
    main()
