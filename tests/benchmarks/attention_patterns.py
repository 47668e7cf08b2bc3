"""What the paper's attention patterns cost in time beside full attention: a training step, and drawing.

    python tests/benchmarks/attention_patterns.py                       # 16 x 16 and 32 x 32 tokens

Four blocks of width 256, 64 text ids, four pictures at a time, one thread. The two take turns; the least of some
repetitions of the thread's own time counts, so that other work on the machine matters little.
"""

import argparse
import time
from collections.abc import Callable

import torch

from dalle.model import DALLE, DALLEConfig, losses
from dalle.sampling import sample

BATCH, TEXT, IDS, CODES = 4, 64, 1000, 1024


def train(model: DALLE, side: int) -> None:
    text, image = torch.randint(IDS + TEXT, (BATCH, TEXT)), torch.randint(CODES, (BATCH, side, side))
    found = losses(model(text, image), text, image, torch.ones(BATCH, dtype=torch.bool))
    (found.text + found.image).backward()
    model.zero_grad()


def draw(model: DALLE, side: int) -> None:
    text = torch.randint(IDS + TEXT, (1, TEXT))
    sample(model, text, BATCH, null_ids=text)


def seconds(work: Callable[[DALLE, int], None], model: DALLE, side: int) -> float:
    start = time.thread_time()
    work(model, side)
    return time.thread_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[16, 32], help="rows and columns of tokens")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for side in given.sides:
        models = {}
        for patterns in ("full", "paper"):
            torch.manual_seed(0)
            models[patterns] = DALLE(DALLEConfig(IDS, TEXT, CODES, (side, side), 4, 256, 8, patterns=patterns))
        for work in (train, draw):
            times = {patterns: [] for patterns in models}
            for _ in range(given.repeats):
                for patterns, model in models.items():
                    times[patterns].append(seconds(work, model, side))
            full, paper = (min(times[patterns]) for patterns in ("full", "paper"))
            print(f"{side} x {side}, {work.__name__}: full {full:.3f} s, paper {paper:.3f} s, {paper / full:.2f} of it")


if __name__ == "__main__":
    main()
