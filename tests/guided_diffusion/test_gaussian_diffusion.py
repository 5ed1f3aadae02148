"""Schedules, losses, and whole trajectories against the published code; the loop's contract."""

import copy
import inspect

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from guided_diffusion import gaussian_diffusion as gd
from guided_diffusion.script_util import create_gaussian_diffusion
from guided_diffusion.unet import EncoderUNetModel
from tests.golden_values import arrays, fill, meta, small_model, tensor

TRAJECTORIES = meta()["trajectories"]
SCHEDULES = sorted({k.rsplit("/", 1)[0] for k in arrays("schedules") if not k.startswith("space")})
# The seeds that the reference values of losses and bits per dimension were drawn with.
BPD_SEED = 7


def toy_diffusion(**changes) -> gd.GaussianDiffusion:
    return create_gaussian_diffusion(**{"steps": 20, "noise_schedule": "cosine", **changes})


def test_values_of_an_array_as_code_of_others_looks_them_up():
    values = gd._extract_into_tensor(np.array([0.5, 1.5, 2.5]), torch.tensor([2, 0]), (2, 3, 1, 4))
    assert values.shape == (2, 3, 1, 4) and values.dtype == torch.float32
    assert values[0].unique().tolist() == [2.5] and values[1].unique().tolist() == [0.5]


def test_schedules_by_their_ends_and_by_all_betas():
    betas = gd.get_named_beta_schedule
    np.testing.assert_allclose(betas("linear 0.0001 0.02", 1000), betas("linear", 1000), rtol=1e-12)
    root = betas("scaled_linear 0.0001 0.04", 3)
    np.testing.assert_allclose(root, [0.0001, 0.105**2, 0.04], rtol=1e-12)
    np.testing.assert_array_equal(betas("betas 0.1 0.3 0.2", 3), [0.1, 0.3, 0.2])
    for text in ("linear 0.1", "betas 0.1 0.2", "cosine 0.1 0.2", "betas 0.1 x 0.3", ""):
        with pytest.raises(ValueError, match="noise_schedule"):
            betas(text, 3)


def zero_model(x, t, **_):
    return torch.zeros_like(x)


@pytest.mark.parametrize("case", SCHEDULES)
def test_schedules(case):
    name = "linear" if case.startswith("linear") else "cosine"
    diffusion = gd.GaussianDiffusion(
        betas=gd.get_named_beta_schedule(name, int(case.removeprefix(name))),
        model_mean_type=gd.ModelMeanType.EPSILON,
        model_var_type=gd.ModelVarType.LEARNED_RANGE,
        loss_type=gd.LossType.MSE,
    )
    for key, want in arrays("schedules").items():
        if key.rsplit("/", 1)[0] == case:
            got = getattr(diffusion, key.rsplit("/", 1)[1])
            np.testing.assert_allclose(got, want, rtol=1e-10, atol=0, err_msg=key)


def golden_guide(scale: float, salt: str):
    """scale * grad log p(y | x) under a small classifier."""
    classifier = EncoderUNetModel(
        image_size=16,
        in_channels=3,
        model_channels=32,
        out_channels=1000,
        num_res_blocks=1,
        attention_resolutions=(2, 4),
        channel_mult=(1, 2),
        num_head_channels=16,
        use_scale_shift_norm=True,
        resblock_updown=True,
        pool="attention",
    )
    fill(classifier, salt)

    def cond_fn(x, t, y=None):
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            log_p = F.log_softmax(classifier(x, t), dim=-1)
            return torch.autograd.grad(log_p[range(len(y)), y].sum() * scale, x)[0]

    return cond_fn


@pytest.mark.parametrize("case", TRAJECTORIES)
def test_trajectories(case):
    info = TRAJECTORIES[case]
    guided = case.startswith("guided/")
    config = "imagenet64_like" if guided else info["config"]
    model, diffusion = small_model(config, timestep_respacing=info["respacing"])
    start = tensor("trajectories", f"{case}/x_start")
    kwargs = (
        {"model_kwargs": {"y": tensor("trajectories", f"{case}/y")}} if model.num_classes else {}
    )
    if info["denoise_steps"]:
        kwargs |= {"noise": start, "denoise_steps": info["denoise_steps"]}
    if guided:
        kwargs["cond_fn"] = golden_guide(info["scale"], info["classifier_salt"])
    ddim = info["respacing"].startswith("ddim")
    loop = diffusion.ddim_sample_loop if ddim else diffusion.p_sample_loop
    torch.manual_seed(info["seed"])
    sample = loop(model, tuple(start.shape), **kwargs)
    want = arrays("trajectories")[f"{case}/sample"]
    np.testing.assert_allclose(sample, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mse", {}),
        ("kl", {"use_kl": True}),
        ("rescaled_mse", {"rescale_learned_sigmas": True}),
        ("xstart", {"predict_xstart": True}),
        ("fixed", {"learn_sigma": False}),
    ],
)
def test_training_losses(name, changes):
    model, diffusion = small_model("lsun_like", **changes)
    x, noise, t = (tensor("losses", f"{name}/{key}") for key in ("x", "noise", "t"))
    with torch.no_grad():
        terms = diffusion.training_losses(model, x, t, noise=noise)
    want = {k.split("/")[1]: v for k, v in arrays("losses").items() if k.startswith(f"{name}/")}
    assert set(terms) == set(want) - {"x", "noise", "t"}
    for key, value in terms.items():
        np.testing.assert_allclose(value, want[key], rtol=1e-3, atol=1e-4, err_msg=key)


def test_bits_per_dimension():
    model, diffusion = small_model("lsun_like", timestep_respacing="6")
    torch.manual_seed(BPD_SEED)
    terms = diffusion.calc_bpd_loop(model, tensor("losses", "bpd/x"))
    for key, value in terms.items():
        want = arrays("losses")[f"bpd/{key}"]
        np.testing.assert_allclose(value, want, rtol=1e-3, atol=1e-3, err_msg=key)


def test_the_bound_does_not_train_the_mean():
    """With a learned variance, the gradient of "vb" stops at the mean's channels."""
    diffusion = toy_diffusion(learn_sigma=True)
    output = torch.zeros(2, 6, 4, 4, requires_grad=True)
    x = torch.rand(2, 3, 4, 4) * 2 - 1
    terms = diffusion.training_losses(lambda *_: output, x, torch.tensor([3, 7]))
    (gradient,) = torch.autograd.grad(terms["vb"].sum(), output)
    assert gradient[:, :3].abs().max() == 0
    assert gradient[:, 3:].abs().max() > 0


@pytest.mark.parametrize("steps", [50, 1000])
def test_rescaled_losses_are_of_the_sum_over_all_steps(steps):
    """The bound times T, and beside the squared error a thousandth of that."""

    def terms(**flags):
        diffusion = toy_diffusion(steps=steps, learn_sigma=True, **flags)
        x = torch.linspace(-1, 1, 2 * 3 * 4 * 4).view(2, 3, 4, 4)
        t = torch.tensor([3, 40])
        model = lambda x, t: torch.cat([0.5 * x, 0.1 * x], dim=1)  # noqa: E731
        return diffusion.training_losses(model, x, t, noise=x.flip(1))

    plain, rescaled = terms(), terms(rescale_learned_sigmas=True)
    torch.testing.assert_close(rescaled["vb"], plain["vb"] * steps / 1000)
    torch.testing.assert_close(rescaled["loss"], plain["mse"] + rescaled["vb"])
    bound = terms(use_kl=True)["loss"]
    torch.testing.assert_close(bound, plain["vb"] * steps, rtol=1e-4, atol=1e-4)


def test_early_stop_is_the_tail_of_the_chain():
    """Diffusing by hand to K-1 and running the last K steps equals denoise_steps=K."""
    diffusion = toy_diffusion()
    clean = torch.rand(2, 3, 4, 4) * 2 - 1
    torch.manual_seed(0)
    steps = list(
        diffusion.p_sample_loop_progressive(
            zero_model, clean.shape, noise=clean, device="cpu", denoise_steps=5
        )
    )
    assert len(steps) == 5
    torch.manual_seed(0)
    x = diffusion.q_sample(clean, torch.tensor([4, 4]))
    for index, out in zip((4, 3, 2, 1, 0), steps, strict=True):
        x = diffusion.p_sample(zero_model, x, torch.tensor([index, index]))["sample"]
        torch.testing.assert_close(out["sample"], x, rtol=0, atol=0)


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
@pytest.mark.parametrize("denoise_steps", [None, 3])
def test_randn_is_the_only_source_of_noise(loop, denoise_steps):
    """One draw for the start and one a step, from the callable given; the global seed is unused."""
    diffusion = toy_diffusion()
    draws = []

    def randn(like):
        generator = torch.Generator().manual_seed(len(draws))
        draws.append(tuple(like.shape))
        return torch.randn(like.shape, generator=generator)

    noise = torch.zeros(2, 3, 4, 4) if denoise_steps else None
    samples = []
    for seed in (1, 2):
        draws.clear()
        torch.manual_seed(seed)
        samples.append(
            getattr(diffusion, loop)(
                zero_model,
                (2, 3, 4, 4),
                noise=noise,
                device="cpu",
                denoise_steps=denoise_steps,
                randn=randn,
            )
        )
        assert len(draws) == 1 + (denoise_steps or 20)
    torch.testing.assert_close(samples[0], samples[1], rtol=0, atol=0)


def test_ddim_with_eta_1_has_the_variance_of_ddpm():
    diffusion = toy_diffusion()
    x, t = torch.randn(1, 3, 4, 4), torch.tensor([9])
    shifted = diffusion.ddim_sample(zero_model, x, t, eta=1.0, randn=torch.ones_like)
    centre = diffusion.ddim_sample(zero_model, x, t, eta=1.0, randn=torch.zeros_like)
    sigma = (shifted["sample"] - centre["sample"]).mean()
    assert float(sigma) == pytest.approx(diffusion.posterior_variance[9] ** 0.5, rel=1e-4)


def test_ddim_encodes_and_decodes():
    """The reverse ODE followed by DDIM returns to the image, up to the error of the steps."""
    diffusion = toy_diffusion(steps=1000, timestep_respacing="200")
    image = torch.rand(1, 3, 4, 4) - 0.5

    def model(x, t):
        # The ideal network for data that is one Gaussian: eps = sqrt(1 - level) x.
        level = torch.from_numpy(base.alphas_cumprod)[t].float().view(-1, 1, 1, 1)
        return (1 - level).sqrt() * x

    base = toy_diffusion(steps=1000)
    x = image
    for index in range(100):
        x = diffusion.ddim_reverse_sample(model, x, torch.tensor([index]), False)["sample"]
    for index in reversed(range(100)):
        x = diffusion.ddim_sample(model, x, torch.tensor([index + 1]), False)["sample"]
    torch.testing.assert_close(x, image, rtol=0, atol=0.02)
    with pytest.raises(ValueError, match="eta must be 0"):
        diffusion.ddim_reverse_sample(model, x, torch.tensor([0]), eta=0.5)


def test_predicting_previous_x_or_x0_agrees_with_predicting_noise():
    """A perfect network of any kind gives the same mean."""
    start, noise = torch.rand(2, 3, 4, 4) - 0.5, torch.randn(2, 3, 4, 4)
    t = torch.tensor([3, 12])
    means = []
    for kind in gd.ModelMeanType:
        diffusion = gd.GaussianDiffusion(
            betas=gd.get_named_beta_schedule("cosine", 20),
            model_mean_type=kind,
            model_var_type=gd.ModelVarType.FIXED_SMALL,
            loss_type=gd.LossType.MSE,
        )
        x_t = diffusion.q_sample(start, t, noise)
        target = diffusion._target(start, x_t, t, noise)
        means.append(diffusion.p_mean_variance(lambda *_, out=target: out, x_t, t)["mean"])
    torch.testing.assert_close(means[0], means[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(means[2], means[1], rtol=1e-4, atol=1e-4)


def test_bad_arguments_name_themselves_and_the_valid_values():
    diffusion = toy_diffusion()
    clean = torch.zeros(1, 3, 4, 4)
    for steps in (0, 21, -1):
        with pytest.raises(ValueError, match=r"denoise_steps must be in 1 \.\.\. 20"):
            diffusion.p_sample_loop(
                zero_model, clean.shape, noise=clean, device="cpu", denoise_steps=steps
            )
    with pytest.raises(ValueError, match="clean start images"):
        diffusion.ddim_sample_loop(zero_model, clean.shape, device="cpu", denoise_steps=3)
    with pytest.raises(ValueError, match="noise has shape"):
        diffusion.p_sample_loop(zero_model, (2, 3, 4, 4), noise=clean, device="cpu")
    with pytest.raises(ValueError, match='"linear" or "cosine"'):
        gd.get_named_beta_schedule("sqrt", 10)
    with pytest.raises(ValueError, match="needs 3 output channels"):
        diffusion.p_sample(lambda x, t: x[:, :1], clean, torch.tensor([1]))
    with pytest.raises(ValueError, match="needs 6 output channels"):
        toy_diffusion(learn_sigma=True).p_sample(zero_model, clean, torch.tensor([1]))


def test_a_process_copies_without_its_device_tables():
    diffusion = toy_diffusion()
    diffusion.q_sample(torch.zeros(1, 3, 4, 4), torch.tensor([3]))
    assert diffusion._tables
    assert not copy.deepcopy(diffusion)._tables


def test_a_process_trains_after_it_has_sampled_in_inference_mode():
    model, diffusion = small_model("lsun_like")
    x, t = torch.zeros(1, 3, 16, 16), torch.tensor([3])
    with torch.inference_mode():
        diffusion.p_sample(model, x, t)
    diffusion.training_losses(model, x, t)["loss"].mean().backward()
    assert model.out[2].weight.grad.abs().max() > 0


def test_loop_signatures_are_frozen():
    common = [
        "self",
        "model",
        "shape",
        "noise",
        "clip_denoised",
        "denoised_fn",
        "cond_fn",
        "model_kwargs",
        "device",
        "progress",
    ]
    for name, extra in (("p", []), ("ddim", ["eta"])):
        loop = getattr(gd.GaussianDiffusion, f"{name}_sample_loop_progressive")
        assert list(inspect.signature(loop).parameters) == [
            *common,
            *extra,
            "denoise_steps",
            "randn",
        ]
    solver = inspect.signature(gd.GaussianDiffusion.solver_sample_loop_progressive)
    assert list(solver.parameters) == [
        *common,
        "t_prime",
        "steps",
        "sampler",
        "spacing",
        "eta",
        "randn",
    ]


@pytest.mark.parametrize("spacing", ["", "20"])
def test_a_reverse_ddim_step_leads_to_the_next_noise_level(spacing):
    """With a network that knows the noise, x_t of an image becomes its x_{t+1}."""
    diffusion = create_gaussian_diffusion(timestep_respacing=spacing)
    generator = torch.Generator().manual_seed(0)
    x_start = torch.rand(4, 3, 4, 4, generator=generator) * 2 - 1
    noise = torch.randn(x_start.shape, generator=generator)
    t = torch.tensor([0, 3, 10, 18])
    out = diffusion.ddim_reverse_sample(
        lambda x, t: noise, diffusion.q_sample(x_start, t, noise), t, clip_denoised=False
    )
    torch.testing.assert_close(
        out["sample"], diffusion.q_sample(x_start, t + 1, noise), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(out["pred_xstart"], x_start, rtol=1e-3, atol=1e-3)


def test_the_three_predictions_of_a_network_agree():
    """x_0, the noise in x_t and the mean of x_{t-1} are one another's linear functions."""
    base = create_gaussian_diffusion()
    generator = torch.Generator().manual_seed(0)
    x_start = torch.rand(3, 3, 4, 4, generator=generator) * 2 - 1
    noise = torch.randn(x_start.shape, generator=generator)
    t = torch.tensor([1, 200, 700])
    x_t = base.q_sample(x_start, t, noise)
    outputs = {
        gd.ModelMeanType.START_X: x_start,
        gd.ModelMeanType.EPSILON: noise,
        gd.ModelMeanType.PREVIOUS_X: base.q_posterior_mean_variance(x_start, x_t, t)[0],
    }
    for kind, output in outputs.items():
        diffusion = gd.GaussianDiffusion(
            betas=base.betas,
            model_mean_type=kind,
            model_var_type=gd.ModelVarType.FIXED_SMALL,
            loss_type=gd.LossType.MSE,
        )
        out = diffusion.p_mean_variance(lambda x, t, o=output: o, x_t, t, clip_denoised=False)
        torch.testing.assert_close(out["pred_xstart"], x_start, rtol=0, atol=2e-3)
        want = outputs[gd.ModelMeanType.PREVIOUS_X]
        torch.testing.assert_close(out["mean"], want, rtol=0, atol=1e-4)
        losses = diffusion.training_losses(lambda x, t, o=output: o, x_start, t, noise=noise)
        assert losses["mse"].abs().max() < 1e-8


def test_the_prior_costs_its_divergence_from_the_normal_distribution_in_bits():
    """Kullback-Leibler divergence of N(sqrt(ᾱ) x, 1 - ᾱ) from N(0, 1), by hand."""
    kinds = {
        "model_mean_type": gd.ModelMeanType.EPSILON,
        "model_var_type": gd.ModelVarType.FIXED_LARGE,
        "loss_type": gd.LossType.MSE,
    }
    diffusion = gd.GaussianDiffusion(betas=np.array([0.1, 0.2]), **kinds)
    level = 0.9 * 0.8
    nats = 0.5 * (level * 0.25 + (1 - level) - 1 - np.log(1 - level))
    got = diffusion._prior_bpd(torch.full((1, 3, 2, 2), 0.5))
    assert got.item() == pytest.approx(nats / np.log(2), rel=1e-5)
