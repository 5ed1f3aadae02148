"""--print_sbatch and the refusals of --submit slurm, which need no Slurm."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from esddpm_io.errors import UserError
from guided_diffusion.commands import driver, sweep
from guided_diffusion.sampling.queue import JobQueue
from tests.tiny_sampling import TinyFiles, run_script

ROOT = Path(__file__).parents[2]
DRIVER = "generate_processes_diffusion_and_reverse.py"
COMMANDS = {DRIVER: driver.main, "sweep.py": sweep.main}


def flags(tiny: TinyFiles, output: Path) -> list[str]:
    named = ["--t_prime", "400", "--steps", "3", "--sampler", "dpmpp_2m"]
    where = ["--dataset", str(tiny.root / "tiny.toml"), "--output_dir", str(output)]
    return [*named, *where, "--eval_backend", "torch"]


def lint(script: str) -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    for command in (["bash", "-n"], [shellcheck, "-"]):
        done = subprocess.run(command, input=script, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", COMMANDS)
def test_the_printed_script_is_clean_shell(script, tiny, tmp_path):
    output = tmp_path / "a folder"
    more = ["--print_sbatch", "--num_machines", "4", "--slurm_args=--comment='a b' --gres=gpu:1"]
    printed = run_script(script, *flags(tiny, output), *more)
    assert printed.returncode == 0, printed.stderr
    jobs = re.findall(r"<<'END'\n(.*?)^END$", printed.stdout, re.MULTILINE | re.DOTALL)
    assert len(jobs) == 2
    for one in (printed.stdout, *jobs):
        assert one.startswith("#!/usr/bin/env bash\n")
        lint(one)
    assert "options=('--comment=a b' --gres=gpu:1)" in printed.stdout
    assert "--array=0-3 --requeue" in printed.stdout
    worker, gather = jobs
    assert "settings.json" in worker and "--any_chunk True" in worker and "--device" not in worker
    # The job after them is this command, in one process, and does not submit again.
    assert script in gather
    assert not re.search("--(print_sbatch|submit|num_machines|slurm_args)", gather)


def on_the_path(folder: Path, **programs: str) -> dict[str, str]:
    """An environment whose PATH has these shell programs first."""
    folder.mkdir(exist_ok=True)
    for name, lines in programs.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{lines}\n")
        (folder / name).chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}


def ends(command: list, environ: dict, code: int, restarts: int) -> bool:
    """Whether a job whose srun ends with the code is put back into the queue."""
    environ = {**environ, "CODE": str(code), "SLURM_RESTART_COUNT": str(restarts)}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return "requeue 7" not in done.stdout


def test_how_often_an_element_comes_back(tiny, tmp_path):
    printed = run_script(DRIVER, *flags(tiny, tmp_path / "out"), "--print_sbatch")
    worker = re.findall(r"<<'END'\n(.*?)^END$", printed.stdout, re.MULTILINE | re.DOTALL)[0]
    environ = on_the_path(tmp_path / "bin", srun='exit "$CODE"', scontrol='echo "$@"')
    for code, restarts, is_over in (
        (0, 0, True), (1, 4, False), (1, 5, True), (2, 0, True), (74, 0, True), (143, 99, False),
        (143, 100, True),
    ):  # fmt: skip
        assert ends(["bash", "-c", worker], environ, code, restarts) == is_over, (code, restarts)


def test_how_often_training_comes_back(tmp_path):
    """It is stopped by a signal, which its own srun sends here."""
    srun = 'if ((CODE == 143)); then kill -USR1 "$PPID"; sleep 0.3; fi; exit "$CODE"'
    environ = on_the_path(tmp_path / "bin", srun=srun, scontrol='echo "$@"', scancel=":")
    environ["OPENAI_LOGDIR"] = str(tmp_path)
    train = ["bash", str(ROOT / "examples/slurm/train.sh")]
    for code, restarts, is_over in (
        (0, 0, True), (1, 4, False), (1, 5, True), (2, 0, True), (143, 99, False), (143, 100, True),
    ):  # fmt: skip
        assert ends(train, environ, code, restarts) == is_over, (code, restarts)


@pytest.mark.parametrize(("name", "script"), [("sample.sh", DRIVER), ("sweep.sh", "sweep.py")])
def test_the_examples_print_what_they_submit(name, script, tiny, tmp_path):
    example = ROOT / "examples/slurm" / name
    argv = ["bash", example, *flags(tiny, tmp_path / "out"), "--limit", "4", "--print_sbatch"]
    environ = {**os.environ, "PYTHON": sys.executable}
    printed = subprocess.run(argv, env=environ, capture_output=True, text=True, check=False)
    assert printed.returncode == 0, printed.stderr
    assert "--array=0-7" in printed.stdout and "--gres=gpu:1" in printed.stdout
    assert script in printed.stdout


@pytest.mark.parametrize("path", sorted((ROOT / "examples/slurm").iterdir()), ids=lambda p: p.name)
def test_the_examples_are_clean_shell(path):
    lint(path.read_text())


@pytest.mark.parametrize("main", COMMANDS.values())
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--submit", "slurm"], "--submit slurm: there is no sbatch here; --print_sbatch"),
        (["--print_sbatch", "--devices", "0"], "--devices: leave it out"),
        (["--print_sbatch", "--num_machines", "2", "--machine_idx", "1"], "--machine_idx: leave"),
        (["--print_sbatch", "--slurm_args", "'"], "--slurm_args ': No closing quotation"),
        (["--print_sbatch", "--t_prime", "auto"], "--t_prime auto: T' is not known yet"),
    ],
)
def test_what_slurm_says_is_not_to_be_typed(main, more, message, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=re.escape(message)):
        main([*flags(tiny, tmp_path / "out"), *more])


def test_what_sbatch_refuses_is_one_line(tiny, tmp_path, monkeypatch):
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition' >&2\nexit 1\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(UserError, match="^--submit slurm: sbatch: error: invalid partition$"):
        driver.main([*flags(tiny, tmp_path / "out"), "--submit", "slurm"])


def test_a_folder_without_jobs_says_nothing_of_slurm(tmp_path):
    assert JobQueue([str(tmp_path), "gs://bucket/folder"]).look() == ""
