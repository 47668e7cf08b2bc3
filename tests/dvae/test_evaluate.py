"""The measures against their definitions: loops, closed forms, known Gaussians."""

import math

import pytest
import torch

from dvae.errors import DataError
from dvae.evaluate import Moments, evaluate, frechet_distance, precision_recall, psnr, ssim
from dvae.model import DVAE, DVAEConfig
from dvae.tokenizer import load


def moments(features: torch.Tensor, *sizes: int) -> Moments:
    found = Moments(features.shape[1])
    for some in features.split(list(sizes) or len(features)):
        found.add(some)
    return found


def whitened(count: int, width: int) -> torch.Tensor:
    """Vectors of mean 0 and covariance 1, up to rounding."""
    x = torch.randn(count, width, dtype=torch.float64)
    x -= x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (count - 1))).T


# ------------------------------------------------------------------------------------------------------ PSNR and SSIM


def test_psnr_is_that_of_the_mean_squared_error():
    image = torch.rand(2, 3, 4, 5) * 0.8
    assert psnr(image + 0.1, image).tolist() == pytest.approx([20, 20], abs=1e-4)
    noisy = torch.rand(2, 3, 4, 5)
    for b in range(2):
        error = sum((x - y) ** 2 for x, y in zip(noisy[b].flatten().tolist(), image[b].flatten().tolist(), strict=True))
        assert psnr(noisy, image)[b].item() == pytest.approx(10 * math.log10(1 / (error / 60)), abs=1e-6)
    assert psnr(image, image).tolist() == [100, 100]


def ssim_by_loops(x: list, y: list) -> float:
    """Of one channel, as in section III.B of Wang et al. 2004, one window after the other."""
    weights = [[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / (2 * 1.5**2)) for j in range(11)] for i in range(11)]
    total = sum(map(sum, weights))
    found = []
    for top in range(len(x) - 10):
        for left in range(len(x[0]) - 10):
            inside = [(i, j) for i in range(11) for j in range(11)]
            window = [(weights[i][j] / total, x[top + i][left + j], y[top + i][left + j]) for i, j in inside]
            mean_x, mean_y = sum(w * a for w, a, _ in window), sum(w * b for w, _, b in window)
            var_x = sum(w * (a - mean_x) ** 2 for w, a, _ in window)
            var_y = sum(w * (b - mean_y) ** 2 for w, _, b in window)
            both = sum(w * (a - mean_x) * (b - mean_y) for w, a, b in window)
            c1, c2 = 0.01**2, 0.03**2
            found.append(
                (2 * mean_x * mean_y + c1) * (2 * both + c2)
                / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
            )  # fmt: skip
    return sum(found) / len(found)


def test_ssim_is_the_mean_over_windows_and_channels():
    x = torch.rand(2, 3, 13, 12)
    y = (0.6 * x + 0.4 * torch.rand(2, 3, 13, 12)).clamp(0, 1)
    found = ssim(x, y)
    for b in range(2):
        channels = [ssim_by_loops(x[b, c].double().tolist(), y[b, c].double().tolist()) for c in range(3)]
        assert found[b].item() == pytest.approx(sum(channels) / 3, abs=1e-9)
    assert torch.allclose(found, ssim(y, x), atol=1e-12)


def test_ssim_has_its_known_extremes():
    x = torch.rand(1, 3, 20, 20)
    assert ssim(x, x).item() == pytest.approx(1, abs=1e-12)
    assert ssim(x, 1 - x).item() < 0
    black, white = torch.zeros(1, 3, 11, 11), torch.ones(1, 3, 11, 11)
    assert ssim(black, white).item() == pytest.approx(0.0001 / 1.0001)  # C1 / (1 + C1)


# --------------------------------------------------------------------------------------------------- Frechet distance


@pytest.mark.parametrize("sizes", [(50,), (1, 49), (20, 7, 23)])
def test_moments_are_mean_and_covariance_however_the_vectors_come(sizes):
    features = torch.randn(50, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64) + 1e6
    found = moments(features, *sizes)
    assert found.count == 50
    assert torch.allclose(found.mean, features.mean(0), rtol=1e-12)
    assert torch.allclose(found.covariance, torch.cov(features.T), rtol=1e-7, atol=1e-8)


def test_in_one_dimension_it_is_the_closed_form():
    a, b = 3 + 2 * whitened(40, 1), -1 + 0.5 * whitened(60, 1)
    assert frechet_distance(moments(a), moments(b)) == pytest.approx((3 + 1) ** 2 + (2 - 0.5) ** 2)


def test_of_gaussians_whose_axes_agree_it_adds_up_over_the_axes():
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    deviations = torch.tensor([[1.0, 2.0, 3.0, 0.5], [2.0, 2.0, 1.0, 0.0]], dtype=torch.float64)
    shift = torch.tensor([1.0, 0.0, -2.0, 0.5], dtype=torch.float64)
    a, b = whitened(30, 4) * deviations[0], whitened(50, 4) * deviations[1] + shift
    expected = shift.square().sum() + (deviations[0] - deviations[1]).square().sum()
    assert frechet_distance(moments(a @ turn), moments(b @ turn)) == pytest.approx(expected.item())


def test_of_any_two_it_is_that_of_the_matrix_square_root():
    a, b = (torch.randn(30, 5, dtype=torch.float64) @ torch.randn(5, 5, dtype=torch.float64) for _ in range(2))
    x, y = moments(a), moments(b + 1)
    roots = torch.linalg.eigvals(x.covariance @ y.covariance).sqrt().sum().real
    expected = (x.mean - y.mean).square().sum() + x.covariance.trace() + y.covariance.trace() - 2 * roots
    assert frechet_distance(x, y) == pytest.approx(expected.item())
    assert frechet_distance(y, x) == pytest.approx(frechet_distance(x, y))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_fewer_vectors_than_features_give_a_finite_number(count):
    a, b = moments(torch.randn(count, 20)), moments(torch.randn(count, 20))
    found = frechet_distance(a, b)
    assert math.isfinite(found) and found > 0
    assert frechet_distance(b, a) == pytest.approx(found)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-5)


def test_few_vectors_of_one_distribution_seem_further_apart_than_many():
    far, near = (
        frechet_distance(moments(torch.randn(count, 20)), moments(torch.randn(count, 20))) for count in (10, 2000)
    )
    assert far > 10 * near > 0


# ------------------------------------------------------------------------------------------------------ evaluate


def test_a_tokenizer_is_measured_as_one_would_by_hand(tiny_dvae):
    model, images = load(tiny_dvae), torch.rand(7, 3, 32, 32)
    tokens = model.encode(images)
    decoded = model.decode(tokens)

    def features(pictures):
        return pictures.mean((2, 3))

    found = evaluate(model, images.split(3), features, worst=3)
    assert found["pictures"] == 7
    assert found["psnr"] == pytest.approx(psnr(decoded, images).mean().item())
    assert found["ssim"] == pytest.approx(ssim(decoded, images).mean().item())
    for place, name in enumerate(("red", "green", "blue")):
        change = (decoded - images)[:, place]
        assert found["channels"][name]["bias"] == pytest.approx(change.mean().item(), abs=1e-6)
        assert found["channels"][name]["error"] == pytest.approx(change.abs().mean().item(), abs=1e-6)
    assert found["used"] == len(tokens.unique()) / 16
    order = psnr(decoded, images).argsort()[:3].tolist()
    assert [each["picture"] for each in found["worst"]] == order
    assert [each["psnr"] for each in found["worst"]] == pytest.approx(psnr(decoded, images)[order].tolist())
    expected = frechet_distance(moments(features(images)), moments(features(decoded)))
    assert found["frechet"] == pytest.approx(expected, abs=1e-8) and found["features"] == 3


def test_without_features_there_is_no_frechet_distance_and_fewer_pictures_are_all_named(tiny_dvae):
    found = evaluate(load(tiny_dvae), [torch.rand(1, 3, 32, 32)])
    assert found["frechet"] is None and found["features"] is None
    assert [each["picture"] for each in found["worst"]] == [0]


def test_small_pictures_have_no_ssim():
    config = DVAEConfig(image_size=8, vocab_size=1, hidden=4, groups=1, blocks=1, bottleneck=2, code_width=3, kernel=4,
                        patch=4)  # fmt: skip
    found = evaluate(DVAE(config).eval(), torch.rand(4, 3, 8, 8).split(2))
    assert found["ssim"] is None and math.isfinite(found["psnr"]) and found["perplexity"] == 1


def test_no_pictures_are_a_mistake(tiny_dvae):
    with pytest.raises(DataError, match="there are no pictures to evaluate on"):
        evaluate(load(tiny_dvae), [])


def test_precision_and_recall_by_hand():
    """With the second nearest as the reach, balls around 0, 1, 2 reach 2, 1, 2; around 10, 11, 13: 3, 2, 3."""
    real, drawn = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[10.0], [11.0], [13.0]])
    assert precision_recall(real, drawn, 2) == (0.0, 0.0) and precision_recall(real, real, 2) == (1.0, 1.0)
    drawn[0] = 3.5  # inside the ball of 2; its own ball now reaches 9.5, over all of the real
    assert precision_recall(real, drawn, 2) == pytest.approx((1 / 3, 1.0))
    assert precision_recall(drawn, real, 2) == pytest.approx((1.0, 1 / 3))


def test_precision_and_recall_of_clouds():
    """The same distribution gives equal shares; a narrow one is precise and recalls little."""
    random = torch.Generator().manual_seed(0)
    real, same = torch.randn(2, 400, 3, generator=random)
    precision, recall = precision_recall(real, same)
    assert precision > 0.8 and recall > 0.8
    narrow = 0.1 * torch.randn(400, 3, generator=random)
    precision, recall = precision_recall(real, narrow)
    assert precision > 0.95 and recall < 0.1
