"""Each likelihood is a density: it integrates to one, its gradient is right, and its maps undo each other."""

import math

import pytest
import torch

from dvae.errors import UserError
from dvae.likelihood import L1, L2, LogitLaplace, likelihood

SPREADS = [(mu, b) for mu in (-2.0, 0.0, 0.7, 3.0) for b in (0.2, 0.5, 0.9, 2.0)]


def raw_of(mu: float, b: float, count: int) -> torch.Tensor:
    """The decoder's output for `count` pixels in a row, alike in all three channels."""
    return torch.cat([torch.full((1, 3, 1, count), mu), torch.full((1, 3, 1, count), math.log(b))], 1)


@pytest.mark.parametrize("mu, b", SPREADS)
def test_logit_laplace_integrates_to_one_over_the_open_interval(mu, b):
    """x = sigmoid(t), dx = x (1 - x) dt, and t far enough out for the heaviest tail; phi takes pixels to x, so the
    picture that has x is inmap's inverse of it, beyond [0, 1] too."""
    t = torch.linspace(-25, 25, 200_001, dtype=torch.float64)
    x = torch.sigmoid(t)
    images = ((x - 0.1) / 0.8).expand(1, 3, 1, -1)
    assert torch.allclose(LogitLaplace().inmap(images)[0, 0, 0], x, atol=1e-12)
    density = torch.exp(-LogitLaplace().nll(raw_of(mu, b, len(t)), images))
    for channel in density[0, :, 0]:
        assert torch.trapezoid(channel * x * (1 - x), t).item() == pytest.approx(1, abs=2e-3)


def test_logit_laplace_is_the_papers_formula():
    mu, b, v = 0.3, 0.4, 0.9
    x = 0.8 * v + 0.1
    by_hand = 1 / (2 * b * x * (1 - x)) * math.exp(-abs(math.log(x / (1 - x)) - mu) / b)
    nll = LogitLaplace().nll(raw_of(mu, b, 1), torch.full((1, 3, 1, 1), v))
    assert torch.allclose(nll, torch.full((1, 3, 1, 1), -math.log(by_hand)), atol=1e-6)


def test_the_six_channels_are_three_mu_then_three_ln_b():
    images, raw = torch.rand(1, 3, 2, 2), torch.randn(1, 6, 2, 2)
    nll = LogitLaplace().nll(raw, images)
    for channel in range(3):
        alone = LogitLaplace().nll(raw[:, [channel] * 3 + [3 + channel] * 3], images)
        assert torch.equal(alone[:, channel], nll[:, channel])


@pytest.mark.parametrize("kind", [LogitLaplace(), L1(0.3), L2(0.3)])
def test_gradients_match_finite_differences(kind, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # nll works in float32: too coarse for differences
    raw = torch.randn(2, kind.channels, 2, 3, dtype=torch.float64, requires_grad=True)
    images = torch.rand(2, 3, 2, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda raw: kind.nll(raw, images).sum((1, 2, 3)), raw)


@pytest.mark.parametrize("spread", [0.05, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("kind", [L1, L2])
def test_l1_and_l2_integrate_to_one_over_the_real_line(kind, spread):
    x = torch.linspace(-25 * spread, 25 * spread, 100_001, dtype=torch.float64) + 0.4
    raw = torch.full((1, 3, 1, 1), 0.4).expand(-1, -1, -1, len(x))
    density = torch.exp(-kind(spread).nll(raw, x.expand(1, 3, 1, -1)))
    for channel in density[0, :, 0]:
        assert torch.trapezoid(channel, x).item() == pytest.approx(1, abs=1e-4)


def test_l1_and_l2_are_torchs_own_densities():
    images, raw = torch.rand(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    laplace, normal = torch.distributions.Laplace(raw, 0.3), torch.distributions.Normal(raw, 0.3)
    assert torch.allclose(L1(0.3).nll(raw, images), -laplace.log_prob(images), atol=1e-5)
    assert torch.allclose(L2(0.3).nll(raw, images), -normal.log_prob(images), atol=1e-5)


@pytest.mark.parametrize("name", ["logit-laplace", "l1", "l2"])
def test_the_picture_undoes_the_map(name):
    """A decoder that says exactly the mapped pixel shows the pixel, black and white too."""
    kind, images = likelihood(name, 0.1), torch.linspace(0, 1, 3 * 64).view(1, 3, 8, 8)
    mapped = kind.inmap(images)
    raw = torch.cat([torch.logit(mapped), torch.randn(1, 3, 8, 8)], 1) if kind.channels == 6 else mapped
    assert torch.allclose(kind.picture(raw), images, atol=1e-6)


@pytest.mark.parametrize("name", ["logit-laplace", "l1", "l2"])
def test_pictures_stay_in_range_and_every_pixel_is_possible(name):
    kind = likelihood(name, 0.1)
    raw = 50 * torch.randn(4, kind.channels, 8, 8)
    assert 0 <= kind.picture(raw).min() and kind.picture(raw).max() <= 1
    ends = torch.tensor([0.0, 1.0]).repeat(3, 1)[None, :, None]  # black and white, where a bare logit is infinite
    assert torch.isfinite(kind.nll(torch.randn(1, kind.channels, 1, 2), ends)).all()


def test_half_precision_output_is_judged_in_float32():
    images, raw = torch.rand(1, 3, 4, 4), torch.randn(1, 6, 4, 4).bfloat16()
    assert torch.equal(LogitLaplace().nll(raw, images), LogitLaplace().nll(raw.float(), images))


@pytest.mark.parametrize(
    "name, spread", [("gauss", 0.1), ("l2", 0.0), ("l1", -1.0), ("l2", math.nan), ("l2", math.inf)]
)
def test_wrong_settings_are_refused(name, spread):
    with pytest.raises(UserError):
        likelihood(name, spread)
