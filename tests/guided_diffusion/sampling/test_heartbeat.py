import os
import subprocess
import sys

import pytest

from guided_diffusion.sampling import heartbeat as module
from guided_diffusion.sampling.heartbeat import Heartbeat, Observer, process_runs
from tests.waiting import wait_until


@pytest.fixture
def fast_beats(monkeypatch):
    monkeypatch.setattr(module, "BEAT_S", 0.05)


def killed_worker(folder) -> subprocess.Popen:
    """A process with a heartbeat, to be killed."""
    code = (
        "import time; from guided_diffusion.sampling.heartbeat import Heartbeat\n"
        f"Heartbeat({str(folder)!r}, rank=7).__enter__()\n"
        "print('here', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "here\n"
    return process


def test_a_killed_process_is_dead_at_once_even_as_a_zombie(tmp_path):
    process = killed_worker(tmp_path)
    observer = Observer(tmp_path)
    assert [record["alive"] for record in observer.workers()] == [True]
    process.kill()
    wait_until(lambda: not process_runs(process.pid))  # a zombie: nobody has waited yet
    assert [record["alive"] for record in observer.workers()] == [False]
    observer.forget_dead()
    assert observer.workers() == []
    process.wait()
    process.stdout.close()


def test_on_windows_no_signal_asks_for_a_process(monkeypatch):
    """There signal 0 is Ctrl-C, for all of the console."""
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.delattr(os, "kill")
    assert process_runs(os.getpid())


def test_who_ends_well_leaves_no_record_and_who_fails_leaves_one(tmp_path, fast_beats):
    with Heartbeat(tmp_path, rank=0) as beating:
        beating.tell(state="sampling", indices=[3, 4])
        [record] = Observer(tmp_path).workers()
        assert record["alive"] and record["state"] == "sampling" and record["indices"] == [3, 4]
    assert Observer(tmp_path).workers() == []
    with pytest.raises(KeyboardInterrupt), Heartbeat(tmp_path, rank=0):
        raise KeyboardInterrupt
    [record] = Observer(tmp_path).workers()
    assert not record["alive"] and record["state"] == "stopped"


def test_the_folder_goes_with_the_last(tmp_path, fast_beats):
    observer = Observer(tmp_path)
    observer.close()  # nobody ever worked
    with Heartbeat(tmp_path, rank=0):
        observer.close()
        assert len(observer.workers()) == 1
    assert (tmp_path / "workers").exists()
    observer.close()
    assert not (tmp_path / "workers").exists()


class Clock:
    """Stands for the module `time` in heartbeat: the hours that tests wait for pass at once."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def wait_for_beat(observer: Observer) -> dict:
    """The record of the one worker once its heart has beaten again."""
    [before] = observer.workers()
    return wait_until(lambda: [r for r in observer.workers() if r["beat"] > before["beat"]])[0]


def test_on_another_machine_who_writes_no_more_is_dead(tmp_path, fast_beats, clock, monkeypatch):
    monkeypatch.setattr(module, "machine_id", lambda: "there")
    beating = Heartbeat(tmp_path, rank=0)
    beating.__enter__()
    monkeypatch.setattr(module, "machine_id", lambda: "here")
    observer = Observer(tmp_path)
    for _ in range(5):  # slow, but it beats
        clock.now += 0.9 * module.DEAD_AFTER_S
        assert wait_for_beat(observer)["alive"]
    beating._stop.set()  # as if the machine had lost its power: no last word
    beating._thread.join()
    assert observer.workers()[0]["alive"]
    clock.now += 0.9 * module.DEAD_AFTER_S
    assert observer.workers()[0]["alive"]
    clock.now += 0.2 * module.DEAD_AFTER_S
    assert not observer.workers()[0]["alive"]


def test_a_full_disk_under_the_heart_reaches_the_worker(tmp_path, fast_beats):
    def broken() -> bool:
        beating.set(state="sampling")
        return False

    with Heartbeat(tmp_path / "gone", rank=0) as beating:
        with beating._lock:  # between two beats
            (tmp_path / "gone" / "workers").rename(tmp_path / "moved")
            (tmp_path / "gone" / "workers").write_text("a file in the way")
        with pytest.raises(OSError, match="exists|directory"):
            wait_until(broken)
