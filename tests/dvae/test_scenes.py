import dataclasses
import itertools
import random
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dvae import scenes
from dvae.errors import DataError
from dvae.scenes import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT,
    INVERSE,
    RELATIONS,
    SHAPES,
    SIZES,
    SPLITS,
    Claim,
    Described,
    Scene,
    Thing,
    caption,
    captions,
    draw,
    judge,
    parse,
    scene,
    see,
)

COUNT = 600
PARTS = [f"{which} {part}" for which in ("first", "second") for part in ("colour", "shape", "size")]
FRESH = 5_000_000  # indices that nobody trains on
GOLDEN_SCENE = ("below", "brown", ("green", "square", "small"), ("cyan", "crown", "large"))
GOLDEN_PLACES = [23.7544, 23.8662, 4.1647, 23.4541, 8.3337, 6.6508]
GOLDEN_CAPTION = "the large cyan crown above the small green square against brown"
GOLDEN_HELD_OUT = "a large yellow fork above a large white fork"


def fresh(count, start=FRESH):
    return [scene(SPLITS[i % 3], start + i) for i in range(count)]


def in_full(s):
    a, b = (f"a {t.size} {t.colour} {t.shape}" for t in s.things)
    return f"{a} {s.relation} {b} on a {s.background} background"


def rate(pictures, texts):
    return np.mean([verdict.exact for verdict in judge(pictures, texts)])


@pytest.fixture(scope="module")
def many():
    return fresh(COUNT)


@pytest.fixture(scope="module")
def texts(many):
    return [in_full(s) for s in many]


@pytest.fixture(scope="module", params=[32, 64])
def pictures(request, many):
    return draw(many, request.param).float() / 255


# ------------------------------------------------------------------------------------------------- what there is


def distance(one, other):
    return np.linalg.norm(np.subtract(one, other))


def test_colours_are_far_apart():
    assert len(COLOURS) == 8 and len(SHAPES) == 5 and len(BACKGROUNDS) == 3
    assert min(distance(a, b) for a, b in itertools.combinations(COLOURS.values(), 2)) >= 0.5
    assert min(distance(a, b) for a in COLOURS.values() for b in BACKGROUNDS.values()) >= 0.4
    assert min(distance(a, b) for a, b in itertools.combinations(BACKGROUNDS.values(), 2)) >= 0.4


def test_held_out_compositions_are_a_tenth_and_their_parts_are_seen_elsewhere():
    kinds = set(itertools.product(COLOURS, SHAPES))
    assert kinds > HELD_OUT and 10 * len(HELD_OUT) == len(kinds)
    seen = kinds - HELD_OUT
    assert {colour for colour, _ in seen} == set(COLOURS) and {shape for _, shape in seen} == set(SHAPES)


@pytest.mark.parametrize("split", SPLITS)
def test_splits_keep_their_promise_and_show_everything(split):
    many = [scene(split, i) for i in range(3000)]
    shown = [{(t.colour, t.shape) for t in s.things} for s in many]
    assert all(len(pair) == 2 for pair in shown)  # the two differ
    kinds = set(itertools.product(COLOURS, SHAPES))
    if split == "heldout":
        assert all(pair & HELD_OUT for pair in shown) and set().union(*shown) == kinds
    else:
        assert set().union(*shown) == kinds - HELD_OUT
    layouts = {(s.relation, s.background, *(t.size for t in s.things)) for s in many}
    assert len(layouts) == len(RELATIONS) * len(BACKGROUNDS) * len(SIZES) ** 2


def test_a_scene_is_a_pure_function_of_its_arguments():
    assert [scene("train", i) for i in (7, 3)] == [scene("train", i) for i in (3, 7)][::-1]
    streams = [{scene(split, i, seed) for i in range(300)} for split in SPLITS for seed in (0, 1)]
    assert len(set().union(*streams)) == 300 * len(streams)


def test_scenes_and_captions_never_change():  # models are trained and compared on them
    s = scene("train", 0)
    assert GOLDEN_SCENE == (s.relation, s.background, *((t.colour, t.shape, t.size) for t in s.things))
    assert [round(v, 4) for t in s.things for v in (t.x, t.y, t.radius)] == GOLDEN_PLACES
    assert captions("train", 0) == (GOLDEN_CAPTION,)
    assert captions("heldout", 0) == (GOLDEN_HELD_OUT,)


def test_an_unknown_split_is_refused():
    with pytest.raises(DataError, match="'test'"):
        scene("test", 0)


def test_exactly_one_relation_holds_by_a_clear_margin():
    for s in fresh(3000):
        a, b = s.things
        for t in s.things:
            low, high = SIZES[t.size]
            assert low <= t.radius <= high
            assert 0.5 + t.radius <= min(t.x, t.y) and max(t.x, t.y) <= 31.5 - t.radius
        along = {"left of": b.x - a.x, "right of": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}[s.relation]
        across = abs(a.y - b.y) if s.relation in ("left of", "right of") else abs(a.x - b.x)
        assert along - a.radius - b.radius >= 1
        assert across <= 1.5 and along >= 14.5


# ------------------------------------------------------------------------------------------------------- drawing


def inside(shape, x, y, r):
    """The shapes once more, as sets of points."""
    block = (abs(x) <= r) & (abs(y) <= r)
    halves = {
        "round": x**2 + y**2 <= r**2,
        "block": block,
        "stem": block & (abs(x) <= 0.36 * r),
        "prongs": block & ((abs(x) >= 0.45 * r) | (y >= -0.3 * r)),
    }
    upper, lower = {
        "circle": ("round", "round"),
        "square": ("block", "block"),
        "mushroom": ("round", "stem"),
        "crown": ("prongs", "block"),
        "fork": ("prongs", "stem"),
    }[shape]
    return np.where(y < 0, halves[upper], halves[lower])


@pytest.mark.parametrize("size", [32, 64])
def test_drawing_is_the_mean_over_each_pixel(many, size):
    fine = 16 * size
    grid = (np.arange(fine) + 0.5) * 32 / fine
    for s in many[:12]:
        expected = np.broadcast_to(BACKGROUNDS[s.background], (fine, fine, 3)).copy()
        for t in s.things:
            expected[inside(t.shape, grid[None, :] - t.x, grid[:, None] - t.y, t.radius)] = COLOURS[t.colour]
        expected = expected.reshape(size, 16, size, 16, 3).mean((1, 3)).transpose(2, 0, 1)
        error = np.abs(draw([s], size)[0].numpy() / 255 - expected)
        assert error.mean() < 0.006 and error.max() < 0.4  # a corner's distance is not quite its coverage


def test_drawing_does_not_depend_on_the_company(many):
    together = draw(many[:5], 48)
    assert together.dtype == torch.uint8 and together.shape == (5, 3, 48, 48)
    assert torch.equal(together, torch.cat([draw([s], 48) for s in many[:5]]))
    assert draw([], 32).shape == (0, 3, 32, 32)


def test_larger_pictures_have_the_same_geometry(many):
    small, large = draw(many[:20], 32).float(), draw(many[:20], 128).float()
    assert (F.avg_pool2d(large, 4) - small).abs().mean() < 1


# ------------------------------------------------------------------------------------------------------ captions


def claims(s):
    """What a full caption of a scene may say: in either order, with or without the background."""
    a, b = (Described(t.colour, t.shape, t.size) for t in s.things)
    return [
        claim
        for background in (s.background, None)
        for claim in (Claim(a, b, s.relation, background), Claim(b, a, INVERSE[s.relation], background))
    ]


def test_captions_say_what_the_scene_shows_in_many_ways():
    said, ways = [], np.zeros(4)
    for i in range(3000):
        s = scene("train", i)
        (text,) = captions("train", i)
        ways[claims(s).index(parse(text))] += 1
        assert text == text.lower().strip() and "  " not in text and len(text.split()) <= 20
        said.append(text)
    assert (ways / 3000 > 0.2).all()  # each of: two orders, with and without background
    words = {word for text in said for word in text.split()}
    assert 40 <= len(words) <= 60
    for name, synonyms in scenes.SPOKEN.items():
        assert all(any(re.search(rf"\b{synonym}\b", text) for text in said) for synonym in synonyms), name
    forms = {re.sub(rf"\b({'|'.join(COLOURS)}|violet|turquoise)\b", "C", text) for text in said}
    assert len(forms) > 500


def test_captions_are_functions_of_their_arguments():
    assert captions("val", 5, seed=1) == captions("val", 5, seed=1)
    s = scene("val", 5)
    assert len({caption(s, np.random.default_rng(i)) for i in range(50)}) > 25


CIRCLE, CROWN = Described(None, "circle", None), Described(None, "crown", None)
RED, BLUE = Described("red", "circle", None), Described("blue", "square", "small")


@pytest.mark.parametrize(
    "text, claim",
    [
        ("a red circle above a small blue square", Claim(RED, BLUE, "above", None)),
        ("  The RED disc\tover a Tiny blue square. ", Claim(RED, BLUE, "above", None)),
        ("red disk is underneath the little blue square against gray", Claim(RED, BLUE, "below", "grey")),
        ("To the left of a small blue square, there is a red circle", Claim(RED, BLUE, "left of", None)),
        ("right of one small blue square is a red circle on beige", Claim(RED, BLUE, "right of", "sand")),
        ("a circle on the left of a crown", Claim(CIRCLE, CROWN, "left of", None)),
        (
            "huge violet toadstool to the right of turquoise box on the brown background",
            Claim(Described("purple", "mushroom", "large"), Described("cyan", "square", None), "right of", "brown"),
        ),
    ],
)
def test_parse_understands_how_people_type(text, claim):
    assert parse(text) == claim


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a cat",
        "a red circle",
        "a red circle above",
        "a red circle near a blue square",
        "a pink circle above a blue square",
        "a red above a blue square",
        "a red circle above a blue square above a green crown",
        "a red circle above a blue square on a green background",
        "aredcircle above a blue square",
    ],
)
def test_parse_refuses_what_it_does_not_understand(text):
    with pytest.raises(DataError) as error:
        parse(text)
    assert repr(text) in error.value.what and "colours" in error.value.hint


# --------------------------------------------------------------------------------------------------------- judge


@pytest.mark.parametrize("size, count", [(32, 3000), (64, 1000), (128, 200), (80, 200)])
def test_true_pictures_are_accepted(size, count):
    indices = [(SPLITS[i % 3], FRESH + COUNT + i) for i in range(count)]
    pictures, said = draw([scene(*i) for i in indices], size), [captions(*i)[0] for i in indices]
    assert rate(pictures, said) >= 0.995
    assert judge(pictures[:50], said[:50]) == judge(pictures[:50].float() / 255, said[:50])


def test_see_reads_the_whole_scene(many):
    errors = []
    for s, seen in zip(many, see(draw(many)), strict=True):
        assert seen.count == 2 and seen.background == s.background
        for t in s.things:
            found = min(seen.things, key=lambda thing: (thing.x - t.x) ** 2 + (thing.y - t.y) ** 2)
            assert (found.colour, found.shape, found.size) == (t.colour, t.shape, t.size)
            errors.append((found.x - t.x, found.y - t.y, found.radius - t.radius))
    assert np.abs(errors).max() < 0.5


@pytest.mark.parametrize("part", [*PARTS, "relation", "background"])
def test_a_caption_with_one_attribute_changed_is_refused(part, many, pictures):
    pick = random.Random(part)
    names = {"colour": COLOURS, "shape": SHAPES, "size": SIZES, "relation": RELATIONS, "background": BACKGROUNDS}
    said = []
    for s in many:
        things, place = list(s.things), int(part.startswith("second"))
        attribute = part.split()[-1]
        owner = things[place] if attribute in ("colour", "shape", "size") else s
        changed = pick.choice([name for name in names[attribute] if name != getattr(owner, attribute)])
        things[place] = dataclasses.replace(things[place], **({attribute: changed} if owner is not s else {}))
        lie = dataclasses.replace(s, things=tuple(things), **({attribute: changed} if owner is s else {}))
        said.append(in_full(lie))
    verdicts = judge(pictures, said)
    assert np.mean([not v.exact for v in verdicts]) >= 0.995
    for verdict in verdicts:
        assert set(verdict.attributes) == {*PARTS, "relation", "background"}
        assert verdict.exact == all(verdict.attributes.values()) == (verdict.reason == "")
    # Two things of one shape and size may be told apart by the other's colour, so that another attribute is at fault.
    assert np.mean([not v.attributes[part] for v in verdicts]) >= 0.7
    one = next(v for v in verdicts if not v.attributes[part])
    assert sum(one.attributes.values()) >= 6 and " is " in one.reason


@pytest.mark.parametrize("sigma", [None, 0.7, 1.0])
def test_no_shape_passes_for_another_even_when_blurred(sigma, many):
    pictures, others = draw(many).float() / 255, {shape: [] for shape in SHAPES}
    for i, s in enumerate(many):
        for shape in SHAPES.keys() - {t.shape for t in s.things}:  # a shape that is nowhere in the picture
            lie = dataclasses.replace(s, things=(dataclasses.replace(s.things[0], shape=shape), s.things[1]))
            others[shape].append((i, in_full(lie)))
    if sigma is not None:
        pictures = blur(pictures, sigma)
    for lies in others.values():
        rows, said = zip(*lies, strict=True)
        verdicts = judge(pictures[list(rows)], said)
        assert len(lies) > COUNT / 2 and not any(v.attributes["first shape"] for v in verdicts)


def test_what_a_caption_leaves_out_is_not_judged():
    things = Thing("red", "circle", "small", 8, 10, 4), Thing("blue", "crown", "large", 22, 11, 6.4)
    s = Scene(things, "left of", "sand")
    (verdict,) = judge(draw([s]), ["a circle left of a blue crown"])
    assert verdict == ({part: True for part in ("first shape", "second colour", "second shape", "relation")}, True, "")
    (verdict,) = judge(draw([s]), ["a large crown is above a green circle against grey"])
    assert not verdict.exact and verdict.attributes == {
        "first shape": True,
        "first size": True,
        "second colour": False,
        "second shape": True,
        "relation": False,
        "background": False,
    }
    assert verdict.reason == "second colour is red, not green"


def grid(size):
    return (torch.arange(size) + 0.5) * 32 / size


def background(many):
    return torch.tensor([BACKGROUNDS[s.background] for s in many])[:, :, None, None]


def paint_over(pictures, many, place, half=None):
    """Background over the box of one thing of each scene, or over one half of it."""
    at = grid(pictures.shape[-1])
    masks = []
    for s, p in zip(many, place, strict=True):
        t = s.things[p]
        x, y = at[None, :] - t.x, at[:, None] - t.y
        box = (x.abs() <= t.radius + 1) & (y.abs() <= t.radius + 1)
        side = {None: x == x, "left": x < 0, "right": x > 0, "top": y < 0, "bottom": y > 0}[half]
        masks.append(box & side)
    return torch.where(torch.stack(masks)[:, None], background(many), pictures)


def put(pictures, things, colours):
    """One more thing on each picture, of any colour."""
    size = pictures.shape[-1]
    at = grid(size)
    cover = [
        scenes._coverage(t.shape, at - t.x, at[:, None] - t.y, torch.tensor(t.radius), size / 32) for t in things
    ]
    return pictures + torch.stack(cover)[:, None] * (torch.tensor(colours)[:, :, None, None] - pictures)


def places(count):
    return [random.Random(i).randrange(2) for i in range(count)]


def test_a_missing_thing_is_refused(many, texts, pictures):
    verdicts = judge(paint_over(pictures, many, places(COUNT)), texts)
    assert {v.reason for v in verdicts} == {"one object"}
    assert all(v.attributes["background"] and sum(v.attributes.values()) == 1 for v in verdicts)


@pytest.mark.parametrize("half", ["left", "right", "top", "bottom"])
def test_half_a_thing_is_refused(half, many, texts, pictures):
    assert rate(paint_over(pictures, many, places(COUNT), half), texts) <= 0.005


def test_a_thing_drawn_twice_is_refused(many, texts, pictures):
    pick, kept, copies = random.Random(0), [], []
    for i, (s, place) in enumerate(zip(many, places(COUNT), strict=True)):
        t, other = s.things[place], s.things[1 - place]
        for _ in range(100):
            x, y = (pick.uniform(t.radius + 0.5, 31.5 - t.radius) for _ in range(2))
            apart = [max(abs(x - thing.x), abs(y - thing.y)) for thing in (t, other)]
            # not on top of the first one, nor hidden in the other
            if apart[0] >= t.radius and apart[1] >= other.radius:
                kept.append(i)
                copies.append(dataclasses.replace(t, x=x, y=y))
                break
    assert len(kept) > 0.9 * COUNT
    doubled = put(pictures[kept], copies, [COLOURS[t.colour] for t in copies])
    assert rate(doubled, [texts[i] for i in kept]) <= 0.005


@pytest.mark.parametrize("closeness", [0.0, 0.3, 0.6])
def test_merged_things_are_refused(closeness, many, texts, pictures):
    moved = []
    for s in many:
        a, b = s.things
        pull = closeness * (a.radius + b.radius) / max(abs(b.x - a.x), abs(b.y - a.y))
        moved.append(dataclasses.replace(b, x=a.x + pull * (b.x - a.x), y=a.y + pull * (b.y - a.y)))
    alone = paint_over(pictures, many, [1] * COUNT)
    merged = put(alone, moved, [COLOURS[t.colour] for t in moved])
    assert rate(merged, texts) <= 0.005


def with_third(many, pictures, radius, colour=None):
    pick, kept, thirds = random.Random(0), [], []
    for i, s in enumerate(many):
        for _ in range(200):
            x, y = (pick.uniform(radius + 1, 31 - radius) for _ in range(2))
            if all(max(abs(x - t.x), abs(y - t.y)) >= t.radius + radius + 1.5 for t in s.things):
                kept.append(i)
                thirds.append(Thing(pick.choice(list(COLOURS)), "circle", "small", x, y, radius))
                break
    assert len(kept) > 0.9 * COUNT
    colours = [COLOURS[t.colour] if colour is None else colour(many[i], t) for i, t in zip(kept, thirds, strict=True)]
    return kept, put(pictures[kept], thirds, colours)


@pytest.mark.parametrize("radius", [1.7, 2.0, 4.0])
def test_a_third_thing_is_refused(radius, many, texts, pictures):
    kept, crowded = with_third(many, pictures, radius)
    verdicts = judge(crowded, [texts[i] for i in kept])
    assert np.mean([v.reason == "three objects" for v in verdicts]) >= 0.995


def test_specks_are_no_things(many, texts, pictures):
    kept, tiny = with_third(many, pictures, 0.8)
    assert rate(tiny, [texts[i] for i in kept]) >= 0.985

    def faint(s, thing):
        return tuple(0.75 * b + 0.25 * c for b, c in zip(BACKGROUNDS[s.background], COLOURS[thing.colour], strict=True))

    kept, ringing = with_third(many, pictures, 1.4, faint)
    assert rate(ringing, [texts[i] for i in kept]) >= 0.995


@pytest.mark.parametrize("colour", [(1.0, 0.5, 0.0), (1.0, 0.6, 0.75), (0.5, 1.0, 0.1), (0.0, 0.5, 0.5)])
def test_a_colour_off_the_palette_is_refused(colour, many, texts, pictures):
    kept = [i for i, s in enumerate(many) if distance(BACKGROUNDS[s.background], colour) > 0.3]
    things = [many[i].things[i % 2] for i in kept]
    alone = paint_over(pictures, many, [i % 2 for i in range(COUNT)])[kept]
    verdicts = judge(put(alone, things, [colour] * len(kept)), [texts[i] for i in kept])
    assert len(kept) >= 300 and np.mean([v.reason.endswith("colour off the palette") for v in verdicts]) >= 0.995


def test_a_thing_in_two_colours_is_refused(many, texts, pictures):
    pick, other = random.Random(0), []
    for i, s in enumerate(many):
        things = list(s.things)
        colour = pick.choice([name for name in COLOURS if name != things[i % 2].colour])
        things[i % 2] = dataclasses.replace(things[i % 2], colour=colour)
        other.append(dataclasses.replace(s, things=tuple(things)))
    at = grid(pictures.shape[-1])
    left = torch.stack([at < s.things[i % 2].x for i, s in enumerate(many)])[:, None, None]
    mixed = torch.where(left, draw(other, pictures.shape[-1]) / 255, pictures)
    assert rate(mixed, texts) <= 0.005


def test_noise_and_blank_pictures_are_refused(many, texts, pictures):
    size = pictures.shape[-1]
    blank = background(many).expand(-1, -1, size, size)
    assert {v.reason for v in judge(blank, texts)} == {"no object"}
    generator = torch.Generator().manual_seed(0)
    assert rate(torch.rand(COUNT, 3, size, size, generator=generator), texts) == 0
    assert rate(torch.randn(COUNT, 3, size, size, generator=generator), texts) == 0
    assert rate(torch.full((COUNT, 3, size, size), float("nan")), texts) == 0


def test_another_scene_is_refused(texts, pictures):
    assert rate(pictures, texts[1:] + texts[:1]) <= 0.005


def blur(pictures, sigma):
    kernel = torch.exp(-((torch.arange(-9, 10) / sigma) ** 2) / 2)
    kernel = torch.outer(kernel, kernel) / kernel.sum() ** 2
    padded = F.pad(pictures, (9,) * 4, mode="replicate")
    return F.conv2d(padded.flatten(0, 1)[:, None], kernel[None, None]).view_as(pictures)


def warp(pictures, pixels, generator):
    size = pictures.shape[-1]
    bend = torch.randn(len(pictures), 2, 6, 6, generator=generator) * pixels * 2 / size
    bend = F.interpolate(bend, (size, size), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    straight = F.affine_grid(torch.eye(2, 3)[None], (1, 3, size, size), align_corners=False)
    return F.grid_sample(pictures, straight + bend, padding_mode="border", align_corners=False)


@pytest.mark.parametrize("kind", ["blur", "noise", "shift", "contrast", "warp", "all"])
def test_what_a_decoder_does_to_a_picture_is_forgiven(kind, many, texts):
    pictures = draw(many).float() / 255
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(pictures.shape, generator=generator)
    sign = torch.randn(COUNT, 3, 1, 1, generator=generator).sign()
    worse = {
        "blur": lambda: blur(pictures, 1.1),
        "noise": lambda: pictures + 0.07 * noise,
        "shift": lambda: pictures + 0.09 * sign,
        "contrast": lambda: 0.5 + 0.8 * (pictures - 0.5),
        "warp": lambda: warp(pictures, 0.45, generator),
        "all": lambda: blur(pictures, 0.7) + 0.04 * noise + 0.05 * sign,
    }[kind]()
    assert (worse - pictures).abs().mean() > 0.005
    assert rate(worse.clamp(0, 1), texts) >= 0.95


def test_a_verdict_does_not_depend_on_the_company(many, texts):
    pictures = blur(draw(many[:12]).float() / 255, 1.2)
    assert judge(pictures, texts[:12]) == [judge(pictures[i : i + 1], texts[i : i + 1])[0] for i in range(12)]
    assert judge(pictures[:0], []) == []


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 32, 32), (1, 3, 32, 40), (1, 3, 16, 16)])
def test_other_tensors_are_refused(shape):
    with pytest.raises(DataError, match="no pictures of scenes"):
        judge(torch.zeros(shape), ["a red circle above a blue square"])
