"""A Slurm of this machine alone, in a folder and on ports of its own; Debian's packages, no root's
services: munged, slurmctld and slurmd run as long as the block does."""

import contextlib
import getpass
import os
import platform
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.waiting import PATIENCE_S, wait_until

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
# Where Debian has them; /usr/sbin is not on everybody's path.
_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
_CPUS = 4  # as far as Slurm is concerned: more jobs at once than the machine has cores
_CONFIG = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=0
KillWait=30
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """Which programs of a Slurm are not installed here."""
    return [name for name in DAEMONS if shutil.which(name, path=_PATH) is None]


class Cluster:
    """Slurm's commands, for the cluster of a configuration file."""

    def __init__(self, config: Path):
        self.environ = {**os.environ, "PATH": _PATH, "SLURM_CONF": str(config)}

    def run(self, *words: object, **options) -> subprocess.CompletedProcess:
        """Run a command to its end, as a user of the cluster does."""
        return subprocess.run(
            [*map(str, words)],
            **{"env": self.environ, "capture_output": True, "text": True, "timeout": PATIENCE_S}
            | options,
        )

    def output(self, *words: object) -> str:
        """What a command that has to succeed prints."""
        result = self.run(*words)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def states(self, *jobs: str) -> list[str]:
        """State of every job, element by element: PENDING, RUNNING … or how it ended."""
        records = [self.output("scontrol", "show", "--oneliner", "job", job) for job in jobs]
        lines = [line for record in records for line in record.splitlines()]
        return [line.partition("JobState=")[2].split()[0] for line in lines]

    def wait_for(self, *jobs: str) -> list[str]:
        """How every job has ended, once all have."""
        unfinished = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "SUSPENDED"}

        def ended() -> list[str] | None:
            states = self.states(*jobs)
            return None if unfinished.intersection(states) else states

        return wait_until(ended)


@contextlib.contextmanager
def running_cluster(folder: Path) -> Iterator[Cluster]:
    """A cluster with its files in `folder`, whose path must be short: a socket lies in it."""
    folder.chmod(0o711)  # munged refuses to put its socket where not everybody finds it
    key = folder / "munge.key"
    key.touch(0o600)
    key.write_bytes(os.urandom(1024))
    config = folder / "slurm.conf"
    names = {"host": platform.node().split(".")[0], "user": getpass.getuser(), "cpus": _CPUS}
    controller_port, node_port = _free_ports(2)
    ports = {"controller_port": controller_port, "node_port": node_port}
    config.write_text(_CONFIG.format(folder=folder, **names, **ports))
    cluster = Cluster(config)
    munge = [f"--{name}={folder}/munge.{name.split('-')[0]}" for name in _MUNGE_FILES]
    daemons = [
        ["munged", "--foreground", "--num-threads=2", *munge],
        ["slurmctld", "-D"],
        ["slurmd", "-D"],
    ]
    with contextlib.ExitStack() as stack:
        for argv in daemons:
            log = stack.enter_context(open(folder / f"{argv[0]}.out", "wb"))
            process = subprocess.Popen(
                argv, env=cluster.environ, stdout=log, stderr=subprocess.STDOUT, cwd=folder
            )
            stack.callback(_end, process)
            if argv[0] == "munged":
                wait_until((folder / "munge.socket").exists, process)
        wait_until(lambda: "idle" in cluster.run("sinfo", "--noheader").stdout)
        yield cluster
        # What a failed test has left must not outlive its cluster.
        cluster.run("scancel", "--me", "--signal=KILL", "--full")
        cluster.run("scancel", "--me")
        wait_until(lambda: not cluster.output("squeue", "--noheader", "--me").strip())


_MUNGE_FILES = ("socket", "pid-file", "log-file", "seed-file", "key-file")


def _end(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(PATIENCE_S)
    finally:
        process.kill()


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("", 0))
        return [probe.getsockname()[1] for probe in probes]
