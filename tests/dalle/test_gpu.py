"""What is made for GPUs, as far as a CPU can tell: the same logits from still memory, and by blocks of keys. What only
a GPU can show is checked by tests/benchmarks/gpu.py."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dalle import gpu
from dalle.gpu import Replayed, Still, compiled, sparse, windows
from dalle.layout import KINDS, Layout
from dalle.model import DALLE, DALLEConfig
from dalle.packing import packed
from dalle.sampling import sample
from dalle.train import LitDALLE
from dvae.errors import UserError
from dvae.optim import Optimiser
from dvae.schedules import Schedule

T, GRID, V, K = 5, (6, 13), 20, 40
CELLS = GRID[0] * GRID[1]
NULL = torch.arange(V - T, V)[None]


def random_model(patterns=KINDS, depth=4) -> DALLE:
    torch.manual_seed(0)
    model = DALLE(DALLEConfig(V - T, T, K, GRID, depth=depth, width=32, heads=2, patterns=patterns))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.requires_grad_(False)


@pytest.fixture
def replays(monkeypatch):
    """In place of CUDA graphs: the same work on the same memory, done again; told how often it was captured."""
    calls = []

    def captured(work):
        calls.append(work)
        result = work().clone()
        return lambda: result.copy_(work()), result

    monkeypatch.setattr(gpu, "captured", captured)
    monkeypatch.setattr(gpu, "PIECE", 32)
    monkeypatch.setattr(gpu, "compiled", lambda blocks, trial: None)
    return calls


@pytest.mark.parametrize("patterns", [KINDS, ("full",) * 4])
def test_replayed_steps_are_the_models(patterns, replays):
    model = random_model(patterns)
    text, image = torch.randint(V, (3, T)), torch.randint(K, (3, *GRID))
    expected, tokens, fast = model(text, image).image, image.flatten(1), Replayed(model)
    cache = fast.prefill(text)
    cache.stored[..., cache.length :, :] = math.nan  # what was never written must not be read, or only as nothing
    for _ in range(2):  # the second picture replays the graphs of the first
        for cell in range(CELLS):
            logits = fast.step(tokens[:, cell - 1] if cell else None, cell, cache)
            torch.testing.assert_close(logits, expected[:, cell], atol=1e-4, rtol=0)
        cache.truncate(model.layout.image.start)
    assert len(replays) == math.ceil(model.layout.states / 32)


def test_replayed_pictures_are_the_models(replays):
    model, text = random_model(), torch.randint(V - T, (2, T))
    settings = dict(null_ids=NULL, guidance=1.5, batch=4, seeds=3)
    plain, fast = sample(model, text, 5, **settings), sample(Replayed(model), text, 5, **settings)
    assert torch.equal(plain.tokens, fast.tokens)
    torch.testing.assert_close(plain.logprobs, fast.logprobs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("patterns", [KINDS, ("full",) * 4])
def test_a_still_step_reads_no_number_from_the_device(patterns):
    """As a CUDA graph must not; the device "meta" has none that could be read."""
    model = random_model(patterns).to("meta")
    model._logits = lambda x, head: head(model.norm(x))  # "meta" has no autocast that could be switched off
    cache = model.prefill(torch.zeros(3, T, dtype=torch.int64, device="meta"))
    cell = torch.zeros(1, dtype=torch.int64, device="meta")
    logits = model.step(torch.zeros(3, dtype=torch.int64, device="meta"), cell, Still(cache, cell, end=32))
    assert logits.shape == (3, K)


def test_windows_are_those_of_the_layout():
    layout = Layout(T, GRID)
    for kind in ("row", "column", "conv"):
        states, known = windows(layout, kind, torch.device("cpu"))
        for cell in range(CELLS):
            read = torch.cat([torch.arange(T + 1), states[cell]])[known[cell]]
            assert torch.equal(read, layout.keys(T + 1 + cell, kind))


@pytest.mark.parametrize("image_first", [False, True])
@pytest.mark.parametrize("kind", ["row", "column", "conv"])
def test_sparse_attention_is_that_of_the_mask(kind, image_first):
    layout = Layout(T, GRID, image_first)
    q, k, v = torch.randn(3, 2, 2, layout.states, 16).unbind(0)
    expected = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=layout.mask(kind))
    torch.testing.assert_close(sparse(layout, kind, torch.device("cpu"))(q, k, v), expected, atol=1e-5, rtol=0)


def test_a_model_attends_sparsely_where_it_is_told_to():
    model = random_model()
    text, image = torch.randint(V, (2, T)), torch.randint(K, (2, *GRID))
    expected, called = model(text, image), []
    for kind in KINDS[1:]:
        attend = sparse(model.layout, kind, torch.device("cpu"))
        model.sparse[kind, False] = lambda q, k, v, kind=kind, attend=attend: called.append(kind) or attend(q, k, v)
    torch.testing.assert_close(model(text, image), expected, atol=1e-4, rtol=0)
    assert sorted(called) == sorted(KINDS[1:])


def test_what_does_not_compile_goes_on_as_it_was(monkeypatch, capsys):
    model = random_model()
    text, image = torch.randint(V, (2, T)), torch.randint(K, (2, *GRID))
    expected = model(text, image)

    def broken(self, **settings):
        self._compiled_call_impl = lambda *inputs: (_ for _ in ()).throw(RuntimeError("no compiler here\nmore"))

    monkeypatch.setattr(nn.Module, "compile", broken)
    compiled(model.blocks, lambda: model(text, image))
    assert all(torch.equal(*both) for both in zip(model(text, image), expected, strict=True))
    told = capsys.readouterr().err.strip().splitlines()
    assert told[0] == "warning: torch.compile failed, going on without it: no compiler here" and len(told) == 2


def test_narrow_weights_are_shared_with_the_compiled_copy(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    narrow = packed(random_model(), "bfloat16")
    copied = gpu.shared(narrow)
    assert copied.blocks[0].mlp.out.weight is narrow.blocks[0].mlp.out.weight
    assert copied.blocks[0] is not narrow.blocks[0]


def test_a_training_tries_what_it_compiles_and_that_leaves_no_trace(monkeypatch):
    sizes = {"vocab_text": V - T, "text_length": T, "vocab_image": K, "grid": GRID}
    module = LitDALLE(2, 32, 2, sizes, Optimiser(Schedule(1e-3)), patterns="paper", compile=True)
    plugin = SimpleNamespace(forward_context=nullcontext)
    module._trainer = SimpleNamespace(precision_plugin=plugin, datamodule=SimpleNamespace(batch_size=3))
    before, tried = {name: value.clone() for name, value in module.state_dict().items()}, []
    monkeypatch.setattr(gpu, "compiled", lambda blocks, trial: tried.append((blocks, trial())))
    module.on_fit_start()
    assert [blocks for blocks, _ in tried] == [module.model.blocks]
    assert all(parameter.grad is None for parameter in module.parameters())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    with pytest.raises(UserError, match="block_scaling"):
        LitDALLE(2, 32, 2, sizes, Optimiser(Schedule(1e-3)), compile=True, block_scaling=True)
