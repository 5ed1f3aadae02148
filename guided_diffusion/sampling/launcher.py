"""The sampling processes of one machine: started, watched, retried, stopped."""

import dataclasses
import os
import shlex
import signal
import subprocess
import time
from collections import Counter, defaultdict
from pathlib import Path

from esddpm_io.errors import EXIT_DISK_FULL, EXIT_MAY_PASS, EXIT_USER_ERROR
from esddpm_io.parts import Range
from esddpm_io.processes import PARENT_VARIABLE, available_cores
from guided_diffusion.sampling.chunks import ChunkFolder
from guided_diffusion.sampling.heartbeat import DEAD_AFTER_S, Observer, machine_id
from guided_diffusion.sampling.status import Monitor, Screen

_POLL_S = 0.1
_LOOK_S = 1.0  # between two looks at what is missing: the folder may be far away and large
_GRACE_S = 10.0  # for workers to see by themselves that no sample is missing
_PATIENCE_S = 15.0  # for a worker to end by itself after SIGTERM
_DEATHS_OF_DEVICE = 2  # a device is retried once
_DEVICES_BEATEN_BY_CHUNK = 2  # a chunk that ends workers on so many devices is at fault itself
_LOG_LINES = 12


class WorkersFailed(RuntimeError):
    """The run cannot go on; the message says why, and `exit_code` is the worker's where it is ours.

    It is the worker's own `error:` line, or else how it ended and the last lines of its log.
    folder: where it was at work, None if it was nowhere yet.
    """

    def __init__(
        self, message: str, exit_code: int = EXIT_MAY_PASS, folder: ChunkFolder | None = None
    ):
        super().__init__(message)
        self.exit_code = exit_code
        self.folder = folder


@dataclasses.dataclass(frozen=True)
class WorkerCommand:
    """One process: its argv, its device, and the file that its output is appended to."""

    argv: list[str]
    device: str
    log: Path

    def __str__(self) -> str:
        return shlex.join(self.argv)


class Launcher:
    """Runs workers on folders of chunks, in their order, until these are complete."""

    def __init__(self, commands: list[WorkerCommand], *folders: ChunkFolder):
        self._commands = commands
        self._folders = folders
        self._unfinished = list(folders)
        self._observers = [Observer(folder.folder) for folder in folders]
        self._running: dict[subprocess.Popen, WorkerCommand] = {}
        self._deaths: Counter[int] = Counter()  # by number of the command
        # Commands by folder and chunk.
        self._beaten: defaultdict[tuple[str, Range], set[int]] = defaultdict(set)
        self._screen = Screen()
        self._next_look = 0.0

    def run(self) -> None:
        """Return when all samples are there; WorkersFailed if that cannot be.

        However it ends, by Ctrl-C too, no worker is left running.
        """
        monitor = Monitor(*self._folders)
        self._forget_dead()
        try:
            for command in self._commands:
                self._start(command)
            while self._running and not self._is_complete():
                self._reap()
                if self._screen.is_due():
                    self._screen.show(monitor.look())
                time.sleep(_POLL_S)
            self._screen.show(monitor.look())
            self._see_off()
        finally:
            self._stop_all()
            self._forget_dead()
        self._next_look = 0.0
        if not self._is_complete():
            raise WorkersFailed("the workers have ended, but samples are missing")

    def _forget_dead(self) -> None:
        for observer in self._observers:
            observer.forget_dead()

    def _is_complete(self) -> bool:
        """Whether no sample is missing, looked up now and then."""
        if time.monotonic() < self._next_look:
            return False
        self._next_look = time.monotonic() + _LOOK_S
        self._unfinished = [one for one in self._unfinished if not one.is_complete()]
        return not self._unfinished

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
        record, _ = self._record_of(pid)
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
        environment = {**os.environ, PARENT_VARIABLE: str(os.getpid()), "PYTHONUNBUFFERED": "1"}
        on_cpu = sum(command.device == "cpu" for command in self._commands)
        if on_cpu:
            cores = available_cores()
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
        record, folder = self._record_of(process.pid)
        if record is not None and record.get("stored"):
            self._deaths[number] = 0  # it got on: this is a new mishap
        self._deaths[number] += 1
        how = f"the worker on device {command.device} {_describe_exit(code)}"
        if code in (EXIT_USER_ERROR, EXIT_DISK_FULL):
            message = _own_error(command.log) or f"{how}\n{_tail(command.log)}"
            raise WorkersFailed(message, code, folder)
        if record is not None and folder is not None and record["state"] == "sampling":
            start, stop = record["indices"]
            beaten = self._beaten[folder.folder, (start, stop)]
            beaten.add(number)
            if len(beaten) == _DEVICES_BEATEN_BY_CHUNK:
                message = f"images {start}-{stop - 1} failed twice: {how}\n{_tail(command.log)}"
                raise WorkersFailed(message, folder=folder)
        if self._deaths[number] < _DEATHS_OF_DEVICE:
            self._screen.note(f"{how}; starting it once more (log: {command.log})")
            self._start(command)
        elif self._running:
            self._screen.note(f"{how} again; going on without it (log: {command.log})")
        else:
            message = f"{how}, and no device is left\n{_tail(command.log)}"
            raise WorkersFailed(message, folder=folder)

    def _record_of(self, pid: int) -> tuple[dict, ChunkFolder] | tuple[None, None]:
        """What a worker of ours has written about itself, and where it is at work.

        The last one, should a pid come twice.
        """
        own = [
            (worker, folder)
            for observer, folder in zip(self._observers, self._folders, strict=True)
            for worker in observer.workers()
            if (worker["machine"], worker["pid"]) == (machine_id(), pid)
        ]
        return max(own, key=lambda pair: pair[0]["alive"], default=(None, None))

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


def _own_error(log: Path) -> str | None:
    """The last line of a log, if it is the one line of an error that the user can mend."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return lines[-1].removeprefix("error: ") if lines and lines[-1].startswith("error: ") else None


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
    return "\n".join([f"last lines of {log}:", *(f"  {line}" for line in lines)])
