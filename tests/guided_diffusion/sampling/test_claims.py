import subprocess
import sys

import pytest

from guided_diffusion.sampling import claims
from guided_diffusion.sampling.claims import Claims, Heart, Observer, process_runs
from tests.waiting import wait_until


@pytest.fixture
def fast_beats(monkeypatch):
    monkeypatch.setattr(claims, "BEAT_S", 0.05)


def test_one_live_worker_has_a_chunk(tmp_path, fast_beats):
    with Heart(tmp_path, rank=0) as first, Heart(tmp_path, rank=1) as second:
        ours, theirs = Claims(tmp_path, first.worker_id), Claims(tmp_path, second.worker_id)
        assert ours.take(3) and not theirs.take(3) and theirs.take(4)
        ours.release(3)
        assert theirs.take(3)


def test_the_claim_of_a_stopped_worker_is_taken_over(tmp_path, fast_beats):
    with Heart(tmp_path, rank=0) as heart:
        assert Claims(tmp_path, heart.worker_id).take(0)
    with Heart(tmp_path, rank=1) as heart:
        assert Claims(tmp_path, heart.worker_id).take(0)


def killed_worker(folder) -> subprocess.Popen:
    """A process that claims chunk 0 and is killed with its claim."""
    code = (
        "import sys, time; from guided_diffusion.sampling.claims import Claims, Heart\n"
        f"heart = Heart({str(folder)!r}, rank=7).__enter__()\n"
        f"assert Claims({str(folder)!r}, heart.worker_id).take(0)\n"
        "print('claimed', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "claimed\n"
    return process


def test_a_killed_process_is_dead_at_once_even_as_a_zombie(tmp_path):
    process = killed_worker(tmp_path)
    [record] = Observer(tmp_path).workers()
    with Heart(tmp_path, rank=1) as heart:
        mine = Claims(tmp_path, heart.worker_id)
        assert record["alive"] and not mine.take(0)
        process.kill()
        wait_until(lambda: not process_runs(process.pid))  # a zombie: nobody has waited yet
        assert mine.take(0)
    process.wait()
    process.stdout.close()


class Clock:
    """Stands for the module `time` in claims: the hours that tests wait for pass at once."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(claims, "time", clock)
    return clock


def wait_for_beat(observer: Observer) -> dict:
    """The record of the one worker once its heart has beaten again."""
    [before] = observer.workers()
    return wait_until(lambda: [r for r in observer.workers() if r["beat"] > before["beat"]])[0]


def test_on_another_machine_a_heart_that_stands_still_is_dead(
    tmp_path, fast_beats, clock, monkeypatch
):
    monkeypatch.setattr(claims, "machine_id", lambda: "there")
    heart = Heart(tmp_path, rank=0)
    heart.__enter__()
    monkeypatch.setattr(claims, "machine_id", lambda: "here")
    observer = Observer(tmp_path)
    for _ in range(5):  # slow, but it beats
        clock.now += 0.9 * claims.DEAD_AFTER_S
        assert wait_for_beat(observer)["alive"]
    heart._stop.set()  # as if the machine had lost its power: no last word
    heart._thread.join()
    assert observer.workers()[0]["alive"]
    clock.now += 0.9 * claims.DEAD_AFTER_S
    assert observer.workers()[0]["alive"]
    clock.now += 0.2 * claims.DEAD_AFTER_S
    assert not observer.workers()[0]["alive"]


def test_a_heart_that_beats_without_a_step_forward_is_stuck(tmp_path, fast_beats, clock):
    with Heart(tmp_path, rank=0) as heart:
        observer = Observer(tmp_path)
        for step in range(5):  # as slow as can be, but it gets on
            heart.tell(state="sampling", chunk=1, step=step)
            assert observer.workers()[0]["alive"]
            clock.now += 0.9 * claims.STUCK_AFTER_S
        assert wait_for_beat(observer)["alive"]
        clock.now += 0.2 * claims.STUCK_AFTER_S
        assert not wait_for_beat(observer)["alive"]
        heart.tell(state="waiting")  # for others, with no chunk of its own
        clock.now += 2 * claims.STUCK_AFTER_S
        assert wait_for_beat(observer)["alive"]


def test_a_full_disk_under_the_heart_reaches_the_worker(tmp_path, fast_beats):
    def broken() -> bool:
        heart.set(state="sampling")
        return False

    with Heart(tmp_path / "gone", rank=0) as heart:
        with heart._lock:  # between two beats
            (tmp_path / "gone" / "workers").rename(tmp_path / "moved")
            (tmp_path / "gone" / "workers").write_text("a file in the way")
        with pytest.raises(OSError, match="exists|directory"):
            wait_until(broken)
