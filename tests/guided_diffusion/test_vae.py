"""The VAE: shapes, the terms of its bound, and the mixture prior fitted to its codes."""

import numpy as np
import pytest
import torch

from guided_diffusion.flags import vae_defaults
from guided_diffusion.train_util import Draws
from guided_diffusion.vae import (
    IMAGES_PER_COMPONENT,
    PIXEL_SCALE,
    VAE,
    MixturePrior,
    create_vae,
    fit_mixture,
    vae_loss,
)

TINY = {"num_channels": 8, "latent_dim": 5, "prior_components": 3}


def tiny_vae(image_size: int = 16, num_classes: int = 0) -> VAE:
    torch.manual_seed(0)
    return create_vae(image_size=image_size, num_classes=num_classes, **TINY)


def images(n: int, size: int) -> torch.Tensor:
    rng = np.random.default_rng(1)
    return torch.from_numpy(rng.uniform(-1, 1, (n, 3, size, size)).astype(np.float32))


@pytest.mark.parametrize("size", [8, 16, 20, 27, 64])
@pytest.mark.parametrize("num_classes", [0, 4])
def test_any_size_with_and_without_labels(size, num_classes):
    vae = tiny_vae(size, num_classes)
    labels = torch.tensor([0, 3]) if num_classes else None
    mean, log_sigma = vae.encode(images(2, size), labels)
    assert mean.shape == log_sigma.shape == (2, 5)
    assert vae.decode(mean, labels).shape == (2, 3, size, size)
    drawn = vae.sample(labels, torch.tensor([0.1, 0.9]), torch.zeros(2, 5))
    assert drawn.shape == (2, 3, size, size)


def test_terms_of_the_bound():
    vae = tiny_vae(num_classes=3)
    x, labels = images(4, 16), torch.tensor([0, 1, 2, 2])
    noise = torch.randn(4, 5)
    terms = vae(x, labels, noise)
    mean, log_sigma = vae.encode(x, labels)
    posterior = torch.distributions.Normal(mean, log_sigma.exp())
    standard = torch.distributions.Normal(torch.zeros(5), torch.ones(5))
    kl = torch.distributions.kl_divergence(posterior, standard).sum(dim=1)
    torch.testing.assert_close(terms["kl"], kl)
    decoded = vae.decode(mean + log_sigma.exp() * noise, labels)
    laplace = torch.distributions.Laplace(decoded, PIXEL_SCALE)
    nats = -laplace.log_prob(x).flatten(1).sum(dim=1)
    constant = 3 * 16 * 16 * np.log(2 * PIXEL_SCALE)
    torch.testing.assert_close(terms["reconstruction"], nats - constant)
    torch.testing.assert_close(terms["mse"], (decoded - x).pow(2).mean(dim=(1, 2, 3)))
    with_loss = vae_loss(5, 0.3)(vae, x, {"y": labels}, Draws(0, 0, 4, 0))
    expected = with_loss["reconstruction"] + 0.3 * with_loss["kl"] / (3 * 16 * 16)
    torch.testing.assert_close(with_loss["loss"], expected)


def test_labels_change_codes_and_images():
    vae = tiny_vae(num_classes=2)
    x = images(1, 16)
    first, second = (vae.encode(x, torch.tensor([label]))[0] for label in (0, 1))
    assert not torch.equal(first, second)
    decoded = [vae.decode(first, torch.tensor([label])) for label in (0, 1)]
    assert not torch.equal(*decoded)


@pytest.mark.parametrize("num_classes", [0, 2])
def test_labels_must_fit_the_vae(num_classes):
    labels = None if num_classes else torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"num_classes {num_classes}"):
        tiny_vae(num_classes=num_classes)(images(1, 16), labels, torch.zeros(1, 5))


@pytest.mark.parametrize(
    ("flag", "value"),
    [("image_size", 4), ("num_channels", 12), ("latent_dim", 0), ("prior_components", 0)],
)
def test_bad_flags_are_named(flag, value):
    with pytest.raises(ValueError, match=f"{flag} is {value}"):
        create_vae(**{**vae_defaults(), flag: value})


def test_unfitted_prior_is_standard_normal():
    prior = MixturePrior(2, 3, 5)
    normal = torch.randn(4, 5)
    uniform = torch.tensor([0.0, 0.3, 0.7, np.nextafter(np.float32(1), np.float32(0))])
    codes = prior.codes(torch.tensor([0, 1, 0, 1]), uniform, normal)
    torch.testing.assert_close(codes, normal)


def test_codes_pick_components_by_weight_and_class():
    prior = MixturePrior(2, 3, 1)
    prior.weight.copy_(torch.tensor([[0.25, 0.75, 0.0], [0.5, 0.25, 0.25]]))
    prior.mean.copy_(torch.arange(6.0).view(2, 3, 1))
    prior.variance.fill_(0.01)
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    uniform = torch.tensor([0.2, 0.25, 0.999999, 0.0, 0.49, 0.6, 0.8])
    codes = prior.codes(labels, uniform, torch.ones(7, 1))
    expected = torch.tensor([0, 1, 1, 3, 3, 4, 5]) + 0.1
    torch.testing.assert_close(codes[:, 0], expected)


def test_mixture_recovers_its_clusters():
    rng = torch.Generator().manual_seed(0)
    centres, deviations = torch.tensor([[-4.0, 0.0], [4.0, 1.0]]), torch.tensor([0.5, 1.0])
    which = (torch.arange(4000) >= 1000).long()
    noise = torch.randn(4000, 2, generator=rng)
    points = centres[which] + deviations[which, None] * noise
    # Each datum is itself a Gaussian: its variance adds to the cluster's.
    weight, mean, variance = fit_mixture(points, torch.full((4000, 2), 0.2), 2, rng)
    order = mean[:, 0].argsort()
    torch.testing.assert_close(weight[order], torch.tensor([0.25, 0.75]), atol=0.01, rtol=0)
    torch.testing.assert_close(mean[order], centres, atol=0.1, rtol=0)
    expected = (deviations**2 + 0.2)[:, None].expand(2, 2)
    torch.testing.assert_close(variance[order], expected, atol=0.1, rtol=0)


def test_mixture_of_equal_points_stays_finite():
    rng = torch.Generator().manual_seed(0)
    fitted = fit_mixture(torch.zeros(20, 3), torch.full((20, 3), 0.1), 2, rng)
    assert all(torch.isfinite(values).all() for values in fitted)
    assert (fitted[2] > 0).all()


def test_fit_prior_describes_each_class():
    vae = tiny_vae(num_classes=3)
    n = 3 * IMAGES_PER_COMPONENT
    labels = torch.tensor([0] * (n - 4) + [2] * 4)
    with torch.no_grad():
        mean, log_sigma = vae.encode(images(n, 16), labels)
    variance = torch.exp(2 * log_sigma)
    assert not vae.prior.fitted
    vae.fit_prior(labels, mean, variance)
    prior = vae.prior
    assert prior.fitted
    torch.testing.assert_close(prior.weight.sum(dim=1), torch.ones(3))
    # One component for at most IMAGES_PER_COMPONENT images; a class without images keeps N(0, I).
    assert (prior.weight > 0).sum(dim=1).tolist() == [3, 1, 1]
    assert torch.equal(prior.mean[1, 0], torch.zeros(5))
    torch.testing.assert_close(prior.mean[2, 0], mean[labels == 2].mean(dim=0))
    overall = (prior.weight[0, :, None] * prior.mean[0]).sum(dim=0)
    torch.testing.assert_close(overall, mean[labels == 0].mean(dim=0), atol=1e-4, rtol=1e-3)
    first = prior.mean.clone()
    vae.fit_prior(labels, mean, variance)
    assert torch.equal(first, prior.mean)
