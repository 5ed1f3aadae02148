"""Folders that diffusers itself has saved: the same trajectories, and all commands of ours."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from esddpm_io.errors import UserError
from guided_diffusion import early_stop, load_network
from guided_diffusion.respace import SpacedDiffusion
from guided_diffusion.sampling.sampler import Sampler
from guided_diffusion.settings.record import diffusion_from
from guided_diffusion.settings.resolver import resolve_network
from guided_diffusion.solvers import evaluation_timesteps
from tests.small_pipelines import PROCESSES, SCALED, SIZE, save
from tests.tiny_sampling import read_job

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

T_PRIME, STEPS = 500, 5
TRAILING, LEADING = [499, 399, 299, 199, 99], [400, 300, 200, 100, 0]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> str:
    return save(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def conditional(tmp_path_factory) -> str:
    return save(tmp_path_factory.mktemp("conditional"), classes=10, **SCALED)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Six images with labels 0 ... 9."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("images") / "images.npz"
    pixels = rng.integers(0, 256, (6, SIZE, SIZE, 3), dtype=np.uint8)
    np.savez(path, pixels, rng.integers(0, 10, len(pixels)))
    return path


def flags_for(folder: str, images: Path, save_dir: Path, *more: str) -> list[str]:
    """Flags of a sampling script: 3 steps of DPM-Solver++ from T'."""
    flags = {"model_path": folder, "dataset_path": images, "save_dir": save_dir, "device": "cpu"}
    flags |= {"t_prime": T_PRIME, "steps": 3, "sampler": "dpmpp_2m_sde", "seed": 3}
    return [*(part for k, v in flags.items() for part in (f"--{k}", str(v))), *more]


@torch.inference_mode()
def of_diffusers(
    scheduler, unet, x: torch.Tensor, noises, y=None, timesteps=TRAILING
) -> list[torch.Tensor]:
    """x after each of the last STEPS steps of ten from T, by the scheduler of diffusers."""
    scheduler.set_timesteps(10)
    tail = scheduler.timesteps[-STEPS:]
    assert tail.tolist() == timesteps
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


def start(
    network, first_timestep: int = T_PRIME - 1
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Clean images, these diffused to the first timestep, and the noise of each step."""
    torch.manual_seed(1)
    clean = torch.rand(3, 3, SIZE, SIZE) * 2 - 1
    first, *noises = [torch.randn_like(clean) for _ in range(1 + STEPS)]
    whole = diffusion_from(network.resolved.process, "")
    return clean, whole.q_sample(clean, torch.full((3,), first_timestep), first), [first, *noises]


@torch.inference_mode()
def ours(network, sampler: str, clean, noises, y=None, timesteps=None) -> list[torch.Tensor]:
    whole, drawn = diffusion_from(network.resolved.process, ""), iter(noises)
    loop = whole.solver_sample_loop_progressive if sampler == "dpmpp_2m" else None
    how = {"noise": clean, "clip_denoised": False, "randn": lambda x: next(drawn)}
    how["model_kwargs"] = {} if y is None else {"y": y}
    if loop is None:
        chain = SpacedDiffusion(
            timesteps or evaluation_timesteps(whole.alphas_cumprod, T_PRIME, STEPS),
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
        # diffusers adds noise to the clean image unless the last step is of timestep 0, as below.
        found, expected = found[:-1], expected[:-1]
    assert_same(found, expected)


def test_the_last_step_of_a_learned_variance(tmp_path):
    path = save(tmp_path, **PROCESSES["learned variance"])
    network = load_network(path, "cpu")
    unet = diffusers.UNet2DModel.from_pretrained(path, subfolder="unet")
    scheduler = diffusers.DDPMScheduler.from_pretrained(path, subfolder="scheduler")
    clean, x, noises = start(network, LEADING[0])
    found = ours(network, "ddpm", clean, noises, timesteps=LEADING)
    assert_same(found, of_diffusers(scheduler, unet, x, noises[1:], timesteps=LEADING))


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


@pytest.mark.parametrize("with_classes", [False, True])
def test_the_scripts_and_the_python_call_sample_the_same(
    plain, conditional, images, tmp_path, with_classes
):
    folder = conditional if with_classes else plain
    engine = Sampler(read_job(flags_for(folder, images, tmp_path), guided=False))
    expected, _ = engine.sample(0, 6)
    with np.load(images) as npz:
        given = npz["arr_0"], npz["arr_1"] if with_classes else None
    found = early_stop(
        load_network(folder, "cpu"), given[0], T_PRIME, 3, "dpmpp_2m_sde", 3, labels=given[1]
    )
    np.testing.assert_array_equal(found, expected)
    # Batches of another size round otherwise.
    parts = np.concatenate([engine.sample(i, i + 2)[0] for i in (0, 2, 4)])
    assert np.abs(parts.astype(int) - expected).max() <= 1


def test_from_noise_labels_are_of_the_network(conditional, images, tmp_path):
    flags = flags_for(conditional, images, tmp_path, "--start_from_scratch")
    for name in ("--dataset_path", "--t_prime"):
        del flags[flags.index(name) : flags.index(name) + 2]
    engine = Sampler(read_job([*flags, "--num_samples", "40"], guided=False))
    labels = engine.sample(0, 40)[1]
    assert labels.max() < 10 and len(set(labels.tolist())) > 3


def test_half_precision_computes_in_it(plain, images, tmp_path):
    job = read_job(flags_for(plain, images, tmp_path, "--precision", "bfloat16"), guided=False)
    assert job.run.network.precision == "bfloat16"
    from guided_diffusion.sampling.sampler import place

    network = load_network(plain, "cpu").module
    x, t = torch.randn(2, 3, SIZE, SIZE), torch.tensor([3, 700])
    exact = network(x, t)
    place(network, torch.device("cpu"), torch.bfloat16)
    rounded = network(x, t)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.1 * exact.abs().max()


def identity(folder: str, images: Path, save_dir: Path) -> str:
    return read_job(flags_for(folder, images, save_dir), guided=False).run.identity


def test_samples_are_told_apart_by_tensors_and_process(plain, images, tmp_path):
    one = identity(plain, images, tmp_path)
    shutil.copytree(plain, tmp_path / "copy")
    assert identity(str(tmp_path / "copy"), images, tmp_path) == one
    others = {
        identity(save(tmp_path / name.replace(" ", "_"), **process), images, tmp_path)
        for name, process in PROCESSES.items()
        if name != "epsilon, linear"
    }
    assert one not in others and len(others) == len(PROCESSES) - 1


def test_the_process_is_found_whatever_the_scheduler(plain, tmp_path):
    shutil.copytree(plain, tmp_path / "ddim")
    kept = {"beta_end": 0.012, "prediction_type": "v_prediction", "num_train_timesteps": 500}
    diffusers.DDIMScheduler(**kept).save_pretrained(tmp_path / "ddim" / "scheduler")
    process = load_network(str(tmp_path / "ddim"), "cpu").resolved.process
    assert process["noise_schedule"] == "linear 0.0001 0.012"
    assert process["v_prediction"] and not process["predict_xstart"]
    assert process["diffusion_steps"] == 500


def test_a_u_net_alone_needs_its_scheduler(plain, tmp_path):
    shutil.copytree(Path(plain) / "unet", tmp_path / "unet")
    path = str(tmp_path / "unet")
    with pytest.raises(UserError, match="scheduler_config.json"):
        resolve_network("model", path, flag="A", typed={"noise_schedule": "cosine"})
    shutil.copy(Path(plain) / "scheduler" / "scheduler_config.json", path)
    with_pipeline = resolve_network("model", str(plain), flag="A", typed={}).flags
    assert resolve_network("model", path, flag="A", typed={}).flags == with_pipeline


def unet_with(**changes):
    def change(folder: Path) -> None:
        path = folder / "unet" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def scheduler_with(**changes):
    def change(folder: Path) -> None:
        path = folder / "scheduler" / "scheduler_config.json"
        kept = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({k: v for k, v in kept.items() if v is not KeyError}))

    return change


def index_with(**changes):
    return lambda folder: (folder / "model_index.json").write_text(json.dumps(changes))


def _cut_weights(folder: Path) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (index_with(_class_name="LDMPipeline", vqvae=["x", "y"]), "LDMPipeline with vqvae"),
        (unet_with(_class_name="UNet2DConditionModel"), "UNet2DConditionModel"),
        (unet_with(in_channels=4), "3 channels"),
        (unet_with(sample_size=[8, 16]), "not square"),
        (unet_with(class_embed_type="timestep"), "classes in another form"),
        (unet_with(layers_per_block=2), "size mismatch"),
        (unet_with(num_class_embeds=3), "tensors missing: class_embedding.weight"),
        (scheduler_with(variance_type="learned_range"), "variance_type"),
        (scheduler_with(prediction_type="flow"), "prediction_type must be"),
        (scheduler_with(beta_schedule="sigmoid"), "beta_schedule must be"),
        (scheduler_with(beta_schedule=KeyError, trained_betas=None), "no betas"),
        (scheduler_with(rescale_betas_zero_snr=True), "rescale_betas_zero_snr"),
        (_cut_weights, "cannot read"),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_reason(plain, tmp_path, change, reason):
    folder = Path(shutil.copytree(plain, tmp_path / "folder"))
    change(folder)
    with pytest.raises(UserError, match=reason) as error:
        resolve_network("model", str(folder), flag="--model_path", typed={})
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_flags_that_contradict_the_folder_are_refused(plain):
    for typed, reason in (
        ({"num_channels": 64}, "--num_channels: the folder"),
        ({"noise_schedule": "cosine"}, "--noise_schedule is cosine .typed. but linear .config of"),
        ({"image_size": 64}, "--image_size is 64"),
    ):
        with pytest.raises(UserError, match=reason):
            resolve_network("model", plain, flag="--model_path", typed=typed)
    with pytest.raises(UserError, match="not a classifier"):
        resolve_network("classifier", plain, flag="--classifier_path", typed={})


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_the_hub_s_models_are_its_folders(plain, tmp_path):
    """As the Hub's client keeps them; it is told to fetch nothing."""
    repository = tmp_path / "hub" / "models--me--small"
    shutil.copytree(plain, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    for name in ("main", "v1"):
        (repository / "refs" / name).write_text(COMMIT)
    code = (
        "import sys\n"
        "from guided_diffusion import load_network\n"
        "for path in sys.argv[1:]: print(load_network(path, 'cpu').record.path)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, "hf://me/small", "hf://me/small@v1", "hf://me/other"],
        env={**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert found.stdout.split() == [str(repository / "snapshots" / COMMIT)] * 2
    assert "path: cannot fetch hf://me/other: " in found.stderr.splitlines()[-1]
