"""Layout against a definition that is written out state by state."""

import pytest
import torch

from dalle.layout import Layout

SHAPES = [(1, (1, 1)), (3, (2, 4)), (5, (4, 2)), (4, (3, 3))]


def written_out(text_length, grid):
    """(part, index of what is predicted or None) of each state, in order."""
    text = [("text", k) for k in range(text_length)] + [("text", None)]
    return text + [("image", (row, column)) for row in range(grid[0]) for column in range(grid[1])]


@pytest.mark.parametrize("text_length, grid", SHAPES)
def test_states_and_parts(text_length, grid):
    layout, states = Layout(text_length, grid), written_out(text_length, grid)
    assert layout.states == len(states) and layout.cells == grid[0] * grid[1]
    assert [part for part, _ in states[layout.text]] == ["text"] * (text_length + 1)
    assert [part for part, _ in states[layout.image]] == ["image"] * layout.cells
    assert layout.text.stop == layout.image.start and layout.image.stop == layout.states
    cells = [predicted for _, predicted in states[layout.image]]
    assert list(zip(layout.rows().tolist(), layout.columns().tolist(), strict=True)) == cells
    assert cells[0] == (0, 0)  # start-of-image stands where it draws


@pytest.mark.parametrize("text_length, grid", SHAPES)
def test_mask_and_keys_are_full_causal_attention(text_length, grid):
    layout = Layout(text_length, grid)
    expected = [[key <= state for key in range(layout.states)] for state in range(layout.states)]
    assert layout.mask().tolist() == expected
    for state in range(layout.states):
        assert layout.keys(state).tolist() == [key for key, seen in enumerate(expected[state]) if seen]


def test_text_never_sees_the_image_and_every_cell_sees_all_text():
    layout = Layout(4, (3, 3))
    mask = layout.mask()
    assert mask.dtype == torch.bool
    assert not mask[layout.text, layout.image].any()
    assert mask[layout.image, layout.text].all()
