import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from esddpm_io.errors import UserError
from guided_diffusion.sampling import outputs, worker
from guided_diffusion.sampling.chunks import ChunkFolder
from guided_diffusion.sampling.claims import LAUNCHER_VARIABLE, Observer, process_runs
from guided_diffusion.sampling.settings import read_job
from tests.tiny_sampling import NUM_IMAGES, chunks


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
def one_by_one(tiny, tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("whole")
    worker.main(tiny.worker_flags(folder, **ONE_BY_ONE), guided=False)
    return gathered(folder)


def test_killing_workers_at_random_moments_changes_nothing(tiny, tmp_path, one_by_one):
    """20 rounds of two real worker loops, both ended by SIGKILL somewhere in the work."""
    rng = random.Random(0)
    folder, kills = tmp_path / "killed", 0
    for _ in range(20):
        workers = start_two_workers(tiny, folder)
        time.sleep(rng.uniform(0.02, 0.35))
        for process in workers:
            kills += process.is_alive()
            process.kill()
            process.join()
    done_by_the_killed = ChunkFolder.load(folder).count_done()
    worker.main(tiny.worker_flags(folder, **ONE_BY_ONE, any_chunk=True), guided=False)
    print(f"{kills} kills, {done_by_the_killed} of {NUM_IMAGES} samples finished meanwhile")
    assert kills >= 10
    assert gathered(folder) == one_by_one


def test_half_by_one_device_and_the_rest_by_two(tiny, tmp_path, one_by_one):
    folder = tmp_path / "halves"
    first_half = tiny.worker_flags(folder, **ONE_BY_ONE, global_rank=0, world_size=2)
    worker.main(first_half, guided=False)
    assert ChunkFolder.load(folder).count_done() == NUM_IMAGES // 2
    for process in start_two_workers(tiny, folder):
        process.join()
        assert process.exitcode == 0
    assert gathered(folder) == one_by_one


def test_sigterm_keeps_finished_chunks_and_frees_the_claim(tiny, tmp_path):
    argv = tiny.worker_flags(tmp_path, batch_size=1, denoise_steps=50, timestep_respacing="250")
    code = f"from guided_diffusion.sampling import worker; worker.main({argv!r}, guided=False)"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    while not list((tmp_path / "chunks").glob("0*.npz")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) != 0
    assert list((tmp_path / "claims").iterdir()) == []
    assert [record["state"] for record in Observer(str(tmp_path)).workers()] == ["stopped"]
    assert 0 < len(list((tmp_path / "chunks").iterdir())) < NUM_IMAGES


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
    argv = tiny.worker_flags(tmp_path, batch_size=1, denoise_steps=900, timestep_respacing="")
    child = f"from guided_diffusion.sampling import worker; worker.main({argv!r}, guided=False)"
    launcher = (
        "import os, subprocess, sys, time\n"
        f"os.environ[{LAUNCHER_VARIABLE!r}] = str(os.getpid())\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", launcher], stderr=subprocess.DEVNULL)
    while not (workers := Observer(str(tmp_path)).workers()):
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 120
    while process_runs(workers[0]["pid"]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
