"""The set-up script's checks; installing itself is what ran before these tests."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.waiting import PATIENCE_S

ROOT = Path(__file__).parents[1]


def run(*words, path=os.environ["PATH"], **environment):
    return subprocess.run(
        [shutil.which("bash"), *words],
        env={"PATH": str(path), **environment},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def write_tool(folder, name, script):
    tool = folder / name
    tool.write_text(f"#!{shutil.which('bash')}\n{script}\n")
    tool.chmod(0o755)


@pytest.fixture
def clone(tmp_path):
    """A copy of the set-up script beside a PATH that has no Python but those a test writes."""
    shutil.copy(ROOT / "setup_env.sh", tmp_path)
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("dirname", "sed", "grep", "cat", "cksum"):
        (tools / name).symlink_to(shutil.which(name))
    return tmp_path


def test_shellcheck_is_clean():
    lint = subprocess.run(
        ["shellcheck", ROOT / "setup_env.sh", ROOT / ".ci/run"],
        env={"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert lint.returncode == 0, lint.stdout


def test_an_unknown_job_shows_the_usage(clone):
    result = run(clone / "setup_env.sh", "nonsense")
    assert result.returncode == 2
    assert "bash setup_env.sh demo [driver flags]" in result.stderr
    assert "PYTHON=/path/to/python3" in result.stderr
    assert "set -euo" not in result.stderr


def test_a_python_of_another_version_is_refused(clone):
    write_tool(clone / "bin", "python3", "exit 1")
    result = run(clone / "setup_env.sh", "demo", path=clone / "bin")
    assert result.returncode == 1
    assert result.stderr == (
        "setup_env.sh: Python 3.11, 3.12 or 3.13 is needed: on Debian and Ubuntu, "
        "apt install python3 python3-venv\n"
    )
    result = run(clone / "setup_env.sh", "demo", path=clone / "bin", PYTHON="bin/python3")
    assert f"PYTHON={os.getcwd()}/bin/python3 is not Python 3.11, 3.12 or 3.13" in result.stderr
    assert not (clone / ".venv").exists()


def test_a_python_without_venv_names_the_package(clone):
    write_tool(
        clone / "bin",
        "python3",
        "case $2 in *sys.exit*) exit 0 ;; *ensurepip*) exit 1 ;; *) echo 3.12 ;; esac",
    )
    result = run(clone / "setup_env.sh", "test", path=clone / "bin")
    assert result.returncode == 1
    assert result.stderr == (
        "setup_env.sh: python3 cannot make virtual environments: apt install python3.12-venv\n"
    )


@pytest.fixture
def recorded_pip(clone):
    """A .venv whose Python writes down what it is asked to do; pip fails from a CPU index."""
    (clone / ".venv/bin").mkdir(parents=True)
    write_tool(
        clone / ".venv/bin",
        "python",
        f'echo "$*" >>{clone}/asked\n'
        'case "$*" in\n'
        f'  "- "*) [[ -e {clone}/reachable ]] ;;\n'
        f"  *--index-url*) [[ ! -e {clone}/no-wheel ]] ;;\n"
        "esac",
    )
    for name in ("requirements.txt", "requirements-dev.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, clone)

    def asked(*words):
        (clone / "asked").unlink(missing_ok=True)
        result = run(clone / "setup_env.sh", *words, path=clone / "bin")
        assert result.returncode == 0, result.stderr
        return [
            line.replace("--quiet --disable-pip-version-check ", "")
            for line in (clone / "asked").read_text().splitlines()
            if not line.startswith("- ")
        ]

    return asked


TORCH = next(
    line for line in (ROOT / "requirements.txt").read_text().splitlines() if "torch==" in line
)
CHECK = "-m pip --version"
CPU_TORCH = f"-m pip install --index-url https://download.pytorch.org/whl/cpu {TORCH}"
PLAIN_TORCH = f"-m pip install {TORCH}"
PROJECT = "-m pip install --no-deps --editable ."


def demo(clone, devices):
    return (
        f"{clone}/scripts/generate_processes_diffusion_and_reverse.py --execute --dataset emoji32 "
        f"--devices {devices} --t_prime 500 --steps 8 --sampler dpmpp_2m_sde --limit 1000"
    )


def test_no_job_only_installs(recorded_pip):
    assert recorded_pip()[-1] == PROJECT
    assert recorded_pip() == [CHECK]


def test_the_first_run_installs_and_the_second_does_not(recorded_pip, clone):
    packages = "-m pip install -r requirements.txt"
    assert recorded_pip("demo") == [CHECK, PLAIN_TORCH, packages, PROJECT, demo(clone, "cpu,cpu")]
    assert recorded_pip("demo", "--seed", "3") == [CHECK, demo(clone, "cpu,cpu") + " --seed 3"]
    with (clone / "requirements.txt").open("a") as requirements:
        requirements.write("one-more\n")
    assert packages in recorded_pip("demo")


def test_the_demo_runs_where_the_user_stands(recorded_pip, clone):
    recorded_pip()
    write_tool(clone / ".venv/bin", "python", f'pwd >{clone}/stood; echo "$*" >{clone}/asked')
    elsewhere = clone / "else where"
    elsewhere.mkdir()
    script = 'cd "$1" && exec bash ../setup_env.sh demo --output_dir out'
    tools = clone / "bin"
    (tools / "bash").symlink_to(shutil.which("bash"))
    result = run("-c", script, "bash", elsewhere, path=tools)
    assert result.returncode == 0, result.stderr
    assert (clone / "stood").read_text() == f"{elsewhere}\n"
    assert (clone / "asked").read_text() == demo(clone, "cpu,cpu") + " --output_dir out\n"


def test_the_cpu_build_of_torch_where_its_index_can_be_reached(recorded_pip, clone):
    (clone / "reachable").touch()
    assert recorded_pip("demo")[1:3] == [CPU_TORCH, "-m pip install -r requirements.txt"]


def test_the_plain_torch_where_the_cpu_index_has_none(recorded_pip, clone):
    (clone / "reachable").touch()
    (clone / "no-wheel").touch()
    assert recorded_pip("demo")[1:3] == [CPU_TORCH, PLAIN_TORCH]


def test_the_plain_torch_and_one_gpu_where_there_is_one(recorded_pip, clone):
    (clone / "reachable").touch()
    write_tool(clone / "bin", "nvidia-smi", "echo 'GPU 0: a GPU (UUID: GPU-0)'")
    asked = recorded_pip("demo")
    assert asked[1] == PLAIN_TORCH
    assert asked[-1] == demo(clone, "0")


def test_tests_are_linted_first_and_pytest_comes_last(recorded_pip):
    asked = recorded_pip("test", "-k", "unet")
    assert asked[-4:] == [
        "-m ruff check .",
        "-m ruff format --check --quiet .",
        "-m mypy --no-error-summary",
        "-m pytest --numprocesses auto --maxprocesses 8 --dist loadfile -k unet",
    ]
    assert "-m pip install -r requirements-dev.txt" in asked


def test_what_it_installs_is_all_that_the_package_can_use():
    """requirements.txt pins the packages of the extra [all], which has the other extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert extras["all"] == [f"es-ddpm[{','.join(name for name in extras if name != 'all')}]"]
    own = [line for name in extras if name != "all" for line in extras[name]]
    wanted = [*project["dependencies"], *own]
    pinned = (ROOT / "requirements.txt").read_text().splitlines()

    def names(lines):
        return {re.match(r"[\w-]+", line)[0] for line in lines if line and line[0] != "#"}

    assert names(pinned) == names(wanted)
