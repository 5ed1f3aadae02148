import dataclasses
import os
import time

import numpy as np
import pytest

from esddpm_io.errors import UserError
from guided_diffusion.sampling.chunks import ChunkFolder, default_chunk_size
from tests.plain_run import plain_run


def fill(folder: ChunkFolder, *ranges: tuple[int, int]) -> None:
    """Store samples whose pixels are all their index."""
    for start, stop in ranges:
        pixels = np.arange(start, stop, dtype=np.uint8)[:, None, None, None]
        folder.write((start, stop), np.broadcast_to(pixels, (stop - start, 8, 8, 3)), None)


def indices(folder: ChunkFolder) -> list[int]:
    """The samples of the folder, in the order in which they are gathered."""
    found = []
    for chunk, (first, last) in folder.cover(0, folder.num_samples):
        with folder.reader(chunk) as reader:
            found += reader.array("arr_0")[first - chunk[0] : last - chunk[0], 0, 0, 0].tolist()
    return found


def test_what_is_missing_and_done(tmp_path):
    folder = ChunkFolder.open(tmp_path, plain_run(10))
    assert folder.missing(4) == [(0, 4), (4, 8), (8, 10)] and folder.count_done() == 0
    fill(folder, (4, 8))
    assert folder.missing(4) == [(0, 4), (8, 10)] and folder.count_done() == 4
    assert folder.is_done((4, 8)) and not folder.is_done((0, 4)) and not folder.is_complete()
    fill(folder, (0, 4), (8, 10))
    assert folder.is_complete() and folder.missing(4) == [] and indices(folder) == [*range(10)]


def test_chunks_of_any_size_fit_together(tmp_path):
    folder = ChunkFolder.open(tmp_path, plain_run(20))
    fill(folder, (0, 7), (10, 20))
    # What is partly there is sampled whole: chunks lie on one grid from 0 on.
    assert folder.missing(4) == [(4, 8), (8, 12)] and folder.count_done() == 17
    fill(folder, (4, 8), (8, 12))
    assert folder.is_complete() and indices(folder) == [*range(20)]


def test_a_longer_and_a_shorter_run_use_what_is_there(tmp_path):
    fill(ChunkFolder.open(tmp_path, plain_run(6)), (0, 4), (4, 6))
    more = ChunkFolder.open(tmp_path, plain_run(10))
    assert more.missing(4) == [(4, 8), (8, 10)]
    fill(more, (4, 8), (8, 10))
    assert indices(more) == [*range(10)]
    fewer = ChunkFolder.open(tmp_path, plain_run(5))
    assert fewer.is_complete() and indices(fewer) == [*range(5)]
    assert ChunkFolder.load(tmp_path).num_samples == 5


def test_samples_of_two_settings_never_meet(tmp_path):
    one, other = plain_run(4), plain_run(4, seed=1)
    first = ChunkFolder.open(tmp_path, one)
    second = ChunkFolder.open(tmp_path, other)  # nothing was sampled with the first
    fill(first, (0, 4))  # by a process that was started before
    assert first.is_complete() and second.missing(4) == [(0, 4)]
    assert ChunkFolder.load(tmp_path).run == other
    fill(second, (0, 4))
    with pytest.raises(UserError, match=r"samples of other settings \(seed is 1 there, 0 now"):
        ChunkFolder.open(tmp_path, one)


def test_gathered_samples_of_others_are_not_replaced(tmp_path):
    ChunkFolder.open(tmp_path, plain_run(4))
    (tmp_path / "samples_all.npz").touch()
    with pytest.raises(UserError, match="holds samples of other settings"):
        ChunkFolder.open(tmp_path, plain_run(4, seed=1))
    (tmp_path / "settings.json").unlink()
    with pytest.raises(UserError, match=r"has samples, but no settings\.json that says what"):
        ChunkFolder.open(tmp_path, plain_run(4))


def test_paths_and_origins_may_change(tmp_path):
    run = plain_run(4)
    fill(ChunkFolder.open(tmp_path, run), (0, 4))
    moved = dataclasses.replace(run.network, path="elsewhere.pt")
    again = ChunkFolder.open(tmp_path, dataclasses.replace(run, network=moved))
    assert again.is_complete() and again.run.network.path == "elsewhere.pt"
    assert ChunkFolder.load(tmp_path).run == run


@pytest.mark.parametrize("harm", ["cut", "empty", "text"])
def test_a_damaged_chunk_is_missing_and_said_so(tmp_path, harm):
    folder = ChunkFolder.open(tmp_path, plain_run(8))
    fill(folder, (0, 4), (4, 8))
    path = tmp_path / "chunks" / folder.run.identity / "0000004-0000008.npz"
    content = path.read_bytes()
    path.write_bytes({"cut": content[:200], "empty": b"", "text": b"no archive"}[harm])
    said = []
    assert folder.remove_damaged(said.append, (0, 4)) == 0
    assert folder.remove_damaged(said.append) == 1
    assert str(path) in said[0] and said[0].endswith(": its samples are made again")
    assert folder.missing(4) == [(4, 8)]


def test_a_changed_byte_is_found_when_all_are_read(tmp_path):
    folder = ChunkFolder.open(tmp_path, plain_run(4))
    fill(folder, (0, 4))
    path = tmp_path / "chunks" / folder.run.identity / "0000000-0000004.npz"
    content = bytearray(path.read_bytes())
    content[300] ^= 1
    path.write_bytes(content)
    said = []
    assert folder.remove_damaged(said.append) == 0
    assert folder.remove_damaged(said.append, all_bytes=True) == 1 and folder.missing(4)


def test_what_dead_processes_left_is_removed_and_the_living_s_is_not(tmp_path):
    folder = ChunkFolder.open(tmp_path, plain_run(4))
    fill(folder, (0, 4))
    chunks = tmp_path / "chunks" / folder.run.identity
    old, new = chunks / ".tmp-0-a.npz", chunks / ".tmp-1-b.npz"
    old.touch()
    new.touch()
    os.utime(old, (time.time() - 10_000,) * 2)
    folder.clean()
    assert not old.exists() and new.exists() and folder.is_complete()


def test_how_chunks_were_made_is_kept_with_them(tmp_path):
    folder = ChunkFolder.open(tmp_path, plain_run(2))
    folder.write((0, 2), np.zeros((2, 8, 8, 3), np.uint8), np.arange(2), seconds=2.5, device="cpu")
    assert folder.about() == [{"seconds": 2.5, "device": "cpu"}]
    with folder.reader((0, 2)) as reader:
        assert reader.array("arr_1").tolist() == [0, 1]


def test_a_folder_without_settings_is_no_folder_of_samples(tmp_path):
    with pytest.raises(UserError, match=r"is not a folder of samples: it has no settings\.json"):
        ChunkFolder.load(tmp_path)


def test_small_batches_share_a_chunk_when_there_are_many():
    assert default_chunk_size(50_000, 32) == 32
    assert default_chunk_size(50_000, 1) == 13
    assert default_chunk_size(3, 16) == 16
