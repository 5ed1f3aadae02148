"""The launcher with real processes that stand in for sampling: no torch, so they start fast."""

import sys
import time

import pytest

from guided_diffusion.sampling import launcher
from guided_diffusion.sampling.chunks import ChunkFolder
from guided_diffusion.sampling.claims import Observer, process_runs
from guided_diffusion.sampling.launcher import Launcher, WorkerCommand, WorkersFailed
from tests.waiting import wait_until

# Does chunks as a worker does, but for the sampling. argv: folder, rank, and what befalls it.
WORKER = """
import glob, os, signal, sys, time
import numpy as np
from guided_diffusion.sampling import launcher
from guided_diffusion.sampling.chunks import ChunkFolder
from guided_diffusion.sampling.claims import Claims, Heart
folder, rank, fate = ChunkFolder.load(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
print("rank", rank, "is here")
if fate == "bad flags":
    print("error: --flag is wrong"); sys.exit(2)
if fate == "is stopped":
    os.kill(os.getpid(), signal.SIGSTOP)
with Heart(folder.folder, rank=rank, device="cpu") as heart:
    claims = Claims(folder.folder, heart.worker_id)
    while folder.missing():
        for chunk in folder.missing():
            if not claims.take(chunk):
                continue
            heart.tell(state="sampling", chunk=chunk, indices=[chunk, chunk + 1])
            time.sleep(float(os.environ.get("SLOW", 0.02)))
            if fate == "dies" or fate == "chunk 2 kills" and chunk == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            while fate == "survives" and len(glob.glob(f"{folder.folder}/../death-*")) < 2:
                time.sleep(0.02)
            start, stop = folder.bounds(chunk)
            folder.write(chunk, np.zeros((stop - start, 2, 2, 3), np.uint8), None)
            claims.release(chunk)
            time.sleep(0.05)
    if fate == "exports":
        heart.tell(state="exporting", chunk=None)
        while not glob.glob(f"{folder.folder}/../free"):
            time.sleep(0.02)
        open(f"{folder.folder}/exported", "w").close()
    if fate == "hangs":
        heart.tell(state="waiting", chunk=None)
        time.sleep(10_000)
"""


@pytest.fixture
def launch(tmp_path):
    """Run one worker a fate; returns the folder. Logs are tmp_path/R.log."""

    def run(*fates: str) -> ChunkFolder:
        folder = ChunkFolder.open(tmp_path / "out", {"num_samples": 12}, {}, 1)
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
    assert launch("lives", "lives").missing() == []
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
    assert launch("survives", "dies").missing() == []
    said = capsys.readouterr().err
    assert "the worker on device gpu1 was ended by SIGKILL" in said
    assert said.index("starting it once more") < said.index("again; going on without it")


def test_no_device_left_is_an_error_and_what_is_done_stays(launch, tmp_path):
    with pytest.raises(WorkersFailed, match="no device is left") as failed:
        launch("dies")
    assert "last lines of" in str(failed.value) and "rank 0 is here" in str(failed.value)
    folder = ChunkFolder.load(tmp_path / "out")
    assert folder.missing() == list(range(12))


def test_a_chunk_that_fails_twice_ends_the_run(launch, tmp_path):
    with pytest.raises(WorkersFailed, match="images 2-2 failed twice"):
        launch("chunk 2 kills", "chunk 2 kills", "chunk 2 kills")
    assert 2 in ChunkFolder.load(tmp_path / "out").missing()


@pytest.fixture
def little_patience(monkeypatch):
    monkeypatch.setattr(launcher, "_GRACE_S", 0.2)
    monkeypatch.setattr(launcher, "_PATIENCE_S", 0.2)
    monkeypatch.setattr(launcher, "DEAD_AFTER_S", 0.5)


@pytest.mark.parametrize("fate", ["is stopped", "hangs"])
def test_a_worker_that_hangs_does_not_keep_a_finished_run_waiting(
    launch, tmp_path, capsys, little_patience, fate
):
    assert launch("lives", fate).missing() == []
    assert "the worker on device gpu1 does not end: stopping it" in capsys.readouterr().err
    assert_nobody_left(tmp_path / "out")


def test_a_worker_that_still_exports_is_waited_for(launch, tmp_path, little_patience, monkeypatch):
    """However long it takes: here until the launcher has asked many times."""
    asked = []
    may_go_on = Launcher._may_go_on

    def ask(self, pid, waited):
        if not asked:
            wait_until(lambda: self._record_of(pid)["state"] == "exporting")
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


def test_bad_flags_end_the_run_at_once(launch, tmp_path, monkeypatch):
    monkeypatch.setenv("SLOW", "60")
    with pytest.raises(WorkersFailed, match=r"exit code 2(.|\n)*error: --flag is wrong"):
        launch("lives", "bad flags")
    assert_nobody_left(tmp_path / "out")


def test_ctrl_c_leaves_no_worker_behind(launch, tmp_path, monkeypatch):
    monkeypatch.setenv("SLOW", "60")

    def interrupt(seconds: float) -> None:
        if not pressed and list((tmp_path / "out" / "claims").glob("0*")):
            pressed.append(True)
            raise KeyboardInterrupt
        real_sleep(seconds)

    pressed = []
    real_sleep = time.sleep
    monkeypatch.setattr(time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        launch("lives", "lives")
    assert len(Observer(str(tmp_path / "out")).workers()) >= 1
    assert_nobody_left(tmp_path / "out")
