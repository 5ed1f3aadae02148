"""examples/slurm/train.sh on a real Slurm: stopped and killed, it goes on as if it had not been."""

import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch

from tests.scripts.test_training_scripts import SHARED, TINY, flags, ranks_of, tensors
from tests.slurm.cluster import Cluster
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
RESOURCES = ["--ntasks=2", "--cpus-per-task=1", "--gpus-per-task=0"]


def submit(cluster: Cluster, folder: Path, argv: list[str]) -> str:
    """The id of a training job of two processes that writes to `folder`."""
    environ = {**cluster.environ, "OPENAI_LOGDIR": str(folder), "PYTHON": sys.executable}
    where = [f"--output={folder}.log", f"--chdir={ROOT}"]
    script = ROOT / "examples/slurm/train.sh"
    done = cluster.run("sbatch", "--parsable", *RESOURCES, *where, script, *argv, env=environ)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def saved(folder: Path) -> int:
    return max((int(path.stem[5:]) for path in folder.glob("model*.pt")), default=0)


def wait_for_restart(cluster: Cluster, job: str, number: int) -> None:
    want = f"Restarts={number} "
    wait_until(lambda: want in cluster.output("scontrol", "show", "-o", "job", job))


def test_a_training_that_is_requeued_equals_one_that_is_not(cluster, tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", rng.integers(0, 256, (13, 8, 8, 3), dtype=np.uint8))
    stopped, straight = tmp_path / "stopped", tmp_path / "straight"
    shared = {**TINY, **SHARED, "data_dir": tmp_path / "data.npz", "batch_size": 2}
    endless = flags(**shared, iterations=100000, save_interval=20, keep_checkpoints=2)

    job = submit(cluster, stopped, endless)
    wait_until(lambda: saved(stopped))
    # What --signal of the script has Slurm do before the time limit.
    cluster.output("scancel", "--batch", "--signal=USR1", job)
    wait_for_restart(cluster, job, 1)
    assert "stopped by SIGTERM" in Path(f"{stopped}.log").read_text()
    before = saved(stopped)
    wait_until(lambda: saved(stopped) > before)
    os.kill(ranks_of(stopped)[1], signal.SIGKILL)
    wait_for_restart(cluster, job, 2)
    before = saved(stopped)
    wait_until(lambda: saved(stopped) > before)
    cluster.output("scancel", job)
    assert cluster.wait_for(job) == ["CANCELLED"]

    last = saved(stopped) + 2
    jobs = [submit(cluster, f, flags(**shared, iterations=last)) for f in (stopped, straight)]
    assert cluster.wait_for(*jobs) == ["COMPLETED"] * 2
    pairs = zip(*(tensors(f, last, "model", "ema_0.9_") for f in (stopped, straight)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_mistake_of_the_user_is_not_requeued(cluster, tmp_path):
    """The process that finds it ends with 2, and no signal to the others makes it another code."""
    argv = flags(**TINY, **SHARED, data_dir=tmp_path / "nowhere", batch_size=2, iterations=2)
    jobs = [submit(cluster, tmp_path / f"run{n}", argv) for n in range(2)]
    assert cluster.wait_for(*jobs) == ["FAILED"] * 2
    for job in jobs:
        said = cluster.output("scontrol", "show", "-o", "job", job)
        assert "Restarts=0 " in said and "ExitCode=2:0" in said
