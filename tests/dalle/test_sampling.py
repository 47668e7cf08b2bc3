"""Sampling: the right distribution, the right randomness, and the same pictures in any company."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dalle import sampling
from dalle.model import DALLE, DALLEConfig, KVCache
from dalle.sampling import Blend, draw, filter_logits, fitting, sample, sample_pruned
from dvae.errors import EnvironmentProblem, NumericsError, UserError
from dvae.seeds import generator

BPE, T, K, GRID = 10, 4, 12, (3, 3)
N = math.prod(GRID)
NULL = torch.arange(BPE, BPE + T)[None]
A, B, C = (torch.tensor([ids]) for ids in ([1, 2, 3, 13], [4, 11, 12, 13], [9, 8, 7, 6]))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = DALLE(DALLEConfig(vocab_text=BPE, text_length=T, vocab_image=K, grid=GRID, depth=2, width=32, heads=2))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


class Known:
    """A model with known logits: they depend on the prompt's first id and on the token before."""

    def __init__(self, vocab=6, seed=0, dtype=torch.float64):
        random = torch.Generator().manual_seed(seed)
        self.config = SimpleNamespace(vocab_image=vocab, grid=(1, 3), depth=1, width=1)
        self.layout, self.start = SimpleNamespace(states=5), torch.zeros(1)
        self.table = 1.5 * torch.randn(4, vocab + 1, vocab, generator=random, dtype=dtype)  # prompt, before, token

    class Cache:
        def __init__(self, prompts):
            self.prompts = prompts

        def select(self, rows, into=None):
            return Known.Cache(self.prompts[rows])

    def prefill(self, text_ids):
        return Known.Cache(text_ids[:, 0])

    def step(self, tokens, cell, cache):
        before = torch.full_like(cache.prompts, self.config.vocab_image) if tokens is None else tokens
        return self.table[cache.prompts, before]


def kept_by_hand(logits, temperature, top_k, top_p):
    """Probabilities of one row, in plain Python."""
    weights = [math.exp(value / temperature) for value in logits]
    order = sorted(range(len(weights)), key=lambda i: -weights[i])[:top_k]
    total = sum(weights[i] for i in order)
    kept, mass = [], 0.0
    for i in order:
        kept.append(i)
        mass += weights[i] / total
        if top_p is not None and mass >= top_p:
            break
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(weights))]


SETTINGS = [
    dict(temperature=1.0, top_k=None, top_p=None),
    dict(temperature=0.6, top_k=None, top_p=None),
    dict(temperature=2.5, top_k=4, top_p=None),
    dict(temperature=1.0, top_k=None, top_p=0.7),
    dict(temperature=1.3, top_k=5, top_p=0.8),
    dict(temperature=0.5, top_k=1, top_p=0.01),
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_filters_by_hand(settings):
    logits = 3 * torch.randn(40, 9, dtype=torch.float64)
    found = filter_logits(logits, **settings).softmax(-1)
    expected = torch.tensor([kept_by_hand(row, **settings) for row in logits.tolist()], dtype=torch.float64)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_filters_at_their_edges():
    logits = torch.randn(5, 7)
    plain = logits.double().softmax(-1)
    for same in (dict(top_k=7), dict(top_p=1.0), dict(top_k=7, top_p=1.0)):
        torch.testing.assert_close(filter_logits(logits, **same).softmax(-1), plain)
    tied = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    assert (filter_logits(tied, top_k=2) > -math.inf).tolist() == [[True, True, True, True, False]]
    for temperature in (1e-300, 1e-30, 1e30):  # cold is greedy, hot is uniform, neither breaks
        p = filter_logits(logits, temperature).softmax(-1)
        assert torch.isfinite(p).all()
        expected = torch.full_like(p, 1 / 7) if temperature > 1 else torch.eye(7).double()[logits.argmax(-1)]
        torch.testing.assert_close(p, expected)


def test_draw_is_the_inverse_of_the_cumulated_distribution():
    random = np.random.default_rng(0)
    logits = torch.tensor(random.normal(size=(2000, 30)) * 3)
    uniforms = torch.tensor(random.random(2000))
    for row, u, token in zip(logits.softmax(-1).numpy(), uniforms.tolist(), draw(logits, uniforms), strict=True):
        assert token == np.searchsorted(np.cumsum(row), u * np.cumsum(row)[-1], side="right")


def test_draw_never_gives_a_code_of_probability_zero():
    last = np.nextafter(1.0, 0.0)
    for size in (1, 2, 3, 7, 1000, 8192):
        logits = torch.randn(4, size + 4, dtype=torch.float64)
        logits[:, :2] = logits[:, -2:] = -math.inf
        for u in (0.0, 5e-324, 0.5, last):
            tokens = draw(logits, torch.full((4,), u, dtype=torch.float64))
            assert ((tokens >= 2) & (tokens < size + 2)).all()
    one = torch.tensor([[-math.inf, 0.0, -math.inf]], dtype=torch.float64)
    assert draw(one, torch.tensor([last], dtype=torch.float64)).tolist() == [1]


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("settings", SETTINGS)
def test_frequencies_are_those_of_the_known_distribution(settings, guidance):
    """Chi-square over the two first tokens; the bound is passed by chance about once in a million times."""
    known, count = Known(), 6000
    sampled = sample(
        known, torch.tensor([[2]]), count, null_ids=torch.tensor([[3]]), guidance=guidance, batch=2500, **settings
    )

    def chances(before):
        logits = known.table[3, before] + guidance * (known.table[2, before] - known.table[3, before])
        return kept_by_hand(logits.tolist(), **settings)

    first = chances(6)
    pairs = np.array([[first[i] * p for p in chances(i)] for i in range(6)]).ravel()
    found = np.bincount((sampled.tokens[:, 0, 0] * 6 + sampled.tokens[:, 0, 1]).numpy(), minlength=36)
    assert found[pairs == 0].sum() == 0
    expected = count * pairs[pairs > 0]
    chi, degrees = ((found[pairs > 0] - expected) ** 2 / expected).sum(), len(expected) - 1
    assert chi <= degrees + 4.9 * math.sqrt(2 * degrees) + 16


def test_logprobs_are_the_plain_model_whatever_shaped_the_drawing():
    known = Known()
    sampled = sample(
        known, torch.tensor([[0], [1]]), 20, null_ids=torch.tensor([[3]]), temperature=0.5, top_k=3, guidance=3.0
    )
    for row, tokens in enumerate(sampled.tokens.flatten(1).tolist()):
        before = [6, *tokens[:-1]]
        for column, prompt in ((sampled.logprobs, row // 20), (sampled.null, 3)):
            expected = [known.table[prompt, b].log_softmax(-1)[t].item() for b, t in zip(before, tokens, strict=True)]
            assert column[row].tolist() == pytest.approx(expected, abs=1e-5)
    assert sampled.logprobs.dtype == sampled.null.dtype == torch.float32 and sampled.tokens.dtype == torch.int64
    assert sample(known, torch.tensor([[0]]), 2, null_ids=torch.tensor([[3]])).null is None


@pytest.mark.parametrize("guidance", [1.0, 0.0, 2.0])
def test_sampling_is_the_uncached_two_pass_definition(model, guidance):
    """Each token from whole forwards of the text and of the null prompt, nothing kept between cells."""
    model = model.double()
    settings = dict(temperature=0.9, top_k=8, top_p=0.95)
    sampled = sample(model, torch.cat([A, C]), 3, null_ids=NULL, guidance=guidance, seeds=[5, 6], **settings)
    for row in range(6):
        text, seed, k = (A, C)[row // 3], (5, 6)[row // 3], row % 3
        uniforms = torch.rand(N, dtype=torch.float64, generator=generator("sample", seed, k))
        tokens = torch.zeros(N, dtype=torch.int64)
        for cell in range(N):
            with torch.no_grad():
                cond, null = (model(ids, tokens.view(1, *GRID)).image[0, cell] for ids in (text, NULL))
            p = kept_by_hand((null + guidance * (cond - null)).tolist(), **settings)
            tokens[cell] = int(np.searchsorted(np.cumsum(p), uniforms[cell].item(), side="right"))
            for column, logits in ((sampled.logprobs, cond), (sampled.null, null)):
                if column is not None:
                    expected = logits.log_softmax(-1)[tokens[cell]].item()
                    assert column[row, cell].item() == pytest.approx(expected, abs=1e-5)
        assert (sampled.null is None) == (guidance == 1)
        assert torch.equal(sampled.tokens[row].flatten(), tokens)
    model.float()


@pytest.mark.parametrize("patterns", [("full",), ("row",), ("column",), ("conv",), "paper"])
def test_sampling_with_patterns_is_the_uncached_definition(patterns):
    """Cell by cell from the whole table of the forward pass; `exact` draws the same tokens, in any company."""
    torch.manual_seed(0)
    grid, depth = (3, 13), 3 if patterns == "paper" else 1
    config = DALLEConfig(BPE, T, K, grid, depth=depth, width=32, heads=2, patterns=patterns)
    model = DALLE(config).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    drawn = [
        sample(model, torch.cat([A, B]), 3, null_ids=NULL, seeds=[5, 6], exact=exact).tokens for exact in (False, True)
    ]
    assert torch.equal(*drawn)
    assert torch.equal(sample(model, B, 2, null_ids=NULL, seeds=6, exact=True).tokens, drawn[1][3:5])
    for row, tokens in enumerate(drawn[0].flatten(1)):
        uniforms = torch.rand(39, dtype=torch.float64, generator=generator("sample", (5, 6)[row // 3], row % 3))
        with torch.no_grad():
            table = model((A, B)[row // 3], tokens.view(1, *grid)).image[0]
        assert torch.equal(draw(table, uniforms), tokens)


class Recorded:
    """The model, and the logits that it gave, (groups, N, rows, K)."""

    def __init__(self, model):
        self.model, self.config, self.prefill, self.logits = model, model.config, model.prefill, []
        self.start, self.layout = model.start, model.layout

    def step(self, tokens, cell, cache):
        self.logits.append(self.model.step(tokens, cell, cache))
        return self.logits[-1]

    def of_pictures(self, prompts, count):  # (P * count, N, rows of one picture, K)
        groups = torch.stack(self.logits).unflatten(0, (-1, N))
        streams = groups.unflatten(2, (-1, 8)).permute(0, 3, 1, 2, 4)  # (groups, 8, N, 1 or 2, K)
        return streams.flatten(0, 1).unflatten(0, (prompts, -1))[:, :count].flatten(0, 1)


def exact(model, prompts, count, seeds, **settings):
    recorded = Recorded(model)
    sampled = sample(recorded, torch.cat(prompts), count, null_ids=NULL, seeds=seeds, exact=True, **settings)
    return [*sampled, recorded.of_pictures(len(prompts), count)]


@pytest.mark.parametrize("guidance", [1.0, 1.7])
def test_exact_is_bit_equal_for_any_batch_count_and_company(model, guidance):
    settings = dict(guidance=guidance, top_k=9)
    expected = exact(model, [A], 200, [7], **settings)
    assert len(expected[0].unique(dim=0)) > 100  # pictures that do differ

    def agrees(found, rows):
        for one, two in zip(expected, found, strict=True):
            assert (one is None and two is None) or torch.equal(one[: len(rows)], two[rows])

    for batch in (1, 2, 3, 5, 8, 16):
        agrees(exact(model, [A], 200, [7], batch=batch, **settings), range(200))
    for count in (1, 2, 7, 8, 9, 33):
        agrees(exact(model, [A], count, 7, **settings), range(count))
        agrees(exact(model, [B, C, A, B], count, [1, 2, 7, 3], **settings), range(2 * count, 3 * count))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    agrees(exact(model, [A, C], 40, [7, 7], **settings), range(40))
    assert torch.get_num_threads() == 2  # given back
    torch.set_num_threads(threads)


@pytest.mark.parametrize("guidance", [1.0, 1.7])
def test_default_tokens_are_equal_for_any_batch_count_and_company(model, guidance):
    def tokens(prompts, count, seeds, batch, **more):
        settings = dict(guidance=guidance, top_p=0.97, seeds=seeds, batch=batch, **more)
        return sample(model, torch.cat(prompts), count, null_ids=NULL, **settings).tokens

    expected = tokens([A], 200, [7], 256)
    assert torch.equal(tokens([A], 200, [7], 256, exact=True), expected)
    for batch in (1, 2, 3, 5, 8, 16):
        assert torch.equal(tokens([A], 200, [7], batch), expected)
        for count in (1, 7, 20):
            rows = slice(2 * count, 3 * count)
            assert torch.equal(tokens([B, C, A, B], count, [1, 2, 7, 3], batch)[rows], expected[:count])


def test_pictures_and_seeds_draw_apart(model):
    def pictures(**settings):
        return sample(model, torch.cat([A, A]), 20, null_ids=NULL, **settings).tokens

    one, other = pictures(seeds=1), pictures(seeds=[1, 2])
    assert torch.equal(one[:20], one[20:]) and torch.equal(one[:20], other[:20])  # the seed decides, not the place
    assert (one[20:] != other[20:]).float().mean() > 0.5
    assert len(one[:20].unique(dim=0)) == 20


def test_known_cells_are_kept_and_judged_and_the_others_are_drawn_after_them(model):
    """By the uncached definition: a given token takes the place of the drawn one, and nothing else changes."""
    model = model.double()
    known = torch.full((2, *GRID), -1)
    known[0, 0, 1], known[0, 2, :], known[1, 1, 1] = 5, torch.tensor([1, 2, 3]), 11
    sampled = sample(model, torch.cat([A, B]), 3, null_ids=NULL, guidance=1.5, known=known, seeds=[5, 6])
    free = sample(model, torch.cat([A, B]), 3, null_ids=NULL, guidance=1.5, seeds=[5, 6])
    for row in range(6):
        text, seed, k, given = (A, B)[row // 3], (5, 6)[row // 3], row % 3, known[row // 3].flatten().tolist()
        uniforms = torch.rand(N, dtype=torch.float64, generator=generator("sample", seed, k))
        tokens = torch.zeros(N, dtype=torch.int64)
        for cell in range(N):
            with torch.no_grad():
                cond, null = (model(ids, tokens.view(1, *GRID)).image[0, cell] for ids in (text, NULL))
            drawn = int(draw((null + 1.5 * (cond - null))[None], uniforms[cell][None]))
            tokens[cell] = drawn if given[cell] < 0 else given[cell]
            expected = cond.log_softmax(-1)[tokens[cell]].item()
            assert sampled.logprobs[row, cell].item() == pytest.approx(expected, abs=1e-5)
        assert torch.equal(sampled.tokens[row].flatten(), tokens)
    assert torch.equal(free.tokens[:3, 0, 0], sampled.tokens[:3, 0, 0]) and not torch.equal(free.tokens, sampled.tokens)
    everything = sample(model, A, 2, null_ids=NULL, known=free.tokens[:1]).tokens
    assert torch.equal(everything, free.tokens[:1].repeat(2, 1, 1))
    model.float()


@pytest.mark.parametrize("known", [torch.zeros(1, 2, 3), torch.full((1, *GRID), K), torch.full((1, *GRID), -2)])
def test_known_cells_that_cannot_be_are_refused(model, known):
    with pytest.raises(UserError, match="known token"):
        sample(model, A, 1, null_ids=NULL, known=known.long())


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_blended_prompts_are_the_mixture_of_logits(guidance, share):
    """The mixture is a model of its own, whose frequencies are known; the logprobs stay those of the first prompt."""
    known = Known()
    blend = Blend(torch.tensor([[1]]), share)
    given = dict(null_ids=torch.tensor([[3]]), guidance=guidance, seeds=4)
    sampled = sample(known, torch.tensor([[0]]), 500, blend=blend, **given)
    mixed = Known()
    mixed.table[0] = (1 - share) * known.table[0] + share * known.table[1]
    expected = sample(mixed, torch.tensor([[0]]), 500, **given)
    assert torch.equal(sampled.tokens, expected.tokens)
    plain = [known.table[0, b].log_softmax(-1)[t] for t, b in ((row[0], 6) for row in sampled.tokens[:, 0].tolist())]
    torch.testing.assert_close(sampled.logprobs[:, 0], torch.stack(plain).float())
    assert (sampled.null is None) == (guidance == 1)
    if guidance != 1:
        torch.testing.assert_close(sampled.null, expected.null)
    with pytest.raises(UserError, match="share of the second prompt"):
        sample(known, torch.tensor([[0]]), 1, null_ids=torch.tensor([[3]]), blend=Blend(blend.text_ids, 1.5))


def by_likelihood(model, text_ids, sampled):
    return sampled.logprobs.sum(1)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_pruning_draws_the_survivors_as_if_nothing_had_been_pruned(model, guidance):
    """Successive halving by hand on what is drawn without it."""
    model = model.double()
    given = dict(null_ids=NULL, guidance=guidance, top_p=0.97)
    everything = sample(model, A, 16, seeds=7, **given)
    left, told = list(range(16)), []
    for cells, keep in ((2, 9), (5, 4)):
        partial = everything.logprobs[:, :cells].sum(1)
        left = sorted(sorted(left, key=lambda k: -partial[k].item())[:keep])
    given |= dict(seed=7)
    stages = ((2, 9), (5, 4))
    sampled, numbers = sample_pruned(model, A, 16, stages, by_likelihood, progress=told.append, **given)
    assert numbers.tolist() == left and len(left) == 4
    assert torch.equal(sampled.tokens, everything.tokens[left])
    torch.testing.assert_close(sampled.logprobs, everything.logprobs[left])
    assert (sampled.null is None) == (guidance == 1)
    if guidance != 1:
        torch.testing.assert_close(sampled.null, everything.null[left])
    assert told == [16] * 2 + [9] * 3 + [4] * 4
    whole, numbers = sample_pruned(model, A, 16, (), by_likelihood, **given)
    assert torch.equal(whole.tokens, everything.tokens) and numbers.tolist() == list(range(16))
    model.float()


def test_pruning_scores_unfinished_pictures(model):
    """Every scorer that reads tokens can be asked about the first cells; what it is given are (R, cells) tokens."""
    seen = []

    def score(model, text_ids, sampled):
        seen.append(tuple(sampled.tokens.shape))
        logits = model.score(sampled.tokens, model.prefill(text_ids).expand(len(sampled.tokens)))
        found = logits.log_softmax(-1).gather(2, sampled.tokens[..., None])[..., 0]
        torch.testing.assert_close(found, sampled.logprobs, atol=1e-4, rtol=0)
        return found.sum(1)

    sample_pruned(model, A, 8, ((1, 6), (4, 2)), score, null_ids=NULL)
    assert seen == [(8, 1), (6, 4)]


@pytest.mark.parametrize("stages", [((0, 2),), ((9, 2),), ((3, 0),), ((3, 9),), ((4, 4), (3, 2)), ((3, 2), (5, 3))])
def test_stages_that_cannot_be_are_refused(model, stages):
    with pytest.raises(UserError, match="the stage"):
        sample_pruned(model, A, 8, stages, by_likelihood, null_ids=NULL)


def test_greedy_is_the_argmax(model):
    sampled = sample(model, A, 2, null_ids=NULL, top_k=1)
    logits = model(A, sampled.tokens[:1]).image
    assert torch.equal(logits.argmax(-1)[0], sampled.tokens[0].flatten())
    assert torch.equal(sampled.tokens[0], sampled.tokens[1])


def test_a_prompt_is_read_once(model, monkeypatch):
    read, prefill = [], model.prefill
    monkeypatch.setattr(model, "prefill", lambda ids: read.append(len(ids)) or prefill(ids))
    sample(model, torch.cat([A, B, C]), 7, null_ids=NULL, guidance=2.0, batch=5)
    assert read == [4]  # three prompts and the null prompt, in one pass
    read.clear()
    sample(model, torch.cat([A, B, C]), 7, null_ids=NULL, batch=2)
    assert read == [2, 1]


def test_batches_after_the_first_take_its_memory(model, monkeypatch):
    at, select = [], KVCache.select
    expected = sample(model, torch.cat([A, B]), 7, null_ids=NULL, guidance=2.0)

    def spy(self, rows, into=None):
        chosen = select(self, rows, into)
        at.append((chosen.stored.data_ptr(), len(rows)))
        return chosen

    monkeypatch.setattr(KVCache, "select", spy)
    sampled = sample(model, torch.cat([A, B]), 7, null_ids=NULL, guidance=2.0, batch=4)
    assert [rows for _, rows in at] == [8, 8, 8, 4] and len({memory for memory, _ in at}) == 1
    assert torch.equal(sampled.tokens, expected.tokens)


@pytest.mark.parametrize("settings", [dict(batch=4), dict(batch=100), dict(exact=True)])
def test_progress_counts_the_tokens_asked_for(model, settings):
    told = []
    sample(model, torch.cat([A, B]), 11, null_ids=NULL, progress=told.append, **settings)
    assert sum(told) == 2 * 11 * N and len(told) % N == 0


def test_batches_are_as_large_as_half_of_the_memory(model, monkeypatch):
    memory = {}
    monkeypatch.setattr(sampling, "available", lambda device: memory["free"])
    one = 2 * 2 * 2 * 32 * model.layout.states * 4 + 2 * 64 * K  # its keys and values, twice, and its logits
    assert model.prefill(A).stored.nbytes == 2 * 2 * 32 * model.layout.states * 4
    for free, expected in {2 * one: 1, 21 * one: 10, 10**12: 256, None: 256}.items():
        memory["free"] = free
        assert fitting(model, 1) == expected
    memory["free"] = 12 * one
    plain, rows = sample(model, A, 13, null_ids=NULL, batch=100), []
    step = model.step
    monkeypatch.setattr(model, "step", lambda held, cell, cache: rows.append(cache.rows) or step(held, cell, cache))
    assert torch.equal(sample(model, A, 13, null_ids=NULL).tokens, plain.tokens)
    assert rows == [6] * N + [6] * N + [1] * N
    with pytest.raises(EnvironmentProblem, match="7 pictures at a time"):
        sample_pruned(model, A, 7, [(3, 2)], lambda *_: torch.zeros(7), null_ids=NULL)
    memory["free"] = one - 1
    with pytest.raises(EnvironmentProblem, match="drawing one picture takes"):
        sample(model, A, 1, null_ids=NULL)


def test_sampling_under_bfloat16_autocast(model):
    with torch.autocast("cpu", torch.bfloat16):
        sampled = sample(model, A, 4, null_ids=NULL, guidance=2.0)
    assert torch.isfinite(sampled.logprobs).all() and sampled.logprobs.dtype == torch.float32


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_name_the_picture(value):
    known = Known()
    known.table[1, 6, 2] = value
    with pytest.raises(NumericsError, match="cell 0 of picture 0 of prompt 1"):
        sample(known, torch.tensor([[0], [1]]), 3, null_ids=torch.tensor([[3]]), batch=4)
    known = Known()
    tokens = sample(known, torch.tensor([[0]]), 50, null_ids=torch.tensor([[3]])).tokens.flatten(1)
    known.table[0, 4] = value
    expected = int((tokens[:, 0] == 4).nonzero()[0])
    assert expected > 0
    with pytest.raises(NumericsError, match=f"cell 1 of picture {expected} of prompt 0"):
        sample(known, torch.tensor([[0]]), 50, null_ids=torch.tensor([[3]]))


@pytest.mark.parametrize(
    "name, values",
    {
        "count": [0, -1, 1.5, True],
        "batch": [0, 2.5],
        "temperature": [0, -1.0, math.nan, math.inf, "1", 1e9],
        "top_k": [0, K + 1, 2.0, -1],
        "top_p": [0, -0.1, 1.1, math.nan],
        "guidance": [-0.5, math.nan, math.inf, 1e9],
        "seed": [-1, 2**63, 0.5, [1, 2], [], [None]],
    }.items(),
)
def test_settings_out_of_range_are_named(model, name, values):
    for value in values:
        settings = {"count": 1, "seeds" if name == "seed" else name: value}
        with pytest.raises(UserError, match=name):
            sample(model, A, null_ids=NULL, **settings)
    sample(model, A, 1, null_ids=NULL, seeds=2**63 - 1, top_k=K, top_p=1, temperature=1, guidance=1)
