"""Where everything stands in the sequence, and who reads whom: the only home of positions and attention patterns.

    state      0    1   ...  T       T+1   T+2  ...  T+N        text first
    holds      SOT  t0  ...  t(T-1)  SOI   i0   ...  i(N-2)
    predicts   t0   t1  ...  -       i0    i1   ...  i(N-1)

    state      0    1   ...  N       N+1   N+2  ...  N+T        image first
    holds      SOI  i0  ...  i(N-1)  SOT   t0   ...  t(T-2)
    predicts   i0   i1  ...  -       t0    t1   ...  t(T-1)

The first part always enters whole, pads included; the last token of the second is never an input, for nothing comes
after it. The paper's 1,280 states count start-of-text as one of the 256 text states; here it is one more, so that all T
text ids are seen by the image. The last state of the first part has nothing left to predict: the two parts have
separate vocabularies. This file does not know what a token is, nor what attention does with it.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("full", "row", "column", "conv")

_CONV = 11  # rows and columns of the convolutional pattern's square


def schedule(depth: int) -> tuple[str, ...]:
    """The paper's kinds of attention, block by block (appendix B.1): conv in the last of `depth` blocks, column in the
    second and every fourth after it, row in the others; 1, 16 and 47 of 64."""
    return (*("column" if block % 4 == 2 else "row" for block in range(1, depth)), "conv")


@dataclass(frozen=True)
class Layout:
    """The sequence of `text_length` text ids (T) and a `grid` (h, w) of image tokens (N = h w), row by row.

    Each text state, SOT and pads included, has its own learned position. An image state carries the row and the column
    of the cell that it *predicts*, so SOI has (0, 0). The paper's figure 10 allows this reading or that of the token
    held; this one needs no position for a start token and tells the state what it is about to draw.

    Text reads all before it, and whichever part comes second reads all of the first. What an image state reads of the
    image part is one of four `KINDS`, each a set of `offsets`: differences of flat raster indices, so that a window
    that leaves the grid at one side goes on at the other, a row away (the paper's figure 11). SOI is an ordinary
    state here, the one of flat index 0: a window holds it, or does not, like any other.
    """

    text_length: int
    grid: tuple[int, int]
    image_first: bool = False

    @property
    def cells(self) -> int:
        """Image tokens, N."""
        return self.grid[0] * self.grid[1]

    @property
    def states(self) -> int:
        """Length of the sequence that the transformer reads, T + 1 + N."""
        return self.text_length + 1 + self.cells

    @property
    def text(self) -> slice:
        """States of the text part, in order; the k-th predicts text id k. Text first: T + 1, the last predicts none."""
        return slice(self.cells + 1, self.states) if self.image_first else slice(0, self.text_length + 1)

    @property
    def image(self) -> slice:
        """States of the image part; the j-th predicts cell j. Image first: N + 1, the last of them predicts none."""
        return slice(0, self.cells + 1) if self.image_first else slice(self.text_length + 1, self.states)

    @property
    def _image_states(self) -> int:
        return self.cells + self.image_first  # the last token of the first part is an input too

    def offsets(self, kind: str) -> Sequence[int]:
        """How many states back in the image part an image state reads, where there are so many; ascending, 0 is itself.

        With rows of w cells: `full` everything; `row` 0 .. w, back to the same column of the row above; `column` the
        multiples of w; `conv` w r + c for r in 0 .. 5 and c in -5 .. 5 that are not negative, 61 for w >= 11. On
        narrower grids conv has fewer, as these numbers then meet.
        """
        width, states, half = self.grid[1], self._image_states, _CONV // 2
        if kind == "conv":
            square = {width * row + column for row in range(half + 1) for column in range(-half, half + 1)}
            return sorted(offset for offset in square if 0 <= offset < states)
        return {"full": range(states), "row": range(min(width + 1, states)), "column": range(0, states, width)}[kind]

    def window(self, state: int, kind: str) -> Tensor:
        """int64 indices, ascending, of the image states that an image state reads in a layer of this kind, itself
        among them."""
        offsets = self._offsets[kind]
        return state - offsets[offsets <= state - self.image.start].flip(0)

    @functools.cached_property
    def _offsets(self) -> dict[str, Tensor]:
        return {kind: torch.tensor(self.offsets(kind)) for kind in KINDS}

    def keys(self, state: int, kind: str = "full") -> Tensor:
        """int64 indices, ascending, of the states that `state` reads in a layer of this kind, itself among them."""
        if not self.image.start <= state < self.image.stop:
            return torch.arange(state + 1)
        return torch.cat([torch.arange(self.image.start), self.window(state, kind)])

    def mask(self, kind: str = "full") -> Tensor:
        """bool (states, states): True where the row's state reads the column's; `keys` as one dense table."""
        index = torch.arange(self._image_states)
        reach = torch.zeros(self._image_states, dtype=torch.bool)
        reach[torch.tensor(self.offsets(kind))] = True
        mask = torch.ones(self.states, self.states, dtype=torch.bool).tril()
        mask[self.image, self.image] &= reach[(index[:, None] - index).abs()]
        return mask
