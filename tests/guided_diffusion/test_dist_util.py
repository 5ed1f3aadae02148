import contextlib
import itertools
import os
import socket
import subprocess
import sys

import pytest
import torch

from esddpm_io.errors import UserError
from guided_diffusion import dist_util
from guided_diffusion.dist_util import Launch, find_launch
from tests.waiting import PATIENCE_S

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
PLACES = ("RANK", "LOCAL_RANK")
HYDRA = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
}


@pytest.mark.parametrize(
    ("environ", "launch"),
    [
        ({}, Launch("alone", 0, 1, 0)),
        (TORCHRUN, Launch("torchrun", 3, 4, 1)),
        (HYDRA, Launch("mpi", 2, 4, 0)),
        (OPEN_MPI, Launch("mpi", 1, 2, 1)),
        (SRUN, Launch("slurm", 5, 8, 1)),
        # mpiexec and torchrun inside a Slurm job, where their daemons were started by srun.
        ({**SRUN, **HYDRA}, Launch("mpi", 2, 4, 0)),
        ({**SRUN, **TORCHRUN}, Launch("torchrun", 3, 4, 1)),
        # A batch script's own process, and one in an interactive shell: alone, whatever the size.
        (
            {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"},
            Launch("alone", 0, 1, 0),
        ),
        ({**SRUN, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, Launch("alone", 0, 1, 0)),
    ],
)
def test_launcher_is_found_from_the_environment(environ, launch):
    assert find_launch(environ) == launch


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu7", "gpu7"),
        ("gpu7,gpu9", "gpu7"),
        ("gpu[03-05,9]", "gpu03"),
        ("gpu[12,14],login1", "gpu12"),
        ("login1,gpu[03-05]", "login1"),
        ("rack[1-2]-node,b", "rack1-node"),
    ],
)
def test_first_node_of_a_slurm_list(nodes, first):
    assert dist_util.first_slurm_node(nodes) == first


def test_alone_a_group_of_one_and_no_mpi():
    code = """
import sys, torch, torch.distributed as dist
from guided_diffusion import dist_util, logger, train_util, image_datasets
launch = dist_util.setup_dist()
assert launch.launcher == "alone" and (dist.get_rank(), dist.get_world_size()) == (0, 1)
assert dist_util.dev() == torch.device("cpu") or torch.cuda.is_available()
x = torch.ones(2); dist.all_reduce(x); assert x.tolist() == [1, 1]
assert not {"mpi4py", "tensorflow", "matplotlib", "blobfile"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


WORKER = """
import sys, torch
from esddpm_io.errors import UserError
from guided_diffusion import dist_util
launch = dist_util.setup_dist()
rank = dist_util.rank()
weight = torch.full((2, 3, 2, 2), float(rank)).to(memory_format=torch.channels_last)
dist_util.sync_params([weight])
assert weight.eq(0).all() and weight.is_contiguous(memory_format=torch.channels_last)
assert dist_util.gather_objects(rank) == [0, 1]
assert dist_util.any_rank(rank == 1, False) == [True, False]
assert dist_util.local_world_size() == 2
path = sys.argv[1] if rank == 0 else "only/rank/0/reads"
assert torch.equal(dist_util.load_state_dict(path)["w"], torch.arange(5))
try:
    dist_util.load_state_dict(sys.argv[1] + ".missing", flag="--model_path")
except UserError as error:
    assert "--model_path" in str(error) and ".missing" in str(error)
else:
    raise AssertionError("no error")
print(launch.launcher, "fine")
"""


def has_free_port(job: int) -> bool:
    environ = {"SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": str(job)}
    with socket.socket() as probe, contextlib.suppress(OSError):
        probe.bind(("", dist_util._address_from_slurm(environ)[1]))
        return True
    return False


def test_two_processes_under_slurms_variables(tmp_path):
    """A stand-in for srun: its variables, set by hand for two processes on this machine."""
    path = tmp_path / "weights.pt"
    torch.save({"w": torch.arange(5)}, path)
    job = next(job for job in itertools.count(os.getpid()) if has_free_port(job))
    shared = {
        **os.environ,
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_JOB_ID": str(job),
    }
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(path)],
            env={**shared, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [worker.communicate(timeout=PATIENCE_S)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    assert outputs == ["slurm fine\n"] * 2


WAYS_OUT = {
    "return": 0,
    "sys.exit(3)": 3,
    "raise RuntimeError": 1,
    "raise UserError('--flag')": 2,
    "os.kill(os.getpid(), signal.SIGINT); time.sleep(600)": 130,
}
ENDS = """
import atexit, os, signal, sys, time, torch
from pathlib import Path
from esddpm_io.errors import UserError, run_main
from guided_diffusion import dist_util

@atexit.register  # called after those that setup_dist registers
def tell():
    names = {path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")}
    print(*(name for name in names if "gloo" in name), flush=True)

def work():
    dist_util.setup_dist()
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
    model(torch.ones(2, 4)).sum().backward()
    assert dist_util.any_rank(True) == [True]
    WAY_OUT

run_main(work)
"""


def run_pair(way_out):
    """(exit code, stdout, stderr) of two processes that leave in this way."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", ENDS.replace("WAY_OUT", way_out)],
            env={**os.environ, **address, "WORLD_SIZE": "2", **dict.fromkeys(PLACES, str(rank))},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [worker.communicate(timeout=PATIENCE_S) for worker in workers]
    return [(w.returncode, *output) for w, output in zip(workers, outputs, strict=True)]


@pytest.mark.parametrize("way_out", WAYS_OUT)
def test_no_thread_of_the_group_outlives_it(way_out):
    """One that asks for the interpreter while Python ends aborts the process, now and then."""
    for code, out, err in run_pair(way_out):
        assert (code, out) == (WAYS_OUT[way_out], "\n"), err


def test_the_error_of_one_rank_ends_the_others_in_one_line():
    way_out = "dist_util.on_rank_zero(lambda: 1) if dist_util.rank() else sys.exit('--data_dir')"
    first, second = run_pair(f"{way_out}; dist_util.any_rank(True)")
    assert first == (1, "\n", "--data_dir\n")
    code, out, err = second
    assert (code, out) == (1, "\n")
    assert err == (
        "error: another process of this run has ended, and with it this one: see its own message\n"
    )


def test_addresses_that_are_missing_are_named(monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="MASTER_ADDR"):
        dist_util._set_address(Launch("torchrun", 0, 2, 0))
    with pytest.raises(UserError, match="SLURM_STEP_NODELIST"):
        dist_util._address_from_slurm({})


def test_slurm_ports_differ_between_steps_and_jobs():
    ports = {
        dist_util._address_from_slurm(
            {"SLURM_STEP_NODELIST": "a[1-2]", "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}
        )
        for job in (7, 8)
        for step in (0, 1)
    }
    assert len(ports) == 4 and {host for host, _ in ports} == {"a1"}


def test_a_broken_checkpoint_is_named(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"w": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match=r"--resume_checkpoint.*model\.pt"):
        dist_util.load_state_dict(str(path), flag="--resume_checkpoint")
