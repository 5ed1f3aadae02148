"""Sampling by a real Slurm: the samples are those of a local run, however often jobs are killed."""

import os
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from esddpm_io.files import read_json
from tests.slurm.cluster import Cluster
from tests.tiny_sampling import SCRIPTS, TinyFiles, chunks, run_script
from tests.waiting import wait_until

DRIVER = "generate_processes_diffusion_and_reverse.py"
SLOW = {"t_prime": 900, "steps": 70, "batch_size": 1}  # some seconds, in ten chunks


def flags(tiny: TinyFiles, output: Path, **changes: object) -> list[str]:
    """Flags of driver and sweep."""
    values = {
        "dataset": tiny.root / "tiny.toml",
        "t_prime": 400,
        "steps": 3,
        "sampler": "dpmpp_2m_sde",
        "classifier_guidance_scale": 0,
        "batch_size": 2,
        "eval_backend": "torch",
        "output_dir": output,
        **changes,
    }
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def submit(cluster: Cluster, script: str, argv: list[str], elements: int) -> list[str]:
    """Ids of the array and of the job after it."""
    more = ("--submit", "slurm", "--num_machines", elements)
    said = cluster.output(sys.executable, SCRIPTS / script, *argv, *more)
    return re.search(r"scancel (\d+) (\d+)", said).groups()


def samples(folder: Path) -> np.ndarray:
    with np.load(folder / "samples_all.npz") as npz:
        return npz["arr_0"]


def locally(tiny: TinyFiles, output: Path, **changes: object) -> np.ndarray:
    argv = ["--execute", "--devices", "cpu", "--not_eval_metrics"]
    done = run_script(DRIVER, *flags(tiny, output, **changes), *argv)
    assert done.returncode == 0, done.stderr
    return samples(output)


@pytest.fixture(scope="module")
def local(tiny, tmp_path_factory) -> np.ndarray:
    """The samples of a run without Slurm."""
    return locally(tiny, tmp_path_factory.mktemp("local"))


def test_an_array_samples_what_a_local_run_does_and_a_job_evaluates(cluster, tiny, local, tmp_path):
    out = tmp_path / "out"
    jobs = submit(cluster, DRIVER, flags(tiny, out), 3)
    assert cluster.wait_for(*jobs) == ["COMPLETED"] * 4
    np.testing.assert_array_equal(samples(out), local)
    assert "Frechet" in (out / "metrics.json").read_text()
    assert (out / "slurm_jobs.txt").read_text().split() == list(jobs)
    logs = [(out / f"logs/slurm_{jobs[0]}_{i}.log").read_text() for i in range(3)]
    assert [f"rank {i} of 3: 10 samples" in log for i, log in enumerate(logs)] == [True] * 3
    assert "all 10 samples are there already" in (out / f"logs/slurm_{jobs[1]}.log").read_text()


def test_elements_of_several_processes(cluster, tiny, local, tmp_path):
    argv = [*flags(tiny, tmp_path / "out"), "--not_eval_metrics"]
    argv.append("--slurm_args=--ntasks=2 --cpus-per-task=1")
    jobs = submit(cluster, DRIVER, argv, 1)
    assert cluster.wait_for(*jobs) == ["COMPLETED"] * 2
    np.testing.assert_array_equal(samples(tmp_path / "out"), local)
    log = (tmp_path / f"out/logs/slurm_{jobs[0]}_0.log").read_text()
    assert "rank 0 of 2" in log and "rank 1 of 2" in log


def test_srun_alone(cluster, tiny, local, tmp_path):
    argv = flags(tiny, tmp_path / "printed")
    printed = run_script(DRIVER, *argv, "--not_eval_metrics", "--devices", "cpu")
    settings = tmp_path / "printed/settings.json"
    script = SCRIPTS / "classifier_sample_diffusion_and_reverse.py"
    worker = [sys.executable, script, "--settings", settings, "--batch_size", 2]
    assert printed.returncode == 0, printed.stderr
    said = cluster.output("srun", "--ntasks=2", *worker)
    assert "rank 1 of 2" in said
    np.testing.assert_array_equal(chunks(tmp_path / "printed")[0], local)


def test_killed_and_requeued_elements_end_in_the_same_samples(cluster, tiny, tmp_path):
    out = tmp_path / "out"
    array, gather = submit(cluster, DRIVER, flags(tiny, out, **SLOW), 3)

    def all_at_work() -> list[dict] | None:
        records = [read_json(str(path)) for path in sorted(out.glob("workers/0*.json"))]
        return records if len(records) == 3 and list(out.glob("chunks/*/0*.npz")) else None

    pids = {record["rank"]: record["pid"] for record in wait_until(all_at_work)}
    before = {path: path.stat().st_mtime_ns for path in out.glob("chunks/*/0*.npz")}
    os.kill(pids[0], signal.SIGKILL)  # as when memory runs out
    cluster.output("scancel", "--signal=TERM", f"{array}_1")  # as before the time limit
    cluster.output("scontrol", "requeue", f"{array}_2")  # as preemption does
    assert cluster.wait_for(array, gather) == ["COMPLETED"] * 4
    for element in range(3):
        assert "Restarts=1 " in cluster.output(
            "scontrol", "show", "-o", "job", f"{array}_{element}"
        )
    np.testing.assert_array_equal(samples(out), locally(tiny, tmp_path / "local", **SLOW))
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_jobs_that_wait_are_shown_and_cancelled_ones_stay_so(cluster, tiny, tmp_path):
    out = tmp_path / "out"
    slow = {**SLOW, "steps": 900}
    array, gather = submit(cluster, DRIVER, flags(tiny, out, **slow), 1)
    wait_until(lambda: "RUNNING" in cluster.states(array))
    shown = cluster.output(sys.executable, SCRIPTS / "status.py", out)
    want = f"Slurm: job {array}: 1 RUNNING, job {gather}: 1 PENDING (Dependency)"
    assert want in shown.splitlines()
    cluster.output("scancel", array, gather)
    assert cluster.wait_for(array, gather) == ["CANCELLED"] * 2


def test_a_users_mistake_is_not_tried_again(cluster, tiny, tmp_path):
    """The folder's start images are gone when the jobs start."""
    out = tmp_path / "out"
    images = tmp_path / "images.npz"
    images.write_bytes(tiny.images.read_bytes())
    argv = flags(tiny, out, dataset_path=images)
    held = [*argv, "--slurm_args=--hold --no-requeue"]
    jobs = submit(cluster, DRIVER, held, 1)
    images.unlink()
    cluster.output("scontrol", "release", *jobs)
    assert cluster.wait_for(*jobs) == ["FAILED"] * 2
    assert "error: --dataset_path" in (out / f"logs/slurm_{jobs[1]}.log").read_text()
    assert "Restarts=0 " in cluster.output("scontrol", "show", "-o", "job", f"{jobs[0]}_0")


def test_a_sweep(cluster, tiny, local, tmp_path):
    out = tmp_path / "sweep"
    argv = flags(tiny, out, t_prime="0,200,400", eval_bootstrap=0)
    array, gather = jobs = submit(cluster, "sweep.py", [*argv, "--slurm_args=--hold"], 2)
    shown = cluster.output(sys.executable, SCRIPTS / "status.py", out)
    held = "PENDING (JobHeldUser)"
    assert f"Slurm: job {array}: 2 {held}, job {gather}: 1 PENDING" in shown
    cluster.output("scontrol", "release", *jobs)
    assert cluster.wait_for(*jobs) == ["COMPLETED"] * 3
    np.testing.assert_array_equal(samples(out / "dpmpp_2m_sde_t400_3_steps_guidance0"), local)
    assert len((out / "sweep.csv").read_text().splitlines()) == 4
