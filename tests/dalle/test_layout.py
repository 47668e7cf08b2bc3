"""Layout against definitions that are written out state by state, in rows and columns."""

import functools

import pytest
import torch

from dalle.layout import KINDS, Layout, schedule

GRIDS = [(1, 1), (1, 5), (5, 1), (2, 4), (3, 4), (4, 3), (7, 2), (11, 11), (12, 12), (5, 16)]
BOTH_ORDERS = pytest.mark.parametrize("image_first", [False, True])


def written_out(text_length, grid, image_first):
    """(part, index of what is predicted or None) of each state, in order."""
    text = [("text", k) for k in range(text_length)]
    image = [("image", (row, column)) for row in range(grid[0]) for column in range(grid[1])]
    return [*image, ("image", None), *text] if image_first else [*text, ("text", None), *image]


def places(grid, image_first):
    """(row, column) of each image state; the one too many of an image that comes first is where a next row begins."""
    cells = [(row, column) for row in range(grid[0]) for column in range(grid[1])]
    return [*cells, (grid[0], 0)] if image_first else cells


def walk(place, up, left, width):
    """The place so many rows up and columns left (negative: right); a row's end touches the next one's start."""
    row, column = place[0] - up, place[1]
    for _ in range(left):
        row, column = (row, column - 1) if column else (row - 1, width - 1)
    for _ in range(-left):
        row, column = (row, column + 1) if column < width - 1 else (row + 1, 0)
    return row, column


def read_by(place, grid, image_first, kind):
    """The places of the image states that the one at `place` reads, by the paper's words and figure 11."""
    row, column = place
    before = [other for other in places(grid, image_first) if other <= place]
    if kind == "row":  # back to the same column of the row above
        return {(r, c) for r, c in before if r == row or (r == row - 1 and c >= column)}
    if kind == "column":
        return {(r, c) for r, c in before if c == column}
    if kind == "conv":  # the upper half of 11 x 11, around the corner where an edge intervenes
        around = {walk(place, up, left, grid[1]) for up in range(6) for left in range(-5, 6)}
        return around & set(before)
    return set(before)


@functools.cache
def brute_force(text_length, grid, image_first, kind):
    """For each state the list of those that it reads."""
    where, table = places(grid, image_first), []
    image = len(where) * [None]
    text = (text_length + (not image_first)) * [None]
    start = 0 if image_first else len(text)
    for state in range(len(image) + len(text)):
        if start <= state < start + len(image):
            own = read_by(where[state - start], grid, image_first, kind)
            table.append([*range(start), *(start + where.index(place) for place in sorted(own))])
        else:
            table.append([*range(state + 1)])
    return table


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("text_length", [1, 4])
@BOTH_ORDERS
def test_states_and_parts(text_length, grid, image_first):
    layout, states = Layout(text_length, grid, image_first), written_out(text_length, grid, image_first)
    assert layout.states == len(states) and layout.cells == grid[0] * grid[1]
    for name, part in (("text", layout.text), ("image", layout.image)):
        assert [state for state in states if state[0] == name] == states[part]
    first, second = (layout.image, layout.text) if image_first else (layout.text, layout.image)
    assert (first.start, first.stop, second.stop) == (0, second.start, layout.states)
    # every token is predicted once, in order; each part starts with its start token, which predicts the first of them
    assert [k for _, k in states[layout.text] if k is not None] == list(range(text_length))
    predicted = [place for _, place in states[layout.image] if place is not None]
    assert predicted == places(grid, image_first)[: layout.cells] and predicted[0] == (0, 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", GRIDS)
@BOTH_ORDERS
def test_mask_and_keys_are_the_brute_force_definition(grid, image_first, kind):
    layout, expected = Layout(3, grid, image_first), brute_force(3, grid, image_first, kind)
    assert len(expected) == layout.states
    mask = layout.mask(kind)
    assert mask.dtype == torch.bool and mask.shape == (layout.states, layout.states)
    assert [row.nonzero().flatten().tolist() for row in mask] == expected
    for state in range(layout.states):
        keys = layout.keys(state, kind)
        assert keys.dtype == torch.int64 and keys.tolist() == expected[state]


@pytest.mark.parametrize("kind", KINDS)
@BOTH_ORDERS
def test_mask_is_keys_at_the_size_of_the_paper(kind, image_first):
    layout = Layout(256, (32, 32), image_first)
    mask = layout.mask(kind)
    for state in range(layout.states):
        assert torch.equal(mask[state].nonzero().flatten(), layout.keys(state, kind))
    for place in [(0, 0), (0, 31), (1, 0), (1, 5), (4, 31), (5, 5), (17, 3), (31, 16), (31, 31)]:
        state = layout.image.start + 32 * place[0] + place[1]
        own = sorted(layout.image.start + 32 * r + c for r, c in read_by(place, (32, 32), image_first, kind))
        assert layout.keys(state, kind).tolist() == [*range(layout.image.start), *own]


def test_the_toy_of_the_papers_figure():
    """Four columns: rows reach five states back, themselves counted, and go around the corner; columns are columns."""
    layout = Layout(2, (3, 4))
    reads = {kind: (layout.keys(3 + 9, kind)[3:] - 3).tolist() for kind in KINDS}  # from row 2, column 1
    assert reads == {"full": list(range(10)), "row": [5, 6, 7, 8, 9], "column": [1, 5, 9], "conv": list(range(10))}


def test_how_many_keys():
    """Of a cell that has enough rows above it: 61 of the 11 x 11 square, w + 1 of a row, all rows of a column."""
    for width in (11, 12, 16, 32):
        layout = Layout(1, (9, width))
        last = layout.states - 1
        assert [len(layout.keys(last, kind)) - 2 for kind in KINDS] == [9 * width, width + 1, 9, 61]
    # on narrower grids the same differences come about in more than one way: 5 w + 6 of them are left
    assert [len(Layout(1, (30, width)).offsets("conv")) for width in (1, 4, 8, 10)] == [11, 26, 46, 56]


@pytest.mark.parametrize("kind", KINDS)
def test_what_holds_for_every_kind(kind):
    for grid in GRIDS:
        layout = Layout(4, grid)
        mask = layout.mask(kind)
        assert mask.diagonal().all() and not mask.triu(1).any()  # itself, and nothing that comes later
        assert torch.equal(mask[layout.text], layout.mask()[layout.text]) and not mask[layout.text, layout.image].any()
        assert mask[layout.image, layout.text].all()  # start and pads included
        layout = Layout(4, grid, image_first=True)
        mask = layout.mask(kind)
        assert mask.diagonal().all() and not mask.triu(1).any()
        assert mask[layout.text, layout.image].all() and not mask[layout.image, layout.text].any()


def test_the_papers_schedule():
    kinds = schedule(64)
    for layer, kind in enumerate(kinds, start=1):
        assert kind == ("conv" if layer == 64 else "column" if (layer - 2) % 4 == 0 else "row")
    assert [len(kinds), *(kinds.count(kind) for kind in KINDS)] == [64, 0, 47, 16, 1]
    assert schedule(1) == ("conv",) and schedule(2) == ("row", "conv") and schedule(4)[1:] == ("column", "row", "conv")
