"""Does an edit do what the caption says? On scenes, with the exact judge, for several ways to draw and to rank.

    python tests/benchmarks/editing.py RUN                      # 200 pictures of scenes:val and of scenes:heldout

Of each drawn scene one of the two objects is masked, with every patch that its box touches, and redrawn with the
scene's caption, or with one of another object in its place. Counted are the pictures of which the judge says that they
show their caption: both objects, their places and the background. The other object's pixels are kept, so what is judged
is the redrawn one, and whether it stands clear of the other. All ways draw with the same seeds.
"""

import argparse
import itertools
import json
import time
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

import dalle
from dalle import edit, rerank
from dalle.candidates import Share
from dalle.pipeline import Pipeline
from dvae import scenes
from dvae.images import to_uint8
from dvae.seeds import rng

RANKERS = ("none", "rest", "likelihood", "half-pmi", "pmi", "caption", "caption-seen", "combined")


class Task(NamedTuple):
    """A picture, uint8 (3, S, S), its caption, and bool (h, w): the cells of one of its objects."""

    picture: Tensor
    caption: str
    redrawn: Tensor


class Way(NamedTuple):
    """How candidates are drawn.

    hide: whether what is masked is hidden from the tokenizer. pasted: whether scores of what is seen read the edited
    picture, or one that is painted whole.
    """

    temperature: float = 1.0
    guidance: float = 1.0
    resample: bool = True
    passes: int = 0
    hide: bool = True
    pasted: bool = True


def task(split: str, index: int, size: int, grid: tuple[int, int], change: bool) -> Task:
    """Object `index % 2` of a scene; with `change` the caption says another colour and shape, of another scene's."""
    scene, place = scenes.scene(split, index), index % 2
    thing, caption = scene.things[place], scenes.captions(split, index)[0]
    if change:
        unlike = {(each.colour, each.shape) for each in scene.things}
        others = (scenes.scene(split, index, seed).things[place] for seed in itertools.count(1))
        other = next(each for each in others if (each.colour, each.shape) not in unlike)
        things = list(scene.things)
        things[place] = replace(thing, colour=other.colour, shape=other.shape)
        caption = scenes.caption(replace(scene, things=tuple(things)), rng("edit", index))
    across = (torch.arange(size) + 0.5) * scenes.CANVAS / size
    reach = thing.radius + 0.5  # with its smooth edge
    box = ((across - thing.y).abs() < reach)[:, None] & ((across - thing.x).abs() < reach)
    return Task(scenes.draw([scene], size)[0], caption, edit.touched(box, grid))


def show(pictures: Tensor, caption: str) -> Tensor:
    """bool (B,): which of uint8 (B, 3, S, S) show their caption."""
    return torch.tensor([verdict.exact for verdict in scenes.judge(pictures, [caption] * len(pictures))])


def tokens_of(drawer: Pipeline, picture: Tensor) -> Tensor:
    return drawer.tokenizer.encode(picture[None].float() / 255)[0]


def painted(drawer: Pipeline, tokens: Tensor) -> Tensor:
    return to_uint8(drawer.tokenizer.decode(tokens))


def attempt(drawer: Pipeline, given: Task, way: Way, count: int, seed: int) -> dict[str, Tensor]:
    """bool (count,), which candidates show the caption, under "exact", and the scores of every ranker."""
    seen = edit.hidden(given.picture, given.redrawn) if way.hide else given.picture
    canvas = edit.masked(tokens_of(drawer, seen), given.redrawn)
    ids, null = drawer.text.encode(given.caption), drawer.text.null()
    settings = {"temperature": way.temperature, "guidance": way.guidance, "passes": way.passes}
    sampled = edit.redraw(
        drawer.model, ids, canvas.tokens, count, null_ids=null, seed=seed, resample=way.resample, **settings
    )

    def made(tokens: Tensor) -> Tensor:
        return edit.paste(given.picture, painted(drawer, tokens), given.redrawn)

    def seen_again(tokens: Tensor) -> Tensor:
        return drawer.tokenizer.encode(made(tokens).float() / 255)

    found = {"exact": show(made(sampled.tokens), given.caption)}
    evidence = rerank.Evidence(
        drawer.model,
        ids,
        sampled,
        drawer.captions_ids,
        null,
        seen_again if way.pasted else drawer.repaint,
        drawer.weights,
    )
    for name in RANKERS:
        if name == "rest":
            found[name] = edit.rest(drawer.model, ids, sampled, redrawn=given.redrawn)
        elif drawer.model.config.both_orders or not name.startswith(("caption", "combined")):
            found[name] = evidence.score(name)
    return found


def reconstruct(drawer: Pipeline, tasks: list[Task]) -> None:
    """What stage 1 alone does to these pictures: a bound for one picture, not for the best of several."""
    rebuilt, pasted = [], []
    for each in tasks:
        again = painted(drawer, tokens_of(drawer, each.picture)[None])
        rebuilt.append(show(again, each.caption))
        pasted.append(show(edit.paste(each.picture, again, each.redrawn), each.caption))
    print(f"  reconstructed whole                       {Share(int(torch.cat(rebuilt).sum()), len(tasks))}")
    print(f"  masked patches only, their true tokens    {Share(int(torch.cat(pasted).sum()), len(tasks))}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder of stage 2, trained on scenes")
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="index of the first scene; settings are chosen on others")
    parser.add_argument("--count", type=int, default=16, help="candidates of each")
    parser.add_argument("--splits", nargs="+", default=["val", "heldout"], choices=scenes.SPLITS)
    parser.add_argument("--change", action="store_true", help="the captions ask for another object than was there")
    parser.add_argument("--ways", type=json.loads, nargs="+", default=[{}], help="such as '{\"passes\": 1}'")
    given = parser.parse_args()
    torch.set_num_threads(1)
    drawer = dalle.load(given.run)
    size, grid = drawer.tokenizer.config.image_size, tuple(drawer.model.config.grid)
    for split in given.splits:
        tasks = [task(split, given.first + k, size, grid, given.change) for k in range(given.pictures)]
        print(f"{split}: {len(tasks)} pictures, {given.count} candidates each")
        if not given.change:  # else there are no true tokens
            reconstruct(drawer, tasks)
        for settings in given.ways:
            way, begun = Way(**settings), time.monotonic()
            found = [attempt(drawer, each, way, given.count, seed) for seed, each in enumerate(tasks)]
            exact = torch.stack([each["exact"] for each in found])
            seconds = (time.monotonic() - begun) / len(tasks)
            print(f"  {way}, {seconds:.2f} s a picture")
            print(f"    any of the candidates    {Share(int(exact.any(1).sum()), len(tasks))}")
            for name in RANKERS:
                if name in found[0]:
                    best = [bool(each["exact"][rerank.rank(each[name])[0]]) for each in found]
                    print(f"    {name:<24} {Share(sum(best), len(tasks))}", flush=True)


if __name__ == "__main__":
    main()
