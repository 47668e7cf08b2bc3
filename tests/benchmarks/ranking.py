"""Do our rankers beat CLIP? `dalle evaluate` with judges and rankers from outside, which are measuring tools only.

    python tests/benchmarks/ranking.py RUN scenes --yardstick FILE --count 16 --out FOLDER
    python tests/benchmarks/ranking.py emoji EMOJI --judge FILE --yardstick FILE --out FOLDER
    python tests/benchmarks/ranking.py RUN scenes --pruning --count 64

FILEs are made by judges.py (a classifier of real pictures) and yardstick.py (a CLIP-style model trained on the same
pairs, as long as the transformer and with as many parameters). `--pruning` asks instead whether best-of-N with early
pruning is as good as without; its cost is measured by ranking_cost.py.
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import dalle
from dalle.candidates import Settings, Share, judge_scenes
from dalle.evaluate import Protocol, Rows, best_of_picture, data_rows, described, measure, scenes_rows, table
from dvae import artefact, seeds
from dvae.files import write_json
from dvae.images import save


def tool(name: str):
    """A module of this folder, which is no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def rows_of(drawer, given, judge) -> dict[str, Rows]:
    """Rows of scenes, or those of a data source whose captions the judge can read."""
    if given.data == "scenes":
        return scenes_rows(drawer, given.prompts)
    parts = artefact.verify(drawer.source)["about"].get("split", {})
    chosen = {}
    for kind, (source, rows) in data_rows(drawer, given.data, parts, 10**9, given.seed).items():
        readable = [row for row in rows if judge.knows(source.captions(row)[0])]
        order = seeds.rng("ranking", given.seed, kind).permutation(len(readable))[: given.prompts]
        chosen[kind] = Rows(source, sorted(readable[place] for place in order))
    return chosen


@torch.inference_mode()
def pruning(drawer, kinds: dict[str, Rows], given, judge) -> dict:
    """Of the best of N, how many show their captions, with and without early pruning; and on how many they differ."""
    found = {}
    for kind, rows in kinds.items():
        verdicts = {True: [], False: []}
        captions = list(zip(rows.rows, rows.captions, strict=True))
        for row, caption in tqdm(captions, kind, leave=False, disable=None):
            for prune, own in verdicts.items():
                settings = {"temperature": given.temperature, "guidance": given.guidance, "prune": prune}
                best = drawer(caption, given.count, 1, given.seed * 1_000_000 + row, **settings)[0]
                own += judge(best.image[None].float() / 255, [caption])
        both = torch.tensor([verdicts[True], verdicts[False]])
        found[kind] = {
            "pruned": Share(int(both[0].sum()), len(captions)).json(),
            "whole": Share(int(both[1].sum()), len(captions)).json(),
            "only_pruned_true": int((both[0] & ~both[1]).sum()),
            "only_whole_true": int((~both[0] & both[1]).sum()),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("data")
    parser.add_argument("--judge")
    parser.add_argument("--yardstick", nargs="*", default=[])
    parser.add_argument("--prompts", type=int, default=400)
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--swept", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pruning", action="store_true")
    parser.add_argument("--out", default="ranked")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    drawer, folder = dalle.load(given.run), Path(given.out)
    known = None if given.judge is None else tool("judges").load(given.judge)
    judge = judge_scenes if known is None else known.judge
    scorers = {}
    for file in given.yardstick:
        yardstick = tool("yardstick").load(file)
        name = "clip" if file == given.yardstick[0] else f"clip, {Path(file).name}"
        scorers[name] = lambda pictures, caption, by=yardstick: by.score(pictures, [caption] * len(pictures))
    kinds = rows_of(drawer, given, known)
    if given.pruning:
        found = pruning(drawer, kinds, given, judge)
        write_json(folder / "pruning.json", {"protocol": vars(given), "kinds": found})
        print(json.dumps(found, indent=1))
        return
    settings = Settings(given.temperature, given.guidance)
    protocol = Protocol(given.prompts, given.count, given.swept, given.seed, settings)
    found = {"protocol": {**vars(given), **described(drawer, protocol)}}
    found |= measure(drawer, kinds, protocol, judge, scorers)
    write_json(folder / "ranked.json", found)
    save(best_of_picture(found), folder / "best-of-n.png")
    print(table(found))


if __name__ == "__main__":
    main()
