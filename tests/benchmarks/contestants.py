"""What speed.py compares: this project's model, transformers' GPT-2, a plain loop, and what the machine could do.

All have the same depth, width, heads and number of states, and full causal attention. GPT-2 and the plain loop have one
vocabulary of text ids and image codes, and read T + 2 ids before the first image token, the two more in the place of
our start states. The plain loop draws image codes only, as ours does; GPT-2 may draw any id.

Shapes: B batch, T text ids, N image tokens, E width, n states.
"""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle.model import DALLE, DALLEConfig, losses
from dalle.packing import packed
from dalle.sampling import sample
from dvae.errors import EnvironmentProblem

TOP_K = 256
PRECISIONS = ("float32", "bfloat16")
FORMULAS = {
    "drawing": "the prefill + all cells, each max(bytes / read, operations / float32): "
    "bytes = 4 (weights + 2 B depth width keys), operations = 2 B (weights + 2 depth width keys), "
    "weights = 12 depth width^2 + width codes, keys = T + 2 + cell; the prefill so with T + 1 states and no codes",
    "training": "3 x 2 B (12 depth width^2 states + width (T text ids + N codes) + 2 depth width pairs) operations at "
    "float32 or bfloat16, states = T + 1 + N, pairs = states (states + 1) / 2",
    "read": "bytes/s of the sum of a float32 tensor as large as these weights, the best of 20",
    "float32, bfloat16": "operations/s of the MLP's first product, (4096, width) x (width, 4 width), the best of 20",
}


@dataclass(frozen=True)
class Shape:
    """Sizes of a model, and the batch it is trained with."""

    depth: int
    width: int
    heads: int
    text: int
    side: int
    vocab_text: int
    vocab_image: int
    training: int

    @property
    def cells(self) -> int:
        """Image tokens, N."""
        return self.side**2

    @property
    def states(self) -> int:
        return self.text + 1 + self.cells

    @property
    def matrices(self) -> int:
        """Weights that every state goes through."""
        return 12 * self.depth * self.width**2

    @property
    def read(self) -> int:
        """Weights that a decode step reads."""
        return self.matrices + self.width * self.vocab_image

    def config(self, patterns: str = "full") -> DALLEConfig:
        grid = (self.side, self.side)
        sizes = self.vocab_text, self.text, self.vocab_image, grid, self.depth, self.width, self.heads
        return DALLEConfig(*sizes, patterns=patterns)

    def texts(self, batch: int) -> Tensor:  # (B, T)
        return torch.randint(self.vocab_text, (batch, self.text))

    def images(self, batch: int) -> Tensor:  # (B, N)
        return torch.randint(self.vocab_image, (batch, self.cells))


SHAPES = {
    "tiny": Shape(2, 32, 2, 4, 8, 64, 512, 2),  # to try this script
    "S": Shape(8, 256, 8, 32, 8, 512, 1024, 16),
    "M": Shape(12, 512, 8, 64, 16, 2048, 4096, 4),
    "L": Shape(12, 768, 12, 64, 32, 16384, 8192, 2),
}


class Contestant(Protocol):
    model: nn.Module

    def draw(self, text: Tensor) -> Tensor:
        """Image tokens (B, N), one picture for each of texts (B, T), at temperature 1 from the TOP_K likeliest."""

    def loss(self, text: Tensor, image: Tensor) -> Tensor:
        """The training loss of texts (B, T) and images (B, N), a scalar; None instead of a method: it only draws."""


class Ours:
    """This project's model and its default sampler, as `dalle.load` puts them together."""

    precision = "float32"

    def __init__(self, shape: Shape):
        self.model = DALLE(shape.config())
        self.packed = packed(self.model, self.precision)

    def draw(self, text: Tensor) -> Tensor:
        return sample(self.packed, text, 1, null_ids=text[:1], top_k=TOP_K).tokens.flatten(1)

    def loss(self, text: Tensor, image: Tensor) -> Tensor:
        kept, image = torch.ones(len(text), dtype=torch.bool), image.unflatten(1, self.model.config.grid)
        found = losses(self.model(text, image), text, image, kept)
        return found.text / 8 + 7 / 8 * found.image


class OursBfloat16(Ours):
    """The same with weights of 16 bits, for drawing."""

    precision, loss = "bfloat16", None


class OursInt8(Ours):
    """The same with weights of 8 bits, for drawing."""

    precision, loss = "int8", None


def started(text: Tensor) -> Tensor:
    """Texts (B, T) with an id before and an id behind, where ours has start states: (B, T + 2)."""
    return F.pad(text, (1, 1))


class GPT2:
    """transformers' GPT-2, with its `generate` and the cache that this makes."""

    def __init__(self, shape: Shape):
        try:
            from transformers import GPT2Config, GPT2LMHeadModel
        except ImportError as error:
            hint = 'pip install "transformers>=5,<6", or leave it out: --contestants ours plain'
            raise EnvironmentProblem("GPT-2 needs transformers, which is not installed", hint) from error
        self.shape = shape
        config = GPT2Config(
            vocab_size=shape.vocab_text + shape.vocab_image,
            n_positions=shape.states + 1,  # the last token drawn is counted, though not read
            n_embd=shape.width,
            n_layer=shape.depth,
            n_head=shape.heads,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
            **dict.fromkeys(("bos_token_id", "eos_token_id")),
        )
        self.model = GPT2LMHeadModel(config)
        self.model.loss_type = "ForCausalLM"  # its default, about which it warns

    def draw(self, text: Tensor) -> Tensor:
        ids, new = started(text), self.shape.cells
        counts = {"min_new_tokens": new, "max_new_tokens": new}
        settings = {"do_sample": True, "top_k": TOP_K, "pad_token_id": 0, **counts}
        return self.model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[:, ids.shape[1] :]

    def loss(self, text: Tensor, image: Tensor) -> Tensor:
        ids = torch.cat([started(text), self.shape.vocab_text + image[:, :-1]], 1)
        return self.model(input_ids=ids, labels=ids, use_cache=False).loss


class PlainBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, cache: Tensor | None, start: int) -> Tensor:  # (B, n, E) -> (B, n, E)
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if cache is not None:
            end = start + x.shape[1]
            cache[0, :, :, start:end], cache[1, :, :, start:end] = k, v
            k, v = cache[:, :, :, :end]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))


class PlainModel(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        vocab = shape.vocab_text + shape.vocab_image
        self.tokens, self.positions = nn.Embedding(vocab, shape.width), nn.Embedding(shape.states, shape.width)
        self.blocks = nn.ModuleList(PlainBlock(shape.width, shape.heads) for _ in range(shape.depth))
        self.norm, self.head = nn.LayerNorm(shape.width), nn.Linear(shape.width, vocab, bias=False)

    def forward(self, ids: Tensor, cache: Tensor | None = None, start: int = 0) -> Tensor:
        """Logits (B, n, vocabulary) of ids (B, n); of the last state alone, (B, 1, vocabulary), with a cache."""
        x = self.tokens(ids) + self.positions.weight[start : start + ids.shape[1]]
        for layer, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache[layer], start)
        return self.head(self.norm(x if cache is None else x[:, -1:]))


class Plain:
    """A decoder-only transformer as it is written in an hour, with a cache in room for all."""

    def __init__(self, shape: Shape):
        self.shape, self.model = shape, PlainModel(shape)

    @torch.inference_mode()
    def draw(self, text: Tensor) -> Tensor:
        shape, ids, start, drawn = self.shape, started(text), 0, []
        head = shape.width // shape.heads
        cache = torch.empty(shape.depth, 2, len(text), shape.heads, shape.states, head)
        for _ in range(shape.cells):
            logits, codes = self.model(ids, cache, start)[:, -1, shape.vocab_text :].topk(TOP_K)
            drawn.append(codes.gather(1, logits.softmax(-1).multinomial(1)))
            start, ids = start + ids.shape[1], shape.vocab_text + drawn[-1]
        return torch.cat(drawn, 1)

    def loss(self, text: Tensor, image: Tensor) -> Tensor:
        ids = torch.cat([started(text), self.shape.vocab_text + image], 1)
        return F.cross_entropy(self.model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


CONTESTANTS: dict[str, type[Contestant]] = {
    "ours": Ours,
    "ours, bfloat16": OursBfloat16,
    "ours, int8": OursInt8,
    "gpt-2": GPT2,
    "plain": Plain,
}

# ---------------------------------------------------------------------------------------------------------- the bounds


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@functools.cache
def rates(shape: Shape) -> dict[str, float]:
    """What the machine can do at this size, see FORMULAS."""

    def best(work: Callable[[], object]) -> float:
        return min(seconds(work) for _ in range(20))

    weights, found = torch.rand(shape.read), {}
    found["read"] = 4 * shape.read / best(weights.sum)
    for precision in PRECISIONS:
        dtype = getattr(torch, precision)
        rows, matrix = torch.rand(4096, shape.width, dtype=dtype), torch.rand(4 * shape.width, shape.width, dtype=dtype)
        found[precision] = 2 * 4096 * 4 * shape.width**2 / best(partial(F.linear, rows, matrix))
    return found


def drawing_bound(shape: Shape, batch: int) -> float:
    """Seconds below which no batch can be drawn in float32, see FORMULAS."""
    rate, first = rates(shape), shape.text + 1

    def least(weights: int, products: int, pairs: int, keys: int) -> float:
        size = 4 * (weights + 2 * batch * shape.depth * shape.width * keys)
        operations = 2 * batch * (products + 2 * shape.depth * shape.width * pairs)
        return max(size / rate["read"], operations / rate["float32"])

    prefill = least(shape.matrices, first * shape.matrices, first * (first + 1) // 2, first)
    return prefill + sum(least(shape.read, shape.read, keys, keys) for keys in range(first + 1, shape.states + 1))


def training_bound(shape: Shape, precision: str) -> float:
    """Seconds below which no update can be made, see FORMULAS."""
    heads = shape.width * (shape.text * shape.vocab_text + shape.cells * shape.vocab_image)
    pairs = shape.states * (shape.states + 1) // 2
    forward = shape.matrices * shape.states + heads + 2 * shape.depth * shape.width * pairs
    return 3 * 2 * shape.training * forward / rates(shape)[precision]
