"""The training commands as users start them: alone, under launchers, stopped, killed, resumed."""

import csv
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from esddpm_io.errors import UserError
from guided_diffusion import logger
from guided_diffusion.checkpoints import read_sidecar
from guided_diffusion.commands import classifier_train, image_train, super_res_train, vae_train
from guided_diffusion.script_util import create_model_and_diffusion, model_and_diffusion_defaults
from guided_diffusion.train_options import explained_flags, loop_options
from guided_diffusion.training.super_res import load_superres_data
from tests.waiting import PATIENCE_S, wait_until

SCRIPT = str(Path(__file__).resolve().parents[2] / "scripts" / "image_train.py")
TINY = {
    "image_size": 8,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1",
    "attention_resolutions": "4",
    "num_heads": 1,
}
SHARED = {
    "lr": 1e-3,
    "ema_rate": "0.9",
    "log_interval": 1,
    "schedule_sampler": "loss-second-moment",
}


def flags(**values):
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "data.npz"
    np.savez(
        path,
        arr_0=rng.integers(0, 256, (13, 8, 8, 3), dtype=np.uint8),
        arr_1=rng.integers(0, 7, 13),
    )
    return str(path)


@pytest.fixture(autouse=True)
def log_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "run"))
    yield
    logger.reset()


def tensors(folder, step, *prefixes):
    files = [Path(folder) / f"{prefix}{step:06d}.pt" for prefix in prefixes]
    return [value for file in files for value in torch.load(file, weights_only=True).values()]


def figures(folder):
    with open(Path(folder) / "progress.csv", newline="") as file:
        return list(csv.DictReader(file))


LAUNCHERS = {
    "alone": [sys.executable],
    "torchrun": [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--standalone", "--nproc_per_node", "2"),
    ],
    "mpiexec": ["mpiexec", "-n", "2", sys.executable],
}


def mpiexec():
    """The mpiexec of the environment that runs the tests, else the one on the path."""
    return shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")


def command_of(launcher):
    if launcher != "mpiexec":
        return LAUNCHERS[launcher]
    pytest.importorskip("mpi4py")
    if mpiexec() is None:
        pytest.skip("no mpiexec")
    return [mpiexec(), *LAUNCHERS[launcher][1:]]


@pytest.mark.parametrize("launcher", ["torchrun", "mpiexec"])
def test_two_processes_equal_one_with_their_batch(launcher, data, tmp_path, monkeypatch):
    command = command_of(launcher)
    options = {"data_dir": data, "iterations": 3, **TINY, **SHARED, "learn_sigma": True}
    image_train.main(flags(batch_size=4, **options))
    environ = {**os.environ, "OPENAI_LOGDIR": str(tmp_path / "two")}
    result = subprocess.run(
        [*command, SCRIPT, *flags(batch_size=2, **options)],
        env=environ,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert result.returncode == 0, result.stderr
    torch.manual_seed(0)
    network = {**model_and_diffusion_defaults(), **TINY, "learn_sigma": True}
    start = [p.detach() for p in create_model_and_diffusion(**network)[0].parameters()]
    for prefix in ("model", "ema_0.9_"):
        one, two = (tensors(tmp_path / run, 3, prefix) for run in ("run", "two"))
        moved = sum((a - s).square().sum() for a, s in zip(one, start, strict=True)).sqrt()
        apart = sum((a - b).square().sum() for a, b in zip(one, two, strict=True)).sqrt()
        # Sums in another order. A bias in front of a norm has no gradient but rounding, which
        # Adam enlarges to steps of up to lr: so the distance of all parameters together counts.
        assert apart < 1e-3 * moved
    assert (tmp_path / "two/log-rank001.txt").exists()
    # Logged figures are of the global batch.
    for a, b in zip(figures(tmp_path / "run"), figures(tmp_path / "two"), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert float(a[name] or 0) == pytest.approx(float(b[name] or 0), rel=1e-3), name


def test_split_networks_train_as_whole_ones_do_and_go_on_from_each_others_files(data, tmp_path):
    """--shard against DistributedDataParallel, and each resumed by the other."""
    options = {"data_dir": data, **TINY, **SHARED, "learn_sigma": True, "save_interval": 2}
    # Pictures are of other weights than those that the next step trains.
    options |= {"batch_size": 2, "microbatch": 1, "grad_clip": 0.5, "sample_interval": 1}

    def train(run, steps, *more):
        argv = flags(**options, iterations=steps, resume_checkpoint="auto")
        environ = {**os.environ, "OPENAI_LOGDIR": str(tmp_path / run)}
        done = subprocess.run(
            [*LAUNCHERS["torchrun"], SCRIPT, *argv, *more],
            env=environ,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        assert done.returncode == 0, done.stderr

    def saved(run, step):
        opt = torch.load(tmp_path / run / f"opt{step:06d}.pt", weights_only=True)
        moments = [value for state in opt["state"].values() for value in state.values()]
        return [*tensors(tmp_path / run, step, "model", "ema_0.9_"), *moments]

    def check_equal(step, atol):
        for a, b in zip(saved("split", step), saved("whole", step), strict=True):
            assert type(a) is type(b) is torch.Tensor
            torch.testing.assert_close(a, b, rtol=1e-5, atol=atol)

    train("whole", 2)
    train("split", 2, "--shard")
    check_equal(2, atol=1e-6)
    assert (tmp_path / "split/samples000002.png").exists()
    for a, b in zip(figures(tmp_path / "split"), figures(tmp_path / "whole"), strict=True):
        for name in ("loss", "grad_norm", "param_norm"):
            assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-4), name
    # From here on each goes the other's way.
    train("whole", 4, "--shard")
    train("split", 4)
    # A bias in front of a norm has no gradient but rounding, which Adam enlarges.
    check_equal(4, atol=1e-4)


def start_long_run(data, folder, *more, launcher="alone"):
    options = {"data_dir": data, "iterations": 100000, "save_interval": 5, "batch_size": 2}
    return subprocess.Popen(
        [*command_of(launcher), SCRIPT, *flags(**options, **TINY, **SHARED), *more],
        env={**os.environ, "OPENAI_LOGDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_cleanly(number, data, tmp_path):
    folder = tmp_path / "stopped"
    process = start_long_run(data, folder)
    wait_until((folder / "model000005.pt").exists, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, output
    last = int(figures(folder)[-1]["step"])
    assert (folder / f"model{last:06d}.pt").exists() and (folder / f"opt{last:06d}.pt").exists()
    assert f"stopped by {number.name} after step {last}" in output


@pytest.fixture
def images(tmp_path):
    """A folder of images."""
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(6):
        pixels = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{'ab'[index % 2]}_{index}.png")
    return folder


@pytest.mark.parametrize(
    ("launcher", "source", "workers"),
    [
        *(("alone", "images", workers) for workers in (0, 1, -1)),
        ("alone", "data", -1),
        ("torchrun", "images", 2),
        ("mpiexec", "images", 1),
    ],
)
def test_sigterm_to_all_processes_at_once_loses_nothing(
    launcher, source, workers, tmp_path, request
):
    """As `scancel` and preemption do: those that decode images must not end before the rest."""
    folder = tmp_path / "stopped"
    where = str(request.getfixturevalue(source))
    more = ("--num_workers", str(workers))
    process = start_long_run(where, folder, *more, launcher=launcher)
    wait_until((folder / "model000005.pt").exists, process)
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=PATIENCE_S)
    # torchrun reports the signal that it got.
    assert process.returncode == (launcher == "torchrun"), output
    last = int(figures(folder)[-1]["step"])
    assert f"after step {last};" in (folder / "log.txt").read_text(), output
    assert (folder / f"model{last:06d}.pt").exists() and (folder / f"opt{last:06d}.pt").exists()
    if launcher != "alone" or workers == -1:  # the others would say the same once more
        assert_goes_on_to_the_bit(where, folder, last + 2, *more, launcher=launcher)


def assert_goes_on_to_the_bit(data, folder, last, *more, launcher):
    """A run that was ended, continued to step `last`, is that of one that never was."""
    straight = folder.with_name("straight")
    for where, resume in ((folder, "auto"), (straight, "")):
        end = ("--iterations", str(last), "--resume_checkpoint", resume)
        process = start_long_run(data, where, *more, *end, launcher=launcher)
        output, _ = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, output
    prefixes = ("model", "ema_0.9_")
    pairs = zip(tensors(folder, last, *prefixes), tensors(straight, last, *prefixes), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


finds_processes = pytest.mark.skipif(
    not Path("/proc").is_dir(), reason="processes are found in /proc"
)


def ranks_of(folder):
    """Process ids of the training that writes to `folder`, in order of rank, without launchers."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            argv = (process / "cmdline").read_text().split("\0")
            environ = dict(
                line.partition("=")[::2] for line in (process / "environ").read_text().split("\0")
            )
        except OSError:  # it has ended, or is not ours
            continue
        is_script = any(word.endswith("image_train.py") for word in argv[1:3])
        if is_script and environ.get("OPENAI_LOGDIR") == str(folder):
            names = ("RANK", "PMI_RANK", "SLURM_PROCID")
            found[next((int(environ[n]) for n in names if n in environ), 0)] = int(process.name)
    return [found[rank] for rank in sorted(found)]


@finds_processes
@pytest.mark.parametrize("launcher", ["torchrun", "mpiexec"])
def test_a_killed_process_ends_the_others_and_the_run_goes_on(launcher, data, tmp_path):
    folder = tmp_path / "killed"
    more = ("--num_workers", "0")
    process = start_long_run(data, folder, *more, launcher=launcher)
    wait_until((folder / "model000010.pt").exists, process)
    os.kill(ranks_of(folder)[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=PATIENCE_S)  # to the end of all that write to it
    assert process.returncode, output
    newest = max(int(path.stem[5:]) for path in folder.glob("model*.pt"))
    assert_goes_on_to_the_bit(data, folder, newest + 3, *more, launcher=launcher)


def test_workers_end_when_the_parent_is_killed(images, tmp_path):
    process = start_long_run(str(images), tmp_path / "run", "--num_workers", "2")
    wait_until((tmp_path / "run/model000005.pt").exists, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=PATIENCE_S)  # to the end of the output, which the workers share


@finds_processes
def test_a_killed_worker_is_one_line(images, tmp_path):
    process = start_long_run(str(images), tmp_path / "run", "--num_workers", "2")
    wait_until((tmp_path / "run/model000005.pt").exists, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    os.kill(int(children[0]), signal.SIGKILL)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1 and "Traceback" not in output
    assert "error: a process that reads images was killed" in output.splitlines()[-1]


def test_a_killed_run_goes_on_as_if_nothing_had_happened(data, tmp_path, monkeypatch):
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    process = start_long_run(data, killed)
    wait_until((killed / "model000010.pt").exists, process)
    process.kill()
    process.communicate()
    newest = max(int(path.stem[5:]) for path in killed.glob("model*.pt"))
    options = {"data_dir": data, "batch_size": 2, "iterations": newest + 3, **TINY, **SHARED}
    monkeypatch.setenv("OPENAI_LOGDIR", str(straight))
    image_train.main(flags(**options))
    monkeypatch.setenv("OPENAI_LOGDIR", str(killed))
    image_train.main(flags(**options, resume_checkpoint="auto"))
    prefixes = ("model", "ema_0.9_")
    pairs = zip(
        tensors(straight, newest + 3, *prefixes),
        tensors(killed, newest + 3, *prefixes),
        strict=True,
    )
    assert all(torch.equal(a, b) for a, b in pairs)
    optimisers = [
        torch.load(folder / f"opt{newest + 3:06d}.pt", weights_only=True)["state"]
        for folder in (straight, killed)
    ]
    for index, moments in optimisers[0].items():
        assert all(torch.equal(moments[name], optimisers[1][index][name]) for name in moments)


def test_early_stop_is_recorded_and_sampled(data, tmp_path):
    options = {"iterations": 2, "batch_size": 2, "sample_interval": 2, "early_stop_steps": 40}
    image_train.main(flags(data_dir=data, **options, **TINY, **SHARED))
    folder = tmp_path / "run"
    for name in ("model000002.pt", "ema_0.9_000002.pt"):
        sidecar = read_sidecar(str(folder / name))
        assert sidecar["kind"] == "model" and sidecar["early_stop_steps"] == 40
        assert sidecar["flags"]["num_channels"] == 32
    assert (folder / "samples000002.png").stat().st_size > 100


@pytest.mark.parametrize(
    ("asked", "recorded", "said"),
    [
        ({}, 40, "--early_stop_steps 40: "),
        ({"early_stop_steps": 40}, 40, ""),
        ({"early_stop_steps": 0}, None, "from here on it learns all of them"),
        ({"early_stop_steps": 50}, 50, "from here on it learns those below 50"),
    ],
)
def test_a_resumed_run_keeps_early_stop_unless_told_otherwise(
    asked, recorded, said, data, tmp_path
):
    options = {"data_dir": data, "batch_size": 2, **TINY, **SHARED}
    image_train.main(flags(**options, iterations=1, early_stop_steps=40))
    logger.reset()
    image_train.main(flags(**options, iterations=2, resume_checkpoint="auto", **asked))
    folder = tmp_path / "run"
    for name in ("model000002.pt", "ema_0.9_000002.pt"):
        assert read_sidecar(str(folder / name))["early_stop_steps"] == recorded
    history = torch.load(folder / "state000002.pt", weights_only=True)["sampler"]["loss_history"]
    assert len(history) == (recorded or 1000)
    log = (folder / "log.txt").read_text()
    assert said in log and (said or "early_stop_steps" not in log)


@pytest.mark.parametrize(
    "other", [{"noise_schedule": "cosine"}, {"predict_xstart": True}, {"num_head_channels": 8}]
)
def test_a_resumed_run_has_the_flags_that_weights_do_not_show(other, data, tmp_path):
    options = {"data_dir": data, "batch_size": 2, **TINY, **SHARED}
    image_train.main(flags(**options, iterations=1))
    logger.reset()
    again = flags(**{**options, **other}, iterations=2, resume_checkpoint="auto")
    [name] = other
    with pytest.raises(UserError, match=f"^--resume_checkpoint: .* was trained with --{name} "):
        image_train.main(again)
    (tmp_path / "run/model000001.json").unlink()
    logger.reset()
    image_train.main(again)
    # Flags without effect: heads are as wide as they were, and dropout may change.
    logger.reset()
    more = {"dropout": 0.1} | ({"num_heads": 3} if name == "num_head_channels" else {})
    image_train.main(flags(**{**options, **other, **more}, iterations=3, resume_checkpoint="auto"))


def test_a_new_run_from_weights_alone_keeps_early_stop(data, tmp_path, monkeypatch):
    options = {"data_dir": data, "batch_size": 2, **TINY, **SHARED}
    image_train.main(flags(**options, iterations=1, early_stop_steps=40))
    weights = tmp_path / "run/ema_0.9_000001.pt"
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "second"))
    image_train.main(flags(**options, iterations=3, resume_checkpoint=weights))
    assert read_sidecar(str(tmp_path / "second/model000003.pt"))["early_stop_steps"] == 40


@pytest.mark.parametrize("start", ["", "run/ema_0.9_000002.pt", "other/model000002.pt"])
def test_a_new_run_does_not_mix_its_checkpoints_with_anothers(start, data, tmp_path):
    options = {"data_dir": data, "batch_size": 2, **TINY, **SHARED}
    image_train.main(flags(**options, iterations=2))
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    resume = {"resume_checkpoint": tmp_path / start} if start else {}
    with pytest.raises(UserError, match=r"^OPENAI_LOGDIR: .*run up to step 2: .*another folder$"):
        image_train.main(flags(**options, **resume, iterations=3))


def test_a_new_run_puts_anothers_files_aside_if_it_is_asked_to(data, tmp_path):
    options = {"data_dir": data, "batch_size": 2, **TINY, **SHARED, "log_interval": 1}
    image_train.main(flags(**options, iterations=2, sample_interval=2))
    (tmp_path / "run/notes.txt").write_text("mine")
    for name in ("wandb_id.txt", "vae000002.pt", "vae000002.json", "ema_power0.1_000002.pt"):
        (tmp_path / "run" / name).write_text("of a run")
    (tmp_path / "run/tb").mkdir()
    before = {path.name for path in (tmp_path / "run").iterdir()} - {"notes.txt"}
    assert {"model000002.pt", "model000002.json", "samples000002.png", "log.txt"} < before
    for number in (1, 2):
        image_train.main([*flags(**options, iterations=1), "--start_anew"])
        assert [row["step"] for row in figures(tmp_path / "run")] == ["1"]
        kept = {path.name for path in (tmp_path / f"run/earlier-{number}").iterdir()}
        assert kept == before if number == 1 else "model000001.pt" in kept
        assert (tmp_path / "run/model000001.pt").exists() and (tmp_path / "run/notes.txt").exists()
        assert not (tmp_path / "run/model000002.pt").exists()
    for start in ("auto", *(tmp_path / "run" / f"{n}000001.pt" for n in ("model", "ema_0.9_"))):
        with pytest.raises(UserError, match="^--start_anew moves away what --resume"):
            image_train.main(flags(**options, start_anew=True, resume_checkpoint=start))
    assert not (tmp_path / "run/earlier-3").exists()


def test_without_averages_samples_are_of_the_weights_themselves(data, tmp_path):
    options = {"data_dir": data, "iterations": 1, "sample_interval": 1, **TINY, **SHARED}
    image_train.main(flags(**{**options, "ema_rate": ""}))
    assert (tmp_path / "run/samples000001.png").exists()
    assert not list(tmp_path.glob("run/ema_*"))


def test_folder_with_worker_processes(images, tmp_path):
    (images / "a_broken.png").write_text("nothing")
    options = {"iterations": 4, "batch_size": 3, "num_workers": 1, "class_cond": True}
    image_train.main(flags(data_dir=images, **options, **TINY, **SHARED))
    assert figures(tmp_path / "run")[-1]["unreadable_images"] == "1"
    assert "skipping" in (tmp_path / "run/log.txt").read_text()


def classifier_options(data, **changes):
    options = {
        "data_dir": data,
        "val_data_dir": data,
        "image_size": 8,
        "classifier_width": 64,
        "classifier_depth": 1,
        "classifier_attention_resolutions": "8",
        "batch_size": 6,
        "microbatch": 4,
        "eval_interval": 2,
        "log_interval": 1,
        "anneal_lr": True,
        "lr": 3e-3,
    }
    return {**options, **changes}


def test_classifier(data, tmp_path):
    options = classifier_options(data)
    classifier_train.main(flags(**options, iterations=8))
    rows = figures(tmp_path / "run")
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"]) - 1
    assert [bool(row["val_loss"]) for row in rows[:4]] == [False, True, False, True]
    assert {"train_acc@1", "train_acc@5", "val_acc@1", "val_acc@5_q0"} <= rows[1].keys()
    assert read_sidecar(str(tmp_path / "run/model000008.pt"))["kind"] == "classifier"
    names = {p.name for p in (tmp_path / "run").glob("*.pt")}
    assert names == {"model000008.pt", "opt000008.pt", "state000008.pt"}
    classifier_train.main(flags(**options, iterations=9, resume_checkpoint="auto"))
    assert (tmp_path / "run/model000009.pt").exists()


def test_a_resumed_classifier_is_evaluated_on_what_an_uninterrupted_one_is(
    data, tmp_path, monkeypatch
):
    options = classifier_options(data, anneal_lr=False)
    classifier_train.main(flags(**options, iterations=6))
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "resumed"))
    for iterations in (3, 6):
        logger.reset()
        classifier_train.main(flags(**options, iterations=iterations, resume_checkpoint="auto"))
    straight, resumed = figures(tmp_path / "run"), figures(tmp_path / "resumed")
    for name in ("train_loss", "val_loss", "val_acc@5"):
        assert [row[name] for row in resumed][-3:] == [row[name] for row in straight][-3:]


def test_a_classifier_is_not_evaluated_every_0_steps(data, tmp_path):
    classifier_train.main(flags(**classifier_options(data, eval_interval=0), iterations=2))
    assert not any(name.startswith("val_") for name in figures(tmp_path / "run")[0])


def test_defaults_of_the_flags_that_guided_diffusion_does_not_have():
    want = {
        "iterations": 0,
        "sample_interval": 0,
        "snr_gamma": 0.0,
        "early_stop_steps": None,
        "keep_checkpoints": 0,
        "start_anew": False,
        "lr_warmup": 0,
        "grad_clip": 0.0,
        "power_ema": "",
        "precision": "",
        "shard": False,
        "channels_last": False,
        "seed": 0,
        "random_crop": False,
        "random_flip": True,
        "label_from": "name",
        "num_workers": -1,
    }
    for script in (image_train, super_res_train):
        assert want.items() <= vars(script.create_argparser().parse_args([])).items()


def test_clean_images_for_the_classifier():
    parser = classifier_train.create_argparser()
    assert parser.parse_args([]).noised is True
    assert parser.parse_args(["--noised", "no"]).noised is False


def test_super_resolution(data, tmp_path):
    sizes = {"large_size": 8, "small_size": 4}
    network = {k: v for k, v in TINY.items() if k not in ("image_size", "channel_mult")}
    options = {"iterations": 2, "batch_size": 2, "sample_interval": 2, "class_cond": True}
    super_res_train.main(flags(data_dir=data, **sizes, **network, **SHARED, **options))
    folder = tmp_path / "run"
    assert read_sidecar(str(folder / "model000002.pt"))["flags"]["large_size"] == 8
    assert (folder / "samples000002.png").exists()
    stream = load_superres_data(data, 3, large_size=8, small_size=4, seed=0)
    batch, cond = next(stream)
    want = batch.view(3, 3, 4, 2, 4, 2).mean((3, 5))
    torch.testing.assert_close(cond["low_res"], want)


BAD = {
    "data_dir": ("", "--data_dir: give a folder"),
    "batch_size": (0, "--batch_size is 0, it must be at least 1"),
    "lr": (-1, "--lr is -1.0, it must be above 0"),
    "weight_decay": (-1, "--weight_decay is -1.0, it must be a number of at least 0"),
    "grad_clip": (-1, "--grad_clip is -1.0, it must be a number of at least 0"),
    "snr_gamma": (-1, "--snr_gamma is -1.0, it must be a number of at least 0"),
    "lr_warmup": (-1, "--lr_warmup is -1, it must be at least 0"),
    "fp16_scale_growth": ("nan", "--fp16_scale_growth is nan, it must be a number"),
    "seed": (2**64, r"--seed is 18446744073709551616, it must be in 0 …"),
    "sample_interval": (-1, "--sample_interval is -1, it must be at least 0"),
    "early_stop_steps": (1001, r"--early_stop_steps must be in 1 … 1000"),
    "early_stop_steps ": (-1, r"--early_stop_steps is -1, it must be at least 0"),
    "lr ": ("nan", "--lr is nan, it must be above 0"),
    "schedule_sampler": ("best", "--schedule_sampler must be one of uniform"),
    "precision": ("int4", "--precision must be one of float32, bfloat16, float16"),
    "ema_rate": ("much", "--ema_rate must be a comma list"),
    "power_ema": ("0.5", "--power_ema must be widths above 0"),
    "noise_schedule": ("flat", "--.*schedule"),
    "channel_mult": ("a", "--channel_mult must be a comma list"),
    "num_channels": (33, "--num_channels 33 .* multiple of 32"),
    "num_heads": (0, "--num_heads 0 must be at least 1"),
    "dropout": (2, "--dropout is 2.0, it must be in"),
    "diffusion_steps": (10, "--diffusion_steps is 10, it must be at least 21"),
    "timestep_respacing": ("ddim999", "--timestep_respacing ddim999: no whole stride"),
    "label_from": ("colour", "--label_from must be name or folder"),
    "resume_checkpoint": (
        "nowhere/model000010.pt",
        "--resume_checkpoint: there is no file nowhere",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_flags_are_one_clear_line(name, data):
    value, message = BAD[name]
    options = {"data_dir": data, "iterations": 1, **TINY, **SHARED, name.strip(): value}
    with pytest.raises(UserError, match=f"^{message}"):
        image_train.main(flags(**options))


def test_errors_name_no_flags_that_there_are_not():
    """A constructor's error gets dashes if it begins with a flag's name, and else none."""
    for text, message in {
        "num_heads 0 is bad": "--num_heads 0 is bad",
        "Invalid learning rate: nan": "Invalid learning rate: nan",
        "num_head is no flag": "num_head is no flag",
    }.items():
        with pytest.raises(UserError) as caught, explained_flags({"num_heads": 4}):
            raise ValueError(text)
        assert str(caught.value) == message


@pytest.mark.parametrize("script", [image_train, super_res_train, classifier_train, vae_train])
def test_clipping_and_warm_up_are_off_and_reach_the_loop(script):
    parse = script.create_argparser().parse_args
    for argv, want in (([], (0.0, 0)), (["--grad_clip", "0.5", "--lr_warmup", "9"], (0.5, 9))):
        options = loop_options(parse(argv))
        assert (options["grad_clip"], options["lr_warmup"]) == want


@pytest.mark.parametrize("script", [image_train, super_res_train, classifier_train, vae_train])
def test_compile_is_a_switch_that_reaches_the_loop(script):
    parse = script.create_argparser().parse_args
    for argv, compile in (([], False), (["--compile"], True), (["--compile", "no"], False)):
        assert loop_options(parse(argv))["compile"] is compile


def test_float16_on_a_cpu_says_what_it_does_instead(data, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    image_train.main(flags(data_dir=data, iterations=1, use_fp16=True, **TINY, **SHARED))
    log = (tmp_path / "run/log.txt").read_text()
    assert "float16 needs CUDA: training in" in log
    assert read_sidecar(str(tmp_path / "run/model000001.pt"))["flags"]["use_fp16"] is False


def test_a_compiler_that_is_missing_is_told_before_training(data, monkeypatch):
    def check_compiler(device_type):
        raise UserError(f"--compile: no compiler for {device_type}")

    monkeypatch.setattr("guided_diffusion.training.start.check_compiler", check_compiler)
    argv = flags(**TINY, **SHARED, data_dir=data, batch_size=2, iterations=1)
    with pytest.raises(UserError, match="^--compile: no compiler for cpu"):
        image_train.main([*argv, "--compile"])
