"""Divergences, likelihoods and layers against plain formulas."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from guided_diffusion import losses, nn


def test_kl_of_gaussians():
    p, q = (0.3, 0.7), (-0.2, 1.3)  # mean, standard deviation
    want = math.log(q[1] / p[1]) + (p[1] ** 2 + (p[0] - q[0]) ** 2) / (2 * q[1] ** 2) - 0.5
    got = losses.normal_kl(torch.tensor(p[0]), 2 * math.log(p[1]), q[0], 2 * math.log(q[1]))
    assert got.item() == pytest.approx(want, rel=1e-6)
    with pytest.raises(ValueError, match="at least one tensor"):
        losses.normal_kl(0.0, 0.0, 0.0, 0.0)


def test_discretised_likelihood_is_a_distribution_over_256_levels():
    levels = torch.arange(256) / 127.5 - 1
    mean, log_scale = torch.full_like(levels, 0.21), torch.full_like(levels, math.log(0.3))
    nats = losses.discretized_gaussian_log_likelihood(levels, means=mean, log_scales=log_scale)
    assert nats.exp().sum().item() == pytest.approx(1, abs=1e-4)
    normal = scipy.stats.norm(0.21, 0.3)
    exact = normal.cdf(levels.numpy() + 1 / 255) - normal.cdf(levels.numpy() - 1 / 255)
    np.testing.assert_allclose(nats.exp()[1:-1], exact[1:-1], atol=2e-4)
    with pytest.raises(ValueError, match="one shape"):
        losses.discretized_gaussian_log_likelihood(levels, means=mean[:1], log_scales=log_scale)


def test_timestep_embedding():
    embedding = nn.timestep_embedding(torch.tensor([0.0, 2.0]), 5, max_period=100)
    assert embedding.shape == (2, 5)
    np.testing.assert_allclose(embedding[0], [1, 1, 0, 0, 0])
    want = [math.cos(2), math.cos(0.2), math.sin(2), math.sin(0.2), 0]
    np.testing.assert_allclose(embedding[1], want, atol=1e-6)


def test_ema_moves_towards_the_source():
    target, source = [torch.zeros(3)], [torch.ones(3, requires_grad=True)]
    nn.update_ema(target, source, rate=0.9)
    nn.update_ema(target, source, rate=0.9)
    np.testing.assert_allclose(target[0], 0.19, rtol=1e-6)


def test_group_norm_computes_in_float32():
    norm = nn.normalization(32)
    # In float16 the square of 300 overflows; in float32 the output is finite.
    x = (300 * torch.randn(2, 32, 4, 4)).half()
    out = norm(x)
    assert out.dtype == torch.float16
    assert out.isfinite().all()


def test_mean_flat_and_scaling():
    assert nn.mean_flat(torch.ones(2, 3, 4)).tolist() == [1, 1]
    layer = nn.scale_module(nn.linear(2, 2), 2.0)
    zeroed = nn.zero_module(layer)
    assert zeroed is layer
    assert all(p.abs().sum() == 0 for p in zeroed.parameters())


def test_dimensions_out_of_range():
    with pytest.raises(ValueError, match=r"dims must be one of \[1, 2, 3\]"):
        nn.conv_nd(4, 1, 1, 1)
    assert isinstance(nn.avg_pool_nd(3, 2), torch.nn.AvgPool3d)


def test_norms_are_computed_in_float32():
    """In half precision the squares of these values are infinite, and small differences lost."""
    norm = nn.normalization(32)
    x = 1000 + torch.randn(2, 32, 8, 8, generator=torch.Generator().manual_seed(0)) * 50
    x[0] *= 20
    half = x.half()
    want = torch.nn.functional.group_norm(half.float(), 32, norm.weight, norm.bias, norm.eps)
    got = norm(half)
    assert got.dtype == torch.float16
    assert torch.equal(got, want.half())
    assert torch.equal(norm(x.bfloat16()).float(), norm(x.bfloat16().float()).bfloat16().float())
