import re

import numpy as np
import pytest
import torch

from esddpm_io.errors import UserError
from guided_diffusion.checkpoints import load_weights
from guided_diffusion.pixels import to_uint8
from guided_diffusion.respace import SpacedDiffusion
from guided_diffusion.rng import RandomStreams
from guided_diffusion.sampling import sampler as sampler_module
from guided_diffusion.sampling.sampler import Sampler, choose_device, dtype_on, set_tf32
from guided_diffusion.script_util import (
    classifier_defaults,
    create_classifier,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)
from guided_diffusion.settings.record import PRECISIONS
from tests.golden_values import fill
from tests.tiny_sampling import CLASSIFIER, IMAGE_SIZE, MODEL, read_job


def by_the_library(
    tiny, start: int, stop: int, loop: str, scale: float, use_timesteps=None, **options: object
) -> np.ndarray:
    """Samples start … stop-1 by the library's own loops, without the engine."""
    flags = {**model_and_diffusion_defaults(), **MODEL, "timestep_respacing": "5"}
    model, diffusion = create_model_and_diffusion(**flags)
    if use_timesteps is not None:
        diffusion = SpacedDiffusion(
            use_timesteps=use_timesteps,
            betas=diffusion.original_betas,
            model_mean_type=diffusion.model_mean_type,
            model_var_type=diffusion.model_var_type,
            loss_type=diffusion.loss_type,
        )
    else:
        options = {"denoise_steps": 2, **options}
    load_weights(model, str(tiny.model), flag="")
    classifier = create_classifier(
        **{**classifier_defaults(), **CLASSIFIER, "image_size": IMAGE_SIZE}
    )
    load_weights(classifier, str(tiny.classifier), flag="")

    def gradient(x, t, y):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            log_probability = -torch.nn.functional.cross_entropy(
                classifier(x, t), y, reduction="sum"
            )
            return torch.autograd.grad(log_probability, x)[0] * scale

    with np.load(tiny.images) as npz:
        images, labels = npz["arr_0"][start:stop], npz["arr_1"][start:stop]
    clean = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    samples = getattr(diffusion, loop)(
        model.eval(),
        clean.shape,
        noise=clean,
        cond_fn=gradient if scale else None,
        model_kwargs={"y": torch.from_numpy(labels)},
        randn=RandomStreams(0, start, stop).randn,
        **options,
    )
    return to_uint8(samples)


@pytest.mark.parametrize("scale", [0.0, 50.0])
@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_samples_are_those_of_the_library(tiny, tmp_path, loop, scale):
    changes = {"use_ddim": loop.startswith("ddim"), "classifier_scale": scale}
    job = read_job(tiny.guided_flags(tmp_path, **changes), guided=True)
    images, labels = Sampler(job).sample(3, 7)
    expected = by_the_library(tiny, 3, 7, loop, scale)
    # Truncation to bytes may turn a rounding of 1e-6 into 1.
    assert np.abs(images.astype(int) - expected).max() <= 1
    assert (images == expected).mean() > 0.99
    np.testing.assert_array_equal(labels, np.load(tiny.images)["arr_1"][3:7])


def test_ddim_with_eta(tiny, tmp_path):
    job = read_job(tiny.worker_flags(tmp_path, use_ddim=True, eta=0.5), guided=False)
    images = Sampler(job).sample(3, 7)[0]
    expected = by_the_library(tiny, 3, 7, "ddim_sample_loop", 0.0, eta=0.5)
    assert np.abs(images.astype(int) - expected).max() <= 1
    without = by_the_library(tiny, 3, 7, "ddim_sample_loop", 0.0)
    assert (without != expected).mean() > 0.1


@pytest.mark.parametrize("scale", [0.0, 50.0])
@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpmpp_2m", "dpmpp_2m_sde"])
def test_samplers_by_name_are_those_of_the_library(tiny, tmp_path, name, scale):
    """The same whatever the batch, and with the timesteps of a chain the same as that chain."""
    flags = tiny.guided_flags(tmp_path, classifier_scale=scale)
    for flag in ("--timestep_respacing", "--denoise_steps"):
        del flags[flags.index(flag) : flags.index(flag) + 2]
    flags += ["--t_prime", "500", "--steps", "2", "--sampler", name]
    sampler = Sampler(read_job(flags, guided=True))
    images, labels = sampler.sample(3, 7)
    for row in range(4):
        alone = sampler.sample(3 + row, 4 + row)[0][0]
        assert np.abs(alone.astype(int) - images[row]).max() <= 1
    np.testing.assert_array_equal(labels, np.load(tiny.images)["arr_1"][3:7])
    loop = {"ddpm": "p_sample_loop", "ddim": "ddim_sample_loop"}.get(name, "solver_sample_loop")
    more = {"denoise_steps": 2}
    if loop == "solver_sample_loop":
        more = {"t_prime": 500, "sampler": name, "clip_denoised": False}
    expected = by_the_library(tiny, 3, 7, loop, scale, use_timesteps=(499, 249), **more)
    assert np.abs(images.astype(int) - expected).max() <= 1
    assert (images == expected).mean() > 0.99


def test_ddpm_with_the_posterior_s_variance(tiny, tmp_path):
    """Which is DDIM with eta 1 (DDIM, section 4.1)."""
    flags = tiny.worker_flags(tmp_path)
    learned, posterior = (
        Sampler(read_job([*flags, "--variance", kind], guided=False)).sample(3, 7)[0]
        for kind in ("learned", "posterior")
    )
    expected = by_the_library(tiny, 3, 7, "ddim_sample_loop", 0.0, eta=1.0)
    assert np.abs(posterior.astype(int) - expected).max() <= 1
    assert (learned != posterior).mean() > 0.1


def test_guidance_changes_the_samples(tiny, tmp_path):
    plain, guided = (
        Sampler(read_job(tiny.guided_flags(tmp_path, classifier_scale=scale), guided=True)).sample(
            0, 2
        )[0]
        for scale in (0.0, 50.0)
    )
    assert (plain != guided).mean() > 0.5


def test_nan_names_index_and_step(tiny, tmp_path):
    state = torch.load(tiny.model, weights_only=True)
    state["label_emb.weight"][np.load(tiny.images)["arr_1"][5]] = float("nan")
    torch.save(state, tmp_path / "nan.pt")
    flags = tiny.worker_flags(tmp_path, model_path=tmp_path / "nan.pt", clip_denoised=False)
    message = "sample 5 became NaN or infinite at step 1 of 2 (index 1 of the chain"
    with pytest.raises(UserError, match=re.escape(message)) as error:
        Sampler(read_job(flags, guided=False)).sample(4, 8)
    assert "precision" not in str(error.value)
    with pytest.raises(UserError, match="try --precision float32, and check that"):
        Sampler(read_job([*flags, "--use_fp16", "True"], guided=False)).sample(4, 8)


def test_half_precision_on_a_cpu_says_what_it_does(tiny, tmp_path, monkeypatch):
    """Without the processor's bfloat16 it is float32; so is tf32, everywhere on a CPU."""
    flags = tiny.guided_flags(tmp_path, classifier_scale=50.0)
    plain = Sampler(read_job(flags, guided=True)).sample(0, 4)[0].astype(int)
    samples = {}
    for precision, has, name in (
        ("float16", True, "bfloat16"),
        ("float16", False, "float32"),
        ("bfloat16", False, "float32"),
        ("tf32", True, "float32"),
    ):
        monkeypatch.setattr(sampler_module, "cpu_has_bfloat16", lambda has=has: has)
        said = []
        job = read_job([*flags, "--precision", precision], guided=True)
        samples[name] = Sampler(job, said.append).sample(0, 4)[0].astype(int)
        assert said == [
            f"{kind}: {precision} on a CPU: computing in {name}" for kind in ("model", "classifier")
        ]
        if name == "float32":
            np.testing.assert_array_equal(samples[name], plain)
    assert 0 < np.abs(samples["bfloat16"] - plain).mean() < 8  # of 255: the same, coarser


def test_compiled_samples_are_those_of_the_plain_network(tiny, tmp_path):
    """To a rounding, with one compilation, though the last batch is a shorter one."""
    # Every fused kernel costs the C++ compiler seconds, so the network is smaller than the others.
    small = {**MODEL, "channel_mult": "1", "attention_resolutions": "8"}
    model, _ = create_model_and_diffusion(**{**model_and_diffusion_defaults(), **small})
    torch.save(fill(model).state_dict(), tmp_path / "small.pt")
    flags = tiny.worker_flags(tmp_path, **small, model_path=tmp_path / "small.pt")
    plain = Sampler(read_job(flags, guided=False))
    compiled = Sampler(read_job([*flags, "--compile"], guided=False))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for start, stop in ((0, 4), (4, 8), (8, 10)):
        expected, labels = plain.sample(start, stop)
        images, own = compiled.sample(start, stop)
        difference = np.abs(images.astype(int) - expected)
        assert difference.max() <= 1 and (difference > 0).mean() < 0.01
        np.testing.assert_array_equal(own, labels)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_the_published_flag_is_a_precision(tiny, tmp_path):
    """Also on a device that has it: --use_fp16 True is float16, --precision wins over a sidecar."""
    gpu = torch.device("cuda")
    run = read_job(tiny.worker_flags(tmp_path, use_fp16=True), guided=False).run
    assert run.network.precision == "float16"
    names = {"tf32": "float32", "float32": "float32"}
    for precision in PRECISIONS:
        job = read_job(tiny.worker_flags(tmp_path, precision=precision), guided=False)
        assert job.run.network.precision == precision
        dtype = getattr(torch, names.get(precision, precision))
        assert dtype_on(gpu, precision) == dtype


def test_tf32_is_allowed_in_all_products_or_in_none():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        for allowed, products in ((True, "high"), (False, "highest")):
            set_tf32(allowed)
            assert torch.get_float32_matmul_precision() == products
            assert torch.backends.cudnn.allow_tf32 is allowed
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def test_a_checkpoint_that_changed_after_the_settings_were_written_is_refused(tiny, tmp_path):
    model = tmp_path / "model.pt"
    state = torch.load(tiny.model)
    torch.save(state, model)
    job = read_job(tiny.worker_flags(tmp_path, model_path=model), guided=False)
    state["out.2.bias"][0] += 1
    torch.save(state, model)
    with pytest.raises(UserError, match=r"--model_path: .*model\.pt has changed since the run's"):
        Sampler(job)


def test_devices():
    assert choose_device("cpu") == torch.device("cpu")
    for absent in ("99", "cuda:99", "tpu"):
        with pytest.raises(UserError, match=f"--device {absent} is not there; valid .*: cpu"):
            choose_device(absent)


def test_the_device_of_the_local_rank_becomes_the_current_one(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for name, value in {"RANK": "6", "WORLD_SIZE": "8", "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    assert choose_device("") == torch.device("cuda", 2) == taken[0]
    assert choose_device("cuda:3") == torch.device("cuda", 3) == taken[1]
