"""--generator through the command lines: one sample for an index, whoever makes its start image."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from esddpm_io.errors import UserError
from guided_diffusion import early_stop, load_network
from guided_diffusion.commands import driver, propose, sample, sweep
from guided_diffusion.sampling.generators import GeneratedImages, load_generator
from tests.small_pipelines import save
from tests.tiny_sampling import IMAGE_SIZE, SCRIPTS, TinyFiles, chunks, read_job, run_script

DRIVER = "generate_processes_diffusion_and_reverse.py"
MODULE = f"""
import torch

class Tiny(torch.nn.Module):
    latent_shape, num_classes = (4,), 1000

    def __init__(self, device):
        super().__init__()
        weight = torch.arange(4.0 * 3 * {IMAGE_SIZE**2}).view(4, -1).sin()
        self.weight = torch.nn.Parameter(weight.to(device))

    def forward(self, latents, labels):
        out = (latents @ self.weight + labels[:, None] / 1000 - 0.5) / 2
        return out.view(-1, 3, {IMAGE_SIZE}, {IMAGE_SIZE}).tanh()

def without_classes(device):
    def generate(latents):
        return latents
    generate.latent_shape = (3, {IMAGE_SIZE}, {IMAGE_SIZE})
    return generate

def of_another_size(device):
    def generate(latents, labels):
        return latents
    generate.latent_shape, generate.num_classes = (3, 4, 4), 1000
    return generate

def with_flags_of_its_own(device):
    import argparse
    argparse.ArgumentParser().parse_args(["--of_the_driver"])

def leaves(device):
    raise SystemExit(0)

def broken(device):
    raise OSError("no weights\\nhere")
"""
COUNT = 20


@pytest.fixture(scope="module")
def module(tiny) -> Path:
    path = tiny.root / "my_gan.py"
    path.write_text(MODULE)
    return path


@pytest.fixture(scope="module")
def made(module) -> GeneratedImages:
    return GeneratedImages(load_generator(f"{module}:Tiny", torch.device("cpu")), COUNT, 3)


def flags(tiny: TinyFiles, output: Path, **changes: object) -> list[str]:
    values = {
        "dataset": tiny.root / "tiny.toml",
        "generator": f"{tiny.root / 'my_gan.py'}:Tiny",
        "limit": COUNT,
        "t_prime": 300,
        "steps": 2,
        "sampler": "dpmpp_2m_sde",
        "seed": 3,
        "batch_size": 4,
        "devices": "cpu",
        "eval_backend": "torch",
        "output_dir": output,
        **changes,
    }
    given = {name: value for name, value in values.items() if value is not None}
    return [part for key, value in given.items() for part in (f"--{key}", str(value))]


@pytest.fixture(scope="module")
def whole(tiny, module) -> Path:
    """A driver in the generator's folder, one process, evaluated."""
    argv = flags(tiny, "out", generator="my_gan:Tiny")
    done = run_script(DRIVER, "--execute", *argv, cwd=tiny.root)
    assert done.returncode == 0, done.stdout + done.stderr
    return tiny.root / "out"


def all_of(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(folder / "samples_all.npz") as npz:
        return npz["arr_0"], npz["arr_1"]


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal but for a rounding of the network's, whose batches differ."""
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1


def test_the_same_as_from_an_npz_of_the_images(tiny, whole, made, tmp_path):
    npz = tmp_path / "made.npz"
    np.savez(npz, made.read(0, COUNT), made.labels(0, COUNT))
    argv = flags(tiny, tmp_path / "out", generator=None, dataset_path=npz)
    driver.main(["--execute", "--not_eval_metrics", *argv])
    for found, expected in zip(all_of(whole), all_of(tmp_path / "out"), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_two_processes_other_batches_and_a_longer_run_make_the_same(tiny, whole, tmp_path):
    out = tmp_path / "out"
    short = flags(tiny, out, generator="my_gan:Tiny", limit=7, batch_size=3, devices="cpu,cpu")
    run_script(DRIVER, "--execute", "--not_eval_metrics", *short, cwd=tiny.root, check=True)
    argv = flags(tiny, out, generator="my_gan:Tiny", batch_size=5, devices="cpu,cpu", limit=None)
    more = ["--num_samples", COUNT, "--execute", "--not_eval_metrics"]
    run_script(DRIVER, *argv, *more, cwd=tiny.root, check=True)
    images, labels = all_of(out)
    expected, expected_labels = all_of(whole)
    assert_close(images, expected)
    np.testing.assert_array_equal(labels, expected_labels)


def test_a_pipeline_and_a_denoiser_of_diffusers_with_classes(tiny, tmp_path):
    """One process and batch, and two processes and smaller batches, of the driver."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    denoiser = save(tmp_path / "denoiser", classes=10)
    unet = diffusers.UNet2DModel.from_pretrained(denoiser, subfolder="unet")
    scheduler = diffusers.CMStochasticIterativeScheduler()
    pipeline = diffusers.ConsistencyModelPipeline(unet, scheduler)
    pipeline.save_pretrained(tmp_path / "one_step")
    own = {"generator": tmp_path / "one_step", "model_path": denoiser, "limit": 18}
    argv = flags(
        tiny, tmp_path / "two", **own, classifier_guidance_scale=0, devices="cpu,cpu", batch_size=5
    )
    driver.main(["--execute", "--not_eval_metrics", *argv])
    own |= {"t_prime": 300, "steps": 2, "sampler": "dpmpp_2m_sde", "seed": 3, "device": "cpu"}
    one = [part for key, value in own.items() for part in (f"--{key}", str(value))]
    one += ["--save_dir", str(tmp_path / "one"), "--batch_size", "18"]
    sample.main(one, guided=False)
    (found, labels), (expected, expected_labels) = (
        all_of(tmp_path / "two"),
        chunks(tmp_path / "one"),
    )
    assert_close(found, expected)
    np.testing.assert_array_equal(labels, expected_labels)
    assert len(found) == 18 and 5 < len(set(labels.tolist())) <= 10


def test_what_a_run_says_of_its_generator(tiny, whole, tmp_path):
    metrics = json.loads((whole / "metrics.json").read_text())
    start = metrics["run"]["start"]
    assert (start["kind"], start["path"]) == ("generator", "my_gan:Tiny")
    assert metrics["inputs"]["start_images"] == {"path": "my_gan:Tiny", "sha256": start["contents"]}
    assert metrics["point"]["t_prime"] == 300 and metrics["point"]["samples"] == COUNT
    again = ["--again", whole / "metrics.json", "--output_dir", tmp_path, "--execute"]
    place = ["--devices", "cpu", "--not_eval_metrics"]
    done = run_script(DRIVER, *again, *place, cwd=tiny.root, check=True)
    assert "all inputs are what they were" in done.stdout
    np.testing.assert_array_equal(all_of(tmp_path)[0], all_of(whole)[0])


def test_a_generator_that_has_changed_is_another_run(tiny, module, tmp_path):
    folder = tmp_path / "project"
    folder.mkdir()
    shutil.copy(module, folder)
    argv = flags(tiny, tmp_path / "out", generator="my_gan:Tiny")
    run_script(DRIVER, *argv, cwd=folder, check=True)
    (folder / "my_gan.py").write_text(MODULE.replace("/ 2", "/ 3"))
    worker = ["--settings", tmp_path / "out" / "settings.json", "--device", "cpu"]
    done = run_script("classifier_sample_diffusion_and_reverse.py", *worker, cwd=folder)
    assert done.returncode == 2 and "my_gan:Tiny has changed since the run's" in done.stderr


@pytest.mark.parametrize("guided", [False, True])
def test_the_sampling_scripts_take_it(tiny, module, made, tmp_path, guided):
    own = {"generator": f"{module}:Tiny", "dataset_path": None, "seed": 3, "num_samples": 6}
    by_function, by_file = tmp_path / "function", tmp_path / "file"
    np.savez(tmp_path / "made.npz", made.read(0, 6), made.labels(0, 6))
    make = tiny.guided_flags if guided else tiny.worker_flags
    argv = make(by_function, **own)
    at = argv.index("--dataset_path")
    argv = argv[:at] + argv[at + 2 :]
    limited = read_job([*argv, "--limit", "3"], guided=guided)
    assert limited.run.num_samples == 3
    assert "--num_samples has no effect with --limit, which goes first" in limited.remarks
    sample.main(argv, guided=guided)
    sample.main(make(by_file, seed=3, dataset_path=tmp_path / "made.npz"), guided=guided)
    for found, expected in zip(chunks(by_function), chunks(by_file), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_sweep_with_the_generator_itself(tiny, module, made, tmp_path):
    argv = flags(tiny, tmp_path, t_prime="0,300", seed="3,4", limit=12)
    sweep.main(argv)
    names = {path.parent.name for path in tmp_path.glob("*/metrics.json")}
    point = "dpmpp_2m_sde_t300_2_steps"
    assert names == {f"{name}_seed{seed}" for name in ("generator", point) for seed in (3, 4)}
    images, labels = all_of(tmp_path / "generator_seed3")
    np.testing.assert_array_equal(images, made.read(0, 12))
    np.testing.assert_array_equal(labels, made.labels(0, 12))
    other = all_of(tmp_path / "generator_seed4")[0]
    assert (other != images).any(axis=(1, 2, 3)).all()
    record = json.loads((tmp_path / "generator_seed4" / "metrics.json").read_text())
    assert record["inputs"]["start_images"]["path"] == f"{module}:Tiny"
    assert (tmp_path / "report.html").exists()


def test_a_proposal_of_t_prime(tiny, module, made, tmp_path, capsys):
    own = {"generator": f"{module}:Tiny", "t_prime": None, "output_dir": None, "limit": None}
    argv = flags(tiny, tmp_path, **own, num_images=6, json=tmp_path / "function.json")
    propose.main(argv)
    assert f"--generator {module}:Tiny" in capsys.readouterr().out
    np.savez(tmp_path / "made.npz", made.read(0, 6), made.labels(0, 6))
    own |= {"generator": None, "dataset_path": tmp_path / "made.npz"}
    propose.main(flags(tiny, tmp_path, **own, num_images=6, json=tmp_path / "file.json"))
    found, expected = (
        json.loads((tmp_path / f"{name}.json").read_text())["proposal"]
        for name in ("function", "file")
    )
    assert found == expected


def test_the_python_call_takes_the_function(tiny, module, made):
    known = {"num_heads": 4, "use_new_attention_order": False, "noise_schedule": "linear"}
    network = load_network(str(tiny.model), "cpu", image_size=IMAGE_SIZE, **known)
    generator = load_generator(f"{module}:Tiny", torch.device("cpu")).function
    found = early_stop(network, generator, 300, 2, seed=3, num_samples=COUNT, batch_size=7)
    images, labels = made.read(0, COUNT), made.labels(0, COUNT)
    expected = early_stop(network, images, 300, 2, seed=3, labels=labels, batch_size=7)
    np.testing.assert_array_equal(found, expected)
    small = load_generator(f"{module}:of_another_size", torch.device("cpu")).function
    for message, wanted, given in (
        ("^num_samples must be at least 1 with a generator, not 0", generator, {}),
        ("^labels: leave them out", generator, {"num_samples": 2, "labels": labels[:2]}),
        ("^num_samples: leave it out with an array", images, {"num_samples": 2}),
        ("^images: the images of the generator are 4x4", small, {"num_samples": 2}),
        ("^images: the generator needs an attribute latent_shape", abs, {"num_samples": 2}),
    ):
        with pytest.raises(ValueError, match=message):
            early_stop(network, wanted, 300, 2, **given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset_path": "x.npz"}, "--generator and --dataset_path exclude each other"),
        ({"generator": "my_gan"}, "--generator: 'my_gan' is not MODULE:FUNCTION"),
        ({"generator": "{}:without_classes"}, "--generator: .* has no labels.* num_classes of a"),
        ({"generator": "{}:of_another_size"}, "--generator: .* are 4x4, the network takes 8x8"),
        (
            {"generator": "{}:with_flags_of_its_own"},
            "of_its_own: its code ended the process",
        ),
        ({"generator": "{}:leaves"}, "leaves: its code ended the process"),
        ({"generator": "{}:broken"}, r"broken: OSError: no weights here \(.*my_gan\.py:\d+\)$"),
    ],
)
def test_what_is_refused_before_anything_is_sampled(tiny, module, tmp_path, changes, message):
    changes = {name: text.format(module) for name, text in changes.items()}
    with pytest.raises(UserError, match=message):
        driver.main(["--execute", *flags(tiny, tmp_path / "out", **changes)])
    assert not (tmp_path / "out").exists()


def test_function_and_file_exclude_each_other(tiny, module, tmp_path):
    both = {"dataset_path": tiny.images}
    message = "--generator and --dataset_path exclude each other"
    with pytest.raises(UserError, match=message):
        driver.main(["--execute", *flags(tiny, tmp_path / "out", **both)])
    with pytest.raises(UserError, match=message):
        sweep.main(flags(tiny, tmp_path / "out", t_prime="0,300", **both))
    with pytest.raises(UserError, match=message):
        sample.main(tiny.worker_flags(tmp_path, generator=f"{module}:Tiny"), guided=False)


def test_the_example_with_emoji32(tmp_path):
    """The three commands of docs/bring_your_own.md, with fewer images."""
    repository = SCRIPTS.parent
    page = (repository / "docs" / "bring_your_own.md").read_text()
    block = page.split("### Three commands")[1].split("```bash\n")[1].split("```")[0]
    lines = block.replace("\\\n", " ").replace("exps/", f"{tmp_path}/").splitlines()
    commands = [line.split()[1:] for line in lines if line.startswith("python ")]
    assert len(commands) == 3
    for script, *argv in commands:
        few = ["--limit", "16", "--devices", "cpu", "--eval_backend", "torch"]
        few = ["--backend", "torch"] if "evaluator" in script else few
        done = run_script(repository / script, *argv, *few, cwd=repository)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "Frechet distance (emoji32 features)" in done.stdout
    assert len(list((tmp_path / "sweep").glob("*/metrics.json"))) == 3
