"""The transformer of DALL-E: one stream of text ids and image tokens, each predicted from all before it (section 2.2).

Decoder-only, pre-norm; each block attends to all that came before, or by one of the patterns of `dalle.layout`. Text
and image have separate embeddings and separate heads, so there are no offsets and no masked logits. Pads are ids of the
text vocabulary, one for each position: they are attended to and learned, never masked, and are text targets unless the
loss is told otherwise. The model keeps no state between calls, prints nothing and knows neither words nor pixels; dtype
and device are those of its parameters.

Shapes: B batch, T text ids, N = h w image tokens, S states, V text vocabulary with pads, K image vocabulary,
E width, H heads, D = E / H.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dalle.layout import KINDS, Layout, schedule
from dalle.scaling import scaled
from dvae.errors import UserError


@dataclass(frozen=True)
class DALLEConfig:
    """What the transformer is built from. The paper's 12 billion: 16384, 256, 8192, (32, 32), 64, 3968, 62, 4, "paper".

    Args:
        vocab_text: BPE ids, pads not counted.
        text_length: text ids per caption, pads counted.
        vocab_image: codes of the image tokenizer.
        grid: rows and columns of image tokens.
        depth: blocks, each one attention and one MLP.
        width: size of a state; a multiple of `heads`.
        heads: attention heads.
        mlp_ratio: width of the MLP's hidden layer over `width`.
        patterns: what image states read of the image: "full" for all before them, "paper" for the paper's mixture
            (`dalle.layout.schedule`), or a kind for each block: full, row, column or conv (`dalle.layout.Layout`).
        both_orders: whether the model also reads the picture first and the words after it, and so captions. One row
            of positions more: that of the state that holds a picture's last token.
    """

    vocab_text: int
    text_length: int
    vocab_image: int
    grid: tuple[int, int]
    depth: int
    width: int
    heads: int
    mlp_ratio: int = 4
    patterns: str | tuple[str, ...] = "full"
    both_orders: bool = False

    def __post_init__(self):
        object.__setattr__(self, "grid", tuple(self.grid))  # JSON and YAML bring lists
        if len(self.grid) != 2:
            raise UserError(f"grid is {self.grid}", "give two numbers, rows and columns, such as [8, 8]")
        for name in ("vocab_text", "text_length", "vocab_image", "depth", "width", "heads", "mlp_ratio", "grid"):
            value = getattr(self, name)
            for number in value if name == "grid" else (value,):
                if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                    raise UserError(f"{name} is {value!r}", f"{name} needs whole numbers from 1 on")
        if self.width % self.heads:
            raise UserError(
                f"width {self.width} cannot be shared by {self.heads} heads",
                f"choose a multiple of heads, such as {math.ceil(self.width / self.heads) * self.heads}",
            )
        if not isinstance(self.both_orders, bool):
            raise UserError(f"both_orders is {self.both_orders!r}", "give true or false")
        self._check_patterns()

    def _check_patterns(self) -> None:
        if isinstance(self.patterns, list):
            object.__setattr__(self, "patterns", tuple(self.patterns))
        each = isinstance(self.patterns, tuple)
        for kind in self.patterns if each else [self.patterns]:
            if kind not in (KINDS if each else ("full", "paper")):
                hint = f'give "full", "paper", or a list of one of {", ".join(KINDS)} for each block'
                raise UserError(f"patterns names {kind!r}", hint)
        if each and len(self.patterns) != self.depth:
            raise UserError(
                f"patterns has {len(self.patterns)} kinds and depth is {self.depth}",
                f'give {self.depth} kinds, one for each block, or "full" or "paper", or change depth',
            )

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of attention of each block."""
        if isinstance(self.patterns, tuple):
            return self.patterns
        return schedule(self.depth) if self.patterns == "paper" else ("full",) * self.depth


class Logits(NamedTuple):
    """Predictions of a whole sequence, in float32 or wider."""

    text: Tensor  # (B, T, V)
    image: Tensor  # (B, N, K)


class Losses(NamedTuple):
    """Mean cross-entropies in nats per token, each over the tokens of its own kind; scalars."""

    text: Tensor
    image: Tensor


class KVCache:
    """Keys and values of the states read so far, in room for all; made by `DALLE.prefill` or `prefill_image`, grown by
    `step` or `step_text`.

    The `first` states are those of the part that stands first; the second part reads all of them. A block whose image
    states, standing second, read a pattern keeps room behind the first: there stand copies of the few others that a
    step reads, so that together they are one piece and the first are never copied.

    Args:
        layout: of the sequence.
        kinds: of attention, one for each block.

    Attributes:
        stored: keys and values (depth, 2, B, H, slots, D), made when the first states are stored, in their dtype.
        length: states read so far.
        rooms: for each block, the slots between the first states and those after them.
    """

    def __init__(self, layout: Layout, kinds: Sequence[str]):
        self.layout, self.kinds, self.length = layout, kinds, 0
        self.first = (layout.text if layout.image_first else layout.image).start
        windows = {kind: len(layout.offsets(kind)) for kind in set(kinds) - {"full"} if not layout.image_first}
        self.rooms = [windows.get(kind, 0) for kind in kinds]
        self.stored: Tensor | None = None

    @property
    def rows(self) -> int:
        """Sequences read side by side, B."""
        return self.stored.shape[2]

    def reads(self) -> dict[str, Tensor]:
        """For each kind of attention but the full, the states (n,) of the image that its next one reads, itself too."""
        device = self.stored.device
        return {kind: self.layout.window(self.length, kind).to(device) for kind in set(self.kinds) - {"full"}}

    def store(self, layer: int) -> "Store":
        """Where one block puts what it has computed, and finds what was there."""
        return Store(self, layer)

    def slot(self, layer: int) -> int:
        """Where one block puts the next state."""
        return self.length + (self.rooms[layer] if self.length >= self.first else 0)

    def put(self, layer: int, kv: Tensor, window: Tensor | None = None) -> Tensor:
        """Store keys and values (2, B, H, n, D) of the next n states; return those (2, B, H, read, D) of all up to
        them, or, with a `window` of states after the first, int64 (m,), of the first and of these."""
        if self.stored is None:
            _, rows, heads, _, head = kv.shape
            self.stored = kv.new_empty(len(self.kinds), 2, rows, heads, self.layout.states + max(self.rooms), head)
        room, start = self.rooms[layer], self.slot(layer)
        end = start + kv.shape[3]
        own = self.stored[layer, :, :, :, :end]
        own[:, :, :, start:] = kv
        if window is not None:
            end = self.first + len(window)
            own[:, :, :, self.first : end] = own.index_select(3, window + room)
            return own[:, :, :, :end]
        if room and end > self.first:
            return torch.cat(own.split([self.first, room, end - self.first - room], 3)[::2], 3)
        return own

    def select(self, rows: Tensor | Sequence[int], into: "KVCache | None" = None) -> "KVCache":
        """A cache of its own that holds the given rows, in that order; a row may be given several times.

        Its memory is that of `into`, a cache of at least as many rows that is not needed any more, if one is given.
        """
        rows, (depth, both, _, *others) = torch.as_tensor(rows, device=self.stored.device), self.stored.shape
        chosen = KVCache(self.layout, self.kinds)
        chosen.length = self.length
        new = self.stored.new_empty(depth, both, len(rows), *others) if into is None else into.stored
        chosen.stored = new[:, :, : len(rows)]
        filled = slice(0, self.length + (max(self.rooms) if self.length > self.first else 0))
        chosen.stored[..., filled, :] = self.stored[..., filled, :].index_select(2, rows)
        return chosen

    def expand(self, n: int) -> "KVCache":
        """A cache of its own with each row n times in a row."""
        return self.select(torch.arange(self.rows).repeat_interleave(n))

    def truncate(self, state: int) -> None:
        """Forget `state` and all after it."""
        assert 0 <= state <= self.length
        self.length = state


class Store(NamedTuple):
    """One block's part of a cache, which stores keys and values of the next states and gives those that they read."""

    cache: KVCache
    layer: int

    def __call__(self, kv: Tensor, window: Tensor | None = None) -> Tensor:
        """See `KVCache.put`."""
        return self.cache.put(self.layer, kv, window)


# a mask or indices, see `Attention.forward`, or attention itself: q, k, v (B, H, n, D) -> (B, H, n, D)
Reads = Tensor | Callable[[Tensor, Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """Multi-head attention with one softmax over text and image keys together (the paper's footnote 7)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self, x: Tensor, store: Callable[..., Tensor] | None = None, reads: Reads | None = None
    ) -> Tensor:  # (B, n, E) -> (B, n, E)
        """Attend from the n states x to them and to those in `store`, if there is one, which come before them; a
        `Store`, or what can be called like it.

        `reads` says to which: a mask, bool (n, states); for a single state the indices, int64, of those that it reads
        beside the store's first; or what attends in place of a mask. Without it: causal if nothing was read before, and
        a single state reads everything.
        """
        q, kv = self._split(x)
        if store is not None:
            window, reads = (reads, None) if isinstance(reads, Tensor) and reads.dtype == torch.int64 else (None, reads)
            kv = store(kv, window)
        k, v = kv.unbind(0)
        if reads is None or isinstance(reads, Tensor):
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=reads, is_causal=reads is None and q.shape[2] > 1)
        else:
            y = reads(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))

    def remember(self, x: Tensor, store: Callable[..., Tensor]) -> None:
        """Store keys and values of the states x (B, n, E), from which nothing is asked."""
        store(self._split(x)[1])

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:  # (B, n, E) -> (B, H, n, D), (2, B, H, n, D)
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return qkv[0], qkv[1:]


class MLP(nn.Module):
    """Two linear maps around a GELU. The paper names no activation; its authors' sibling code has x sigmoid(1.702 x),
    which the tanh form approximates as well as it does GELU, in one fused kernel instead of three."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.hidden = nn.Linear(width, hidden)
        self.gelu = nn.GELU(approximate="tanh")
        self.out = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:  # (B, n, E) -> (B, n, E)
        return self.out(self.gelu(self.hidden(x)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); of one kind of attention, `scales` those of the two gradients."""

    def __init__(self, config: DALLEConfig, kind: str):
        super().__init__()
        self.kind = kind
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = Attention(config.width, config.heads)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp = MLP(config.width, config.mlp_ratio * config.width)

    def forward(
        self,
        x: Tensor,
        store: Callable[..., Tensor] | None = None,
        reads: Reads | None = None,
        scales: Sequence[float | None] = (None, None),
    ) -> Tensor:
        x = x + scaled(lambda x: self.attention(self.attention_norm(x), store, reads), x, scales[0])
        return x + scaled(lambda x: self.mlp(self.mlp_norm(x)), x, scales[1])


class DALLE(nn.Module):
    """p(text, image) as one sequence; see `Layout` for what stands where.

    `forward` and the cached trio `prefill`, `step`, `score` give the same logits up to rounding. The trio is for
    inference and records no gradient. With `config.both_orders` the same weights are p(image, text), too: `forward`
    with `image_first`, and the trio `prefill_image`, `step_text`, `score_text`.

    Args:
        checkpointing: keep only what enters each block for the backward pass and compute the rest again there: the same
            numbers for less memory and a third more work. Says nothing about the weights.

    Attributes:
        sparse: what attends in `forward` in place of the dense masks, by kind and image_first (`dalle.gpu.sparse`).
    """

    def __init__(self, config: DALLEConfig, checkpointing: bool = False):
        super().__init__()
        self.config, self.checkpointing = config, checkpointing
        self.layout = Layout(config.text_length, config.grid)
        self.image_first_layout = Layout(config.text_length, config.grid, image_first=True)
        (height, width), vocab_text = config.grid, config.vocab_text + config.text_length
        self.start = nn.Parameter(torch.empty(2, config.width))  # start of text, start of image
        self.text_embedding = nn.Embedding(vocab_text, config.width)
        self.image_embedding = nn.Embedding(config.vocab_image, config.width)
        self.text_position = nn.Embedding(config.text_length + 1, config.width)
        self.row_position = nn.Embedding(height + config.both_orders, config.width)
        self.column_position = nn.Embedding(width, config.width)
        self.blocks = nn.ModuleList(Block(config, kind) for kind in config.kinds)
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.text_head = nn.Linear(config.width, vocab_text, bias=False)
        self.image_head = nn.Linear(config.width, config.vocab_image, bias=False)
        self.sparse: dict[tuple[str, bool], Reads] = {}
        self._patterns = sorted(set(config.kinds) - {"full"})  # that have to be told what to read
        for kind in self._patterns:
            self.register_buffer(f"{kind}_mask", self.layout.mask(kind), persistent=False)
            if config.both_orders:
                self.register_buffer(f"{kind}_image_first_mask", self.image_first_layout.mask(kind), persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Normal with mean 0; the paper is silent, the numbers follow its authors' sibling code.

        | parameter                                       | standard deviation                     |
        |-------------------------------------------------|----------------------------------------|
        | token embeddings, start vectors                 | 0.013                                  |
        | text positions                                  | 0.007                                  |
        | row and column positions                        | 0.007 / sqrt(2), as two are added      |
        | linear layers, heads                            | sqrt(1 / (8 fan_in))                   |
        | the two of a block that write to the residual   | sqrt(1 / (8 fan_in)) / sqrt(2 depth)   |
        | biases; norms                                   | all 0; gains 1, biases 0               |
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=math.sqrt(0.125 / module.in_features))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for block in self.blocks:
            for writer in (block.attention.out, block.mlp.out):
                writer.weight /= math.sqrt(2 * self.config.depth)
        for tokens in (self.start, self.text_embedding.weight, self.image_embedding.weight):
            nn.init.normal_(tokens, std=0.013)
        nn.init.normal_(self.text_position.weight, std=0.007)
        for positions in (self.row_position, self.column_position):
            nn.init.normal_(positions.weight, std=0.007 / math.sqrt(2))

    @torch.no_grad()
    def start_from_codes(self, codes: Tensor, share: float, generator: torch.Generator) -> None:
        """Let image tokens that look alike start alike; to be called before any training.

        The image embedding and the image head become, up to the scale they had, sqrt(1 - share) of what they were plus
        sqrt(share) of the image tokenizer's codes (K, d) in a random map to the model's width, the same for both.
        Not in the paper.
        """
        codes = (codes - codes.mean(0)) / codes.std()
        look = codes @ torch.randn(codes.shape[1], self.config.width, generator=generator) / codes.shape[1] ** 0.5
        for weight in (self.image_embedding.weight, self.image_head.weight):  # (K, E)
            weight.copy_(math.sqrt(1 - share) * weight + math.sqrt(share) * weight.std() * look.to(weight))

    def branches(self) -> list[list[nn.Parameter]]:
        """The parameters of each attention and each MLP, with those of the norm before it: 2 depth of them."""
        pairs = [pair for b in self.blocks for pair in ((b.attention_norm, b.attention), (b.mlp_norm, b.mlp))]
        return [[*norm.parameters(), *layer.parameters()] for norm, layer in pairs]

    def forward(
        self,
        text_ids: Tensor,
        image_tokens: Tensor,
        scales: Sequence[float] | None = None,
        image_first: bool = False,
    ) -> Logits:
        """Predict every token of B sequences from the true ones before it.

        Args:
            text_ids: int64 (B, T), pads placed.
            image_tokens: int64 (B, h, w).
            scales: how many times as large gradients are inside each of `branches`, those of its parameters too
                (`dalle.scaling`); none are without.
            image_first: whether the picture stands before the text; needs `config.both_orders`.
        """
        self._check_order(image_first)
        text, image = self._embed_text(text_ids, not image_first), self._embed_image(image_tokens, image_first)
        parts = [image, text] if image_first else [text, image]
        x = torch.cat(parts, dim=1)  # (B, S, E)
        reads: dict[str, Reads] = self._masks(image_first)
        reads |= {kind: attend for (kind, order), attend in self.sparse.items() if order == image_first}
        for layer, block in enumerate(self.blocks):
            own = (None, None) if scales is None else scales[2 * layer : 2 * layer + 2]
            inputs = x, None, reads.get(block.kind), own
            if self.checkpointing and torch.is_grad_enabled():
                # a block draws no random numbers, so there is no state of theirs to keep
                x = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(*inputs)
        first, second = x.split([part.shape[1] for part in parts], dim=1)
        first = first[:, :-1]  # its last state has nothing left to predict
        text, image = (second, first) if image_first else (first, second)
        return Logits(self._logits(text, self.text_head), self._logits(image, self.image_head))

    @torch.no_grad()
    def prefill(self, text_ids: Tensor) -> KVCache:
        """Read text_ids (B, T) whole; the cache that comes back is ready for cell 0."""
        return self._prefix(self._embed_text(text_ids), KVCache(self.layout, self.config.kinds), {})

    @torch.no_grad()
    def step(self, tokens: Tensor | None, cell: int | Tensor, cache: KVCache) -> Tensor:
        """Logits (B, K) of image cell `cell`, 0 <= cell < N; the cache grows by one state.

        Args:
            tokens: int64 (B,), what stands in cell - 1; None at cell 0, where start-of-image is read.
            cell: the cache's next; as int64 (1,) where the cache keeps it on the device, see `dalle.gpu`.
        """
        if isinstance(cell, int):
            assert cache.length == self.layout.image.start + cell and (tokens is None) == (cell == 0)
        row, column = cell // self.config.grid[1], cell % self.config.grid[1]
        held = self.start[1].expand(cache.rows, -1) if tokens is None else self.image_embedding(tokens)
        x = held + (self.row_position.weight[row] + self.column_position.weight[column])
        return self._logits(self._read(x[:, None], cache, cache.reads()), self.image_head)[:, 0]

    @torch.no_grad()
    def score(self, image_tokens: Tensor, cache: KVCache) -> Tensor:
        """Logits (B, N, K) of whole pictures (B, h, w) after the texts in a prefilled cache of B rows, in one pass.

        The first n cells of pictures, (B, n), give logits (B, n, K). The cache is left at the length it came with, so
        that it can be used again.
        """
        length = cache.length
        assert length == self.layout.image.start
        x = self._embed_image(image_tokens)
        own = slice(length, length + x.shape[1])
        masks = {kind: mask[own, : own.stop] for kind, mask in self._masks(image_first=False).items()}  # (n, read)
        if "full" in self.config.kinds:
            masks["full"] = self.layout.mask()[own, : own.stop].to(self.start.device)
        logits = self._logits(self._read(x, cache, masks), self.image_head)
        cache.truncate(length)
        return logits

    @torch.no_grad()
    def prefill_image(self, image_tokens: Tensor) -> KVCache:
        """Read pictures (B, h, w) whole, first in their sequences; the cache that comes back is ready for text id 0."""
        self._check_order(image_first=True)
        cache = KVCache(self.image_first_layout, self.config.kinds)
        x = self._embed_image(image_tokens, whole=True)
        masks = {kind: mask[: x.shape[1], : x.shape[1]] for kind, mask in self._masks(image_first=True).items()}
        return self._prefix(x, cache, masks)

    @torch.no_grad()
    def step_text(self, ids: Tensor | None, place: int, cache: KVCache) -> Tensor:
        """Logits (B, V) of text id `place`, 0 <= place < T, after the pictures in the cache, which grows by one state.

        Args:
            ids: int64 (B,), what stands at place - 1; None at place 0, where start-of-text is read.
        """
        assert cache.length == self.image_first_layout.text.start + place and (ids is None) == (place == 0)
        held = self.start[0].expand(cache.rows, -1) if ids is None else self.text_embedding(ids)
        x = held + self.text_position.weight[place]
        return self._logits(self._read(x[:, None], cache, {}), self.text_head)[:, 0]

    @torch.no_grad()
    def score_text(self, text_ids: Tensor, cache: KVCache) -> Tensor:
        """Logits (B, T, V) of texts (B, T), or of their first n ids, after the pictures in a cache of B rows, in one
        pass; like `score`."""
        length, x = cache.length, self._embed_text(text_ids, whole=False)
        assert length == self.image_first_layout.text.start
        mask = torch.ones(x.shape[1], length + x.shape[1], dtype=torch.bool, device=x.device).tril(length)
        x = self._read(x, cache, dict.fromkeys(self.config.kinds, mask))
        cache.truncate(length)
        return self._logits(x, self.text_head)

    @torch.no_grad()
    def text_logits(self, text_ids: Tensor) -> Tensor:
        """Logits (B, T, V) of texts (B, T) before any picture, those of `forward` in the first order."""
        x = self._embed_text(text_ids)
        for block in self.blocks:
            x = block(x)
        return self._logits(x[:, :-1], self.text_head)

    def _check_order(self, image_first: bool) -> None:
        assert self.config.both_orders or not image_first, "this model reads text first only"

    def _masks(self, image_first: bool) -> dict[str, Tensor]:
        """What each kind of block has to be told to read, bool (S, S); nothing for full attention, which is causal."""
        order = "image_first_" if image_first else ""
        return {kind: self.get_buffer(f"{kind}_{order}mask") for kind in self._patterns}

    def _embed_text(self, text_ids: Tensor, whole: bool = True) -> Tensor:
        """(B, T) -> (B, T + 1, E), start-of-text before the ids; not `whole`, (B, T, E) without the last id."""
        ids = text_ids.to(self.start.device)
        start = self.start[0].expand(len(ids), 1, -1)
        x = torch.cat([start, self.text_embedding(ids if whole else ids[:, :-1])], dim=1)
        return x + self.text_position.weight[: x.shape[1]]

    def _embed_image(self, image_tokens: Tensor, whole: bool = False) -> Tensor:
        """(B, h, w) -> (B, N, E), start-of-image before the tokens but the last; `whole`, (B, N + 1, E) with it."""
        tokens = image_tokens.to(self.start.device).flatten(1)
        start = self.start[1].expand(len(tokens), 1, -1)
        x = torch.cat([start, self.image_embedding(tokens if whole else tokens[:, :-1])], dim=1)
        grid = self.row_position.weight[:, None] + self.column_position.weight  # (h, w, E), with both orders h + 1
        return x + grid.flatten(0, 1)[: x.shape[1]]

    def _prefix(self, x: Tensor, cache: KVCache, reads: Mapping[str, Tensor]) -> KVCache:  # (B, n, E)
        """Read the part that stands first. It predicts nothing: of the last block only keys and values are needed."""
        *blocks, last = self.blocks
        for layer, block in enumerate(blocks):
            x = block(x, cache.store(layer), reads.get(block.kind))
        last.attention.remember(last.attention_norm(x), cache.store(len(blocks)))
        cache.length += x.shape[1]
        return cache

    def _read(self, x: Tensor, cache: KVCache, reads: Mapping[str, Tensor]) -> Tensor:  # (B, n, E) -> (B, n, E)
        for layer, block in enumerate(self.blocks):
            x = block(x, cache.store(layer), reads.get(block.kind))
        cache.length += x.shape[1]
        return x

    def _logits(self, x: Tensor, head: nn.Linear) -> Tensor:  # (B, n, E) -> (B, n, V or K)
        # as in the paper's appendix D, not in the autocast's 16 bits: small differences of logits decide
        with torch.autocast(x.device.type, enabled=False):
            logits = head(self.norm(x.to(self.norm.weight.dtype)))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def losses(
    logits: Logits, text_ids: Tensor, image_tokens: Tensor, keep_text: Tensor, pad_targets: bool = True
) -> Losses:
    """Cross-entropies of text_ids (B, T) and image_tokens (B, h, w); the paper weighs them 1/8 and 7/8 (section 2.2).

    Args:
        keep_text: bool (B,), False where the caption was dropped for guidance: predicting pads teaches nothing there.
            The text mean is over the rows kept, and 0 if there is none.
        pad_targets: whether pads, the last T of the V ids, are predicted like words (the paper does not say). Without
            them the text mean is over the words of the rows kept, and 0 if there are none.
    """
    text = F.cross_entropy(logits.text.flatten(0, 1), text_ids.flatten(), reduction="none").unflatten(0, text_ids.shape)
    if pad_targets:
        text, counted = text.mean(1), keep_text
    else:
        words = text_ids < logits.text.shape[2] - logits.text.shape[1]
        counted = words & keep_text[:, None]
    image = F.cross_entropy(logits.image.flatten(0, 1), image_tokens.flatten())
    return Losses((text * counted).sum() / counted.sum().clamp(min=1), image)
