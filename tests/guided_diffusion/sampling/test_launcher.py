"""The launcher with real processes that stand in for sampling: no torch, so they start fast."""

import sys
import time

import pytest

from guided_diffusion.sampling import launcher
from guided_diffusion.sampling.chunks import ChunkFolder
from guided_diffusion.sampling.heartbeat import Observer, process_runs
from guided_diffusion.sampling.launcher import Launcher, WorkerCommand, WorkersFailed
from tests.plain_run import plain_run
from tests.waiting import wait_until

# Does chunks as a worker does, but for the sampling. argv: folder, rank, and what befalls it.
WORKER = """
import glob, os, signal, sys, time
import numpy as np
from guided_diffusion.sampling import launcher
from guided_diffusion.sampling.chunks import ChunkFolder
from guided_diffusion.sampling.heartbeat import Heartbeat
folder, rank, fate = ChunkFolder.load(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
print("rank", rank, "is here")
if fate == "bad flags":
    print("error: --flag is wrong"); sys.exit(2)
if fate == "is stopped":
    os.kill(os.getpid(), signal.SIGSTOP)
with Heartbeat(folder.folder, rank=rank, device="cpu") as heartbeat:
    while missing := folder.missing(1):
        chunk = missing[0 if rank == 0 else -1]
        heartbeat.tell(state="sampling", indices=list(chunk))
        time.sleep(float(os.environ.get("SLOW", 0.02)))
        if fate == "dies" or fate == "chunk 2 kills" and chunk == (2, 3):
            os.kill(os.getpid(), signal.SIGKILL)
        if fate == "dies after each" and rank == 0 and not folder.is_done(chunk):
            folder.write(chunk, np.zeros((1, 8, 8, 3), np.uint8), None)
            heartbeat.tell(stored=1)
            os.kill(os.getpid(), signal.SIGKILL)
        while fate == "survives" and len(glob.glob(f"{folder.folder}/../death-*")) < 2:
            time.sleep(0.02)
        folder.write(chunk, np.zeros((1, 8, 8, 3), np.uint8), None)
        time.sleep(0.05)
    if fate == "exports":
        heartbeat.tell(state="exporting")
        while not glob.glob(f"{folder.folder}/../free"):
            time.sleep(0.02)
        open(f"{folder.folder}/exported", "w").close()
    if fate == "hangs":
        heartbeat.tell(state="waiting")
        time.sleep(10_000)
"""


@pytest.fixture
def launch(tmp_path):
    """Run one worker a fate; returns the folder. Logs are tmp_path/R.log."""

    def run(*fates: str) -> ChunkFolder:
        folder = ChunkFolder.open(tmp_path / "out", plain_run(12))
        commands = [
            WorkerCommand(
                [sys.executable, "-c", WORKER, folder.folder, str(rank), fate],
                f"gpu{rank}",
                tmp_path / f"{rank}.log",
            )
            for rank, fate in enumerate(fates)
        ]
        Launcher(commands, folder).run()
        return folder

    return run


def test_workers_share_the_chunks_and_have_their_own_logs(launch, tmp_path):
    assert launch("lives", "lives").is_complete()
    for rank in range(2):
        log = (tmp_path / f"{rank}.log").read_text()
        assert f"rank {rank} is here" in log and f"rank {1 - rank} is here" not in log


def test_a_dead_workers_chunks_are_done_by_the_others(launch, tmp_path, capsys, monkeypatch):
    after_death = Launcher._after_death

    def tell(self, process, *how):
        """Let the survivor know that the launcher has seen a death."""
        after_death(self, process, *how)
        (tmp_path / f"death-{process.pid}").touch()

    monkeypatch.setattr(Launcher, "_after_death", tell)
    assert launch("survives", "dies").is_complete()
    said = capsys.readouterr().err
    assert "the worker on device gpu1 was ended by SIGKILL" in said
    assert said.index("starting it once more") < said.index("again; going on without it")


def test_no_device_left_is_an_error_and_what_is_done_stays(launch, tmp_path):
    with pytest.raises(WorkersFailed, match="no device is left") as failed:
        launch("dies")
    assert "last lines of" in str(failed.value) and "rank 0 is here" in str(failed.value)
    folder = ChunkFolder.load(tmp_path / "out")
    assert folder.count_done() == 0


def test_a_chunk_that_fails_twice_ends_the_run(launch, tmp_path):
    with pytest.raises(WorkersFailed, match="images 2-2 failed twice"):
        launch("chunk 2 kills", "chunk 2 kills", "chunk 2 kills")
    assert (2, 3) in ChunkFolder.load(tmp_path / "out").missing(1)


def test_a_device_that_gets_on_is_started_again_and_again(launch, capsys):
    """It dies after each sample that it has stored, twelve times: none is its second in a row."""
    assert launch("dies after each").is_complete()
    said = capsys.readouterr().err
    assert said.count("starting it once more") >= 11
    assert "going on without it" not in said


@pytest.fixture
def little_patience(monkeypatch):
    monkeypatch.setattr(launcher, "_GRACE_S", 0.2)
    monkeypatch.setattr(launcher, "_PATIENCE_S", 0.2)
    monkeypatch.setattr(launcher, "DEAD_AFTER_S", 0.5)


@pytest.mark.parametrize("fate", ["is stopped", "hangs"])
def test_a_worker_that_hangs_does_not_keep_a_finished_run_waiting(
    launch, tmp_path, capsys, little_patience, fate
):
    assert launch("lives", fate).is_complete()
    assert "the worker on device gpu1 does not end: stopping it" in capsys.readouterr().err
    assert_nobody_left(tmp_path / "out")


def test_a_worker_that_still_exports_is_waited_for(launch, tmp_path, little_patience, monkeypatch):
    """However long it takes: here until the launcher has asked many times."""
    asked = []
    may_go_on = Launcher._may_go_on

    def ask(self, pid, waited):
        if not asked:
            wait_until(lambda: self._record_of(pid)[0]["state"] == "exporting")
        asked.append(waited)
        if len(asked) > 3 and waited > 1:
            (tmp_path / "free").touch()
        return may_go_on(self, pid, waited)

    monkeypatch.setattr(Launcher, "_may_go_on", ask)
    launch("exports")
    assert (tmp_path / "out" / "exported").exists()


def assert_nobody_left(folder) -> None:
    for record in Observer(str(folder)).workers():
        assert not process_runs(record["pid"])


# Goes through folders as a worker does. argv: the folders, then what befalls it in the last.
WORKER_OF_SEVERAL = """
import os, signal, sys
import numpy as np
from guided_diffusion.sampling.chunks import ChunkFolder
from guided_diffusion.sampling.heartbeat import Heartbeat
*folders, fate = sys.argv[1:]
for path in folders:
    folder = ChunkFolder.load(path)
    with Heartbeat(folder.folder, rank=0, device="cpu") as heartbeat:
        for chunk in folder.missing(4):
            heartbeat.tell(state="sampling", indices=list(chunk))
            if path == folders[-1] and fate == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if path == folders[-1] and fate == "refuses":
                print("error: sample 3 is not finite"); sys.exit(2)
            folder.write(chunk, np.zeros((4, 8, 8, 3), np.uint8), None)
"""


def launch_several(tmp_path, fate: str) -> list[ChunkFolder]:
    runs = {"first": plain_run(12), "second": plain_run(4, seed=1)}
    folders = [ChunkFolder.open(tmp_path / name, run) for name, run in runs.items()]
    paths = [folder.folder for folder in folders]
    argv = [sys.executable, "-c", WORKER_OF_SEVERAL, *paths, fate]
    Launcher([WorkerCommand(argv, "cpu", tmp_path / "log")], *folders).run()
    return folders


def test_workers_go_through_folders(tmp_path, capsys):
    assert all(folder.is_complete() for folder in launch_several(tmp_path, "lives"))
    # 12 images and 4, of two evaluations each.
    assert "32 network evaluations, all of them" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fate", "code", "message"),
    [("dies", 1, "no device is left"), ("refuses", 2, "^sample 3 is not finite$")],
)
def test_a_failure_says_in_which_folder(tmp_path, fate, code, message):
    with pytest.raises(WorkersFailed, match=message) as failed:
        launch_several(tmp_path, fate)
    assert failed.value.exit_code == code
    assert failed.value.folder.folder == str(tmp_path / "second")
    assert ChunkFolder.load(tmp_path / "first").is_complete()


def test_bad_flags_end_the_run_at_once(launch, tmp_path, monkeypatch):
    monkeypatch.setenv("SLOW", "60")
    with pytest.raises(WorkersFailed, match=r"^--flag is wrong$") as failed:
        launch("lives", "bad flags")
    assert failed.value.exit_code == 2
    assert_nobody_left(tmp_path / "out")


def test_ctrl_c_leaves_no_worker_behind(launch, tmp_path, monkeypatch):
    monkeypatch.setenv("SLOW", "60")

    def interrupt(seconds: float) -> None:
        if not pressed and list((tmp_path / "out" / "workers").glob("0*")):
            pressed.append(True)
            raise KeyboardInterrupt
        real_sleep(seconds)

    pressed = []
    real_sleep = time.sleep
    monkeypatch.setattr(time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        launch("lives", "lives")
    assert pressed
    assert_nobody_left(tmp_path / "out")
