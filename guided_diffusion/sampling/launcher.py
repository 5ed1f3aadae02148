"""The sampling processes of one machine: started, watched, retried, stopped."""

import dataclasses
import os
import shlex
import signal
import subprocess
import time
from collections import Counter, defaultdict
from pathlib import Path

from esddpm_io.errors import EXIT_DISK_FULL, EXIT_USER_ERROR
from guided_diffusion.sampling.chunks import ChunkFolder
from guided_diffusion.sampling.claims import (
    DEAD_AFTER_S,
    LAUNCHER_VARIABLE,
    Observer,
    machine_id,
)
from guided_diffusion.sampling.progress import Overseer, Screen

_POLL_S = 0.1
_LOOK_S = 1.0  # between two looks at what is missing: the folder may be far away and large
_GRACE_S = 10.0  # for workers to see by themselves that no sample is missing
_PATIENCE_S = 15.0  # for a worker to end by itself after SIGTERM
_DEATHS_OF_DEVICE = 2  # a device is retried once
_DEVICES_BEATEN_BY_CHUNK = 2  # a chunk that ends workers on so many devices is at fault itself
_LOG_LINES = 12


class WorkersFailed(RuntimeError):
    """The run cannot go on; the message says why, with the last lines of the worker's log."""


@dataclasses.dataclass(frozen=True)
class WorkerCommand:
    """One process: its argv, its device, and the file that its output is appended to."""

    argv: list[str]
    device: str
    log: Path

    def __str__(self) -> str:
        return shlex.join(self.argv)


class Launcher:
    """Runs workers on one folder of chunks until it is complete."""

    def __init__(self, commands: list[WorkerCommand], folder: ChunkFolder):
        self._commands = commands
        self._folder = folder
        self._observer = Observer(folder.folder)
        self._running: dict[subprocess.Popen, WorkerCommand] = {}
        self._deaths: Counter[int] = Counter()  # by number of the command
        self._beaten: defaultdict[int, set[int]] = defaultdict(set)  # commands by chunk
        self._screen = Screen()
        self._next_look = 0.0

    def run(self) -> None:
        """Return when all samples are there; WorkersFailed if that cannot be.

        However it ends, by Ctrl-C too, no worker is left running.
        """
        overseer = Overseer(self._folder)
        try:
            for command in self._commands:
                self._start(command)
            while self._running and not self._is_complete():
                self._reap()
                if self._screen.is_due():
                    self._screen.show(overseer.look())
                time.sleep(_POLL_S)
            self._screen.show(overseer.look())
            self._see_off()
        finally:
            self._stop_all()
        if self._folder.missing():
            raise WorkersFailed("the workers have ended, but samples are missing")

    def _is_complete(self) -> bool:
        """Whether no sample is missing, looked up now and then."""
        if time.monotonic() < self._next_look:
            return False
        self._next_look = time.monotonic() + _LOOK_S
        return not self._folder.missing()

    def _see_off(self) -> None:
        """Wait for workers that end by themselves or still write files, once all is sampled.

        One that hangs, or was stopped by SIGSTOP, would keep us waiting for ever.
        """
        began = time.monotonic()
        while self._running:
            for process, command in list(self._running.items()):
                if process.poll() is not None:
                    del self._running[process]
                    if process.returncode:
                        how = f"the worker on device {command.device} "
                        how += _describe_exit(process.returncode)
                        self._screen.note(f"{how} after the last sample (log: {command.log})")
            waited = time.monotonic() - began
            if not any(self._may_go_on(process.pid, waited) for process in self._running):
                break
            time.sleep(_POLL_S)
        for command in self._running.values():
            self._screen.note(f"the worker on device {command.device} does not end: stopping it")

    def _may_go_on(self, pid: int, waited: float) -> bool:
        """Whether a worker is to be left alone `waited` seconds after the last sample was there."""
        if waited < _GRACE_S:
            return True
        record = self._record_of(pid)
        if record is None:  # it has only just been started
            return waited < DEAD_AFTER_S
        return record["alive"] and record["state"] == "exporting"

    def _start(self, command: WorkerCommand) -> None:
        command.log.parent.mkdir(parents=True, exist_ok=True)
        with open(command.log, "ab") as log:
            log.write(f"\n{time.strftime('%F %T')} {command}\n".encode())
            log.flush()
            process = subprocess.Popen(
                command.argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(),
                # Ctrl-C goes to us alone; we then stop the workers ourselves.
                start_new_session=True,
            )
        self._running[process] = command

    def _environment(self) -> dict[str, str]:
        environment = {**os.environ, LAUNCHER_VARIABLE: str(os.getpid()), "PYTHONUNBUFFERED": "1"}
        on_cpu = sum(command.device == "cpu" for command in self._commands)
        if on_cpu:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
            environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // on_cpu)))
        return environment

    def _reap(self) -> None:
        """Take note of the workers that have ended since the last time."""
        for process, command in list(self._running.items()):
            code = process.poll()
            if code is None:
                continue
            del self._running[process]
            if code:
                self._after_death(process, command, code)

    def _after_death(self, process: subprocess.Popen, command: WorkerCommand, code: int) -> None:
        """Retry the device once; give up where another try would end the same way."""
        number = self._commands.index(command)
        self._deaths[number] += 1
        how = f"the worker on device {command.device} {_describe_exit(code)}"
        if code in (EXIT_USER_ERROR, EXIT_DISK_FULL):
            raise WorkersFailed(f"{how}\n{_tail(command.log)}")
        chunk = self._chunk_of(process.pid)
        if chunk is not None:
            self._beaten[chunk].add(number)
            if len(self._beaten[chunk]) == _DEVICES_BEATEN_BY_CHUNK:
                start, stop = self._folder.bounds(chunk)
                raise WorkersFailed(
                    f"images {start}-{stop - 1} failed twice: {how}\n{_tail(command.log)}"
                )
        if self._deaths[number] < _DEATHS_OF_DEVICE:
            self._screen.note(f"{how}; starting it once more (log: {command.log})")
            self._start(command)
        elif self._running:
            self._screen.note(f"{how} again; going on without it (log: {command.log})")
        else:
            raise WorkersFailed(f"{how}, and no device is left\n{_tail(command.log)}")

    def _chunk_of(self, pid: int) -> int | None:
        """The chunk that a worker of ours was at when it ended, if it was at one."""
        record = self._record_of(pid)
        return record.get("chunk") if record is not None else None

    def _record_of(self, pid: int) -> dict | None:
        """What a worker of ours has written about itself; the last one, should a pid come twice."""
        own = [
            worker
            for worker in self._observer.workers()
            if (worker["machine"], worker["pid"]) == (machine_id(), pid)
        ]
        return max(own, key=lambda worker: worker["alive"], default=None)

    def _stop_all(self) -> None:
        """Ask the workers to end and see to it that they do; a second Ctrl-C ends the patience."""
        for process in self._running:
            process.terminate()
        deadline = time.monotonic() + _PATIENCE_S
        try:
            for process in self._running:
                process.wait(max(0.0, deadline - time.monotonic()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            for process in self._running:
                process.kill()
        for process in self._running:
            process.wait()
        self._running.clear()


def _describe_exit(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    hint = " (the system may have run out of memory)" if name == "SIGKILL" else ""
    return f"was ended by {name}{hint}"


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
    return "\n".join([f"last lines of {log}:", *(f"  {line}" for line in lines)])
