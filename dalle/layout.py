"""Where everything stands in the sequence: the only home of positions.

    state      0    1   ...  T       T+1   T+2  ...  T+N
    holds      SOT  t0  ...  t(T-1)  SOI   i0   ...  i(N-2)
    predicts   t0   t1  ...  -       i0    i1   ...  i(N-1)

The text part always enters whole, pads included; the last image token is never an input, for nothing comes after it.
The paper's 1,280 states count start-of-text as one of the 256 text states; here it is one more, so that all T text ids
are seen by the image. State T has nothing left to predict: the two parts have separate vocabularies.
This file does not know what a token is, nor what attention does with it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The text-first sequence of `text_length` text ids (T) and a `grid` (h, w) of image tokens (N = h w), row by row.

    Each text state, SOT and pads included, has its own learned position. An image state carries the row and the column
    of the cell that it *predicts*, so SOI has (0, 0). The paper's figure 10 allows this reading or that of the token
    held; this one needs no position for a start token and tells the state what it is about to draw.
    """

    text_length: int
    grid: tuple[int, int]

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
        """States of the text part; all but the last predict a text id."""
        return slice(0, self.text_length + 1)

    @property
    def image(self) -> slice:
        """States of the image part; the j-th predicts cell j."""
        return slice(self.text_length + 1, self.states)

    def rows(self) -> Tensor:
        """int64 (N,): the row of the cell that each image state predicts."""
        return torch.arange(self.cells) // self.grid[1]

    def columns(self) -> Tensor:
        """int64 (N,): the column of the cell that each image state predicts."""
        return torch.arange(self.cells) % self.grid[1]

    def keys(self, state: int) -> Tensor:
        """int64 indices, ascending, of the states that `state` reads: itself and all before it."""
        return torch.arange(state + 1)

    def mask(self) -> Tensor:
        """bool (states, states): True where the row's state reads the column's; `keys` as one dense table."""
        mask = torch.zeros(self.states, self.states, dtype=torch.bool)
        for state in range(self.states):
            mask[state, self.keys(state)] = True
        return mask
