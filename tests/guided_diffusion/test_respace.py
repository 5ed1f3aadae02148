"""Respaced chains against the published code, and what an impossible chain says."""

import numpy as np
import pytest
import torch

from guided_diffusion import gaussian_diffusion as gd
from guided_diffusion.respace import SpacedDiffusion, space_timesteps
from guided_diffusion.script_util import create_gaussian_diffusion
from tests.golden_values import arrays

SPECS = sorted({k.split("/")[1] for k in arrays("schedules") if k.startswith("space/")})


@pytest.mark.parametrize("spec", SPECS)
def test_kept_steps_and_their_betas(spec):
    steps = space_timesteps(1000, spec)
    assert sorted(steps) == arrays("schedules")[f"space/{spec}/timesteps"].tolist()
    spaced = SpacedDiffusion(
        use_timesteps=steps,
        betas=gd.get_named_beta_schedule("cosine", 1000),
        model_mean_type=gd.ModelMeanType.EPSILON,
        model_var_type=gd.ModelVarType.LEARNED_RANGE,
        loss_type=gd.LossType.MSE,
    )
    np.testing.assert_allclose(spaced.betas, arrays("schedules")[f"space/{spec}/betas"], rtol=1e-10)


def test_early_stop_of_25_in_a_chain_of_250_starts_at_original_step_96():
    diffusion = create_gaussian_diffusion(timestep_respacing="250")
    assert diffusion.num_timesteps == 250
    assert diffusion.timestep_map[24] == 96


@pytest.mark.parametrize(("rescale", "seen"), [(False, [96.0, 0.0]), (True, [96.0, 0.0])])
def test_the_network_sees_original_timesteps(rescale, seen):
    diffusion = create_gaussian_diffusion(timestep_respacing="250", rescale_timesteps=rescale)
    times = []

    def model(x, t):
        times.append(t)
        return torch.zeros_like(x)

    diffusion.p_mean_variance(model, torch.zeros(2, 3, 4, 4), torch.tensor([24, 0]))
    assert times[0].tolist() == seen


def test_rescaled_time_spans_1000_whatever_the_chain():
    diffusion = create_gaussian_diffusion(steps=400, rescale_timesteps=True)
    assert diffusion._scale_timesteps(torch.tensor([200])).item() == 500.0


def test_lists_and_single_steps():
    assert space_timesteps(10, [5, 1]) == {0, 1, 2, 3, 4, 5}
    assert space_timesteps(10, "1") == {0}
    assert space_timesteps(10, "ddim10") == set(range(10))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("1001", r"choose 1 \.\.\. 1000"),
        ("0", r"choose 1 \.\.\. 1000"),
        ("ddim600", "no whole stride over 1000 steps"),
        ("ddim0", "near it: ddim1,"),
        ("ddim", "no whole stride"),
        ("fast", "a chain length is a number"),
        ("10,,10", "a chain length is a number"),
        ("-5", "cannot keep -5"),
    ],
)
def test_impossible_chains_say_what_is_possible(spec, message):
    with pytest.raises(ValueError, match=message):
        space_timesteps(1000, spec)


@pytest.mark.parametrize("steps", [[], [-1, 5], [5, 10], [-1, 10]])
def test_kept_timesteps_must_be_some_of_all(steps):
    with pytest.raises(ValueError, match=r"^use_timesteps must be some of 0 \.\.\. 9$"):
        SpacedDiffusion(use_timesteps=steps, betas=np.full(10, 0.1))
