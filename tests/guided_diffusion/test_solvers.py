"""DPM-Solver++ 2M against exact solutions and diffusers; which timesteps are evaluated."""

import numpy as np
import pytest
import torch

from guided_diffusion.gaussian_diffusion import ModelMeanType, get_named_beta_schedule
from guided_diffusion.script_util import create_gaussian_diffusion
from guided_diffusion.solvers import SOLVERS, SPACINGS, MultistepSolver, evaluation_timesteps
from tests.golden.make_solvers import CASES, start_and_noises, toy_noise
from tests.golden_values import arrays

LEVELS = {
    name: np.cumprod(1 - get_named_beta_schedule(name, 1000)) for name in ("linear", "cosine")
}
# Data of the exact tests: every pixel is N(MEAN, STD^2).
MEAN, STD = 0.3, 0.4


# --- timesteps ---


def test_uniform_timesteps():
    assert evaluation_timesteps(LEVELS["cosine"], 500, 5) == [499, 399, 299, 199, 99]
    assert evaluation_timesteps(LEVELS["cosine"], 1000, 3) == [999, 666, 332]


@pytest.mark.parametrize("schedule", LEVELS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_spacing_gives_as_many_timesteps_as_asked_for(spacing, schedule):
    for t_prime in (1, 2, 3, 7, 50, 1000):
        for steps in {1, 2, 3, 25, t_prime - 1, t_prime} & set(range(1, t_prime + 1)):
            times = evaluation_timesteps(LEVELS[schedule], t_prime, steps, spacing)
            assert len(times) == steps
            assert times[0] == t_prime - 1 and times[-1] >= 0
            assert (np.diff(times) < 0).all()
            assert steps < t_prime or times == list(range(t_prime))[::-1]


@pytest.mark.parametrize(
    ("spacing", "axis"),
    [
        ("logsnr", lambda level: 0.5 * np.log(level / (1 - level))),
        ("karras", lambda level: ((1 - level) / level) ** (0.5 / 7)),
    ],
)
def test_strides_are_equal_on_the_axis_of_the_spacing(spacing, axis):
    times = evaluation_timesteps(LEVELS["cosine"], 800, 6, spacing)
    assert times[-1] == 0
    strides = np.diff(axis(LEVELS["cosine"][times]))
    # Rounding to timesteps tells at the clean end only, where few of them span much.
    np.testing.assert_allclose(strides[:3], strides[:3].mean(), rtol=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1), "t_prime must be in 1 ... 1000, not 0"),
        ((1001, 1), "t_prime must be in 1 ... 1000, not 1001"),
        ((10, 11), "steps must be in 1 ... 10"),
        ((10, 0), "steps must be in 1 ... 10"),
        ((10, 2, "cubic"), "spacing must be one of uniform, logsnr, karras"),
    ],
)
def test_timesteps_that_cannot_be_given(arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluation_timesteps(LEVELS["linear"], *arguments)


# --- exact solutions: Gaussian data ---


def denoised(x, level):
    """E[x_0 | x_t] for the Gaussian data."""
    gain = np.sqrt(level) * STD**2 / marginal_variance(level)
    return MEAN + gain * (x - np.sqrt(level) * MEAN)


def marginal_variance(level):
    return level * STD**2 + 1 - level


def solve_half(steps: int, eta: float, x: torch.Tensor, noises):
    """From timestep 959 half the way down, to 479, with `steps` evaluations on the whole way."""
    levels = LEVELS["linear"][evaluation_timesteps(LEVELS["linear"], 960, steps)]
    solver = MultistepSolver(levels, eta)
    for level, z in zip(levels[: steps // 2], noises, strict=False):
        x = solver(x, denoised(x, level), z)
    return x


def test_2m_is_second_order_on_gaussian_data():
    """The error of the ODE falls by about 4 when the number of evaluations doubles."""
    first, last = LEVELS["linear"][[959, 479]]
    start = torch.linspace(-2, 2, 9, dtype=torch.float64)
    stretch = np.sqrt(marginal_variance(last) / marginal_variance(first))
    exact = np.sqrt(last) * MEAN + stretch * (start - np.sqrt(first) * MEAN)
    errors = [
        float((solve_half(steps, 0.0, start, [0.0] * steps) - exact).abs().max())
        for steps in (40, 80, 160, 320)
    ]
    ratios = np.divide(errors[:-1], errors[1:])
    assert ((ratios > 3.3) & (ratios < 4.7)).all(), (errors, ratios)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_the_sde_keeps_mean_and_variance_on_gaussian_data(eta):
    """A linear solver: its variance is the sum of the squared responses to each unit of noise."""
    first, last = LEVELS["linear"][[959, 479]]
    errors = []
    for steps in (40, 80, 160):
        # One pixel without noise, one with a unit at the start, one with a unit at each step.
        moves = steps // 2
        pixels = torch.full((moves + 2,), np.sqrt(first) * MEAN, dtype=torch.float64)
        pixels[1] += np.sqrt(marginal_variance(first))
        noises = torch.zeros(moves, moves + 2, dtype=torch.float64)
        noises[range(moves), range(2, moves + 2)] = 1
        end = solve_half(steps, eta, pixels, noises)
        assert float(end[0]) == pytest.approx(np.sqrt(last) * MEAN, rel=1e-12)
        variance = float(((end[1:] - end[0]) ** 2).sum())
        errors.append(abs(variance / marginal_variance(last) - 1))
    assert errors[0] < 0.02 and errors[2] < errors[1] < errors[0], errors


# --- the loop ---


@pytest.mark.parametrize("sampler", SOLVERS)
@pytest.mark.parametrize("case", CASES)
def test_trajectories_are_those_of_diffusers(case, sampler):
    schedule, t_prime, steps = CASES[case]
    start, *noises = start_and_noises(steps)
    queue = [start.float(), *(z.float() for z in noises)]
    diffusion = create_gaussian_diffusion(steps=1000, noise_schedule=schedule)
    # Clean images that, diffused with the first draw, are x of the reference.
    level = LEVELS[schedule][t_prime - 1]
    clean = ((1 - np.sqrt(1 - level)) / np.sqrt(level) * start).float()
    states = diffusion.solver_sample_loop_progressive(
        toy_noise,
        start.shape,
        noise=clean,
        clip_denoised=False,
        device="cpu",
        t_prime=t_prime,
        steps=steps,
        sampler=sampler,
        randn=lambda like: queue.pop(0),
    )
    got = torch.stack([state["sample"] for state in states])
    assert not queue
    np.testing.assert_allclose(
        got, arrays("solvers")[f"{case}/{sampler}"], rtol=2e-4, atol=2e-4 * float(got.abs().max())
    )


def sample(diffusion, model=toy_noise, **options):
    """States of the loop from fixed images and noise, as one tensor [K, N, C, H, W]."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.linspace(-1, 1, 18).view(2, 1, 3, 3)
    options = {"noise": clean, "device": "cpu", "t_prime": 400, **options}
    states = diffusion.solver_sample_loop_progressive(
        model,
        clean.shape,
        randn=lambda like: torch.randn(like.shape, generator=generator),
        **options,
    )
    return torch.stack([state["sample"] for state in states])


def test_timesteps_and_levels_are_the_original_process_s_under_respacing():
    seen = []

    def model(x, t, **_):
        seen.append(int(t[0]))
        return toy_noise(x, t)

    whole = create_gaussian_diffusion(steps=1000, noise_schedule="cosine")
    spaced = create_gaussian_diffusion(steps=1000, noise_schedule="cosine", timestep_respacing="10")
    want = sample(whole, model, steps=4)
    assert seen == [399, 299, 199, 99]
    torch.testing.assert_close(sample(spaced, steps=4), want, rtol=0, atol=0)


def test_without_steps_the_process_s_own_timesteps_below_t_prime_are_evaluated():
    """So a SpacedDiffusion of `evaluation_timesteps` can be handed to every sampler."""
    whole = create_gaussian_diffusion(steps=1000, noise_schedule="cosine")
    spaced = whole._respaced(400, 5, "karras")
    want = sample(whole, steps=5, spacing="karras")
    torch.testing.assert_close(sample(spaced), want, rtol=0, atol=0)
    assert len(sample(create_gaussian_diffusion(steps=500))) == 400


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_first_step_is_ddim(eta):
    """First order is DDIM, and with eta 1 DDPM with the posterior's variance."""
    whole = create_gaussian_diffusion(steps=1000, noise_schedule="cosine")
    spaced = whole._respaced(400, 2, "uniform")
    x, z = torch.linspace(-2, 2, 18).view(2, 1, 3, 3), torch.ones(2, 1, 3, 3)
    ddim = spaced.ddim_sample(toy_noise, x, torch.tensor([1, 1]), eta=eta, randn=lambda _: z)
    solver = MultistepSolver(spaced.alphas_cumprod[::-1], eta)
    torch.testing.assert_close(solver(x, ddim["pred_xstart"], z), ddim["sample"])


@pytest.mark.parametrize("t_prime", [None, 30])
@pytest.mark.parametrize("sampler", SOLVERS)
@pytest.mark.parametrize("steps", [1, 3, 30])
def test_one_draw_for_the_start_and_one_a_step(sampler, steps, t_prime):
    draws = []
    diffusion = create_gaussian_diffusion(steps=30, noise_schedule="linear", learn_sigma=True)
    got = diffusion.solver_sample_loop(
        lambda x, t: torch.cat([x, x], dim=1),
        (2, 3, 4, 4),
        noise=None if t_prime is None else torch.zeros(2, 3, 4, 4),
        device="cpu",
        t_prime=t_prime,
        steps=steps,
        sampler=sampler,
        randn=lambda like: draws.append(like.shape) or torch.ones_like(like),
    )
    assert len(draws) == 1 + steps
    assert got.shape == (2, 3, 4, 4) and got.abs().max() <= 1


def test_a_learned_variance_is_not_used():
    fixed = create_gaussian_diffusion(steps=1000, noise_schedule="cosine")
    learned = create_gaussian_diffusion(steps=1000, noise_schedule="cosine", learn_sigma=True)

    def model(x, t, **_):
        return torch.cat([toy_noise(x, t), 5 * x], dim=1)

    torch.testing.assert_close(sample(learned, model, steps=4), sample(fixed, steps=4))


def test_guidance_shifts_the_score_of_gaussian_data_exactly():
    """With log p(y | x_t) of the data's own form the guided x_0 is that of the product."""
    diffusion = create_gaussian_diffusion(steps=1000, noise_schedule="linear", predict_xstart=True)
    level = LEVELS["linear"][399]

    def model(x, t, **_):
        return denoised(x, LEVELS["linear"][int(t[0])]).float()

    def gradient(x, t, **_):
        return torch.full_like(x, 0.5)

    (guided,) = sample(diffusion, model, steps=1, clip_denoised=False, cond_fn=gradient)
    (plain,) = sample(diffusion, model, steps=1, clip_denoised=False)
    # x_0 = (x + sigma^2 score) / alpha
    shift = torch.full_like(plain, 0.5 * (1 - level) / np.sqrt(level))
    torch.testing.assert_close(guided - plain, shift, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "heun"}, "sampler must be one of dpmpp_2m, dpmpp_2m_sde"),
        ({"sampler": "dpmpp_2m", "eta": 1.0}, "eta must be 0 for dpmpp_2m"),
        ({"eta": 1.5}, r"eta must be in 0 ... 1, not 1.5"),
        ({"steps": 0}, "steps must be in 1 ... 400"),
        ({"t_prime": 2000}, "t_prime must be in 1 ... 1000"),
        ({"noise": None}, "t_prime needs the clean start images as `noise`"),
        ({"spacing": "cubic", "steps": None}, "spacing must be one of"),
    ],
)
def test_bad_arguments_name_themselves(options, message):
    diffusion = create_gaussian_diffusion(steps=1000, noise_schedule="cosine")
    with pytest.raises(ValueError, match=message):
        sample(diffusion, **{"steps": 4, **options})


def test_a_network_that_predicts_the_previous_x_is_refused():
    diffusion = create_gaussian_diffusion(steps=1000)
    diffusion.model_mean_type = ModelMeanType.PREVIOUS_X
    with pytest.raises(ValueError, match="predicts the noise, x_0 or the velocity"):
        sample(diffusion, steps=4)
