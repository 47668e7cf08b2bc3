"""The compiled attention of single states: a softmax over the keys that are read; without a compiler, torch's."""

import functools
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from dalle import native, packing
from dalle.layout import Layout
from dalle.model import DALLE, Attention, DALLEConfig, KVCache
from dalle.native import Native, attend
from dalle.packing import packed

T, GRID = 5, (4, 6)
compiled = pytest.mark.skipif(attend() is None, reason="there is no C compiler here")


def state(rows: int, heads: int, size: int, kind: str, cell: int):
    """An attention, a cache that holds all states before `cell`, and that cell's state (B, 1, E)."""
    layout = Layout(T, GRID)
    cache, attention = KVCache(layout, [kind]), Attention(heads * size, heads).requires_grad_(False)
    cache.put(0, torch.randn(2, rows, heads, T + 1, size))
    cache.length = T + 1
    if cell:
        cache.put(0, torch.randn(2, rows, heads, cell, size))
        cache.length += cell
    return attention, cache, torch.randn(rows, 1, heads * size)


def by_hand(attention: Attention, cache: KVCache, kind: str, x):
    """In float64, key by key."""
    rows, size, at = len(x), cache.stored.shape[-1], cache.slot(0)
    q, k, v = attention.qkv(x).double().view(rows, 3, attention.heads, size).unbind(1)
    keys, values = cache.stored[0].double().clone()
    keys[:, :, at], values[:, :, at] = k, v
    slots = cache.layout.keys(cache.length, kind)
    slots = torch.where(slots < cache.first, slots, slots + cache.rooms[0])
    weights = (torch.einsum("bhd, bhnd -> bhn", q, keys[:, :, slots]) / size**0.5).softmax(-1)
    y = torch.einsum("bhn, bhnd -> bhd", weights, values[:, :, slots]).float().flatten(1)
    return attention.out(y)[:, None], (keys[:, :, at], values[:, :, at])


@compiled
@pytest.mark.parametrize("kind", ["full", "row", "column", "conv"])
@pytest.mark.parametrize("rows, heads, size", [(1, 1, 7), (3, 2, 32), (2, 3, 64), (5, 1, 128), (1, 4, 16)])
@pytest.mark.parametrize("cell", [0, 9, 23])
def test_it_is_a_softmax_over_what_the_state_reads(kind, rows, heads, size, cell):
    attention, cache, x = state(rows, heads, size, kind, cell)
    expected, own = by_hand(attention, cache, kind, x)
    at, before = cache.slot(0), cache.stored.clone()
    y = Native(attention, attend())(x, cache.store(0), cache.reads().get(kind))
    torch.testing.assert_close(y, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(cache.stored[0, :, :, :, at].double(), torch.stack(own), atol=0, rtol=0)
    elsewhere = torch.arange(cache.stored.shape[4]) != at
    assert torch.equal(cache.stored[..., elsewhere, :].nan_to_num(), before[..., elsewhere, :].nan_to_num())


@compiled
def test_large_scores_and_numbers_that_are_none():
    attention, cache, x = state(4, 2, 32, "full", 9)
    cache.stored[0, 0] *= 1e4  # all of the softmax falls on one key
    y = Native(attention, attend())(x, cache.store(0))
    expected, _ = by_hand(attention, cache, "full", x)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-4)
    cache.stored[0, 0, 1, 0, 3, 5] = torch.nan
    cache.stored[0, 1, 2, 1, 0, 0] = torch.inf
    y = Native(attention, attend())(x, cache.store(0))
    assert (~y.isfinite().all(-1)).flatten().tolist() == [False, True, True, False]


@compiled
def test_neither_threads_nor_neighbours_change_a_bit():
    attention, cache, _ = state(6, 4, 32, "conv", 17)
    fast, qkv, reads = Native(attention, attend()), torch.randn(6, 1, 3 * 128), cache.reads()["conv"]
    fast.qkv = fast.out = torch.nn.Identity()  # matrix products may differ in a last bit
    company = fast(qkv, cache.store(0), reads)
    alone = cache.select([2, 4], into=cache.select(range(6)))  # in the memory of a larger one
    try:
        torch.set_num_threads(2)
        assert torch.equal(fast(qkv, cache.store(0), reads), company)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(fast(qkv[[2, 4]], alone.store(0), reads), company[[2, 4]])


@compiled
def test_loading_it_leaves_small_numbers_as_they_are():
    assert float(torch.full((64,), 1e-40).mul(1)[0]) > 0, "-ffast-math can make a whole process flush them to 0"


def model(patterns: str = "paper") -> DALLE:
    return DALLE(DALLEConfig(30, T, 20, GRID, 4, 32, 2, patterns=patterns, both_orders=True)).requires_grad_(False)


@compiled
def test_drawing_uses_it_and_the_masks_of_whole_pictures_do_not(monkeypatch):
    calls, function = [], attend()
    monkeypatch.setattr(packing, "attend", lambda: lambda *args: (calls.append(args), function(*args)))
    plain = model()
    fast = packed(plain)
    text, image = torch.randint(35, (3, T)), torch.randint(20, (3, *GRID))
    cache = fast.prefill(text)
    fast.score(image[:, :1].flatten(1)[:, :1], cache)  # one state, with a mask
    assert not calls
    expected, tokens = plain(text, image).image, image.flatten(1)
    for cell in range(24):
        logits = fast.step(tokens[:, cell - 1] if cell else None, cell, cache)
        torch.testing.assert_close(logits, expected[:, cell], atol=1e-5, rtol=1e-4)
    assert len(calls) == 24 * 4
    cache, expected = fast.prefill_image(image), plain(text, image, image_first=True).text
    for place in range(T):
        logits = fast.step_text(text[:, place - 1] if place else None, place, cache)
        torch.testing.assert_close(logits, expected[:, place], atol=1e-5, rtol=1e-4)
    assert len(calls) == 24 * 4 + T * 4


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """No library in the cache, and none asked for yet."""
    again = functools.cache(attend.__wrapped__)
    monkeypatch.setattr(native, "attend", again)
    monkeypatch.setattr(packing, "attend", again)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@compiled
def test_a_step_that_does_not_fit_its_cache_is_refused():
    fast, few = packed(model()), torch.randint(35, (1, T))
    cache = fast.prefill(few.expand(3, T))
    fast.step(None, 0, cache)
    with pytest.raises((AssertionError, RuntimeError)):
        fast.step(few[:, 0], 1, cache)  # of one picture, where three are drawn
    cache = fast.prefill(few)
    for cell in range(24):
        fast.step(torch.zeros(1, dtype=torch.int64) if cell else None, cell, cache)
    with pytest.raises((AssertionError, RuntimeError)):
        fast.step(torch.zeros(1, dtype=torch.int64), 24, cache)


@pytest.mark.parametrize(
    "compiler", ["/no/such/compiler", "false", f"{sys.executable} -c pass", "'", "gcc -fvisibility=hidden"]
)
def test_without_a_compiler_torch_attends_and_that_is_told_once(fresh, compiler, monkeypatch, capsys):
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setattr(sys, "platform", "linux")
    fast = packed(model())
    packed(model())
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and "attention is not compiled" in told[0] and "gcc" in told[1]
    assert compiler != "false" or told[0].endswith("drawing slower for it: false ended with 1")
    assert {type(block.attention) for block in fast.blocks} == {Attention}
    assert not [path for path in fresh.rglob("*") if path.is_file()], "nothing is left behind"


def test_other_systems_do_without(fresh, monkeypatch, capsys):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert native.attend() is None and capsys.readouterr().err == ""


@compiled
def test_it_is_compiled_once_for_all_processes(fresh, monkeypatch):
    def elsewhere():
        code = "from dalle.native import attend; print(attend() is not None)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return done.stdout.strip(), done.stderr

    monkeypatch.setenv("CC", "")  # as if it were not set
    assert elsewhere() == ("True", "")
    (library,) = fresh.rglob("*.so")
    assert b"libgomp" not in library.read_bytes(), "it has no threads of its own"
    born = library.stat().st_ino
    assert elsewhere() == ("True", "") and library.stat().st_ino == born
    library.write_bytes(b"damaged")
    assert elsewhere() == ("True", "") and library.stat().st_ino != born
    assert list(fresh.rglob("*")) == [library.parent, library]


@compiled
@pytest.mark.parametrize("place", ["a file", "no permission"])
def test_a_cache_that_cannot_be_written(fresh, place, monkeypatch, capsys):
    if place == "a file":
        fresh.write_text("")
    else:
        monkeypatch.setattr(tempfile, "mkdtemp", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "Denied")))
    assert native.attend() is None
    assert len(capsys.readouterr().err.splitlines()) == 2


@compiled
def test_a_folder_of_where_one_happens_to_stand_is_no_cache(fresh, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert native.attend() is not None
    assert not Path("here").exists() and len(list(Path("home/.cache/trainable-dalle").iterdir())) == 1
