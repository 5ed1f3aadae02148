"""What is in a run's folder beside its samples, when runs, flags and files change."""

import json
import shutil

import numpy as np
import pytest

from esddpm_io.errors import UserError
from guided_diffusion.commands import driver
from guided_diffusion.sampling import worker
from guided_diffusion.sampling.chunks import ChunkFolder
from guided_diffusion.sampling.gathering import gather
from tests.tiny_sampling import NUM_IMAGES, read_job


def argv_of(tiny, output, *more, **changes):
    flags = {
        "dataset": tiny.root / "tiny.toml",
        "devices": "cpu",
        "chain_length": 5,
        "reverse_steps": 2,
        "classifier_guidance_scale": 0,
        "output_dir": output,
        **changes,
    }
    return ["--execute", *more, *(part for k, v in flags.items() for part in (f"--{k}", str(v)))]


def count(output):
    with np.load(output / "samples_all.npz") as npz:
        return len(npz["arr_0"])


def test_fewer_samples_leave_nothing_of_the_more(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    driver.main(argv_of(tiny, out, "--save_png_files"))
    assert len(list((out / "images").glob("*.png"))) == count(out) == NUM_IMAGES
    metrics = (out / "metrics.json").read_text()
    driver.main(argv_of(tiny, out, "--not_eval_metrics"))
    assert (out / "metrics.json").read_text() == metrics
    driver.main(argv_of(tiny, out, "--not_eval_metrics", "--save_png_files", limit=5))
    assert len(list((out / "images").glob("*.png"))) == count(out) == 5
    assert not (out / "metrics.json").exists()
    assert "metrics.json is removed: it is of another number of samples" in capsys.readouterr().out


def test_more_samples_than_images_are_told(tiny, tmp_path, capsys):
    driver.main(argv_of(tiny, tmp_path / "out", "--print_settings", limit=500))
    said = capsys.readouterr().err
    assert f"note: --limit 500: there are only {NUM_IMAGES} images\n" in said
    argv = argv_of(tiny, tmp_path / "out", "--print_settings", "--slurm_args=--time=60")
    driver.main(argv)
    assert "--slurm_args has no effect without --submit slurm" in capsys.readouterr().err


def test_images_of_others_are_neither_kept_as_samples_nor_overwritten(tiny, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(tiny.folder, out / "images")
    before = {path: path.read_bytes() for path in (out / "images").iterdir()}
    argv = argv_of(tiny, out, "--not_eval_metrics", dataset_path=out / "images")
    with pytest.raises(UserError, match="^--save_png_files: .*/images has files that are not of"):
        driver.main([*argv, "--save_png_files"])
    assert not list(out.glob("samples*"))
    driver.main(argv)
    assert before == {path: path.read_bytes() for path in (out / "images").iterdir()}


@pytest.mark.parametrize("below", ["", "out"])
def test_an_output_folder_among_the_images_is_refused(tiny, tmp_path, below):
    images = tmp_path / "images"
    shutil.copytree(tiny.folder, images)
    names = sorted(images.iterdir())
    with pytest.raises(UserError, match="^--dataset_path: the output folder .* choose another"):
        driver.main(argv_of(tiny, images / below, "--not_eval_metrics", dataset_path=images))
    assert sorted(images.iterdir()) == names


@pytest.mark.parametrize("change", ["another image", "one more"])
def test_start_images_that_change_meanwhile_are_noticed(tiny, tmp_path, monkeypatch, change):
    images = tmp_path / "images"
    shutil.copytree(tiny.folder, images)
    names = sorted(images.iterdir())
    job = read_job(tiny.worker_flags(tmp_path / "out", dataset_path=images), guided=False)
    sample = worker.Worker._sample

    def sample_and_change(self, chunk):
        made = sample(self, chunk)
        if change == "another image":
            shutil.copy(names[0], names[-1])
        else:
            shutil.copy(names[0], images / "10_label_1.png")
        return made

    monkeypatch.setattr(worker.Worker, "_sample", sample_and_change)
    with pytest.raises(UserError, match="has changed since the run's settings were written"):
        worker.run(job)


def test_a_grid_does_not_pair_samples_with_other_images(tiny, tmp_path, capsys):
    images, out = tmp_path / "images", tmp_path / "out"
    shutil.copytree(tiny.folder, images)
    argv = argv_of(tiny, out, "--not_eval_metrics", dataset_path=images)
    driver.main(argv)
    paired = (out / "samples_grid.png").read_bytes()
    shutil.copy(next(images.glob("5_*")), images / "00_label_7.png")
    gather(ChunkFolder.load(out))
    assert (
        "has changed since it was sampled from: the grid leaves it out" in capsys.readouterr().out
    )
    assert (out / "samples_grid.png").read_bytes() != paired


def test_pngs_of_a_run_before_are_not_taken_for_this_one_s(tiny, tmp_path):
    out = tmp_path / "out"
    driver.main(argv_of(tiny, out, "--not_eval_metrics", "--save_png_files"))
    assert "samples_of" in json.loads((out / "images.json").read_text())
    driver.main(argv_of(tiny, out, "--not_eval_metrics", "--save_png_files"))
    shutil.rmtree(out / "chunks")
    for name in ("settings.json", "samples_all.npz"):
        (out / name).unlink()
    with pytest.raises(UserError, match="^--save_png_files: .*/images has files that are not of"):
        driver.main(argv_of(tiny, out, "--not_eval_metrics", "--save_png_files", seed=1))
