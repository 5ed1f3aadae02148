"""D(x, σ) is the diffusion's own prediction of x_0 in another convention."""

import pytest
import torch

from guided_diffusion import load_network
from guided_diffusion.settings.record import diffusion_from
from tests.small_pipelines import PROCESSES, save
from tests.tiny_sampling import IMAGE_SIZE, TinyFiles

KNOWN = {"num_heads": 4, "use_new_attention_order": False}
OURS = {
    "linear": {"noise_schedule": "linear"},
    "scaled time": {"noise_schedule": "cosine", "diffusion_steps": 400, "rescale_timesteps": True},
    "x_0": {"noise_schedule": "cosine", "predict_xstart": True},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> TinyFiles:
    return TinyFiles(tmp_path_factory.mktemp("tiny"))


def assert_predicts_as_the_diffusion(network, labels: torch.Tensor | None) -> None:
    diffusion, denoiser = diffusion_from(network.resolved.process, ""), network.denoiser()
    torch.manual_seed(0)
    x_t = torch.randn(4, 3, IMAGE_SIZE, IMAGE_SIZE)
    t = torch.tensor([0, 7, 200, diffusion.num_timesteps - 1])
    kwargs = {} if labels is None else {"y": labels}
    expected = diffusion.p_mean_variance(
        network.module, x_t, t, clip_denoised=False, model_kwargs=kwargs
    )["pred_xstart"]
    level = torch.from_numpy(diffusion.alphas_cumprod)[t].float()
    sigma = ((1 - level) / level).sqrt()
    x = x_t / level.sqrt().view(-1, 1, 1, 1)
    assert denoiser.sigma_min == pytest.approx(float(sigma[0]), rel=1e-3)
    assert denoiser.sigma_max == pytest.approx(float(sigma[-1]), rel=1e-3)
    torch.testing.assert_close(denoiser.timesteps(sigma), t.float(), rtol=1e-4, atol=1e-2)
    # Relative to x_0, which a random network puts far outside [-1, 1] at high noise.
    scale = expected.abs().amax(dim=(1, 2, 3), keepdim=True)
    torch.testing.assert_close(
        denoiser(x, sigma, **kwargs) / scale, expected / scale, rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("flags", OURS.values(), ids=OURS)
@torch.inference_mode()
def test_of_our_networks(tiny, flags):
    network = load_network(str(tiny.model), "cpu", image_size=IMAGE_SIZE, **KNOWN, **flags)
    assert_predicts_as_the_diffusion(network, torch.tensor([1, 2, 3, 999]))


@pytest.mark.parametrize("name", ["epsilon, linear", "v, cosine", "sample, scaled"])
@torch.inference_mode()
def test_of_networks_of_diffusers(tmp_path, name):
    network = load_network(save(tmp_path, **PROCESSES[name]), "cpu")
    assert_predicts_as_the_diffusion(network, None)


@torch.inference_mode()
def test_between_timesteps_v_is_read_at_the_noise_that_is_there(tmp_path):
    """With v = c x_t, x_0 = (1/sqrt(1+σ²) - c σ/sqrt(1+σ²)) x_t: exact for any σ."""
    network = load_network(save(tmp_path, **PROCESSES["v, cosine"]), "cpu")
    network.module.unet.forward = lambda x, t, y, return_dict: (0.5 * x,)
    x = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    for sigma in (0.0123, 0.4567, 3.21):
        expected = x * (1 - 0.5 * sigma) / (1 + sigma**2)
        torch.testing.assert_close(network.denoiser()(x, sigma), expected, rtol=1e-4, atol=1e-5)


def test_a_classifier_has_none(tiny):
    network = load_network(str(tiny.classifier), "cpu", image_size=IMAGE_SIZE)
    with pytest.raises(ValueError, match="classifier"):
        network.denoiser()
