"""The driver, the sampling workers, gathering and status through their command lines."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from esddpm_io.errors import UserError, run_main
from esddpm_io.images import with_caption
from esddpm_io.parts import part_path
from esddpm_io.processes import PARENT_VARIABLE, running
from evaluations.features import BACKENDS
from guided_diffusion.checkpoints import write_sidecar
from guided_diffusion.commands import driver, gather, sample, scoring, status
from guided_diffusion.sampling.chunks import ChunkFolder
from guided_diffusion.sampling.heartbeat import Observer
from guided_diffusion.sampling.sources import open_generator_images
from guided_diffusion.script_util import model_and_diffusion_defaults
from guided_diffusion.settings import presets
from guided_diffusion.settings.layers import parse, without_effect
from guided_diffusion.settings.record import Run
from tests.plain_run import plain_run
from tests.tiny_sampling import (
    FEATURE_GRAPH,
    MODEL,
    NUM_IMAGES,
    SCRIPTS,
    TinyFiles,
    chunks,
    run_script,
)
from tests.waiting import PATIENCE_S, wait_until

DRIVER = "generate_processes_diffusion_and_reverse.py"
GATHER = "gather_numpyz_and_compute_fid.py"


def flags(tiny: TinyFiles, output: Path, **changes: object) -> list[str]:
    """Flags of the driver: the tiny preset, 2 of 5 steps, one process on the CPU."""
    values = {
        "dataset": tiny.root / "tiny.toml",
        "chain_length": 5,
        "reverse_steps": 2,
        "batch_size": 4,
        "devices": "cpu",
        "output_dir": output,
        **changes,
    }
    return [part for key, value in values.items() for part in (f"--{key}", str(value))]


def all_samples(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(folder / "samples_all.npz") as npz:
        assert sorted(npz.files) == ["arr_0", "arr_1"]
        return npz["arr_0"], npz["arr_1"]


def by_one_process(folder: Path, argv: list[str], guided: bool) -> tuple[np.ndarray, np.ndarray]:
    sample.main(argv, guided=guided)
    return chunks(folder)


def assert_equal(found, expected) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.fixture(scope="module")
def whole_job(tiny) -> tuple[subprocess.CompletedProcess, Path]:
    """The main job with two CPU processes and guidance, typed in another folder, evaluated."""
    argv = flags(tiny, "out", dataset="tiny.toml", devices="cpu,cpu")
    done = run_script(DRIVER, "--execute", *argv, "--save_png_files", cwd=tiny.root)
    assert done.returncode == 0, done.stdout + done.stderr
    return done, tiny.root / "out"


def test_two_processes_give_what_one_gives(tiny, tmp_path, whole_job):
    expected = by_one_process(tmp_path, tiny.guided_flags(tmp_path), guided=True)
    assert_equal(all_samples(whole_job[1]), expected)


def test_the_job_says_what_it_did(whole_job):
    done, out = whole_job
    assert "2 of 5 steps, starting at original timestep 250" in done.stdout
    assert f"output folder: {out}" in done.stdout
    assert done.stdout.count("classifier_sample_diffusion_and_reverse.py") == 2
    assert not (out / "workers").exists()
    logs = sorted(path.name for path in (out / "logs").iterdir())
    assert logs == [f"ddpm_5_length_reverse_2_steps_global_rank_{rank}.log" for rank in (0, 1)]
    assert "starting at original timestep 250" in (out / "logs" / logs[0]).read_text()


def test_metrics_are_called_what_they_are_and_kept_with_all_settings(whole_job):
    done, out = whole_job
    assert "Frechet distance (emoji32 features): " in done.stdout and "FID" not in done.stdout
    record = json.loads((out / "metrics.json").read_text())
    run = Run.from_json(record["run"], where="metrics.json")
    assert run.guidance.scale == 1.0 and run.seed == 0 and run.sampler.timesteps == (250, 0)
    assert run == ChunkFolder.load(out).run
    sampling = record["sampling"]
    assert sampling["t_prime"] == 400 and sampling["timesteps"] == [250, 0]
    assert sampling["network_evaluations_per_image"] == 2
    assert sampling["seconds_per_image"] > 0 and sampling["processes"] in (1, 2)
    assert sum(sampling["devices"].values()) == 3 and sampling["batch_size"] == 4
    assert record["dataset"] == "tiny"
    assert record["point"] == {
        "t_prime": 400,
        "steps": 2,
        "sampler": "ddpm",
        "eta": 1.0,
        "clip_denoised": True,
        "variance": "learned",
        "guidance_scale": 1.0,
        "seed": 0,
        "timesteps": [250, 0],
        "network_evaluations": 2,
        "seconds_per_image": sampling["seconds_per_image"],
        "samples": NUM_IMAGES,
        "checkpoint": str(run.network.path),
        "start_images": run.start.path,
    }
    assert set(record["inputs"]) == {
        "checkpoint",
        "classifier",
        "start_images",
        "reference",
        "graph",
    }
    assert all(len(entry["sha256"]) == 64 for entry in record["inputs"].values())
    about = record["provenance"]
    assert DRIVER in about["command"] and about["date"][:2] == "20"
    # PyTorch may add its build, as in +cu130
    assert torch.__version__.startswith(about["torch"]) and about["numpy"] == np.__version__
    assert record["evaluation"]["results"][0]["metrics"]["frechet_distance"] > 0


def test_grid_and_pngs(whole_job):
    out = whole_job[1]
    images, labels = all_samples(out)
    grid = np.asarray(Image.open(out / "samples_grid.png"))
    # 10 images in two rows of 8, each under its row of start images, pixels 16 times as large;
    # then a line of caption.
    cell, height = 8 * 16 + 2, 4 * (8 * 16 + 2) + 2
    assert grid.shape == (height + 32, 8 * cell + 2, 3)
    for row, column, index in ((1, 0, 0), (3, 1, 9)):
        top, left = row * cell + 2, column * cell + 2
        shown = grid[top : top + 128, left : left + 128]
        np.testing.assert_array_equal(shown, images[index].repeat(16, 0).repeat(16, 1))
    caption = "tiny, ddpm, t = 250, K = 2, seed 0"
    np.testing.assert_array_equal(with_caption(grid[:height], caption), grid)
    assert (grid[height:] < 64).any()
    assert len(list((out / "images").iterdir())) == NUM_IMAGES
    png = np.asarray(Image.open(out / "images" / f"7_label_{labels[7]}.png"))
    np.testing.assert_array_equal(png, images[7])


def test_samples_of_other_settings_are_never_reused(tiny, whole_job):
    argv = flags(tiny, whole_job[1], classifier_guidance_scale=0)
    with pytest.raises(UserError, match=r"classifier_scale is 1\.0 there, 0\.0 now"):
        driver.main(["--execute", *argv])


def test_a_run_is_repeated_from_its_metrics(tiny, tmp_path, whole_job, capsys):
    """To the bit, by another number of processes; and what has changed since is told."""
    first = whole_job[1]
    shutil.copy(first / "metrics.json", tmp_path / "metrics.json")
    argv = ["--again", str(tmp_path / "metrics.json"), "--devices", "cpu", "--execute"]
    driver.main([*argv, "--output_dir", str(tmp_path / "new")])
    assert "--again: all inputs are what they were" in capsys.readouterr().out
    assert (tmp_path / "new" / "samples_all.npz").read_bytes() == (
        first / "samples_all.npz"
    ).read_bytes()
    records = [
        json.loads((folder / "metrics.json").read_text()) for folder in (first, tmp_path / "new")
    ]
    assert records[0]["run"] == records[1]["run"]
    assert records[0]["inputs"] == records[1]["inputs"]
    scores = [record["evaluation"]["results"][0]["metrics"] for record in records]
    assert scores[0] == scores[1]

    record = records[0]
    changed = tmp_path / "changed.npz"
    pixels = np.load(tiny.images)
    np.savez(changed, pixels["arr_0"][::-1], pixels["arr_1"])
    record["inputs"]["start_images"]["path"] = record["run"]["start"]["path"] = str(changed)
    (tmp_path / "metrics.json").write_text(json.dumps(record))
    driver.main([*argv, "--not_eval_metrics", "--output_dir", str(tmp_path / "other")])
    said = capsys.readouterr()
    assert f"warning: --again: the start images {changed} is not what it was" in said.err
    assert "all inputs are what they were" not in said.out
    assert (all_samples(tmp_path / "other")[0] != all_samples(first)[0]).any()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--seed", "1"], r"--again repeats a run as it was: leave out --seed"),
        ([], r"--again: name a new folder with --output_dir"),
        (["--again", "none.json", "--output_dir", "x"], r"--again: there is no file none\.json"),
        (["--again", "empty.json", "--output_dir", "x"], r"has no record of a run that could"),
        (["--again", "cut.json", "--output_dir", "x"], r"cut\.json is damaged: it is not JSON"),
        (["--again", "old.json", "--output_dir", "x"], r"could be repeated: sampling is"),
        (["--again", ".", "--output_dir", "x"], r"--again: there is no file \./metrics\.json"),
    ],
)
def test_what_cannot_be_repeated(whole_job, tmp_path, monkeypatch, more, message):
    monkeypatch.chdir(tmp_path)
    Path("empty.json").write_text('{"run": null}')
    Path("cut.json").write_text('{"run": ')
    Path("old.json").write_text('{"run": {}, "inputs": {}, "sampling": {"batch_size": 4}}')
    with pytest.raises(UserError, match=message):
        driver.main(["--again", str(whole_job[1] / "metrics.json"), *more])
    assert not Path("x").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, b: (a[:4], b[:4]), "has 4 images now, the run takes 10"),
        (lambda a, b: (a[:, :4, :4], b), "has images of 4x4 now, the run takes 8x8"),
        (lambda a, b: (a, b + 5000), "label 5[0-9]* of image 0 .* is not one of the classes"),
        (lambda a, b: (a,), "has no labels"),
    ],
)
def test_start_images_that_have_become_unfit_are_refused(
    tiny, tmp_path, whole_job, change, message
):
    with np.load(tiny.images) as npz:
        np.savez(tmp_path / "changed.npz", *change(npz["arr_0"], npz["arr_1"]))
    record = json.loads((whole_job[1] / "metrics.json").read_text())
    record["inputs"]["start_images"]["path"] = str(tmp_path / "changed.npz")
    record["run"]["start"]["path"] = str(tmp_path / "changed.npz")
    (tmp_path / "metrics.json").write_text(json.dumps(record))
    argv = ["--devices", "cpu", "--execute", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(UserError, match=f"^--again: .*{message}"):
        driver.main(["--again", str(tmp_path), *argv])


def test_flags_in_vain_beside_again_are_warned_of(whole_job, tmp_path, capsys):
    argv = ["--again", str(whole_job[1] / "metrics.json"), "--output_dir", str(tmp_path / "out")]
    driver.main([*argv, "--not_eval_metrics", "--eval_while_sampling"])
    said = capsys.readouterr().err
    assert "warning: --eval_while_sampling has no effect with --not_eval_metrics\n" in said


def test_a_byte_that_changed_in_a_chunk_is_sampled_again(tiny, tmp_path, whole_job):
    out = tmp_path / "out"
    shutil.copytree(whole_job[1], out)
    damaged, cut, _ = sorted((out / "chunks").glob("*/*.npz"))
    content = bytearray(damaged.read_bytes())
    content[400] ^= 1
    damaged.write_bytes(content)
    cut.write_bytes(cut.read_bytes()[:300])
    done = run_script(DRIVER, "--execute", "--not_eval_metrics", *flags(tiny, out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("its samples are made again") == 2
    assert str(damaged) in done.stdout and str(cut) in done.stdout
    assert_equal(all_samples(out), all_samples(whole_job[1]))


def test_more_of_the_images_in_the_same_folder(tiny, tmp_path, whole_job, capsys):
    argv = ["--execute", "--not_eval_metrics"]
    few, out = tmp_path / "few", tmp_path / "out"
    for folder, limit in ((few, 6), (out, 6), (out, NUM_IMAGES)):
        driver.main([*argv, *flags(tiny, folder, limit=limit)])
    assert_equal(all_samples(out), all_samples(whole_job[1]))
    assert len(all_samples(few)[0]) == 6
    done = capsys.readouterr().out
    assert "all 6 samples are there already" not in done
    driver.main([*argv, *flags(tiny, out, limit=3)])
    assert "all 3 samples are there already" in capsys.readouterr().out
    np.testing.assert_array_equal(all_samples(out)[0], all_samples(whole_job[1])[0][:3])


def test_the_last_machine_says_how_to_gather_when_machine_0_is_gone(tiny, tmp_path, whole_job):
    out = tmp_path / "out"
    two = ["--num_machines", "2", "--machine_idx", "1", "--execute"]
    done = run_script(DRIVER, *two, *flags(tiny, out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (out / "samples_all.npz").exists()
    command = done.stdout.split("or, if it is gone\n  ")[1].strip()
    gathered = subprocess.run(command.split(), capture_output=True, text=True)
    assert gathered.returncode == 0, gathered.stderr
    assert "Frechet distance (emoji32 features): " in gathered.stdout
    assert_equal(all_samples(out), all_samples(whole_job[1]))
    assert json.loads((out / "metrics.json").read_text())["dataset"] == "tiny"


def test_the_sidecar_s_schedule_is_used_whatever_the_preset_says(tiny, tmp_path, whole_job, capsys):
    model = tmp_path / "mine.pt"
    shutil.copy(tiny.model, model)
    recorded = {**model_and_diffusion_defaults(), **MODEL, "noise_schedule": "cosine"}
    write_sidecar(str(model), recorded)
    argv = flags(tiny, tmp_path / "out", model_path=model, classifier_guidance_scale=0)
    driver.main(["--execute", "--not_eval_metrics", *argv])
    said = capsys.readouterr().err
    assert "noise_schedule is cosine (sidecar of mine.pt), not linear (preset tiny)" in said
    plain = tiny.worker_flags(tmp_path / "one", noise_schedule="cosine")
    expected = by_one_process(tmp_path / "one", plain, guided=False)
    assert_equal(all_samples(tmp_path / "out"), expected)
    driver.main(["--print_settings", *argv])
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    for word in ([], ["True"]):
        driver.main(["--print_settings", *argv, "--override_checkpoint_flags", *word])
        assert "linear  (preset tiny)" in capsys.readouterr().out
    assert ["noise_schedule", "cosine  (sidecar of mine.pt)"] in lines
    assert ["num_heads", "4  (sidecar of mine.pt)"] in lines


def test_a_finished_job_is_only_gathered_again(tiny, whole_job, capsys):
    out = whole_job[1]
    before = all_samples(out)
    (out / "samples_all.npz").unlink()
    driver.main(["--execute", "--not_eval_metrics", *flags(tiny, out)])
    assert "all 10 samples are there already" in capsys.readouterr().out
    assert_equal(all_samples(out), before)


def test_ddim_with_early_stop_and_guidance_scale_0(tiny, tmp_path):
    argv = flags(tiny, tmp_path / "out", chain_length="ddim5", classifier_guidance_scale=0)
    argv += ["--classifier_path", "/is/not/there.pt"]
    done = run_script(DRIVER, "--execute", "--not_eval_metrics", *argv)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (tmp_path / "out" / "metrics.json").exists()
    plain = tiny.worker_flags(tmp_path / "one", timestep_respacing="ddim5", use_ddim=True)
    expected = by_one_process(tmp_path / "one", plain, guided=False)
    assert_equal(all_samples(tmp_path / "out"), expected)


def test_only_printing_needs_no_files(capsys):
    driver.main(["--devices", "cpu,cpu", "--num_machines", "3", "--machine_idx", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "25 of 250 steps, starting at original timestep 96"
    folder = SCRIPTS / "exps/imagenet64/ddpm_250_steps/diffusion_and_reverse_25_steps"
    assert lines[1] == f"output folder: {folder}"
    for rank, line in zip((2, 3), lines[2:], strict=True):
        assert line.split()[1] == str(SCRIPTS / "classifier_sample_diffusion_and_reverse.py")
        assert f"--global_rank {rank} --world_size 6" in line
        assert f"--settings {folder}/settings_machine_1.json" in line
    assert not folder.exists()


def test_files_may_lie_elsewhere_on_another_machine(tiny, tmp_path, whole_job, capsys):
    """And after they were moved: the record has the same hashes, so the samples go together."""
    out, moved = tmp_path / "out", tmp_path / "moved"
    moved.mkdir()
    for name in ("model.pt", "classifier.pt", "images.npz", "tiny.toml"):
        shutil.copy(tiny.root / name, moved / name)
    driver.main([*flags(tiny, out), "--num_machines", "2"])
    other = flags(tiny, out, dataset=moved / "tiny.toml", num_machines=2, machine_idx=1)
    driver.main(other)
    paths = [
        json.loads((out / name).read_text())["network"]["path"]
        for name in ("settings.json", "settings_machine_1.json")
    ]
    assert paths == [str(tiny.model), str(moved / "model.pt")]
    for command in (out_line for out_line in capsys.readouterr().out.splitlines()):
        if "--settings" in command:
            assert subprocess.run(command.split(), capture_output=True).returncode == 0
    assert_equal(chunks(out), all_samples(whole_job[1]))


def test_printed_commands_do_what_the_driver_would(tiny, tmp_path, whole_job, capsys):
    out = tmp_path / "out"
    driver.main(flags(tiny, out))
    command = capsys.readouterr().out.splitlines()[-1]
    done = subprocess.run(command.split(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_equal(chunks(out), all_samples(whole_job[1]))


def test_folders_and_flags_of_the_other_modes(capsys):
    argv = ["--dataset", "lsun_cat", "--start_from_scratch", "--save_dir_suffix", "a"]
    driver.main([*argv, "--chain_length", "ddim50", "--devices", "cpu"])
    _, folder, command = capsys.readouterr().out.splitlines()
    assert folder.endswith("exps/lsun_cat/ddpm_ddim50_steps/generate_from_scratch_a")
    assert "/image_sample_diffusion_and_reverse.py " in command


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reverse_steps": 0}, r"--reverse_steps must be in 1 … 5, the length of the chain"),
        ({"reverse_steps": 6}, r"--reverse_steps must be in 1 … 5"),
        ({"chain_length": "2000"}, r"--chain_length 2000: .*choose 1 \.\.\. 1000"),
        ({"chain_length": "ddim600"}, r"--chain_length ddim600: "),
        ({"chain_length": "many"}, r"--chain_length many: "),
        ({"dataset": "mnist"}, r"--dataset: unknown data set 'mnist'; valid are emoji32"),
        ({"devices": "cpu,99"}, r"--devices cpu,99: there is no device 99; valid .*cpu"),
        ({"machine_idx": 1}, r"--machine_idx must be in 0 … 0"),
        ({"num_machines": 0}, r"--num_machines is 0, it must be at least 1"),
        ({"batch_size": 0}, r"--batch_size is 0, it must be at least 1"),
        ({"seed": -1}, r"--seed must be in 0 … "),
        ({"eta": 2, "chain_length": "ddim5"}, r"--eta must be in 0 … 1, not 2"),
        ({"dataset": "/none.toml"}, r"there is no preset file /none\.toml"),
        ({"model_path": "cut.pt"}, r"--model_path: .*cut\.pt is truncated"),
        ({"model_path": "other.pt"}, r"--model_path: .*other\.pt does not fit the model flags"),
        ({"classifier_path": "cut.pt"}, r"--classifier_path: .*cut\.pt is truncated"),
        ({"dataset_path": "large.npz"}, r"--dataset_path: .* are 16x16, the network takes 8x8"),
        ({"dataset_path": "bare.npz"}, r"--dataset_path: .*bare\.npz has no labels"),
        ({"dataset_path": "labels.npz"}, r"--dataset_path: label 1000 of image 2 in .*labels"),
        ({"dataset_path": "float.npz"}, r"--dataset_path: arr_0 of .* is float32"),
        ({"dataset_path": "no.npz"}, r"--dataset_path: there is no file or folder .*no\.npz"),
        ({"model_path": "no.pt"}, r"--model_path: there is no file or folder .*no\.pt"),
        ({"ref_batch": "no.npz"}, r"--ref_batch: there is no file or folder .*no\.npz"),
        ({"inception_path": "no.pb"}, r"--inception_path: there is no file or folder .*no\.pb"),
        ({"ref_batch": "cut.npz"}, r"--ref_batch: .*cut\.npz is not a complete .*--not_eval_met"),
        ({"inception_path": "cut.pb"}, r"--inception_path: .*cut\.pb is not a complete frozen"),
        ({"dataset_path": "cut.npz"}, r"--dataset_path: .*cut\.npz is not a complete"),
        ({"limit": 3}, r"the sample batch has 3 images, .* need at least 4.*--not_eval_metrics"),
        ({"ref_batch": "three.npz"}, r"three\.npz has 3 images, .* need at least 4"),
        ({"ref_batch": "other.npz"}, r"statistics of 2048-dimensional features, the graph gives"),
        ({"output_dir": "afile"}, r"^--output_dir: .*afile cannot be written: .* not a folder"),
        ({"output_dir": "afile/x"}, r"^--output_dir: .*afile/x cannot be written: .*/afile is not"),
        ({"output_dir": "/proc/x"}, r"^--output_dir: /proc/x cannot be written: "),
        ({"eval_device": "cuda:99"}, r"^--eval_device cuda:99: not available here"),
        ({"eval_cache_dir": "afile"}, r"^--eval_cache_dir: .*afile cannot be written: "),
        ({"model_path": "s3://b/x.pt"}, r"s3://b/x\.pt cannot be used: .*gs:// or az://"),
    ],
)
def test_bad_input_is_one_line_before_any_work(tiny, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    pixels = np.load(tiny.images)["arr_0"]
    np.savez("three.npz", pixels[:3])
    np.savez("other.npz", arr_0=pixels, mu=np.zeros(2048), sigma=np.eye(2048))
    Path("cut.npz").write_bytes(tiny.images.read_bytes()[:1000])
    Path("cut.pt").write_bytes(tiny.model.read_bytes()[:5000])
    state = torch.load(tiny.model)
    state.popitem()
    torch.save(state, "other.pt")
    np.savez("large.npz", pixels.repeat(2, axis=1).repeat(2, axis=2), np.arange(NUM_IMAGES))
    np.savez("bare.npz", pixels)
    np.savez("labels.npz", pixels, np.full(NUM_IMAGES, 998) + np.arange(NUM_IMAGES))
    np.savez("float.npz", pixels.astype(np.float32), np.arange(NUM_IMAGES))
    Path("cut.pb").write_bytes(FEATURE_GRAPH.read_bytes()[:5000])
    Path("afile").touch()
    with pytest.raises(UserError, match=message):
        driver.main(["--execute", *flags(tiny, tmp_path / "out", **changes)])
    assert not (tmp_path / "out").exists()


def test_flags_of_the_evaluator_reach_it(tiny, tmp_path, whole_job, capsys):
    """And a graph that is not the preset's own does not get the preset's name."""
    shutil.copytree(whole_job[1], tmp_path / "out")
    other = tmp_path / "other_features.pb"
    shutil.copy(FEATURE_GRAPH, other)
    options = {"inception_path": other, "eval_backend": "torch", "eval_device": "cpu"}
    options["eval_cache_dir"] = tmp_path / "cache"
    driver.main(["--execute", *flags(tiny, tmp_path / "out", **options)])
    record = json.loads((tmp_path / "out" / "metrics.json").read_text())["evaluation"]
    assert record["features"] == "other features"
    assert record["settings"]["backend"] == "torch" and record["settings"]["device"] == "cpu"
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert scoring.BACKENDS == BACKENDS


def test_evaluation_while_sampling_gives_the_same_figures(tiny, tmp_path, whole_job):
    """The evaluator has begun on the first chunks before the last are there."""
    output = tmp_path / "out"
    argv = flags(tiny, output, devices="cpu,cpu")
    done = run_script(DRIVER, "--execute", "--eval_while_sampling", *argv)
    figures = [
        json.loads((folder / "metrics.json").read_text())["evaluation"]["results"][0]
        for folder in (whole_job[1], output)
    ]
    assert figures[1]["metrics"] == pytest.approx(figures[0]["metrics"], rel=1e-9)
    assert figures[1]["sample"] == str(output / "samples_all.npz")
    for figure in whole_job[0].stdout.splitlines():
        if figure.startswith("Frechet distance"):
            assert figure in done.stdout
    assert "once more" not in done.stderr


def test_an_evaluator_that_fails_while_sampling_is_run_again(tiny, tmp_path, capfd, monkeypatch):
    """Its part of the work is lost, not the run; and none is left where sampling fails."""
    command = scoring.Evaluation._command

    def broken(self, samples, **more):
        argv = command(self, samples, **more)
        return [*argv, "--batch_size", "0"] if "expect" in more else argv

    monkeypatch.setattr(scoring.Evaluation, "_command", broken)
    driver.main(["--execute", "--eval_while_sampling", *flags(tiny, tmp_path / "out")])
    assert (tmp_path / "out" / "metrics.json").exists()
    assert "--batch_size 0: it must be at least 1\n" in (said := capfd.readouterr()).err
    assert "once more" in said.err and "Frechet distance" in said.out


def test_no_evaluator_is_left_when_sampling_ends_early(tiny, tmp_path, monkeypatch):
    """At once, though a thread of it waits for images that never come."""
    engine = {"backend": "torch"}
    evaluation = scoring.Evaluation(str(tiny.images), str(FEATURE_GRAPH), None, engine)
    with np.load(tiny.images) as npz:
        images = npz["arr_0"]
    there = np.resize(images, (100, *images.shape[1:]))
    np.savez(part_path(str(tmp_path), (0, len(there))), there)
    started = []

    @contextlib.contextmanager
    def noting(*args, **options):
        with running(*args, **options) as process:
            started.extend([process, Path(options["stderr"].name)])
            yield process

    monkeypatch.setattr(scoring, "running", noting)
    with pytest.raises(KeyboardInterrupt), evaluation.beside(str(tmp_path), 200):
        process, said = started
        wait_until(lambda: said.read_text().count("features of") > 1, process)
        raise KeyboardInterrupt
    assert process.returncode == -signal.SIGTERM  # not SIGKILL, after a time


def test_an_evaluator_whose_parent_is_gone_before_it_looks_ends(tiny, tmp_path):
    """Nobody would read what it waits for."""
    gone = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True).stdout.strip()
    command = [sys.executable, scoring.EVALUATOR, tiny.images, tmp_path, "--expect", "9"]
    environment = {**os.environ, PARENT_VARIABLE: gone}
    done = subprocess.run(
        [*map(str, command), "--inception_path", str(FEATURE_GRAPH)],
        env=environment,
        timeout=PATIENCE_S,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "waiting for 9 images" in done.stderr


@pytest.mark.parametrize(
    ("metric_name", "graph", "name"),
    [
        ("FD (mine)", None, "FD (mine)"),
        ("FD (mine)", "elsewhere.pb", None),
        (None, None, None),
        (None, "elsewhere.pb", None),
    ],
)
def test_the_preset_s_name_is_for_its_own_graph(metric_name, graph, name):
    preset = presets.Preset("p", "s.py", "m.pt", None, None, "r", "/own.pb", metric_name)
    argv = ["--inception_path", graph] if graph else []
    found = scoring.read_flags(driver.create_argparser().parse_args(argv), preset)
    assert found.metric_name == name
    assert found.graph == (os.path.abspath(graph) if graph else "/own.pb")


def test_missing_published_files_are_named_with_the_command_that_fetches_them(
    tmp_path, monkeypatch
):
    """All at once, before devices are looked at: the published commands name eight GPUs."""
    monkeypatch.setattr(presets, "SCRIPTS_FOLDER", tmp_path / "scripts")  # nothing fetched there
    message = (
        r"--model_path: .*scripts/models/lsun/lsun_cat\.pt; --dataset_path: .*stylegan2_lsun_cat"
        r"\.npz; --ref_batch: .*VIRTUAL_lsun_cat256\.npz; fetch with: .*download\.py lsun_cat"
    )
    with pytest.raises(UserError, match=message):
        driver.main(["--execute", "--dataset", "lsun_cat", "--devices", "0,1,2,3,4,5,6,7"])


def test_the_inception_graph_is_there_before_sampling_starts(tiny, tmp_path, monkeypatch):
    """Without network and without the file, the run ends before the first step."""
    from evaluations import features

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(features, "GRAPH_URL", "http://127.0.0.1:9/none.pb")
    monkeypatch.setattr(features, "cached_graph_path", lambda: tmp_path / "cache" / "none.pb")
    preset = tmp_path / "own.toml"
    keys = {"checkpoint": tiny.model, "generator_images": tiny.images}
    keys["reference_batch"] = tiny.images
    said = "model_flags = {num_heads = 4, use_new_attention_order = false}\n"
    said += 'diffusion_flags = {noise_schedule = "linear"}\n'
    preset.write_text(said + "".join(f'{key} = "{path}"\n' for key, path in keys.items()))
    with pytest.raises(UserError, match=r"--not_eval_metrics leaves the evaluation out"):
        driver.main(["--execute", *flags(tiny, tmp_path / "out", dataset=preset)])
    assert not (tmp_path / "out").exists()


def test_commands_are_printed_for_devices_of_another_machine(capsys):
    driver.main(["--dataset", "lsun_cat", "--devices", "0,7"])
    printed = capsys.readouterr().out
    assert "--device 0" in printed
    assert "--device 7" in printed


@pytest.mark.parametrize(
    ("argv", "warnings"),
    [
        (
            "--num_samples 7",
            ["--num_samples has no effect without --start_from_scratch or --generator"],
        ),
        (
            "--generator my_gan:load --num_samples 7 --limit 3",
            ["--num_samples has no effect with --limit, which goes first"],
        ),
        (
            "--start_from_scratch --limit 3 --reverse_steps 25",
            [
                "--reverse_steps has no effect with --start_from_scratch",
                "--limit has no effect with --start_from_scratch",
            ],
        ),
        (
            "--dataset lsun_cat --classifier_guidance_scale 1 --eta 0.5",
            [
                "--eta has no effect without DDIM (--chain_length ddim250, say) or --sampler "
                "dpmpp_2m_sde",
                "--classifier_guidance_scale has no effect with the data set lsun_cat: it has no "
                "classifier (see --classifier_path)",
            ],
        ),
        (
            "--classifier_guidance_scale 0 --classifier_path c.pt --output_dir o "
            "--save_dir_suffix s --not_eval_metrics --ref_batch r.npz",
            [
                "--classifier_path has no effect with --classifier_guidance_scale 0",
                "--save_dir_suffix has no effect with --output_dir",
                "--ref_batch has no effect with --not_eval_metrics",
            ],
        ),
        (
            "--not_eval_metrics --eval_while_sampling",
            ["--eval_while_sampling has no effect with --not_eval_metrics"],
        ),
        ("--classifier_guidance_scale 0 --dataset_path x.npz --limit 3", []),
    ],
)
def test_flags_typed_in_vain_are_warned_of(capsys, argv, warnings):
    driver.main(["--devices", "cpu", *argv.split()])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert said == [f"warning: {line}" for line in warnings]


@pytest.mark.parametrize("flag", ["model_path", "classifier_path", "dataset_path"])
def test_an_address_that_is_none_is_told_with_its_flag(tiny, tmp_path, flag):
    with pytest.raises(UserError, match=f"^--{flag}: hf://x is not of the form"):
        driver.main(["--execute", *flags(tiny, tmp_path / "out", **{flag: "hf://x"})])


def test_a_job_after_the_array_finds_all_samples_there():
    args, typed = parse(driver.create_argparser(), ["--submit", "slurm", "--eval_while_sampling"])
    said = without_effect(typed, driver._scoring_in_vain(args))
    assert "--eval_while_sampling has no effect with --submit slurm" in said


def test_precision_and_eta_reach_the_workers(tiny, tmp_path):
    argv = flags(tiny, tmp_path / "out", use_fp16="no", chain_length="ddim5", eta=0.3)
    driver.main(argv)
    run = ChunkFolder.load(tmp_path / "out").run
    assert run.network.flags["use_fp16"] is False and run.origins["use_fp16"] == "typed"
    assert (run.sampler.name, run.sampler.eta) == ("ddim", 0.3)
    driver.main([*flags(tiny, tmp_path / "bf16", precision="bfloat16"), "--execute"])
    run = ChunkFolder.load(tmp_path / "bf16").run
    assert run.network.precision == run.guidance.classifier.precision == "bfloat16"
    worker = tiny.guided_flags(tmp_path / "one", precision="bfloat16")
    alone = by_one_process(tmp_path / "one", worker, guided=True)
    assert_equal(all_samples(tmp_path / "bf16"), alone)


def test_compiling_is_the_processes_affair(tiny, tmp_path, capsys):
    """Each is told, and the run is the one it was, which may go on in the same folder."""
    argv = flags(tiny, tmp_path / "out", devices="cpu,cpu")
    driver.main(argv)
    plain = ChunkFolder.load(tmp_path / "out").run
    assert "--compile" not in capsys.readouterr().out
    driver.main([*argv, "--compile"])
    assert capsys.readouterr().out.count("--compile True") == 2
    assert ChunkFolder.load(tmp_path / "out").run.identity == plain.identity


def test_evaluations_and_sampler_by_name(tiny, tmp_path, capsys):
    """The folder that stands for them, the timesteps said and kept, the samples of a worker."""
    begin = ["--devices", "cpu", "--t_prime", "500", "--steps", "4", "--sampler", "dpmpp_2m_sde"]
    driver.main([*begin, "--save_dir_suffix", "a"])
    printed = capsys.readouterr().out
    assert f"output folder: {SCRIPTS}/exps/imagenet64/dpmpp_2m_sde_t500_4_steps_a\n" in printed
    out = tmp_path / "out"
    argv = ["--dataset", str(tiny.root / "tiny.toml"), "--output_dir", str(out), "--execute"]
    argv += ["--classifier_guidance_scale", "0", "--batch_size", "4"]
    driver.main([*begin, *argv])
    said = "dpmpp_2m_sde: 4 evaluations from T' = 500, at original timesteps 499, 374, 249, 124"
    assert f"{said}; predicted images are not clipped\n" in capsys.readouterr().out
    sampling = json.loads((out / "metrics.json").read_text())["sampling"]
    assert sampling["t_prime"] == 500 and sampling["timesteps"] == [499, 374, 249, 124]
    worker = tiny.worker_flags(tmp_path / "one", clip_denoised=False)
    for flag in ("--timestep_respacing", "--denoise_steps"):
        del worker[worker.index(flag) : worker.index(flag) + 2]
    worker += ["--t_prime", "500", "--steps", "4", "--sampler", "dpmpp_2m_sde"]
    assert_equal(all_samples(out), by_one_process(tmp_path / "one", worker, guided=False))
    with pytest.raises(UserError, match="cannot be mixed with --chain_length: give either"):
        driver.main([*begin, "--chain_length", "50"])


def test_typed_defaults_are_taken_at_their_word(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    typed = flags(tiny, tmp_path / "out", devices="0,1,2,3,4,5,6,7")
    with pytest.raises(UserError, match="--devices 0,1,2,3,4,5,6,7: there is no device 0"):
        driver.main(["--execute", *typed])
    monkeypatch.chdir(tmp_path)
    default = "../evaluations/precomputed/biggan_deep_imagenet64.npz"
    message = f"--dataset_path: there is no file or folder {os.path.abspath(default)}"
    with pytest.raises(UserError, match=re.escape(message)):
        driver.main(["--execute", *flags(tiny, tmp_path / "out", dataset_path=default)])


def test_limit_takes_the_first_images(tiny, tmp_path):
    assert len(open_generator_images(str(tiny.images))) > 3
    source = open_generator_images(str(tiny.images), limit=3)
    assert len(source) == 3
    with pytest.raises(UserError, match="--limit must be at least 1"):
        driver.main(["--execute", *flags(tiny, tmp_path / "out", limit=-1)])


def test_a_worker_s_own_error_is_the_driver_s(tiny, tmp_path):
    """NaN in one class's embedding shows only when its image is sampled."""
    broken = tmp_path / "nan.pt"
    state = torch.load(tiny.model)
    state["label_emb.weight"][np.load(tiny.images)["arr_1"][5]] = float("nan")
    torch.save(state, broken)
    argv = flags(tiny, tmp_path / "out", model_path=broken, classifier_guidance_scale=0)
    done = run_script(DRIVER, "--execute", "--not_eval_metrics", *argv)
    assert done.returncode == 2
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: sample 5 became NaN or infinite at step 1 of 2")
    assert "last lines" not in done.stderr


# --- interrupted, killed and continued ---

MANY = 200  # images: enough to be stopped in the middle of, on any machine
SLOW = {"chain_length": 100, "reverse_steps": 15, "batch_size": 1, "classifier_guidance_scale": 0}
SLOW_WORKER = {"timestep_respacing": "100", "denoise_steps": 15, "batch_size": 1}


@pytest.fixture(scope="module")
def many(tiny, tmp_path_factory) -> Path:
    """The tiny images again and again, each time a little darker."""
    path = tmp_path_factory.mktemp("many") / "many.npz"
    images = np.load(tiny.images)
    times = -(-MANY // NUM_IMAGES)
    pixels = np.concatenate([images["arr_0"] // (i + 1) for i in range(times)])[:MANY]
    np.savez(path, pixels, np.tile(images["arr_1"], times)[:MANY])
    return path


@pytest.fixture(scope="module")
def slow_job(tiny, many, tmp_path_factory) -> tuple[np.ndarray, np.ndarray]:
    folder = tmp_path_factory.mktemp("slow")
    argv = tiny.worker_flags(folder, **SLOW_WORKER, dataset_path=many)
    return by_one_process(folder, argv, guided=False)


def start(argv: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        argv,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for_chunks(folder: Path, number: int, *processes: subprocess.Popen) -> None:
    wait_until(lambda: len(list((folder / "chunks").glob("*/0*.npz"))) >= number, *processes)


def kill_a_worker(folder: Path, *processes: subprocess.Popen) -> None:
    """Kill a worker that is at a sample."""

    def at_work() -> list[dict]:
        workers = Observer(str(folder)).workers()
        return [worker for worker in workers if worker["alive"] and worker["state"] == "sampling"]

    os.kill(wait_until(at_work, *processes)[0]["pid"], signal.SIGKILL)


def test_stopped_then_continued_by_two_machines_of_which_one_loses_a_worker(
    tiny, many, tmp_path, slow_job
):
    out = tmp_path / "out"
    command = [sys.executable, str(SCRIPTS / DRIVER), "--execute", "--not_eval_metrics"]
    command += flags(tiny, out, **SLOW, dataset_path=many)

    first = start(command)
    wait_for_chunks(out, 2, first)
    first.send_signal(signal.SIGTERM)
    said = first.communicate(timeout=PATIENCE_S)[0]
    assert first.returncode == 143, said
    assert "what is finished stays; continue with\n" in said
    assert said.split("continue with\n  ")[1].split()[:2] == command[:2]
    done = ChunkFolder.load(out).count_done()
    assert 2 <= done < MANY

    # Two machines at once on the one folder.
    both = ["--num_machines", "2", "--machine_idx"]
    machines = [start([*command, *both, str(index)]) for index in range(2)]
    wait_for_chunks(out, done + 2, *machines)
    kill_a_worker(out, *machines)
    said = [machine.communicate(timeout=PATIENCE_S)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert "was ended by SIGKILL" in said[0] + said[1]
    assert_equal(all_samples(out), slow_job)


def test_torchrun_loses_a_process_and_mpiexec_finishes(tiny, many, tmp_path, slow_job):
    mpiexec = shutil.which("mpiexec", path=Path(sys.executable).parent) or shutil.which("mpiexec")
    script = str(SCRIPTS / "image_sample_diffusion_and_reverse.py")
    argv = [script, *tiny.worker_flags(tmp_path, **SLOW_WORKER, dataset_path=many)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]

    run = start([*torchrun, "--nproc_per_node", "2", *argv])
    wait_for_chunks(tmp_path, 2, run)
    kill_a_worker(tmp_path, run)
    run.communicate(timeout=PATIENCE_S)
    assert run.returncode != 0 and not ChunkFolder.load(tmp_path).is_complete()

    if mpiexec is None:
        pytest.skip("mpiexec is not installed: only torchrun was tested")
    run = start([mpiexec, "-n", "2", sys.executable, *argv])
    said = run.communicate(timeout=PATIENCE_S)[0]
    assert run.returncode == 0, said
    assert "rank 0 of 2" in said and "rank 1 of 2" in said
    assert_equal(chunks(tmp_path), slow_job)


def test_a_full_disk_is_a_clear_error_and_the_folder_goes_on(tiny, tmp_path, capsys):
    def mount(*options: str) -> bool:
        line = ["mount", "-t", "tmpfs", *options, "tmpfs", str(tmp_path)]
        return subprocess.run(line, capture_output=True).returncode == 0

    if not mount("-o", "size=28k"):
        pytest.skip("mounting a small tmpfs needs root")
    try:
        argv = tiny.worker_flags(tmp_path / "out", batch_size=1)
        with pytest.raises(SystemExit) as stopped:
            run_main(lambda: sample.main(argv, guided=False))
        assert stopped.value.code == 74
        assert "error: the disk is full" in capsys.readouterr().err
        done = ChunkFolder.load(tmp_path / "out").count_done()
        assert done < NUM_IMAGES
        assert mount("-o", "remount,size=4m")
        sample.main(argv, guided=False)
        found = chunks(tmp_path / "out")
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    expected = tiny.worker_flags(tmp_path / "roomy", batch_size=1)
    assert_equal(found, by_one_process(tmp_path / "roomy", expected, guided=False))


# --- gathering and status ---


def test_gathering_rank_files_and_waiting_for_them(tmp_path):
    pixels = np.arange(12 * 4 * 4 * 3, dtype=np.uint8).reshape(12, 4, 4, 3)
    for rank in range(11):
        np.savez(tmp_path / f"samples_4x4x4x3_rank_{rank}.npz", pixels[rank : rank + 1])
    argv = ["--dir", str(tmp_path), "--not_eval_metrics", "--wait_time", "0", "--num_file"]
    gather.main([*argv, "11"])
    with np.load(tmp_path / "samples_all.npz") as npz:
        np.testing.assert_array_equal(npz["arr_0"], pixels[:11])
        assert npz.files == ["arr_0"]
    (tmp_path / "samples_4x4x4x3_rank_3.npz").unlink()
    with pytest.raises(
        UserError, match=r"10 of 12 files samples_…_rank_R\.npz .*; missing: rank 3, 11$"
    ):
        gather.main([*argv, "12"])


def test_rank_files_that_are_not_of_one_run_are_named(tmp_path):
    def write(name: str, *shape: int, **labels: np.ndarray) -> None:
        np.savez(tmp_path / f"samples_{name}.npz", arr_0=np.zeros(shape, np.uint8), **labels)

    argv = ["--dir", str(tmp_path), "--not_eval_metrics", "--wait_time", "0", "--num_file"]
    for rank in (0, 1, 3):
        write(f"4x4x4x3_rank_{rank}", 4, 4, 4, 3)
    with pytest.raises(UserError, match=r"_rank_3\.npz: with --num_file 2 the ranks are 0 … 1"):
        gather.main([*argv, "2"])
    (tmp_path / "samples_4x4x4x3_rank_3.npz").unlink()
    write("9x4x4x3_rank_0", 9, 4, 4, 3)
    with pytest.raises(UserError, match=r"samples_4x.*_rank_0\.npz and samples_9x.* both of rank"):
        gather.main([*argv, "2"])
    (tmp_path / "samples_9x4x4x3_rank_0.npz").unlink()
    write("4x4x4x3_rank_1", 4, 8, 8, 3, arr_1=np.arange(4))
    with pytest.raises(UserError, match=r"_rank_1\.npz has images of 8x8 with labels, .*4x4 with"):
        gather.main([*argv, "2"])
    assert not (tmp_path / "samples_all.npz").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dir": "/nonexistent"}, "--dir: there is no folder /nonexistent"),
        ({"dir": __file__}, "--dir: there is no folder "),
        ({"num_file": 0}, "--num_file is 0, it must be at least 1"),
        ({"dataset": "nope"}, "--dataset: unknown data set 'nope'; valid are emoji32"),
        ({"ref_batch": "/no.npz"}, "--ref_batch: there is no file /no.npz"),
        ({"eval_device": "cuda:99"}, "--eval_device cuda:99: not available here"),
    ],
)
def test_gathering_refuses_bad_input_at_once(tmp_path, changes, message):
    values = {"dir": tmp_path, "dataset": "emoji32", **changes}
    with pytest.raises(UserError, match=message):
        gather.main([part for key, value in values.items() for part in (f"--{key}", str(value))])


def test_gathering_says_what_it_waits_for(tmp_path, monkeypatch, capsys):
    """And takes a file that comes later."""
    np.savez(tmp_path / "samples_1x4x4x3_rank_0.npz", np.zeros((1, 4, 4, 3), np.uint8))

    def later(seconds: float) -> None:
        np.savez(tmp_path / "samples_1x4x4x3_rank_1.npz", np.ones((1, 4, 4, 3), np.uint8))

    monkeypatch.setattr(gather.time, "sleep", later)
    gather.main(["--dir", str(tmp_path), "--num_file", "2", "--not_eval_metrics"])
    assert "1 of 2 files samples_…_rank_R.npz (--num_file) are there; waiting for rank 1" in (
        capsys.readouterr().err
    )
    with np.load(tmp_path / "samples_all.npz") as npz:
        assert len(npz["arr_0"]) == 2


def test_driver_and_evaluator_end_together(tiny, tmp_path, whole_job):
    """SIGTERM to the driver alone, while the evaluator has work for minutes."""
    shutil.copytree(whole_job[1], tmp_path / "out")
    (tmp_path / "out" / "metrics.json").unlink()
    reference = tmp_path / "reference.npz"
    np.savez(reference, np.tile(np.load(tiny.images)["arr_0"], (20_000, 1, 1, 1)))
    argv = flags(tiny, tmp_path / "out", ref_batch=reference)
    job = start([sys.executable, str(SCRIPTS / DRIVER), "--execute", *argv])
    before = iter(job.stdout.readline, "")
    assert any(line.startswith("features of reference.npz") for line in before)
    job.send_signal(signal.SIGTERM)
    said = job.communicate(timeout=PATIENCE_S)[0]  # the pipe closes when all have ended
    assert job.returncode == 143, said
    assert said.count("terminated\n") == 2
    assert "the evaluation failed" not in said
    assert not list((tmp_path / "out").glob("*.tmp*"))
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_gathering_does_not_wait_for_ever_for_the_dead(tmp_path):
    folder = ChunkFolder.open(tmp_path, plain_run(4))
    folder.write((0, 2), np.zeros((2, 8, 8, 3), np.uint8), None)
    with pytest.raises(UserError, match=r"--wait_time: 2 of 4 samples are missing"):
        gather.main(["--dir", str(tmp_path), "--wait_time", "0", "--not_eval_metrics"])
    assert not (tmp_path / "samples_all.npz").exists()


def test_a_failed_evaluation_is_ours_and_keeps_the_samples(tiny, whole_job, tmp_path):
    shutil.copytree(whole_job[1], tmp_path / "out")
    (tmp_path / "out" / "metrics.json").unlink()
    reference = tmp_path / "reference"
    shutil.copytree(tiny.folder, reference)
    broken = sorted(reference.iterdir(), key=lambda path: int(path.name.split("_")[0]))[5]
    broken.write_bytes(b"no picture")
    done = run_script(GATHER, "--dir", tmp_path / "out", "--ref_batch", reference)
    assert done.returncode == 2 and str(broken) in done.stderr
    assert "error: the evaluation failed; the samples are in" in done.stderr
    assert len(all_samples(tmp_path / "out")[0]) == NUM_IMAGES
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_status_shows_done_missing_and_who_does_what(tmp_path, capsys):
    folder = ChunkFolder.open(tmp_path, plain_run(6))
    folder.write((2, 4), np.zeros((2, 8, 8, 3), np.uint8), None)
    record = {
        "worker": "0003-a",
        "rank": 3,
        "host": "here",
        "machine": "there",
        "pid": 1,
        "beat": 1,
        "state": "sampling",
        "device": "cuda:1",
        "indices": [4, 6],
        "step": 7,
        "steps": 25,
        "images": 2.5,
        "rate": 0.5,
    }
    (tmp_path / "workers").mkdir()
    (tmp_path / "workers" / "0003-a.json").write_text(json.dumps(record))
    status.main([str(tmp_path)])
    headline, titles, row = capsys.readouterr().out.splitlines()
    assert headline == "done 2/6 images (33%), 0.5 images/s, 0:08 left, 4 missing"
    assert titles.split()[:4] == ["rank", "host", "device", "state"]
    assert " ".join(row.split()) == "3 here cuda:1 sampling 2 0.5 images 4-5, step 7/25"
    for chunk in ((0, 2), (4, 6)):
        folder.write(chunk, np.zeros((2, 8, 8, 3), np.uint8), None)
    status.main([str(tmp_path), "--watch"])
    assert "6 images, all of them" in capsys.readouterr().out
    for none in (tmp_path / "chunks", __file__):
        with pytest.raises(UserError, match="is not a folder of samples"):
            status.main([str(none)])
    for damaged in ('{"network": ', '{"network": {}}', "[]", '"text"'):
        (tmp_path / "settings.json").write_text(damaged)
        with pytest.raises(UserError, match=r"settings\.json is damaged") as error:
            status.main([str(tmp_path)])
        assert "\n" not in str(error.value)
