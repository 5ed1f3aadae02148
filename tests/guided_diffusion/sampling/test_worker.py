import itertools
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from esddpm_io.errors import UserError
from esddpm_io.processes import PARENT_VARIABLE
from guided_diffusion.commands import sample
from guided_diffusion.sampling import outputs, worker
from guided_diffusion.sampling.chunks import ChunkFolder
from guided_diffusion.sampling.heartbeat import Observer, process_runs
from guided_diffusion.sampling.job import Job
from guided_diffusion.sampling.worker import next_chunk
from tests.plain_run import plain_run
from tests.tiny_sampling import NUM_IMAGES, chunks, read_job
from tests.waiting import PATIENCE_S, wait_until


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    """The samples that one process makes when nothing gets in its way."""
    folder = tmp_path_factory.mktemp("undisturbed")
    sample.main(tiny.worker_flags(folder), guided=False)
    return chunks(folder)


def assert_same(folder, expected) -> None:
    images, labels = chunks(folder)
    np.testing.assert_array_equal(images, expected[0])
    np.testing.assert_array_equal(labels, expected[1])


def test_every_image_is_sampled_and_keeps_its_label(tiny, undisturbed):
    images, labels = undisturbed
    with np.load(tiny.images) as npz:
        assert images.shape == npz["arr_0"].shape and images.dtype == np.uint8
        np.testing.assert_array_equal(labels, npz["arr_1"])
        assert (images != npz["arr_0"]).mean() > 0.9


def test_the_same_command_gives_the_same_samples_from_npz_and_folder(tiny, tmp_path, undisturbed):
    with np.load(tiny.images) as npz:
        np.savez_compressed(tmp_path / "packed.npz", npz["arr_0"], npz["arr_1"])
    for name, path in {"folder": tiny.folder, "packed": tmp_path / "packed.npz"}.items():
        sample.main(tiny.worker_flags(tmp_path / name, dataset_path=path), guided=False)
        assert_same(tmp_path / name, undisturbed)


def test_another_seed_gives_other_samples(tiny, tmp_path, undisturbed):
    sample.main(tiny.worker_flags(tmp_path, seed=1), guided=False)
    assert (chunks(tmp_path)[0] != undisturbed[0]).mean() > 0.5


def test_batch_size_changes_rounding_at_most(tiny, tmp_path, undisturbed):
    sample.main(tiny.worker_flags(tmp_path, batch_size=3, chunk_size=7), guided=False)
    images, labels = chunks(tmp_path)
    assert np.abs(images.astype(int) - undisturbed[0]).max() <= 1
    assert (images == undisturbed[0]).mean() > 0.99
    np.testing.assert_array_equal(labels, undisturbed[1])


def test_a_short_last_batch_from_scratch(tiny, tmp_path):
    flags = tiny.worker_flags(tmp_path / "7", start_from_scratch=True, num_samples=7)
    sample.main(flags, guided=False)
    images, labels = chunks(tmp_path / "7")
    assert len(images) == len(labels) == 7
    flags = tiny.worker_flags(tmp_path / "4", start_from_scratch=True, num_samples=4)
    sample.main(flags, guided=False)
    np.testing.assert_array_equal(chunks(tmp_path / "4")[0], images[:4])
    np.testing.assert_array_equal(chunks(tmp_path / "4")[1], labels[:4])


def test_ranks_by_hand_do_their_blocks_and_export_them(tiny, tmp_path, undisturbed):
    for rank in (1, 0):
        place = {"global_rank": rank, "world_size": 2, "batch_size": 2}
        flags = tiny.worker_flags(tmp_path, **place, save_numpy_array=True, save_png_files=True)
        sample.main(flags, guided=False)
        names = sorted(path.name for path in tmp_path.glob("samples_*"))
        assert names == [f"samples_5x8x8x3_rank_{r}.npz" for r in range(rank, 2)]
        if rank == 1:
            # Chunk 4-6 holds the block's first image, so it is there too; 0-4 are not.
            assert ChunkFolder.load(tmp_path).missing(2) == [(0, 2), (2, 4)]
    for rank in (0, 1):
        with np.load(tmp_path / f"samples_5x8x8x3_rank_{rank}.npz") as npz:
            np.testing.assert_array_equal(npz["arr_1"], undisturbed[1][5 * rank : 5 * rank + 5])
            np.testing.assert_array_equal(npz["arr_0"], chunks(tmp_path)[0][5 * rank :][:5])
    pngs = {f"{index}_label_{label}.png" for index, label in enumerate(undisturbed[1])}
    assert {path.name for path in (tmp_path / "images").iterdir()} == pngs


def test_a_rank_that_does_any_chunk_exports_what_lost_ranks_have_not(tiny, tmp_path, undisturbed):
    """Rank 1 of 3 works alone: a file for each rank and all PNGs are there at the end."""
    place = {"global_rank": 1, "world_size": 3, "any_chunk": True}
    flags = tiny.worker_flags(tmp_path, **place, save_numpy_array=True, save_png_files=True)
    sample.main(flags, guided=False)
    files = [f"samples_{n}x8x8x3_rank_{rank}.npz" for rank, n in enumerate((4, 4, 2))]
    assert {path.name for path in tmp_path.glob("samples_*")} == set(files)
    joined = np.concatenate([np.load(tmp_path / name)["arr_0"] for name in files])
    np.testing.assert_array_equal(joined, undisturbed[0])
    pngs = {f"{index}_label_{label}.png" for index, label in enumerate(undisturbed[1])}
    assert {path.name for path in (tmp_path / "images").iterdir()} == pngs
    assert list((tmp_path / "workers").iterdir()) == []


def test_other_settings_are_refused_and_nothing_is_lost(tiny, tmp_path, undisturbed):
    sample.main(tiny.worker_flags(tmp_path), guided=False)
    with pytest.raises(UserError, match="denoise_steps is 2 there, 3 now"):
        sample.main(tiny.worker_flags(tmp_path, denoise_steps=3), guided=False)
    assert_same(tmp_path, undisturbed)


def test_a_restart_does_only_what_is_missing(tiny, tmp_path, undisturbed):
    sample.main(tiny.worker_flags(tmp_path), guided=False)
    first, second, third = sorted((tmp_path / "chunks").glob("*/*.npz"))
    second.unlink()
    before = first.stat().st_mtime_ns, third.stat().st_mtime_ns
    sample.main(tiny.worker_flags(tmp_path), guided=False)
    assert (first.stat().st_mtime_ns, third.stat().st_mtime_ns) == before
    assert_same(tmp_path, undisturbed)
    second.unlink()
    sample.main(tiny.worker_flags(tmp_path, batch_size=3), guided=False)
    labels = []
    there = ChunkFolder.load(tmp_path)
    for part in outputs.parts_of(there, 0, NUM_IMAGES):
        labels += [label for block in part.blocks("arr_1") for label in block]
    np.testing.assert_array_equal(labels, undisturbed[1])


def test_a_chunk_that_is_cut_is_sampled_again(tiny, tmp_path, undisturbed, capsys):
    sample.main(tiny.worker_flags(tmp_path), guided=False)
    cut = sorted((tmp_path / "chunks").glob("*/*.npz"))[1]
    cut.write_bytes(cut.read_bytes()[:-30])
    sample.main(tiny.worker_flags(tmp_path), guided=False)
    assert f"{cut}" in (said := capsys.readouterr().out) and "made again" in said
    assert_same(tmp_path, undisturbed)


def test_another_limit_uses_what_is_there(tiny, tmp_path, undisturbed):
    """From 4 to all images, and back to 3: no sample is made twice or changes."""
    runs = []
    for limit in (4, 0, 3):
        argv = tiny.worker_flags(tmp_path, limit=limit)
        runs.append(read_job(argv, guided=False).run)
        sample.main(argv, guided=False)
        times = {path: path.stat().st_mtime_ns for path in (tmp_path / "chunks").glob("*/*.npz")}
        if limit == 4:
            [first] = times.items()
        assert first in times.items() and len(times) == (1 if limit == 4 else 3)
        there = ChunkFolder.load(tmp_path)
        parts = outputs.parts_of(there, 0, there.num_samples)
        images = np.concatenate([block for part in parts for block in part.blocks("arr_0")])
        np.testing.assert_array_equal(images, undisturbed[0][: limit or NUM_IMAGES])
    assert len({run.identity for run in runs}) == 1


def job_of(rank: int, world: int, number: int, any_chunk: bool = True) -> Job:
    return Job(plain_run(number), None, "", rank=rank, world_size=world, any_chunk=any_chunk)


def test_a_process_does_its_own_block_forward_then_those_of_others_from_the_end():
    missing = [(start, start + 1) for start in range(12)]
    assert [next_chunk(job_of(rank, 3, 12), missing)[0] for rank in range(3)] == [0, 4, 8]
    assert next_chunk(job_of(1, 3, 12), missing[5:])[0] == 5
    # Only rank 0's block is left: its helpers begin at different ends of it.
    assert [next_chunk(job_of(rank, 3, 12), missing[:4])[0] for rank in range(3)] == [0, 2, 3]
    # One chunk is left, which all repeat.
    assert {next_chunk(job_of(rank, 3, 12), missing[3:4]) for rank in range(3)} == {(3, 4)}
    assert next_chunk(job_of(1, 3, 12), []) is None
    assert next_chunk(job_of(1, 3, 12, any_chunk=False), missing[:4]) is None
    assert next_chunk(job_of(7, 8, 3), missing[:3]) == (0, 1)  # more processes than samples


@pytest.mark.parametrize("world", [1, 2, 5, 16])
def test_processes_in_any_order_finish_all(world):
    rng = random.Random(world)
    missing = [(start, min(start + 3, 50)) for start in range(0, 50, 3)]
    worked = []
    while missing:
        chunk = next_chunk(job_of(rng.randrange(world), world, 50), missing)
        missing.remove(chunk)
        worked.append(chunk)
    assert len(worked) == 17


def test_a_chunk_that_another_process_stores_meanwhile_is_dropped(tiny, tmp_path, monkeypatch):
    """And not written a second time."""
    monkeypatch.setattr(worker, "_LOOK_S", 0.0)
    folder = {}
    tell = worker.Heartbeat.tell

    def another_is_faster(self, **changes) -> None:
        tell(self, **changes)
        if changes.get("state") == "sampling" and changes["indices"] == [4, 8]:
            folder["there"] = ChunkFolder.load(tmp_path)
            pixels = np.full((4, 8, 8, 3), 7, np.uint8)
            folder["there"].write((4, 8), pixels, np.zeros(4, np.int64))

    monkeypatch.setattr(worker.Heartbeat, "tell", another_is_faster)
    sample.main(tiny.worker_flags(tmp_path), guided=False)
    assert (chunks(tmp_path)[0][4:8] == 7).all() and folder["there"].is_complete()


def sample_in_child(argv: list[str]) -> None:
    worker.run(read_job(argv, guided=False))


MANY = 60  # samples: enough to be killed in the middle of
ONE_BY_ONE = {"chunk_size": 1, "batch_size": 1, "timestep_respacing": "25", "denoise_steps": 10}


@pytest.fixture(scope="module")
def many(tiny, tmp_path_factory) -> Path:
    """The tiny images again and again, each time a little darker."""
    path = tmp_path_factory.mktemp("many") / "many.npz"
    with np.load(tiny.images) as npz:
        times = MANY // NUM_IMAGES
        pixels = np.concatenate([npz["arr_0"] // (i + 1) for i in range(times)])
        np.savez(path, pixels, np.tile(npz["arr_1"], times))
    return path


def start_workers(number: int, tiny, many, folder) -> list:
    # Forked from a server that has torch loaded, so that a round costs no import.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["guided_diffusion.sampling.sampler", __name__])
    workers = []
    for rank in range(number):
        place = {"global_rank": rank, "world_size": number, "any_chunk": True}
        argv = tiny.worker_flags(folder, **ONE_BY_ONE, **place, dataset_path=many)
        workers.append(context.Process(target=sample_in_child, args=(argv,)))
        workers[-1].start()
    return workers


def gathered(folder) -> bytes:
    """The bytes of samples_all.npz."""
    there = ChunkFolder.load(folder)
    parts = outputs.parts_of(there, 0, there.num_samples)
    outputs.join_parts(parts, str(folder / "samples_all.npz"))
    return (folder / "samples_all.npz").read_bytes()


@pytest.fixture(scope="module")
def one_by_one(tiny, many, tmp_path_factory) -> tuple[bytes, float]:
    """What `gathered` gives of an undisturbed run, and its seconds a sample."""
    folder = tmp_path_factory.mktemp("whole")
    began = time.monotonic()
    sample.main(tiny.worker_flags(folder, **ONE_BY_ONE, dataset_path=many), guided=False)
    return gathered(folder), (time.monotonic() - began) / MANY


def kill_in_the_middle(tiny, many, folder: ChunkFolder, number: int, delay: float) -> int:
    """Start workers and end all by SIGKILL; return how many were at a sample.

    The kill comes `delay` seconds after they have stored one more.
    """
    before = folder.count_done()
    workers = start_workers(number, tiny, many, folder.folder)
    wait_until(lambda: folder.count_done() > before)
    time.sleep(delay)
    for process in workers:
        process.kill()
        process.join()
    records = Observer(folder.folder).workers()
    ours = {process.pid for process in workers}
    return sum(r["state"] == "sampling" and r["pid"] in ours for r in records)


def test_killing_workers_at_random_moments_changes_nothing(tiny, many, tmp_path, one_by_one):
    """Folder after folder is made by one, two or three workers that are killed meanwhile."""
    expected, pace = one_by_one
    rng = random.Random(0)
    rounds = in_a_sample = 0
    for number in itertools.count():
        path = tmp_path / str(number)
        job = read_job(tiny.worker_flags(path, **ONE_BY_ONE, dataset_path=many), guided=False)
        folder = ChunkFolder.open(path, job.run)
        while not folder.is_complete():
            in_a_sample += kill_in_the_middle(
                tiny, many, folder, 1 + rounds % 3, rng.uniform(0, 5 * pace)
            )
            rounds += 1
        assert gathered(path) == expected
        if rounds >= 20 and in_a_sample >= 10:
            break
        assert rounds < 300, f"only {in_a_sample} kills came in a sample"


def test_a_stopped_process_does_not_keep_the_others_waiting(tiny, many, tmp_path, one_by_one):
    """SIGSTOP, as a machine that hangs: its block is done by the other, and nobody waits."""
    first, second = start_workers(2, tiny, many, tmp_path)
    observer = Observer(str(tmp_path))
    wait_until(lambda: [r for r in observer.workers() if r["state"] == "sampling"])
    os.kill(first.pid, signal.SIGSTOP)
    try:
        second.join(PATIENCE_S)
        assert second.exitcode == 0
        assert gathered(tmp_path) == one_by_one[0]
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.join()


def test_half_by_one_device_and_the_rest_by_two(tiny, many, tmp_path, one_by_one):
    folder = tmp_path / "halves"
    place = {"global_rank": 0, "world_size": 2, "dataset_path": many}
    sample.main(tiny.worker_flags(folder, **ONE_BY_ONE, **place), guided=False)
    assert ChunkFolder.load(folder).count_done() == MANY // 2
    for process in start_workers(2, tiny, many, folder):
        process.join()
        assert process.exitcode == 0
    assert gathered(folder) == one_by_one[0]


def sample_for_long(tiny, folder) -> str:
    """Code of a worker with work for many minutes, whose first samples come soon."""
    work = {"start_from_scratch": True, "num_samples": 10_000, "timestep_respacing": "50"}
    argv = tiny.worker_flags(folder, **work, batch_size=1, chunk_size=1)
    return f"from guided_diffusion.commands import sample; sample.main({argv!r}, guided=False)"


def test_sigterm_keeps_finished_chunks_and_says_so(tiny, tmp_path):
    code = sample_for_long(tiny, tmp_path)
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    wait_until(lambda: list((tmp_path / "chunks").glob("*/0*.npz")), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_S) != 0
    assert [record["state"] for record in Observer(str(tmp_path)).workers()] == ["stopped"]
    assert ChunkFolder.load(tmp_path).count_done() >= 1
    assert {path.name[0] for path in (tmp_path / "chunks").glob("*/*")} == {"0"}  # no half one


def test_out_of_memory_halves_the_batch(tiny, tmp_path, undisturbed):
    """With an address space too small for the batch that was asked for, the samples still come."""
    pixels = np.repeat(undisturbed[0], 200, axis=0)
    np.savez(tmp_path / "many.npz", pixels, np.zeros(len(pixels), int))
    argv = tiny.worker_flags(
        tmp_path / "out",
        dataset_path=tmp_path / "many.npz",
        batch_size=2000,
        timestep_respacing="1",
        denoise_steps=1,
    )
    code = (
        "import resource, guided_diffusion.sampling.sampler\n"
        "from guided_diffusion.commands import sample\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 70_000_000,) * 2)\n"
        f"sample.main({argv!r}, guided=False)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},  # else each thread reserves 64 MiB
    )
    assert out.returncode == 0, out.stderr
    assert "out of memory with 2000 images a step" in out.stdout
    # Halved, and again if need be; not shrunk one by one.
    sizes = [int(size) for size in re.findall(r"going on with (\d+)", out.stdout)]
    assert sizes == [2000 >> (i + 1) for i in range(len(sizes))]
    assert len(chunks(tmp_path / "out")[0]) == 2000


def test_workers_do_not_outlive_a_killed_launcher(tiny, tmp_path):
    child = sample_for_long(tiny, tmp_path)
    launcher = (
        "import os, subprocess, sys\n"
        f"os.environ[{PARENT_VARIABLE!r}] = str(os.getpid())\n"
        f"subprocess.run([sys.executable, '-c', {child!r}])"
    )
    process = subprocess.Popen([sys.executable, "-c", launcher], stderr=subprocess.DEVNULL)
    observer = Observer(str(tmp_path))
    wait_until(lambda: [r for r in observer.workers() if r["state"] == "sampling"], process)
    process.kill()
    process.wait()
    wait_until(lambda: not process_runs(observer.workers()[0]["pid"]))
    assert [record["state"] for record in observer.workers()] == ["stopped"]
