"""image_sample, classifier_sample, super_res_sample and image_nll."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from esddpm_io.errors import UserError
from guided_diffusion import logger, script_util
from guided_diffusion.checkpoints import load_weights, write_sidecar
from guided_diffusion.commands import classifier_sample, image_nll, image_sample, super_res_sample
from tests.golden_values import fill
from tests.tiny_sampling import MODEL, SCRIPTS, TinyFiles
from tests.waiting import PATIENCE_S, wait_until

FLAGS = [part for name, value in MODEL.items() for part in (f"--{name}", str(value))]
CHAIN = ["--timestep_respacing", "3", "--num_samples", "5", "--batch_size", "2"]
SUPER_RES = {
    "large_size": 64,
    "small_size": 16,
    "num_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": "8",
    "class_cond": True,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return TinyFiles(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a script's main with a log folder; returns all that it printed."""
    before = signal.getsignal(signal.SIGTERM)

    def call(script, log, *argv):
        monkeypatch.setenv("OPENAI_LOGDIR", str(log))
        script.main([str(word) for word in argv])
        captured = capsys.readouterr()
        return captured.out + captured.err

    yield call
    logger.reset()
    signal.signal(signal.SIGTERM, before)


def test_image_sample(run, tiny, tmp_path):
    said = run(image_sample, tmp_path, "--model_path", tiny.model, *FLAGS, *CHAIN)
    with np.load(tmp_path / "samples_5x8x8x3.npz") as samples:
        assert samples["arr_0"].shape == (5, 8, 8, 3)
        assert samples["arr_0"].dtype == np.uint8
        assert samples["arr_0"].std() > 0
        assert samples["arr_1"].shape == (5,)
    assert "samples_5x8x8x3.npz" in said
    assert "samples_5x8x8x3.npz" in (tmp_path / "log.txt").read_text()


def test_a_sidecar_saves_typing_the_flags(run, tiny, tmp_path):
    model = tmp_path / "model000007.pt"
    shutil.copy(tiny.model, model)
    write_sidecar(str(model), {**script_util.model_and_diffusion_defaults(), **MODEL})
    said = run(image_sample, tmp_path / "a", "--model_path", model, *CHAIN)
    assert "flags from the sidecar" in said
    run(image_sample, tmp_path / "b", "--model_path", tiny.model, *FLAGS, *CHAIN)
    name = "samples_5x8x8x3.npz"
    with np.load(tmp_path / "a" / name) as one, np.load(tmp_path / "b" / name) as two:
        np.testing.assert_array_equal(one["arr_0"], two["arr_0"])
        np.testing.assert_array_equal(one["arr_1"], two["arr_1"])


def test_classifier_sample_guides_an_unconditional_model(run, tiny, tmp_path):
    flags = {**MODEL, "class_cond": False}
    model, _ = script_util.create_model_and_diffusion(
        **{**script_util.model_and_diffusion_defaults(), **flags}
    )
    path = tmp_path / "plain.pt"
    torch.save(fill(model).state_dict(), path)
    argv = ["--model_path", path, *FLAGS, "--class_cond", "False", *CHAIN]
    # The tiny classifier has the names and shapes of its flags, so they need not be typed.
    argv += ["--classifier_path", tiny.classifier]
    outputs = []
    for scale in ("40", "0"):
        run(classifier_sample, tmp_path / scale, *argv, "--classifier_scale", scale)
        with np.load(tmp_path / scale / "samples_5x8x8x3.npz") as samples:
            outputs.append(samples["arr_0"])
            assert ("arr_1" in samples.files) == (scale != "0")
    assert (outputs[0] != outputs[1]).any()


@pytest.fixture(scope="module")
def enlarger(tmp_path_factory):
    """A super-resolution model, and three images of 16 × 16 with labels."""
    root = tmp_path_factory.mktemp("enlarger")
    flags = {**script_util.sr_model_and_diffusion_defaults(), **SUPER_RES}
    model, _ = script_util.sr_create_model_and_diffusion(**flags)
    torch.save(fill(model).state_dict(), root / "upsampler.pt")
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    np.savez(root / "small.npz", arr_0=pixels, arr_1=np.array([1, 20, 300]))
    return root


def test_super_res_sample_enlarges_the_base_samples_in_turn(run, enlarger, tmp_path):
    flags = [part for name, value in SUPER_RES.items() for part in (f"--{name}", str(value))]
    argv = ["--model_path", enlarger / "upsampler.pt", *flags]
    argv += ["--base_samples", enlarger / "small.npz"]
    argv += ["--timestep_respacing", "2", "--num_samples", "4", "--batch_size", "3"]
    run(super_res_sample, tmp_path, *argv)
    with np.load(tmp_path / "samples_4x64x64x3.npz") as samples:
        assert samples["arr_1"].tolist() == [1, 20, 300, 1]
        images = samples["arr_0"].astype(float)
    assert images.shape == (4, 64, 64, 3)
    assert (images[0] != images[3]).any()  # the same small image, but noise of its own


def test_super_res_errors(run, enlarger, tiny, tmp_path):
    argv = ["--model_path", enlarger / "upsampler.pt", "--num_channels", "32"]
    for more, message in (
        ([], "^--base_samples: name the .npz file or folder"),
        (["--base_samples", tiny.images], "^--base_samples: the images of"),
        (["--base_samples", enlarger / "none.npz"], "^--base_samples: there is no file"),
    ):
        with pytest.raises(UserError, match=message):
            run(super_res_sample, tmp_path, *argv, *more)


def test_image_nll_is_the_bound_of_the_library(run, tiny, tmp_path):
    argv = ["--model_path", tiny.model, *FLAGS, "--data_dir", tiny.images, "--batch_size", "4"]
    chain = ["--timestep_respacing", "3", "--num_samples", "6", "--seed", "5"]
    said = run(image_nll, tmp_path, *argv, *chain)
    flags = {**script_util.model_and_diffusion_defaults(), **MODEL, "timestep_respacing": "3"}
    model, diffusion = script_util.create_model_and_diffusion(**flags)
    load_weights(model, str(tiny.model), flag="--model_path")
    with np.load(tiny.images) as images:
        pixels, labels = images["arr_0"], torch.from_numpy(images["arr_1"])
    batches = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous() / 127.5 - 1
    torch.manual_seed(5)
    with torch.no_grad():
        parts = [
            diffusion.calc_bpd_loop(model, batches[rows], model_kwargs={"y": labels[rows]})
            for rows in (slice(0, 4), slice(4, 6))
        ]
    expected = torch.cat([part["total_bpd"] for part in parts]).mean().item()
    reported = float(said.split("done 6 samples: bpd=")[1].split()[0])
    assert reported == pytest.approx(expected, rel=1e-4)
    for name in ("vb", "mse", "xstart_mse"):
        with np.load(tmp_path / f"{name}_terms.npz") as terms:
            mean = torch.cat([part[name] for part in parts]).mean(dim=0)
            np.testing.assert_allclose(terms["arr_0"], mean.numpy(), rtol=1e-4)


def test_bad_input_is_one_line(run, tiny, tmp_path):
    argv = ["--model_path", tiny.model, *FLAGS]
    for script, more, message in (
        (image_sample, ["--num_samples", "0"], "--num_samples is 0, it must be at least 1"),
        (image_sample, ["--model_path", "none.pt"], "--model_path: there is no file none.pt"),
        (image_sample, ["--timestep_respacing", "2000"], "--timestep_respacing"),
        (image_sample, ["--num_res_blocks", "2"], "does not fit the model flags"),
        (classifier_sample, [], "--classifier_path: name the checkpoint file"),
        (image_nll, [], "--data_dir: give a folder of images or an .npz file"),
        (image_nll, ["--data_dir", "none.npz"], "none.npz"),
    ):
        with pytest.raises(UserError, match=message) as error:
            run(script, tmp_path, *argv, *more)
        assert "\n" not in str(error.value)


def test_image_nll_of_an_early_stopped_network_is_refused(run, tiny, tmp_path):
    model = tmp_path / "model.pt"
    shutil.copy(tiny.model, model)
    flags = {**script_util.model_and_diffusion_defaults(), **MODEL}
    write_sidecar(str(model), flags, early_stop_steps=500)
    argv = ["--model_path", model, "--data_dir", tiny.images]
    with pytest.raises(UserError, match=r"--model_path: .*model\.pt was .* below T' = 500 only"):
        run(image_nll, tmp_path, *argv)


def test_a_stopped_sampler_names_the_command_that_goes_on(tiny, tmp_path):
    """In a temporary log folder too, which nobody would find otherwise."""
    chain = ["--timestep_respacing", "50", "--num_samples", "10000", "--batch_size", "1"]
    script = str(SCRIPTS / "image_sample.py")
    command = [sys.executable, script, "--model_path", str(tiny.model), *FLAGS, *chain]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: list(tmp_path.glob("*/chunks/*/0*.npz")), process)
    process.terminate()
    said = process.communicate(timeout=PATIENCE_S)[1]
    folder = next(tmp_path.glob("*/chunks")).parent
    again = f"OPENAI_LOGDIR={folder} {' '.join(command)}"
    assert f"what is finished stays; continue with\n  {again}\n" in said
    assert process.returncode == 143


LAUNCHERS = {
    "torchrun": [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
    ],
    "mpiexec": [str(Path(sys.executable).with_name("mpiexec")), "-n", "2", sys.executable],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_share_the_work(run, tiny, tmp_path, launcher):
    alone, together = tmp_path / "alone", tmp_path / "together"
    argv = ["--model_path", tiny.model, *FLAGS, *CHAIN, "--device", "cpu"]
    run(image_sample, alone, *argv)
    result = subprocess.run(
        [*LAUNCHERS[launcher], SCRIPTS / "image_sample.py", *argv],
        env={**os.environ, "OPENAI_LOGDIR": str(together), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    name = "samples_5x8x8x3.npz"
    with np.load(alone / name) as one, np.load(together / name) as two:
        np.testing.assert_array_equal(one["arr_0"], two["arr_0"])
        np.testing.assert_array_equal(one["arr_1"], two["arr_1"])
    assert os.listdir(together / "workers") == []  # both have ended as they should
