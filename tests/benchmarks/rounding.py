"""What `--precision` does to a trained model: how far its distributions move, on pictures of its own.

    python tests/benchmarks/rounding.py RUN [RUN ...] --captions 64

Each model draws one picture in float32 for each of the first captions in its artefact's sample, and every precision
says how likely all tokens are, given those before them. A line for each: the mean Kullback-Leibler divergence from the
plain float32 model, in nats a token; by how much a drawn token's log-probability moves, root mean square and at the
most; the share of cells whose likeliest token stays; and by how much the mean loss of the drawn tokens moves. Beside
them is what torch's autocast to bfloat16 does, which rounds keys, values and states, too.
"""

import argparse

import torch
from torch import Tensor

import dalle
from dalle.model import DALLE
from dalle.packing import PRECISIONS, packed
from dalle.sampling import sample


@torch.inference_mode()
def logprobs(model: DALLE, ids: Tensor, tokens: Tensor) -> Tensor:  # (B, T), (B, h, w) -> (B, N, K)
    return model.score(tokens, model.prefill(ids)).double().log_softmax(-1)


def moved(expected: Tensor, found: Tensor, tokens: Tensor) -> str:
    drawn = (found - expected).gather(2, tokens.flatten(1)[..., None])
    nats = (expected.exp() * (expected - found)).sum(-1).mean()
    stays = (expected.argmax(-1) == found.argmax(-1)).float().mean()
    return (
        f"{nats:.1e} nats, drawn tokens {drawn.square().mean().sqrt():.4f} rms, {drawn.abs().max():.3f} at the most, "
        f"{100 * stays:.2f} % of the likeliest stay, loss {-drawn.mean():+.5f}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--captions", type=int, default=64)
    given = parser.parse_args()
    for run in given.runs:
        drawer = dalle.load(run)
        ids = drawer.text.encode(drawer.captions[: given.captions])
        tokens = sample(drawer.packed, ids, 1, null_ids=drawer.text.null()).tokens
        expected = logprobs(drawer.model, ids, tokens)
        for precision in PRECISIONS:
            found = logprobs(packed(drawer.model, precision), ids, tokens)
            print(f"{run}, {precision}: {moved(expected, found, tokens)}")
        with torch.autocast("cpu", torch.bfloat16):
            print(f"{run}, autocast: {moved(expected, logprobs(drawer.model, ids, tokens), tokens)}")
