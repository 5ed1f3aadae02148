"""Folders that diffusers itself has saved: the same trajectories, and all commands of ours."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch

from guided_diffusion import load_network
from guided_diffusion.settings.record import diffusion_from
from guided_diffusion.solvers import evaluation_timesteps
from tests.small_pipelines import PROCESSES, SCALED, SIZE, save

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

T_PRIME, STEPS = 500, 5


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> str:
    return save(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def conditional(tmp_path_factory) -> str:
    return save(tmp_path_factory.mktemp("conditional"), classes=10, **SCALED)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> tuple[Path, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (6, SIZE, SIZE, 3), dtype=np.uint8)
    labels = rng.integers(0, 10, len(pixels))
    path = tmp_path_factory.mktemp("images") / "images.npz"
    np.savez(path, pixels, labels)
    return path, pixels, labels


@torch.inference_mode()
def of_diffusers(scheduler, unet, x: torch.Tensor, noises, y=None) -> list[torch.Tensor]:
    """x after each of the last STEPS steps of ten from T, by the scheduler of diffusers."""
    scheduler.set_timesteps(10)
    tail = scheduler.timesteps[-STEPS:]
    assert tail[0] == T_PRIME - 1
    xs = []
    for t, noise in zip(tail, noises, strict=True):
        output = unet(x, t, class_labels=y).sample
        with noise_is(noise):
            x = scheduler.step(output, t, x).prev_sample
        xs.append(x)
    return xs


@contextlib.contextmanager
def noise_is(noise: torch.Tensor):
    """diffusers draws by `randn_tensor` of the scheduler's module: it gets what we drew."""
    from diffusers.schedulers import scheduling_ddpm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduling_ddpm, "randn_tensor", lambda *args, **kwargs: noise)
        yield


def start(network, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Clean images, these diffused to T', and the noise of each step."""
    torch.manual_seed(seed)
    clean = torch.rand(3, 3, SIZE, SIZE) * 2 - 1
    first, *noises = [torch.randn_like(clean) for _ in range(1 + STEPS)]
    whole = diffusion_from(network.resolved.process, "")
    return clean, whole.q_sample(clean, torch.full((3,), T_PRIME - 1), first), [first, *noises]


@torch.inference_mode()
def ours(network, sampler: str, clean, noises, y=None) -> list[torch.Tensor]:
    whole, drawn = diffusion_from(network.resolved.process, ""), iter(noises)
    loop = whole.solver_sample_loop_progressive if sampler == "dpmpp_2m" else None
    how = {"noise": clean, "clip_denoised": False, "randn": lambda x: next(drawn)}
    how["model_kwargs"] = {} if y is None else {"y": y}
    if loop is None:
        from guided_diffusion.respace import SpacedDiffusion

        chain = SpacedDiffusion(
            evaluation_timesteps(whole.alphas_cumprod, T_PRIME, STEPS),
            betas=whole.original_betas,
            model_mean_type=whole.model_mean_type,
            model_var_type=whole.model_var_type,
            loss_type=whole.loss_type,
        )
        loop = {
            "ddpm": chain.p_sample_loop_progressive,
            "ddim": chain.ddim_sample_loop_progressive,
        }[sampler]
        how["denoise_steps"] = STEPS
    else:
        how |= {"t_prime": T_PRIME, "steps": STEPS, "sampler": sampler}
    return [out["sample"] for out in loop(network.module, clean.shape, **how)]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_ddpm_takes_the_steps_of_diffusers(tmp_path, process):
    path = save(tmp_path, **process)
    network = load_network(path, "cpu")
    unet = diffusers.UNet2DModel.from_pretrained(path, subfolder="unet")
    scheduler = diffusers.DDPMScheduler.from_pretrained(
        path, subfolder="scheduler", timestep_spacing="trailing"
    )
    clean, x, noises = start(network)
    found, expected = (
        ours(network, "ddpm", clean, noises),
        of_diffusers(scheduler, unet, x, noises[1:]),
    )
    if network.record.flags["learn_sigma"]:
        # diffusers adds noise to the clean image unless the last step is of timestep 0.
        found, expected = found[:-1], expected[:-1]
    assert_same(found, expected)


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
@pytest.mark.parametrize("name", ["epsilon, linear", "v, cosine", "sample, scaled"])
def test_ddim_and_dpm_solver_take_the_steps_of_diffusers(tmp_path, name, sampler):
    path = save(tmp_path, **PROCESSES[name])
    network = load_network(path, "cpu")
    unet = diffusers.UNet2DModel.from_pretrained(path, subfolder="unet")
    kind, how = {
        "ddim": (diffusers.DDIMScheduler, {"set_alpha_to_one": True}),
        "dpmpp_2m": (
            diffusers.DPMSolverMultistepScheduler,
            {"algorithm_type": "dpmsolver++", "final_sigmas_type": "zero"},
        ),
    }[sampler]
    scheduler = kind.from_pretrained(
        path, subfolder="scheduler", timestep_spacing="trailing", clip_sample=False, **how
    )
    clean, x, noises = start(network)
    expected = of_diffusers(scheduler, unet, x, noises[1:])
    assert_same(ours(network, sampler, clean, noises), expected)


def test_classes_reach_the_network(conditional):
    network = load_network(conditional, "cpu")
    unet = diffusers.UNet2DModel.from_pretrained(conditional, subfolder="unet")
    scheduler = diffusers.DDPMScheduler.from_pretrained(
        conditional, subfolder="scheduler", timestep_spacing="trailing"
    )
    clean, x, noises = start(network)
    y = torch.tensor([0, 9, 4])
    expected = of_diffusers(scheduler, unet, x, noises[1:], y)
    assert_same(ours(network, "ddpm", clean, noises, y), expected)
