"""Four bottlenecks against their definitions, and the loss of stage 1 against sums written out."""

import math

import pytest
import torch
from torch.nn import functional as F

from dvae import seeds
from dvae.model import DVAEConfig
from dvae.quantize import (
    Gaussian,
    GumbelSoftmax,
    Identity,
    VectorQuantizer,
    kl_to_normal,
    kl_to_uniform,
    kmeans,
    nearest,
    over_codes,
    pool,
    usage_gap,
)

SHAPES = [
    (Identity(), (2, 6, 3, 5), (2, 6, 3, 5), None),
    (Gaussian(), (2, 12, 3, 5), (2, 6, 3, 5), None),
    (VectorQuantizer(7, 6), (2, 6, 3, 5), (2, 6, 3, 5), 7),
    (GumbelSoftmax(), (2, 7, 3, 5), (2, 7, 3, 5), 7),
    (GumbelSoftmax(straight_through=True), (2, 7, 3, 5), (2, 7, 3, 5), 7),
    (VectorQuantizer(1, 6), (2, 6, 3, 5), (2, 6, 3, 5), 1),
    (GumbelSoftmax(), (2, 1, 3, 5), (2, 1, 3, 5), 1),
]


@pytest.mark.parametrize("bottleneck, features, z, codes", SHAPES)
def test_the_signature_is_one(bottleneck, features, z, codes):
    given = torch.randn(features, requires_grad=True)
    found = bottleneck(given, 0.7, seeds.generator(0))
    assert found.z.shape == z and found.penalty.shape == (2,) and (found.penalty >= 0).all()
    if codes is None:
        assert found.tokens is None
    else:
        assert found.tokens.shape == (2, 3, 5) and found.tokens.dtype == torch.int64
        assert 0 <= found.tokens.min() and found.tokens.max() < codes
    (found.z.sum() + found.penalty.sum()).backward()
    assert torch.isfinite(given.grad).all()


@pytest.mark.parametrize("make", [Gaussian, lambda: VectorQuantizer(5, 6), GumbelSoftmax])
def test_the_generator_alone_decides(make):
    features = torch.randn(2, 6, 3, 5)
    first = make()(features, 1.0, seeds.generator(3)).z
    torch.rand(100)
    assert torch.equal(first, make()(features, 1.0, seeds.generator(3)).z)
    assert not torch.equal(first, make()(features, 1.0, seeds.generator(4)).z)


# ------------------------------------------------------------------------------------------- autoencoder and VAE


def test_an_autoencoder_passes_what_it_reads():
    features = torch.randn(2, 6, 3, 5)
    z, tokens, penalty = Identity()(features, 1.0, seeds.generator(0))
    assert torch.equal(z, features) and tokens is None and torch.equal(penalty, torch.zeros(2))


def test_kl_to_normal_is_zero_only_there_and_known_elsewhere():
    zero = torch.zeros(1, 1, 1, 1)
    for mean, variance, expected in ((0, 1, 0), (2, 1, 2), (0, 4, 1.5 - math.log(2)), (1, 0.25, 0.125 + math.log(2))):
        assert kl_to_normal(zero + mean, zero + math.log(variance)).item() == pytest.approx(expected, abs=1e-6)


def test_kl_to_normal_is_what_draws_say():
    """E_q[ln q - ln p] over 200,000 draws of each of 12 numbers, with torch's own densities; 5 standard errors."""
    mean, log_variance = torch.randn(2, 3, 2, 1), torch.randn(2, 3, 2, 1)
    q, p = torch.distributions.Normal(mean, (log_variance / 2).exp()), torch.distributions.Normal(0.0, 1.0)
    draws = q.sample((200_000,))
    each = (q.log_prob(draws) - p.log_prob(draws)).double().sum((2, 3, 4))
    error = each.std(0) / 200_000**0.5
    assert ((kl_to_normal(mean, log_variance) - each.mean(0)).abs() < 5 * error).all() and error.max() < 0.02


def test_a_gaussian_draws_around_its_means():
    """Mean and variance of 20,000 cells, within 5 standard errors; the temperature scales the deviation."""
    mean, log_variance = torch.tensor([0.5, -2.0]), torch.tensor([0.0, 1.5])
    features = torch.cat([mean, log_variance]).view(1, 4, 1, 1).expand(1, 4, 1, 20_000)
    for temperature in (1.0, 0.5):
        z, _, penalty = Gaussian()(features, temperature, seeds.generator(6))
        deviation = temperature * (log_variance / 2).exp()
        assert ((z.mean((0, 2, 3)) - mean).abs() < 5 * deviation / 20_000**0.5).all()
        assert torch.allclose(z.std((0, 2, 3)), deviation, rtol=5 / 40_000**0.5)
        assert torch.equal(penalty, kl_to_normal(features[:, :2], features[:, 2:]))
    assert torch.equal(Gaussian()(features, 0.0, seeds.generator(6)).z, features[:, :2])


def test_the_gradient_reaches_means_and_deviations():
    features, target = torch.randn(1, 4, 2, 2, requires_grad=True), torch.randn(1, 2, 2, 2)
    z = Gaussian()(features, 1.0, seeds.generator(2)).z
    (gradient,) = torch.autograd.grad((z * target).sum(), features)
    assert torch.allclose(gradient[:, :2], target)
    assert torch.allclose(gradient[:, 2:], target * (z - features[:, :2]) / 2, atol=1e-6)


# -------------------------------------------------------------------------------------------------------- VQ-VAE


def quantizer(codes=5, width=3, **options) -> VectorQuantizer:
    """With codes of its own, chosen unequally often so far; all of them alive."""
    vq = VectorQuantizer(codes, width, **options)
    vq.codes.copy_(torch.randn(codes, width))
    vq.counts.copy_(torch.rand(codes) + 4)
    return vq


def test_each_cell_becomes_its_nearest_code():
    vq, features = quantizer().eval(), torch.randn(2, 3, 4, 6)
    z, tokens, _ = vq(features, 1.0, seeds.generator(0))
    assert len(tokens.unique()) > 2
    for b in range(2):
        for y in range(4):
            for x in range(6):
                distances = [sum((f - c) ** 2 for f, c in zip(features[b, :, y, x].tolist(), code, strict=True))
                             for code in vq.codes.tolist()]  # fmt: skip
                assert tokens[b, y, x] == distances.index(min(distances))
                assert torch.equal(z[b, :, y, x], vq.codes[tokens[b, y, x]])
    assert torch.equal(z, vq.look_up(tokens))


def test_the_gradient_passes_straight_through_and_the_penalty_pulls_to_the_code():
    vq = quantizer(commitment=0.4)
    features, target = torch.randn(2, 3, 4, 6, requires_grad=True), torch.randn(2, 3, 4, 6)
    codes = vq.look_up(nearest(features.detach().movedim(1, -1).flatten(0, 2), vq.codes).view(2, 4, 6))
    z, _, penalty = vq(features, 1.0, seeds.generator(0))
    assert torch.equal(z, codes)
    (through,) = torch.autograd.grad((z * target).sum(), features, retain_graph=True)
    assert torch.equal(through, target)
    assert torch.allclose(penalty, 0.4 * (features - codes).square().flatten(1).sum(1))
    (pull,) = torch.autograd.grad(penalty.sum(), features)
    assert torch.allclose(pull, 0.8 * (features.detach() - codes), atol=1e-6)


def test_the_codes_follow_the_written_recurrence():
    """Razavi et al. 2019: N <- g N + (1 - g) n, m <- g m + (1 - g) sum of the cells, code = m / N."""
    vq = quantizer(decay=0.9)
    codes, counts = vq.codes.tolist(), vq.counts.tolist()
    totals = [[n * c for c in code] for n, code in zip(counts, codes, strict=True)]
    for update in range(4):
        features = torch.randn(2, 3, 4, 2)
        tokens = vq(features, 1.0, seeds.generator(update)).tokens
        for k in range(5):
            cells = features.movedim(1, -1)[tokens == k].tolist()
            counts[k] = 0.9 * counts[k] + 0.1 * len(cells)
            for d in range(3):
                totals[k][d] = 0.9 * totals[k][d] + 0.1 * sum(cell[d] for cell in cells)
        assert torch.allclose(vq.counts, torch.tensor(counts), atol=1e-5)
        expected = torch.tensor([[m / n for m in total] for total, n in zip(totals, counts, strict=True)])
        assert torch.allclose(vq.codes, expected, atol=1e-5)
    assert not any(p.requires_grad for p in vq.parameters())


@pytest.mark.parametrize("make", [quantizer, lambda: VectorQuantizer(5, 3)])
def test_evaluation_moves_no_code(make):
    vq = make().eval()
    before = vq.codes.clone(), vq.counts.clone()
    vq(torch.randn(2, 3, 4, 6), 1.0, seeds.generator(0))
    assert torch.equal(vq.codes, before[0]) and torch.equal(vq.counts, before[1])


def test_the_first_batch_puts_the_codes_on_the_data():
    """Four far clusters, four codes: each becomes the mean of one. A loaded quantizer does not start again."""
    middles = 50 * torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    which = torch.arange(4).repeat(30).view(2, 6, 10)
    features = (middles[which] + torch.randn(2, 6, 10, 2)).movedim(-1, 1)
    vq = VectorQuantizer(4, 2)
    tokens = vq(features, 1.0, seeds.generator(1)).tokens
    means = torch.stack([features.movedim(1, -1)[which == k].mean(0) for k in range(4)])
    assert torch.cdist(means, vq.codes).amin(1).max() < 1e-3 and len(tokens.unique()) == 4
    assert vq.counts.tolist() == pytest.approx([30] * 4)
    again = VectorQuantizer(4, 2)
    again.load_state_dict(vq.state_dict())
    again(features, 1.0, seeds.generator(2))
    assert torch.allclose(again.codes, vq.codes, atol=1e-3)


def test_a_dead_code_is_put_on_a_cell_and_the_others_stay_where_they_are():
    vq, undisturbed = VectorQuantizer(4, 2, decay=0.5), VectorQuantizer(4, 2, decay=0.5)
    for each in (vq, undisturbed):
        each.codes.copy_(torch.tensor([[0.0, 0], [1, 1], [90, 90], [-90, -90]]))
        each.counts.copy_(torch.tensor([10.0, 10, 1, 10]))
    undisturbed.dead = 0.0
    features = torch.rand(1, 2, 4, 5)  # 20 cells, all of them near the first two codes
    for update in range(2):
        assert vq.codes[2].tolist() == [90, 90]  # its averages: 1, then 0.5 of 25.5 in all
        for each in (vq, undisturbed):
            each(features, 1.0, seeds.generator(update))
    assert undisturbed.counts[2] == 0.25 and undisturbed.counts.mean() == 22.75 / 4  # 4.4 % of the even share
    assert vq.codes[2].tolist() in features.movedim(1, -1).flatten(0, 2).tolist() and vq.counts[2] == 22.75 / 4
    others = [0, 1, 3]
    assert torch.equal(vq.codes[others], undisturbed.codes[others])
    assert torch.equal(vq.counts[others], undisturbed.counts[others])


@pytest.mark.parametrize("cells", [1, 3])
def test_more_codes_than_cells_is_no_harm(cells):
    vq, features = VectorQuantizer(8, 2), torch.randn(1, 2, 1, cells)
    for update in range(400):
        found = vq(features, 1.0, seeds.generator(update))
    assert torch.allclose(found.z, features, atol=1e-5) and torch.isfinite(vq.codes).all()


def test_pool_adds_up_what_chose_the_same():
    sums, sizes = pool(torch.tensor([[1.0, 2], [3, 4], [5, 6]]), torch.tensor([2, 0, 2]), 4)
    assert sums.tolist() == [[3, 4], [0, 0], [6, 8], [0, 0]] and sizes.tolist() == [1, 0, 2, 0]


def test_kmeans_ends_where_each_centre_is_the_mean_of_its_points():
    points = torch.cat([torch.randn(40, 2) + middle for middle in (0, 8, 20, 40, 41)])
    centres = kmeans(points, 5, seeds.generator(0), rounds=50)
    chosen = nearest(points, centres)
    assert len(chosen.unique()) == 5
    for k in range(5):
        assert torch.allclose(points[chosen == k].mean(0), centres[k], atol=1e-4)


def test_centres_that_no_point_chooses_stay_on_a_point():
    points = torch.tensor([[1.0, 2], [3, 4], [-5, 6]])
    centres = kmeans(points, 8, seeds.generator(0))
    assert {tuple(centre) for centre in centres.tolist()} == {tuple(point) for point in points.tolist()}


@pytest.mark.parametrize("seed", range(5))
def test_kmeans_starts_far_apart(seed):
    """Two points among two thousand equal ones would hardly be found by chance."""
    points = torch.zeros(2000, 3)
    points[5], points[900] = 1.0, -1.0
    centres = kmeans(points, 3, seeds.generator(seed), rounds=0)
    assert sorted(centres[:, 0].tolist()) == [-1, 0, 1]


# ---------------------------------------------------------------------------------------------------------- dVAE


def test_kl_is_the_sum_over_cells_and_codes():
    logits = 2 * torch.randn(3, 5, 2, 4)
    kl = kl_to_uniform(logits)
    assert kl.shape == (3,)
    for b in range(3):
        total = 0.0
        for y in range(2):
            for x in range(4):
                weights = [math.exp(v) for v in logits[b, :, y, x].tolist()]
                for w in weights:
                    q = w / sum(weights)
                    total += q * math.log(q / (1 / 5))
        assert kl[b].item() == pytest.approx(total, rel=1e-5)


def test_kl_is_zero_when_uniform_and_ln_k_per_cell_when_certain():
    assert kl_to_uniform(torch.full((1, 7, 3, 3), 4.2)).item() == pytest.approx(0, abs=1e-5)
    certain = torch.zeros(1, 7, 3, 3)
    certain[:, 2] = 200
    assert kl_to_uniform(certain).item() == pytest.approx(9 * math.log(7), rel=1e-6)


def test_weights_sum_to_one_and_tokens_know_no_noise():
    logits = torch.randn(2, 6, 3, 5)
    z, tokens, kl = GumbelSoftmax()(logits, 0.7, seeds.generator(0))
    assert z.shape == logits.shape and (z > 0).all()
    assert torch.allclose(z.sum(1), torch.ones(2, 3, 5), atol=1e-6)
    assert tokens.dtype == torch.int64 and torch.equal(tokens, logits.argmax(1))
    assert torch.equal(kl, kl_to_uniform(logits))


def test_the_noise_is_minus_ln_of_minus_ln_of_uniform_numbers():
    logits = torch.randn(2, 6, 3, 5)
    uniform = torch.rand(2, 6, 3, 5, generator=seeds.generator(7)).double()
    expected = ((logits.double() - (-uniform.log()).log()) / 0.7).softmax(1)
    assert torch.allclose(GumbelSoftmax()(logits, 0.7, seeds.generator(7)).z.double(), expected, atol=1e-5)


def test_a_uniform_number_of_zero_only_means_that_the_code_is_not_drawn(monkeypatch):
    uniform = torch.tensor([0.0, 0.5, 0.9]).view(1, 3, 1, 1)
    monkeypatch.setattr(torch, "rand", lambda *shape, generator, device: uniform.clone())
    logits = torch.zeros(1, 3, 1, 1, requires_grad=True)
    z = GumbelSoftmax()(logits, 1.0, seeds.generator(0)).z
    z[0, 2].backward()
    assert z[0, 0] == 0 and z.sum().item() == pytest.approx(1) and torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("temperature", [0.1, 1.0, 4.0])
def test_the_largest_weight_is_a_draw_from_softmax(temperature):
    """Chi-square, 4 degrees of freedom, 40,000 cells: 23.5 is passed once in 10,000 tries; the seed is fixed."""
    logits = torch.tensor([1.0, 0.0, -1.0, 0.5, -2.0])
    cells = 40_000
    z = GumbelSoftmax()(logits.view(1, 5, 1, 1).expand(1, 5, 1, cells), temperature, seeds.generator("chi")).z
    seen = torch.bincount(z.argmax(1).flatten(), minlength=5).double()
    expected = cells * logits.double().softmax(0)
    assert ((seen - expected).square() / expected).sum() < 23.5


def test_noise_is_gumbel_and_is_divided_by_the_temperature_with_the_logits():
    logits = torch.randn(1, 4, 1, 2000)
    one, half = (GumbelSoftmax()(logits, t, seeds.generator(9)).z for t in (1.0, 0.5))
    assert torch.allclose(half, (2 * one.log()).softmax(1), atol=1e-4)


def test_a_low_temperature_approaches_one_hot_and_a_high_one_uniform():
    logits = torch.randn(1, 6, 20, 20)
    tops = [GumbelSoftmax()(logits, t, seeds.generator(1)).z.amax(1).mean().item() for t in (100, 3, 1, 0.3, 1e-3)]
    assert tops == sorted(tops)
    assert tops[0] == pytest.approx(1 / 6, abs=0.02) and tops[-1] == pytest.approx(1, abs=1e-2)


def test_straight_through_is_one_hot_ahead_and_soft_behind():
    logits = torch.randn(2, 6, 3, 3, requires_grad=True)
    target = torch.randn(2, 6, 3, 3)
    soft = GumbelSoftmax()(logits, 0.8, seeds.generator(5)).z
    hard = GumbelSoftmax(straight_through=True)(logits, 0.8, seeds.generator(5)).z
    one_hot = torch.nn.functional.one_hot(soft.argmax(1), 6).movedim(-1, 1).float()
    assert torch.equal(hard, one_hot)
    by_soft, by_hard = (torch.autograd.grad((z * target).sum(), logits)[0] for z in (soft, hard))
    assert by_soft.abs().max() > 1e-3 and torch.allclose(by_soft, by_hard, atol=1e-6)


def test_straight_through_is_for_training_and_reaches_the_model():
    from dvae.lit import Optimiser
    from dvae.schedules import Schedule
    from dvae.train import LitDVAE

    config = DVAEConfig(
        image_size=8, vocab_size=6, hidden=4, groups=1, blocks=1, bottleneck=2, code_width=4, kernel=6, patch=4
    )
    for straight_through in (True, False):
        lit = LitDVAE(
            config, Optimiser(Schedule(1e-3)), temperature=Schedule(1.0), kl_weight=Schedule(0.0),
            straight_through=straight_through,
        )  # fmt: skip
        for training in (True, False):
            z = lit.model.train(training)(torch.rand(2, 3, 8, 8), 1.0, seeds.generator(0))[2].z
            assert (z.amax(1) == 1).all() == (straight_through and training)


def test_usage_gap_is_ln_k_minus_the_entropy_of_the_mean():
    logits = torch.randn(3, 5, 2, 2)
    mean = [0.0] * 5
    for b in range(3):
        for y in range(2):
            for x in range(2):
                for k, p in enumerate(logits[b, :, y, x].softmax(0).tolist()):
                    mean[k] += p / 12
    expected = math.log(5) + sum(p * math.log(p) for p in mean)
    assert usage_gap(logits).item() == pytest.approx(expected, abs=1e-6)


def test_usage_gap_is_zero_when_codes_share_the_work_and_ln_k_when_one_does_it_all():
    shared = 200 * torch.eye(4).view(4, 4, 1, 1)  # each picture certain of another code
    assert usage_gap(shared).item() == pytest.approx(0, abs=1e-5)
    alone = torch.zeros(2, 4, 3, 3, requires_grad=True)
    lonely = alone + torch.tensor([200.0, 0, 0, 0]).view(1, 4, 1, 1)
    assert usage_gap(lonely).item() == pytest.approx(math.log(4), abs=1e-5)
    usage_gap(lonely).backward()
    assert torch.isfinite(alone.grad).all()


@pytest.mark.parametrize("groups, patch", [(3, 1), (2, 2), (4, 1), (2, 4), (3, 4)])
@pytest.mark.parametrize("name", ["logit-laplace", "l2"])
def test_the_loss_counts_nats_per_value_at_every_downsampling_factor(groups, patch, name):
    """(sum of nll + beta * sum of KL) / (H * W * 3), by one loop over the values and one over the cells."""
    from dvae.lit import Optimiser
    from dvae.schedules import Schedule
    from dvae.train import LitDVAE

    kernel = patch + 2
    config = DVAEConfig(
        image_size=32, vocab_size=6, hidden=4, groups=groups, blocks=1, bottleneck=2, code_width=4,
        kernel=kernel, patch=patch, likelihood=name,
    )  # fmt: skip
    assert config.factor in (4, 8, 16)
    lit = LitDVAE(config, Optimiser(Schedule(1e-3)), temperature=Schedule(0.9), kl_weight=Schedule(6.6), seed=5)
    with torch.no_grad():  # an untrained encoder is nearly uniform: no KL to speak of
        lit.model.encoder.output.weight.mul_(5)
    lit.log = lambda *args, **kwargs: None
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    loss, logged = lit.step({"images": images}, update=0, batch_index=3)

    noise = seeds.generator(5, "gumbel", 3, 0)
    raw, logits, _ = lit.model(images.float() / 255, 0.9, noise)
    nll = lit.model.likelihood.nll(raw, images.float() / 255)
    log_q = logits.log_softmax(1).double()
    total = 0.0
    for b in range(2):
        reconstruction = sum(nll[b].flatten().tolist())
        kl = 0.0
        for y in range(config.grid[0]):
            for x in range(config.grid[1]):
                kl += sum(math.exp(v) * (v + math.log(6)) for v in log_q[b, :, y, x].tolist())
        assert kl > 0.01
        total += (reconstruction + 6.6 * kl) / (32 * 32 * 3) / 2
    assert loss.item() == pytest.approx(total, rel=1e-5)
    assert logged["train/kl"].item() <= math.log(6)


@pytest.mark.parametrize(
    "groups, patch, side, values",
    [(3, 1, 32, 48), (1, 4, 16, 48), (4, 1, 32, 192), (4, 1, 64, 192), (2, 4, 32, 192), (4, 2, 32, 768)],
)
def test_beta_weighs_the_kl_of_a_token_against_the_values_that_it_stands_for(groups, patch, side, values):
    """What beta adds to the loss is beta / 48 of the mean KL of a token at f4, beta / 192 at f8, beta / 768 at f16, at
    any size of picture; the KL by a loop over cells and codes. So the paper's 6.6 is 0.034375 at f8."""
    from dvae.lit import Optimiser
    from dvae.schedules import Schedule
    from dvae.train import LitDVAE

    config = DVAEConfig(
        image_size=side, vocab_size=6, hidden=4, groups=groups, blocks=1, bottleneck=2, code_width=4,
        kernel=patch + 2, patch=patch,
    )  # fmt: skip
    assert values == 3 * config.factor**2
    lit = LitDVAE(config, Optimiser(Schedule(1e-3)), temperature=Schedule(0.9), kl_weight=Schedule(0.0))
    with torch.no_grad():
        lit.model.encoder.output.weight.mul_(20)
    batch = {"images": torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8)}
    losses = {}
    for beta in (0.0, 6.6):
        lit.kl_weight = Schedule(beta)
        losses[beta] = lit.step(batch, update=0, batch_index=0)[0].item()
    per_token, cells = 0.0, 3 * config.grid[0] * config.grid[1]
    for cell in lit.model.logits(batch["images"] / 255).movedim(1, -1).reshape(cells, 6).double().tolist():
        total = sum(math.exp(v) for v in cell)
        per_token += sum(math.exp(v) / total * math.log(math.exp(v) / total * 6) for v in cell) / cells
    assert per_token > 0.2
    assert losses[6.6] - losses[0.0] == pytest.approx(6.6 / values * per_token, rel=1e-3)
    if config.factor == 8:
        assert 6.6 / values == pytest.approx(0.034375)


@pytest.mark.parametrize("function", [F.softmax, F.log_softmax])
def test_over_codes_keeps_the_memory_layout(function):
    logits = torch.randn(3, 20, 4, 5)
    for layout in (torch.contiguous_format, torch.channels_last):
        own = logits.contiguous(memory_format=layout).requires_grad_()
        found = over_codes(function, own)
        assert found.is_contiguous(memory_format=layout)
        torch.testing.assert_close(found, function(logits, dim=1), atol=1e-6, rtol=0)
        (slope,) = torch.autograd.grad(found.square().sum(), own)
        expected = torch.autograd.functional.jacobian(lambda x: function(x, dim=1).square().sum(), logits)
        torch.testing.assert_close(slope, expected, atol=1e-5, rtol=1e-5)
