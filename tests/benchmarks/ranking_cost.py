"""What ranking costs, and what early pruning saves: ratios to drawing, measured side by side.

    python tests/benchmarks/ranking_cost.py RUN --guidance 1.5 --captions 20

Captions are those of scenes, whatever the model was trained on. Each one's candidates are drawn and scored in one
process, every way in turn, after one round to warm up; told are medians over captions of the ratio to drawing 16 (or
64) with the same settings. Quality is not measured here, see tests/benchmarks/ranking.py.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable

import torch

import dalle
from dalle import rerank
from dalle.evaluate import rankers
from dalle.pipeline import Pipeline
from dvae import scenes


def seconds(work: Callable) -> tuple[float, object]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


@torch.inference_mode()
def costs(drawer: Pipeline, captions: list[str], temperature: float, guidance: float) -> dict[str, float]:
    """Median ratio of each way to drawing as many candidates."""
    settings = {"temperature": temperature, "guidance": guidance}
    ratios: dict[str, list[float]] = {}
    for place, caption in enumerate([captions[0], *captions]):
        ids = drawer.text.encode(caption)
        drawing, sampled = seconds(lambda c=caption: drawer.sample([c], 16, 0, **settings))
        told = {"painting 16": seconds(lambda s=sampled: drawer.tokenizer.decode(s.tokens))[0] / drawing}
        for name in rankers(drawer):
            score = drawer.scorer(name)
            told[f"{name}, of 16"] = seconds(lambda s=score, i=ids, x=sampled: s(drawer.model, i, x))[0] / drawing
        whole, _ = seconds(lambda c=caption: drawer.sample([c], 64, 0, **settings))
        ranked, _ = seconds(lambda c=caption: drawer(c, 64, 1, **settings))
        pruned, _ = seconds(lambda c=caption: drawer(c, 64, 1, prune=True, **settings))
        told |= {"best of 64, drawn and ranked": ranked / whole, "best of 64, pruned and ranked": pruned / whole}
        if place:
            for name, ratio in told.items():
                ratios.setdefault(name, []).append(ratio)
    return {name: statistics.median(values) for name, values in ratios.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--captions", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    prompts = [scenes.captions("val", index)[0] for index in range(1000, 1000 + given.captions)]
    drawer = dalle.load(given.run)
    stages = rerank.stages(64, math.prod(drawer.model.config.grid))
    print(f"of drawing as many, guidance {given.guidance}, {given.threads} thread; stages {stages}")
    for name, ratio in costs(drawer, prompts, given.temperature, given.guidance).items():
        print(f"{ratio:7.3f}  {name}")
