"""What only a GPU gains from: steps of drawing replayed from CUDA graphs, and patterns by block-sparse kernels.

A step of a small batch launches hundreds of kernels that each take less time than their launch. A CUDA graph launches
them at once, if they are the same work on the same memory every time: the cell stands in a tensor, what it reads in
masks, and keys are read up to the next multiple of `PIECE`. On a CPU this is more work, not less.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dalle.layout import Layout
from dalle.model import DALLE, KVCache
from dalle.packing import shared
from dvae.errors import warn

PIECE = 256  # states by which the part of the cache that is read grows


class Place(NamedTuple):
    """One block's part of a `Still` cache: keys and values (2, B, H, slots, D), and the slots, int64 (1,) and (n,),
    that a step writes and those whose copies it reads, if it reads a pattern."""

    stored: Tensor
    slot: Tensor
    window: Tensor | None
    first: int
    end: int

    def __call__(self, kv: Tensor, window: Tensor | None = None) -> Tensor:
        self.stored.index_copy_(3, self.slot, kv)
        if self.window is not None:
            self.stored[:, :, :, self.first : self.end] = self.stored.index_select(3, self.window)
        return self.stored[:, :, :, : self.end]


class Still(KVCache):
    """The memory of a cache, text first, at a cell that stands in a tensor.

    Args:
        cache: whose memory it is.
        cell: int64 (1,), on the device.
        end: states that are read of blocks that read all; more than any cell's own number.
    """

    def __init__(self, cache: KVCache, cell: Tensor, end: int):
        super().__init__(cache.layout, cache.kinds)
        self.stored, self.cell, self.end = cache.stored, cell, end
        self.tables = {kind: windows(cache.layout, kind, cell.device) for kind in set(cache.kinds) - {"full"}}

    def reads(self) -> dict[str, Tensor]:
        """For each kind of attention a mask, bool (1, slots)."""
        masks = {kind: known[self.cell] for kind, (_, known) in self.tables.items()}
        masks["full"] = (torch.arange(self.end, device=self.cell.device) <= self.first + self.cell)[None]
        return masks

    def store(self, layer: int) -> Place:
        kind, room = self.kinds[layer], self.rooms[layer]
        # not by [self.cell[0]]: a number would be read from the device, which waits for it and cannot be captured
        window = self.tables[kind][0].index_select(0, self.cell)[0] + room if room else None
        end = self.first + room if room else self.end
        return Place(self.stored[layer], self.first + room + self.cell, window, self.first, end)


@functools.lru_cache(maxsize=8)
def windows(layout: Layout, kind: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each cell the states, int64 (N, n), that it reads of the image, the first of them again where there are less
    than n; and of the first states and these n which count, bool (N, first + n)."""
    first, most = layout.image.start, len(layout.offsets(kind))
    states, known = torch.empty(layout.cells, most, dtype=torch.int64), torch.ones(layout.cells, first + most).bool()
    for cell in range(layout.cells):
        window = layout.window(first + cell, kind)
        states[cell, : len(window)], states[cell, len(window) :] = window, window[0]
        known[cell, first + len(window) :] = False
    return states.to(device), known.to(device)


class Replayed:
    """A model on a GPU, for drawing: its steps are compiled and replayed from CUDA graphs, all else is the model's.

    The graphs belong to the memory of one cache; they are made anew for another. The logits of a step stand until the
    next one.
    """

    def __init__(self, model: DALLE):
        self._model, self._memory, self._steps = model, None, {}
        self._compiled: DALLE | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    @torch.no_grad()
    def step(self, tokens: Tensor | None, cell: int, cache: KVCache) -> Tensor:
        """As `DALLE.step`."""
        if tokens is None:
            logits = self._model.step(tokens, cell, cache)
            clear(cache)
            return logits
        memory = cache.stored.data_ptr(), len(tokens)
        if memory != self._memory:
            clear(cache)
            self._memory, self._steps = memory, {}
        assert cache.length == self.layout.image.start + cell
        end = min(-(-(cache.length + 1) // PIECE) * PIECE, self.layout.states)
        if end not in self._steps:
            self._steps[end] = self._captured(tokens, cell, cache, end)
        held, at, replay, logits = self._steps[end]
        held.copy_(tokens)
        at.fill_(cell)
        replay()
        cache.length += 1
        return logits

    def _captured(self, tokens: Tensor, cell: int, cache: KVCache, end: int) -> tuple:
        held, at = tokens.clone(), torch.full((1,), cell, device=tokens.device)
        still = Still(cache, at, end)
        if self._compiled is None:
            self._compiled = shared(self._model)
            compiled(self._compiled.blocks, lambda: self._compiled.step(held, at, still))
        replay, logits = captured(lambda: self._compiled.step(held, at, still))
        return held, at, replay, logits


def clear(cache: KVCache) -> None:
    """Put zeros where nothing stands yet: what a mask hides must still be a number."""
    for layer, room in enumerate(cache.rooms):
        cache.stored[layer, :, :, :, cache.first : cache.first + room] = 0
        cache.stored[layer, :, :, :, cache.length + room :] = 0


def captured(work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """A CUDA graph of some work, as what runs it again, and the memory of its result."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):  # kernels are chosen and compiled in the first calls, which cannot be captured
            work()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()
    return graph.replay, result


def compiled(blocks: Sequence[torch.nn.Module], trial: Callable[[], Any]) -> None:
    """Let torch compile the inside of blocks, once for all that are alike, if the `trial` of it succeeds."""
    for block in blocks:
        block.compile(dynamic=False)
    if not succeeds("torch.compile", trial):
        for block in blocks:
            block._compiled_call_impl = None


def succeeds(what: str, trial: Callable[[], Any]) -> bool:
    """Whether a backend works here; if not, that is told, for the caller goes on without it."""
    try:
        trial()
    except Exception as error:  # a compiler has many ways to fail, and none of them is the user's mistake
        said = str(error).strip().splitlines() or [type(error).__name__]
        warn(f"{what} failed, going on without it: {said[0]}", "a C++ compiler and, on a GPU, Triton are needed for it")
        return False
    return True


def sparse(layout: Layout, kind: str, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Attention of whole sequences by a pattern, q, k, v (B, H, S, D) -> (B, H, S, D), that skips the blocks of keys
    in which nothing is read."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask, states = layout.mask(kind).to(device), layout.states
    blocks = create_block_mask(lambda b, h, q, k: mask[q, k], None, None, states, states, device=device)
    attend = torch.compile(flex_attention, dynamic=False) if device.type == "cuda" else flex_attention
    return functools.partial(attend, block_mask=blocks)
