"""Without what macOS and Windows do not have: commands, the processes they start, data workers."""

import os
import subprocess
import sys

import numpy as np
import pytest

from tests.tiny_sampling import SCRIPTS, TinyFiles

# Every process of the test begins with this; new ones are spawned, not forked, as there.
LACKING = """
import multiprocessing, os, signal
multiprocessing.set_start_method("spawn")
for name in ("sched_getaffinity", "killpg", "getpgid", "posix_fadvise"):
    delattr(os, name)
for name in ("SIGHUP", "pthread_sigmask", "sigwaitinfo", "sigtimedwait"):
    delattr(signal, name)
"""


@pytest.fixture
def run(tmp_path):
    lacking = tmp_path / "lacking"
    lacking.mkdir()
    (lacking / "sitecustomize.py").write_text(LACKING)
    path = os.pathsep.join([str(lacking), str(SCRIPTS.parent)])

    def run(script: str, *argv: object) -> str:
        done = subprocess.run(
            [sys.executable, SCRIPTS / script, *map(str, argv)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": path, "OPENAI_LOGDIR": str(tmp_path / "log")},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
        return done.stdout

    return run


def test_sampling_by_two_processes(run, tmp_path):
    preset = TinyFiles(tmp_path).preset()
    words = ["--dataset", preset, "--classifier_guidance_scale", 0, "--devices", "cpu,cpu"]
    words += ["--t_prime", 300, "--steps", 2, "--not_eval_metrics", "--output_dir", "out"]
    run("generate_processes_diffusion_and_reverse.py", *words, "--execute")
    assert (tmp_path / "out" / "samples_all.npz").exists()
    assert "all of them" in run("status.py", "out")


def test_training_with_a_data_worker(run, tmp_path):
    np.savez(tmp_path / "images.npz", np.zeros((4, 8, 8, 3), np.uint8))
    words = ["--data_dir", "images.npz", "--image_size", 8, "--num_channels", 32]
    words += ["--num_res_blocks", 1, "--channel_mult", 1, "--attention_resolutions", ""]
    run("image_train.py", *words, "--batch_size", 2, "--iterations", 1, "--num_workers", 1)
    assert (tmp_path / "log" / "model000001.pt").exists()
