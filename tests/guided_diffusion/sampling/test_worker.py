import itertools
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from esddpm_io.errors import UserError
from esddpm_io.files import read_json
from guided_diffusion.sampling import outputs, worker
from guided_diffusion.sampling.chunks import ChunkFolder
from guided_diffusion.sampling.claims import LAUNCHER_VARIABLE, Observer, process_runs
from guided_diffusion.sampling.settings import read_job
from tests.tiny_sampling import NUM_IMAGES, chunk_held, chunks
from tests.waiting import PATIENCE_S, wait_until


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    """The samples that one process makes when nothing gets in its way."""
    folder = tmp_path_factory.mktemp("undisturbed")
    worker.main(tiny.worker_flags(folder), guided=False)
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
        worker.main(tiny.worker_flags(tmp_path / name, dataset_path=path), guided=False)
        assert_same(tmp_path / name, undisturbed)


def test_another_seed_gives_other_samples(tiny, tmp_path, undisturbed):
    worker.main(tiny.worker_flags(tmp_path, seed=1), guided=False)
    assert (chunks(tmp_path)[0] != undisturbed[0]).mean() > 0.5


def test_batch_size_changes_rounding_at_most(tiny, tmp_path, undisturbed):
    worker.main(tiny.worker_flags(tmp_path, batch_size=3, chunk_size=7), guided=False)
    images, labels = chunks(tmp_path)
    assert np.abs(images.astype(int) - undisturbed[0]).max() <= 1
    assert (images == undisturbed[0]).mean() > 0.99
    np.testing.assert_array_equal(labels, undisturbed[1])


def test_a_short_last_batch_from_scratch(tiny, tmp_path):
    flags = tiny.worker_flags(tmp_path / "7", start_from_scratch=True, num_samples=7)
    worker.main(flags, guided=False)
    images, labels = chunks(tmp_path / "7")
    assert len(images) == len(labels) == 7
    flags = tiny.worker_flags(tmp_path / "4", start_from_scratch=True, num_samples=4)
    worker.main(flags, guided=False)
    np.testing.assert_array_equal(chunks(tmp_path / "4")[0], images[:4])
    np.testing.assert_array_equal(chunks(tmp_path / "4")[1], labels[:4])


def test_ranks_by_hand_do_their_blocks_and_export_them(tiny, tmp_path, undisturbed):
    for rank in (1, 0):
        place = {"global_rank": rank, "world_size": 2, "batch_size": 2}
        flags = tiny.worker_flags(tmp_path, **place, save_numpy_array=True, save_png_files=True)
        worker.main(flags, guided=False)
        names = sorted(path.name for path in tmp_path.glob("samples_*"))
        assert names == [f"samples_5x8x8x3_rank_{r}.npz" for r in range(rank, 2)]
        if rank == 1:
            # Chunk 4-6 holds the block's first image, so it is there too; 0-4 are not.
            assert ChunkFolder.load(tmp_path).missing() == [0, 1]
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
    worker.main(flags, guided=False)
    files = [f"samples_{n}x8x8x3_rank_{rank}.npz" for rank, n in enumerate((4, 4, 2))]
    assert {path.name for path in tmp_path.glob("samples_*")} == set(files)
    joined = np.concatenate([np.load(tmp_path / name)["arr_0"] for name in files])
    np.testing.assert_array_equal(joined, undisturbed[0])
    pngs = {f"{index}_label_{label}.png" for index, label in enumerate(undisturbed[1])}
    assert {path.name for path in (tmp_path / "images").iterdir()} == pngs
    assert list((tmp_path / "claims").iterdir()) == []


def test_other_settings_are_refused_and_nothing_is_lost(tiny, tmp_path, undisturbed):
    worker.main(tiny.worker_flags(tmp_path), guided=False)
    with pytest.raises(UserError, match="denoise_steps is 2 there, 3 now"):
        worker.main(tiny.worker_flags(tmp_path, denoise_steps=3), guided=False)
    assert_same(tmp_path, undisturbed)


def test_a_restart_does_only_what_is_missing(tiny, tmp_path, undisturbed):
    worker.main(tiny.worker_flags(tmp_path), guided=False)
    first, second, third = sorted((tmp_path / "chunks").iterdir())
    second.unlink()
    before = first.stat().st_mtime_ns, third.stat().st_mtime_ns
    worker.main(tiny.worker_flags(tmp_path, batch_size=16), guided=False)
    assert (first.stat().st_mtime_ns, third.stat().st_mtime_ns) == before
    assert_same(tmp_path, undisturbed)  # batch 16 fills the folder's chunks of 4


def sample_in_child(argv: list[str]) -> None:
    worker.run(read_job(argv, guided=False))


ONE_BY_ONE = {"chunk_size": 1, "batch_size": 1, "timestep_respacing": "25", "denoise_steps": 10}


def start_two_workers(tiny, folder) -> list:
    # Forked from a server that has torch loaded, so that a round costs no import.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["guided_diffusion.sampling.sampler", __name__])
    workers = []
    for rank in range(2):
        place = {"global_rank": rank, "world_size": 2, "any_chunk": True}
        argv = tiny.worker_flags(folder, **ONE_BY_ONE, **place)
        workers.append(context.Process(target=sample_in_child, args=(argv,)))
        workers[-1].start()
    return workers


def gathered(folder) -> bytes:
    """The bytes of samples_all.npz."""
    there = ChunkFolder.load(folder)
    outputs.join_parts(outputs.parts_of(there, 0, NUM_IMAGES), str(folder / "samples_all.npz"))
    return (folder / "samples_all.npz").read_bytes()


@pytest.fixture(scope="module")
def one_by_one(tiny, tmp_path_factory) -> tuple[bytes, float]:
    """What `gathered` gives of an undisturbed run, and its seconds a sample."""
    folder = tmp_path_factory.mktemp("whole")
    began = time.monotonic()
    worker.main(tiny.worker_flags(folder, **ONE_BY_ONE), guided=False)
    return gathered(folder), (time.monotonic() - began) / NUM_IMAGES


def owners(folder: ChunkFolder) -> set[str]:
    """Names of the workers that have claimed missing chunks."""
    paths = (f"{folder.folder}/claims/{chunk:07}.json" for chunk in folder.missing())
    return {read_json(path) for path in paths} - {None}


def kill_two_workers(tiny, folder: ChunkFolder, samples: int, delay: float) -> set[str]:
    """Start two workers and end both by SIGKILL; return the names of those that left a claim.

    The kill comes `delay` seconds after they have finished so many samples more or, with none to
    wait for, after one of them has begun.
    """
    last = NUM_IMAGES - 1
    before, known = folder.count_done(), owners(folder)

    def are_there_yet() -> bool:
        assert all(process.is_alive() for process in workers)
        begun = bool(owners(folder) - known)
        done = folder.count_done()
        return done >= min(before + samples, last) and (begun or done > before)

    with chunk_held(Path(folder.folder), last) as holder:
        known.add(holder)
        workers = start_two_workers(tiny, folder.folder)
        wait_until(are_there_yet)
        time.sleep(delay)
        for process in workers:
            process.kill()
            process.join()
    # What is held here kept them from ending by themselves.
    assert [process.exitcode for process in workers] == [-signal.SIGKILL] * 2
    return owners(folder) - known


def test_killing_workers_at_random_moments_changes_nothing(tiny, tmp_path, one_by_one):
    """Folder after folder, all samples but one are made by workers that are killed meanwhile."""
    expected, pace = one_by_one
    rng = random.Random(0)
    rounds = 0
    killed_in_a_sample = set()
    for number in itertools.count():
        path = tmp_path / str(number)
        job = read_job(tiny.worker_flags(path, **ONE_BY_ONE), guided=False)
        folder = ChunkFolder.open(path, job.settings, job.info, job.chunk_size)
        while folder.count_done() < NUM_IMAGES - 1:
            delay = rng.uniform(0, 2 * pace)
            killed_in_a_sample |= kill_two_workers(tiny, folder, rounds % 3, delay)
            rounds += 1
        worker.main(tiny.worker_flags(path, **ONE_BY_ONE, any_chunk=True), guided=False)
        assert gathered(path) == expected
        if rounds >= 20 and len(killed_in_a_sample) >= 10:
            break
        assert rounds < 200, f"{len(killed_in_a_sample)} of {2 * rounds} kills came in a sample"


def test_half_by_one_device_and_the_rest_by_two(tiny, tmp_path, one_by_one):
    folder = tmp_path / "halves"
    first_half = tiny.worker_flags(folder, **ONE_BY_ONE, global_rank=0, world_size=2)
    worker.main(first_half, guided=False)
    assert ChunkFolder.load(folder).count_done() == NUM_IMAGES // 2
    for process in start_two_workers(tiny, folder):
        process.join()
        assert process.exitcode == 0
    assert gathered(folder) == one_by_one[0]


def sample_for_long(tiny, folder) -> str:
    """Code of a worker with work for many minutes, whose first samples come soon."""
    work = {"start_from_scratch": True, "num_samples": 10_000, "timestep_respacing": "50"}
    argv = tiny.worker_flags(folder, **work, batch_size=1, chunk_size=1)
    return f"from guided_diffusion.sampling import worker; worker.main({argv!r}, guided=False)"


def test_sigterm_keeps_finished_chunks_and_frees_the_claim(tiny, tmp_path):
    code = sample_for_long(tiny, tmp_path)
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    wait_until(lambda: list((tmp_path / "chunks").glob("0*.npz")), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_S) != 0
    assert list((tmp_path / "claims").iterdir()) == []
    assert [record["state"] for record in Observer(str(tmp_path)).workers()] == ["stopped"]
    assert ChunkFolder.load(tmp_path).count_done() >= 1
    assert {path.name[0] for path in (tmp_path / "chunks").iterdir()} == {"0"}  # and no half one


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
        "from guided_diffusion.sampling import worker\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 70_000_000,) * 2)\n"
        f"worker.main({argv!r}, guided=False)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},  # else each thread reserves 64 MiB
    )
    assert out.returncode == 0, out.stderr
    assert "out of memory with 2000 images a step" in out.stdout
    assert "going on with 1000" in out.stdout
    assert len(chunks(tmp_path / "out")[0]) == 2000


def test_workers_do_not_outlive_a_killed_launcher(tiny, tmp_path):
    child = sample_for_long(tiny, tmp_path)
    launcher = (
        "import os, subprocess, sys\n"
        f"os.environ[{LAUNCHER_VARIABLE!r}] = str(os.getpid())\n"
        f"subprocess.run([sys.executable, '-c', {child!r}])"
    )
    process = subprocess.Popen([sys.executable, "-c", launcher], stderr=subprocess.DEVNULL)
    observer = Observer(str(tmp_path))
    wait_until(lambda: [r for r in observer.workers() if r["state"] == "sampling"], process)
    process.kill()
    process.wait()
    wait_until(lambda: not process_runs(observer.workers()[0]["pid"]))
    assert [record["state"] for record in observer.workers()] == ["stopped"]
