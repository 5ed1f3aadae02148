"""Sweeps through their command line: with tiny networks, and the shell script on emoji32."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from esddpm_io.errors import UserError, run_main
from guided_diffusion.commands import driver, sample, status, sweep
from guided_diffusion.sampling import sampler
from tests.tiny_sampling import NUM_IMAGES, SCRIPTS, TinyFiles, read_job, run_script
from tests.waiting import PATIENCE_S, wait_until


def flags(tiny: TinyFiles, output: Path, **changes: object) -> list[str]:
    """Flags of a sweep: T' = 0 and 200, two evaluations, guided, one process on the CPU."""
    values = {
        "dataset": tiny.root / "tiny.toml",
        "t_prime": "0,200",
        "steps": 2,
        "batch_size": 4,
        "devices": "cpu",
        "eval_backend": "torch",
        "output_dir": output,
        **changes,
    }
    return [part for key, value in values.items() for part in (f"--{key}", str(value))]


def images(folder: Path) -> np.ndarray:
    with np.load(folder / "samples_all.npz") as npz:
        return npz["arr_0"]


def metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture(scope="module")
def whole(tiny) -> tuple[subprocess.CompletedProcess, Path]:
    """Nine points: the generator, then T' = 200 and noise by two samplers with two seeds."""
    lists = {"t_prime": "0,200,scratch", "sampler": "ddim,dpmpp_2m_sde", "seed": "0,1"}
    argv = flags(tiny, "out", dataset="tiny.toml", devices="cpu,cpu", **lists)
    done = run_script("sweep.py", *argv, cwd=tiny.root)
    assert done.returncode == 0, done.stdout + done.stderr
    return done, tiny.root / "out"


POINTS = {
    f"{name}_{start}_2_steps{seed}"
    for name in ("ddim", "dpmpp_2m_sde")
    for start in ("t200", "from_scratch")
    for seed in ("", "_seed1")
} | {"generator"}


def test_a_folder_for_each_point(tiny, whole):
    done, out = whole
    assert {path.parent.name for path in out.glob("*/metrics.json")} == POINTS
    assert "9 points, 160 network evaluations; folder: " in done.stdout
    assert "160 network evaluations, all of them" in done.stderr
    with np.load(tiny.images) as given:
        np.testing.assert_array_equal(images(out / "generator"), given["arr_0"])


def test_a_point_is_what_the_driver_gives(tiny, tmp_path, whole):
    by_name = {"t_prime": 200, "steps": 2, "sampler": "dpmpp_2m_sde", "seed": 1}
    argv = flags(tiny, tmp_path, **by_name)
    driver.main(["--execute", *argv])
    point = whole[1] / "dpmpp_2m_sde_t200_2_steps_seed1"
    np.testing.assert_array_equal(images(point), images(tmp_path))
    one, other = metrics(point), metrics(tmp_path)
    assert one["run"] == other["run"]
    times = {"seconds_per_image": 0}
    assert one["point"] | times == other["point"] | times
    scores = [record["evaluation"]["results"][0]["metrics"] for record in (one, other)]
    assert scores[0] == scores[1]


def test_a_reference_that_has_changed_scores_all_points_anew(tiny, tmp_path):
    reference, out = tmp_path / "reference.npz", tmp_path / "out"
    with np.load(tiny.images) as npz:
        pixels = npz["arr_0"]
    for turn, shown in enumerate((pixels, 255 - pixels)):
        np.savez(reference, arr_0=shown)
        more = {"t_prime": "0,200,300" if turn else "0,200", "ref_batch": reference}
        sweep.main(flags(tiny, out, **more, classifier_guidance_scale=0))
    sweep.main(flags(tiny, tmp_path / "fresh", **more, classifier_guidance_scale=0))
    found = [(path / "sweep.csv").read_text().splitlines() for path in (out, tmp_path / "fresh")]
    times = found[0][0].split(",").index("seconds_per_image")
    rows = [[line.split(",")[:times] for line in lines] for lines in found]
    assert len(rows[0]) == 4 and rows[0] == rows[1]


def test_auto_is_measured_once(tiny, tmp_path, capsys):
    argv = flags(tiny, tmp_path, t_prime="auto,0", seed="0")
    with pytest.raises(UserError, match="--t_prime auto: T' is not known yet"):
        sweep.main([*argv, "--print_points"])
    with pytest.raises(UserError, match="^--eta must be in 0 … 1, not 2.0$"):
        sweep.main([*argv, "--eta", "2"])
    assert not list(tmp_path.glob("t_prime/*"))
    sweep.main(argv)
    (file,) = tmp_path.glob("t_prime/*.json")
    measured = json.loads(file.read_text())
    t_prime = measured["proposal"]["t_prime"]
    record = metrics(tmp_path / f"dpmpp_2m_sde_t{t_prime}_2_steps")
    assert record["t_prime_proposal"] == measured
    assert metrics(tmp_path / "generator")["t_prime_proposal"] is None
    capsys.readouterr()
    sweep.main([*argv, "--print_points"])
    assert f"T' = {t_prime}, as it was measured before" in capsys.readouterr().out


def test_points_say_what_they_are(tiny, whole):
    out = whole[1]
    point = metrics(out / "dpmpp_2m_sde_t200_2_steps_seed1")["point"]
    assert point.pop("seconds_per_image") > 0
    assert point == {
        "t_prime": 200,
        "steps": 2,
        "sampler": "dpmpp_2m_sde",
        "eta": 1.0,
        "clip_denoised": False,
        "variance": "learned",
        "guidance_scale": 1.0,
        "seed": 1,
        "timesteps": [199, 99],
        "network_evaluations": 2,
        "samples": NUM_IMAGES,
        "checkpoint": str(tiny.model),
        "start_images": str(tiny.images),
    }
    scratch = metrics(out / "ddim_from_scratch_2_steps")
    assert scratch["point"]["t_prime"] is None and scratch["point"]["start_images"] is None
    generator = metrics(out / "generator")
    assert generator["run"] is None
    assert generator["point"]["t_prime"] == generator["point"]["network_evaluations"] == 0
    assert generator["point"]["sampler"] is None and generator["point"]["seed"] is None
    assert set(generator["inputs"]) == {"start_images", "reference", "graph"}
    # The reference is the generator's own images here.
    distance = generator["evaluation"]["results"][0]["metrics"]["frechet_distance"]
    assert distance == pytest.approx(0, abs=1e-9)


def test_tables_hold_all_points(whole):
    done, out = whole
    tables = json.loads((out / "sweep.json").read_text())
    assert {row["folder"] for row in tables["points"]} == POINTS
    for row in tables["points"]:
        assert {**metrics(out / row["folder"]), "folder": row["folder"]} == row
    assert tables["points"][0]["folder"] == "generator"
    with open(out / "sweep.csv", newline="") as file:
        rows = {row["folder"]: row for row in csv.DictReader(file)}
    assert set(rows) == POINTS
    row = rows["ddim_from_scratch_2_steps_seed1"]
    assert (row["t_prime"], row["steps"], row["seed"]) == ("scratch", "2", "1")
    assert row["network_evaluations"] == "2" and float(row["seconds_per_image"]) > 0
    difference = tables["differences"]["ddim_from_scratch_2_steps_seed1"]
    assert difference["to"] == row["best"] == "generator"
    assert float(row["difference"]) == difference["difference"]
    assert len(tables["over_seeds"]) == 4
    assert "mean of 2 seeds" in done.stdout


def test_networks_are_loaded_once_for_all_points(tiny, whole, tmp_path, monkeypatch):
    """And the reference goes through the graph once."""
    loaded = []
    load = sampler.load_network

    def count(record, *where, **how):
        loaded.append(record.kind)
        return load(record, *where, **how)

    monkeypatch.setattr(sampler, "load_network", count)
    settings, expected = [], []
    for name, scale in (("a", 0.0), ("b", 1.0), ("c", 2.0)):
        argv = tiny.guided_flags(tmp_path / name, classifier_scale=scale)
        job = read_job(argv, guided=True)
        expected.append(sampler.Sampler(job).sample(0, NUM_IMAGES)[0])
        (tmp_path / name).mkdir()
        (tmp_path / name / "settings.json").write_text(json.dumps(job.run.to_json()))
        settings.append(str(tmp_path / name / "settings.json"))
    loaded.clear()
    sample.main(["--settings", *settings, "--device", "cpu", "--batch_size", "10"], guided=True)
    assert loaded == ["model", "classifier"]
    for name, pixels in zip("abc", expected, strict=True):
        [chunk] = (tmp_path / name / "chunks").glob("*/*.npz")
        np.testing.assert_array_equal(np.load(chunk)["arr_0"], pixels)
    assert whole[0].stderr.count("features of images.npz: 10 images") == 1, whole[0].stderr


def test_later_points_are_added_and_finished_ones_left_alone(tiny, tmp_path, capsys):
    sweep.main(flags(tiny, tmp_path))
    capsys.readouterr()
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/samples_all.npz")}
    assert len(written) == 2
    sweep.main(flags(tiny, tmp_path, t_prime="200,300", seed="1,0", eta="1"))
    said = capsys.readouterr()
    assert "4 points, 80 network evaluations, 20 of them done" in said.out
    assert f"{tmp_path}/dpmpp_2m_sde_t200_2_steps/samples_all.npz" not in said.out
    assert all(path.stat().st_mtime_ns == written[path] for path in written)
    rows = json.loads((tmp_path / "sweep.json").read_text())["points"]
    assert [row["folder"] for row in rows] == [
        "generator",
        "dpmpp_2m_sde_t200_2_steps",
        "dpmpp_2m_sde_t200_2_steps_seed1",
        "dpmpp_2m_sde_t300_2_steps",
        "dpmpp_2m_sde_t300_2_steps_seed1",
    ]
    # Fewer images: those that are there, scored anew.
    sweep.main(flags(tiny, tmp_path, limit=6))
    assert "all 6 samples are there already" in capsys.readouterr().out
    for name in ("generator", "dpmpp_2m_sde_t200_2_steps"):
        assert len(images(tmp_path / name)) == metrics(tmp_path / name)["point"]["samples"] == 6


def test_what_does_not_differ_is_one_point(tiny, tmp_path, capsys):
    """Guidance of a sampler without noise: eta changes nothing; nor steps and seeds the images."""
    lists = {"t_prime": "0,200", "sampler": "dpmpp_2m,ddim", "eta": "0,0.5", "steps": "1,2"}
    sweep.main([*flags(tiny, tmp_path, **lists), "--print_points"])
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:-1]]
    assert names == [
        "generator",
        *("dpmpp_2m_t200_1_steps", "ddim_t200_1_steps", "ddim_t200_1_steps_eta0.5"),
        *("dpmpp_2m_t200_2_steps", "ddim_t200_2_steps", "ddim_t200_2_steps_eta0.5"),
    ]
    assert not list(tmp_path.iterdir())


def test_checkpoints_images_and_guidance_as_lists(tiny, tmp_path, capsys):
    other = tmp_path / "first.npz"
    with np.load(tiny.images) as npz:
        np.savez(other, npz["arr_0"][::-1], npz["arr_1"])
    lists = {"dataset_path": f"{tiny.images},{other}", "classifier_guidance_scale": "0,1"}
    argv = flags(tiny, tmp_path / "out", **lists)
    sweep.main([*argv, "--print_points"])
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines[1:-1]]
    assert len(names) == 6  # the generators' images are not guided
    assert [name[:10] for name in names].count("generator_") == 2
    for stem in ("images", "first"):
        assert [f"_guidance0_{stem}_" in name for name in names].count(True) == 1


def test_a_folder_of_images_is_read_once(tiny, tmp_path, monkeypatch, whole):
    """To know what is in it; the workers go by that, as long as no file has changed."""
    argv = flags(tiny, tmp_path, t_prime="0,200,300", dataset_path=tiny.folder)
    sweep.main(argv)
    for name in ("generator", "dpmpp_2m_sde_t200_2_steps"):
        np.testing.assert_array_equal(images(tmp_path / name), images(whole[1] / name))
    notes = [path.read_text() for path in tmp_path.rglob("generator_images.json")]
    assert len(notes) == 3 and len(set(notes)) == 1


def test_a_point_that_fails_does_not_end_the_others(tiny, tmp_path):
    argv = flags(tiny, tmp_path, classifier_guidance_scale="0,1e38,1", steps=3)
    done = run_script("sweep.py", *argv)
    assert done.returncode == 1, done.stdout + done.stderr
    bad = tmp_path / "dpmpp_2m_sde_t200_3_steps_guidance1e+38"
    assert done.stderr.count("going on with the other points") == 1
    assert done.stderr.count(f"error: {bad}: sample ") == 2  # when it happens, and in the end
    assert "became NaN or infinite" in done.stderr and "Traceback" not in done.stderr
    rows = json.loads((tmp_path / "sweep.json").read_text())["points"]
    assert [row["point"]["guidance_scale"] for row in rows] == [0.0, 0.0, 1.0]
    assert not (bad / "metrics.json").exists()


def test_other_settings_are_refused(tiny, tmp_path, capsys):
    sweep.main(flags(tiny, tmp_path, limit=6))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"t200_2_steps holds samples of other settings \(clip_d"):
        sweep.main(flags(tiny, tmp_path, t_prime="100,200", clip_denoised=True))
    assert not list((tmp_path / "dpmpp_2m_sde_t100_2_steps").glob("chunks"))
    other = tmp_path.parent / "other.npz"
    with np.load(tiny.images) as npz:
        np.savez(other, npz["arr_0"][::-1], npz["arr_1"])
    with pytest.raises(UserError, match=r"generator holds other images, of .*images\.npz"):
        sweep.main(flags(tiny, tmp_path, t_prime=0, dataset_path=other))
    assert set(before) <= set(tmp_path.rglob("*"))


def test_everything_wrong_is_named_at_once(tiny, tmp_path):
    changes = {"t_prime": "0,many,300", "steps": "0,2", "sampler": "euler", "seed": "x"}
    with pytest.raises(UserError) as refused:
        sweep.main(flags(tiny, tmp_path, **changes))
    assert str(refused.value) == (
        "--t_prime: 'many' is none of: whole numbers from 0, scratch, auto; "
        "--steps: '0' is none of: whole numbers from 1; "
        "--sampler: 'euler' is none of: ddpm, ddim, dpmpp_2m, dpmpp_2m_sde; "
        "--seed: 'x' is none of: whole numbers from 0"
    )
    with pytest.raises(UserError) as refused:
        sweep.main(flags(tiny, tmp_path, t_prime="3,200,1001", steps="2,4"))
    assert "--t_prime must be in 1 ... 1000, not 1001" in str(refused.value)
    assert "--steps must be in 1 ... 3 for t_prime 3, not 4" in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_several_machines(tiny, tmp_path, whole, capsys):
    lists = {"t_prime": "0,200,scratch", "sampler": "ddim"}
    argv = flags(tiny, tmp_path, **lists)
    sweep.main([*argv, "--num_machines", "2", "--machine_idx", "1"])
    assert "machine 0 gathers and scores the points" in capsys.readouterr().out
    assert not list(tmp_path.glob("*/samples_all.npz")) and not (tmp_path / "sweep.json").exists()
    sweep.main([*argv, "--num_machines", "2"])
    for name in ("generator", "ddim_t200_2_steps", "ddim_from_scratch_2_steps"):
        np.testing.assert_array_equal(images(tmp_path / name), images(whole[1] / name))
    assert len(json.loads((tmp_path / "sweep.json").read_text())["points"]) == 3


def test_status_shows_all_points(tiny, tmp_path, whole, capsys):
    status.main([str(whole[1])])
    assert capsys.readouterr().out == "done 160 network evaluations, all of them\n"
    sweep.main(flags(tiny, tmp_path, t_prime="200"))
    for chunk in tmp_path.glob("*/chunks/*/0000004-*.npz"):
        chunk.unlink()
    status.main([str(tmp_path)])
    assert "done 6/10 images (60%)" in capsys.readouterr().out


# --- the shell scripts ---

SHELL_SCRIPTS = sorted((SCRIPTS / "sweeps").glob("*.sh"))


def shell(script: str, *more: str, **variables: object) -> tuple[list[str], dict[str, str]]:
    """A command line and its environment, on one thread and this interpreter."""
    words = {name: str(value) for name, value in variables.items()}
    environment = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **words}
    return ["bash", str(SCRIPTS / "sweeps" / script), *more], {**os.environ, **environment}


def test_shell_scripts_are_clean_and_one_a_data_set():
    names = [path.stem for path in SHELL_SCRIPTS]
    assert names == ["emoji32", "imagenet64", "lsun_bedroom", "lsun_cat"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {"PATH": path}
    lint = subprocess.run(
        ["shellcheck", *SHELL_SCRIPTS], env=environment, capture_output=True, text=True
    )
    assert lint.returncode == 0, lint.stdout


@pytest.mark.parametrize("name", ["imagenet64", "lsun_bedroom", "lsun_cat"])
def test_scripts_of_published_data_sets_say_how_to_fetch_the_files(name, tmp_path):
    """Their flags are understood: what is missing are the files."""
    argv, environment = shell(f"{name}.sh", OUTPUT=tmp_path / "out", DEVICES="cpu")
    done = subprocess.run(argv, env=environment, cwd=tmp_path, capture_output=True, text=True)
    if (SCRIPTS / "models/lsun").exists() or (SCRIPTS / "models/64x64_diffusion.pt").exists():
        pytest.skip("the published files are here: this would sample for hours")
    assert done.returncode == 2
    assert f"download.py {name}" in done.stderr and done.stderr.count("error: ") == 1


def test_a_script_sets_up_its_environment_and_hands_on_its_variables(tmp_path):
    """Here one whose set-up makes a Python that prints its flags."""
    (tmp_path / "setup_env.sh").write_text(
        "mkdir -p $(dirname $0)/.venv/bin; cd $(dirname $0)/.venv/bin\n"
        "printf '#!/bin/sh\\necho \"$@\"\\n' >python; chmod +x python; echo set up\n"
    )
    argv, environment = shell("emoji32.sh", "--print_points", PROJECT=tmp_path, SEEDS="0,1")
    del environment["PYTHON"]
    environment["GENERATOR_IMAGES"] = "my images.npz"
    done = [subprocess.run(argv, env=environment, capture_output=True, text=True) for _ in "ab"]
    assert [one.stdout.count("set up\n") for one in done] == [1, 0]
    assert done[1].stdout.strip() == (
        f"{tmp_path}/scripts/sweep.py --dataset emoji32 --output_dir "
        f"{tmp_path}/scripts/exps/emoji32/sweep --devices cpu,cpu --t_prime 0,200,300,400,500,600 "
        "--steps 8 --sampler dpmpp_2m_sde --seed 0,1 --limit 500 "
        "--dataset_path my images.npz --print_points"
    )


def test_a_sweep_that_is_killed_twice_goes_on(tmp_path):
    """By SIGKILL, then by SIGTERM: the samples and figures are those of one that ran through."""
    small = {"T_PRIMES": "0,200,400", "STEPS": 8, "LIMIT": 48, "DEVICES": "cpu"}
    more = ["--batch_size", "2", "--eval_backend", "torch"]
    copy = tmp_path / "copy.sh"
    copy.write_text((SCRIPTS / "sweeps/emoji32.sh").read_text())
    _, environment = shell("emoji32.sh", OUTPUT=tmp_path / "whole", PROJECT=SCRIPTS.parent, **small)
    done = subprocess.run(
        ["bash", str(copy), *more], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr

    out = tmp_path / "killed"
    argv, environment = shell("emoji32.sh", *more, OUTPUT=out, **small)
    said = ""
    for number in (signal.SIGKILL, signal.SIGTERM):
        log = tmp_path / f"{number}.log"
        with log.open("w") as stream:
            process = subprocess.Popen(
                argv, env=environment, cwd=tmp_path, stdout=stream, stderr=subprocess.STDOUT
            )
        # Workers that the first one has left behind may go on for a second.
        wait_until(
            lambda log=log: "; folder: " in log.read_text() and any(out.glob("*/chunks/*/0*.npz")),
            process,
        )
        os.kill(process.pid, number)
        process.wait(timeout=PATIENCE_S)
        said = log.read_text()
        assert process.returncode == -number or process.returncode == 143, said
    assert "stopped; what is finished stays; continue with\n" in said
    assert not (out / "sweep.json").exists()
    command = said.split("continue with\n")[1].splitlines()[0].strip()
    done = subprocess.run(
        ["bash", "-c", command], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " of them done; folder: " in done.stdout
    names = ("generator", "dpmpp_2m_sde_t200_8_steps", "dpmpp_2m_sde_t400_8_steps")
    for name in names:
        np.testing.assert_array_equal(images(out / name), images(tmp_path / "whole" / name))
    tables = [
        json.loads((folder / "sweep.json").read_text()) for folder in (out, tmp_path / "whole")
    ]
    assert tables[0]["differences"] == tables[1]["differences"]
    assert {row["folder"] for row in tables[0]["points"]} == set(names)


def test_run_main_reports_a_bad_sweep_in_one_line(tiny, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_main(lambda: sweep.main(flags(tiny, tmp_path, sampler="euler")))
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: --sampler: 'euler' is none of")


@pytest.mark.parametrize("dataset", ["emoji32", "emoji32_guided"])
def test_the_shipped_presets_with_every_sampler(tmp_path, dataset):
    """The second with its classifier, on trained weights: the path of ImageNet's preset."""
    samplers = ("ddpm", "ddim", "dpmpp_2m", "dpmpp_2m_sde")
    argv = ["--dataset", dataset, "--t_prime", "300", "--steps", "2", "--sampler"]
    argv += [",".join(samplers), "--limit", "6", "--devices", "cpu", "--eval_bootstrap", "0"]
    sweep.main([*argv, "--output_dir", str(tmp_path), "--eval_backend", "torch"])
    found = {name: images(tmp_path / f"{name}_t300_2_steps") for name in samplers}
    start = np.load(SCRIPTS.parent / "evaluations/precomputed/vae_emoji32.npz")["arr_0"][:6]
    for name, pixels in found.items():
        # Neither the start images nor noise: changed, but still the same drawings.
        difference = np.abs(pixels.astype(int) - start).mean()
        assert 3 < difference < 60, (name, difference)
        record = metrics(tmp_path / f"{name}_t300_2_steps")["run"]
        assert (record["guidance"] is not None) == (dataset == "emoji32_guided")
    assert len({pixels.tobytes() for pixels in found.values()}) == len(samplers)
