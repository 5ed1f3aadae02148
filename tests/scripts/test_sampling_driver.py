"""The driver, the sampling workers, gathering and status through their command lines."""

import contextlib
import importlib.util
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
from evaluations.features import BACKENDS
from guided_diffusion import presets
from guided_diffusion.sampling import plan, worker
from guided_diffusion.sampling.chunks import ChunkFolder
from guided_diffusion.sampling.claims import Observer
from guided_diffusion.sampling.sources import open_generator_images
from tests.tiny_sampling import (
    FEATURE_GRAPH,
    NUM_IMAGES,
    SCRIPTS,
    TinyFiles,
    chunk_held,
    chunks,
    run_script,
)
from tests.waiting import PATIENCE_S, wait_until

DRIVER = "generate_processes_diffusion_and_reverse.py"
GATHER = "gather_numpyz_and_compute_fid.py"


def load(name: str):
    """A script as a module, for calls of its main without a process of its own."""
    spec = importlib.util.spec_from_file_location(name.removesuffix(".py"), SCRIPTS / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


driver, gather, status = load(DRIVER), load(GATHER), load("status.py")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> TinyFiles:
    files = TinyFiles(tmp_path_factory.mktemp("tiny"))
    files.preset()
    return files


@pytest.fixture(autouse=True)
def own_signal_handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


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
    worker.main(argv, guided=guided)
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
    logs = sorted(path.name for path in (out / "logs").iterdir())
    assert logs == [f"ddpm_5_length_reverse_2_steps_global_rank_{rank}.log" for rank in (0, 1)]
    assert "starting at original timestep 250" in (out / "logs" / logs[0]).read_text()


def test_metrics_are_called_what_they_are_and_kept_with_all_settings(whole_job):
    done, out = whole_job
    assert "Frechet distance (emoji32 features): " in done.stdout and "FID" not in done.stdout
    record = json.loads((out / "metrics.json").read_text())
    assert record["sampling"]["classifier_scale"] == 1.0
    assert record["sampling"]["denoise_steps"] == 2 and record["sampling"]["seed"] == 0
    assert record["sampling"]["start_timestep"] == 250
    assert record["evaluation"]["results"][0]["metrics"]["frechet_distance"] > 0


def test_grid_and_pngs(whole_job):
    out = whole_job[1]
    images, labels = all_samples(out)
    grid = np.asarray(Image.open(out / "samples_grid.png"))
    # 10 images in two rows of 8, each under its row of start images.
    assert grid.shape == (4 * 10 + 2, 8 * 10 + 2, 3)
    np.testing.assert_array_equal(grid[12:20, 2:10], images[0])
    np.testing.assert_array_equal(grid[32:40, 12:20], images[9])
    assert len(list((out / "images").iterdir())) == NUM_IMAGES
    png = np.asarray(Image.open(out / "images" / f"7_label_{labels[7]}.png"))
    np.testing.assert_array_equal(png, images[7])


def test_samples_of_other_settings_are_never_reused(tiny, whole_job):
    argv = flags(tiny, whole_job[1], classifier_guidance_scale=0)
    with pytest.raises(UserError, match=r"classifier_scale is 1\.0 there, 0\.0 now"):
        driver.main(["--execute", *argv])


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
        assert f"--model_path {SCRIPTS}/models/64x64_diffusion.pt" in line
        assert "--num_channels 192" in line and "--classifier_depth 4" in line


def test_folders_and_flags_of_the_other_modes(capsys):
    argv = ["--dataset", "lsun_cat", "--start_from_scratch", "--save_dir_suffix", "a"]
    driver.main([*argv, "--chain_length", "ddim50", "--devices", "cpu"])
    _, folder, command = capsys.readouterr().out.splitlines()
    assert folder.endswith("exps/lsun_cat/ddpm_ddim50_steps/generate_from_scratch_a")
    assert "/image_sample_diffusion_and_reverse.py " in command
    assert "--use_ddim True" in command and "--num_samples 50000" in command
    assert "--denoise_steps" not in command and "--dataset_path" not in command


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
    assert plan.EVALUATION_BACKENDS == BACKENDS


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
    found = plan.evaluation(driver.create_argparser().parse_args(argv), preset)
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
    preset.write_text("".join(f'{key} = "{path}"\n' for key, path in keys.items()))
    with pytest.raises(UserError, match=r"--not_eval_metrics samples without evaluating"):
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
        ("--num_samples 7", ["--num_samples has no effect without --start_from_scratch"]),
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
                "--eta has no effect without DDIM (--chain_length ddim250, say)",
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
        ("--classifier_guidance_scale 0 --dataset_path x.npz --limit 3", []),
    ],
)
def test_flags_typed_in_vain_are_warned_of(capsys, argv, warnings):
    driver.main(["--devices", "cpu", *argv.split()])
    assert capsys.readouterr().err.splitlines() == [f"warning: {line}" for line in warnings]


def test_precision_and_eta_reach_the_workers(capsys):
    argv = ["--use_fp16", "no", "--chain_length", "ddim50", "--eta", "0.3", "--devices", "cpu"]
    driver.main(argv)
    command = capsys.readouterr().out.splitlines()[-1]
    assert "--use_fp16 False" in command and "--eta 0.3" in command
    assert "--use_fp16 True" not in command


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


def test_a_failed_start_does_not_stand_in_the_way_of_the_mended_command(tiny, tmp_path):
    out = tmp_path / "out"
    broken = tmp_path / "cut.pt"
    state = torch.load(tiny.model)
    state.popitem()
    torch.save(state, broken)
    begin = ["--execute", "--not_eval_metrics"]
    failed = run_script(DRIVER, *begin, *flags(tiny, out, model_path=broken))
    assert failed.returncode == 1 and "does not fit the model flags" in failed.stderr
    assert (out / "settings.json").exists()
    mended = run_script(DRIVER, *begin, *flags(tiny, out))
    assert mended.returncode == 0, mended.stdout + mended.stderr
    assert len(all_samples(out)[0]) == NUM_IMAGES


def test_limit_takes_the_first_images(tiny, tmp_path):
    assert len(open_generator_images(str(tiny.images), image_size=8, num_classes=None)) > 3
    source = open_generator_images(str(tiny.images), image_size=8, num_classes=None, limit=3)
    assert len(source) == 3
    with pytest.raises(UserError, match="--limit must be at least 1"):
        driver.main(["--execute", *flags(tiny, tmp_path / "out", limit=-1)])


def test_a_worker_that_cannot_work_ends_the_run_with_its_last_lines(tiny, tmp_path):
    broken = tmp_path / "cut.pt"
    broken.write_bytes(tiny.model.read_bytes()[:5000])
    done = run_script(DRIVER, "--execute", *flags(tiny, tmp_path / "out", model_path=broken))
    assert done.returncode in (1, 2)
    assert f"--model_path: {broken} is truncated" in done.stderr
    assert "Traceback" not in done.stderr


# --- interrupted, killed and continued ---

SLOW = {"chain_length": 100, "reverse_steps": 15, "batch_size": 1, "classifier_guidance_scale": 0}
SLOW_WORKER = {"timestep_respacing": "100", "denoise_steps": 15, "batch_size": 1}


@pytest.fixture(scope="module")
def slow_job(tiny, tmp_path_factory) -> tuple[np.ndarray, np.ndarray]:
    folder = tmp_path_factory.mktemp("slow")
    return by_one_process(folder, tiny.worker_flags(folder, **SLOW_WORKER), guided=False)


def start(argv: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        argv,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for_chunks(folder: Path, number: int, process: subprocess.Popen) -> None:
    wait_until(lambda: len(list((folder / "chunks").glob("0*"))) >= number, process)


def kill_a_worker(folder: Path, *processes: subprocess.Popen) -> None:
    """Kill a worker at a sample or, where the machine is too fast for that, one that waits."""
    states = ("sampling", "waiting")

    def at_work() -> list[dict]:
        workers = Observer(str(folder)).workers()
        return [worker for worker in workers if worker["alive"] and worker["state"] in states]

    worker = min(wait_until(at_work, *processes), key=lambda worker: states.index(worker["state"]))
    os.kill(worker["pid"], signal.SIGKILL)


def test_stopped_then_continued_by_two_machines_of_which_one_loses_a_worker(
    tiny, tmp_path, slow_job
):
    out = tmp_path / "out"
    command = [sys.executable, str(SCRIPTS / DRIVER), "--execute", "--not_eval_metrics"]
    command += flags(tiny, out, **SLOW)

    with chunk_held(out, NUM_IMAGES - 1):
        first = start(command)
        wait_for_chunks(out, 2, first)
        first.send_signal(signal.SIGTERM)
        said = first.communicate(timeout=PATIENCE_S)[0]
    assert first.returncode == 143, said
    assert "what is finished stays; continue with\n" in said
    assert said.split("continue with\n  ")[1].split()[:2] == command[:2]
    assert 2 <= ChunkFolder.load(out).count_done() < NUM_IMAGES

    # Two machines at once on the one folder, with another batch size than the first time.
    both = ["--batch_size", "2", "--num_machines", "2", "--machine_idx"]
    with chunk_held(out, NUM_IMAGES - 1):
        machines = [start([*command, *both, str(index)]) for index in range(2)]
        kill_a_worker(out, *machines)
    said = [machine.communicate(timeout=PATIENCE_S)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert "was ended by SIGKILL" in said[0] + said[1]
    assert_equal(all_samples(out), slow_job)


def test_torchrun_loses_a_process_and_mpiexec_finishes(tiny, tmp_path, slow_job):
    mpiexec = shutil.which("mpiexec", path=Path(sys.executable).parent) or shutil.which("mpiexec")
    script = str(SCRIPTS / "image_sample_diffusion_and_reverse.py")
    argv = [script, *tiny.worker_flags(tmp_path, **SLOW_WORKER)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]

    with chunk_held(tmp_path, NUM_IMAGES - 1):
        run = start([*torchrun, "--nproc_per_node", "2", *argv])
        wait_for_chunks(tmp_path, 2, run)
        kill_a_worker(tmp_path, run)
        run.communicate(timeout=PATIENCE_S)
    assert run.returncode != 0 and ChunkFolder.load(tmp_path).missing()

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

    if not mount("-o", "size=24k"):
        pytest.skip("mounting a small tmpfs needs root")
    try:
        argv = tiny.worker_flags(tmp_path / "out", batch_size=1)
        with pytest.raises(SystemExit) as stopped:
            run_main(lambda: worker.main(argv, guided=False))
        assert stopped.value.code == 74
        assert "error: the disk is full" in capsys.readouterr().err
        done = ChunkFolder.load(tmp_path / "out").count_done()
        assert done < NUM_IMAGES
        assert mount("-o", "remount,size=4m")
        worker.main(argv, guided=False)
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


def test_driver_gather_and_evaluator_end_together(tiny, tmp_path, whole_job):
    """SIGTERM to the driver alone, while the evaluator reads an image that never ends."""
    shutil.copytree(whole_job[1], tmp_path / "out")
    (tmp_path / "out" / "metrics.json").unlink()
    reference = tmp_path / "reference"
    shutil.copytree(tiny.folder, reference)
    held = sorted(reference.iterdir(), key=lambda path: int(path.name.split("_")[0]))[5]
    held.unlink()
    os.mkfifo(held)
    argv = flags(tiny, tmp_path / "out", ref_batch=reference)
    job = start([sys.executable, str(SCRIPTS / DRIVER), "--execute", *argv])

    def open_where_it_is_read() -> int | None:
        with contextlib.suppress(OSError):
            return os.open(held, os.O_WRONLY | os.O_NONBLOCK)

    written = wait_until(open_where_it_is_read, job)
    job.send_signal(signal.SIGTERM)
    said = job.communicate(timeout=PATIENCE_S)[0]  # the pipe closes when all have ended
    os.close(written)
    assert job.returncode == 143, said
    assert said.count("terminated\n") == 3
    assert "the evaluation failed" not in said
    assert not list((tmp_path / "out").glob("*.tmp*"))
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_gathering_does_not_wait_for_ever_for_the_dead(tmp_path):
    folder = ChunkFolder.open(tmp_path, {"num_samples": 4}, {"dataset_path": None}, 2)
    folder.write(0, np.zeros((2, 4, 4, 3), np.uint8), None)
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
    argv = ["--dir", tmp_path / "out", "--dataset", "emoji32", "--ref_batch", reference]
    done = run_script(GATHER, *argv)
    assert done.returncode == 2 and str(broken) in done.stderr
    assert "error: the evaluation failed; the samples are in" in done.stderr
    assert len(all_samples(tmp_path / "out")[0]) == NUM_IMAGES
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_status_shows_done_missing_and_who_does_what(tmp_path, capsys):
    folder = ChunkFolder.open(tmp_path, {"num_samples": 6}, {}, 2)
    folder.write(1, np.zeros((2, 4, 4, 3), np.uint8), None)
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
    for chunk in (0, 2):
        folder.write(chunk, np.zeros((2, 4, 4, 3), np.uint8), None)
    status.main([str(tmp_path), "--watch"])
    assert "6/6 images (100%)" in capsys.readouterr().out
    for none in (tmp_path / "chunks", __file__):
        with pytest.raises(UserError, match="is not a folder of samples"):
            status.main([str(none)])
    for damaged in ('{"settings": ', '{"settings": {}}', "[]", '"text"'):
        (tmp_path / "settings.json").write_text(damaged)
        with pytest.raises(UserError, match=r"settings\.json is damaged: it "):
            status.main([str(tmp_path)])
